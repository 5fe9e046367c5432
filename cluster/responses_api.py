"""What does a body of OpenAI's Responses API mean (POST /v1/responses), and how is its answer written?

The same conversation as a chat's, in other words: ``instructions`` and ``input`` are messages, the answer is an item of
``output``, and a stream is a story of named, numbered events:

    response.created  response.in_progress
      response.output_item.added  response.content_part.added
        response.output_text.delta ...  response.output_text.done
      response.content_part.done  response.output_item.done
    response.completed, or response.incomplete (the tokens were used up)

Nothing is kept here, so ``store`` is always false in the answer and ``previous_response_id`` is refused: a client sends
the whole conversation. Pure, as openai_api.py.
"""

from __future__ import annotations

import uuid
from collections.abc import Collection, Mapping, Sequence
from typing import Annotated

from pydantic import BeforeValidator

from cluster.generation import ChatPrompt, Finish, LogprobText, TextChunk
from cluster.openai_api import Body, Call, StreamOptions, message_text, named_event, priority, renamed, validate
from cluster.tokenizer import ChatMessage
from core.errors import InvalidRequest
from core.request import FinishReason, SamplingParams

_HARMLESS = frozenset(
    {
        "max_tool_calls",
        "metadata",
        "parallel_tool_calls",
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
    "include": ([],),
    "previous_response_id": (),
    "prompt": (),
    "reasoning": ({}, {"effort": "none"}),
    "text": ({}, {"format": {"type": "text"}}),
    "tool_choice": ("none", "auto"),
    "tools": ([],),
    "top_logprobs": (0,),
    "truncation": ("disabled",),
}
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
        return [{"role": "user", "content": value}]
    if not isinstance(value, list):
        raise ValueError("must be a string or a list of messages")
    items = []
    for position, item in enumerate(value):
        kind = item.get("type", "message") if isinstance(item, dict) else None
        if kind != "message":
            raise ValueError(f"item {position} must be a message (an object of type message); only text is served")
        items.append({k: v for k, v in item.items() if k != "type" and k not in _IGNORED_OF_ITEMS})
    return items


class InputMessage(Body):
    """One turn."""

    role: str
    content: Annotated[str, BeforeValidator(_item_text)]


class ResponseBody(Body):
    """POST /v1/responses."""

    model: str | None = None
    input: Annotated[list[InputMessage], BeforeValidator(_items)]
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
    asked = validate(ResponseBody, body, _UNSUPPORTED, _HARMLESS)
    if asked.stream_options is not None and not asked.stream:
        raise InvalidRequest("stream_options", "needs stream to be true")
    turns = [ChatMessage("system" if m.role == "developer" else m.role, m.content) for m in asked.input]
    if asked.instructions is not None:
        turns.insert(0, ChatMessage("system", asked.instructions))
    aliases = {"max_tokens": "max_output_tokens"}
    given = {
        "max_tokens": asked.max_output_tokens,
        "temperature": asked.temperature,
        "top_p": asked.top_p,
        "seed": asked.seed,
        "top_k": 0 if asked.top_k == -1 else asked.top_k,
        "ignore_eos": asked.ignore_eos,
    }
    try:
        sampling = SamplingParams(**{k: v for k, v in given.items() if v is not None})  # type: ignore[arg-type]
    except InvalidRequest as error:
        raise renamed(error, aliases) from error
    return Call(
        format=lambda model, created: ResponseFormat(model, created, asked),
        model=asked.model,
        prompts=(ChatPrompt(tuple(turns)),),
        prompt_field="input",
        sampling=sampling,
        stream=bool(asked.stream),
        include_usage=True,
        salt=(asked.cache_salt or "").encode(),
        priority=priority(asked.priority or 0),
        aliases=aliases,
    )


class ResponseFormat:
    """``response`` and the events of its stream. There is one choice: the API has no ``n``."""

    ending = b""

    def __init__(self, model: str, created: int, asked: ResponseBody) -> None:
        self.id = f"resp_{uuid.uuid4().hex}"
        self._item_id = f"msg_{uuid.uuid4().hex}"
        self._number = 0
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
            "parallel_tool_calls": True,
            "previous_response_id": None,
            "reasoning": {"effort": None, "summary": None},
            "store": False,
            "text": {"format": {"type": "text"}},
            "tool_choice": "auto",
            "tools": [],
            "truncation": "disabled",
        }

    def opening(self, index: int, prompt_tokens: int) -> bytes | None:
        begun = {"response": self._written("in_progress", [], None)}
        item = {"output_index": 0, "item": self._item("in_progress", [])}
        return (
            self._event("response.created", begun)
            + self._event("response.in_progress", begun)
            + self._event("response.output_item.added", item)
            + self._event("response.content_part.added", {**self._place(), "part": _part("")})
        )

    def event(self, index: int, chunk: TextChunk, extra: Mapping[str, object]) -> bytes | None:
        written = b""
        if chunk.text:
            written = self._event("response.output_text.delta", {**self._place(), "delta": chunk.text, "logprobs": []})
        if chunk.finish is not None:
            self._finish, self._extra = chunk.finish, extra
            part, place = _part(chunk.finish.text), self._place()
            item = {"output_index": 0, "item": self._item(_status(chunk.finish), [part])}
            written += self._event("response.output_text.done", {**place, "text": chunk.finish.text, "logprobs": []})
            written += self._event("response.content_part.done", {**place, "part": part})
            written += self._event("response.output_item.done", item)
        return written or None

    def closing(self, usage: Mapping[str, object]) -> bytes:
        assert self._finish is not None, "a stream is closed when its choice has ended"
        body = self.response([self.choice(0, self._finish, None)], usage, self._extra)
        return self._event(f"response.{_status(self._finish)}", {"response": body})

    def failure(self, error: Mapping[str, object]) -> bytes:
        told = error["error"]
        assert isinstance(told, dict)
        return self._event("error", {"code": told["code"], "message": told["message"], "param": told["param"]})

    def choice(self, index: int, finish: Finish, logprobs: Sequence[LogprobText] | None) -> dict[str, object]:
        self._finish = finish
        return self._item(_status(finish), [_part(finish.text)])

    def response(
        self, choices: Sequence[object], usage: Mapping[str, object], extra: Mapping[str, object]
    ) -> dict[str, object]:
        assert self._finish is not None, "an answer is written when its choice has ended"
        ours = {key: value for key, value in extra.items() if key != "usage"}
        return {**self._written(_status(self._finish), choices, _usage(usage)), **ours}

    def _written(self, status: str, output: Sequence[object], usage: object) -> dict[str, object]:
        return {
            **self._head,
            "status": status,
            "error": None,
            "incomplete_details": {"reason": "max_output_tokens"} if status == "incomplete" else None,
            "output": output,
            "usage": usage,
        }

    def _item(self, status: str, content: Sequence[object]) -> dict[str, object]:
        return {"type": "message", "id": self._item_id, "status": status, "role": "assistant", "content": content}

    def _place(self) -> dict[str, object]:
        return {"item_id": self._item_id, "output_index": 0, "content_index": 0}

    def _event(self, name: str, data: Mapping[str, object]) -> bytes:
        self._number += 1
        return named_event(name, {"type": name, "sequence_number": self._number - 1, **data})


def _part(text: str) -> dict[str, object]:
    return {"type": "output_text", "text": text, "annotations": [], "logprobs": []}


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
