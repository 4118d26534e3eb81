"""One slow step: groups → minibatches → fst_kernels loss → backward → clipped AdamW step."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

import torch

from fst_fast.config import SlowConfig
from fst_fast.errors import UserError
from fst_fast.model import Model, on_device
from fst_fast.ranks import ALONE, Ranks
from fst_fast.records import Group, Rollout
from fst_fast.shape import PassWork
from fst_fast.slow.advantage import advantages, has_signal
from fst_fast.slow.packing import packed_batches, packed_states, packed_tokens, packed_work, prepare
from fst_fast.slow.policy import (
    Policy,
    States,
    micro_batches,
    padded_tokens,
    padded_work,
    response_states,
    response_targets,
    shared_batches,
)
from fst_fast.slow.sharding import sum_over_machines
from fst_kernels import linear_kl, linear_policy_loss, linear_token_logprobs

FEW = 16  # rollouts: enough to see weights of another step


@dataclass(frozen=True)
class StepReport:
    """What one slow step did; metrics are token means over what was trained on."""

    groups: int
    live_groups: int  # with differing rewards; the others carry no policy gradient and are dropped (paper), KL and all
    metrics: dict[str, float]
    log_ratios: list[tuple[Rollout, torch.Tensor]] = field(default_factory=list)
    """log ρ_t [tokens] of each rollout trained on, by the weights of its minibatch's update. Empty for distillation."""
    at_start: list[tuple[Rollout, torch.Tensor]] = field(default_factory=list)
    """The same by the weights that the step began with: of the first minibatch, or of a few rollouts where the training
    pass tells nothing."""
    work: PassWork = field(default_factory=PassWork)
    """Of one forward pass over what was trained on, by all ranks. Empty for distillation."""


@dataclass(frozen=True)
class Sample:
    """A rollout as the loss sees it: one scalar advantage and one weight for all its tokens."""

    rollout: Rollout
    advantage: float
    weight: float  # of each token, before division by the minibatch's denominator
    teacher: tuple[int, ...] | None = None  # distillation: the context under which the teacher judges the response


Metrics = dict[str, torch.Tensor]  # numbers on the model's device: to read one waits for all that it computes
LossOf = Callable[[list[Sample], float], tuple[torch.Tensor, Metrics]]  # (micro-batch, denominator)


class Learner:
    """Trains `policy` with a policy gradient (CISPO by default) or by distillation. `base` is the frozen start.

    Every rank is given all rollouts and computes its share; losses are of the whole minibatch, so that gradients and
    reports add up.
    """

    def __init__(self, policy: Policy, base: Model, config: SlowConfig, ranks: Ranks = ALONE):
        self.policy, self.base, self.config, self.ranks = policy, base, config, ranks
        self._packs = config.pack != "off" and self._can_pack()
        self._states: Callable[[Sequence[Rollout], torch.device], States]
        self._states = packed_states if self._packs else response_states
        self._work_of = packed_work if self._packs else padded_work

    def _can_pack(self) -> bool:
        """The same on every rank. Raises UserError when packing was asked for and one of the models cannot."""
        refusals = []
        for model in (self.policy.model, self.base):
            try:
                prepare(model)
            except UserError as error:
                refusals.append(str(error))
        refusals = self.ranks.join(refusals)
        if refusals and self.config.pack == "on":
            raise UserError(refusals[0])
        return not refusals

    def step(self, groups: Sequence[Group], rng: random.Random) -> StepReport:
        """Paper's Eq. 4: L = −(1/P) Σ_x [Σ_{i,t} sg(min(ρ, τ)) A log π] / Σ_i |y_i| over the P problems of a minibatch.

        P counts every problem of the minibatch, also those skipped: a problem weighs the same in every step.
        """
        minibatches: list[list[Sample]] = []
        denominators: list[float] = []
        shuffled = rng.sample(list(groups), len(groups))
        for i in range(self.config.minibatches):
            part = shuffled[i :: self.config.minibatches]
            samples = [s for g in part if has_signal(g) for s in self._samples(g)]
            by_problem = self.config.average == "problem"
            minibatches.append(samples)
            denominators.append(len(part) if by_problem else sum(len(r.response_ids) for g in part for r in g.rollouts))
        start = self.policy.updates
        self._seen: list[tuple[int, list[Rollout], torch.Tensor]] = []
        self._work = PassWork()
        metrics = self._train(minibatches, denominators, self._policy_loss)
        own = [(at, r, log) for at, rollouts, logs in self._seen for r, log in by_rollout(rollouts, logs)]
        seen = self.ranks.join(own)
        return StepReport(
            len(groups),
            sum(map(has_signal, groups)),
            metrics,
            [(r, log) for _, r, log in seen],
            # nothing trained on: the weights are those from before
            [(r, log) for at, r, log in seen if at == start] or self._few([r for g in groups for r in g.rollouts]),
            sum(self.ranks.join([self._work]), PassWork()),
        )

    @torch.no_grad()
    def log_ratios(self, rollouts: Sequence[Rollout]) -> list[torch.Tensor]:
        """log ρ_t [tokens] of each rollout under the present weights, by one forward pass without gradient."""
        if not rollouts:
            return []
        head = self.policy.model.head
        found: dict[int, torch.Tensor] = {}
        for indices, counts in self._micro_batches(rollouts):
            micro = [rollouts[i] for i in indices]
            hidden = self._states(micro, self.policy.model.device)(self.policy.model)
            now = linear_token_logprobs(
                hidden,
                head.weight,
                response_targets(micro, hidden.device),
                bias=head.bias,
                temperature=micro[0].sampling.temperature,
                softcap=head.softcap,
            )
            if counts:
                ratios = now.logprobs - behaviour_logprobs(micro, hidden.device)
                found |= dict(zip(indices, [ratio for _, ratio in by_rollout(micro, ratios)], strict=True))
        return [ratios for _, ratios in sorted(self.ranks.join(list(found.items())), key=lambda item: item[0])]

    def distill(
        self, rollouts: Sequence[Rollout], contexts: Sequence[tuple[int, ...]], rng: random.Random
    ) -> StepReport:
        """Reverse KL(student ‖ frozen prompted teacher) on the student's own rollouts, exact over the vocabulary.

        `contexts[i]` is rollout i's problem under the teacher's prompt; every problem weighs the same. No reward used.
        """
        tokens: dict[str, int] = {}
        for r in rollouts:
            tokens[r.problem.id] = tokens.get(r.problem.id, 0) + len(r.response_ids)
        at_start = self._few(rollouts)
        pairs = rng.sample(list(zip(rollouts, contexts, strict=True)), len(rollouts))
        parts = [pairs[i :: self.config.minibatches] for i in range(self.config.minibatches)]
        minibatches = [[Sample(r, 0.0, 1.0 / tokens[r.problem.id], context) for r, context in part] for part in parts]
        metrics = self._train(minibatches, [len(tokens) / len(parts)] * len(parts), self._distill_loss)
        return StepReport(len(tokens), len(tokens), metrics, at_start=at_start)

    def _few(self, rollouts: Sequence[Rollout]) -> list[tuple[Rollout, torch.Tensor]]:
        """log ρ_t of some of them, for the price of one forward pass over these."""
        some = list(rollouts)[:: -(-len(rollouts) // FEW) or 1]
        return list(zip(some, self.log_ratios(some), strict=True))

    def _samples(self, group: Group) -> list[Sample]:
        scores = advantages(group, baseline=self.config.baseline)
        tokens = sum(len(r.response_ids) for r in group.rollouts)
        weight = 1.0 / tokens if self.config.average == "problem" else 1.0
        return [Sample(r, a, weight) for r, a in zip(group.rollouts, scores, strict=True)]

    def _train(self, minibatches: list[list[Sample]], denominators: list[float], loss_of: LossOf) -> dict[str, float]:
        """One optimizer step per non-empty minibatch, gradients accumulated over its micro-batches."""
        sums: dict[str, float] = {"tokens": 0}
        norm, updates = 0.0, 0
        for samples, denominator in zip(minibatches, denominators, strict=True):
            if not samples:
                continue
            rollouts, teachers = [s.rollout for s in samples], [s.teacher for s in samples if s.teacher]
            found: list[tuple[int, torch.Tensor, Metrics]] = []  # read when all is launched
            batches = self._micro_batches(rollouts, teachers)
            for k, (indices, counts) in enumerate(batches):
                # offloaded gradients would stay on the GPU until they are summed
                sum_over_machines(self.policy.model, self.config.offload or k == len(batches) - 1)
                micro = [samples[i] if counts else replace(samples[i], weight=0.0) for i in indices]
                tokens = sum(len(s.rollout.response_ids) for s in micro)
                loss, metrics = loss_of(micro, denominator)
                loss.backward()
                if counts:
                    found.append((tokens, loss.detach(), metrics))
            for tokens, loss, metrics in found:
                sums["loss"] = sums.get("loss", 0.0) + float(loss)
                for name, value in metrics.items():
                    sums[name] = sums.get(name, 0.0) + float(value) * tokens
                sums["tokens"] += tokens
            norm += self.policy.update()
            updates += 1
        if not updates:
            return {}
        sums = self.ranks.total(sums)
        count = sums.pop("tokens")
        means = {name: value / (updates if name == "loss" else count) for name, value in sums.items()}
        return means | {"grad_norm": norm / updates}

    def _micro_batches(
        self, rollouts: Sequence[Rollout], teachers: Sequence[tuple[int, ...]] = ()
    ) -> list[tuple[list[int], bool]]:
        """This rank's, as `shared_batches` gives them. Responses that stand under `teachers` too are not packed."""
        budget = self.config.micro_tokens
        if self._packs and not teachers:
            return shared_batches(self.ranks, rollouts, packed_batches(rollouts, budget), packed_tokens)
        return shared_batches(self.ranks, rollouts, micro_batches(rollouts, budget, teachers or None), padded_tokens)

    def _policy_loss(self, micro: list[Sample], denominator: float) -> tuple[torch.Tensor, Metrics]:
        rollouts = [s.rollout for s in micro]
        model, head, device = self.policy.model, self.policy.model.head, self.policy.model.device
        states, behaviour = self._states(rollouts, device), behaviour_logprobs(rollouts, device)
        lengths = torch.tensor([len(r.response_ids) for r in rollouts])

        def of_tokens(values: list[float]) -> torch.Tensor:
            return on_device(torch.tensor(values).repeat_interleave(lengths), device)

        ref_hidden = ref_weight = ref_bias = None
        if self.config.kl_coef:
            ref = self.base.head
            ref_weight, ref_bias = ref.weight, ref.bias
            with torch.no_grad():
                ref_hidden = states(self.base)
        out = linear_policy_loss(
            states(model),
            head.weight,
            response_targets(rollouts, device),
            behaviour,
            of_tokens([s.advantage for s in micro]),
            kind=self.config.loss,
            weight_max=self.config.weight_max,
            clip_low=self.config.clip_low,
            clip_high=self.config.clip_high,
            token_weights=of_tokens([s.weight for s in micro]),
            entropy_coef=self.config.entropy_coef,
            ref_hidden=ref_hidden,
            ref_weight=ref_weight,
            ref_bias=ref_bias,
            kl_coef=self.config.kl_coef,
            temperature=rollouts[0].sampling.temperature,
            softcap=head.softcap,
            bias=head.bias,
            denominator=denominator,
        )
        names = {
            "ratio": "ratio_mean",
            "clipped": "ratio_clipped_fraction",
            "k3": "behavior_k3_mean",
            "kl_ref": "kl_mean",
        }
        assert out.logprobs is not None
        if micro[0].weight:  # not an idle rank's
            self._seen.append((self.policy.updates, rollouts, out.logprobs - behaviour))
            self._work += self._work_of(rollouts)
        return out.loss, {ours: out.metrics[theirs] for ours, theirs in names.items() if theirs in out.metrics}

    def _distill_loss(self, micro: list[Sample], denominator: float) -> tuple[torch.Tensor, Metrics]:
        rollouts, model = [s.rollout for s in micro], self.policy.model
        contexts = [s.teacher or s.rollout.prompt_ids for s in micro]
        with torch.no_grad():
            teacher = response_states(rollouts, model.device, contexts)(self.base)
        kl = token_kl(model, response_states(rollouts, model.device)(model), self.base, teacher, rollouts)
        weights = on_device([s.weight for s in micro for _ in s.rollout.response_ids], kl.device)
        return (kl * weights).sum() / denominator, {"kl_teacher": kl.detach().mean()}


def behaviour_logprobs(rollouts: Sequence[Rollout], device: torch.device) -> torch.Tensor:
    """Of the responses' tokens when they were sampled, fp32 [N]."""
    return on_device([p for r in rollouts for p in r.logprobs], device)


def by_rollout(rollouts: Sequence[Rollout], log_ratios: torch.Tensor) -> list[tuple[Rollout, torch.Tensor]]:
    """log ρ_t in host memory, each rollout with its own [tokens]; `log_ratios` [N] runs over all."""
    parts = log_ratios.cpu().split([len(r.response_ids) for r in rollouts])
    # of views a pickle, on its way to other ranks, holds all they are views of
    return [(r, part.clone()) for r, part in zip(rollouts, parts, strict=True)]


def token_kl(
    p: Model, hidden_p: torch.Tensor, q: Model, hidden_q: torch.Tensor, rollouts: Sequence[Rollout]
) -> torch.Tensor:
    """Exact KL(p ‖ q) [N] over the whole vocabulary at each response token, at the rollouts' temperature."""
    head_p, head_q = p.head, q.head
    return linear_kl(
        hidden_p,
        head_p.weight,
        hidden_q,
        head_q.weight,
        direction="forward",
        temperature=rollouts[0].sampling.temperature,
        bias_p=head_p.bias,
        bias_q=head_q.bias,
        softcap=head_p.softcap,
    )
