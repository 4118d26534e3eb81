"""math-verify in a process of its own, killed when it hangs.

Its own timeouts use signals: they work in main threads only, and cannot interrupt one long operation (9^9^9^9). Run as
a script, this file is that process: JSON lines of [seconds, answer, response] in ([seconds, null, expression] for its
value), of [outcome, what was read] out.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import queue
import subprocess
import sys
import threading
from typing import Any

SECONDS = 10.0  # of CPU time for one response, after which it counts as wrong: a busy machine changes no verdict
PATIENCE = 3.0  # times as long it may take on the clock
LONGEST = 8000  # characters of a response that are read, from its end
MEMORY = 4 << 30  # bytes of address space of the process


class MathChecker:
    """Starts a process on first use, and again after a hang or a crash; as many as threads ask at once, to `size`.

    `strict` reads LaTeX only, not the last number of a text that is none; without `units` a last letter is no unit that
    may be left out: v^2 m is not v^2.
    """

    def __init__(self, seconds: float = SECONDS, *, strict: bool = False, units: bool = True):
        self.seconds = seconds
        self._arguments = ["-P", __file__, *(["strict"] if strict else []), *([] if units else ["bare"])]
        self.size = min(16, os.cpu_count() or 1)
        self._idle: queue.LifoQueue[subprocess.Popen[str] | None] = queue.LifoQueue()  # None: not started yet
        for _ in range(self.size):
            self._idle.put(None)

    def check(self, answer: str, response: str) -> str:
        """Whether `response` equals `answer`: right or wrong; or "no answer", "no response" (nothing mathematical in
        it), "stuck" (out of time or memory).
        """
        return self.compare(answer, response)[0]

    def compare(self, answer: str, response: str) -> tuple[str, str]:
        """(outcome as of `check`, the expression that was read in the response, cut to 200 characters)."""
        return self._ask([answer, response[-LONGEST:]])

    def value(self, expression: str) -> float | None:
        """The real number that an expression is, to 15 digits; None when it is none, or cannot be told in time."""
        found = self._ask([None, f"\\boxed{{{expression[-LONGEST:]}}}"])[1]
        return float(found) if found else None

    def _ask(self, question: list[str | None]) -> tuple[str, str]:
        process = self._idle.get()
        try:
            process = process or self._start()
            assert process.stdin is not None
            assert process.stdout is not None
            deadline = threading.Timer(PATIENCE * self.seconds, process.kill)
            deadline.start()
            try:
                process.stdin.write(json.dumps([self.seconds, *question]) + "\n")
                process.stdin.flush()
                line = process.stdout.readline()
            except BrokenPipeError:
                line = ""
            finally:
                deadline.cancel()
            if not line.endswith("\n"):
                process.kill()
                process.wait()
                process = None
                return "stuck", ""
            outcome, read = json.loads(line)
            return outcome, read
        finally:
            self._idle.put(process)

    def _start(self) -> subprocess.Popen[str]:
        process = subprocess.Popen(  # -P: this folder is no place to import from
            [sys.executable, *self._arguments], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        assert process.stdout is not None
        if process.stdout.readline() != "ready\n":
            raise RuntimeError("the math-verify process did not start; its error stands above")
        return process


def serve() -> None:
    import logging
    import resource
    import signal

    from latex2sympy2_extended import NormalizationConfig
    from math_verify import ExprExtractionConfig, LatexExtractionConfig, parse, verify

    logging.disable()
    if sys.platform == "linux":
        resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    out = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # whatever the libraries print is not an outcome

    latex = LatexExtractionConfig()
    if "bare" in sys.argv:
        latex = LatexExtractionConfig(
            normalization_config=NormalizationConfig(
                basic_latex=True, units=False, malformed_operators=True, nits=True, boxed="all", equations=False
            )
        )

    targets = [latex] if "strict" in sys.argv else [latex, ExprExtractionConfig()]

    def read(text: str) -> list[Any]:
        return parse(text, targets, parsing_timeout=None)

    def compare(answer: str, response: str) -> tuple[str, str]:
        gold = read(answer if any(s in answer for s in ("$", "\\(", "\\[", "\\boxed")) else f"${answer}$")
        if not gold:
            return "no answer", ""
        found = read(response)
        if not found:
            return "no response", ""
        outcome = "right" if verify(gold, found, timeout_seconds=None) else "wrong"
        try:
            return outcome, str(found[0])[:200]
        except ValueError:  # Python writes no whole number of more than 4300 digits
            return outcome, "a huge number"

    def value(expression: str) -> tuple[str, str]:
        for found in parse(expression, [latex], fallback_mode="no_fallback", parsing_timeout=None):
            with contextlib.suppress(TypeError, ValueError, OverflowError, AttributeError):
                number = float(found.evalf())
                return ("value", repr(number)) if math.isfinite(number) else ("none", "")
        return "none", ""

    print("ready", file=out, flush=True)
    for line in sys.stdin:
        seconds, answer, response = json.loads(line)
        signal.setitimer(signal.ITIMER_PROF, seconds)  # SIGPROF ends the process
        print(json.dumps(value(response) if answer is None else compare(answer, response)), file=out, flush=True)


if __name__ == "__main__":
    serve()
