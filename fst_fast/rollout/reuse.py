"""The rollout store, append-only on disk, and the rule by which groups are filled from it.

Reuse is unbiased only where the decision to reuse does not look at the outcome: rollouts that scored a prompt on a
problem whose group would have got that prompt without them (fast/race.py), taken by sample index. `gap` checks it.
"""

from __future__ import annotations

import json
import zlib
from collections import Counter, defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from fst_fast.errors import UserError
from fst_fast.files import Appender
from fst_fast.records import Problem, Prompt, Rollout, SamplingParams, Verdict
from fst_fast.seeding import derive

if TYPE_CHECKING:
    from fst_fast.rollout.collect import Ask

MAX_K3 = 0.02  # mean over a sequence; beyond it the policy has moved too far from the one that sampled it
MIN_ESS = 0.3  # of the sequences taken; below it the cap is halved


class RolloutStore:
    """`rollouts/rollouts.jsonl` of a run directory. A resumed run cuts it back to its checkpoint's `offset`. `dry`:
    rank 0 alone writes it.

    `scored` holds what scored prompts in the present cycle, by number in the file.
    """

    def __init__(self, run_dir: Path, *, offset: int = 0, count: int = 0, dry: bool = False):
        self.path = run_dir / "rollouts" / "rollouts.jsonl"
        self._file = Appender(self.path, offset=offset, dry=dry)
        self.count = count
        self.scored: dict[int, Rollout] = {}

    @property
    def offset(self) -> int:
        """Bytes written so far, on disk."""
        return self._file.offset

    def add(self, rollouts: Sequence[Rollout], *, step: int, posed: Callable[[Problem], str]) -> None:
        """Append and flush: a crash loses at most the batch being written. `posed`: a problem's text, for readers."""
        lines = []
        for r in rollouts:
            record = {"id": self.count, "step": step, "problem": posed(r.problem), **_record(r)}
            lines.append(_seal(json.dumps(record, separators=(",", ":"))))
            if r.scoring:
                self.scored[self.count] = r
            self.count += 1
        self._file.write("".join(line + "\n" for line in lines))

    def forget(self, *, before: int) -> None:
        """What was scored in the last cycle is too old; `before`: number of the first rollout of the new one."""
        self.scored = {i: r for i, r in self.scored.items() if i >= before}

    def read_back(self, problems: Mapping[str, Problem], *, start: int) -> dict[int, Rollout]:
        """Fill `scored`, which is returned, from the file, from byte `start` on. UserError for a line that is not what
        was written."""
        with open(self.path, "rb") as file:
            file.seek(start)
            for line in file:
                record = _unseal(line)
                if record is None:
                    raise UserError(
                        f"{self.path}: the line that ends at byte {file.tell()} is damaged; put the file back, or "
                        "start again in another run_dir"
                    )
                if record["scoring"]:
                    self.scored[record["id"]] = _rollout(record, problems[record["problem_id"]])
        return self.scored

    def sync(self) -> None:
        self._file.sync()


# ------------------------------------------------------------------------------------------------------------ the rule


@dataclass(frozen=True)
class Rule:
    """What a step may reuse. Nothing here knows a reward."""

    blind: frozenset[str]  # ids of the problems whose prompts were chosen without their own scores
    sampling: SamplingParams
    version: int  # of the trainer
    oldest: int  # version of the weights that may have sampled it
    cap: float  # largest part of a group
    used: frozenset[int] = frozenset()  # numbers in the store that groups have used: once is all


@dataclass(frozen=True)
class Plan:
    """What a step reuses: `taken` is ask → number in the store. `drops`: why others of its problems were left."""

    cap: float
    taken: dict[int, int] = field(default_factory=dict)
    drops: Counter[str] = field(default_factory=Counter)


@dataclass
class Reused:
    """Where reuse stands in the present cycle; saved with every checkpoint."""

    start: int = 0  # byte of the store at which the cycle's rollouts begin
    cap: float = 1.0  # halved by each step whose sequences had too few effective samples
    used: list[int] = field(default_factory=list)  # numbers in the store: a rollout is used once


def plan(
    asks: Sequence[Ask],
    stored: Mapping[int, Rollout],
    rule: Rule,
    log_ratios: Callable[[Sequence[Rollout]], list[torch.Tensor]],
) -> Plan:
    """The asks that `stored` answers; the others are sampled.

    `log_ratios` gives log ρ_t of the chosen under the present weights, before anything is sampled: a sequence that
    fails the gate is simply asked for, and its group stays whole.
    """
    allowed, drops = eligible(asks, stored, rule)
    chosen = take(asks, allowed, rule.cap)
    ratios = dict(zip(chosen.values(), log_ratios([stored[i] for i in chosen.values()]), strict=True))
    means = torch.stack([k3(log).mean() for log in ratios.values()]).tolist() if ratios else []
    near = {i: stored[i] for i, mean in zip(ratios, means, strict=True) if mean <= MAX_K3}
    cap = rule.cap
    if near and effective_sample_size(torch.stack([ratios[i].double().sum() for i in near])) < MIN_ESS:
        cap /= 2
    taken = take(asks, near, cap)
    drops["k3"] = len(chosen) - len(near)
    drops["cap"] = len(allowed) - len(chosen) + len(near) - len(taken)
    return Plan(cap, taken, +drops)


def eligible(asks: Sequence[Ask], stored: Mapping[int, Rollout], rule: Rule) -> tuple[dict[int, Rollout], Counter[str]]:
    """The rollouts of `stored` that groups of these asks may use, and why others of the same problems may not."""
    wanted, problems = {(ask.prompt, ask.problem.id) for ask in asks}, {ask.problem.id for ask in asks}

    def refusal(i: int, r: Rollout) -> str:
        checks = {
            "minibatch": not r.scoring,
            "seen": r.problem.id not in rule.blind,
            "population": (r.prompt, r.problem.id) not in wanted,
            "used": i in rule.used,
            "sampling": r.sampling != rule.sampling,
            "stale": r.policy_version < rule.oldest or r.newest_version > rule.version,
            "incomplete": r.finish_reason == "aborted"
            or not len(r.response_ids) == len(r.logprobs) == sum(tokens for _, tokens in r.versions),
        }
        return next((reason for reason, refused in checks.items() if refused), "")

    reasons = {i: refusal(i, r) for i, r in stored.items() if r.problem.id in problems}
    allowed = {i: stored[i] for i, reason in reasons.items() if not reason}
    return allowed, Counter(reason for reason in reasons.values() if reason)


def take(asks: Sequence[Ask], allowed: Mapping[int, Rollout], cap: float) -> dict[int, int]:
    """Ask → number of the rollout that answers it: lowest sample indices first, at most `cap` of each group.

    Among equal indices the order is a hash of prompt and problem: that of the population would favour the best.
    """
    waiting: defaultdict[tuple[Prompt, str], list[int]] = defaultdict(list)
    for i in sorted(allowed, key=lambda i: (allowed[i].sample, i), reverse=True):
        waiting[allowed[i].prompt, allowed[i].problem.id].append(i)
    groups: defaultdict[str, list[int]] = defaultdict(list)
    for slot, ask in enumerate(asks):
        groups[ask.problem.id].append(slot)
    names = {prompt: prompt.id for prompt in {ask.prompt for ask in asks}}
    taken: dict[int, int] = {}
    for problem, slots in groups.items():
        found = [
            (slot, waiting[asks[slot].prompt, problem].pop())
            for slot in sorted(slots, key=lambda s: (asks[s].sample, derive(0, names[asks[s].prompt], problem)))
            if waiting[asks[slot].prompt, problem]
        ]
        taken |= dict(found[: int(cap * len(slots) + 1e-9)])
    return taken


# -------------------------------------------------------------------------------------------------------- measurement


def k3(log_ratios: torch.Tensor) -> torch.Tensor:
    """ρ − 1 − log ρ per token, in float64: never negative, its mean estimates KL(behaviour ‖ policy)."""
    log = log_ratios.double()
    return log.expm1() - log


def effective_sample_size(log_weights: torch.Tensor) -> float:
    """(Σw)² / (n Σw²) of weights given by their logarithms: 1 when all are equal, 1/n when one has it all."""
    log = log_weights.double()
    return float((2 * log.logsumexp(0) - (2 * log).logsumexp(0)).exp()) / len(log)


def reuse_metrics(
    reuse: Plan,
    rollouts: Sequence[Rollout],
    log_ratios: Sequence[tuple[Rollout, torch.Tensor]],
    *,
    version: int,
    weight_max: float,
) -> dict[str, Any]:
    """What a step reused, and how far it was from fresh. `log_ratios`: of what was trained on, groups with a signal.

    `gap` is the mean over problems of the rewards of reused minus fresh, `gap_error` its standard error.
    """
    reused = [r for r in rollouts if r.purpose == "gepa"]
    rewards: defaultdict[str, tuple[list[float], list[float]]] = defaultdict(lambda: ([], []))
    for r in rollouts:
        rewards[r.problem.id][r.purpose == "gepa"].append(r.reward)
    gaps = [sum(old) / len(old) - sum(new) / len(new) for new, old in rewards.values() if old and new]
    metrics: dict[str, Any] = {
        "taken": sorted(reuse.taken.values()),
        "fraction": len(reused) / len(rollouts),
        "cap": reuse.cap,
        "ages": dict(sorted(Counter(str(version - r.policy_version) for r in reused).items())),
        "drops": dict(sorted(reuse.drops.items())),
    }
    if len(gaps) > 1:
        spread = torch.tensor(gaps, dtype=torch.float64)
        metrics |= {"gap": float(spread.mean()), "gap_error": float(spread.std()) / len(gaps) ** 0.5}
    for name in ("reused", "fresh"):
        logs = [log.double() for r, log in log_ratios if (r.purpose == "gepa") == (name == "reused")]
        if logs:
            tokens = torch.cat(logs)
            metrics |= {
                f"{name}_ratio": float(tokens.exp().mean()),
                f"{name}_k3": float(k3(tokens).mean()),
                f"{name}_clipped": float((tokens.exp() > weight_max).double().mean()),
                f"{name}_token_ess": effective_sample_size(tokens),
                f"{name}_sequence_ess": effective_sample_size(torch.stack([log.sum() for log in logs])),
            }
    return metrics


# ------------------------------------------------------------------------------------------------------ lines on disk


def _seal(text: str) -> str:
    """A JSON object with the CRC-32 of itself as its last field."""
    return f'{text[:-1]},"crc":"{zlib.crc32(text.encode()):08x}"}}'


def _unseal(line: bytes) -> dict[str, Any] | None:
    """The object of a sealed line; None when it is not what was sealed."""
    head, mark, tail = line.rpartition(b',"crc":"')
    text = head + b"}"
    return json.loads(text) if mark and tail == b'%08x"}\n' % zlib.crc32(text) else None


def _record(r: Rollout) -> dict[str, object]:
    return {
        "prompt_id": r.prompt.id,
        "prompt": r.prompt.text,
        "problem_id": r.problem.id,
        "slice": r.problem.slice,
        "sample": r.sample,
        "purpose": r.purpose,
        "scoring": r.scoring,
        "prompt_ids": r.prompt_ids,
        "response_ids": r.response_ids,
        "logprobs": r.logprobs,
        "versions": r.versions,
        "sampling": asdict(r.sampling),
        "finish_reason": r.finish_reason,
        "engine": r.engine,
        "response": r.response,
        "reward": r.reward,
        "parts": dict(r.verdict.parts),
        "feedback": r.verdict.feedback,
    }


def _rollout(record: Mapping[str, Any], problem: Problem) -> Rollout:
    """`_record` backwards."""
    return Rollout(
        prompt=Prompt(record["prompt"]),
        problem=problem,
        sample=record["sample"],
        purpose=record["purpose"],
        prompt_ids=tuple(record["prompt_ids"]),
        response_ids=tuple(record["response_ids"]),
        logprobs=tuple(record["logprobs"]),
        versions=tuple((version, tokens) for version, tokens in record["versions"]),
        sampling=SamplingParams(**record["sampling"]),
        finish_reason=record["finish_reason"],
        engine=record["engine"],
        response=record["response"],
        verdict=Verdict(record["reward"], record["feedback"], record["parts"]),
        scoring=record["scoring"],
    )
