"""What does a body of Anthropic's Messages API mean (POST /v1/messages), and how is its answer written?

The same conversation as a chat's, in other words: ``system`` stands beside the messages, ``max_tokens`` must be given,
cached tokens are counted beside ``input_tokens`` and not among them, and a stream is

    message_start  content_block_start  content_block_delta ...  content_block_stop  message_delta  message_stop

Pure, as openai_api.py.
"""

from __future__ import annotations

import uuid
from collections.abc import Collection, Mapping, Sequence
from typing import Annotated

from pydantic import BeforeValidator

from cluster.generation import ChatPrompt, Finish, LogprobText, TextChunk
from cluster.openai_api import Body, Call, message_text, named_event, priority, renamed, validate
from cluster.tokenizer import ChatMessage
from core.errors import InvalidRequest
from core.request import FinishReason, SamplingParams

_HARMLESS = frozenset({"metadata", "service_tier"})
# field |-> the values that ask for nothing; null always does
_UNSUPPORTED: Mapping[str, Collection[object]] = {
    "container": (),
    "context_management": (),
    "mcp_servers": ([],),
    "output_config": ({},),
    "output_format": (),
    "thinking": ({"type": "disabled"},),
    "tool_choice": ({"type": "auto"}, {"type": "none"}),
    "tools": ([],),
}
_ROLES = ("user", "assistant")
# status |-> the API's word for it; others are its api_error
_KINDS = {
    400: "invalid_request_error",
    401: "authentication_error",
    404: "not_found_error",
    413: "request_too_large",
    429: "rate_limit_error",
    503: "overloaded_error",
    504: "timeout_error",
}


def _blocks(value: object) -> object:
    """Text, or text blocks; where a client wants a prefix kept (``cache_control``) is nothing we need to be told."""
    if isinstance(value, list):
        value = [_bare(block) for block in value]
    return message_text(value)


def _bare(block: object) -> object:
    return {k: v for k, v in block.items() if k in ("type", "text")} if isinstance(block, dict) else block


class Turn(Body):
    """One message."""

    role: str
    content: Annotated[str, BeforeValidator(_blocks)]


class CountBody(Body):
    """POST /v1/messages/count_tokens."""

    model: str
    messages: list[Turn]
    system: Annotated[str | None, BeforeValidator(lambda value: None if value is None else _blocks(value))] = None


class MessageBody(CountBody):
    """POST /v1/messages."""

    max_tokens: int
    stop_sequences: list[str] | None = None
    stream: bool | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    # as in vLLM
    cache_salt: str | None = None
    priority: int | None = None
    seed: int | None = None
    ignore_eos: bool | None = None


def parse_message(body: object) -> Call:
    """The meaning of a body; ``InvalidRequest`` naming the field."""
    asked = validate(MessageBody, body, _UNSUPPORTED, _HARMLESS)
    aliases = {"stop": "stop_sequences"}
    given = {
        "max_tokens": asked.max_tokens,
        "temperature": asked.temperature,
        "top_p": asked.top_p,
        "top_k": asked.top_k,
        "seed": asked.seed,
        "ignore_eos": asked.ignore_eos,
    }
    known = {k: v for k, v in given.items() if v is not None}
    try:
        sampling = SamplingParams(stop=tuple(asked.stop_sequences or ()), **known)  # type: ignore[arg-type]
    except InvalidRequest as error:
        raise renamed(error, aliases) from error
    return Call(
        format=MessageFormat,
        model=asked.model,
        prompts=(_prompt(asked),),
        prompt_field="messages",
        sampling=sampling,
        stream=bool(asked.stream),
        include_usage=True,
        salt=(asked.cache_salt or "").encode(),
        priority=priority(asked.priority or 0),
        aliases=aliases,
    )


def parse_count(body: object) -> tuple[str, ChatPrompt]:
    """(model, prompt) of a body whose tokens are to be counted; ``InvalidRequest`` naming the field."""
    asked = validate(CountBody, body, _UNSUPPORTED, _HARMLESS)
    return asked.model, _prompt(asked)


def _prompt(asked: CountBody) -> ChatPrompt:
    for position, turn in enumerate(asked.messages):
        if turn.role not in _ROLES:
            raise InvalidRequest(
                f"messages[{position}].role",
                f"must be one of {', '.join(_ROLES)}, got {turn.role!r} (system is a field)",
            )
    if asked.messages and asked.messages[-1].role == "assistant":
        # It would have to be continued; a chat template begins a new turn.
        raise InvalidRequest("messages", "must end with the user's turn: an answer that is begun is not continued here")
    turns = [ChatMessage(turn.role, turn.content) for turn in asked.messages]
    if asked.system is not None:
        turns.insert(0, ChatMessage("system", asked.system))
    return ChatPrompt(tuple(turns))


def error_body(status: int, body: Mapping[str, object]) -> dict[str, object]:
    """OpenAI's error object of an answer with that status, in this API's words."""
    told = body["error"]
    assert isinstance(told, dict)
    return {"type": "error", "error": {"type": _KINDS.get(status, "api_error"), "message": told["message"]}} | {
        key: value for key, value in body.items() if key != "error"
    }


class MessageFormat:
    """``message`` and the events of its stream. There is one choice: the API has no ``n``."""

    ending = b""

    def __init__(self, model: str, created: int) -> None:
        self.id = f"msg_{uuid.uuid4().hex}"
        self._model = model
        self._finish: Finish | None = None
        self._extra: Mapping[str, object] = {}

    def opening(self, index: int, prompt_tokens: int) -> bytes | None:
        # How much of it is cached is known when a worker has it; message_delta says so.
        begun = self._written([], None, {"input_tokens": prompt_tokens, "output_tokens": 0})
        block = {"index": 0, "content_block": {"type": "text", "text": ""}}
        return _event("message_start", {"message": begun}) + _event("content_block_start", block)

    def event(self, index: int, chunk: TextChunk, extra: Mapping[str, object]) -> bytes | None:
        written = b""
        if chunk.text:
            delta = {"index": 0, "delta": {"type": "text_delta", "text": chunk.text}}
            written = _event("content_block_delta", delta)
        if chunk.finish is not None:
            self._finish, self._extra = chunk.finish, extra
            written += _event("content_block_stop", {"index": 0})
        return written or None

    def closing(self, usage: Mapping[str, object]) -> bytes:
        assert self._finish is not None, "a stream is closed when its choice has ended"
        ended = {"delta": _ending(self._finish), "usage": _usage(usage), **_ours(self._extra)}
        return _event("message_delta", ended) + _event("message_stop", {})

    def failure(self, error: Mapping[str, object]) -> bytes:
        return _event("error", {"error": error_body(500, error)["error"]})

    def choice(self, index: int, finish: Finish, logprobs: Sequence[LogprobText] | None) -> dict[str, object]:
        self._finish = finish
        return {"type": "text", "text": finish.text}

    def response(
        self, choices: Sequence[object], usage: Mapping[str, object], extra: Mapping[str, object]
    ) -> dict[str, object]:
        return {**self._written(choices, self._finish, _usage(usage)), **_ours(extra)}

    def _written(
        self, content: Sequence[object], finish: Finish | None, usage: Mapping[str, object]
    ) -> dict[str, object]:
        return {
            "id": self.id,
            "type": "message",
            "role": "assistant",
            "model": self._model,
            "content": content,
            **_ending(finish),
            "usage": usage,
        }


def _event(name: str, data: Mapping[str, object]) -> bytes:
    return named_event(name, {"type": name, **data})


def _ending(finish: Finish | None) -> dict[str, object]:
    """Why it ended; None: it has not."""
    if finish is None:
        return {"stop_reason": None, "stop_sequence": None}
    if finish.reason is FinishReason.LENGTH:
        return {"stop_reason": "max_tokens", "stop_sequence": None}
    reason = "end_turn" if finish.stop_string is None else "stop_sequence"
    return {"stop_reason": reason, "stop_sequence": finish.stop_string}


def _usage(usage: Mapping[str, object]) -> dict[str, object]:
    prompt, details = usage["prompt_tokens"], usage["prompt_tokens_details"]
    assert isinstance(prompt, int)
    assert isinstance(details, dict)
    cached = details["cached_tokens"]
    return {
        "input_tokens": prompt - cached,
        "cache_creation_input_tokens": 0,
        "cache_read_input_tokens": cached,
        "output_tokens": usage["completion_tokens"],
    }


def _ours(extra: Mapping[str, object]) -> dict[str, object]:
    return {key: value for key, value in extra.items() if key != "usage"}
