"""A pool of processes that answer a line of JSON with another, each killed when it hangs and replaced when it dies."""

from __future__ import annotations

import contextlib
import json
import os
import queue
import subprocess
import threading
import weakref
from collections.abc import Callable, Sequence
from typing import Any

START = 60.0  # seconds that one has to say it is ready: a sandbox's runs its preamble first


class Workers:
    """As many processes as threads ask at once, to `size`, each started on first use. Safe to share between threads.

    `command` starts one, in `env` (default: this process's) and `cwd`; it says a line of JSON when it is ready, which
    `greeted` gets, and ends with its stdin. `name`: what it is, for the error when it does not start.
    """

    def __init__(
        self,
        name: str,
        command: Callable[[], Sequence[str]],
        *,
        size: int = 0,
        env: dict[str, str] | None = None,
        cwd: str | None = None,
        greeted: Callable[[Any], object] = lambda said: None,
    ):
        self.size = size or min(16, os.cpu_count() or 1)
        self._name, self._command, self._env, self._cwd, self._greeted = name, command, env, cwd, greeted
        self._idle: queue.LifoQueue[_Worker | None] = queue.LifoQueue()  # None: not started yet
        for _ in range(self.size):
            self._idle.put(None)

    def ask(self, question: Any, seconds: float) -> Any:
        """The answer to what JSON can say; None when the process died or took longer than `seconds`: it is killed.

        Waits for a free process. Raises TypeError for what JSON cannot say, RuntimeError when no process starts.
        """
        line = json.dumps(question).encode() + b"\n"
        worker = self._idle.get()
        try:
            worker = worker or self._start()
            answer = worker.line(seconds, line)
            if not answer:
                worker.end()
                worker = None
                return None
            return json.loads(answer)
        except BaseException:  # an interrupt: its answer would be taken for that to the next question
            if worker:
                worker.end()
                worker = None
            raise
        finally:
            self._idle.put(worker)

    def _start(self) -> _Worker:
        worker = _Worker(self._command(), self._env, self._cwd)
        said = worker.line(START)
        if not said:
            worker.end()
            raise RuntimeError(
                f"the {self._name} process did not start within {START:g} s; its error, if any, stands above"
            )
        self._greeted(json.loads(said))
        return worker


class _Worker:
    """One process; asked one thing at a time."""

    def __init__(self, command: Sequence[str], env: dict[str, str] | None, cwd: str | None):
        self._process = subprocess.Popen(  # a session of its own: Ctrl-C is the trainer's
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=env, cwd=cwd, start_new_session=True
        )
        self.end = weakref.finalize(self, _end, self._process)  # also when the pool is gone

    def line(self, seconds: float, question: bytes = b"") -> bytes:
        """What it says next, to `question`; b"" when it died or is killed for its silence."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        deadline = threading.Timer(seconds, self._process.kill)
        deadline.start()
        try:
            self._process.stdin.write(question)
            self._process.stdin.flush()
            line = self._process.stdout.readline()
        except BrokenPipeError:
            return b""
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
