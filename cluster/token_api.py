"""What do /tokenize and /detokenize mean? vLLM's bodies and answers: tokens of a text or of a chat, and text of tokens.

Pure, as openai_api.py: http_gateway.py asks ``Generation`` for the tokens.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated

from pydantic import BeforeValidator

from cluster.generation import ChatPrompt, TextPrompt
from cluster.openai_api import Body, Message, ToolBody, turns_of, validate, without_nulls
from cluster.tools import tool_use
from core.errors import InvalidRequest

# field |-> the values that ask for nothing; null always does
_UNSUPPORTED: Mapping[str, Collection[object]] = {
    "add_generation_prompt": (True,),
    "chat_template": (),
    "chat_template_kwargs": ({},),
    "continue_final_message": (False,),
    "mm_processor_kwargs": ({},),
}


class TokenizeBody(Body):
    """POST /tokenize: ``prompt`` or ``messages``."""

    model: str | None = None
    prompt: str | None = None
    messages: list[Annotated[Message, BeforeValidator(without_nulls)]] | None = None
    tools: list[ToolBody] | None = None  # of a chat: the model is told of them, so they are tokens
    add_special_tokens: bool | None = None  # of a prompt: true; a chat template brings its own
    return_token_strs: bool | None = None


class DetokenizeBody(Body):
    """POST /detokenize."""

    model: str | None = None
    tokens: list[int]


@dataclass(frozen=True, slots=True)
class ToTokenize:
    """A body of /tokenize as it was understood."""

    model: str | None
    prompt: TextPrompt | ChatPrompt
    field: str
    add_special_tokens: bool
    with_texts: bool


def parse_tokenize(body: object) -> ToTokenize:
    """The meaning of a body; ``InvalidRequest`` naming the field."""
    asked = validate(TokenizeBody, body, _UNSUPPORTED, ())
    if (asked.prompt is None) == (asked.messages is None):
        raise InvalidRequest("prompt", "is required, or messages; not both")
    with_texts = bool(asked.return_token_strs)
    if asked.prompt is not None:
        return ToTokenize(
            asked.model, TextPrompt(asked.prompt), "prompt", asked.add_special_tokens is not False, with_texts
        )
    if asked.add_special_tokens:
        raise InvalidRequest("add_special_tokens", "must be false for messages: the chat template brings its own")
    tools = [tool.function.tool(f"tools[{index}].function") for index, tool in enumerate(asked.tools or ())]
    prompt = ChatPrompt(turns_of(asked.messages or ()), tool_use(tools, None, None))
    return ToTokenize(asked.model, prompt, "messages", False, with_texts)


def parse_detokenize(body: object) -> DetokenizeBody:
    """The meaning of a body; ``InvalidRequest`` naming the field."""
    return validate(DetokenizeBody, body, {}, ())


def tokenized(token_ids: Sequence[int], max_model_len: int, texts: Sequence[str] | None) -> dict[str, object]:
    """The answer of /tokenize."""
    return {
        "count": len(token_ids),
        "max_model_len": max_model_len,
        "tokens": list(token_ids),
        "token_strs": None if texts is None else list(texts),
    }
