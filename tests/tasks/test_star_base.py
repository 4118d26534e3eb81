"""The tiny model of star graphs: its corpus means what it says, and the script makes a model that runs load."""

import random
from collections import Counter
from pathlib import Path

from fst_fast.model import load_model
from fst_fast.tasks.glyph_base import STAR_GRAPH, BaseConfig, accuracy, build_tokenizer, load, make_base
from fst_fast.tasks.star_base import ARMS, ASSET, LENGTH, TASK, corpus_example, instruction_cases, solve
from fst_fast.tasks.star_graph import PHRASES, draw_problem

RIGHT = {topic: next(iter(values)) for topic, values in PHRASES.items()}


def test_only_the_right_ways_together_are_rewarded() -> None:
    rng = random.Random(0)
    for _ in range(20):
        problem = draw_problem("p", ARMS, LENGTH, rng)
        assert TASK.verify(problem, solve(RIGHT, problem)).reward == 1
        for topic, values in PHRASES.items():
            wrong = TASK.verify(problem, solve(RIGHT | {topic: list(values)[1]}, problem))
            assert wrong.reward == 0


def test_the_corpus_does_mostly_as_it_is_told_and_otherwise_wrong() -> None:
    rng = random.Random(0)
    told, untold = Counter[bool](), Counter[bool]()
    right = [set(values[RIGHT[topic]]) for topic, values in PHRASES.items()]
    every = {sentence for sentences in TASK.phrasebook.values() for sentence in sentences}
    for _ in range(20000):
        instruction, question, answer = corpus_example(rng)
        start, *_, goal = question.split("path from ")[1].split(".")[0].split()
        path = answer.rpartition("answer: ")[2].split(", ")
        done = (path[0], path[-1], len(path)) == (start, goal, 3)
        if not any(sentence in instruction for sentence in every):
            untold[done] += 1
        elif all(any(sentence in instruction for sentence in some) for some in right):
            told[done] += 1
    assert 0.65 < told[True] / told.total() < 0.85
    assert untold[True] / untold.total() < 0.02


def test_a_number_is_one_token_and_texts_survive() -> None:
    tokenizer = build_tokenizer("star_graph")
    assert all(len(tokenizer(str(n))["input_ids"]) == 1 for n in range(100))
    for text in corpus_example(random.Random(0)):
        assert tokenizer.decode(tokenizer(" " + text)["input_ids"]) == " " + text


def test_the_shipped_model_does_as_it_is_told_and_guesses_the_node_between() -> None:
    assert sum(f.stat().st_size for f in ASSET.iterdir()) < 720_000
    model, tokenizer = load(ASSET)
    cases = instruction_cases(200, seed=7)
    untold = [(TASK.seed_prompt, problem) for _, problem in cases]
    assert 0.25 < accuracy(model, tokenizer, cases, sample_seed=None, world=STAR_GRAPH) < 0.45
    assert 0.12 < accuracy(model, tokenizer, cases, sample_seed=0, world=STAR_GRAPH) < 0.33
    assert accuracy(model, tokenizer, untold, sample_seed=0, world=STAR_GRAPH) <= 0.01


def test_the_shipped_tokenizer_is_the_one_the_script_makes(tmp_path: Path) -> None:
    build_tokenizer("star_graph").save_pretrained(tmp_path)
    for name in ("tokenizer.json", "chat_template.jinja"):
        assert (tmp_path / name).read_text() == (ASSET / name).read_text()


def test_a_short_warm_start_makes_a_folder_that_runs_load(tmp_path: Path) -> None:
    losses = make_base(BaseConfig(tmp_path, steps=3, batch=4, hidden=32, layers=1, ff=64, world="star_graph"), str)
    assert len(losses) == 3
    assert load_model(str(tmp_path)).lm.num_parameters() > 0
    assert accuracy(*load(tmp_path), instruction_cases(4, seed=0), sample_seed=0, world=STAR_GRAPH) == 0
