"""The process that runs untrusted programs for `sandbox.py`, one at a time, each in a fork that confines itself first.

Run as a script, without this project: JSON lines of requests in, of outcomes out. Three layers keep a program in:
resource limits; an allow-list of system calls (seccomp: what is not on it fails with EPERM, so there is no socket, no
second process or thread, no signal to others, no change to any file); and Landlock, which hides all files but
Python's. None needs privileges. Where the host allows it, `unshare` has put this process into namespaces of its own
before, which keep the same things out once more.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import gc
import json
import math
import os
import platform
import secrets
import select
import signal
import struct
import sys
import sysconfig
import time
import types
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, NoReturn

Work = Callable[[Callable[[bytes], None]], None]  # gets a function that writes
LARGEST = 1 << 20  # bytes of a result
PATIENCE = 3  # times its CPU time that a program may take on the clock: the machine may be busy
MESSAGE = 500  # characters of an exception's text that are kept
NO_SUCH_LAYER = {
    "seccomp": "there is no filter of system calls (seccomp) here: programs can start processes, write files and reach "
    "whatever the namespaces leave",
    "landlock": "there is no Landlock here (Linux 5.13): programs can read every file that this user can",
}


def serve() -> None:
    config = json.loads(sys.argv[1])
    requests, replies = os.fdopen(os.dup(0), "rb"), os.fdopen(os.dup(1), "wb")
    null = os.open(os.devnull, os.O_RDWR)
    os.dup2(null, 0)
    os.dup2(null, 1)
    jail = Jail(config["preamble"], config["seconds"], config["memory"])

    def reply(message: dict[str, Any]) -> None:
        replies.write(json.dumps(message).encode() + b"\n")
        replies.flush()

    reply({"missing": jail.missing})
    for line in requests:
        reply(jail.run(**json.loads(line)))


class Jail:
    def __init__(self, preamble: str, seconds: float, memory: int):
        self._seconds = seconds
        self._names: dict[str, Any] = {"__builtins__": __builtins__}
        exec(preamble, self._names)
        self._memory = memory
        if sys.platform == "linux":
            self._memory += int(Path("/proc/self/statm").read_text().split()[0]) * os.sysconf("SC_PAGE_SIZE")
            with contextlib.suppress(OSError):  # the first to go when the machine runs out of memory
                Path("/proc/self/oom_score_adj").write_text("1000")
        _prctl(PR_SET_CHILD_SUBREAPER, 1)  # orphans become ours to kill
        self._ruleset = landlock_ruleset()
        self._layers = [] if self._ruleset is None else ["landlock"]
        if ARCHITECTURE:
            self._layers.append("seccomp")
        gc.collect()
        gc.freeze()  # a fork copies no page just because of the collector
        for layer in list(self._layers):  # what the host refuses when it is tried
            if self._in_child(partial(self._try, layer), 30)[0] != b"1":
                self._layers.remove(layer)
        self.missing = [sentence for layer, sentence in NO_SUCH_LAYER.items() if layer not in self._layers]

    def run(self, program: str, function: str, argument: Any) -> dict[str, str]:
        """{"result": JSON text} or {"error": reason}."""
        seal = secrets.token_hex(16).encode()  # known to the child alone: text that a program prints is no result

        def child(write: Callable[[bytes], None]) -> None:
            limit(math.ceil(self._seconds), self._memory)
            if confine(self._layers, self._ruleset) != b"1":
                os._exit(70)
            write(seal + _call(self._names, program, function, argument))

        said, status, late = self._in_child(child, PATIENCE * self._seconds)
        if late or (os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGXCPU):
            return {"error": f"no result within {self._seconds:g} seconds"}
        if len(said) > LARGEST:
            return {"error": f"the result is larger than {LARGEST >> 20} MB"}
        if os.WIFSIGNALED(status):
            killer = SIGNALS.get(os.WTERMSIG(status), f"signal {os.WTERMSIG(status)}")
            return {"error": f"the program was killed by {killer}"}
        if not said:
            return {"error": "the program ended itself without a result"}
        if not said.startswith(seal) or said.count(seal) > 1 or status:  # twice: by a process that it started
            return {"error": "the program wrote to the channel of its result"}
        kind, text = said[len(seal) : len(seal) + 1], said[len(seal) + 1 :].decode("utf-8", "replace")
        return {"result": text} if kind == b"=" else {"error": text}

    def _try(self, layer: str, write: Callable[[bytes], None]) -> None:
        write(confine([layer], self._ruleset))

    def _in_child(self, work: Work, wall: float) -> tuple[bytes, int, bool]:
        """(what a fork wrote while it did `work`, its exit status, whether it was out of time). Nothing survives it."""
        deadline = time.monotonic() + wall
        ours, its = os.pipe()
        parent = os.getpid()
        pid = os.fork()
        if pid == 0:
            _become(its, parent, self._ruleset, work)
        os.close(its)
        said, late = b"", False
        while len(said) <= LARGEST:
            if not select.select([ours], [], [], max(0.0, deadline - time.monotonic()))[0]:
                late = True
                break
            piece = os.read(ours, 1 << 16)
            if not piece:
                break
            said += piece
        os.close(ours)
        status = _ended(pid, 0 if late or len(said) > LARGEST else deadline - time.monotonic())
        kill_descendants()
        return said, status, late


SIGNALS = {s.value: s.name for s in signal.Signals} | {9: "SIGKILL: out of CPU time or of memory"}


def _become(channel: int, parent: int, ruleset: int | None, work: Work) -> NoReturn:
    """The child: closes all that it inherited but `channel`, does `work`, and ends without any handler of a program."""
    leave = os._exit
    try:
        _prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != parent:
            leave(70)
        os.dup2(0, 2)  # /dev/null
        keep = sorted({channel, *([] if ruleset is None else [ruleset])})
        for low, high in zip([2, *keep], [*keep, 1 << 20], strict=True):
            os.closerange(low + 1, high)
        put = os.write

        def write(data: bytes) -> None:
            while data:
                data = data[put(channel, data) :]

        work(write)
        leave(0)
    finally:
        leave(70)


def _ended(pid: int, seconds: float) -> int:
    """The exit status of our child; killed when it does not end in `seconds`."""
    end = time.monotonic() + seconds
    while True:
        done, status = os.waitpid(pid, os.WNOHANG)
        if done:
            return status
        if time.monotonic() > end:
            os.kill(pid, signal.SIGKILL)
            return os.waitpid(pid, 0)[1]
        time.sleep(0.0005)


def kill_descendants() -> None:
    """Ends all processes below this one. The filter of system calls allows a program none; not every host has it."""
    if os.getpid() == 1:  # of a namespace: all that is in it
        while _killed(-1):
            pass
        return
    while children := [p for f in Path("/proc/self/task").glob("*/children") for p in f.read_text().split()]:
        for pid in children:
            _killed(int(pid))


def _killed(pid: int) -> bool:
    """False when there is nothing to kill."""
    try:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
    except (ProcessLookupError, ChildProcessError):
        return False
    return True


def _call(names: dict[str, Any], program: str, function: str, argument: Any) -> bytes:
    """b"=" and the result as JSON, or b"!" and what was raised. From its first line on nothing here is trusted."""
    dumps = json.dumps
    try:
        module = types.ModuleType("program")  # not __main__: a guarded main does not run
        module.__dict__.update(names, __name__="program")
        sys.modules["program"] = module
        exec(compile(program, "program.py", "exec"), module.__dict__)
        called = module.__dict__[function]
        value = called(**argument) if isinstance(argument, dict) else called(argument)
        text = dumps(value).encode()
        return b"=" + text if len(text) < LARGEST else f"!the result is larger than {LARGEST >> 20} MB".encode()
    except BaseException as e:
        said = " ".join(str(e)[:MESSAGE].split())
        return f"!{type(e).__name__}{': ' if said else ''}{said}".encode("utf-8", "replace")


# ---------------------------------------------------------------------------------------------------- resource limits


def limit(seconds: int, memory: int) -> None:
    import resource

    # One that ignores SIGXCPU is killed a second later.
    limits = {"CPU": seconds + 1, "FSIZE": 0, "NOFILE": 64, "NPROC": 0, "CORE": 0, "MEMLOCK": 0}
    if sys.platform == "linux":
        limits["AS"] = memory
    for name, value in limits.items():
        what = getattr(resource, f"RLIMIT_{name}")
        hard = resource.getrlimit(what)[1]
        value = value if hard == resource.RLIM_INFINITY else min(value, hard)
        resource.setrlimit(what, (min(value, seconds) if name == "CPU" else value, value))


def confine(layers: list[str], ruleset: int | None) -> bytes:
    """Puts this process under the named layers for good; b"1" when the kernel took all of them."""
    try:
        _prctl(PR_SET_NO_NEW_PRIVS, 1)
        if "landlock" in layers and ruleset is not None:
            _syscall(LANDLOCK_RESTRICT_SELF, ruleset, 0)
            os.close(ruleset)
        if "seccomp" in layers:
            code = seccomp_filter(os.getpid(), files="landlock" not in layers)
            buffer = ctypes.create_string_buffer(code)
            program = struct.pack("HxxxxxxP", len(code) // 8, ctypes.addressof(buffer))
            _prctl(PR_SET_SECCOMP, SECCOMP_MODE_FILTER, ctypes.create_string_buffer(program))
    except OSError:
        return b"0"
    return b"1"


LIBC = ctypes.CDLL(None, use_errno=True)
PR_SET_PDEATHSIG, PR_SET_SECCOMP, PR_SET_CHILD_SUBREAPER, PR_SET_NO_NEW_PRIVS, SECCOMP_MODE_FILTER = 1, 22, 36, 38, 2


def _prctl(option: int, first: Any, second: Any = 0) -> None:
    if sys.platform == "linux" and LIBC.prctl(option, _long(first), _long(second), ctypes.c_long(0), ctypes.c_long(0)):
        raise OSError(ctypes.get_errno(), "prctl")


def _syscall(number: int, *arguments: Any) -> int:
    result = LIBC.syscall(ctypes.c_long(number), *map(_long, arguments))
    if result < 0:
        raise OSError(ctypes.get_errno(), f"system call {number}")
    return result


def _long(value: Any) -> Any:
    return ctypes.c_long(value) if isinstance(value, int) else value


# ----------------------------------------------------------------------------------------------------------- Landlock

LANDLOCK_CREATE_RULESET, LANDLOCK_ADD_RULE, LANDLOCK_RESTRICT_SELF = 444, 445, 446  # the same on every architecture
ALL_FILE_RIGHTS = (1 << 13) - 1  # of its first version
REFER, TRUNCATE = 1 << 13, 1 << 14
WRITE_FILE, READ_FILE, READ_DIR = 1 << 1, 1 << 2, 1 << 3


def landlock_ruleset() -> int | None:
    """A ruleset's file descriptor: Python's own folders and the system's libraries may be read. None: no Landlock."""
    if sys.platform != "linux":
        return None
    try:
        version = _syscall(LANDLOCK_CREATE_RULESET, None, 0, 1)
        rights = ALL_FILE_RIGHTS | (REFER if version >= 2 else 0) | (TRUNCATE if version >= 3 else 0)
        net, scoped = (3 if version >= 4 else 0), (3 if version >= 6 else 0)  # bind, connect; abstract sockets, signals
        size = 24 if version >= 6 else 16 if version >= 4 else 8
        ruleset = _syscall(LANDLOCK_CREATE_RULESET, struct.pack("QQQ", rights, net, scoped), size, 0)
        for path, granted in _readable(rights):
            file = os.open(path, os.O_PATH | os.O_CLOEXEC)
            _syscall(LANDLOCK_ADD_RULE, ruleset, 1, struct.pack("=Qi", granted, file), 0)
            os.close(file)
    except OSError:
        return None
    return ruleset


def _readable(rights: int) -> Iterator[tuple[str, int]]:
    own = [sysconfig.get_path(p) for p in ("stdlib", "platstdlib", "purelib", "platlib")]
    own += [os.path.join(prefix, lib) for prefix in (sys.prefix, sys.base_prefix) for lib in ("lib", "lib64")]
    system = ["/lib", "/lib64", "/usr/lib", "/usr/lib64", "/usr/share/zoneinfo"]
    for path in dict.fromkeys(own + system):
        if os.path.isdir(path):
            yield path, READ_FILE | READ_DIR
    for path in ("/etc/ld.so.cache", "/etc/localtime", "/dev/urandom", "/dev/zero"):
        if os.path.exists(path):
            yield path, READ_FILE
    yield os.devnull, (READ_FILE | WRITE_FILE | TRUNCATE) & rights


# ------------------------------------------------------------------------------------------------------------ seccomp

MACHINES = {"x86_64": 0xC000003E, "aarch64": 0xC00000B7}  # as the kernel's audit calls them
ARCHITECTURE = MACHINES.get(platform.machine()) if sys.platform == "linux" else None
# Numbers of the calls that are allowed: x86-64, AArch64. Reading, memory, time, waiting; nothing that acts on others.
CALLS = {
    "read": (0, 63), "write": (1, 64), "readv": (19, 65), "writev": (20, 66), "pread64": (17, 67), "pwrite64": (18, 68),
    "close": (3, 57), "close_range": (436, 436), "lseek": (8, 62), "fadvise64": (221, 223), "fstat": (5, 80),
    "stat": (4,), "lstat": (6,), "newfstatat": (262, 79), "statx": (332, 291), "access": (21,), "faccessat": (269, 48),
    "faccessat2": (439, 439), "readlink": (89,), "readlinkat": (267, 78), "getdents": (78,), "getdents64": (217, 61),
    "getcwd": (79, 17), "dup": (32, 23), "dup2": (33,), "dup3": (292, 24), "pipe": (22,), "pipe2": (293, 59),
    "mmap": (9, 222), "munmap": (11, 215), "mremap": (25, 216), "mprotect": (10, 226), "madvise": (28, 233),
    "mincore": (27, 232), "msync": (26, 227), "brk": (12, 214), "futex": (202, 98), "rseq": (334, 293),
    "set_robust_list": (273, 99), "get_robust_list": (274, 100), "set_tid_address": (218, 96), "membarrier": (324, 283),
    "rt_sigaction": (13, 134), "rt_sigprocmask": (14, 135), "rt_sigreturn": (15, 139), "rt_sigpending": (127, 136),
    "rt_sigsuspend": (130, 133), "rt_sigtimedwait": (128, 137), "sigaltstack": (131, 132), "pause": (34,),
    "alarm": (37,), "setitimer": (38, 103), "getitimer": (36, 102), "getpid": (39, 172), "getppid": (110, 173),
    "gettid": (186, 178), "getuid": (102, 174), "geteuid": (107, 175), "getgid": (104, 176), "getegid": (108, 177),
    "getgroups": (115, 158), "getpgid": (121, 155), "getpgrp": (111,), "getsid": (124, 156), "getpriority": (140, 141),
    "getrlimit": (97, 163), "getrusage": (98, 165), "times": (100, 153), "time": (201,), "gettimeofday": (96, 169),
    "clock_gettime": (228, 113), "clock_getres": (229, 114), "clock_nanosleep": (230, 115), "nanosleep": (35, 101),
    "getrandom": (318, 278), "sysinfo": (99, 179), "uname": (63, 160), "umask": (95, 166), "sched_yield": (24, 124),
    "sched_getaffinity": (204, 123), "poll": (7,), "ppoll": (271, 73), "select": (23,), "pselect6": (270, 72),
    "epoll_create": (213,), "epoll_create1": (291, 20), "epoll_ctl": (233, 21), "epoll_wait": (232,),
    "epoll_pwait": (281, 22), "epoll_pwait2": (441, 441), "eventfd2": (290, 19), "socketpair": (53, 199),
    "exit": (60, 93), "exit_group": (231, 94), "restart_syscall": (219, 128),
}  # fmt: skip
EVERY_BIT = 0xFFFFFFFF
WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC


def seccomp_filter(pid: int, *, files: bool) -> bytes:
    """The filter for the process `pid`, in classic BPF. `files`: it keeps files from being opened for writing."""
    # numbers, which argument, under which mask, may have which values
    rules: list[tuple[tuple[int, ...], int, int, tuple[int, ...]]] = [
        ((234, 131), 0, EVERY_BIT, (pid,)),  # tgkill: itself, as abort() does
        ((302, 261), 0, EVERY_BIT, (0, pid)),  # prlimit64: its own
        ((72, 25), 1, EVERY_BIT, (0, 1, 2, 3, 4, 1030)),  # fcntl: not F_SETOWN and F_SETSIG, which send signals
        ((16, 29), 1, EVERY_BIT, (0x5401, 0x5413, 0x5421, 0x541B, 0x5450, 0x5451)),  # ioctl: isatty, close-on-exec...
        ((2,), 1, WRITES if files else 0, (0,)),  # open
        ((257, 56), 2, WRITES if files else 0, (0,)),  # openat
    ]
    here = 0 if platform.machine() == "x86_64" else 1
    load, equal, mask, leave = 0x20, 0x15, 0x54, 0x06
    allow, refuse, kill = 0x7FFF0000, 0x00050000 | errno.EPERM, 0x80000000
    code = [(load, 0, 0, 4), (equal, 1, 0, ARCHITECTURE), (leave, 0, 0, kill), (load, 0, 0, 0)]
    for numbers in CALLS.values():
        for number in numbers[here : here + 1]:
            code += [(equal, 0, 1, number), (leave, 0, 0, allow)]
    for numbers, argument, bits, values in rules:
        for number in numbers[here : here + 1]:
            checks = [(load, 0, 0, 16 + 8 * argument), (mask, 0, 0, bits)]
            checks += [c for value in values for c in ((equal, 0, 1, value), (leave, 0, 0, allow))]
            checks.append((leave, 0, 0, refuse))
            code += [(equal, 0, len(checks), number), *checks]
    code.append((leave, 0, 0, refuse))
    return b"".join(struct.pack("HBBI", *instruction) for instruction in code)


if __name__ == "__main__":
    serve()
