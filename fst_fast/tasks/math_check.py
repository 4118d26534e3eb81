"""math-verify in processes of its own (math_serve.py), killed when they hang."""

from __future__ import annotations

import sys
from pathlib import Path

from fst_fast.tasks.workers import Workers

SECONDS = 10.0  # of CPU time for one response, after which it counts as wrong: a busy machine changes no verdict
PATIENCE = 3.0  # times as long it may take on the clock
LONGEST = 8000  # characters of a response that are read, from its end


class MathChecker:
    """A pool of them, started on first use.

    `strict` reads LaTeX only, not the last number of a text that is none; without `units` a last letter is no unit that
    may be left out: v^2 m is not v^2.
    """

    def __init__(self, seconds: float = SECONDS, *, strict: bool = False, units: bool = True):
        self.seconds = seconds
        options = [*(["strict"] if strict else []), *([] if units else ["bare"])]
        script = str(Path(__file__).with_name("math_serve.py"))
        # -P: its folder is no place to import from
        self._workers = Workers("math-verify", lambda: [sys.executable, "-P", script, *options])
        self.size = self._workers.size

    def compare(self, answer: str, response: str) -> tuple[str, str]:
        """Whether `response` equals `answer`: right or wrong; or "no answer", "no response" (nothing mathematical in
        it), "stuck" (out of time or memory). And the expression that was read in it, cut to 200 characters."""
        return self._ask(answer, response[-LONGEST:])

    def value(self, expression: str) -> float | None:
        """The real number that an expression is, to 15 digits; None when it is none, or cannot be told in time."""
        found = self._ask(None, f"\\boxed{{{expression[-LONGEST:]}}}")[1]
        return float(found) if found else None

    def _ask(self, answer: str | None, text: str) -> tuple[str, str]:
        outcome, read = self._workers.ask([self.seconds, answer, text], PATIENCE * self.seconds) or ("stuck", "")
        return outcome, read
