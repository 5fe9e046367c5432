"""What does an OpenAI request body mean, and how is an answer written in OpenAI's JSON? Pure: no server, no streams.

- A field that is understood is checked strictly (a bool is no integer, a string no number).
- A field that would change the answer if it were ignored is refused by name (``_UNSUPPORTED``, each with the values
  that mean nothing), one that would not is accepted (``_HARMLESS``), and one that nobody knows is a misspelling.
- vLLM's additional sampling fields have vLLM's names and meanings.
- Streamed chunks are written by hand around one small JSON object: this runs once for every token.
"""

from __future__ import annotations

import json
import math
import uuid
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Annotated, Literal, Protocol, TypeVar

from pydantic import BaseModel, BeforeValidator, ConfigDict, ValidationError

from cluster.generation import (
    ChatPrompt,
    Finish,
    LogprobText,
    Prompt,
    TextChunk,
    TextPrompt,
    TokenPrompt,
    TokenText,
)
from cluster.sampling_defaults import left_open
from cluster.structured_output import FIELDS, AskedFor, asked_for
from cluster.tokenizer import ChatMessage, ToolCall
from cluster.tools import AUTO, NONE, REQUIRED, Tool, object_of, shortened, tool_use
from core.errors import InvalidRequest
from core.request import MAX_PRIORITY, SamplingParams

MAX_PROMPTS = 256
_COMPLETION_MAX_TOKENS = 16  # OpenAI's default for /v1/completions; a chat's is what the context holds
_LEAST_LOGPROB = -9999.0  # JSON has no infinity; OpenAI writes this

_HARMLESS = frozenset(
    {
        "metadata",
        "prediction",
        "prompt_cache_key",
        "prompt_cache_retention",
        "request_id",
        "safety_identifier",
        "service_tier",
        "store",
        "user",
    }
)
# field |-> the values that ask for nothing; null always does
_UNSUPPORTED: Mapping[str, Collection[object]] = {
    "add_generation_prompt": (True,),
    "allowed_token_ids": (),
    "audio": (),
    "bad_words": ([],),
    "best_of": (1,),
    "chat_template": (),
    "chat_template_kwargs": ({},),
    "continue_final_message": (False,),
    "documents": ([],),
    "echo": (False,),
    "function_call": ("none", "auto"),
    "functions": ([],),
    "kv_transfer_params": (),
    "length_penalty": (1, 1.0),
    "logits_processors": ([],),
    "modalities": (["text"],),
    "prompt_logprobs": (),
    "reasoning_effort": ("none",),
    "suffix": ("",),
    "truncate_prompt_tokens": (),
    "use_beam_search": (False,),
    "verbosity": (),
    "web_search_options": (),
}

encode = json.JSONEncoder(ensure_ascii=False, allow_nan=False, separators=(",", ":")).encode


@dataclass(frozen=True, slots=True)
class Call:
    """A body as it was understood: ``prompts`` x ``sampling.n`` choices. ``aliases``: our name |-> the client's."""

    format: Callable[[str, int], Format]  # (model name, unix time of creation) -> how the answer is written
    model: str | None
    prompts: tuple[Prompt, ...]
    prompt_field: str
    sampling: SamplingParams
    left_open: frozenset[str]  # parameters of which the client said nothing
    stream: bool
    include_usage: bool
    salt: bytes
    priority: int  # higher goes first
    aliases: Mapping[str, str]


class Format(Protocol):
    """How one answer is written; made for each request."""

    @property
    def id(self) -> str:
        """The API's id of the answer."""
        ...

    @property
    def ending(self) -> bytes:
        """What a stream ends with, also after an error."""
        ...

    def opening(self, index: int, prompt_tokens: int) -> bytes | None:
        """The event that begins a choice, if the format has one."""
        ...

    def event(self, index: int, chunk: TextChunk, extra: Mapping[str, object]) -> bytes | None:
        """One server-sent event; None when the chunk holds nothing for a client."""
        ...

    def closing(self, usage: Mapping[str, object]) -> bytes:
        """The event after all choices that carries ``usage``."""
        ...

    def failure(self, error: Mapping[str, object]) -> bytes:
        """The event that tells an error in mid-stream; ``error`` as ``error_body`` wrote it."""
        ...

    def choice(self, index: int, finish: Finish, logprobs: Sequence[LogprobText] | None) -> dict[str, object]:
        """One finished choice of an answer that is not streamed."""
        ...

    def response(
        self, choices: Sequence[object], usage: Mapping[str, object], extra: Mapping[str, object]
    ) -> dict[str, object]:
        """The whole of an answer that is not streamed."""
        ...


# ---- bodies ----


class Body(BaseModel):
    """A JSON object of a request: types as they are, no unknown fields."""

    model_config = ConfigDict(strict=True, extra="forbid", frozen=True)


class StreamOptions(Body):
    """``stream_options``."""

    include_usage: bool = False
    include_obfuscation: bool | None = None  # OpenAI pads events against traffic analysis; we do not


def _stop_strings(value: object) -> object:
    if isinstance(value, str):
        return (value,)
    if isinstance(value, list) and all(isinstance(item, str) for item in value):
        return tuple(value)
    if value is None:
        return ()
    raise ValueError("must be a string or a list of strings")


def _logit_bias(value: object) -> object:
    """JSON object keys are strings; ours are token ids."""
    if not isinstance(value, dict):
        return value
    if not all(key.isascii() and key.isdigit() for key in value):
        raise ValueError("keys must be token ids, written as decimal integers of at least 0")
    return {int(key): bias for key, bias in value.items()}


class FunctionCallBody(BaseModel):
    """The ``function`` of a call in the history; clients send back what else an answer had."""

    model_config = ConfigDict(strict=True, frozen=True)

    name: str
    arguments: str


class ToolCallBody(BaseModel):
    """A call of the assistant's, as a client sends it back."""

    model_config = ConfigDict(strict=True, frozen=True)

    id: str
    function: FunctionCallBody

    def call(self, field: str) -> ToolCall:
        """The call; ``InvalidRequest`` if its arguments are no JSON object."""
        object_of(self.function.arguments, f"{field}.function.arguments")
        return ToolCall(self.id, self.function.name, self.function.arguments)


class FunctionBody(Body):
    """A function that the model may call. ``strict`` changes nothing: see docs/structured-output.md."""

    name: str
    description: str | None = None
    parameters: dict[str, object] | None = None
    strict: bool | None = None

    def tool(self, path: str) -> Tool:
        """As the rest of the house has it."""
        return Tool(self.name, self.description or "", self.parameters, path)


class ToolBody(Body):
    """An entry of ``tools``."""

    type: Literal["function"]
    function: FunctionBody


def named_choice(chosen: Mapping[str, object]) -> str:
    """``=NAME`` of an object that has the name of a function."""
    name = chosen.get("name")
    if not isinstance(name, str) or set(chosen) - {"name", "type"}:
        raise ValueError("must name a function, and nothing else")
    return f"={name}"


def _tool_choice(value: object) -> object:
    """A word, or ``=NAME``."""
    if isinstance(value, dict) and value.get("type") == "function" and isinstance(value.get("function"), dict):
        return named_choice(value["function"])
    if value is not None and value not in (AUTO, NONE, REQUIRED):
        raise ValueError(f'must be {AUTO}, {NONE}, {REQUIRED} or {{"type": "function", "function": {{"name": "..."}}}}')
    return value


def message_text(value: object, kinds: Collection[str] = ("text",)) -> object:
    """A message's content: a string, or text parts of these kinds, which are joined by newlines."""
    if isinstance(value, str):
        return value
    if not isinstance(value, list):
        raise ValueError("must be a string or a list of text parts")
    texts = []
    for position, part in enumerate(value):
        if not isinstance(part, dict) or part.get("type") not in kinds or not isinstance(part.get("text"), str):
            wanted = " or ".join(f'{{"type": "{kind}", "text": "..."}}' for kind in kinds)
            raise ValueError(f"part {position} must be {wanted}; only text is served")
        texts.append(part["text"])
    return "\n".join(texts)


def _chat_text(value: object) -> object:
    return message_text(value)


def without_nulls(value: object) -> object:
    """Answers that clients send back as history carry nulls and empty lists for what they did not have."""
    return {k: v for k, v in value.items() if v is not None and v != []} if isinstance(value, dict) else value


def _prompts(value: object) -> object:
    """A string, a list of strings, token ids, or a list of lists of token ids."""
    if isinstance(value, str):
        return (TextPrompt(value),)
    if not isinstance(value, list):
        raise ValueError("must be a string, a list of strings, a list of token ids or a list of such lists")
    if not value:
        raise ValueError("must not be empty")
    if all(type(item) is int for item in value):
        return (TokenPrompt(tuple(value)),)
    if len(value) > MAX_PROMPTS:
        raise ValueError(f"at most {MAX_PROMPTS} prompts in one request, got {len(value)}")
    if all(isinstance(item, str) for item in value):
        return tuple(TextPrompt(item) for item in value)
    if all(isinstance(item, list) and all(type(token) is int for token in item) for item in value):
        return tuple(TokenPrompt(tuple(item)) for item in value)
    raise ValueError("must hold only strings, only token ids or only lists of token ids")


class Message(Body):
    """One turn of a chat."""

    role: str
    content: Annotated[str, BeforeValidator(_chat_text)] | None = None  # of an assistant that only calls
    name: str | None = None  # chat templates have no place for it
    tool_calls: list[ToolCallBody] = []
    tool_call_id: str | None = None
    refusal: str | None = None

    def turn(self, field: str, called: dict[str, str]) -> ChatMessage:
        """For the chat template. ``called``: functions of the calls so far, by id; this one's are added."""
        if self.tool_calls and self.role != "assistant":
            raise InvalidRequest(f"{field}.tool_calls", "only the assistant calls tools")
        if self.content is None and not self.tool_calls:
            raise InvalidRequest(f"{field}.content", "is required")
        calls = tuple(call.call(f"{field}.tool_calls[{index}]") for index, call in enumerate(self.tool_calls))
        called |= {call.call_id: call.name for call in calls}
        # OpenAI's newer word for the system role; chat templates know the old one.
        role = "system" if self.role == "developer" else self.role
        if role != "tool":
            return ChatMessage(role, self.content or "", calls)
        if self.tool_call_id is None:
            raise InvalidRequest(f"{field}.tool_call_id", "is required: which call does it answer?")
        return ChatMessage(role, self.content or "", (), self.tool_call_id, called.get(self.tool_call_id))


def turns_of(messages: Sequence[Message]) -> tuple[ChatMessage, ...]:
    """The messages for the chat template."""
    called: dict[str, str] = {}
    return tuple(message.turn(f"messages[{index}]", called) for index, message in enumerate(messages))


class _Sampling(Body):
    """Fields that chats and completions share; null means the default."""

    model: str | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    max_tokens: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    n: int | None = None
    stop: Annotated[tuple[str, ...], BeforeValidator(_stop_strings)] = ()
    seed: int | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    logit_bias: Annotated[dict[int, float] | None, BeforeValidator(_logit_bias)] = None
    top_k: int | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    min_tokens: int | None = None
    ignore_eos: bool | None = None
    stop_token_ids: list[int] | None = None
    skip_special_tokens: bool | None = None
    include_stop_str_in_output: bool | None = None
    cache_salt: str | None = None
    priority: int | None = None
    # What they mean together is found by structured_output.py.
    response_format: object = None
    structured_outputs: object = None
    guided_json: object = None
    guided_regex: object = None
    guided_choice: object = None
    guided_grammar: object = None

    @property
    def asked_for(self) -> AskedFor | None:
        """The form that the answer has to have."""
        return asked_for({name: getattr(self, name) for name in FIELDS})

    def given(self, **more: object) -> dict[str, object]:
        """The parameters that are not null."""
        given = {
            "max_tokens": self.max_tokens,
            "temperature": self.temperature,
            "top_p": self.top_p,
            "n": self.n,
            "seed": self.seed,
            "presence_penalty": self.presence_penalty,
            "frequency_penalty": self.frequency_penalty,
            "logit_bias": self.logit_bias,
            "top_k": 0 if self.top_k == -1 else self.top_k,  # vLLM takes both for "no limit"
            "min_p": self.min_p,
            "repetition_penalty": self.repetition_penalty,
            "min_tokens": self.min_tokens,
            "ignore_eos": self.ignore_eos,
            "stop_token_ids": None if self.stop_token_ids is None else tuple(self.stop_token_ids),
            "skip_special_tokens": self.skip_special_tokens,
            "include_stop_str_in_output": self.include_stop_str_in_output,
        } | more
        return {name: value for name, value in given.items() if value is not None}


class ChatBody(_Sampling):
    """POST /v1/chat/completions."""

    messages: list[Annotated[Message, BeforeValidator(without_nulls)]]
    max_completion_tokens: int | None = None
    logprobs: bool | None = None
    top_logprobs: int | None = None
    tools: list[ToolBody] | None = None
    tool_choice: Annotated[str | None, BeforeValidator(_tool_choice)] = None
    parallel_tool_calls: bool | None = None


class CompletionBody(_Sampling):
    """POST /v1/completions."""

    prompt: Annotated[tuple[Prompt, ...], BeforeValidator(_prompts)]
    logprobs: int | None = None


def parse_chat(body: object) -> Call:
    """The meaning of a chat body; ``InvalidRequest`` naming the field."""
    chat = validate(ChatBody, body, _UNSUPPORTED, _HARMLESS)
    if chat.top_logprobs is not None and not chat.logprobs:
        raise InvalidRequest("top_logprobs", "needs logprobs to be true")
    aliases = {"logprobs": "top_logprobs"}
    max_tokens = chat.max_tokens
    if chat.max_completion_tokens is not None:
        max_tokens = chat.max_completion_tokens
        aliases["max_tokens"] = "max_completion_tokens"
    logprobs = (chat.top_logprobs or 0) if chat.logprobs else None
    tools = [tool.function.tool(f"tools[{index}].function") for index, tool in enumerate(chat.tools or ())]
    prompt = ChatPrompt(turns_of(chat.messages), tool_use(tools, chat.tool_choice, chat.parallel_tool_calls))
    return _call(chat, ChatFormat, (prompt,), "messages", aliases, max_tokens=max_tokens, logprobs=logprobs)


def parse_completion(body: object) -> Call:
    """The meaning of a completion body; ``InvalidRequest`` naming the field."""
    completion = validate(CompletionBody, body, _UNSUPPORTED, _HARMLESS)
    max_tokens = _COMPLETION_MAX_TOKENS if completion.max_tokens is None else completion.max_tokens
    return _call(
        completion,
        CompletionFormat,
        completion.prompt,
        "prompt",
        {},
        max_tokens=max_tokens,
        logprobs=completion.logprobs,
    )


def _call(
    body: _Sampling,
    answer: Callable[[str, int], Format],
    prompts: tuple[Prompt, ...],
    prompt_field: str,
    aliases: Mapping[str, str],
    **more: object,
) -> Call:
    if body.stream_options is not None and not body.stream:
        raise InvalidRequest("stream_options", "needs stream to be true")
    asked = body.asked_for
    if asked is not None:
        aliases = {**aliases, "grammar": asked.field}
        more["grammar"] = asked.grammar
    given = body.given(**more)
    try:
        sampling = SamplingParams(stop=body.stop, **given)  # type: ignore[arg-type]
    except InvalidRequest as error:
        raise renamed(error, aliases) from error
    return Call(
        format=answer,
        model=body.model,
        prompts=prompts,
        prompt_field=prompt_field,
        sampling=sampling,
        left_open=left_open(given),
        stream=bool(body.stream),
        include_usage=body.stream_options is not None and body.stream_options.include_usage,
        salt=(body.cache_salt or "").encode(),
        priority=priority(body.priority or 0),
        aliases=aliases,
    )


def priority(given: int) -> int:
    """vLLM's field: the lower goes first. Ours is the other way round, as most routers' is."""
    if abs(given) > MAX_PRIORITY:
        raise InvalidRequest(
            "priority", f"must be between {-MAX_PRIORITY} and {MAX_PRIORITY} (the lower goes first), got {given}"
        )
    return -given


def renamed(error: InvalidRequest, aliases: Mapping[str, str]) -> InvalidRequest:
    """The error with the client's name for the field."""
    return InvalidRequest(aliases[error.field], error.message) if error.field in aliases else error


_BodyT = TypeVar("_BodyT", bound=Body)


def validate(
    cls: type[_BodyT], body: object, unsupported: Mapping[str, Collection[object]], harmless: Collection[str]
) -> _BodyT:
    """The body, checked; ``InvalidRequest`` naming the field.

    ``unsupported``: field |-> the values that ask for nothing. ``harmless``: fields that change no answer.
    """
    if not isinstance(body, dict):
        raise InvalidRequest("body", "must be a JSON object")
    for name, meaningless in unsupported.items():
        value = body.get(name)
        if value is not None and value not in meaningless:
            raise InvalidRequest(name, "is not supported; leave it out")
    known = {k: v for k, v in body.items() if k not in unsupported and k not in harmless}
    try:
        return cls.model_validate(known)
    except ValidationError as error:
        raise _invalid(error) from error


def _invalid(error: ValidationError) -> InvalidRequest:
    """The first thing that is wrong, by its path in the body."""
    first = error.errors(include_url=False)[0]
    path = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in first["loc"]).lstrip(".")
    if first["type"] == "missing":
        return InvalidRequest(path, "is required")
    if first["type"] == "extra_forbidden":
        return InvalidRequest(path, "is not a field of this request")
    if first["type"] == "value_error":
        return InvalidRequest(path, str(first["ctx"]["error"]))
    words = first["msg"].replace("Input should be", "must be")
    return InvalidRequest(path, f"{words}, got {shortened(repr(first['input']))}")


# ---- answers ----


def usage(prompt_tokens: int, completion_tokens: int, cached_tokens: int) -> dict[str, object]:
    """OpenAI's ``usage`` object."""
    return {
        "prompt_tokens": prompt_tokens,
        "completion_tokens": completion_tokens,
        "total_tokens": prompt_tokens + completion_tokens,
        "prompt_tokens_details": {"cached_tokens": cached_tokens},
    }


def timing(index: int, finish: Finish, tokenize_s: float) -> dict[str, object]:
    """Where one choice was computed and where its seconds went; ours, under the key ``prfaas``."""
    stages = {} if finish.timing is None else asdict(finish.timing)
    return {"index": index, "tokenize_s": tokenize_s, **stages}


def error_body(message: str, kind: str, param: str | None, code: str | None) -> dict[str, object]:
    """OpenAI's error object."""
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}


def event(data: object) -> bytes:
    """A server-sent event with one JSON value."""
    return f"data: {encode(data)}\n\n".encode()


DONE = b"data: [DONE]\n\n"


def named_event(name: str, data: object) -> bytes:
    """One with a name, as APIs have it whose events are of several kinds."""
    return f"event: {name}\ndata: {encode(data)}\n\n".encode()


class _Events:
    """Events that differ in their choices only: the rest is encoded once."""

    def __init__(self, kind: str, answer_id: str, model: str, created: int) -> None:
        head = encode({"id": answer_id, "object": kind, "created": created, "model": model})
        self._head = f"data: {head[:-1]},"

    def write(self, choice: Mapping[str, object], extra: Mapping[str, object]) -> bytes:
        tail = f",{encode(extra)[1:]}" if extra else "}"
        return f'{self._head}"choices":[{encode(choice)}]{tail}\n\n'.encode()

    def closing(self, usage: Mapping[str, object]) -> bytes:
        return f'{self._head}"choices":[],"usage":{encode(usage)}}}\n\n'.encode()


class ChatFormat:
    """``chat.completion`` and ``chat.completion.chunk``."""

    ending = DONE

    def __init__(self, model: str, created: int) -> None:
        self.id = f"chatcmpl-{uuid.uuid4().hex}"
        self._model = model
        self._created = created
        self._events = _Events("chat.completion.chunk", self.id, model, created)

    def opening(self, index: int, prompt_tokens: int) -> bytes | None:
        delta = {"role": "assistant", "content": ""}
        return self._events.write({"index": index, "delta": delta, "logprobs": None, "finish_reason": None}, extra={})

    def event(self, index: int, chunk: TextChunk, extra: Mapping[str, object]) -> bytes | None:
        if not chunk.text and not chunk.logprobs and not chunk.calls and chunk.finish is None:
            return None
        delta: dict[str, object] = {"content": chunk.text} if chunk.text or chunk.logprobs else {}
        if chunk.calls:
            numbers = range(chunk.num_calls_before, chunk.num_calls_before + len(chunk.calls))
            called = zip(numbers, chunk.calls, strict=True)
            delta["tool_calls"] = [{"index": number, **_tool_call(call)} for number, call in called]
        choice: dict[str, object] = {
            "index": index,
            "delta": delta,
            "logprobs": _chat_logprobs(chunk.logprobs) if chunk.logprobs else None,
            "finish_reason": None,
        }
        if chunk.finish is not None:
            choice |= _ending(chunk.finish)
        return self._events.write(choice, extra)

    def closing(self, usage: Mapping[str, object]) -> bytes:
        return self._events.closing(usage)

    def failure(self, error: Mapping[str, object]) -> bytes:
        return event(error)

    def choice(self, index: int, finish: Finish, logprobs: Sequence[LogprobText] | None) -> dict[str, object]:
        message: dict[str, object] = {"role": "assistant", "content": finish.text, "refusal": None}
        if finish.calls:
            message |= {"content": finish.text or None, "tool_calls": [_tool_call(call) for call in finish.calls]}
        return {
            "index": index,
            "message": message,
            "logprobs": None if logprobs is None else _chat_logprobs(logprobs),
            **_ending(finish),
        }

    def response(
        self, choices: Sequence[object], usage: Mapping[str, object], extra: Mapping[str, object]
    ) -> dict[str, object]:
        return _response("chat.completion", self.id, self._created, self._model, choices, usage, extra)


class CompletionFormat:
    """``text_completion``."""

    ending = DONE

    def __init__(self, model: str, created: int) -> None:
        self.id = f"cmpl-{uuid.uuid4().hex}"
        self._model = model
        self._created = created
        self._events = _Events("text_completion", self.id, model, created)
        self._offsets: dict[int, int] = {}  # choice |-> characters of the tokens whose logprobs were given

    def opening(self, index: int, prompt_tokens: int) -> bytes | None:
        return None

    def event(self, index: int, chunk: TextChunk, extra: Mapping[str, object]) -> bytes | None:
        if not chunk.text and not chunk.logprobs and chunk.finish is None:
            return None
        logprobs = self._logprobs(index, chunk.logprobs) if chunk.logprobs else None
        choice: dict[str, object] = {"index": index, "text": chunk.text, "logprobs": logprobs, "finish_reason": None}
        if chunk.finish is not None:
            choice |= _ending(chunk.finish)
        return self._events.write(choice, extra)

    def closing(self, usage: Mapping[str, object]) -> bytes:
        return self._events.closing(usage)

    def failure(self, error: Mapping[str, object]) -> bytes:
        return event(error)

    def choice(self, index: int, finish: Finish, logprobs: Sequence[LogprobText] | None) -> dict[str, object]:
        return {
            "index": index,
            "text": finish.text,
            "logprobs": None if logprobs is None else self._logprobs(index, logprobs),
            **_ending(finish),
        }

    def response(
        self, choices: Sequence[object], usage: Mapping[str, object], extra: Mapping[str, object]
    ) -> dict[str, object]:
        return _response("text_completion", self.id, self._created, self._model, choices, usage, extra)

    def _logprobs(self, index: int, entries: Sequence[LogprobText]) -> dict[str, object]:
        offset = self._offsets.get(index, 0)
        offsets = []
        for entry in entries:
            offsets.append(offset)
            offset += len(entry.chosen.text)
        self._offsets[index] = offset
        return {
            "tokens": [entry.chosen.text for entry in entries],
            "token_logprobs": [_finite(entry.chosen.logprob) for entry in entries],
            "top_logprobs": [
                {token.text: _finite(token.logprob) for token in (entry.chosen, *entry.top)} for entry in entries
            ],
            "text_offset": offsets,
        }


def _response(
    kind: str,
    answer_id: str,
    created: int,
    model: str,
    choices: Sequence[object],
    usage: Mapping[str, object],
    extra: Mapping[str, object],
) -> dict[str, object]:
    head = {"id": answer_id, "object": kind, "created": created, "model": model}
    return {**head, "choices": choices, "usage": usage, **extra}


def _ending(finish: Finish) -> dict[str, object]:
    """``stop_reason`` is vLLM's: the stop string or the token id that ended the text."""
    reason = "tool_calls" if finish.calls_tools else finish.reason
    return {"finish_reason": reason, "stop_reason": finish.stop_string or finish.stop_token_id}


def _tool_call(call: ToolCall) -> dict[str, object]:
    return {"id": call.call_id, "type": "function", "function": {"name": call.name, "arguments": call.arguments}}


def _chat_logprobs(entries: Sequence[LogprobText]) -> dict[str, object]:
    return {"content": logprob_entries(entries), "refusal": None}


def logprob_entries(entries: Sequence[LogprobText]) -> list[dict[str, object]]:
    """Each token and what might have been in its place."""
    return [_chat_token(entry.chosen) | {"top_logprobs": [_chat_token(t) for t in entry.top]} for entry in entries]


def _chat_token(token: TokenText) -> dict[str, object]:
    return {"token": token.text, "logprob": _finite(token.logprob), "bytes": list(token.data)}


def _finite(logprob: float) -> float:
    return logprob if math.isfinite(logprob) else _LEAST_LOGPROB
