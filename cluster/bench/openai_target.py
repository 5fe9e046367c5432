"""How is an OpenAI-compatible endpoint asked? /v1/chat/completions or /v1/completions over HTTP, streamed.

Only public fields of OpenAI's API are sent, and ``ignore_eos`` where the server is found to take it. Which of the
spellings that servers differ in this one knows (``max_tokens`` or ``max_completion_tokens``, a temperature of 0) is
found out before the run with requests for one token.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import aiohttp

from cluster.bench.openai_answer import MESSAGE_CHARS, AnswerReader, said_by
from cluster.bench.prompts import WORDS
from cluster.bench.target import (
    AUTO,
    CHAT,
    OFF,
    ON,
    USER,
    Ask,
    EndpointFailed,
    Facts,
    Message,
    Prompt,
    Reply,
    Stopwatch,
    Target,
    joined_text,
)

_PROBE_WORDS = 65  # beside a prompt of one: what a word costs, and what comes on top
_PROBE_TIMEOUT_S = 120.0  # the first request of a server may compile something
_REFUSED = (400, 422)  # the field, not the client


@dataclass(frozen=True)
class OpenAIEndpoint:
    """Where, and as whom. ``base_url`` ends before /chat/completions: usually with /v1.

    model: None: the first that the endpoint lists. ignore_eos: auto sends it if the server takes it.
    """

    base_url: str
    api: str = CHAT
    model: str | None = None
    api_key: str | None = None
    ignore_eos: str = AUTO


@dataclass(frozen=True)
class _Dialect:
    """The fields in which servers differ."""

    limit: str = "max_tokens"
    ignore_eos: bool = True
    temperature: bool = True

    def fields(self, output_tokens: int) -> dict[str, object]:
        fields: dict[str, object] = {self.limit: output_tokens}
        if self.ignore_eos:
            fields["ignore_eos"] = True
        if self.temperature:
            fields["temperature"] = 0
        return fields


class OpenAITarget(Target):
    """One endpoint over one pool of connections, which are kept open."""

    def __init__(self, endpoint: OpenAIEndpoint, count_output: Callable[[str], int] | None = None) -> None:
        """``count_output``: tokens of an answer whose server sends no usage."""
        self._endpoint = endpoint
        self._path = "/chat/completions" if endpoint.api == CHAT else "/completions"
        self._count_output = count_output
        self._session: aiohttp.ClientSession | None = None
        self._model = endpoint.model or ""
        self._dialect = _Dialect()

    async def open(self) -> Facts:
        headers = {"content-type": "application/json"}
        if self._endpoint.api_key:
            headers["authorization"] = f"Bearer {self._endpoint.api_key}"
        self._session = aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(limit=0),
            timeout=aiohttp.ClientTimeout(total=None),
            headers=headers,
        )
        facts = await self._ask_models()
        self._model = facts.model
        self._dialect, one = await self._find_dialect()
        many = await self._probe(_PROBE_WORDS, self._dialect)
        facts = replace(facts, ignore_eos=self._dialect.ignore_eos)
        counted = [_prompt_tokens(body) for _, body in (one, many)]
        if counted[0] is None or counted[1] is None or counted[1] <= counted[0]:
            return facts
        per_word = (counted[1] - counted[0]) / (_PROBE_WORDS - 1)
        return replace(facts, tokens_per_word=per_word, overhead_tokens=counted[0] - per_word)

    def prepare(self, ask: Ask) -> bytes:
        body = self._body(ask, self._dialect) | {"stream": True, "stream_options": {"include_usage": True}}
        return json.dumps(body, ensure_ascii=False, separators=(",", ":")).encode()

    async def send(self, prepared: bytes, watch: Stopwatch) -> Reply:
        assert self._session is not None, "opened first"
        answer = AnswerReader(watch, self._count_output)
        watch.send()
        try:
            async with self._session.post(self._endpoint.base_url + self._path, data=prepared) as response:
                if response.status != 200:
                    watch.end()
                    said = await response.text(errors="replace")
                    return Reply(error=f"http_{response.status}", error_message=said[:MESSAGE_CHARS])
                async for received in response.content.iter_any():
                    answer.take(received)
        except (aiohttp.ClientError, OSError) as error:
            watch.end()
            return answer.reply(type(error).__name__, str(error))
        return answer.reply()

    async def close(self) -> None:
        if self._session is not None:
            await self._session.close()

    async def _ask_models(self) -> Facts:
        """What is served; a server without /models serves what the user names."""
        try:
            status, body = await self._call("GET", "/models", None)
        except (aiohttp.ClientError, OSError, TimeoutError) as error:
            raise EndpointFailed(f"{self._endpoint.base_url}: {error or type(error).__name__}") from error
        if status in (401, 403):
            raise EndpointFailed(f"{self._endpoint.base_url}: HTTP {status}: {said_by(body)} (--api-key)")
        cards = body.get("data", []) if status == 200 and isinstance(body, dict) else []
        cards = [card for card in cards if isinstance(card, dict) and "id" in card]
        wanted = self._endpoint.model
        if wanted is None:
            if not cards:
                raise EndpointFailed(f"{self._endpoint.base_url}/models names no model (HTTP {status}): give --model")
            wanted = str(cards[0]["id"])
        length = next((card.get("max_model_len") for card in cards if card["id"] == wanted), None)
        return Facts(model=wanted, max_model_len=length if isinstance(length, int) else None)

    async def _find_dialect(self) -> tuple[_Dialect, tuple[int, Any]]:
        """The first that the server takes, and what it answered."""
        wanted = self._endpoint.ignore_eos
        tried = [True] if wanted == ON else [False] if wanted == OFF else [True, False]
        dialects = [_Dialect(ignore_eos=ignore) for ignore in tried]
        if self._endpoint.api == CHAT:
            newer = [_Dialect("max_completion_tokens", ignore) for ignore in tried]
            dialects += [*newer, *(replace(dialect, temperature=False) for dialect in newer)]
        answer: tuple[int, Any] = (0, None)
        for dialect in dialects:
            answer = await self._probe(1, dialect)
            if answer[0] == 200:
                return dialect, answer
            if answer[0] not in _REFUSED:
                break
        raise EndpointFailed(f"{self._endpoint.base_url}{self._path}: HTTP {answer[0]}: {said_by(answer[1])}")

    async def _probe(self, num_words: int, dialect: _Dialect) -> tuple[int, Any]:
        text = f" {WORDS[0]}" * num_words
        prompt: Prompt = (Message(USER, text),) if self._endpoint.api == CHAT else text
        try:
            return await self._call("POST", self._path, self._body(Ask(prompt, 1), dialect))
        except (aiohttp.ClientError, OSError, TimeoutError) as error:
            said = str(error) or type(error).__name__
            raise EndpointFailed(f"{self._endpoint.base_url}{self._path}: {said}") from error

    async def _call(self, method: str, path: str, body: object) -> tuple[int, Any]:
        assert self._session is not None, "opened first"
        async with (
            asyncio.timeout(_PROBE_TIMEOUT_S),
            self._session.request(
                method, self._endpoint.base_url + path, data=None if body is None else json.dumps(body)
            ) as response,
        ):
            content = await response.read()
        try:
            return response.status, json.loads(content)
        except ValueError:
            return response.status, content.decode(errors="replace")

    def _body(self, ask: Ask, dialect: _Dialect) -> dict[str, object]:
        prompt = ask.prompt
        fields: dict[str, object] = {"model": self._model}
        if self._endpoint.api != CHAT:
            fields["prompt"] = prompt if isinstance(prompt, str) or _is_ids(prompt) else joined_text(_messages(prompt))
        else:
            fields["messages"] = [{"role": m.role, "content": m.content} for m in _messages(prompt)]
        return fields | dialect.fields(ask.output_tokens)


def _messages(prompt: Prompt) -> Sequence[Message]:
    if isinstance(prompt, str):
        return (Message(USER, prompt),)
    messages = [part for part in prompt if isinstance(part, Message)]
    assert len(messages) == len(prompt), "a chat is not asked in token ids"
    return messages


def _is_ids(prompt: Prompt) -> bool:
    return not isinstance(prompt, str) and not any(isinstance(part, Message) for part in prompt)


def _prompt_tokens(body: object) -> int | None:
    usage = body.get("usage") if isinstance(body, dict) else None
    counted = usage.get("prompt_tokens") if isinstance(usage, dict) else None
    return counted if isinstance(counted, int) else None
