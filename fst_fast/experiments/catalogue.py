"""All experiments, in the order of the page."""

from fst_fast.experiments import curves, models, prompts, streams

EXPERIMENTS = (*curves.EXPERIMENTS, *streams.EXPERIMENTS, *prompts.EXPERIMENTS, *models.EXPERIMENTS)
