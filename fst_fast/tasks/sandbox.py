"""Runs untrusted Python functions: many at once, each confined, each stopped in time. The programs run in `jail.py`.

No result is trusted before it is read here, as JSON text of at most a megabyte; nothing is ever unpickled. What is
being verified (the expected result) never enters the jail.
"""

from __future__ import annotations

import contextlib
import functools
import json
import os
import queue
import shutil
import subprocess
import sys
import threading
import warnings
import weakref
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fst_fast.tasks.jail import PATIENCE

GRACE = 5.0  # seconds beyond a program's own that its jail has to answer in; then the jail is killed with all in it
MEMORY = 1 << 30  # bytes of address space, beyond the interpreter's
START = 60.0  # seconds a jail has to start in: it runs the preamble
KEPT = ("LD_LIBRARY_PATH",)  # what a Python may need to start; no other variable is seen by a program


@dataclass(frozen=True, slots=True)
class Call:
    """`function(**argument)`, or `function(argument)` where the argument is not a dict, as `program` defines it."""

    program: str
    function: str
    argument: Any  # of JSON's types


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
        self.size = jails or min(16, os.cpu_count() or 1)
        self._seconds = seconds
        self._config = json.dumps({"preamble": preamble, "seconds": seconds, "memory": MEMORY})
        self._free: queue.LifoQueue[_Jail | None] = queue.LifoQueue()  # None = not started yet
        for _ in range(self.size):
            self._free.put(None)

    def call(self, call: Call) -> Outcome:
        """Waits for a free jail, then for the outcome."""
        jail = self._free.get()
        try:
            if jail is None:
                jail = _Jail(self._config)
                _warn(jail.missing)
            outcome = jail.ask(call, PATIENCE * self._seconds + GRACE)
            if outcome is None:
                jail.kill()
                jail = None
                outcome = Outcome(error="the sandbox did not answer and was killed with the program in it")
            return outcome
        finally:
            self._free.put(jail)


class _Jail:
    """One jail process; asked one thing at a time."""

    def __init__(self, config: str):
        launcher, reason = _launcher()
        env = {"PYTHONHASHSEED": "0", "OPENBLAS_NUM_THREADS": "1", "OMP_NUM_THREADS": "1", "LANG": "C.UTF-8"}
        env |= {name: os.environ[name] for name in KEPT if name in os.environ}
        self._process = subprocess.Popen(  # a session of its own: Ctrl-C is the trainer's
            [*launcher, sys.executable, "-P", "-s", "-B", str(Path(__file__).with_name("jail.py")), config],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=env,
            cwd="/",
            start_new_session=True,
        )
        self._end = weakref.finalize(self, _end, self._process)  # also when the sandbox is gone
        ready = self._line(START)
        if not ready:
            self.kill()
            raise RuntimeError("the sandbox's process did not start; its error stands above")
        self.missing = (*([reason] if reason else []), *json.loads(ready)["missing"])

    def ask(self, call: Call, seconds: float) -> Outcome | None:
        """None when it died or did not answer in time."""
        assert self._process.stdin is not None
        request = json.dumps({"program": call.program, "function": call.function, "argument": call.argument})
        try:
            self._process.stdin.write(request.encode() + b"\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            return None
        line = self._line(seconds)
        return Outcome(**json.loads(line)) if line else None

    def kill(self) -> None:
        self._end()

    def _line(self, seconds: float) -> bytes:
        assert self._process.stdout is not None
        deadline = threading.Timer(seconds, self._process.kill)
        deadline.start()
        try:
            line = self._process.stdout.readline()
        finally:
            deadline.cancel()
        return line if line.endswith(b"\n") else b""  # it was killed while it wrote


def _end(process: subprocess.Popen[bytes]) -> None:
    process.kill()  # takes `unshare`'s child along, the first process of its namespace, and so all in it
    process.wait()
    for pipe in (process.stdin, process.stdout):
        assert pipe is not None
        with contextlib.suppress(BrokenPipeError):  # a request it never read
            pipe.close()


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


@functools.cache
def _warn(missing: tuple[str, ...]) -> None:
    for sentence in missing:
        warnings.warn(f"sandbox: {sentence}.", stacklevel=2)
