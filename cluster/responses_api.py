"""What does a body of OpenAI's Responses API mean (POST /v1/responses), and how is its answer written?

The same conversation as a chat's, in other words: ``instructions`` and ``input`` are messages, the answer is an item of
``output``, and a stream is a story of named, numbered events:

    response.created  response.in_progress
      response.output_item.added  response.content_part.added
        response.output_text.delta ...  response.output_text.done
      response.content_part.done  response.output_item.done
    response.completed, or response.incomplete (the tokens were used up)

A call of a function is an item of its own, with response.function_call_arguments.delta and .done in place of the parts.

Nothing is kept here, so ``store`` is always false in the answer and ``previous_response_id`` is refused: a client sends
the whole conversation. Pure, as openai_api.py.
"""

from __future__ import annotations

import re
import uuid
from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from typing import Annotated, Literal

from pydantic import BeforeValidator, ConfigDict, Field

from cluster.generation import ChatPrompt, Finish, LogprobText, TextChunk
from cluster.openai_api import (
    Body,
    Call,
    FunctionBody,
    StreamOptions,
    logprob_entries,
    message_text,
    named_choice,
    named_event,
    priority,
    renamed,
    validate,
)
from cluster.sampling_defaults import left_open
from cluster.structured_output import of_response_format
from cluster.tokenizer import ChatMessage, ToolCall
from cluster.tools import AUTO, NONE, REQUIRED, object_of, tool_use
from core.errors import InvalidRequest
from core.request import FinishReason, SamplingParams

_HARMLESS = frozenset(
    {
        "max_tool_calls",
        "metadata",
        "prompt_cache_key",
        "prompt_cache_retention",
        "safety_identifier",
        "service_tier",
        "store",
        "user",
    }
)
# field |-> the values that ask for nothing; null always does
_UNSUPPORTED: Mapping[str, Collection[object]] = {
    "background": (False,),
    "context_management": ([],),
    "conversation": (),
    "previous_response_id": (),
    "prompt": (),
    "reasoning": ({}, {"effort": "none"}),
    "truncation": ("disabled",),
}
_ITEM_KINDS = ("message", "function_call", "function_call_output")
_ITEM_KIND_IN_PATH = re.compile(r"^(input\[\d+\])\.\w+")  # the checker's word, not the client's
_LOGPROBS = "message.output_text.logprobs"
_IGNORED_OF_ITEMS = frozenset({"id", "status", "phase"})  # of answers that clients send back as input


def _item_text(value: object) -> object:
    if not isinstance(value, list):
        return message_text(value)
    # What the server adds to its own parts comes back with them.
    return message_text([_bare(part) for part in value], ("input_text", "output_text"))


def _bare(part: object) -> object:
    return {k: v for k, v in part.items() if k in ("type", "text")} if isinstance(part, dict) else part


def _items(value: object) -> object:
    """A string is what the user says."""
    if isinstance(value, str):
        return [{"type": "message", "role": "user", "content": value}]
    if not isinstance(value, list):
        raise ValueError("must be a string or a list of items")
    items = []
    for position, item in enumerate(value):
        kind = item.get("type", "message") if isinstance(item, dict) else None
        if kind not in _ITEM_KINDS:
            raise ValueError(f"item {position} must be an object of type {', '.join(_ITEM_KINDS)}; only text is served")
        items.append({"type": kind} | {k: v for k, v in item.items() if k not in _IGNORED_OF_ITEMS})
    return items


def _tool_choice(value: object) -> object:
    """A word, or ``=NAME``."""
    if isinstance(value, dict) and value.get("type") == "function":
        return named_choice(value)
    if value is not None and value not in (AUTO, NONE, REQUIRED):
        raise ValueError(f'must be {AUTO}, {NONE}, {REQUIRED} or {{"type": "function", "name": "..."}}')
    return value


class InputMessage(Body):
    """One turn."""

    type: Literal["message"]
    role: str
    content: Annotated[str, BeforeValidator(_item_text)]


class InputCall(Body):
    """A call that the model made."""

    model_config = ConfigDict(strict=True, extra="ignore", frozen=True)

    type: Literal["function_call"]
    call_id: str
    name: str
    arguments: str


class InputCallOutput(Body):
    """What the called function gave."""

    type: Literal["function_call_output"]
    call_id: str
    output: Annotated[str, BeforeValidator(_item_text)]


InputItem = Annotated[InputMessage | InputCall | InputCallOutput, Field(discriminator="type")]


class FunctionTool(FunctionBody):
    """An entry of ``tools``."""

    type: Literal["function"]


class TextOptions(Body):
    """``text``."""

    format: object = None
    verbosity: Literal["medium"] | None = None


class ResponseBody(Body):
    """POST /v1/responses."""

    model: str | None = None
    input: Annotated[list[InputItem], BeforeValidator(_items)]
    text: TextOptions | None = None
    tools: list[FunctionTool] | None = None
    tool_choice: Annotated[str | None, BeforeValidator(_tool_choice)] = None
    parallel_tool_calls: bool | None = None
    include: list[Literal["message.output_text.logprobs"]] | None = None
    top_logprobs: int | None = None
    instructions: str | None = None
    max_output_tokens: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    # as in vLLM
    cache_salt: str | None = None
    priority: int | None = None
    seed: int | None = None
    top_k: int | None = None
    ignore_eos: bool | None = None


def parse_response(body: object) -> Call:
    """The meaning of a body; ``InvalidRequest`` naming the field."""
    try:
        asked = validate(ResponseBody, body, _UNSUPPORTED, _HARMLESS)
    except InvalidRequest as error:
        raise InvalidRequest(_ITEM_KIND_IN_PATH.sub(r"\1", error.field), error.message) from error
    if asked.stream_options is not None and not asked.stream:
        raise InvalidRequest("stream_options", "needs stream to be true")
    turns = _turns(asked.input)
    if asked.instructions is not None:
        turns.insert(0, ChatMessage("system", asked.instructions))
    tools = tool_use(
        [tool.tool(f"tools[{index}]") for index, tool in enumerate(asked.tools or ())],
        asked.tool_choice,
        asked.parallel_tool_calls,
    )
    aliases = {"max_tokens": "max_output_tokens"}
    form = of_response_format(asked.text.format, "text.format", nested=False) if asked.text is not None else None
    if form is not None:
        aliases["grammar"] = form.field
    if asked.top_logprobs and not asked.include:
        raise InvalidRequest("top_logprobs", f"needs include to hold {_LOGPROBS}")
    aliases["logprobs"] = "top_logprobs"
    given = {
        "logprobs": (asked.top_logprobs or 0) if asked.include else None,
        "grammar": None if form is None else form.grammar,
        "max_tokens": asked.max_output_tokens,
        "temperature": asked.temperature,
        "top_p": asked.top_p,
        "seed": asked.seed,
        "top_k": 0 if asked.top_k == -1 else asked.top_k,
        "ignore_eos": asked.ignore_eos,
    }
    known = {name: value for name, value in given.items() if value is not None}
    try:
        sampling = SamplingParams(**known)  # type: ignore[arg-type]
    except InvalidRequest as error:
        raise renamed(error, aliases) from error
    return Call(
        format=lambda model, created: ResponseFormat(model, created, asked),
        model=asked.model,
        prompts=(ChatPrompt(tuple(turns), tools),),
        prompt_field="input",
        sampling=sampling,
        left_open=left_open(known),
        stream=bool(asked.stream),
        include_usage=True,
        salt=(asked.cache_salt or "").encode(),
        priority=priority(asked.priority or 0),
        aliases=aliases,
    )


def _turns(items: Sequence[InputMessage | InputCall | InputCallOutput]) -> list[ChatMessage]:
    """Calls belong to the assistant's turn before them, if there is one."""
    turns: list[ChatMessage] = []
    called: dict[str, str] = {}
    for index, item in enumerate(items):
        if isinstance(item, InputMessage):
            turns.append(ChatMessage("system" if item.role == "developer" else item.role, item.content))
        elif isinstance(item, InputCallOutput):
            turns.append(ChatMessage("tool", item.output, (), item.call_id, called.get(item.call_id)))
        else:
            object_of(item.arguments, f"input[{index}].arguments")
            call = ToolCall(item.call_id, item.name, item.arguments)
            called[item.call_id] = item.name
            before = turns.pop() if turns and turns[-1].role == "assistant" else ChatMessage("assistant", "")
            turns.append(replace(before, tool_calls=(*before.tool_calls, call)))
    return turns


class ResponseFormat:
    """``response`` and the events of its stream. There is one choice: the API has no ``n``."""

    ending = b""

    def __init__(self, model: str, created: int, asked: ResponseBody) -> None:
        self.id = f"resp_{uuid.uuid4().hex}"
        self._number = 0
        self._items: list[dict[str, object]] = []  # of the stream, whole
        self._message_id: str | None = None  # of the stream's message that is not whole yet
        self._text: list[str] = []  # of that message
        self._logprobs: list[dict[str, object]] = []  # likewise; of tokens whose text is still held back too
        self._num_told = 0  # of them
        self._finish: Finish | None = None
        self._extra: Mapping[str, object] = {}
        self._head = {
            "id": self.id,
            "object": "response",
            "created_at": created,
            "model": model,
            "instructions": asked.instructions,
            "max_output_tokens": asked.max_output_tokens,
            "temperature": asked.temperature,
            "top_p": asked.top_p,
            "background": False,
            "metadata": {},
            "parallel_tool_calls": asked.parallel_tool_calls is not False,
            "previous_response_id": None,
            "reasoning": {"effort": None, "summary": None},
            "store": False,
            "text": {"format": (asked.text.format if asked.text else None) or {"type": "text"}},
            "tool_choice": _told_choice(asked.tool_choice),
            "tools": [tool.model_dump() for tool in asked.tools or ()],
            "truncation": "disabled",
        }

    def opening(self, index: int, prompt_tokens: int) -> bytes | None:
        begun = {"response": self._written("in_progress", [], None)}
        return self._event("response.created", begun) + self._event("response.in_progress", begun)

    def event(self, index: int, chunk: TextChunk, extra: Mapping[str, object]) -> bytes | None:
        written = b""
        self._logprobs += logprob_entries(chunk.logprobs)
        if chunk.text:
            written = self._opened_message()
            self._text.append(chunk.text)
            new, self._num_told = self._logprobs[self._num_told :], len(self._logprobs)
            delta = {**self._place(), "delta": chunk.text, "logprobs": new}
            written += self._event("response.output_text.delta", delta)
        for call in chunk.calls:
            written += self._closed_message("completed") + self._whole_call(call)
        if chunk.finish is not None:
            self._finish, self._extra = chunk.finish, extra
            if not self._items:  # an answer of nothing is an empty message
                written += self._opened_message()
            written += self._closed_message(_status(chunk.finish))
        return written or None

    def _opened_message(self) -> bytes:
        if self._message_id is not None:
            return b""
        self._message_id, self._text = _message_id(), []
        item = {"output_index": len(self._items), "item": _message(self._message_id, "in_progress", [])}
        part = {**self._place(), "part": _part("")}
        added = self._event("response.output_item.added", item)
        return added + self._event("response.content_part.added", part)

    def _closed_message(self, status: str) -> bytes:
        if self._message_id is None:
            return b""
        part, place = _part("".join(self._text), self._logprobs), self._place()
        self._logprobs, self._num_told = [], 0
        item = _message(self._message_id, status, [part])
        done = {**place, "text": part["text"], "logprobs": part["logprobs"]}
        written = self._event("response.output_text.done", done)
        written += self._event("response.content_part.done", {**place, "part": part})
        written += self._event("response.output_item.done", {"output_index": len(self._items), "item": item})
        self._items.append(item)
        self._message_id = None
        return written

    def _whole_call(self, call: ToolCall) -> bytes:
        item, number = _function_call(call), len(self._items)
        begun = {**item, "arguments": "", "status": "in_progress"}
        place = {"item_id": item["id"], "output_index": number}
        written = self._event("response.output_item.added", {"output_index": number, "item": begun})
        written += self._event("response.function_call_arguments.delta", {**place, "delta": call.arguments})
        done = {**place, "name": call.name, "arguments": call.arguments}
        written += self._event("response.function_call_arguments.done", done)
        written += self._event("response.output_item.done", {"output_index": number, "item": item})
        self._items.append(item)
        return written

    def closing(self, usage: Mapping[str, object]) -> bytes:
        assert self._finish is not None, "a stream is closed when its choice has ended"
        body = self._whole(self._items, usage, self._extra)
        return self._event(f"response.{_status(self._finish)}", {"response": body})

    def failure(self, error: Mapping[str, object]) -> bytes:
        told = error["error"]
        assert isinstance(told, dict)
        return self._event("error", {"code": told["code"], "message": told["message"], "param": told["param"]})

    def choice(self, index: int, finish: Finish, logprobs: Sequence[LogprobText] | None) -> dict[str, object]:
        self._finish = finish
        items: list[dict[str, object]] = [_function_call(call) for call in finish.calls]
        if finish.text or not items:
            part = _part(finish.text, logprob_entries(logprobs or ()))
            items.insert(0, _message(_message_id(), _status(finish), [part]))
        return {"items": items}

    def response(
        self, choices: Sequence[object], usage: Mapping[str, object], extra: Mapping[str, object]
    ) -> dict[str, object]:
        (choice,) = choices
        assert isinstance(choice, dict), "as this class writes it"
        return self._whole(choice["items"], usage, extra)

    def _whole(
        self, items: Sequence[object], usage: Mapping[str, object], extra: Mapping[str, object]
    ) -> dict[str, object]:
        assert self._finish is not None, "an answer is written when its choice has ended"
        ours = {key: value for key, value in extra.items() if key != "usage"}
        return {**self._written(_status(self._finish), items, _usage(usage)), **ours}

    def _written(self, status: str, output: Sequence[object], usage: object) -> dict[str, object]:
        return {
            **self._head,
            "status": status,
            "error": None,
            "incomplete_details": {"reason": "max_output_tokens"} if status == "incomplete" else None,
            "output": output,
            "usage": usage,
        }

    def _place(self) -> dict[str, object]:
        return {"item_id": self._message_id, "output_index": len(self._items), "content_index": 0}

    def _event(self, name: str, data: Mapping[str, object]) -> bytes:
        self._number += 1
        return named_event(name, {"type": name, "sequence_number": self._number - 1, **data})


def _message_id() -> str:
    return f"msg_{uuid.uuid4().hex}"


def _message(message_id: str, status: str, content: Sequence[object]) -> dict[str, object]:
    return {"type": "message", "id": message_id, "status": status, "role": "assistant", "content": content}


def _function_call(call: ToolCall) -> dict[str, object]:
    return {
        "type": "function_call",
        "id": f"fc_{uuid.uuid4().hex}",
        "call_id": call.call_id,
        "name": call.name,
        "arguments": call.arguments,
        "status": "completed",
    }


def _told_choice(choice: str | None) -> object:
    choice = choice or AUTO
    return {"type": "function", "name": choice.removeprefix("=")} if choice.startswith("=") else choice


def _part(text: str, logprobs: Sequence[object] = ()) -> dict[str, object]:
    return {"type": "output_text", "text": text, "annotations": [], "logprobs": list(logprobs)}


def _status(finish: Finish) -> str:
    return "incomplete" if finish.reason is FinishReason.LENGTH else "completed"


def _usage(usage: Mapping[str, object]) -> dict[str, object]:
    return {
        "input_tokens": usage["prompt_tokens"],
        "input_tokens_details": usage["prompt_tokens_details"],
        "output_tokens": usage["completion_tokens"],
        "output_tokens_details": {"reasoning_tokens": 0},
        "total_tokens": usage["total_tokens"],
    }
