"""What does a gRPC request mean, and how is an answer written as messages? ``protos/serving.proto``; pure.

Errors begin with the client's name for the field.
"""

from __future__ import annotations

import uuid
from collections.abc import Iterable
from typing import Any

from cluster import structured_output
from cluster.generation import (
    ChatPrompt,
    LogprobText,
    PreparedRequest,
    Prompt,
    TextChunk,
    TextPrompt,
    TokenPrompt,
    TokenText,
)
from cluster.request_info import timing_breakdown
from cluster.tokenizer import ChatMessage, ToolCall
from cluster.tools import TOOL_CHOICES, Tool, ToolUse, object_of, shortened, tool_use
from core.errors import InvalidRequest
from core.grammar import Grammar
from core.request import RequestId, SamplingParams
from protos import serving_pb2 as pb

STRUCTURED_OUTPUT = "sampling_params.structured_output"
_MAX_REQUEST_ID_CHARS = 256


def parse_prompt(request: pb.GenerateRequest | pb.TokenizeRequest) -> tuple[Prompt, str]:
    """The prompt and the client's name for it."""
    kind = request.WhichOneof("input")
    if kind == "text":
        return TextPrompt(request.text), "text"
    if kind == "chat":
        return ChatPrompt(_turns(request.chat.messages), _tools(request.chat)), "chat.messages"
    if kind == "tokenized" and isinstance(request, pb.GenerateRequest):
        return TokenPrompt(tuple(request.tokenized.input_ids)), "tokenized.input_ids"
    allowed = ", ".join(field.name for field in request.DESCRIPTOR.oneofs_by_name["input"].fields)
    raise InvalidRequest("input", f"one of {allowed} must be given")


def _turns(messages: Iterable[pb.ChatMessage]) -> tuple[ChatMessage, ...]:
    """The messages for the chat template; a tool's answer gets the name of the function that was called."""
    called: dict[str, str] = {}
    turns: list[ChatMessage] = []
    for index, message in enumerate(messages):
        field = f"chat.messages[{index}]"
        if message.tool_calls and message.role != "assistant":
            raise InvalidRequest(f"{field}.tool_calls", "only the assistant calls tools")
        if message.tool_call_id and message.role != "tool":
            raise InvalidRequest(f"{field}.tool_call_id", "only messages of role tool answer calls")
        for number, call in enumerate(message.tool_calls):
            object_of(call.arguments, f"{field}.tool_calls[{number}].arguments")
            called[call.id] = call.name
        if message.role == "tool" and not message.tool_call_id:
            raise InvalidRequest(f"{field}.tool_call_id", "is required: which call does it answer?")
        calls = tuple(ToolCall(call.id, call.name, call.arguments) for call in message.tool_calls)
        call_id = message.tool_call_id or None
        turns.append(ChatMessage(message.role, message.content, calls, call_id, called.get(message.tool_call_id)))
    return tuple(turns)


def _tools(chat: pb.ChatInput) -> ToolUse | None:
    """What the model may call; ``InvalidRequest`` naming the field."""
    tools: list[Tool] = []
    for index, tool in enumerate(chat.tools):
        field = f"chat.tools[{index}]"
        parameters = object_of(tool.parameters, f"{field}.parameters") if tool.parameters else None
        tools.append(Tool(tool.name, tool.description, parameters, field))
    kind = chat.tool_choice.WhichOneof("choice")
    choice = None
    if kind == "name":
        choice = f"={chat.tool_choice.name}"
    elif kind == "mode":
        choice = chat.tool_choice.mode
        if choice not in TOOL_CHOICES:
            allowed = f"must be one of {', '.join(TOOL_CHOICES)}, got {shortened(repr(choice))}"
            raise InvalidRequest("chat.tool_choice.mode", allowed)
    parallel = chat.parallel_tool_calls if chat.HasField("parallel_tool_calls") else None
    return tool_use(tools, choice, parallel, "chat.tools", "chat.tool_choice")


def parse_request_id(given: str) -> RequestId:
    """The client's, or a new one."""
    if len(given) > _MAX_REQUEST_ID_CHARS:
        raise InvalidRequest("request_id", f"must have at most {_MAX_REQUEST_ID_CHARS} characters")
    return RequestId(given or f"gen-{uuid.uuid4().hex}")


def parse_sampling(message: pb.SamplingParams) -> SamplingParams:
    """The fields that the client set; their names are ``SamplingParams``' own."""
    values: dict[str, Any] = {}
    for field, value in message.ListFields():
        if field.name == "logit_bias":
            values[field.name] = {token_id: _shortest(bias) for token_id, bias in value.items()}
        elif field.name == "structured_output":
            values["grammar"] = _parse_form(value)
        elif field.name in ("stop", "stop_token_ids"):
            values[field.name] = tuple(value)
        else:
            values[field.name] = _shortest(value) if isinstance(value, float) else value
    return SamplingParams(**values)


def default_sampling(defaults: SamplingParams) -> pb.SamplingParams:
    """What a request gets for what it leaves open."""
    return pb.SamplingParams(
        max_tokens=defaults.max_tokens,
        temperature=defaults.temperature,
        top_p=defaults.top_p,
        top_k=defaults.top_k,
        min_p=defaults.min_p,
        repetition_penalty=defaults.repetition_penalty,
    )


def _parse_form(message: pb.StructuredOutput) -> Grammar:
    """What the output has to obey; ``InvalidRequest`` naming the field."""
    kind = message.WhichOneof("form")
    if kind is None:
        allowed = ", ".join(field.name for field in message.DESCRIPTOR.oneofs_by_name["form"].fields)
        raise InvalidRequest(STRUCTURED_OUTPUT, f"one of {allowed} must be given")
    field = f"{STRUCTURED_OUTPUT}.{kind}"
    if kind == "json_object":
        return structured_output.of_schema({"type": "object"}, field)
    if kind == "choice":
        return structured_output.of_choice(list(message.choice.texts), f"{field}.texts")
    make = {"json_schema": structured_output.of_schema, "regex": structured_output.of_regex}
    return make.get(kind, structured_output.of_lark)(getattr(message, kind), field)


def _shortest(value: float) -> float:
    """What the client meant: 0.9 travels as the float32 0.89999998, and HTTP clients' 0.9 must do the same."""
    return float(f"{value:.7g}")


def answer_messages(prepared: PreparedRequest, chunk: TextChunk) -> list[pb.GenerateResponse]:
    """What ``chunk`` is on the wire: a chunk if it has tokens or text, a final message if it is the last."""
    request_id = prepared.request.request_id
    prompt_tokens = len(prepared.request.prompt_token_ids)
    messages = []
    if chunk.token_ids or chunk.text or chunk.calls:
        part = pb.GenerateStreamChunk(
            index=chunk.index,
            token_ids=chunk.token_ids,
            text=chunk.text,
            logprobs=[_logprob(entry) for entry in chunk.logprobs],
            prompt_tokens=prompt_tokens,
            completion_tokens=chunk.num_output_tokens,
            cached_tokens=chunk.cached_tokens,
            tool_calls=[_call(call) for call in chunk.calls],
        )
        messages.append(pb.GenerateResponse(request_id=request_id, chunk=part))
    if chunk.finish is not None:
        complete = pb.GenerateComplete(
            index=chunk.index,
            output_ids=chunk.finish.output_token_ids,
            text=chunk.finish.text,
            finish_reason="tool_calls" if chunk.finish.calls_tools else chunk.finish.reason,
            usage=pb.Usage(
                prompt_tokens=prompt_tokens,
                completion_tokens=chunk.num_output_tokens,
                cached_tokens=chunk.cached_tokens,
            ),
            timing=timing_breakdown(chunk.finish.timing, prepared.tokenize_s),
            tool_calls=[_call(call) for call in chunk.finish.calls],
        )
        if chunk.finish.stop_string is not None:
            complete.stop_string = chunk.finish.stop_string
        elif chunk.finish.stop_token_id is not None:
            complete.stop_token_id = chunk.finish.stop_token_id
        messages.append(pb.GenerateResponse(request_id=request_id, complete=complete))
    return messages


def _call(call: ToolCall) -> pb.ToolCall:
    return pb.ToolCall(id=call.call_id, name=call.name, arguments=call.arguments)


def _logprob(entry: LogprobText) -> pb.OutputLogprob:
    def top(token: TokenText) -> pb.TopLogprob:
        return pb.TopLogprob(token_id=token.token_id, logprob=token.logprob, token=token.text)

    chosen = entry.chosen
    return pb.OutputLogprob(
        token_id=chosen.token_id, logprob=chosen.logprob, token=chosen.text, top=[top(token) for token in entry.top]
    )
