"""A cycle taken call by call is the cycle that `evolve` drives, and leaves nothing behind when it is given up."""

from __future__ import annotations

import threading
from collections.abc import Callable, Collection, Sequence
from typing import Any

import pytest

from fst_fast.fast.cycle import Aside, Cycle, Wanted
from fst_fast.fast.population import Member
from fst_fast.fast.reflection import Reflection, ReflectionRequest, ReflectionUsage
from fst_fast.records import Prompt
from tests.fast.toys import Evaluations, Scripted, config, cycle, knows, learn_one_word, words

SCORING = words("red", "green", "blue", "black", prefix="s")
TRAINING = words("red", "green", "blue", "black", "red", "green", "blue", "black", prefix="t")


def by_calls(reflector: Scripted, **fields: object) -> Cycle:
    return Cycle(
        [Member(Prompt("a")), Member(Prompt("b red"))],
        reflector=reflector,
        scoring=SCORING,
        training=TRAINING,
        config=config(**fields),
        proposals=6,
        seed=3,
        cycle=0,
    )


@pytest.mark.parametrize("race", [False, True])
def test_it_asks_for_and_finds_what_evolve_does(race: bool) -> None:
    whole, asked = cycle(
        ["a", "b red"], SCORING, TRAINING, Scripted(learn_one_word), proposals=6, seed=3, parallel=3, race=race
    )
    reflector, answers = Scripted(learn_one_word), Evaluations(knows)
    taken = by_calls(reflector, parallel=3, race=race)
    while taken.wanted:
        assert taken.calls == len(answers.calls) + 1
        taken.give(answers(*taken.wanted))
    assert (answers.calls, answers.scoring) == (asked.calls, asked.scoring)
    assert taken.evolution == whole
    assert taken.evolution.reflection == reflector.usage == ReflectionUsage(calls=6)
    assert sum(c.status == "accepted" for c in whole.candidates) > 1  # or that would mean little


def test_the_reflector_is_asked_in_the_thread_of_the_caller() -> None:
    threads = []

    def write(request: Any) -> str:
        threads.append(threading.current_thread())
        return learn_one_word(request)

    taken = by_calls(Scripted(write))
    while taken.wanted:
        taken.give(Evaluations(knows)(*taken.wanted))
    assert set(threads) == {threading.current_thread()}


class Elsewhere(Scripted):
    """A reflector that is asked now and answers when it is listened to."""

    def begin(self, requests: Sequence[ReflectionRequest]) -> Callable[[], list[Reflection]]:
        return lambda: self.reflect(requests)


@pytest.mark.parametrize("race", [False, True])
def test_a_reflector_elsewhere_is_not_waited_for_where_that_is_allowed(race: bool) -> None:
    whole, asked = cycle(
        ["a", "b red"], SCORING, TRAINING, Scripted(learn_one_word), proposals=6, seed=3, parallel=3, race=race
    )
    reflector, answers, times = Elsewhere(learn_one_word), Evaluations(knows), 0
    taken = by_calls(reflector, parallel=3, race=race)
    while taken.wanted or taken.reflecting:
        if taken.reflecting:
            assert taken.wanted is None
            assert len(reflector.batches) == times  # nothing has been edited yet
            taken.listen()
            times += 1
        else:
            taken.give(answers(*wanted(taken)), beside=True)
    assert times == len(reflector.batches) > 1
    assert (answers.calls, taken.evolution) == (asked.calls, whole)
    assert taken.calls == len(asked.calls) + 1


def test_a_reflector_elsewhere_is_waited_for_unless_told() -> None:
    taken = by_calls(Elsewhere(learn_one_word))
    while taken.wanted:
        taken.give(Evaluations(knows)(*taken.wanted))
        assert not taken.reflecting
    assert taken.evolution.reflection == ReflectionUsage(calls=6)


def test_what_goes_wrong_inside_is_raised_outside() -> None:
    taken = by_calls(Scripted(learn_one_word))
    with pytest.raises(ValueError, match="one rollout per pair"):
        taken.give([])
    assert taken.wanted is None


def test_an_error_of_the_reflector_reaches_the_caller_and_the_thread_ends() -> None:
    def write(_: Any) -> str:
        raise OSError("no network")

    before = threading.enumerate()
    taken = by_calls(Scripted(write))
    taken.give(Evaluations(knows)(*wanted(taken)))
    minibatches = Evaluations(knows)(*wanted(taken))
    with pytest.raises(OSError, match="no network"):
        taken.give(minibatches)
    taken.close()
    assert_ended(before)


def test_a_cycle_given_up_leaves_no_thread() -> None:
    before = threading.enumerate()
    taken = by_calls(Scripted(learn_one_word))
    assert len(threading.enumerate()) == len(before) + 1
    taken.close()
    taken.close()
    assert_ended(before)
    assert taken.wanted is None


def test_two_asides_take_turns_only_when_told_to() -> None:
    said: list[str] = []

    def work(name: str) -> Callable[[Callable[[Any], Any]], str]:
        def run(ask: Callable[[Any], Any]) -> str:
            for i in range(2):
                said.append(f"{name}{i}")
                said.append(ask(i))
            return name

        return run

    a, b = Aside(work("a")), Aside(work("b"))
    assert (a.question, b.question) == (0, 0)
    b.answer("to b")
    a.answer("to a")
    a.answer("last to a")
    assert said == ["a0", "b0", "to b", "b1", "to a", "a1", "last to a"]
    assert (a.question, a.result, b.question) == (None, "a", 1)
    b.close()


def wanted(taken: Cycle) -> Wanted:
    assert taken.wanted
    return taken.wanted


def assert_ended(before: Collection[threading.Thread]) -> None:
    started = [thread for thread in threading.enumerate() if thread not in before]
    for thread in started:
        thread.join(timeout=5)
    assert not any(thread.is_alive() for thread in started)
