"""Command lines: configuration from preset, file and flags; user errors become one sentence and exit code 2."""

from __future__ import annotations

import argparse
import contextlib
import errno
import inspect
import os
import select
import signal
import sys
import threading
import tomllib
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, NoReturn

import tyro

from fst_fast.config import MODES, PRESETS, Config, check, check_installed, from_dict, lengthened, preset
from fst_fast.errors import EngineError, Terminated, UserError, quoted, terminated
from fst_fast.files import DISK_FULL
from fst_fast.launch import record, say
from fst_fast.plan import PlanOptions
from fst_fast.ranks import GONE, LAUNCHER, launched

with contextlib.suppress(ImportError, AttributeError):
    # tyro joins the lines of a field's docstring before it takes their indentation away, which keeps them apart
    from tyro import _docstrings

    _indented = _docstrings.parse_docstring_from_object

    def _dedented(of: object) -> dict[str, str]:
        return {name: inspect.cleandoc(text) for name, text in _indented(of).items()}

    _docstrings.parse_docstring_from_object = _dedented  # type: ignore[assignment]


@dataclass(frozen=True)
class TrainCommand:
    """Fast-Slow Training: evolve prompts (GEPA) and train weights (CISPO) in one loop.

    Without arguments: the embedded run, FST on glyph with a task switch, on any machine in minutes. With --plan and any
    flags: no work, but what the run would need in memory, tokens, time and money (--plan --help has more flags).
    """

    preset: str = ""
    """Defaults to start from: "glyph" (the embedded model), "paper" (the paper's recipe), or that recipe for Qwen3-8B,
    a task and eight GPUs: qwen3-8b-codeio, qwen3-8b-hover, qwen3-8b-math. Empty = glyph while no model.path is given,
    else paper."""
    config_file: str = ""
    """TOML file with any of the fields below, e.g. the config.toml of another run, but for its run_dir; flags override
    it."""
    resume: str = ""
    """Run directory to continue exactly where its last checkpoint stands. Of the other flags only --ranks goes with it,
    and --stream, to go on behind the end: more steps of the last task, or more tasks."""
    ranks: Annotated[int, tyro.conf.arg(metavar="INT")] = 0
    """Processes that train together, each with an engine and a share of the work; 0 = one per GPU, 1 without any. Not
    part of the run: it can be resumed on another number. Under torchrun its processes are the ranks."""
    config: Annotated[Config, tyro.conf.arg(name="")] = field(default_factory=Config)


@dataclass(frozen=True)
class PlanCommand(TrainCommand):
    plan: PlanOptions = field(default_factory=PlanOptions)


def parse_train(argv: Sequence[str]) -> TrainCommand:
    """The command line of `fst_fast.train`, a PlanCommand with --plan or a flag of it. Preset, mode and file are read
    first: they set the flags' defaults."""
    argv = [_flag(word) for word in argv]
    planning = any(word == "--plan" or word.startswith("--plan.") for word in argv)
    argv = [word for word in argv if word != "--plan"]
    early = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    for name in ("--preset", "--mode", "--config-file", "--model.path", "--plan.model", "--resume"):
        early.add_argument(name, default="")
    early.add_argument("--ranks", default="0")
    early.add_argument("--stream")
    try:
        known, others = early.parse_known_args(list(argv))
    except argparse.ArgumentError as error:
        raise UserError(str(error)) from None
    ranks = _rank_count(known.ranks)
    if planning and ranks:
        raise UserError(f"ranks = {ranks}: a plan is of --plan.gpus, a process each")
    if any(word.startswith("--resume") for word in argv):
        defaults = (known.preset, known.mode, known.config_file, getattr(known, "model.path"))
        if planning or others or any(defaults) or not known.resume:
            raise UserError(
                "--resume takes a run directory and no other flag but --ranks and --stream: a run goes on as it was "
                "configured"
            )
        config = read_config(Path(known.resume))
        config = config if known.stream is None else lengthened(config, known.stream)
        return TrainCommand(resume=known.resume, ranks=ranks, config=config)
    data = read_toml(known.config_file) if known.config_file else {}
    if _is_dir_of(data.get("run_dir"), known.config_file):  # it is that run's config.toml
        del data["run_dir"]
    mode = known.mode or data.get("mode", "fst")
    if mode not in MODES:
        source = "" if known.mode else f"{known.config_file}: "
        raise UserError(f"{source}mode = {mode!r}: must be one of {', '.join(MODES)}")
    model = data.get("model", {})
    given = getattr(known, "model.path") or getattr(known, "plan.model")
    path = given or (model.get("path", "") if isinstance(model, dict) else "")
    name = known.preset or ("paper" if path else "glyph")
    if name not in PRESETS:
        raise UserError(f"preset = {name!r}: must be one of {', '.join(PRESETS)}")
    default = preset(name, mode)
    plan = PlanOptions()
    if name != "glyph" and not path:
        trained = "a model of your own" if name == "paper" else "a Qwen3-8B"
        if not planning:
            raise UserError(f"model.path: the preset {name} trains {trained}; give the folder that it is in")
        if name != "paper":
            plan = PlanOptions(model="qwen3-8b", gpu="h100", gpus=8)
    if data:
        default = from_dict(data, default, source=known.config_file)
    command = TrainCommand(preset=name, config_file=known.config_file, config=default)
    if planning:
        command = PlanCommand(preset=name, config_file=known.config_file, config=default, plan=plan)
    return tyro.cli(
        type(command),
        args=list(argv),
        default=command,
        prog="python -m fst_fast.train",
        config=(tyro.conf.FlagConversionOff,),
    )


def _is_dir_of(run_dir: object, file: str) -> bool:
    return isinstance(run_dir, str) and Path(run_dir).resolve() == Path(file).resolve().parent


def _rank_count(word: str) -> int:
    if not (word.isdecimal() and len(word) < 5):
        raise UserError(f"ranks = {quoted(word, 40)}: must be a number of processes, 0 to 9999")
    return int(word)


def _flag(word: str) -> str:
    """A word of the command line with its flag's name in the one form that is read twice: hyphens, no short forms."""
    if not word.startswith("--"):
        return word
    name, equals, value = word.partition("=")
    name = name.replace("_", "-")
    return ("--fast.reflector" if name == "--reflector" else name) + equals + value


def config_from(argv: Sequence[str]) -> Config:
    """The checked configuration of a command line without --resume."""
    config = parse_train(argv).config
    check(config)
    check_installed(config)
    return config


def read_config(run_dir: Path) -> Config:
    """The configuration a run was started with."""
    path = run_dir / "config.toml"
    if not path.is_file():
        raise UserError(f"{run_dir} is not a run directory: it has no config.toml")
    return from_dict(read_toml(path), Config(), source=str(path))


def read_toml(path: str | Path) -> dict[str, object]:
    try:
        with open(path, "rb") as file:
            return tomllib.load(file)
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from error
    except (ValueError, RecursionError) as error:  # syntax, encoding, a number of too many digits, too many brackets
        raise UserError(f"{path} is not valid TOML: {error}") from error


def run(main: Callable[[list[str]], None]) -> None:
    """Run a command: 2 and one sentence on what the user can mend, 130 when interrupted, with what the exception
    says of going on. Other errors propagate, that of a dead engine with its traceback and a sentence."""
    threading.excepthook = _thread_error
    if not launched():  # the launcher's word is heard
        signal.signal(signal.SIGTERM, terminated)
    if {"-h", "--help", "--plan"} & set(sys.argv[1:]):
        signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # `--help | head`
    try:
        main(sys.argv[1:])
    except (Exception, KeyboardInterrupt) as error:
        sentence, code = _verdict(error)
        if launched():
            _leave(error, sentence, code)
        if isinstance(error, BrokenPipeError) and _unread():
            sys.exit(128 + signal.SIGPIPE)
        if not sentence:
            raise
        if isinstance(error, EngineError):
            traceback.print_exc()
        sys.exit(say(sentence, code))


def _leave(error: BaseException, sentence: str, code: int) -> NoReturn:
    """End one of several ranks at once, so that its launcher stops the others: the interpreter's own end would wait for
    the thread that saves and for NCCL's communicators, and those for ranks that wait for this one."""
    record(error, sentence, code)
    if LAUNCHER not in os.environ:
        if not sentence or isinstance(error, EngineError):
            traceback.print_exception(error)
        if sentence:
            say(sentence, code)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def _unread() -> bool:
    """Whether nobody reads what is printed any more, as behind `| head`. The interpreter, which flushes once more, is
    then quiet."""
    poll = select.poll()
    poll.register(sys.stdout, 0)
    if gone := bool(poll.poll(0)):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return gone


def _verdict(error: BaseException) -> tuple[str, int]:
    """What to say of an error, and the exit code; "" for one that is a fault of the program."""
    match error:
        case UserError():
            return f"error: {error}", 2
        case FloatingPointError():
            return f"error: {error}; start again with a smaller slow.lr", 2
        case OSError(errno=number) if number in DISK_FULL:
            return "error: no space left on the disk; make room, then --resume from the last checkpoint", 2
        case OSError(filename=str() | Path() as name):
            return f"error: {name}: {error.strerror}", 2
        case OSError(errno=errno.EFBIG):
            return "error: a file grew beyond what this system allows (ulimit -f); raise that, then --resume", 2
        case RuntimeError() if launched() and "by peer" in str(error):  # gloo's "Connection closed (or reset) by peer"
            return f"error: {GONE}", 1
        case EngineError():
            return f"error: {error}; --resume continues from the last checkpoint", 1
        case Terminated():
            return "; ".join(["stopped by SIGTERM", *map(str, error.args)]), 128 + signal.SIGTERM
        case KeyboardInterrupt():
            return "; ".join(["interrupted", *map(str, error.args)]), 130
    return "", 1


def _thread_error(args: threading.ExceptHookArgs) -> None:
    """TensorBoard's writer meets a full disk in a thread of its own; the main thread meets it too, and says so."""
    if not (isinstance(args.exc_value, OSError) and args.exc_value.errno in DISK_FULL):
        threading.__excepthook__(args)
