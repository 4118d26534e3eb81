"""The sandbox against programs that try to get out, to harm the host, to stop the trainer or to forge a result."""

import ctypes
import json
import os
import platform
import re
import subprocess
import sys
import time
import uuid
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from fst_fast.tasks import sandbox
from fst_fast.tasks.jail import CALLS, MACHINES
from fst_fast.tasks.sandbox import Outcome, Sandbox

pytestmark = [
    pytest.mark.skipif(sys.platform != "linux", reason="the layers are Linux's"),
    pytest.mark.filterwarnings("ignore:sandbox"),
]
SECRET = "hunter2-of-the-trainer"

# Forbids itself and all that it starts some of the kernel's layers, as an old kernel or a container does; then starts.
WITHOUT = """
import ctypes, os, struct, sys
layers, command = sys.argv[1].split(","), sys.argv[2:]
refuse, x86 = 0x00050000, os.uname().machine == "x86_64"
code = [(0x20, 0, 0, 0)]
if "landlock" in layers:
    code += [(0x15, 0, 1, 444), (0x06, 0, 0, refuse | 38)]
if "namespaces" in layers:
    code += [(0x15, 0, 1, 272 if x86 else 97), (0x06, 0, 0, refuse | 1)]
if "seccomp" in layers:
    code += [(0x15, 0, 3, 157 if x86 else 167), (0x20, 0, 0, 16), (0x15, 0, 1, 22), (0x06, 0, 0, refuse | 22)]
code += [(0x06, 0, 0, 0x7FFF0000)]
text = ctypes.create_string_buffer(b"".join(struct.pack("HBBI", *c) for c in code))
program = ctypes.create_string_buffer(struct.pack("HxxxxxxP", len(code), ctypes.addressof(text)))
libc = ctypes.CDLL(None)
assert not libc.prctl(38, 1, 0, 0, 0) and not libc.prctl(22, 2, program, 0, 0)
os.execvp(command[0], command)
"""


def programs(text: str) -> dict[str, tuple[str, str]]:
    """name → (program, what is said of it)."""
    return {n: (p, r) for n, r, p in re.findall(r"^=== (.+)\n=> (.+)\n((?:.*\n)+?)(?=\n|\Z)", text, re.MULTILINE)}


ESCAPES, HIDDEN = map(programs, (Path(__file__).parents[1] / "data/escapes.txt").read_text().split("-----\n"))
ORPHAN = """
import os, time
def f(x):
    if os.fork() == 0:
        os.setsid()
        if os.fork() == 0:
            os.closerange(0, 64)  # nobody waits for what it says, and it uses no CPU time
            time.sleep(60)
        os._exit(0)
    return 1
"""
ESCAPES |= {"null byte": ("\0", "SyntaxError|ValueError"), "half a character": ("x = '\ud800'", "Unicode|Syntax")}


@pytest.fixture(scope="module")
def complete() -> Sandbox:
    """Every layer, as this host has them."""
    return Sandbox(preamble="import math\nfrom collections import Counter")


@pytest.fixture(scope="module")
def strict() -> Sandbox:
    """The same, for programs that are to be out of time."""
    return Sandbox(seconds=0.5, jails=1)


@pytest.fixture
def preamble() -> str:
    """One that no other sandbox has."""
    return f"# {uuid.uuid4()}"


@pytest.fixture
def outside(tmp_path: Path) -> Iterator[Path]:
    """A file of the host that must not change."""
    path = tmp_path / "outside"
    path.write_text("untouched")
    before = path.stat()
    yield path
    assert path.read_text() == "untouched"
    assert os.listdir(tmp_path) == ["outside"]
    after = path.stat()
    assert (before.st_mode, before.st_uid, before.st_mtime_ns) == (after.st_mode, after.st_uid, after.st_mtime_ns)


def processes(preamble: str) -> set[str]:
    """The jails with this preamble and what came from them; other tests and workers have theirs at the same time."""
    out = set()
    for cmdline in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            text = cmdline.read_text()
        except OSError:
            continue
        if "jail.py" in text and preamble in text:
            out.add(cmdline.parent.name)
    return out


def without(layers: str, monkeypatch: pytest.MonkeyPatch, preamble: str = "") -> Sandbox:
    launcher, _ = sandbox._launcher()
    launcher = [] if "namespaces" in layers else launcher
    command = [sys.executable, "-c", WITHOUT, layers, *launcher]
    sandbox._warn.cache_clear()
    monkeypatch.setattr(sandbox, "_launcher", lambda: (command, "there are no private namespaces" * (not launcher)))
    return Sandbox(preamble=preamble, seconds=0.5, jails=1)


@pytest.mark.parametrize("name", [*ESCAPES, *HIDDEN])
def test_a_program_that_misbehaves_is_stopped_with_a_reason(
    complete: Sandbox, strict: Sandbox, outside: Path, name: str
) -> None:
    program, reason = {**ESCAPES, **HIDDEN}[name]
    outcome = (strict if "no result" in reason else complete).call(program, "f", str(outside))
    assert not outcome.result
    assert re.search(reason, outcome.error), outcome.error
    assert len(outcome.error) < 700
    assert complete.call("def f(x): return x + 1", "f", 1) == Outcome("2")  # and the next one runs


@pytest.mark.parametrize("layers", ["namespaces", "landlock"])
def test_the_same_holds_without_one_of_the_layers(layers: str, outside: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    weaker = without(layers, monkeypatch)
    with pytest.warns(UserWarning, match="sandbox: there .* no (private namespaces|Landlock)") as said:
        assert weaker.call("def f(x): return x", "f", 1) == Outcome("1")
    assert sum("sandbox: there" in str(warning.message) for warning in said) == 1
    cases = {**ESCAPES, **({} if layers == "landlock" else HIDDEN)}
    slow = {name for name, (_, reason) in cases.items() if "no result" in reason}
    for name in cases.keys() - slow:
        outcome = weaker.call(cases[name][0], "f", str(outside))
        assert not outcome.result, name
        assert outcome.error, name


@pytest.mark.parametrize("layers", ["seccomp", "seccomp,landlock"])
def test_processes_left_behind_end_with_the_program_where_they_cannot_be_forbidden(
    layers: str, preamble: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    weaker = without(layers, monkeypatch, preamble)
    with pytest.warns(UserWarning, match="programs can start processes"):
        weaker.call("def f(x): return x", "f", 1)
    before = processes(preamble)
    assert before
    outcome = weaker.call(ESCAPES["daemon"][0], "f", 1)  # two processes return; one who is not root cannot fork
    assert re.search("no result within|wrote to the channel|BlockingIOError", outcome.error)
    outcome = weaker.call(ORPHAN, "f", 1)
    assert outcome.result == "1" or "BlockingIOError" in outcome.error
    assert processes(preamble) == before
    assert weaker.call("def f(x): return x", "f", 1) == Outcome("1")


def test_orphans_end_with_the_program_without_namespaces_and_filter(
    preamble: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    weaker = without("seccomp,namespaces", monkeypatch, preamble)
    with pytest.warns(UserWarning, match="no private namespaces"):
        weaker.call("def f(x): return x", "f", 1)
    before = processes(preamble)
    assert before
    weaker.call(ORPHAN, "f", 1)
    assert processes(preamble) == before


def test_the_trainers_environment_is_not_seen(complete: Sandbox, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", SECRET)
    fresh = Sandbox(jails=1)
    env = json.loads(fresh.call("import os\ndef f(x): return dict(os.environ)", "f", 1).result)
    assert SECRET not in str(env)
    assert set(env) <= {"PYTHONHASHSEED", "OPENBLAS_NUM_THREADS", "OMP_NUM_THREADS", "LANG", *sandbox.KEPT}
    search = """
import os
def f(pid):
    found = {}
    for p in ["self", "1", str(os.getppid()), *map(str, range(1, 200)), str(pid)]:
        try: found[p] = open(f"/proc/{p}/environ").read()
        except OSError: pass
    return found
"""
    assert fresh.call(search, "f", os.getpid()) == Outcome("{}")


def test_a_function_gets_its_argument_by_name_or_alone_and_finds_the_preamble(complete: Sandbox) -> None:
    assert complete.call("def f(a, b=2): return [a, b]", "f", {"a": 1}) == Outcome("[1, 2]")
    assert complete.call("def g(a): return Counter(a)", "g", "aab") == Outcome('{"a": 2, "b": 1}')
    assert (
        complete.call("def f(x): return [math.inf, -math.inf, math.nan]", "f", 1).result == "[Infinity, -Infinity, NaN]"
    )
    assert complete.call("def f(x): return x + '\\ud800é'", "f", "\ud800") == Outcome('"\\ud800\\ud800\\u00e9"')


def test_programs_leave_nothing_to_each_other(complete: Sandbox) -> None:
    poison = "import builtins, json, math\nbuiltins.len = lambda x: 7\njson.dumps = math.pi = None\ndef f(x): return 1"
    for _ in range(2 * complete.size):
        complete.call(poison, "f", 1)
    assert complete.call("def f(x): return [len(x), round(math.pi)]", "f", "abc") == Outcome("[3, 3]")


def test_what_a_program_prints_is_lost(capfd: pytest.CaptureFixture[str]) -> None:
    program = "import os, sys\ndef f(x):\n print(x)\n os.write(2, b'x')\n return print(x, file=sys.stderr)"
    assert Sandbox(jails=1).call(program, "f", 1) == Outcome("null")
    assert capfd.readouterr() == ("", "")


def test_ordinary_programs_run(complete: Sandbox) -> None:
    for program, result in {
        "from dataclasses import *\n@dataclass\nclass P:\n x: 'int'\ndef f(x): return asdict(P(x))": '{"x": 1}',
        "import asyncio\nasync def g(x): return x\ndef f(x): return asyncio.run(g(x))": "1",
        "import numpy as np\ndef f(x): return float(np.linalg.inv(np.eye(3) * 2).sum())": "1.5",
        "import os\ndef f(x):\n with open(os.devnull, 'w') as g: print(x, file=g)\n return x": "1",
        "from decimal import Decimal\nimport datetime, re, zoneinfo\ndef f(x): return str(Decimal(x) / 8)": '"0.125"',
        "def f(x): return x\nif __name__ == '__main__': raise ValueError": "1",
        "import random\ndef f(x): return random.Random(x).randint(0, 9)": "2",
    }.items():  # fmt: skip
        assert complete.call(program, "f", 1) == Outcome(result)


def test_many_run_at_once_and_keep_their_order(complete: Sandbox) -> None:
    assert complete.size == min(16, os.cpu_count() or 1)
    programs = [f"def f(x): return x * {i}" if i % 5 else "def f(x): 1 / 0" for i in range(40)]
    expected = [
        Outcome(str(2 * i)) if i % 5 else Outcome(error="ZeroDivisionError: division by zero") for i in range(40)
    ]
    with ThreadPoolExecutor(complete.size + 4) as pool:  # some wait for a jail
        assert list(pool.map(lambda program: complete.call(program, "f", 2), programs)) == expected


def test_a_jail_that_dies_is_replaced() -> None:
    box = Sandbox(jails=1)
    assert box.call("def f(x): return x", "f", 1) == Outcome("1")
    jail = box._jails._idle.queue[0]
    assert jail is not None
    jail._process.kill()
    jail._process.wait()
    assert "did not answer" in box.call("def f(x): return x", "f", 1).error
    assert box.call("def f(x): return x", "f", 1) == Outcome("1")


def test_nothing_runs_on_when_the_trainer_is_gone(preamble: str) -> None:
    script = f"""
import sys, threading, time
sys.path.insert(0, {str(Path(sandbox.__file__).parents[2])!r})
from fst_fast.tasks.sandbox import Sandbox
box = Sandbox(preamble={preamble!r}, seconds=0.5)
box.call("def f(x): return x", "f", 1)
threading.Thread(target=lambda: box.call("while True: pass", "f", 1), daemon=True).start()
time.sleep(0.3)
print("busy", flush=True)
time.sleep(60)
"""
    with subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True) as trainer:
        assert trainer.stdout is not None
        assert trainer.stdout.readline() == "busy\n"
        assert processes(preamble)
        trainer.kill()
    deadline = time.monotonic() + 30
    while processes(preamble) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not processes(preamble)


def test_the_filters_numbers_are_this_kernels() -> None:
    here = 0 if platform.machine() == "x86_64" else 1
    libc = ctypes.CDLL(None, use_errno=True)
    assert platform.machine() in MACHINES
    for name, call, expected in [
        ("getpid", libc.getpid, None),
        ("getppid", libc.getppid, None),
        ("gettid", libc.gettid, None),
    ]:
        assert libc.syscall(CALLS[name][here]) == call(), (name, expected)
    assert len({numbers[0] for numbers in CALLS.values()}) == len(CALLS)


def test_an_argument_that_is_no_json_is_the_callers_fault(complete: Sandbox) -> None:
    bad: Any = {1, 2}
    with pytest.raises(TypeError, match="not JSON serializable"):
        complete.call("def f(x): return x", "f", bad)
    assert complete.call("def f(x): return x", "f", 1) == Outcome("1")
