"""Star graphs: find the one arm that leads from the centre to the goal. Easy to verify; the greedy first step fails.

A task for real models ("path-star", Bachmann & Nagarajan 2024): the first hop needs a look ahead to the arm's end.
"""

from __future__ import annotations

import random
import re
from collections.abc import Mapping, Sequence
from itertools import pairwise

from fst_fast.errors import UserError
from fst_fast.records import Problem, Verdict
from fst_fast.seeding import stream
from fst_fast.tasks.task import AGNOSTIC_PROMPT, Message, chat
from fst_fast.tasks.verifiers import final_answer

MAX_NODES = 1000
LONGEST_ANSWER = 10_000  # characters of a final answer that are read
# Topic → value → wordings; the first value is the right one. True of every shape. The words of a topic occur in the
# verifier's sentences about it, so that a rule-based reflector can tell which one speaks of what, but not who is right.
PHRASES: dict[str, dict[str, tuple[str, ...]]] = {
    "direction": {
        "forwards": ("the path starts at the start and ends at the goal.", "write the path from start to goal."),
        "backwards": ("the path starts at the goal and ends at the start.", "write the path from goal to start."),
    },
    "edges": {
        "all": ("go back from the goal along each edge.", "name every node: find the edge into the goal."),
        "one": ("take one edge from the start to the goal.", "jump over the nodes: a single edge is enough."),
    },
    "final answer": {
        "commas": ("separate the path in the final answer by commas.", "put a comma after each node of the path."),
        "semicolons": (
            "separate the path in the final answer by semicolons.",
            "put a semicolon after each node of the path.",
        ),
    },
}
PATH = re.compile(r"(?<![-0-9.])[0-9]+(?:(?: ?(?:,|->|→|=>|>) ?| )[0-9]+)*")


class StarGraphTask:
    """`star_graph:4x3` has 4 arms of 3 edges; nodes are random numbers, edges lead outwards in random order."""

    seed_prompt = AGNOSTIC_PROMPT
    phrasebook: Mapping[str, Sequence[str]] = {
        topic: [w for wordings in values.values() for w in wordings] for topic, values in PHRASES.items()
    }

    def __init__(self, shape: str, seed: int, *, n_train: int = 4096, n_validation: int = 128):
        match = re.fullmatch(r"([0-9]{1,4})x([0-9]{1,4})", shape)
        arms, length = map(int, match.groups()) if match else (0, 0)
        if arms < 2 or length < 1 or arms * length >= MAX_NODES:
            raise UserError(
                f"task 'star_graph:{shape}': the shape must be ARMSxLENGTH with at least 2 arms of at least 1 edge and "
                f"at most {MAX_NODES} nodes, e.g. star_graph:4x3."
            )
        self.name = f"star_graph:{shape}"
        rng = stream(seed, self.name, "problems")
        distinct: dict[str, Problem] = {}
        while len(distinct) < n_train + n_validation:
            problem = draw_problem(f"{self.name}/{len(distinct)}", arms, length, rng)
            distinct.setdefault(question(problem), problem)
        problems = list(distinct.values())
        self.train: Sequence[Problem] = problems[:n_train]
        self.validation: Sequence[Problem] = problems[n_train:]

    def messages(self, prompt: str, problem: Problem) -> list[Message]:
        return chat(prompt, question(problem))

    def verify(self, problem: Problem, response: str) -> Verdict:
        """Reward 1 for exactly the path; `parts` tells whether its start, all its edges and its goal are right."""
        expected = [str(node) for node in problem.data["path"]]
        path = parse_path(response)
        faults: dict[str, str] = {}
        if not path:
            faults = dict.fromkeys(("start", "edges", "goal"), "there is no path in the final answer")
        else:
            edges = {(str(a), str(b)) for a, b in problem.data["edges"]}
            broken = next((step for step in pairwise(path) if step not in edges), None)
            if path[0] != expected[0]:
                faults["start"] = f"the path starts at {path[0]:.20}, not at {expected[0]}"
            if broken:
                faults["edges"] = f"there is no edge {broken[0]:.20}>{broken[1]:.20}"
            if path[-1] != expected[-1]:
                faults["goal"] = f"the path ends at {path[-1]:.20}, not at {expected[-1]}"
        parts = {part: float(part not in faults) for part in ("start", "edges", "goal")}
        if not faults:  # edges lead outwards only, so no other path has this start and this goal
            return Verdict(1.0, "correct.", parts)
        said = ". ".join(dict.fromkeys(faults.values()))  # sentences: reflectors read them one by one
        return Verdict(0.0, f"{said}. expected: {', '.join(expected)}", parts)


def parse_path(response: str) -> list[str]:
    """The longest list of numbers in the final answer, with commas, arrows or spaces between them; empty when there is
    none, or another one as long."""
    answer = " ".join(final_answer(response)[:LONGEST_ANSWER].split())
    lists = {tuple(re.findall("[0-9]+", run)) for run in PATH.findall(answer)}
    longest = [path for path in lists if len(path) == max(map(len, lists))]
    return list(longest[0]) if len(longest) == 1 else []


def draw_problem(id: str, arms: int, length: int, rng: random.Random) -> Problem:
    n_nodes = 1 + arms * length
    centre, *others = rng.sample(range(max(100, 2 * n_nodes)), n_nodes)
    paths = [[centre, *others[i * length : (i + 1) * length]] for i in range(arms)]
    edges = [(a, b) for path in paths for a, b in pairwise(path)]
    rng.shuffle(edges)
    return Problem(id, {"edges": edges, "path": paths[rng.randrange(arms)]})


def question(problem: Problem) -> str:
    edges = ", ".join(f"{a}>{b}" for a, b in problem.data["edges"])
    path = problem.data["path"]
    return (
        f"Edges: {edges}. Find the path from {path[0]} to {path[-1]}. "
        "End with 'answer:' and the nodes of the path from start to goal, separated by commas."
    )
