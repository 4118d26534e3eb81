"""One slow step: groups → minibatches → fst_kernels loss → backward → clipped AdamW step."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

import torch

from fst_fast.config import SlowConfig
from fst_fast.errors import UserError
from fst_fast.model import Model
from fst_fast.records import Group, Rollout
from fst_fast.slow.advantage import advantages, has_signal
from fst_fast.slow.packing import pack, packed_batches, packed_hidden, unpackable
from fst_fast.slow.policy import Policy, micro_batches, response_hidden, response_targets
from fst_kernels import linear_kl, linear_policy_loss, linear_token_logprobs


@dataclass(frozen=True)
class StepReport:
    """What one slow step did; metrics are token means over what was trained on."""

    groups: int
    live_groups: int  # with differing rewards; the others carry no policy gradient and are dropped (fst.md), KL and all
    metrics: dict[str, float]
    log_ratios: list[tuple[Rollout, torch.Tensor]] = field(default_factory=list)
    """log ρ_t [tokens] of each rollout trained on, by the weights of its minibatch's update. Empty for distillation."""


@dataclass(frozen=True)
class Sample:
    """A rollout as the loss sees it: one scalar advantage and one weight for all its tokens."""

    rollout: Rollout
    advantage: float
    weight: float  # of each token, before division by the minibatch's denominator
    teacher: tuple[int, ...] | None = None  # distillation: the context under which the teacher judges the response


LossOf = Callable[[list[Sample], float], tuple[torch.Tensor, dict[str, float]]]  # (micro-batch, denominator)


class Learner:
    """Trains `policy` with a policy gradient (CISPO by default) or by distillation. `base` is the frozen start.

    Raises UserError for pack = on with a model that cannot be packed.
    """

    def __init__(self, policy: Policy, base: Model, config: SlowConfig):
        self.policy, self.base, self.config = policy, base, config
        why_not = unpackable(policy.model) if config.pack != "off" else "it is off"
        if config.pack == "on" and why_not:
            raise UserError(f"slow.pack = on: {why_not}; use auto or off")
        self.packs = not why_not

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
        self._seen: list[tuple[Rollout, torch.Tensor]] = []
        metrics = self._train(minibatches, denominators, self._policy_loss)
        return StepReport(len(groups), sum(map(has_signal, groups)), metrics, self._seen)

    @torch.no_grad()
    def log_ratios(self, rollouts: Sequence[Rollout]) -> list[torch.Tensor]:
        """log ρ_t [tokens] of each rollout under the present weights, by one forward pass without gradient."""
        head, found = self.policy.model.head, [torch.empty(0)] * len(rollouts)
        for indices in self._micro_batches(rollouts):
            micro = [rollouts[i] for i in indices]
            hidden = self._hidden_of(micro)(self.policy.model)
            now = linear_token_logprobs(
                hidden,
                head.weight,
                response_targets(micro, hidden.device),
                bias=head.bias,
                temperature=micro[0].sampling.temperature,
                softcap=head.softcap,
            )
            for i, (_, ratios) in zip(indices, by_rollout(micro, now.logprobs), strict=True):
                found[i] = ratios
        return found

    def distill(
        self, rollouts: Sequence[Rollout], contexts: Sequence[tuple[int, ...]], rng: random.Random
    ) -> StepReport:
        """Reverse KL(student ‖ frozen prompted teacher) on the student's own rollouts, exact over the vocabulary.

        `contexts[i]` is rollout i's problem under the teacher's prompt; every problem weighs the same. No reward used.
        """
        tokens: dict[str, int] = {}
        for r in rollouts:
            tokens[r.problem.id] = tokens.get(r.problem.id, 0) + len(r.response_ids)
        pairs = rng.sample(list(zip(rollouts, contexts, strict=True)), len(rollouts))
        parts = [pairs[i :: self.config.minibatches] for i in range(self.config.minibatches)]
        minibatches = [[Sample(r, 0.0, 1.0 / tokens[r.problem.id], context) for r, context in part] for part in parts]
        metrics = self._train(minibatches, [len(tokens) / len(parts)] * len(parts), self._distill_loss)
        return StepReport(len(tokens), len(tokens), metrics)

    def _samples(self, group: Group) -> list[Sample]:
        scores = advantages(group, baseline=self.config.baseline)
        tokens = sum(len(r.response_ids) for r in group.rollouts)
        weight = 1.0 / tokens if self.config.average == "problem" else 1.0
        return [Sample(r, a, weight) for r, a in zip(group.rollouts, scores, strict=True)]

    def _micro_batches(
        self, rollouts: Sequence[Rollout], contexts: Sequence[tuple[int, ...]] | None = None
    ) -> Iterable[list[int]]:
        """Indices of the rollouts of each forward pass. Packed, other contexts do not count: without gradient, their
        pass takes far less memory than the policy's."""
        if self.packs:
            return packed_batches(rollouts, self.config.micro_tokens)[0]
        return micro_batches(rollouts, self.config.micro_tokens, contexts)

    def _hidden_of(
        self, rollouts: Sequence[Rollout], contexts: Sequence[tuple[int, ...]] | None = None
    ) -> Callable[[Model], torch.Tensor]:
        """How a model's hidden states [N, H] of the responses are computed, see `response_hidden`."""
        if not self.packs:
            return lambda model: response_hidden(model, rollouts, contexts)
        packed = pack(rollouts, self.policy.model.device, contexts)
        return lambda model: packed_hidden(model, packed)

    def _train(self, minibatches: list[list[Sample]], denominators: list[float], loss_of: LossOf) -> dict[str, float]:
        """One optimizer step per non-empty minibatch, gradients accumulated over its micro-batches."""
        sums: dict[str, float] = {}
        count, updates = 0, 0
        for samples, denominator in zip(minibatches, denominators, strict=True):
            if not samples:
                continue
            rollouts, teachers = [s.rollout for s in samples], [s.teacher or () for s in samples]
            for indices in self._micro_batches(rollouts, teachers):
                micro = [samples[i] for i in indices]
                tokens = sum(len(s.rollout.response_ids) for s in micro)
                loss, metrics = loss_of(micro, denominator)
                loss.backward()
                sums["loss"] = sums.get("loss", 0.0) + float(loss.detach())
                for name, value in metrics.items():
                    sums[name] = sums.get(name, 0.0) + value * tokens
                count += tokens
            sums["grad_norm"] = sums.get("grad_norm", 0.0) + self.policy.update()
            updates += 1
        if not updates:
            return {}
        per_update = ("loss", "grad_norm")
        return {name: value / (updates if name in per_update else count) for name, value in sums.items()}

    def _policy_loss(self, micro: list[Sample], denominator: float) -> tuple[torch.Tensor, dict[str, float]]:
        rollouts = [s.rollout for s in micro]
        model, head, device = self.policy.model, self.policy.model.head, self.policy.model.device
        lengths = torch.tensor([len(r.response_ids) for r in rollouts], device=device)
        hidden_of = self._hidden_of(rollouts)
        ref_hidden = ref_weight = ref_bias = None
        if self.config.kl_coef:
            ref_weight, ref_bias = self.base.head.weight, self.base.head.bias
            with torch.no_grad():
                ref_hidden = hidden_of(self.base)
        out = linear_policy_loss(
            hidden_of(model),
            head.weight,
            response_targets(rollouts, device),
            torch.tensor([p for r in rollouts for p in r.logprobs], device=device),
            torch.tensor([s.advantage for s in micro], device=device).repeat_interleave(lengths),
            kind=self.config.loss,
            weight_max=self.config.weight_max,
            clip_low=self.config.clip_low,
            clip_high=self.config.clip_high,
            token_weights=torch.tensor([s.weight for s in micro], device=device).repeat_interleave(lengths),
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
        self._seen += by_rollout(rollouts, out.logprobs)
        return out.loss, {ours: float(out.metrics[theirs]) for ours, theirs in names.items() if theirs in out.metrics}

    def _distill_loss(self, micro: list[Sample], denominator: float) -> tuple[torch.Tensor, dict[str, float]]:
        rollouts = [s.rollout for s in micro]
        with torch.no_grad():
            teacher = self._hidden_of(rollouts, [s.teacher or s.rollout.prompt_ids for s in micro])(self.base)
        student = self._hidden_of(rollouts)(self.policy.model)
        kl = token_kl(self.policy.model, student, self.base, teacher, rollouts)
        weights = torch.tensor([s.weight for s in micro for _ in s.rollout.response_ids], device=kl.device)
        return (kl * weights).sum() / denominator, {"kl_teacher": float(kl.detach().mean())}


def by_rollout(rollouts: Sequence[Rollout], logprobs: torch.Tensor) -> list[tuple[Rollout, torch.Tensor]]:
    """log ρ_t = present − behaviour log-prob, each rollout with its own [tokens]; `logprobs` [N] runs over all."""
    behaviour = torch.tensor([p for r in rollouts for p in r.logprobs], device=logprobs.device)
    parts = (logprobs - behaviour).split([len(r.response_ids) for r in rollouts])
    return list(zip(rollouts, parts, strict=True))


def token_kl(
    p: Model, hidden_p: torch.Tensor, q: Model, hidden_q: torch.Tensor, rollouts: Sequence[Rollout]
) -> torch.Tensor:
    """Exact KL(p ‖ q) [N] over the whole vocabulary at each response token, at the rollouts' temperature."""
    return linear_kl(
        hidden_p,
        p.head.weight,
        hidden_q,
        q.head.weight,
        direction="forward",
        temperature=rollouts[0].sampling.temperature,
        bias_p=p.head.bias,
        bias_q=q.head.bias,
        softcap=p.head.softcap,
    )
