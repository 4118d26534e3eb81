"""The process of math_check.py, a script: JSON lines of [seconds, answer, response] in ([seconds, null, expression] for
its value), of [outcome, what was read] out.

math-verify's own timeouts use signals: they work in main threads only, and cannot interrupt one long operation
(9^9^9^9). Here a signal ends the process.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import sys
from typing import Any

MEMORY = 4 << 30  # bytes of address space


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

    print(json.dumps("ready"), file=out, flush=True)
    for line in sys.stdin:
        seconds, answer, response = json.loads(line)
        signal.setitimer(signal.ITIMER_PROF, seconds)  # SIGPROF ends the process
        print(json.dumps(value(response) if answer is None else compare(answer, response)), file=out, flush=True)


if __name__ == "__main__":
    serve()
