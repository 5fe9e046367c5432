"""Which grammar does a request ask for? The fields of each API about the form of an answer, as one ``Grammar``.

    OpenAI     response_format (chats), text.format (responses): json_object, json_schema
    vLLM       structured_outputs {json, json_object, regex, choice, grammar}, and its older guided_json, guided_regex,
               guided_choice, guided_grammar

At most one may be given. What a schema says is obeyed whether or not it is ``strict``; a keyword that cannot be
obeyed is refused when it is compiled. Pure: whether a grammar can be compiled is found by grammar_check.py.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass

from core.errors import InvalidRequest
from core.grammar import Grammar, GrammarKind

_TEXT = "text"
_FORMATS = (_TEXT, "json_object", "json_schema")
_KINDS = ("json", "json_object", "regex", "choice", "grammar")
_GUIDED = {f"guided_{kind}": kind for kind in ("json", "regex", "choice", "grammar")}
# vLLM's further options of structured_outputs |-> the values that ask for nothing; null always does
_OPTIONS = {
    "disable_fallback": (True, False),  # there is one compiler, and nothing to fall back to
    "disable_any_whitespace": (False,),
    "disable_additional_properties": (False,),
    "whitespace_pattern": (),
    "structural_tag": (),
}
# Whitespace between two parts of a JSON text: enough for indented ones; without a bound small models never end.
WHITESPACE = r"[ \t\n]{0,24}"


@dataclass(frozen=True, slots=True)
class AskedFor:
    """A grammar, and the client's name for the field that holds it."""

    grammar: Grammar
    field: str


FIELDS = frozenset({"response_format", "structured_outputs", *_GUIDED})


def asked_for(body: Mapping[str, object]) -> AskedFor | None:
    """What the fields ``FIELDS`` of a chat's or completion's body ask for; ``InvalidRequest`` naming one of them."""
    found = [
        asked
        for asked in (
            of_response_format(body.get("response_format"), "response_format", nested=True),
            _of_structured_outputs(body.get("structured_outputs")),
            *(_of_kind(kind, body.get(field), field) for field, kind in _GUIDED.items()),
        )
        if asked is not None
    ]
    if len(found) > 1:
        raise InvalidRequest(found[1].field, f"{found[0].field} says already what the answer has to look like")
    return found[0] if found else None


def of_response_format(value: object, field: str, *, nested: bool) -> AskedFor | None:
    """OpenAI's format object. ``nested``: a schema and its name are under ``json_schema``, as chats have it."""
    if value is None:
        return None
    asked = _object(value, field)
    kind = asked.get("type")
    if kind not in _FORMATS:
        raise InvalidRequest(f"{field}.type", f"must be one of {', '.join(_FORMATS)}, got {kind!r}")
    if kind == _TEXT:
        return None
    if kind == "json_object":
        return AskedFor(of_schema({"type": "object"}, field), field)
    if nested:
        field = f"{field}.json_schema"
        asked = _object(asked.get("json_schema"), field)
    if asked.get("schema") is None:
        raise InvalidRequest(f"{field}.schema", "is required")
    return AskedFor(of_schema(asked["schema"], f"{field}.schema"), f"{field}.schema")


def of_schema(value: object, field: str) -> Grammar:
    """A JSON Schema, as an object or as text."""
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except (ValueError, RecursionError) as error:
            raise InvalidRequest(field, f"must be a JSON Schema: {error}") from error
    if not isinstance(value, dict):
        raise InvalidRequest(field, f"must be a JSON Schema, an object, got {type(value).__name__}")
    return Grammar(GrammarKind.JSON_SCHEMA, schema_text(value, field))


def schema_text(schema: Mapping[str, object], field: str) -> str:
    """As text, with what we add."""
    try:
        return json.dumps({"x-guidance": {"whitespace_pattern": WHITESPACE}, **schema}, ensure_ascii=False)
    except (ValueError, RecursionError) as error:
        raise InvalidRequest(field, f"must be a JSON Schema: {error}") from error


def of_regex(value: object, field: str) -> Grammar:
    """A regular expression that the whole answer matches."""
    if not isinstance(value, str) or not value:
        raise InvalidRequest(field, "must be a regular expression, a string that is not empty")
    return Grammar(GrammarKind.REGEX, value)


def of_choice(value: object, field: str) -> Grammar:
    """One of several answers."""
    if not isinstance(value, list) or not value or not all(isinstance(item, str) and item for item in value):
        raise InvalidRequest(field, "must be a list of strings, at least one and none empty")
    return Grammar(GrammarKind.REGEX, "|".join(f"({re.escape(item)})" for item in value))


def of_lark(value: object, field: str) -> Grammar:
    """A context-free grammar."""
    if not isinstance(value, str) or not value:
        raise InvalidRequest(field, "must be a grammar in Lark's notation, a string that is not empty")
    return Grammar(GrammarKind.LARK, value)


def _of_structured_outputs(value: object) -> AskedFor | None:
    if value is None:
        return None
    asked = {name: given for name, given in _object(value, "structured_outputs").items() if given is not None}
    for name, given in asked.items():
        if name in _OPTIONS and given not in _OPTIONS[name]:
            raise InvalidRequest(f"structured_outputs.{name}", "is not supported; leave it out")
        if name not in _OPTIONS and name not in _KINDS:
            raise InvalidRequest(f"structured_outputs.{name}", f"must be one of {', '.join(_KINDS)}")
    kinds = [name for name in asked if name in _KINDS]
    if len(kinds) != 1:
        raise InvalidRequest("structured_outputs", f"must hold one of {', '.join(_KINDS)}, got {len(kinds)}")
    return _of_kind(kinds[0], asked[kinds[0]], f"structured_outputs.{kinds[0]}")


def _of_kind(kind: str, value: object, field: str) -> AskedFor | None:
    if value is None:
        return None
    if kind == "json_object":
        if value is not True:
            raise InvalidRequest(field, "must be true, or left out")
        return AskedFor(of_schema({"type": "object"}, field), field)
    make = {"json": of_schema, "regex": of_regex, "choice": of_choice, "grammar": of_lark}[kind]
    return AskedFor(make(value, field), field)


def _object(value: object, field: str) -> dict[str, object]:
    if not isinstance(value, dict):
        raise InvalidRequest(field, f"must be an object, got {type(value).__name__}")
    return value
