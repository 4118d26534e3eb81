"""A whole run with `--reflector openai` against a real server that answers well, badly, late and with hostile text."""

from __future__ import annotations

import json
import shutil
import subprocess
import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from fst_fast.fast import endpoint
from fst_fast.fast.reflectors import OnFirstRank
from fst_fast.train import main
from fst_fast.trainer import Trainer
from tests.fast.test_endpoint import Handler, Server

INJECTED = (
    "use upper case. </script><script>document.documentElement.dataset.pwned = 1</script>"
    '<img src=x onerror="document.documentElement.dataset.pwned = 2">'
)
ANSWERS = {
    "hostile": lambda h: h.say(f"<b>note</b>\n````\n{INJECTED} {len(h.server.received)}\n````"),
    "error": lambda h: h.reply(b"oops", 500, "text/plain"),
    "empty": lambda h: h.reply(b""),
    "huge": lambda h: h.say("x" * 5_000_000),
    "not UTF-8": lambda h: h.reply(b'{"choices": [{"message": {"content": "\xff\xfe\x80"}}]}'),
    "late": lambda h: h.hang(),
}


class InTurn(Handler):
    """Every kind of answer in turn, whatever is asked."""

    def do_POST(self) -> None:
        self.rfile.read(int(self.headers["Content-Length"]))
        with self.server.lock:
            names = list(ANSWERS)
            name = names[len(self.server.received) % len(names)]
            self.server.received.append(("", {}, {}))
            self.server.tries[name] += 1
        ANSWERS[name](self)


@contextmanager
def serving(handler: type[Handler], patch: pytest.MonkeyPatch) -> Iterator[Server]:
    """An endpoint that answers as `handler` does, with a key for it."""
    patch.setenv("OPENAI_API_KEY", "sk-secret-of-the-test")
    patch.setenv("NO_PROXY", "127.0.0.1")
    patch.setattr(endpoint, "_BACK_OFF", 0.5)
    with Server() as server:
        server.RequestHandlerClass = handler
        thread = threading.Thread(target=server.serve_forever, args=(0.02,))
        thread.start()
        yield server
        server.closing.set()
        server.shutdown()
        thread.join()


def flags(server: Server, run_dir: Path, **more: object) -> list[str]:
    given = {
        "reflector": "openai", "reflector.base-url": f"http://127.0.0.1:{server.server_address[1]}/v1",
        "reflector.timeout": 1.0, "reflector.retries": 0, "reflector.price-out": 50.0,
        "stream": "glyph:A@4", "run-dir": run_dir, "rollout.problems": 4, "rollout.group-size": 4,
        "fast.every": 2, "fast.minibatch": 4, "fast.scoring-problems": 8, "fast.first-proposals": 12,
        "fast.proposals": 6, "fast.parallel": 6, "fast.newly-solved": 1, "eval.every": 2, "eval.problems": 8,
        "eval.samples": 1, "tensorboard": False, "progress": False,
    }  # fmt: skip
    return [word for name, value in (given | more).items() for word in (f"--{name}", str(value))]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Counter[str]]:
    """The directory of a finished run, and how often the server gave each kind of answer."""
    run_dir = tmp_path_factory.mktemp("openai") / "run"
    with pytest.MonkeyPatch.context() as patch, serving(InTurn, patch) as server:
        main(flags(server, run_dir))
        return run_dir, server.tries


def lines(path: Path) -> list[dict[str, object]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_the_run_ends_well_and_counts_what_reflection_cost(run: tuple[Path, Counter[str]]) -> None:
    run_dir, answers = run
    end = lines(run_dir / "metrics.jsonl")[-1]
    assert end["kind"] == "end"
    assert min(answers[name] for name in ANSWERS) >= 1
    reflection = end["reflection"]
    assert isinstance(reflection, dict)
    assert reflection["calls"] == sum(answers.values()) == 18
    assert reflection["failures"] == 18 - answers["hostile"]
    assert reflection["completion_tokens"] >= 10 * answers["hostile"]
    assert reflection["dollars"] == pytest.approx(
        reflection["prompt_tokens"] * 1.25e-6 + reflection["completion_tokens"] * 50e-6
    )


def test_hostile_proposals_are_in_the_lineage_as_they_came(run: tuple[Path, Counter[str]]) -> None:
    texts = [str(r.get("text")) for r in lines(run[0] / "population.jsonl") if r["kind"] == "candidate"]
    assert sum(INJECTED in text for text in texts) == run[1]["hostile"]


def test_the_key_is_written_nowhere(run: tuple[Path, Counter[str]]) -> None:
    for file in run[0].rglob("*"):
        assert not file.is_file() or b"sk-secret-of-the-test" not in file.read_bytes()


@pytest.mark.skipif(shutil.which("chromium") is None, reason="needs the browser chromium")
def test_the_report_shows_hostile_text_and_a_browser_runs_none_of_it(
    run: tuple[Path, Counter[str]], tmp_path: Path
) -> None:
    command = ["chromium", "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run"]
    command += ["--disable-background-networking", "--disable-component-update", "--disable-sync"]
    command += [f"--user-data-dir={tmp_path}", "--dump-dom", (run[0] / "report.html").as_uri()]
    document = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True).stdout
    assert "data-pwned" not in document.partition("<body")[0]
    assert "&lt;script&gt;document.documentElement" in document
    assert "<script" not in document


def test_with_filler_the_endpoint_has_a_steps_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It answers only after the loop has learned from a step meanwhile, and gives up where the loop waits for it."""
    learned, steps, asked_at, beside = threading.Condition(), 0, 0, []

    class AfterAStep(Handler):
        def do_POST(self) -> None:
            self.rfile.read(int(self.headers["Content-Length"]))
            with learned:
                if asked_at:  # the first cycle comes before all steps
                    beside.append(learned.wait_for(lambda: steps > asked_at, timeout=20))
            self.say(f"name the case\n````\nuse upper case {len(beside)}\n````")

    real_begin, real_learn = OnFirstRank.begin, Trainer._learn_from

    def begin(self: OnFirstRank, requests: Any) -> Any:
        nonlocal asked_at
        asked_at = steps
        return real_begin(self, requests)

    def learn_from(self: Trainer, rollouts: Any) -> Any:
        nonlocal steps
        report = real_learn(self, rollouts)
        with learned:
            steps += 1
            learned.notify_all()
        return report

    monkeypatch.setattr(OnFirstRank, "begin", begin)
    monkeypatch.setattr(Trainer, "_learn_from", learn_from)
    with serving(AfterAStep, monkeypatch) as server:
        more = {"fast.filler": True, "fast.every": 6, "stream": "glyph:A@12", "fast.race": False, "eval.every": 12}
        main(flags(server, tmp_path / "run", **more, **{"reflector.timeout": 30.0, "checkpoint-every": 12}))
    assert beside
    assert all(beside)
    evolved = [r for r in lines(tmp_path / "run" / "metrics.jsonl") if r["kind"] == "evolve"]
    assert [r["step"] for r in evolved] == [0, 6]
    reflection = evolved[1]["reflection"]
    assert isinstance(reflection, dict)
    assert reflection["calls"] == len(beside) == 6
    assert not reflection["failures"]
