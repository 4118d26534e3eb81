"""Runs untrusted Python functions: many at once, each confined, each stopped in time. The programs run in `jail.py`.

No result is trusted before it is read here, as JSON text of at most a megabyte; nothing is ever unpickled. What is
being verified (the expected result) never enters the jail.
"""

from __future__ import annotations

import functools
import json
import os
import shutil
import subprocess
import sys
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fst_fast.tasks.jail import PATIENCE
from fst_fast.tasks.workers import Workers

GRACE = 5.0  # seconds beyond a program's own that its jail has to answer in; then the jail is killed with all in it
MEMORY = 1 << 30  # bytes of address space, beyond the interpreter's
KEPT = ("LD_LIBRARY_PATH",)  # what a Python may need to start; no other variable is seen by a program


@dataclass(frozen=True, slots=True)
class Outcome:
    """The function's result as JSON text (NaN and Infinity as Python writes them), or why there is none."""

    result: str = ""
    error: str = ""  # "" = it returned


class Sandbox:
    """A pool of jails, started on first use. Safe to share between threads.

    A program has `seconds` of CPU time and three times as many on the clock, 1 GiB of address space beyond the
    interpreter's, one thread, no other process, no network, no file to write to, no signal to send, nothing of this
    process's environment; it sees Python's own files only, and what it prints is lost. `preamble` is trusted code whose
    names every program finds defined.

    A layer that the host lacks is named by a warning when the first jail starts.
    """

    def __init__(self, *, preamble: str = "", seconds: float = 2.0, jails: int = 0):
        self._seconds = seconds
        config = json.dumps({"preamble": preamble, "seconds": seconds, "memory": MEMORY})
        jail = [sys.executable, "-P", "-s", "-B", str(Path(__file__).with_name("jail.py")), config]
        env = {"PYTHONHASHSEED": "0", "OPENBLAS_NUM_THREADS": "1", "OMP_NUM_THREADS": "1", "LANG": "C.UTF-8"}
        env |= {name: os.environ[name] for name in KEPT if name in os.environ}
        self._jails = Workers(
            "sandbox's", lambda: [*_launcher()[0], *jail], size=jails, env=env, cwd="/", greeted=_warn_of_missing
        )
        self.size = self._jails.size

    def call(self, program: str, function: str, argument: Any) -> Outcome:
        """Of `function(**argument)`, or `function(argument)` where the argument, of JSON's types, is not a dict, as
        `program` defines it. Waits for a free jail."""
        request = {"program": program, "function": function, "argument": argument}
        found = self._jails.ask(request, PATIENCE * self._seconds + GRACE)
        if found is None:
            return Outcome(error="the sandbox did not answer and was killed with the program in it")
        return Outcome(**found)


@functools.cache
def _launcher() -> tuple[list[str], str]:
    """(command that starts a jail in namespaces of its own, ""), or ([], why there are none)."""
    where = "only the filter of system calls keeps programs from the network and from other processes"
    unshare = shutil.which("unshare")
    if not unshare:
        return [], f"there are no private namespaces (no program `unshare`): {where}"
    command = [unshare, "--user", "--net", "--pid", "--ipc", "--uts", "--fork", "--kill-child"]
    tried = subprocess.run([*command, sys.executable, "-S", "-c", ""], capture_output=True, text=True)
    if tried.returncode:
        return [], f"there are no private namespaces ({' '.join(tried.stderr.split())[:200]}): {where}"
    return command, ""


def _warn_of_missing(ready: dict[str, list[str]]) -> None:
    reason = _launcher()[1]
    _warn((*([reason] if reason else []), *ready["missing"]))


@functools.cache
def _warn(missing: tuple[str, ...]) -> None:
    for sentence in missing:
        warnings.warn(f"sandbox: {sentence}.", stacklevel=2)
