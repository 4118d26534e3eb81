"""Real processes at the price of a fork: `Warm` keeps one child with all imported, which forks a run per request.

A run can be killed with SIGKILL at the n-th call of any function, before it, after it or half-way through a write, or
after some seconds.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from functools import reduce
from importlib import import_module
from pathlib import Path
from typing import Any, Literal, NamedTuple, NoReturn

from fst_fast.config import INSTRUCTIONS


class Kill(NamedTuple):
    """SIGKILL at the `call`-th call of `at` ("module:name"), in the process that makes it."""

    at: str
    call: int = 1
    when: Literal["before", "half", "after"] = "before"


class Ended(NamedTuple):
    code: int  # exit code, or minus the signal
    stderr: str


class Warm:
    """`run` is `python -m fst_fast.train ARGUMENTS`, in a process of its own."""

    def __init__(self, folder: Path, instructions: int = INSTRUCTIONS):
        self._folder = folder
        self._server = subprocess.Popen(
            [sys.executable, "-m", "tests.warm", str(instructions)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            cwd=Path(__file__).parents[1],
        )

    def run(
        self,
        *argv: object,
        kill: Kill | float | None = None,
        ranks: int = 1,
        nodes: int = 1,
        folders: Sequence[Path] = (),
    ) -> Ended:
        """The ended run; `kill` is a place or a number of seconds. More than one rank, spread over `nodes`, each in one
        of `folders`: as torchrun would start them, and the code and the last words are those of the first that failed.
        """
        log = self._folder / "stderr"
        assert self._server.stdin
        assert self._server.stdout
        request = {"argv": list(map(str, argv)), "kill": kill, "log": str(log), "ranks": ranks, "nodes": nodes}
        request["folders"] = list(map(str, folders))
        self._server.stdin.write(json.dumps(request) + "\n")
        self._server.stdin.flush()
        code = int(self._server.stdout.readline())
        return Ended(code, log.read_text())

    def close(self) -> None:
        self._server.communicate()  # an empty stdin ends it


def serve(instructions: int) -> None:
    import matplotlib.backends.backend_svg  # noqa: F401 (what the forks find imported)

    import fst_fast.train  # noqa: F401
    from fst_fast import evaluate
    from fst_fast.model import load_model

    evaluate.INSTRUCTIONS = instructions
    load_model("")  # imports the model's code
    for line in sys.stdin:
        request = json.loads(line)
        with open(request["log"], "wb"):  # emptied
            pass
        if request["ranks"] > 1:
            print(_run_ranks(request), flush=True)
            continue
        child = os.fork()
        if not child:
            _run(request["argv"], request["kill"], request["log"])
        if isinstance(request["kill"], float):
            time.sleep(request["kill"])
            os.kill(child, signal.SIGKILL)
        _, status = os.waitpid(child, 0)
        print(os.waitstatus_to_exitcode(status), flush=True)


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


def _run_ranks(request: dict[str, Any]) -> int:
    """Exit code of the first rank that failed, 0 if none did."""
    port = free_port()
    children, size, node = set(), request["ranks"], request["ranks"] // request["nodes"]
    for rank in range(size):
        child = os.fork()
        if not child:
            os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "RANK": str(rank)}
            os.environ |= {"WORLD_SIZE": str(size), "LOCAL_RANK": str(rank % node), "LOCAL_WORLD_SIZE": str(node)}
            if request["folders"]:
                os.chdir(request["folders"][rank // node])
            _run(request["argv"], None, request["log"])
        children.add(child)
    code = 0
    while children:
        child, status = os.wait()
        children.discard(child)
        if status and not code:
            code = os.waitstatus_to_exitcode(status)
            for other in children:
                os.kill(other, signal.SIGKILL)
    return code


def _run(argv: Sequence[str], kill: Sequence[Any] | float | None, log: str) -> NoReturn:
    os.dup2(os.open(log, os.O_WRONLY | os.O_APPEND), 2)
    os.dup2(os.open(os.devnull, os.O_RDWR), 0)
    os.dup2(0, 1)
    from fst_fast.cli import run
    from fst_fast.train import main

    code = 0
    try:
        if isinstance(kill, list):
            arm(Kill(*kill))
        sys.argv[1:] = argv
        run(main)
    except SystemExit as end:
        code = int(end.code or 0)
    except BaseException:
        sys.excepthook(*sys.exc_info())
        code = 1
    sys.stderr.flush()
    os._exit(code)


def arm(kill: Kill) -> None:
    """From now on the chosen call is this process's last."""
    module, _, path = kill.at.partition(":")
    *owners, name = path.split(".")
    owner = reduce(getattr, owners, import_module(module))
    real = getattr(owner, name)
    calls = 0

    def fatal(*args: Any, **kwargs: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls != kill.call:
            return real(*args, **kwargs)
        if kill.when == "half":
            *first, text = args
            real(*first, text[: len(text) // 2])
        elif kill.when == "after":
            real(*args, **kwargs)
        return os.kill(os.getpid(), signal.SIGKILL)

    setattr(owner, name, fatal)


if __name__ == "__main__":
    serve(int(sys.argv[1]))
