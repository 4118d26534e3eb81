"""The openai reflector against a real HTTP server on loopback that answers well, badly, late or not at all."""

import gzip
import json
import socket
import struct
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest

from fst_fast.config import FastConfig, ReflectorConfig
from fst_fast.errors import UserError
from fst_fast.fast import endpoint
from fst_fast.fast.endpoint import Endpoint, EndpointReflector
from fst_fast.fast.evolve import evolve
from fst_fast.fast.population import Member
from fst_fast.fast.reflection import Reflection, ReflectionRequest, ReflectionUsage
from fst_fast.fast.reflectors import make_reflectors
from fst_fast.records import Problem, Prompt, Verdict
from fst_fast.tasks.glyph import GlyphTask
from tests.fast.toys import Evaluations, config, knows, rollout, words

KEY = "sk-local-secret"


class Handler(BaseHTTPRequestHandler):
    """Answers as the script under the name between <prompt> tags says, which gets the number of the try."""

    server: "Server"

    def do_POST(self) -> None:
        self.body = body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        name = body["messages"][0]["content"].split("<prompt>\n")[1].split("\n</prompt>")[0]
        with self.server.lock:
            self.server.received.append((self.path, {k.lower(): v for k, v in self.headers.items()}, body))
            self.server.tries[name] += 1
            attempt = self.server.tries[name]
        SCRIPTS[name](self, attempt)

    def reply(self, data: bytes, status: int = 200, kind: str = "application/json", **headers: str) -> None:
        self.send_response(status)
        fields = {"Content-Type": kind, "Content-Length": str(len(data)), "Retry-After-Ms": "1"}
        for name, value in (fields | {k.replace("_", "-"): v for k, v in headers.items()}).items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(data)

    def say(self, content: Any, **fields: Any) -> None:
        choice = {"index": 0, "message": {"role": "assistant", "content": content}, "finish_reason": "stop"}
        usage = {"prompt_tokens": 1000, "completion_tokens": 10}
        self.reply(json.dumps({"id": "x", "choices": [choice | fields], "usage": usage}).encode())

    def reset(self) -> None:
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.connection.close()

    def hang(self) -> None:
        self.server.closing.wait(20)

    def log_message(self, *_: object) -> None:
        pass


class Server(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 128

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.lock, self.closing = threading.Lock(), threading.Event()
        self.received: list[tuple[str, dict[str, str], dict[str, Any]]] = []
        self.tries: Counter[str] = Counter()
        self.under_way, self.most_under_way = 0, 0

    def handle_error(self, *_: object) -> None:
        pass  # clients hang up on purpose


def crowd(handler: Handler, _: int) -> None:
    server = handler.server
    with server.lock:
        server.under_way += 1
        server.most_under_way = max(server.most_under_way, server.under_way)
    server.closing.wait(0.05)
    with server.lock:
        server.under_way -= 1
    handler.say("crowded")


def dribble(handler: Handler, _: int) -> None:
    handler.send_response(200)
    handler.send_header("Content-Type", "application/json")
    handler.end_headers()
    while not handler.server.closing.wait(0.02):
        handler.wfile.write(b" ")
        handler.wfile.flush()


def endless(handler: Handler, _: int) -> None:
    handler.send_response(500 if handler.server.tries["endless error"] else 200)
    handler.end_headers()
    while not handler.server.closing.is_set():
        handler.wfile.write(b" " * 2**20)


def usage_is(usage: Any) -> Callable[[Handler, int], None]:
    answer = {"choices": [{"message": {"content": "```\nnew\n```"}}]} | ({"usage": usage} if usage != "missing" else {})
    return lambda handler, _: handler.reply(json.dumps(answer).encode())


def old(handler: Handler, _: int) -> None:
    """A server from before max_completion_tokens."""
    if "max_completion_tokens" in handler.body:
        handler.reply(b'{"error": {"message": "unknown field max_completion_tokens"}}', 400)
    else:
        handler.say("from an old server")


def old_in_turn(handler: Handler, number: int) -> None:
    """The second question is refused when the first has been answered under the old name."""
    if number == 2:
        while handler.server.tries["old in turn"] < 3:
            time.sleep(0.01)
        time.sleep(0.3)
    old(handler, number)


def too_large(handler: Handler, _: int) -> None:
    known = "max_completion_tokens" in handler.body
    said = "max_tokens or max_completion_tokens is too large" if known else "unknown field max_tokens"
    handler.reply(json.dumps({"error": {"message": said}}).encode(), 400)


HTML = '</script><script>alert("x")</script><img src=x onerror=alert(1)> &amp; {0} %s'
DEEP = b'{"choices":' + b"[" * 100_000

SCRIPTS: dict[str, Callable[[Handler, int], None]] = {
    # good in the end
    "good": lambda h, _: h.say("I add a rule.\n````\nnew prompt\n````"),
    "rate limited once": lambda h, n: h.reply(b"{}", 429) if n == 1 else h.say("after 429"),
    "error once": lambda h, n: h.reply(b"oops", 503, "text/plain") if n == 1 else h.say("after 503"),
    "reset once": lambda h, n: h.reset() if n == 1 else h.say("after reset"),
    "late once": lambda h, n: h.say("in time") if n > 1 else h.hang(),
    "old": old,
    "old in turn": old_in_turn,
    "html": lambda h, _: h.say(f"```\n{HTML}\n```"),
    "crowd": crowd,
    **{f"crowd {i}": crowd for i in range(12)},
    "no usage": usage_is("missing"),
    "null usage": usage_is(None),
    "strange usage": usage_is({"prompt_tokens": "many", "completion_tokens": -5, "total_tokens": []}),
    "listed usage": usage_is([1, 2]),
    "huge usage": usage_is({"prompt_tokens": 10**400, "completion_tokens": 10**300}),
    "half usage": usage_is({"prompt_tokens": 100, "completion_tokens": None}),
    # bad for ever
    "late": lambda h, _: h.hang(),
    "dribble": dribble,
    "rate limited": lambda h, _: h.reply(b"{}", 429),
    "errors": lambda h, _: h.reply(b"<html>" + HTML.encode(), 500, "text/html"),
    "resets": lambda h, _: h.reset(),
    "too large": too_large,
    "bad request": lambda h, _: h.reply(json.dumps({"error": {"message": f"no {KEY}"}}).encode(), 400),
    "empty body": lambda h, _: h.reply(b""),
    "cut body": lambda h, _: h.reply(b'{"choices"', Content_Length="5000"),
    "invalid JSON": lambda h, _: h.reply(b'{"choices": [{'),
    "HTML page": lambda h, _: h.reply(b"<html>welcome</html>", kind="text/html"),
    "not UTF-8": lambda h, _: h.reply(b'{"choices": [{"message": {"content": "\xff\xfe\x80"}}]}'),
    "lone surrogate": lambda h, _: h.reply(b'{"choices": [{"message": {"content": "\\ud800"}}]}'),
    "not gzip": lambda h, _: h.reply(b"plain", Content_Encoding="gzip"),
    "deep": lambda h, _: h.reply(DEEP),
    "gzip bomb": lambda h, _: h.reply(gzip.compress(b" " * 6 * 2**20), Content_Encoding="gzip"),
    "5 MB": lambda h, _: h.say("x" * 5_000_000),
    "wrong type": lambda h, _: h.reply(b"[1, 2]"),
    "no choices": lambda h, _: h.reply(b"{}"),
    "zero choices": lambda h, _: h.reply(b'{"choices": []}'),
    "no message": lambda h, _: h.reply(b'{"choices": [{}]}'),
    "list content": lambda h, _: h.say([{"type": "text", "text": "new"}]),
    "null content": lambda h, _: h.say(None),
    "empty content": lambda h, _: h.say(" \n"),
    "empty block": lambda h, _: h.say("Here:\n```\n```"),
    "control characters": lambda h, _: h.say("\x00\x07"),
    "cut off": lambda h, _: h.say("```\nhalf a pro", finish_reason="length"),
    "filtered": lambda h, _: h.say("```\nhalf a pro", finish_reason="content_filter"),
    "redirected nowhere": lambda h, _: h.reply(b"", 307, Location="http://127.0.0.1:1/"),
    "redirected badly": lambda h, _: h.reply(b"", 307, Location="http://[bad"),
    "redirected to no port": lambda h, _: h.reply(b"", 307, Location="http://127.0.0.1:99999999/"),
    "redirected round": lambda h, _: h.reply(b"", 307, Location="/v1/chat/completions"),
    "endless": endless,
    "endless error": endless,
    "unknown model": lambda h, _: h.reply(b'{"error": {"message": "no such model"}}', 404),
    "wrong key": lambda h, _: h.reply(
        json.dumps({"error": {"message": f"wrong key {KEY}\n{HTML * 99}"}}).encode(), 401
    ),
}
FAULTS = list(SCRIPTS)[list(SCRIPTS).index("late") : list(SCRIPTS).index("endless")]


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setattr(endpoint, "_BACK_OFF", 0.5)
    with Server() as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.02,))
        thread.start()
        yield server
        server.closing.set()
        server.shutdown()
        thread.join()


def reflector(server: Server, **fields: Any) -> EndpointReflector:
    url = f"http://127.0.0.1:{server.server_address[1]}/v1"
    settings = ReflectorConfig(base_url=url, model="m", timeout=1.0, retries=1, price_in=2.0, price_out=50.0)
    return EndpointReflector(Endpoint(replace(settings, **fields)), lambda problem: str(problem.data["word"]), 1000)


def requests(*names: str) -> list[ReflectionRequest]:
    trace = rollout(Prompt("any"), Problem("p", {"word": "the problem"}), "the answer", Verdict(0.0, "the feedback"))
    return [ReflectionRequest(Prompt(name), (trace,), 0) for name in names]


def test_a_good_answer_is_read_and_its_tokens_and_dollars_counted(server: Server) -> None:
    openai = reflector(server, max_new_tokens=99)
    assert openai.reflect(requests("good")) == [Reflection("new prompt", "I add a rule.")]
    assert openai.usage == ReflectionUsage(1, 1000, 10, dollars=1000 * 2e-6 + 10 * 50e-6)
    assert openai.reflect([]) == []
    ((path, headers, body),) = server.received
    assert path == "/v1/chat/completions"
    assert headers["authorization"] == f"Bearer {KEY}"
    assert headers["accept-encoding"] == "identity"
    assert (body["model"], body["max_completion_tokens"]) == ("m", 99)
    assert all(part in body["messages"][0]["content"] for part in ("the problem", "the answer", "the feedback"))


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("rate limited once", "after 429"),
        ("error once", "after 503"),
        ("reset once", "after reset"),
        ("late once", "in time"),
    ],
)
def test_passing_faults_are_retried(server: Server, name: str, text: str) -> None:
    openai = reflector(server)
    assert [r.text for r in openai.reflect(requests(name))] == [text]
    assert server.tries[name] == 2
    assert (openai.usage.calls, openai.usage.failures) == (1, 0)


def test_every_lasting_fault_costs_its_own_proposal_and_nothing_else(server: Server) -> None:
    openai = reflector(server, concurrency=64)
    answers = dict(zip(["good", *FAULTS], openai.reflect(requests("good", *FAULTS)), strict=True))
    assert answers.pop("good").text == "new prompt"
    assert {name: answer.text for name, answer in answers.items()} == dict.fromkeys(FAULTS)
    assert all(answer.note for answer in answers.values())
    assert KEY not in str(answers)
    assert (openai.usage.calls, openai.usage.failures) == (1 + len(FAULTS), len(FAULTS))
    assert server.tries["errors"] == server.tries["rate limited"] == 2
    assert server.tries["invalid JSON"] == server.tries["bad request"] == 1
    assert "max_new_tokens = 2048" in answers["cut off"].note
    assert "packed as gzip" in answers["gzip bomb"].note


@pytest.mark.parametrize("name", ["endless", "endless error"])
def test_no_more_of_an_answer_is_read_than_one_may_have(server: Server, name: str) -> None:
    openai = reflector(server, timeout=20.0, retries=0)
    assert openai.reflect(requests("good"))[0].text
    assert openai.reflect(requests(name))[0].note == "ValueError: an answer of more than 4194304 bytes"


def test_html_comes_through_as_data(server: Server) -> None:
    assert [r.text for r in reflector(server).reflect(requests("html"))] == [HTML]


def test_an_address_where_nothing_listens_ends_a_run_that_never_had_an_edit_and_no_other(server: Server) -> None:
    with socket.create_server(("127.0.0.1", 0)) as closed:
        url = f"http://127.0.0.1:{closed.getsockname()[1]}/v1"
    openai = reflector(server, base_url=url)
    with pytest.raises(UserError, match=r"m at 127.0.0.1 cannot be reached, check reflector\.base_url \("):
        openai.reflect(requests("good", "good"))
    openai = reflector(server)
    assert openai.reflect(requests("good"))[0].text == "new prompt"
    openai._endpoint.url = url  # it went down
    assert "ConnectError" in openai.reflect(requests("good"))[0].note


@pytest.mark.parametrize(
    ("name", "prompt_tokens"),
    [
        ("no usage", 0),
        ("null usage", 0),
        ("strange usage", 0),
        ("listed usage", 0),
        ("huge usage", 0),
        ("half usage", 100),
    ],
)
def test_a_missing_or_strange_usage_counts_as_none_and_the_answer_stands(
    server: Server, name: str, prompt_tokens: int
) -> None:
    openai = reflector(server)
    assert [r.text for r in openai.reflect(requests(name))] == ["new"]
    assert (openai.usage.prompt_tokens, openai.usage.completion_tokens, openai.usage.failures) == (prompt_tokens, 0, 0)


def test_calls_are_made_at_once_but_no_more_than_configured(server: Server) -> None:
    names = [f"crowd {i}" for i in range(12)]
    answers = reflector(server, concurrency=3, timeout=10.0).reflect(requests(*names))
    assert [r.text for r in answers] == ["crowded"] * 12
    assert 1 < server.most_under_way <= 3


@pytest.mark.parametrize("name", ["wrong key", "unknown model"])
def test_an_endpoint_that_refuses_from_the_start_is_a_user_error_without_the_key(server: Server, name: str) -> None:
    with pytest.raises(UserError, match=r"reflector\.base_url.*reflector\.model") as refusal:
        reflector(server).reflect(requests(name, name))
    assert KEY not in str(refusal.value)
    assert "\n" not in str(refusal.value)
    assert len(str(refusal.value)) < 600


@pytest.mark.parametrize("name", ["bad request", "errors", "HTML page", "wrong type", "empty body", "late", "resets"])
def test_one_that_answers_none_of_the_first_calls_is_too(server: Server, name: str) -> None:
    """Or a run would be RL alone, and end well."""
    with pytest.raises(UserError, match=r"answered none of 2 calls, check reflector\.base_url and") as refusal:
        reflector(server, retries=0).reflect(requests(name, name))
    assert KEY not in str(refusal.value)
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize("name", ["null content", "cut off", "empty block"])
def test_one_whose_answers_are_no_edits_is_not(server: Server, name: str) -> None:
    assert [r.text for r in reflector(server).reflect(requests(name, name))] == [None, None]


def test_a_server_that_knows_the_limit_by_its_old_name_alone_is_given_that(server: Server) -> None:
    openai = reflector(server, max_new_tokens=99)
    assert [r.text for r in openai.reflect(requests(*["old"] * 3))] == ["from an old server"] * 3
    server.received.clear()
    assert [r.text for r in openai.reflect(requests("old"))] == ["from an old server"]
    assert [body.get("max_tokens") for _, _, body in server.received] == [99]
    assert openai.usage.failures == 0


def test_two_questions_learn_the_old_name_one_after_the_other(server: Server) -> None:
    answers = reflector(server, timeout=20.0).reflect(requests("old in turn", "old in turn"))
    assert [r.text for r in answers] == ["from an old server"] * 2
    assert server.tries["old in turn"] == 4


def test_a_server_that_only_names_the_limit_in_what_it_refuses_is_given_it_as_before(server: Server) -> None:
    openai = reflector(server)
    openai.reflect(requests("good"))
    (refused,) = openai.reflect(requests("too large"))
    assert "max_completion_tokens is too large" in refused.note  # not what it says of max_tokens
    server.received.clear()
    assert openai.reflect(requests("good"))[0].text == "new prompt"
    assert "max_completion_tokens" in server.received[0][2]


def test_the_reflectors_of_a_runs_tasks_know_that_another_ones_were_answered(server: Server) -> None:
    one = reflector(server, retries=0)
    other = EndpointReflector(one._endpoint, str, 1000)
    one.reflect(requests("good"))
    assert [r.text for r in other.reflect(requests("errors"))] == [None]
    tasks = [GlyphTask("A", 0), GlyphTask("B", 0)]
    first, second = make_reflectors(FastConfig(reflector="openai"), one._endpoint.config, tasks)
    assert first._inner._endpoint is second._inner._endpoint


@pytest.mark.parametrize("name", ["wrong key", "unknown model"])
def test_an_endpoint_that_refuses_later_costs_a_proposal_only(server: Server, name: str) -> None:
    openai = reflector(server)
    openai.reflect(requests("good"))
    assert [r.text for r in openai.reflect(requests(name, "good"))] == [None, "new prompt"]


def test_a_cycle_survives_an_endpoint_that_mostly_fails(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    turns = iter(["5 MB", "html", "not UTF-8", "good", "null content", "resets", "html", "bad request"])
    monkeypatch.setitem(SCRIPTS, "seed", lambda h, n: SCRIPTS[next(turns)](h, n))
    openai = reflector(server, retries=0)
    problems = words("prompt", "onerror=alert(1)>", "other")
    evolution = evolve(
        [Member(Prompt("seed"))],
        problems,
        problems,
        Evaluations(knows),
        openai,
        config(minibatch=3, parallel=8, max_prompt_chars=1000),
        proposals=8,
        seed=0,
        cycle=0,
    )
    statuses = Counter(c.status for c in evolution.candidates)
    assert statuses == {"failed": 5, "accepted": 2, "duplicate": 1}
    assert {m.prompt.text for m in evolution.pool} == {"seed", "new prompt", HTML}
    assert evolution.reflection.failures == 5
