"""What does a body of Anthropic's Messages API mean (POST /v1/messages), and how is its answer written?

The same conversation as a chat's, in other words: ``system`` stands beside the messages, ``max_tokens`` must be given,
cached tokens are counted beside ``input_tokens`` and not among them, and a stream is

    message_start  content_block_start  content_block_delta ...  content_block_stop  message_delta  message_stop

where text is one block and each call of a tool another. The answers to calls are blocks of the user's next message.

Pure, as openai_api.py.
"""

from __future__ import annotations

import json
import uuid
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, ValidationError

from cluster.generation import ChatPrompt, Finish, LogprobText, TextChunk
from cluster.openai_api import Body, Call, message_text, named_event, priority, renamed, validate
from cluster.sampling_defaults import left_open
from cluster.tokenizer import ChatMessage, ToolCall
from cluster.tools import AUTO, NONE, REQUIRED, Tool, tool_use
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


class ToolUseBlock(BaseModel):
    """A call that the model made."""

    model_config = ConfigDict(strict=True, frozen=True)

    type: Literal["tool_use"]
    id: str
    name: str
    input: dict[str, object]


class ToolResultBlock(BaseModel):
    """What a called tool gave."""

    model_config = ConfigDict(strict=True, frozen=True)

    type: Literal["tool_result"]
    tool_use_id: str
    content: Annotated[str, BeforeValidator(_blocks)] = ""
    is_error: bool | None = None


@dataclass(frozen=True, slots=True)
class Content:
    """The blocks of a message: text, and what is about tools."""

    text: str
    calls: tuple[ToolUseBlock, ...] = ()
    results: tuple[ToolResultBlock, ...] = ()


def _content(value: object) -> object:
    if not isinstance(value, list):
        return Content(str(_blocks(value)))
    calls: list[ToolUseBlock] = []
    results: list[ToolResultBlock] = []
    texts: list[object] = []
    for position, block in enumerate(value):
        kind = block.get("type") if isinstance(block, dict) else None
        try:
            if kind == "tool_use":
                calls.append(ToolUseBlock.model_validate(block))
            elif kind == "tool_result":
                results.append(ToolResultBlock.model_validate(block))
            else:
                texts.append(block)
        except ValidationError as error:
            first = error.errors(include_url=False)[0]
            place = ".".join(map(str, first["loc"]))
            raise ValueError(f"block {position}, {place}: {first['msg']}") from error
    return Content(str(_blocks(texts)), tuple(calls), tuple(results))


class Turn(Body):
    """One message."""

    role: str
    content: Annotated[Content, BeforeValidator(_content)]


class ToolBody(BaseModel):
    """A tool that the client runs; ``cache_control`` and the like are nothing we need to be told."""

    model_config = ConfigDict(strict=True, frozen=True)

    type: Literal["custom"] | None = None
    name: str
    description: str | None = None
    input_schema: dict[str, object]


class ToolChoice(Body):
    """``tool_choice``."""

    type: Literal["auto", "any", "tool", "none"]
    name: str | None = None
    disable_parallel_tool_use: bool | None = None

    @property
    def in_openais_words(self) -> str:
        """As ``tools.tool_use`` has it."""
        if self.type == "tool":
            if self.name is None:
                raise InvalidRequest("tool_choice.name", "is required")
            return f"={self.name}"
        return {"auto": AUTO, "any": REQUIRED, "none": NONE}[self.type]


class CountBody(Body):
    """POST /v1/messages/count_tokens."""

    model: str
    messages: list[Turn]
    system: Annotated[str | None, BeforeValidator(lambda value: None if value is None else _blocks(value))] = None
    tools: list[ToolBody] | None = None
    tool_choice: ToolChoice | None = None


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
        left_open=left_open(known),
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
    called: dict[str, str] = {}
    turns = [turn for position, message in enumerate(asked.messages) for turn in _turns(message, position, called)]
    if asked.system is not None:
        turns.insert(0, ChatMessage("system", asked.system))
    tools = [
        Tool(tool.name, tool.description or "", tool.input_schema, f"tools[{index}].input_schema")
        for index, tool in enumerate(asked.tools or ())
    ]
    choice = asked.tool_choice
    if choice is None:
        return ChatPrompt(tuple(turns), tool_use(tools, None, None))
    return ChatPrompt(tuple(turns), tool_use(tools, choice.in_openais_words, not choice.disable_parallel_tool_use))


def _turns(message: Turn, position: int, called: dict[str, str]) -> list[ChatMessage]:
    """The results of tools are turns of their own, before what the user says. ``called``: functions by their calls'
    ids."""
    content, field = message.content, f"messages[{position}].content"
    if content.calls and message.role != "assistant":
        raise InvalidRequest(field, "only the assistant's messages have blocks of type tool_use")
    if content.results and message.role != "user":
        raise InvalidRequest(field, "only the user's messages have blocks of type tool_result")
    calls = tuple(ToolCall(block.id, block.name, json.dumps(block.input)) for block in content.calls)
    called |= {call.call_id: call.name for call in calls}
    turns = [
        ChatMessage("tool", block.content, (), block.tool_use_id, called.get(block.tool_use_id))
        for block in content.results
    ]
    if content.text or not turns:
        turns.append(ChatMessage(message.role, content.text, calls))
    return turns


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
        self._num_blocks = 0  # of the stream, whole
        self._text_open = False  # the next is text, and has begun
        self._finish: Finish | None = None
        self._extra: Mapping[str, object] = {}

    def opening(self, index: int, prompt_tokens: int) -> bytes | None:
        # How much of it is cached is known when a worker has it; message_delta says so.
        begun = self._written([], None, {"input_tokens": prompt_tokens, "output_tokens": 0})
        return _event("message_start", {"message": begun})

    def event(self, index: int, chunk: TextChunk, extra: Mapping[str, object]) -> bytes | None:
        written = b""
        if chunk.text:
            delta = {"index": self._num_blocks, "delta": {"type": "text_delta", "text": chunk.text}}
            written = self._opened_text() + _event("content_block_delta", delta)
        for call in chunk.calls:
            written += self._closed_text() + self._whole_call(call)
        if chunk.finish is not None:
            self._finish, self._extra = chunk.finish, extra
            if not self._num_blocks:  # an answer of nothing is an empty text
                written += self._opened_text()
            written += self._closed_text()
        return written or None

    def _opened_text(self) -> bytes:
        if self._text_open:
            return b""
        self._text_open = True
        block = {"index": self._num_blocks, "content_block": {"type": "text", "text": ""}}
        return _event("content_block_start", block)

    def _closed_text(self) -> bytes:
        return self._stopped_block() if self._text_open else b""

    def _stopped_block(self) -> bytes:
        self._text_open = False
        self._num_blocks += 1
        return _event("content_block_stop", {"index": self._num_blocks - 1})

    def _whole_call(self, call: ToolCall) -> bytes:
        number = self._num_blocks
        block = {"type": "tool_use", "id": call.call_id, "name": call.name, "input": {}}
        delta = {"type": "input_json_delta", "partial_json": call.arguments}
        started = _event("content_block_start", {"index": number, "content_block": block})
        return started + _event("content_block_delta", {"index": number, "delta": delta}) + self._stopped_block()

    def closing(self, usage: Mapping[str, object]) -> bytes:
        assert self._finish is not None, "a stream is closed when its choice has ended"
        ended = {"delta": _ending(self._finish), "usage": _usage(usage), **_ours(self._extra)}
        return _event("message_delta", ended) + _event("message_stop", {})

    def failure(self, error: Mapping[str, object]) -> bytes:
        return _event("error", {"error": error_body(500, error)["error"]})

    def choice(self, index: int, finish: Finish, logprobs: Sequence[LogprobText] | None) -> dict[str, object]:
        self._finish = finish
        blocks: list[object] = [
            {"type": "tool_use", "id": call.call_id, "name": call.name, "input": json.loads(call.arguments)}
            for call in finish.calls
        ]
        if finish.text or not blocks:
            blocks.insert(0, {"type": "text", "text": finish.text})
        return {"blocks": blocks}

    def response(
        self, choices: Sequence[object], usage: Mapping[str, object], extra: Mapping[str, object]
    ) -> dict[str, object]:
        (choice,) = choices
        assert isinstance(choice, dict), "as this class writes it"
        return {**self._written(choice["blocks"], self._finish, _usage(usage)), **_ours(extra)}

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
    if finish.calls_tools:
        return {"stop_reason": "tool_use", "stop_sequence": None}
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
