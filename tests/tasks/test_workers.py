from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from fst_fast.tasks.workers import Workers

ECHO = """
import sys, time
print(1, flush=True)
for line in sys.stdin:
    if "hang" in line: time.sleep(60)
    if "die" in line: sys.exit()
    if "half" in line: print("[", end="", flush=True), sys.exit()
    print(line, end="", flush=True)
"""


def test_who_hangs_dies_or_says_half_a_line_is_replaced() -> None:
    greetings: list[int] = []
    workers = Workers("echo", lambda: [sys.executable, "-c", ECHO], size=1, greeted=greetings.append)
    for k, word in enumerate(["hang", "die", "half"]):
        assert workers.ask(["well", k], 30) == ["well", k]
        assert workers.ask([word], 0.5 if word == "hang" else 30) is None
    assert workers.ask(None, 30) is None  # an answer, too
    deaf = Workers("deaf", lambda: [sys.executable, "-c", "import time; print(1, flush=True); time.sleep(60)"], size=1)
    assert deaf.ask("x" * 10**6, 0.5) is None  # a question that does not even leave
    assert greetings == [1] * 4


def test_who_does_not_start_is_named() -> None:
    workers = Workers("sorry", lambda: [sys.executable, "-c", "1 / 0"], size=1)
    for _ in range(2):  # nobody waits for ever for a process that there is not
        with pytest.raises(RuntimeError, match="the sorry process did not start"):
            workers.ask(1, 30)


def test_an_interrupt_of_the_trainer_is_not_told_by_its_processes() -> None:
    script = f"""
import sys, time
sys.path.insert(0, {str(Path(__file__).parents[2])!r})
from fst_fast.tasks.math_check import MathChecker
checker = MathChecker()
checker.compare("1", "1")
try:
    print("now", flush=True)
    checker.compare("1", "$100000000!$")  # 10 seconds
    print("too late")
except KeyboardInterrupt:
    print(checker.compare("2", "2")[0])
"""
    with subprocess.Popen(
        [sys.executable, "-c", script],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    ) as trainer:
        assert trainer.stdout is not None
        assert trainer.stdout.readline() == "now\n"
        time.sleep(0.5)  # in the midst of a question
        os.killpg(trainer.pid, signal.SIGINT)
        assert trainer.communicate(timeout=60) == ("right\n", "")
