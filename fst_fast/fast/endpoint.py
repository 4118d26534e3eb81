"""The openai reflector: any OpenAI-compatible endpoint. Whatever it answers costs at most the proposal asked for."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Sequence
from typing import Any
from urllib.parse import urlsplit

import openai
from pydantic import BaseModel, Field

from fst_fast.config import ReflectorConfig
from fst_fast.errors import UserError, quoted
from fst_fast.fast.reflection import Reflection, ReflectionRequest, ReflectionUsage
from fst_fast.fast.template import Pose, instruction, parse

LARGEST_ANSWER = 4 * 2**20  # bytes of a response body
MOST_TOKENS = 10**9  # of a call, beyond which its count is nonsense
_BACK_OFF = 8.0  # seconds: the openai client waits up to this between two tries


class EndpointReflector:
    """Asks `endpoint` to edit prompts of problems that `pose` puts into words."""

    def __init__(self, endpoint: Endpoint, pose: Pose, max_prompt_chars: int):
        self.usage = ReflectionUsage()
        self._endpoint, self._pose = endpoint, pose
        self._limits = {"max_prompt_chars": max_prompt_chars, "max_trace_chars": endpoint.config.max_trace_chars}

    def reflect(self, requests: Sequence[ReflectionRequest]) -> list[Reflection]:
        """All requests at once, as `Endpoint.ask`."""
        answers = self._endpoint.ask([instruction(r, self._pose, **self._limits) for r in requests])
        for _, usage in answers:
            self.usage += usage
        return [reflection for reflection, _ in answers]


class Endpoint:
    """A server of chat completions, and what is known of it: the reflectors of a run's tasks share one."""

    def __init__(self, config: ReflectorConfig):
        self.config, self._key = config, _key(config)
        url = config.base_url or os.environ.get("OPENAI_BASE_URL") or "https://api.openai.com/v1"
        if not _is_url(url):
            raise UserError(f"reflector.base_url = {url!r}: must be a URL like http://localhost:8000/v1")
        self.url = url
        self.label = f"{config.model} at {urlsplit(url).hostname}"
        self._heard = False  # a completion, of whatever content
        self._limit = "max_completion_tokens"  # or, of an older server, "max_tokens"

    def ask(self, texts: Sequence[str]) -> list[tuple[Reflection, ReflectionUsage]]:
        """All at once, `concurrency` under way. Must not be called from a running event loop.

        Raises:
            UserError: the endpoint has never given a completion: it refuses the key, does not know the model, nothing
                listens at its address, or all these calls failed. A run would go on without any edit.
        """
        answers = asyncio.run(self._ask_all(texts))
        if answers and not self._heard:
            raise UserError(
                f"reflector: {self.label} answered none of {len(answers)} calls, check reflector.base_url and "
                f"reflector.model ({quoted(answers[0][0].note, 300)})"
            )
        return answers

    async def _ask_all(self, texts: Sequence[str]) -> list[tuple[Reflection, ReflectionUsage]]:
        gate = asyncio.Semaphore(self.config.concurrency)
        async with openai.AsyncOpenAI(
            base_url=self.url,
            api_key=self._key,
            timeout=self.config.timeout,
            max_retries=self.config.retries,
            default_headers={"Accept-Encoding": "identity"},  # what is packed does not show how long it is
            http_client=openai.DefaultAsyncHttpxClient(event_hooks={"response": [_read_bounded]}),
        ) as client:
            return await asyncio.gather(*(self._ask(client, gate, text) for text in texts))

    async def _ask(
        self, client: openai.AsyncOpenAI, gate: asyncio.Semaphore, text: str
    ) -> tuple[Reflection, ReflectionUsage]:
        # The client's timeout bounds the wait for each piece of an answer; this bounds an endpoint that dribbles.
        deadline = (self.config.timeout + _BACK_OFF) * (self.config.retries + 1)
        try:
            async with gate, asyncio.timeout(deadline):
                body = await self._post(client, text)
            return self._read(body)
        except (openai.AuthenticationError, openai.PermissionDeniedError, openai.NotFoundError) as error:
            if not self._heard:
                raise UserError(
                    f"reflector: {self.label} refuses the key in {self.config.api_key_env} or the model, check "
                    f"reflector.base_url, reflector.model and the key ({quoted(self._redacted(error), 300)})"
                ) from None
            return self._failed(error)
        except openai.APIConnectionError as error:
            why = error.__cause__ or error
            if not self._heard and type(why).__name__ == "ConnectError":
                raise UserError(
                    f"reflector: {self.label} cannot be reached, check reflector.base_url ({self._redacted(why):.300})"
                ) from None
            return self._failed(why)
        except Exception as error:  # of whatever kind: a redirect to an impossible port raises a group of them
            return self._failed(error)

    async def _post(self, client: openai.AsyncOpenAI, text: str) -> bytes:
        """The body of the answer. A server that does not know the limit's present name may know its old one."""

        async def post(limit: str) -> bytes:
            response = await client.chat.completions.with_raw_response.create(
                model=self.config.model,
                messages=[{"role": "user", "content": text}],
                extra_body={limit: self.config.max_new_tokens},
            )
            return response.content

        limit = self._limit  # another question may learn the old name meanwhile
        try:
            return await post(limit)
        except (openai.BadRequestError, openai.UnprocessableEntityError) as error:
            if limit == "max_tokens" or "max_completion_tokens" not in str(error):
                raise
            try:
                body = await post("max_tokens")
            except openai.APIStatusError:
                raise error from None
            self._limit = "max_tokens"
            return body

    def _read(self, body: bytes) -> tuple[Reflection, ReflectionUsage]:
        answer = _Completion.model_validate_json(body)
        self._heard = True
        choice = answer.choices[0]
        if choice.finish_reason == "length":
            reflection = Reflection(None, f"cut off at reflector.max_new_tokens = {self.config.max_new_tokens}")
        elif choice.finish_reason == "content_filter":
            reflection = Reflection(None, "cut off by the endpoint's content filter")
        else:
            reflection = parse(choice.message.content or "")
        prompt_tokens, completion_tokens = answer.tokens("prompt_tokens"), answer.tokens("completion_tokens")
        dollars = (prompt_tokens * self.config.price_in + completion_tokens * self.config.price_out) / 1e6
        failures = int(reflection.text is None)
        return reflection, ReflectionUsage(1, prompt_tokens, completion_tokens, dollars, failures)

    def _failed(self, error: BaseException) -> tuple[Reflection, ReflectionUsage]:
        return Reflection(None, f"{type(error).__name__}: {self._redacted(error)}"), ReflectionUsage(1, failures=1)

    def _redacted(self, error: BaseException) -> str:
        """What the endpoint says may quote the key."""
        return str(error).replace(self._key, "[key]")


def _is_url(text: str) -> bool:
    try:
        parts = urlsplit(text)
        return parts.scheme in ("http", "https") and bool(parts.hostname and parts.port != 0) and text.isprintable()
    except ValueError:  # of brackets, or of a port that is none
        return False


async def _read_bounded(response: Any) -> None:
    """Reads an httpx response, an error's too, before the client does: that would read, and unpack, without an end."""
    body, packed = bytearray(), response.headers.get("content-encoding", "identity")
    if packed != "identity":
        raise ValueError(f"an answer packed as {packed}, which the endpoint was asked not to do")
    async for piece in response.aiter_raw():
        body += piece
        if len(body) > LARGEST_ANSWER:
            raise ValueError(f"an answer of more than {LARGEST_ANSWER} bytes")
    response._content = bytes(body)


class _Message(BaseModel):
    content: str | None = None


class _Choice(BaseModel):
    message: _Message
    finish_reason: str | None = None


class _Completion(BaseModel):
    """What is used of a chat completion; the client itself does not validate."""

    choices: list[_Choice] = Field(min_length=1)
    usage: Any = None

    def tokens(self, name: str) -> int:
        """A count of `usage`, 0 when it is missing or nonsense."""
        count = self.usage.get(name) if isinstance(self.usage, dict) else None
        return count if isinstance(count, int) and 0 < count < MOST_TOKENS else 0


def _key(config: ReflectorConfig) -> str:
    key = os.environ.get(config.api_key_env, "").strip()
    if not key and not config.base_url and not os.environ.get("OPENAI_BASE_URL"):
        raise UserError(
            f"reflector.api_key_env = {config.api_key_env!r}: this environment variable holds no key; set it, or set "
            "reflector.base_url to a server that needs none."
        )
    if not (key.isascii() and key.isprintable()):
        raise UserError(f"reflector.api_key_env = {config.api_key_env!r}: the key must be printable ASCII")
    return key or "no-key-needed"
