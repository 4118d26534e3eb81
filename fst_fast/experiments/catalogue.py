"""All experiments, in the order of the page."""

from fst_fast.experiments import curves

EXPERIMENTS = (*curves.EXPERIMENTS,)
