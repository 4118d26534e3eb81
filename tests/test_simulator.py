from __future__ import annotations

import itertools
import random
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))
import real
from simulator import (
    POLICIES,
    BlockCache,
    Cycles,
    Gepa,
    Hardware,
    Job,
    Lengths,
    Policy,
    Result,
    Workload,
    lower_bound,
    make_step,
    optimum,
    simulate,
)

WORKLOADS = Path(__file__).parents[1] / "benchmarks" / "workloads"
SMALL = Workload(
    prompts=4,
    prompt_tokens=200,
    problems=16,
    problem_tokens=40,
    group=8,
    lengths=Lengths(mean=200, sigma=0.8, problem_share=0.5, limit=800),
    engines=4,
    cache_blocks=260,
    steps=3,
    hardware=Hardware(iteration=6e-3, per_sequence=1e-5, per_kv_token=1e-7, per_prefill_token=3e-5),
    reuse=0.25,
)
OURS = Policy("ours", "planned", admission=True)


@pytest.mark.parametrize("policy", POLICIES, ids=lambda p: p.name)
def test_every_token_is_decoded_once_and_no_time_is_made(policy: Policy) -> None:
    result = simulate(SMALL, policy)
    steps = [make_step(SMALL, s, 0)[0] for s in range(SMALL.steps)]
    if not policy.reuse:
        assert result.requests == sum(map(len, steps))
        assert result.decoded == sum(s.length for step in steps for s in step)
        assert result.prompt_tokens == sum(len(s.prompt) for step in steps for s in step)
    else:
        assert result.requests == SMALL.steps * round(0.75 * len(steps[0]))
    if not policy.streaming:  # streamed steps share prefixes with each other
        assert result.optimum <= result.prefilled <= result.prompt_tokens
    assert sum(result.seconds) >= result.busy / SMALL.engines
    longest = max(s.length for s in steps[0])
    if not policy.reuse:
        assert sum(result.seconds) >= longest * SMALL.hardware.iteration


@pytest.mark.parametrize("policy", [p for p in POLICIES if not p.streaming and not p.reuse], ids=lambda p: p.name)
def test_no_policy_beats_the_lower_bound(policy: Policy) -> None:
    for workload in (SMALL, replace(SMALL, cache_blocks=4000, problems=4), replace(SMALL, engines=1)):
        one = replace(workload, steps=1)
        assert lower_bound(one, make_step(one, 0, 0)[0]) <= simulate(one, policy).seconds[0]


def alone(h: Hardware, placed: Sequence[Job]) -> float:
    """Seconds of an engine that starts all of these at once and computes one token of each one's prompt."""
    longest = max((s.length for s in placed), default=0)
    read = sum(len(s.prompt) + t for s in placed for t in range(s.length))
    tokens = sum(s.length for s in placed)
    return longest * h.iteration + tokens * h.per_sequence + read * h.per_kv_token + len(placed) * h.per_prefill_token


def test_the_lower_bound_is_near_the_best_of_all_placements() -> None:
    heavy = Hardware(iteration=6e-3, per_sequence=3e-3, per_kv_token=1e-5, per_prefill_token=3e-5)
    ratios = []
    for seed in range(20):
        rng = random.Random(seed)
        jobs = [Job(i, 0, (i,) * 17, rng.choice([5, 20, 80, 300, 320]) + i) for i in range(6)]
        splits = [[[s for s, e in zip(jobs, where, strict=True) if e == k] for k in (0, 1)]
                  for where in itertools.product((0, 1), repeat=6)]  # fmt: skip
        best = min(max(alone(heavy, part) for part in split) for split in splits)
        ratios.append(lower_bound(replace(SMALL, engines=2, hardware=heavy), jobs) / best)
        assert lower_bound(replace(SMALL, engines=1, hardware=heavy), jobs) == pytest.approx(alone(heavy, jobs))
    assert max(ratios) <= 1 + 1e-9
    assert sum(ratios) / len(ratios) > 0.9


def test_a_lone_sequence_takes_the_time_of_its_iterations() -> None:
    one = replace(SMALL, prompts=1, problems=1, group=1, engines=1, steps=1)
    [s], _ = make_step(one, 0, 0)
    h, p, n = one.hardware, len(s.prompt), s.length
    expected = p * h.per_prefill_token + n * (h.iteration + h.per_sequence) + h.per_kv_token * sum(range(p, p + n))
    for policy in (POLICIES[0], OURS):
        assert simulate(one, policy).seconds == [pytest.approx(expected)]


def test_admission_by_expected_growth_all_but_ends_preemption() -> None:
    tight = replace(SMALL, problems=48, steps=2)
    free = simulate(tight, Policy("any", "planned"))
    careful = simulate(tight, OURS)
    assert free.preemptions > 100
    assert careful.preemptions < free.preemptions / 10
    assert careful.repeated < free.repeated / 10


def test_the_cache_is_never_overbooked_and_blocks_come_back(monkeypatch: pytest.MonkeyPatch) -> None:
    used: list[int] = []
    take = BlockCache.take

    def watched(cache: BlockCache, count: int) -> list[int]:
        assert count <= len(cache.free)
        out = take(cache, count)
        used.append(len(cache) - len(cache.free))
        return out

    monkeypatch.setattr(BlockCache, "take", watched)
    for policy in (POLICIES[0], OURS):
        simulate(replace(SMALL, steps=1), policy)
        assert max(used) <= SMALL.cache_blocks
    assert max(used) > 0.9 * SMALL.cache_blocks


def test_streaming_fills_the_tail_and_reuse_leaves_less_to_do() -> None:
    roomy = replace(SMALL, cache_blocks=4000, steps=6)
    seconds = {p.name: sum(simulate(roomy, p).seconds) for p in POLICIES}
    assert seconds["ours + streaming"] < 0.8 * seconds["ours"]
    assert seconds["ours + reuse"] < seconds["ours"]
    assert seconds["ours + streaming + reuse"] < seconds["ours + streaming"]


def test_a_cache_too_small_for_one_sequence_is_said() -> None:
    with pytest.raises(ValueError, match="cache_blocks = 10"):
        simulate(replace(SMALL, cache_blocks=10), OURS)


def test_the_block_cache_forgets_tails_before_heads_and_the_oldest_first() -> None:
    cache = BlockCache(6)
    first = cache.take(3)
    for i, b in enumerate(first):
        cache.name(b, ("first", i))
    cache.give(first)
    second = cache.take(3)  # the three that were never used
    for i, b in enumerate(second):
        cache.name(b, ("second", i))
    cache.give(second)
    assert cache.found([("first", 0), ("first", 1), ("first", 2)]) == first
    cache.take(1)
    assert cache.found([("first", 0), ("first", 1), ("first", 2)]) == first[:2]
    assert len(cache.found([("second", i) for i in range(3)])) == 3
    cache.share(first[:2])  # in use: not taken
    cache.take(3)
    assert cache.found([("first", 0), ("first", 1)]) == first[:2]
    assert not cache.found([("second", 0)])
    cache.forget()
    assert not cache.found([("first", 0)])


def test_equal_shares_of_work_whatever_the_policy() -> None:
    lengths = [[s.length for s in make_step(SMALL, 1, seed)[0]] for seed in (0, 0, 1)]
    assert lengths[0] == lengths[1] != lengths[2]
    assert max(lengths[0]) <= SMALL.lengths.limit


def test_the_optimum_is_every_distinct_full_block_once() -> None:
    sequences, _ = make_step(SMALL, 0, 0)
    blocks = {s.prompt[: 16 * (i + 1)] for s in sequences for i in range((len(s.prompt) - 1) // 16)}
    tails = sum((len(s.prompt) - 1) % 16 + 1 for s in sequences)
    assert optimum(sequences, 16) == 16 * len(blocks) + tails


@pytest.mark.parametrize("file", sorted(WORKLOADS.glob("*.json")), ids=lambda f: f.stem)
def test_the_shipped_workloads_load(file: Path) -> None:
    workload = Workload.load(file)
    assert workload.group % workload.prompts == 0 or workload.prompts % workload.group == 0
    assert isinstance(simulate(replace(workload, steps=1, problems=2), OURS), Result)


def test_a_workload_on_the_embedded_engine_is_sampled_whole_under_every_policy() -> None:
    small = replace(SMALL, problems=6, problem_tokens=30, lengths=Lengths(12, 0.8, 0.5, 40), max_running=16)
    rows = real.run(small, "torch", rounds=2, seed=0)
    assert set(rows) == {"random", "problem-major", "prompt-major", "ours, any admission"}
    sequences, _ = make_step(small, 0, 0)
    longest = max(s.length for s in sequences)
    for row in rows.values():
        assert row["generated"] == sum(s.length for s in sequences)
        assert row["asked"] == sum(len(s.prompt) for s in sequences)
        assert row["steps"] >= max(longest, row["generated"] / 16)
        # every prompt once, and under it every problem, but for first tokens that happen to be the same
        assert 0 <= 4 * 200 + 24 * 30 - row["plan"] < 24
        assert all(row["plan"] <= computed <= row["asked"] for computed in row["computed"])
    assert rows["ours, any admission"]["hit_rate"] > rows["problem-major"]["hit_rate"]


GEPA = Gepa(every=2, pool=6, keep=2, scoring=8, proposals=4, minibatch=3, accepted=2, reflect=1.0)


def test_the_calls_of_a_cycle_are_those_of_the_race_and_of_the_minibatches() -> None:
    assert GEPA.calls(race=False) == [(8, 6), (3, 4), (3, 4), (8, 2)]
    assert GEPA.calls(race=True) == [(2, 6), (2, 3), (4, 2), (3, 4), (3, 4), (2, 2), (2, 2), (4, 2)]


@pytest.mark.parametrize("race", [False, True])
def test_a_cycle_that_fills_its_steps_asks_the_same_and_takes_less_time(race: bool) -> None:
    steps = 8
    w = replace(SMALL, gepa=GEPA, steps=steps)
    waited, filler = (Cycles(w, 0, race=race, filler=beside) for beside in (False, True))
    assert sum(filler.run().seconds) < sum(waited.run().seconds)
    in_steps = sum(len(make_step(w, s, 0)[0]) for s in range(steps))
    in_cycle = sum(problems * prompts for problems, prompts in GEPA.calls(race=race))
    assert waited.result.requests == in_steps + 4 * in_cycle
    assert waited.result.requests < filler.result.requests < in_steps + 5 * in_cycle  # one for after the last step
    for sim in (waited, filler):
        assert sum(sim.result.seconds) <= sim.now
        assert sim.result.busy <= sim.now * SMALL.engines
