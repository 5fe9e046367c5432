"""Text to tokens and back, for whatever tokenizer the model's folder holds.

``Detokenizer`` turns a growing list of tokens into text as it comes. Its invariants:
- the pieces it gives, joined, are what decoding prompt and output at once adds to the prompt's own text (for output
  whose bytes are valid UTF-8), so spaces at piece borders are right for every family of tokenizers;
- a character is given only when all its bytes are there;
- the work for a token is constant: the window that is decoded is bounded, also when a model emits garbage bytes.
"""

from __future__ import annotations

import json
import logging
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, cached_property
from pathlib import Path
from typing import Any

from core.errors import InvalidRequest

_REPLACEMENT = "�"  # what decoders give for bytes that are not, or not yet, a character
_MAX_CHAR_TOKENS = 4  # a character has at most 4 bytes, a token at least one
_MAX_PENDING_TOKENS = 2 * _MAX_CHAR_TOKENS - 1
NO_TOOLS = "the served model's chat template has no place for tools"
_NAMES_TOOLS = re.compile(r"\btools\b")  # the variable that chat templates get them in
_PROMPT_TAIL_TOKENS = 5  # context for the first output token; more than any decoder looks back


def leave_torch_out() -> None:
    """From now on there is no torch in this process: ``import torch`` says so, and transformers goes without.

    transformers loads torch wherever it is installed, also for nothing but a tokenizer: of the 7 s of CPU and 390 MiB
    that took in a gateway, 2 s and 125 MiB are left. Nothing changes where torch is loaded already.
    """
    if sys.modules.setdefault("torch", None) is None:  # type: ignore[arg-type]  # what Python means by a missing module
        logging.getLogger("transformers").addFilter(_says_more_than_that_torch_is_missing)


def _says_more_than_that_torch_is_missing(record: logging.LogRecord) -> bool:
    return "PyTorch was not found" not in record.getMessage()


@dataclass(frozen=True, slots=True)
class ToolCall:
    """A call of a function. ``arguments``: JSON text of an object."""

    call_id: str
    name: str
    arguments: str


@dataclass(frozen=True, slots=True)
class ChatMessage:
    """One turn, as the model's chat template gets it. ``tool_calls``: the assistant's; ``tool_call_id`` and ``name``:
    of the call that a tool's message answers."""

    role: str
    content: str
    tool_calls: tuple[ToolCall, ...] = ()
    tool_call_id: str | None = None
    name: str | None = None

    def as_template_gets_it(self) -> dict[str, object]:
        """The form that transformers' chat templates expect: arguments are an object there, not text."""
        turn: dict[str, object] = {"role": self.role, "content": self.content}
        if self.tool_calls:
            turn["tool_calls"] = [
                {
                    "id": call.call_id,
                    "type": "function",
                    "function": {"name": call.name, "arguments": json.loads(call.arguments)},
                }
                for call in self.tool_calls
            ]
        for key, value in (("tool_call_id", self.tool_call_id), ("name", self.name)):
            if value is not None:
                turn[key] = value
        return turn


class Tokenizer:
    """The tokenizer of the served model. Safe to use from several threads."""

    def __init__(self, hf_tokenizer: Any) -> None:  # transformers' classes are untyped
        self._hf = hf_tokenizer
        # The Rust object behind a fast tokenizer decodes ten times faster than the Python class around it.
        self._backend = getattr(hf_tokenizer, "backend_tokenizer", None)
        self._token_text: dict[int, tuple[str, bytes]] = {}
        # Characters of a token decoded alone, without and with special tokens: half of the detokenisers' work.
        self._lengths: tuple[dict[int, int], dict[int, int]] = ({}, {})

    @classmethod
    def load(cls, folder: str | Path) -> Tokenizer:
        """The tokenizer in a model's folder, with its chat template if it has one. ``leave_torch_out`` comes first in
        a process that computes nothing."""
        from transformers import AutoTokenizer  # here, because importing transformers takes seconds

        return cls(AutoTokenizer.from_pretrained(str(folder)))

    @property
    def has_chat_template(self) -> bool:
        """Whether ``encode_chat`` works."""
        return bool(self._hf.chat_template)

    def encode(self, text: str, *, field: str, add_special_tokens: bool = True) -> tuple[int, ...]:
        """Token ids of ``text``; ``InvalidRequest`` naming ``field`` if it is not Unicode (a lone surrogate)."""
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise InvalidRequest(field, f"must be valid Unicode text: {error.reason}") from error
        return tuple(self._hf.encode(text, add_special_tokens=add_special_tokens))

    @cached_property
    def tool_template(self) -> str:
        """The chat template for conversations with tools; empty: there is none that has a place for them."""
        if not self.has_chat_template:
            return ""
        template = str(self._hf.get_chat_template(tools=[]))
        return template if _NAMES_TOOLS.search(template) else ""

    def token_of(self, text: str) -> int | None:
        """The added token that is exactly ``text``, if there is one."""
        token_id = self._hf.get_added_vocab().get(text)
        return None if token_id is None else int(token_id)

    def is_hidden(self, text: str) -> bool:
        """Is that token left out of the text that ``decode`` gives?"""
        token_id = self.token_of(text)
        return token_id is not None and not self.decode((token_id,))

    def encode_chat(
        self, messages: Sequence[ChatMessage], *, field: str, tools: Sequence[Mapping[str, object]] = ()
    ) -> tuple[int, ...]:
        """Token ids of the messages in the model's own chat template, ending where the assistant's answer begins.
        ``tools``: JSON schemas of functions, as the template gets them."""
        if not self.has_chat_template:
            raise InvalidRequest(field, "the served model has no chat template; send a plain prompt instead")
        if tools and not self.tool_template:
            raise InvalidRequest("tools", NO_TOOLS)
        turns = [message.as_template_gets_it() for message in messages]
        from jinja2.exceptions import TemplateError

        try:
            text = self._hf.apply_chat_template(
                turns, tools=list(tools) or None, add_generation_prompt=True, tokenize=False
            )
        except TemplateError as error:
            raise InvalidRequest(field, f"the model's chat template refuses them: {error}") from error
        return self.encode(text, field=field, add_special_tokens=False)

    def decode(self, token_ids: Sequence[int], *, skip_special_tokens: bool = True) -> str:
        """The text of ``token_ids``, exactly as the tokens say (no clean-up of spaces)."""
        if self._backend is not None:
            return str(self._backend.decode(token_ids, skip_special_tokens=skip_special_tokens))
        return str(
            self._hf.decode(token_ids, skip_special_tokens=skip_special_tokens, clean_up_tokenization_spaces=False)
        )

    def token_text(self, token_id: int) -> tuple[str, bytes]:
        """One token by itself, as log-probabilities show it: its text, and its bytes even if they are no character."""
        known = self._token_text.get(token_id)
        if known is None:
            text = self.decode((token_id,), skip_special_tokens=False)
            known = self._token_text[token_id] = text, self._token_bytes(token_id, text)
        return known

    def detokenizer(self, prompt_token_ids: Sequence[int], *, skip_special_tokens: bool) -> Detokenizer:
        """A detokeniser for output that follows this prompt."""

        def decode(token_ids: Sequence[int]) -> str:
            return self.decode(token_ids, skip_special_tokens=skip_special_tokens)

        return Detokenizer(decode, prompt_token_ids, self._lengths[skip_special_tokens])

    def _token_bytes(self, token_id: int, text: str) -> bytes:
        if _REPLACEMENT not in text:
            return text.encode()
        spelling = self._hf.convert_ids_to_tokens(token_id)
        if len(spelling) == 6 and spelling.startswith("<0x"):  # SentencePiece's byte tokens
            return bytes.fromhex(spelling[3:5])
        byte_of = _byte_alphabet()
        if all(char in byte_of for char in spelling):
            return bytes(byte_of[char] for char in spelling)
        return text.encode()


class Detokenizer:
    """Tokens of one continuation in, text out.

        ... | context | pending |        a window of tokens, decoded as one
            | shown      | not  |        the characters of its text

    Context was shown in full, and decoders need it to tell how the next token begins (with or without a space). Tokens
    may end inside a character, also every one of a long run, so what was shown is counted in characters.
    """

    def __init__(
        self,
        decode: Callable[[Sequence[int]], str],
        prompt_token_ids: Sequence[int],
        lengths: dict[int, int] | None = None,
    ) -> None:
        """``lengths``: characters of tokens that ``decode`` was given alone; found ones are added."""
        self._decode = decode
        self._lengths = {} if lengths is None else lengths
        self._window = list(prompt_token_ids[-_PROMPT_TAIL_TOKENS:])
        self._num_context = len(self._window)
        self._num_shown = len(decode(self._window)) if self._window else 0

    def push(self, token_ids: Sequence[int]) -> str:
        """The text that ``token_ids`` complete; empty while a character's bytes are still missing."""
        # One at a time: byte tokens decode to garbage until a character ends, and a larger piece may end inside one.
        return "".join(map(self._push_one, token_ids))

    def _push_one(self, token_id: int) -> str:
        self._window.append(token_id)
        text = self._decode(self._window)
        crowded = len(self._window) - self._num_context > _MAX_PENDING_TOKENS
        if text.endswith(_REPLACEMENT):
            return self._show_what_is_final(text) if crowded else ""
        shown = text[self._num_shown :]
        if shown or crowded:  # silent tokens (special ones) leave the context that has text in place
            self._window = self._window[self._num_context :]
            self._num_context = len(self._window)
            self._num_shown = (
                self._length_alone(token_id) if self._num_context == 1 else len(self._decode(self._window))
            )
        return shown

    def _length_alone(self, token_id: int) -> int:
        length = self._lengths.get(token_id)
        if length is None:
            length = self._lengths[token_id] = len(self._decode((token_id,)))
        return length

    def flush(self) -> str:
        """The text of what is still pending, when no more tokens will come: a broken character stays broken."""
        text = self._decode(self._window)
        shown, self._num_shown = text[self._num_shown :], len(text)
        return shown

    def _show_what_is_final(self, text: str) -> str:
        """More is pending than a character can lack: show what no later token can change, and shorten the window.

        Whatever begins before the last three tokens is final: three more tokens are three more bytes. Up to there the
        text with and without them agree, but for a character that goes on into them, which then waits.
        """
        without = self._decode(self._window[: 1 - _MAX_CHAR_TOKENS])
        agreed = zip(text, without, strict=False)  # as far as the shorter one goes
        num_final = next((i for i, (a, b) in enumerate(agreed) if a != b), min(len(text), len(without)))
        num_final = max(num_final, self._num_shown)
        shown, rest = text[self._num_shown : num_final], text[num_final:]
        # The rest lies within the last few tokens; before them come enough to find a character's beginning again.
        self._window = self._window[-2 * _MAX_CHAR_TOKENS :]
        self._num_context = len(self._window) - _MAX_CHAR_TOKENS
        self._num_shown = len(self._decode(self._window)) - len(rest)
        return shown


@cache
def _byte_alphabet() -> dict[str, int]:
    """The character that GPT-2's byte-level alphabet shows for each byte, inverted.

    Printable Latin-1 stands for itself; the other 68 bytes are numbered from U+0100.
    """
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(0x100 + i): byte for i, byte in enumerate(others)}
