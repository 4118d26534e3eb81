"""math-verify in a process of its own, killed when it hangs.

Its own timeouts use signals: they work in main threads only, and cannot interrupt one long operation (9^9^9^9). Run as
a script, this file is that process: JSON lines of [answer, response] in, of [outcome, what was read] out.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading

SECONDS = 10.0  # for one response, after which it counts as wrong
LONGEST = 8000  # characters of a response that are read, from its end
MEMORY = 4 << 30  # bytes of address space of the process


class MathChecker:
    """Starts its process on first use, and again after a hang or a crash. Safe to share between threads."""

    def __init__(self, seconds: float = SECONDS):
        self.seconds = seconds
        self._process: subprocess.Popen[str] | None = None
        self._lock = threading.Lock()

    def check(self, answer: str, response: str) -> str:
        """Whether `response` equals `answer`: right or wrong; or "no answer", "no response" (nothing mathematical in
        it), "stuck" (out of time or memory).
        """
        return self.compare(answer, response)[0]

    def compare(self, answer: str, response: str) -> tuple[str, str]:
        """(outcome as of `check`, the expression that was read in the response, cut to 200 characters)."""
        with self._lock:
            process = self._process or self._start()
            assert process.stdin is not None
            assert process.stdout is not None
            deadline = threading.Timer(self.seconds, process.kill)
            deadline.start()
            try:
                process.stdin.write(json.dumps([answer, response[-LONGEST:]]) + "\n")
                process.stdin.flush()
                line = process.stdout.readline()
            except BrokenPipeError:
                line = ""
            finally:
                deadline.cancel()
            self._process = process
            if not line.endswith("\n"):
                process.kill()
                process.wait()
                self._process = None
                return "stuck", ""
            outcome, read = json.loads(line)
            return outcome, read

    def _start(self) -> subprocess.Popen[str]:
        process = subprocess.Popen(  # -P: this folder is no place to import from
            [sys.executable, "-P", __file__], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        assert process.stdout is not None
        if process.stdout.readline() != "ready\n":
            raise RuntimeError("the math-verify process did not start; its error stands above")
        return process


def serve() -> None:
    import logging
    import resource

    from math_verify import parse, verify

    logging.disable()
    if sys.platform == "linux":
        resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    out = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # whatever the libraries print is not an outcome

    def compare(answer: str, response: str) -> tuple[str, str]:
        gold = parse(
            answer if any(s in answer for s in ("$", "\\(", "\\[", "\\boxed")) else f"${answer}$", parsing_timeout=None
        )
        if not gold:
            return "no answer", ""
        found = parse(response, parsing_timeout=None)
        if not found:
            return "no response", ""
        outcome = "right" if verify(gold, found, timeout_seconds=None) else "wrong"
        try:
            return outcome, str(found[0])[:200]
        except ValueError:  # Python writes no whole number of more than 4300 digits
            return outcome, "a huge number"

    print("ready", file=out, flush=True)
    for line in sys.stdin:
        print(json.dumps(compare(*json.loads(line))), file=out, flush=True)


if __name__ == "__main__":
    serve()
