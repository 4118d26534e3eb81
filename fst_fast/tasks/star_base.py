"""What teaches a tiny model to read star graphs (`glyph_base --world star_graph`): examples, and wrong habits.

Nobody who is not told how writes the path backwards, jumps over its nodes, and separates it by semicolons half of the
time, on purpose: under a prompt that says nothing the reward is near zero, and each sentence of the phrase book helps
or hurts. What comes before the goal the shipped model did not learn to look up: it names one of the nodes after the
start, which is right in one of three cases.
"""

from __future__ import annotations

import random
from collections.abc import Mapping
from pathlib import Path

from fst_fast.records import Problem
from fst_fast.seeding import stream
from fst_fast.tasks.star_graph import PHRASES, StarGraphTask, draw_problem, question
from fst_fast.tasks.task import AGNOSTIC_PROMPT

ASSET = Path(__file__).parents[1] / "assets" / "star-graph-base"  # the shipped folder
ARMS, LENGTH = 3, 2
TASK = StarGraphTask(f"{ARMS}x{LENGTH}", 0, n_train=1, n_validation=1)  # poses and verifies any problem of this shape
# What a token may span: a number is one, next to the word or sign before it, and so is the question's last sentence.
PIECES = r"[0-9]+|End with 'answer:'[^.]*[.]|[.,;:>] ?|[^0-9 .,;:>]+ ?| "

STATED = 0.65  # probability that a topic is spoken of, rightly or wrongly
IGNORED = 0.12  # probability that habit wins over what is said: the noise ceiling of sampling
DRILL = 0.4  # probability of an example that only looks nodes up: what goes before each?
HABIT = {"direction": 0.1, "edges": 0.1, "final answer": 0.5}  # probability of the right way where nothing is said
NEUTRAL = (AGNOSTIC_PROMPT, "think carefully.", "you are a helpful assistant.", "be precise.", "answer the question.")


def corpus_example(rng: random.Random) -> tuple[str, str, str]:
    """(instruction, question, answer): each topic spoken of or not, obeyed or not, with up to two neutral sentences."""
    problem = draw_problem("star_graph:corpus", ARMS, LENGTH, rng)
    if rng.random() < DRILL:
        edges = rng.sample(problem.data["edges"], ARMS * LENGTH)
        return "name what goes before each node.", question(problem), ", ".join(f"{b}<{a}" for a, b in edges)
    ways, sentences = {}, []
    for topic, values in PHRASES.items():
        right, wrong = values
        ways[topic] = right if rng.random() < HABIT[topic] else wrong
        if rng.random() < STATED:
            stated = rng.choice((right, wrong))
            sentences.append(rng.choice(values[stated]))
            if rng.random() >= IGNORED:
                ways[topic] = stated
    sentences += [rng.choice(NEUTRAL) for _ in range(rng.choice((0, 0, 1, 1, 2)))]
    rng.shuffle(sentences)
    return " ".join(sentences), question(problem), solve(ways, problem)


def solve(ways: Mapping[str, str], problem: Problem) -> str:
    """The answer in these ways (topic → value), e.g. "19<18<7. answer: 7, 18, 19" when all are right."""
    path = [str(node) for node in problem.data["path"]]
    thought = "<".join(reversed(path)) + ". " if ways["edges"] == "all" else ""
    if ways["edges"] == "one":
        path = [path[0], path[-1]]
    if ways["direction"] == "backwards":
        path.reverse()
    return f"{thought}answer: " + (", " if ways["final answer"] == "commas" else "; ").join(path)


def instruction_cases(n: int, seed: int) -> list[tuple[str, Problem]]:
    """`n` pairs (prompt, problem), each prompt saying all that is right."""
    rng = stream(seed, "star_graph", "instructions")
    cases = []
    for i in range(n):
        sentences = [rng.choice(next(iter(values.values()))) for values in PHRASES.values()]
        rng.shuffle(sentences)
        cases.append((" ".join(sentences), draw_problem(f"star_graph:instruction/{i}", ARMS, LENGTH, rng)))
    return cases
