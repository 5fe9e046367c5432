"""Which tools may a model call, and in which words? The tools of a request, and the formats of models' calls.

A model's chat template shows how it was taught to call (``format_of``): its parser finds the calls in the output
(tool_calls.py). Where a call is demanded (``required``, or a function by name), a grammar makes every token obey the
format, the names and the schemas of the parameters; with ``auto`` the model is free, and what it writes is parsed.
Pure.
"""

from __future__ import annotations

import json
import secrets
import string
import uuid
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from cluster.structured_output import schema_text
from cluster.tool_calls import (
    HERMES_BEGIN,
    HERMES_END,
    LLAMA_BEGIN,
    MISTRAL_ARGUMENTS,
    MISTRAL_BEGIN,
    PARSERS,
    ToolCallParser,
)
from core.errors import InvalidRequest
from core.grammar import Grammar, GrammarKind

MAX_TOOLS = 128
MAX_CALLS = 32  # that a grammar lets a model make in one answer
AUTO, NONE, REQUIRED = TOOL_CHOICES = ("auto", "none", "required")
TOOL_CALL_PARSERS = (AUTO, *PARSERS, NONE)  # of the configuration
_NAME_CHARS = frozenset(string.ascii_letters + string.digits + "_-.:")
_MAX_NAME_CHARS = 64
_MAX_SHOWN_CHARS = 60  # of a client's value, in errors
_ANY_ARGUMENTS: Mapping[str, object] = {"type": "object"}

TokenOf = Callable[[str], int | None]  # the token that is exactly this marker, if the model has one


@dataclass(frozen=True, slots=True)
class Tool:
    """One function. ``path``: the client's name for the place where its parameters stand."""

    name: str
    description: str
    parameters: Mapping[str, object] | None
    path: str

    def __post_init__(self) -> None:
        ok = 0 < len(self.name) <= _MAX_NAME_CHARS and _NAME_CHARS.issuperset(self.name)
        if not ok:
            allowed = f"1 to {_MAX_NAME_CHARS} letters, digits, _, -, . and :"
            raise InvalidRequest(self.path, f"names of functions have {allowed}, got {self.name!r}")

    def as_template_gets_it(self) -> dict[str, object]:
        """The form that transformers' chat templates expect."""
        function = {"name": self.name, "description": self.description, "parameters": self.parameters or _ANY_ARGUMENTS}
        return {"type": "function", "function": function}

    @property
    def schema(self) -> Grammar:
        """What its arguments have to obey."""
        return Grammar(GrammarKind.JSON_SCHEMA, schema_text(self.parameters or _ANY_ARGUMENTS, self.path))


@dataclass(frozen=True, slots=True)
class ToolUse:
    """The tools of a request. ``choice``: auto, required, or ``named`` says which function; a request that says none
    has no ``ToolUse``. ``parallel``: more than one call in an answer."""

    tools: tuple[Tool, ...]
    choice: str = AUTO
    named: str | None = None
    parallel: bool = True
    field: str = "tools"
    choice_field: str = "tool_choice"

    def __post_init__(self) -> None:
        names = [tool.name for tool in self.tools]
        if not 0 < len(names) <= MAX_TOOLS:
            raise InvalidRequest(self.field, f"must hold 1 to {MAX_TOOLS} tools, got {len(names)}")
        twice = next((name for name in names if names.count(name) > 1), None)
        if twice is not None:
            raise InvalidRequest(self.field, f"two of them are called {twice!r}")
        if self.named is not None and self.named not in names:
            raise InvalidRequest(self.choice_field, f"names {self.named!r}, which is not one of {', '.join(names)}")

    @property
    def forced(self) -> tuple[Tool, ...]:
        """One of these has to be called; empty: none has to be."""
        if self.named is not None:
            return tuple(tool for tool in self.tools if tool.name == self.named)
        return self.tools if self.choice == REQUIRED else ()

    @property
    def names(self) -> frozenset[str]:
        return frozenset(tool.name for tool in self.tools)


@dataclass(frozen=True, slots=True)
class ToolFormat:
    """How a model calls. ``begin``: what a call begins with, if with anything. ``write``: Lark rules for a call."""

    name: str
    begin: str
    write: Callable[[Sequence[str], TokenOf, bool], str] = field(repr=False)
    long_ids: bool = True

    def parser(self, use: ToolUse) -> ToolCallParser:
        """For one sequence."""
        return PARSERS[self.name](use.names)

    def grammar(self, use: ToolUse, token_of: TokenOf) -> Grammar | None:
        """What the output has to obey; None: nothing."""
        if not use.forced:
            return None
        schemas = "\n".join(f"a{i}: %json {tool.schema.text}" for i, tool in enumerate(use.forced))
        return Grammar(
            GrammarKind.LARK,
            f"{self.write([tool.name for tool in use.forced], token_of, use.parallel)}\n{schemas}\n",
        )

    def call_id(self) -> str:
        """A new one, as the model's template takes them."""
        if self.long_ids:
            return f"call_{uuid.uuid4().hex[:24]}"
        return "".join(secrets.choice(string.ascii_letters + string.digits) for _ in range(9))


def tool_use(
    tools: Sequence[Tool],
    choice: str | None,
    parallel: bool | None,
    field: str = "tools",
    choice_field: str = "tool_choice",
) -> ToolUse | None:
    """What a request's tools ask for. ``choice``: auto, none, required, or ``=NAME`` for one of them; None: auto."""
    choice = choice or AUTO
    if not tools:
        if choice not in (AUTO, NONE):
            raise InvalidRequest(choice_field, "needs tools")
        return None
    if choice == NONE:
        return None
    named = choice.removeprefix("=") if choice.startswith("=") else None
    choice = AUTO if named is not None else choice
    return ToolUse(tuple(tools), choice, named, parallel is not False, field, choice_field)


def object_of(text: str, field: str) -> dict[str, object]:
    """The JSON object that a client wrote as text; ``InvalidRequest`` naming ``field`` if it is none."""
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        value = None
    if not isinstance(value, dict):
        raise InvalidRequest(field, f"must be the text of a JSON object, got {shortened(repr(text))}")
    return value


def shortened(text: str) -> str:
    """``text`` as errors show it."""
    return text if len(text) <= _MAX_SHOWN_CHARS else f"{text[: _MAX_SHOWN_CHARS - 3]}..."


def _hermes(names: Sequence[str], token_of: TokenOf, parallel: bool) -> str:
    begin, end = _marker(HERMES_BEGIN, token_of), _marker(HERMES_END, token_of)
    return "\n".join(
        (
            _start(r'"\n"', parallel),
            rf'call: {begin} "\n{{\"name\": " one "}}\n" {end}',
            _one(names, '", "arguments": '),
        )
    )


def _llama(names: Sequence[str], token_of: TokenOf, parallel: bool) -> str:
    return "\n".join((_start('"; "', parallel), r'call: "{\"name\": " one "}"', _one(names, '", "parameters": ')))


def _mistral(names: Sequence[str], token_of: TokenOf, parallel: bool) -> str:
    more = f' (", " call){{0,{MAX_CALLS - 1}}}' if parallel else ""
    return "\n".join(
        (
            f'start: {_marker(MISTRAL_BEGIN, token_of)} "[" call{more} "]"',
            r'call: "{\"name\": " one "}"',
            _one(names, '", "arguments": '),
        )
    )


def _mistral_by_name(names: Sequence[str], token_of: TokenOf, parallel: bool) -> str:
    arguments = _marker(MISTRAL_ARGUMENTS, token_of)
    each = " | ".join(f"{_literal(name)} {arguments} a{i}" for i, name in enumerate(names))
    times = f"{{1,{MAX_CALLS}}}" if parallel else ""
    return f"start: call{times}\ncall: {_marker(MISTRAL_BEGIN, token_of)} one\none: {each}"


def _start(between: str, parallel: bool) -> str:
    return f"start: call ({between} call){{0,{MAX_CALLS - 1}}}" if parallel else "start: call"


def _one(names: Sequence[str], before_arguments: str) -> str:
    """The name in its quotes and what stands between it and the arguments, for each function."""
    quoted = (_literal(f'"{name}{before_arguments}') for name in names)
    return "one: " + " | ".join(f"{text} a{i}" for i, text in enumerate(quoted))


def _literal(text: str) -> str:
    return json.dumps(text)


def _marker(marker: str, token_of: TokenOf) -> str:
    """The marker as its own token where the model has one: its letters are other tokens, which no model writes."""
    token_id = token_of(marker)
    return _literal(marker) if token_id is None else f"<[{token_id}]>"


_FORMATS = {
    "hermes": ToolFormat("hermes", HERMES_BEGIN, _hermes),
    "llama3_json": ToolFormat("llama3_json", "", _llama),
    "mistral": ToolFormat("mistral", MISTRAL_BEGIN, _mistral, long_ids=False),
}
_MISTRAL_BY_NAME = ToolFormat("mistral", MISTRAL_BEGIN, _mistral_by_name, long_ids=False)


def format_of(parser: str, template: str) -> ToolFormat | None:
    """That of the configuration's ``tool_call_parser``, for a model with this chat template; None: it calls no tools,
    or in a way that is not known here."""
    if parser == AUTO:
        parser = _guess(template)
    if parser == "mistral" and MISTRAL_ARGUMENTS in template:
        return _MISTRAL_BY_NAME
    return _FORMATS.get(parser)


def _guess(template: str) -> str:
    if HERMES_BEGIN in template:
        return "hermes"
    if MISTRAL_BEGIN in template:
        return "mistral"
    if LLAMA_BEGIN in template or ('"parameters"' in template and "<|start_header_id|>" in template):
        return "llama3_json"
    return NONE
