"""Which reflector a config makes, what is refused up front, and the base model as its own reflector."""

from collections.abc import Mapping, Sequence

import pytest

from fst_fast.config import FastConfig, ReflectorConfig
from fst_fast.errors import UserError
from fst_fast.fast.endpoint import Endpoint
from fst_fast.fast.phrasebook import PhrasebookReflector
from fst_fast.fast.reflection import ReflectionRequest, ReflectionUsage
from fst_fast.fast.reflectors import make_reflectors
from fst_fast.records import Answer, Problem, Prompt, Verdict
from fst_fast.tasks.glyph import GlyphTask
from fst_fast.tasks.task import Message
from tests.fast.toys import rollout

TASK = GlyphTask("A", 0)


class Bookless(GlyphTask):
    @property
    def phrasebook(self) -> Mapping[str, Sequence[str]]:
        return {}


def test_the_phrase_book_reflector_serves_a_task_that_has_one() -> None:
    (reflector,) = make_reflectors(FastConfig(reflector="phrasebook"), ReflectorConfig(), [TASK])
    assert isinstance(reflector, PhrasebookReflector)


def test_a_task_without_phrase_book_is_refused_naming_the_field_and_what_would_do() -> None:
    with pytest.raises(UserError, match=r"fast\.reflector.*glyph:A.*policy.*openai"):
        make_reflectors(FastConfig(reflector="phrasebook"), ReflectorConfig(), [TASK, Bookless("A", 0)])


@pytest.fixture
def no_keys(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    for name in ("OPENAI_API_KEY", "OPENAI_BASE_URL", "MY_KEY"):
        monkeypatch.delenv(name, raising=False)
    return monkeypatch


OPENAI = FastConfig(reflector="openai")


@pytest.mark.parametrize("key", [None, "", " \n"])
def test_a_missing_key_is_refused_up_front(no_keys: pytest.MonkeyPatch, key: str | None) -> None:
    if key is not None:
        no_keys.setenv("MY_KEY", key)
    with pytest.raises(UserError, match=r"reflector\.api_key_env = 'MY_KEY'.*reflector\.base_url"):
        make_reflectors(OPENAI, ReflectorConfig(api_key_env="MY_KEY"), [TASK])


def test_a_key_that_no_header_can_carry_is_refused_without_being_shown(no_keys: pytest.MonkeyPatch) -> None:
    no_keys.setenv("MY_KEY", "sécret")
    with pytest.raises(UserError) as refusal:
        make_reflectors(OPENAI, ReflectorConfig(api_key_env="MY_KEY"), [TASK])
    assert "sécret" not in str(refusal.value)


@pytest.mark.parametrize(
    "url",
    [
        "localhost:8000",
        "ftp://host/v1",
        "http://",
        "http:///v1",
        "http://[x",
        "http://h:port/",
        "http://h:99999/",
        "http://h:0/",
        "http://h/\n",
    ],
)
def test_a_base_url_that_is_none_is_refused(no_keys: pytest.MonkeyPatch, url: str) -> None:
    with pytest.raises(UserError, match=r"reflector\.base_url = "):
        make_reflectors(OPENAI, ReflectorConfig(base_url=url), [TASK])


def test_a_local_server_needs_no_key_and_its_label_shows_no_password(no_keys: pytest.MonkeyPatch) -> None:
    config = ReflectorConfig(base_url="http://me:pass@localhost:1/v1", model="m")
    assert Endpoint(config).label == "m at localhost"
    no_keys.setenv("OPENAI_BASE_URL", "http://elsewhere/v1")
    assert Endpoint(ReflectorConfig(model="m")).label == "m at elsewhere"


def test_the_base_model_rewrites_its_own_prompt_in_one_batch() -> None:
    asked: list[Sequence[list[Message]]] = []

    def generate(chats: Sequence[list[Message]]) -> list[Answer]:
        asked.append(chats)
        whole = [Answer(text, "", 10, 3) for text in ("I fix it.\n```\nbetter\n```", "", "bare words")]
        return [*whole, Answer("```\nhalf a pro", "cut off at 3 tokens", 10, 3)][: len(chats)]

    class Framed(GlyphTask):
        def messages(self, prompt: str, problem: Problem) -> list[Message]:
            return [{"role": "system", "content": f"frame {prompt}"}, *super().messages(prompt, problem)[1:]]

    task = Framed("A", 0)
    (reflector,) = make_reflectors(FastConfig(reflector="policy"), ReflectorConfig(), [task], generate)
    prompt, problem = Prompt("seed"), task.train[0]
    trace = rollout(prompt, problem, "a wrong answer", Verdict(0.0, "bad feedback"))
    answers = reflector.reflect([ReflectionRequest(prompt, (trace,), seed) for seed in range(4)])
    assert [answer.text for answer in answers] == ["better", None, "bare words", None]
    assert answers[0].note == "I fix it."
    assert answers[3].note == "cut off at 3 tokens"  # half a prompt is none
    assert reflector.usage == ReflectionUsage(calls=4, prompt_tokens=40, completion_tokens=12, failures=2)
    ((message,), *_), *more = asked
    assert not more
    assert message["role"] == "user"
    for part in ("seed", " ".join(problem.data["letters"]), "a wrong answer", "bad feedback"):
        assert part in message["content"]
    assert "frame" not in message["content"]  # the problem, not what the task wraps around prompts
