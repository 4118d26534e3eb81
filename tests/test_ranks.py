"""Runs on several ranks are the run of one: same rollouts, same curve, same checkpoints; and all of them end together.

Ranks are real processes that talk through gloo; what is started by the launcher says so.
"""

from __future__ import annotations

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from traceback import StackSummary
from typing import Any
from unittest.mock import Mock

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file
from torch.distributed.checkpoint import CheckpointException
from torch.distributed.device_mesh import init_device_mesh

from fst_fast import checkpoint, cli, train
from fst_fast.config import Config, SlowConfig
from fst_fast.errors import EngineError, UserError
from fst_fast.launch import _cause, workers
from fst_fast.model import Model, load_model
from fst_fast.preflight import check_alike, check_alike_resumed
from fst_fast.ranks import LAUNCHER, Ranks
from fst_fast.rollout import vllm_engine
from fst_fast.slow.policy import Policy
from fst_fast.trainer import BASE_VERSION
from tests.fast.test_endpoint import Handler, Server
from tests.models import save_tiny
from tests.once import once
from tests.warm import Warm, free_port

RUN: dict[str, object] = {
    "stream": "glyph:A@4", "threads": 1, "progress": False, "tensorboard": False, "rollout.problems": 3,
    "rollout.group-size": 4, "slow.minibatches": 2, "slow.kl-coef": 0.01, "slow.micro-tokens": 48, "slow.pack": "on",
    "fast.population": 2, "fast.every": 2, "fast.minibatch": 4, "fast.scoring-problems": 6,
    "fast.first-proposals": 6, "fast.proposals": 2, "eval.every": 4, "eval.problems": 4, "eval.samples": 1,
    "checkpoint-every": 2,
}  # fmt: skip


def flags(run_dir: Path, **changes: object) -> list[str]:
    values = RUN | {name.replace("__", ".").replace("_", "-"): value for name, value in changes.items()}
    return [word for name, value in values.items() for word in (f"--{name}", str(value))] + ["--run-dir", str(run_dir)]


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.fixture(scope="module")
def warm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Warm]:
    server = Warm(tmp_path_factory.mktemp("warm"))
    yield server
    server.close()


@pytest.fixture(scope="module")
def on(warm: Warm, tmp_path_factory: pytest.TempPathFactory) -> Callable[[int], Path]:
    """The finished run on so many ranks; 4 are two nodes of two."""

    def of(ranks: int) -> Path:
        def make(run: Path) -> None:
            ended = warm.run(*flags(run), ranks=ranks, nodes=max(1, ranks // 2))
            assert ended.code == 0, ended.stderr

        return once(tmp_path_factory, f"ranks/{ranks}", make)

    return of


def newest(run: Path) -> Path:
    return checkpoint.folders(run)[0]


def assert_same_run(run: Path, other: Path) -> None:
    """Of equal decisions and equal responses; numbers may differ by 1e-5."""
    mine, others = ([r for r in lines(of / "metrics.jsonl") if r["kind"] != "lost"] for of in (run, other))
    for a, b in zip(mine, others, strict=True):
        for record in (a, b):
            record.pop("time", None)
            record.pop("cached_prompt_tokens", None)  # a prefix that two ranks need is computed by both
        assert a == approx(b)
    a, b = (lines(r / "rollouts" / "rollouts.jsonl") for r in (run, other))
    assert [r["response_ids"] for r in a] == [r["response_ids"] for r in b]
    assert [r["id"] for r in a] == list(range(len(a)))
    assert [r["logprobs"] for r in a] == approx([r["logprobs"] for r in b], 1e-4)
    assert (run / "population.jsonl").read_text() == (other / "population.jsonl").read_text()
    a, b = (load_file(checkpoint.folders(r)[0] / "model" / "model.safetensors") for r in (run, other))
    assert a.keys() == b.keys()
    # AdamW makes up to lr = 3e-4 of a gradient that is all but zero, whose last bits depend on who sampled what
    assert max(float((a[name] - b[name]).abs().max()) for name in a) < 3e-5


def approx(x: Any, within: float = 1e-5) -> Any:
    """`x` with every float in it approximate, at any depth."""
    match x:
        case dict():
            return {name: approx(value, within) for name, value in x.items()}
        case list():
            return [approx(value, within) for value in x]
        case float():
            return pytest.approx(x, rel=0, abs=within)
    return x


@pytest.mark.parametrize("ranks", [2, 4])
def test_several_ranks_sample_evolve_and_learn_as_one_does(ranks: int, on: Callable[[int], Path]) -> None:
    one = lines(on(1) / "metrics.jsonl")
    assert sum("grad_norm" in r for r in one) >= 3  # or their being equal would mean little
    assert sum(r["accepted"] for r in one if r["kind"] == "evolve") > 0
    assert_same_run(on(ranks), on(1))


def test_cycles_fill_the_steps_before_them_on_several_ranks_too(warm: Warm, tmp_path: Path) -> None:
    """How far a call gets beside a step is a matter of the engines, so this run is not that of one rank."""
    filler = {"fast__filler": True, "fast__every": 3, "checkpoint_every": 6, "stream": "glyph:A@6"}
    ended = warm.run(*flags(tmp_path / "run", **filler), ranks=2)
    assert ended.code == 0, ended.stderr
    evolved = [r for r in lines(tmp_path / "run" / "metrics.jsonl") if r["kind"] == "evolve"]
    assert [r["step"] for r in evolved] == [0, 3]
    rollouts = lines(tmp_path / "run" / "rollouts" / "rollouts.jsonl")
    asked = [r for r in rollouts if r["purpose"] == "gepa"]
    assert len(asked) == sum(r["rollouts"] for r in evolved)
    second = asked[evolved[0]["rollouts"] :]
    assert len({r["step"] for r in second}) > 1  # one call went on from another, a step later
    assert all(r["step"] <= v <= 3 for r in second for v, _ in r["versions"])


@pytest.mark.parametrize(("saved", "resumed"), [(1, 2), (2, 4), (4, 1)])
def test_a_run_resumed_on_other_ranks_goes_on_as_it_would_have(
    saved: int, resumed: int, on: Callable[[int], Path], warm: Warm, tmp_path: Path
) -> None:
    run = Path(shutil.copytree(on(saved), tmp_path / "run"))
    shutil.rmtree(checkpoint.folders(run)[0])
    assert checkpoint.folders(run)[0].name == "step-000002"
    ended = warm.run("--resume", run, ranks=resumed, nodes=max(1, resumed // 2))
    assert ended.code == 0, ended.stderr
    assert_same_run(run, on(1))


@pytest.mark.parametrize(("family", "kept"), [("qwen3", "full"), ("llama", "selective"), ("gemma2", "off")])
def test_bf16_trains_on_sharded_fp32_masters(family: str, kept: str, warm: Warm, tmp_path: Path) -> None:
    """Tied, untied and softcapped heads; a step of 1e-6 is lost in bf16 and kept in the masters."""
    folder, run = save_tiny(family, tmp_path / "model"), tmp_path / "run"
    changes = {
        "model__path": folder, "model__dtype": "bfloat16", "slow__recompute": kept, "slow__lr": 1e-6, "slow__warmup": 0,
        "mode": "rl", "stream": "jsonl:tests/data/noise.jsonl@2", "jsonl__verifier": "regex",
        "rollout__max_new_tokens": 8, "rollout__problems": 8,
        "slow__pack": "off" if family == "gemma2" else "on",  # the masters are fp32, what is packed is not
    }  # fmt: skip
    ended = warm.run(*flags(run, **changes), ranks=2)
    assert ended.code == 0, ended.stderr
    saved = newest(run)
    policy = Policy(load_model(str(saved / "model"), dtype="bfloat16"), SlowConfig())
    checkpoint.load_policy(saved, policy)
    start = dict(load_model(str(folder), dtype="bfloat16").lm.named_parameters())
    moved = {name: master - start[name].float() for name, master in policy.state_dict()["masters"].items()}
    assert policy.updates == 4
    assert all(0 < float(change.abs().max()) < 1e-5 for change in moved.values())
    exported = load_file(saved / "model" / "model.safetensors")
    assert all(w.dtype == torch.bfloat16 for w in exported.values())
    assert json.loads((saved / "model" / "config.json").read_text())["dtype"] == "bfloat16"
    assert all(torch.equal(exported[n], m.bfloat16()) for n, m in policy.state_dict()["masters"].items())


def test_lora_trains_low_rank_updates_alone_and_exports_a_plain_model(warm: Warm, tmp_path: Path) -> None:
    folder, runs = save_tiny("llama", tmp_path / "model"), [tmp_path / "one", tmp_path / "two"]
    changes = {
        "model__path": folder, "slow__lora_rank": 4, "slow__lr": 1e-2, "slow__warmup": 0, "mode": "rl",
        "stream": "jsonl:tests/data/noise.jsonl@2", "jsonl__verifier": "regex", "rollout__max_new_tokens": 8,
        "rollout__problems": 8, "slow__recompute": "selective",
    }  # fmt: skip
    for ranks, run in enumerate(runs, 1):
        ended = warm.run(*flags(run, **changes), ranks=ranks)
        assert ended.code == 0, ended.stderr
    assert_same_run(runs[1], runs[0])
    start, end = dict(load_model(str(folder)).weights()), dict(load_model(str(newest(runs[0]) / "model")).weights())
    moved = {name: torch.linalg.matrix_rank(end[name] - w, rtol=1e-3).item() for name, w in start.items() if w.ndim > 1}
    assert moved.pop("model.embed_tokens.weight") == moved.pop("lm_head.weight") == 0
    assert set(moved.values()) == {4}
    trainer = train.Trainer(cli.read_config(runs[0]), runs[0])
    trainer.restore()
    ids = torch.tensor([[1, 2, 3, 4, 5]])
    with torch.no_grad():
        adapted, plain = trainer.model.hidden(ids), load_model(str(newest(runs[0]) / "model")).hidden(ids)
        base, start_states = trainer.base.hidden(ids), load_model(str(folder)).hidden(ids)
    assert torch.allclose(adapted, plain, atol=1e-4)
    assert torch.equal(base, start_states)
    assert trainer.base.lm is trainer.model.lm
    assert {name.split(".lora_")[1][0] for name in trainer.policy.state_dict()["masters"]} == {"A", "B"}


class Answers(Handler):
    """The same answer in other words, each time."""

    def do_POST(self) -> None:
        self.rfile.read(int(self.headers["Content-Length"]))
        with self.server.lock:
            self.server.received.append(("", {}, {}))
            number = len(self.server.received)
        self.say(f"````\nuse square brackets. {number}\n````")


def test_a_reflector_that_costs_money_is_asked_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "sk-any")
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    with Server() as server:
        server.RequestHandlerClass = Answers
        thread = threading.Thread(target=server.serve_forever, args=(0.02,))
        thread.start()
        openai = Warm(tmp_path)  # with the key in its environment
        url = f"http://127.0.0.1:{server.server_address[1]}/v1"
        changes = {"fast__reflector": "openai", "reflector__base_url": url, "stream": "glyph:A@1"}
        ended = openai.run(*flags(tmp_path / "run", **changes), ranks=2)
        openai.close()
        server.shutdown()
        thread.join()
    assert ended.code == 0, ended.stderr
    assert len(server.received) == lines(tmp_path / "run" / "metrics.jsonl")[-1]["reflection"]["calls"] == 6


def test_machines_that_do_not_share_the_run_directory_are_told_before_any_work(warm: Warm, tmp_path: Path) -> None:
    """Or the first checkpoint would fail, an hour later."""
    folders = [tmp_path / "one", tmp_path / "other"]
    for folder in folders:
        folder.mkdir()
    ended = warm.run(*flags(Path("run")), ranks=2, nodes=2, folders=folders)
    said = "error: run_dir: run is another folder on each machine; give one that all of them share\n"
    assert ended == (2, 2 * said)  # each machine's
    assert [list(folder.rglob("*")) for folder in folders] == [[], []]


@pytest.mark.parametrize("killed", [True, False])
def test_a_process_notices_that_one_of_another_machine_is_gone(killed: bool) -> None:
    """It may wait in an NCCL collective, which says nothing: here it sleeps."""
    program = (
        "import os, signal, sys, time\n"
        "from fst_fast.ranks import joined\n"
        "with joined('cpu') as ranks:\n"
        "    ranks.wait()\n"
        f"    if {killed} and ranks.main: os.kill(os.getpid(), signal.SIGKILL)\n"
        f"    time.sleep({60 if killed else 0} + 3 * ranks.rank)\n"
    )
    port = free_port()
    processes = []
    for rank in range(2):
        own = {"RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1"}
        own |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        command = [sys.executable, "-c", program]
        processes.append(subprocess.Popen(command, env=os.environ | own, stderr=subprocess.PIPE, text=True))
    try:
        said = [p.communicate(timeout=50)[1] for p in processes]
    finally:
        for p in processes:
            p.kill()
    codes = [p.returncode for p in processes]
    assert codes == ([-signal.SIGKILL, 1] if killed else [0, 0]), said
    assert ("error: another process of the run has ended" in said[1]) == killed


def test_machines_with_unequal_numbers_of_processes_are_told() -> None:
    """Their shards would overlap: the mesh has as many ranks on every node."""
    program = "from fst_fast.ranks import joined\nwith joined('cpu'): pass"
    port, processes = free_port(), []
    for rank, node in enumerate((2, 2, 1)):
        own = {"RANK": str(rank), "WORLD_SIZE": "3", "LOCAL_RANK": str(rank % 2), "LOCAL_WORLD_SIZE": str(node)}
        own |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        command = [sys.executable, "-c", program]
        processes.append(subprocess.Popen(command, env=os.environ | own, stderr=subprocess.PIPE, text=True))
    for process in processes:
        said = process.communicate(timeout=50)[1]
        assert "UserError: machines with 1 and 2 processes; start as many on each" in said


def test_machines_of_which_one_resumes_are_told() -> None:
    check_alike_resumed(True, Mock(join=lambda own: own * 2))
    with pytest.raises(UserError, match="some machines were given --resume and others were not"):
        check_alike_resumed(True, Mock(join=lambda own: [*own, False]))


def test_machines_that_train_on_other_settings_or_files_are_told() -> None:
    """Their replicas would go apart without a word."""
    config = Config(run_dir="here", threads=1)
    slower = replace(config, slow=replace(config.slow, lr=0.5))

    def together(*given: tuple[Config, str]) -> None:
        seen: list[Any] = []
        for rank in given:
            check_alike(*rank, Mock(join=lambda own: seen.extend(own) or seen))

    elsewhere = replace(config, run_dir="there", threads=2, model=replace(config.model, path="/scratch/model"))
    together((config, "a"), (elsewhere, "a"))
    with pytest.raises(UserError, match=r"slow.lr is 1e-06 on rank 0 and 0.5 on rank 1; start the same command"):
        together((config, "a"), (slower, "a"))
    with pytest.raises(UserError, match="ranks 0 and 2 have other problems or another base model"):
        together((config, "a"), (config, "a"), (config, "b"))


# ---- the launcher ---------------------------------------------------------------------------------------------------


def start(*argv: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "fst_fast.train", *argv]
    return subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=Path(__file__).parents[1]
    )


def ranks_of(launcher: int) -> dict[int, int]:
    """Rank → process id, of a launcher's workers."""
    found = {}
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            parent = int((folder / "stat").read_text().rpartition(")")[2].split()[1])
            environment = dict(word.partition("=")[::2] for word in (folder / "environ").read_text().split("\0"))
        except OSError:
            continue
        if parent == launcher and "RANK" in environment:
            found[int(environment["RANK"])] = int(folder.name)
    return found


@pytest.mark.parametrize("victim", ["rank 1", "launcher", "launcher at once"])
def test_all_ranks_stop_when_one_is_killed_and_the_launcher_says_which(victim: str, tmp_path: Path) -> None:
    run = tmp_path / "run"
    with start(*flags(run, stream="glyph:A@1000"), "--ranks", "2") as launcher:
        deadline = time.monotonic() + 120
        begun = (lambda: len(ranks_of(launcher.pid)) == 2) if "at once" in victim else (run / "metrics.jsonl").is_file
        while not begun() and launcher.poll() is None and time.monotonic() < deadline:
            time.sleep(0.1)
        pids = ranks_of(launcher.pid)
        assert pids.keys() == {0, 1}, launcher.communicate()
        assert b"PYTHONFAULTHANDLER=1" in Path(f"/proc/{pids[1]}/environ").read_bytes()  # a crash shows where it was
        if victim.startswith("launcher"):  # as the system does when memory runs out
            launcher.kill()
            try:
                launcher.communicate(timeout=30)  # until the workers' pipes are closed, too
            finally:
                for pid in pids.values():
                    with suppress(ProcessLookupError):
                        os.kill(pid, signal.SIGKILL)
            return
        os.kill(pids[1], signal.SIGKILL)
        _, said = launcher.communicate(timeout=30)
        assert launcher.returncode == 1
        last = said.splitlines()[-1]
        assert last.startswith("error: rank 1 was killed by SIGKILL"), said
        assert last.endswith("; --resume continues from the last checkpoint, if there is one yet")
        assert not any(Path(f"/proc/{pid}").exists() for pid in pids.values())


def test_what_only_the_workers_see_is_one_sentence_too(tmp_path: Path) -> None:
    folder = save_tiny("qwen3", tmp_path / "model")
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    changes = {"model__path": folder, "stream": "jsonl:tests/data/noise.jsonl@2", "jsonl__verifier": "regex"}
    with start(*flags(tmp_path / "run", **changes), "--ranks", "2") as launcher:
        _, said = launcher.communicate(timeout=120)
        assert (launcher.returncode, said.count("\n")) == (2, 1), said
        assert said.startswith(f"error: model.path: {folder} cannot be loaded"), said
    assert not (tmp_path / "run").exists()


def test_who_failed_is_blamed_and_not_those_who_were_stopped_for_it() -> None:
    def failure(code: int, at: float, said: int | None = None) -> Any:
        return Mock(exitcode=code, timestamp=int(at), error_file_data={} if said is None else {"code": said, "at": at})

    stopped, stubborn, raised = failure(-15, 10.1), failure(-9, 15.1), failure(1, 10.0, 1)
    assert _cause({0: stopped, 2: raised, 1: stubborn})[0] == 2
    assert _cause({0: stopped, 2: failure(-9, 10.0), 1: failure(1, 10.1, 1)})[0] == 2  # the others miss it
    assert (
        _cause({0: failure(1, 10.1, 1), 1: failure(1, 10.0, 1), 2: failure(2, 10.2, 2)})[0] == 2
    )  # what can be mended
    assert _cause({1: stopped})[0] == 1


@pytest.mark.parametrize("quiet", [True, False])
@pytest.mark.parametrize(("error", "code"), [("UserError('no')", 2), ("ValueError('no')", 1)])
def test_a_rank_that_fails_ends_though_a_thread_of_it_waits(error: str, code: int, quiet: bool, tmp_path: Path) -> None:
    """As the one that saves does when the other ranks do not come."""
    program = (
        "import threading\n"
        "from fst_fast.cli import UserError, run\n"
        "def main(argv):\n"
        "    threading.Thread(target=threading.Event().wait).start()\n"
        f"    raise {error}\n"
        "run(main)\n"
    )
    own = {"RANK": "0", "WORLD_SIZE": "2", "TORCHELASTIC_ERROR_FILE": str(tmp_path / "error")}
    own |= {LAUNCHER: "1"} if quiet else {}
    ended = subprocess.run(
        [sys.executable, "-c", program], env=os.environ | own, capture_output=True, text=True, timeout=60, check=False
    )
    assert ended.returncode == code
    assert json.loads((tmp_path / "error").read_text())["code"] == code
    assert bool(ended.stderr) != quiet
    assert ("Traceback" in ended.stderr) == (code == 1 and not quiet)


def test_what_gloo_says_of_a_rank_that_is_gone_is_a_sentence_too(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where it ran on another machine, no launcher here knows why."""
    error = RuntimeError("[gloo/transport/tcp/pair.cc:553] Connection closed by peer [127.0.0.1]:26313.")
    assert cli._verdict(error) == ("", 1)
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert cli._verdict(error)[0].startswith("error: another process of the run has ended, and says why where it was")


def test_a_failed_write_is_told_by_a_rank_that_finds_the_folder_gone(tmp_path: Path) -> None:
    """Rank 0 removes it, and all have what any of them met."""
    failed = CheckpointException("save", {1: (OSError(errno.EFBIG, "too large"), StackSummary())})
    with pytest.raises(OSError, match="too large") as error, checkpoint._plain_errors(tmp_path / "gone" / "trainer"):
        raise failed
    assert cli._verdict(error.value)[0].startswith("error: a file grew beyond what this system allows (ulimit -f)")


@pytest.mark.parametrize(
    ("argv", "word"),
    [
        (["--stream", "runes:Z@3"], "runes"),
        (["--model.path", "nowhere"], "model.path"),
        (["--slow.lr", "-1"], "slow.lr"),
        (["--run-dir", str(Path(__file__).parent)], "not empty"),
        (["--resume", "nowhere"], "config.toml"),
    ],
)
def test_bad_input_is_refused_before_a_worker_starts(
    argv: list[str], word: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    started: list[object] = []
    monkeypatch.setattr(train, "launch", lambda *a: started.append(a))
    monkeypatch.setattr(sys, "argv", ["train", *argv, "--ranks", "2"])
    with pytest.raises(SystemExit) as end:
        cli.run(train.main)
    said = capsys.readouterr().err
    assert (end.value.code, said.count("\n"), started) == (2, 1, [])
    assert word in said


def test_a_worker_per_gpu_and_none_beyond(monkeypatch: pytest.MonkeyPatch) -> None:
    config = cli.config_from(["--model.device", "auto"])
    assert workers(0, config) == workers(1, config) == 0  # this process does it
    assert workers(3, config) == 3
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 8)
    assert workers(0, config) == 8
    with pytest.raises(UserError, match="ranks = 9: this machine has 8 GPUs"):
        workers(9, config)
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert workers(0, config) == 0  # torchrun's worker


def test_vllm_takes_the_gpu_of_its_rank_where_a_process_sees_them_all(monkeypatch: pytest.MonkeyPatch) -> None:
    """Under plain torchrun; launch.py shows each process its own."""
    model = Mock(device=torch.device("cuda:3"))
    monkeypatch.setattr(vllm_engine, "_set_environment", Mock(side_effect=EngineError("vllm is not imported here")))
    with pytest.raises(UserError, match="vllm uses the first GPU it sees"):
        vllm_engine.VllmEngine(model)
    for name, value in {"RANK": "11", "WORLD_SIZE": "16", "LOCAL_RANK": "3"}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(EngineError):  # past the check
        vllm_engine.VllmEngine(model)


# ---- the parts ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("items", [range(0), range(8), range(10)])
def test_shares_are_contiguous_and_of_about_equal_size(items: range) -> None:
    for size in (1, 2, 3, 4, 20):
        shares = [Ranks(rank, size).share(items) for rank in range(size)]
        assert [i for share in shares for i in share] == list(items)
        assert max(map(len, shares)) - min(map(len, shares)) <= 1


def test_the_thread_that_saves_asks_nothing_of_a_gpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """To it the current device is the first one, of every rank: a context there for each."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    for name in ("current_stream", "current_device", "Stream"):
        monkeypatch.setattr(torch.cuda, name, Mock(side_effect=AssertionError(f"torch.cuda.{name}")))
    checkpoint._write(tmp_path / "trainer", {"masters": {"w": torch.ones(3)}, "updates": 1}, Ranks())
    assert (tmp_path / "trainer" / ".metadata").is_file()


def test_a_checkpoint_written_beside_the_run_is_of_the_moment_it_was_asked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # a default of all threads: what the run makes of numbers meanwhile would be bf16
    set_default, threads = torch.set_default_dtype, list[threading.Thread]()
    monkeypatch.setattr(
        torch, "set_default_dtype", lambda d: (threads.append(threading.current_thread()), set_default(d))
    )
    policy = Policy(load_model(""), SlowConfig(lr=1e-3))
    saver = checkpoint.Saver(tmp_path, Ranks(), keep=2, background=True)
    before = [m.detach().clone() for m in policy.masters]
    state = {"step": 3, "best": "Füße?", "population": ["Füße?", "b"]}
    saver.save(policy, state)
    with torch.no_grad():
        for master in policy.masters:
            master.add_(1.0)
    saver.settle()
    assert set(threads) == {threading.main_thread()}
    folder = checkpoint.latest(tmp_path)
    assert folder
    assert json.loads((folder / "model" / "prompts.json").read_text()) == {k: state[k] for k in ("best", "population")}
    again = Policy(load_model(str(folder / "model")), SlowConfig())
    assert all(torch.equal(a, b) for a, b in zip(again.masters, before, strict=True))
    checkpoint.load_policy(folder, policy)
    assert all(torch.equal(a, b) for a, b in zip(policy.masters, before, strict=True))
    (tmp_path / "checkpoints" / "step-000004").write_text("in the way")
    saver.save(policy, state | {"step": 4})
    with pytest.raises(OSError, match="step-000004"):  # and it is not lost
        saver.settle()
    with pytest.warns(UserWarning, match="step-000004 are damaged or gone; step-000003 is taken"):
        assert checkpoint.latest(tmp_path) == folder


@pytest.fixture
def alone(tmp_path: Path) -> Iterator[Ranks]:
    """One rank of one, whose models are sharded all the same."""
    dist.init_process_group("gloo", f"file://{tmp_path / 'store'}", rank=0, world_size=1)
    yield Ranks(0, 1, 1, init_device_mesh("cpu", (1,)), dist.new_group(), dist.new_group())
    dist.destroy_process_group()


def test_a_model_is_sharded_before_the_next_is_loaded(
    alone: Ranks, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded: list[Model] = []

    def load(path: str, **kwargs: Any) -> Model:
        assert all(model.sharded for model in loaded)
        loaded.append(load_model(path, **kwargs))
        return loaded[-1]

    monkeypatch.setattr("fst_fast.trainer.load_model", load)
    trainer = train.Trainer(cli.config_from(flags(tmp_path / "run")), tmp_path / "run", alone)
    assert loaded == [trainer.base, trainer.model, trainer.engine._replica]  # type: ignore[attr-defined]


def test_a_rank_whose_engine_fails_does_not_wait_for_the_others(
    alone: Ranks, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The launcher stops them when it ends: no weights are gathered on the way out."""
    trainer = train.Trainer(cli.config_from(flags(tmp_path / "run")), tmp_path / "run", alone)
    loads: list[int] = []
    monkeypatch.setattr(trainer.engine, "load_weights", lambda model, version: loads.append(version))

    def fail(*_: Any) -> None:
        raise EngineError("gone")

    trainer.collector = Mock(complete=fail)
    trainer.generated = 0
    with pytest.raises(EngineError, match="gone"):
        trainer._generate([])
    assert loads == [BASE_VERSION]
    trainer.collector = Mock(complete=lambda *_: ["an answer"])
    assert trainer._generate([]) == ["an answer"]
    assert loads == [BASE_VERSION, BASE_VERSION, 0]
