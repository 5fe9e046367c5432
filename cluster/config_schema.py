"""How does a mapping from a YAML file become a frozen dataclass, and how are its keys described to people and tools?

Knows dataclasses, not keys: types come from the annotations (a list is ``tuple[X, ...]``), defaults from the fields,
meanings from the class docstrings, in which an entry begins with ``name:`` (or ``name, name:``) and ends at the next
entry or an empty line. A wrong mapping raises ``InvalidConfig`` with the path of the key (``links[0].dial``), what was
allowed and, for a misspelt key, the nearest one. Ranges are checked where the keys are declared, in each class's
``__post_init__``.
"""

from __future__ import annotations

import difflib
import json
import math
import re
import types
import typing
from collections.abc import Collection, Iterator, Mapping
from dataclasses import MISSING, Field, dataclass, fields, is_dataclass
from typing import Any, TypeVar

from core.errors import InvalidConfig

T = TypeVar("T")

# (class, key) |-> the values that are allowed, for keys that are one of a few words
Choices = Mapping[tuple[type[Any], str], Collection[str]]


@dataclass(frozen=True)
class _Scalar:
    """What a plain value must be, in the words of an error message and of JSON schema."""

    words: str
    json_type: str
    accepted: tuple[type[Any], ...]


_SCALARS: Mapping[object, _Scalar] = {
    bool: _Scalar("true or false", "boolean", (bool,)),
    int: _Scalar("an integer", "integer", (int,)),
    float: _Scalar("a number", "number", (int, float)),
    str: _Scalar("text", "string", (str,)),
}


def read(cls: type[T], values: Mapping[str, object], choices: Choices, path: str = "") -> T:
    """``cls`` built from ``values``; missing keys take their defaults."""
    checked = read_values(cls, values, choices, path)
    for field in fields(cls):  # type: ignore[arg-type]
        if field.name not in checked and _required(field):
            raise InvalidConfig(_join(path, field.name), "is required")
    try:
        return cls(**checked)
    except InvalidConfig as error:
        if not path or error.key.startswith(f"{path}."):
            raise
        raise InvalidConfig(_join(path, error.key), error.message) from error


def read_values(cls: type[Any], values: Mapping[str, object], choices: Choices, path: str) -> dict[str, Any]:
    """The given keys of ``cls`` with checked values; nothing is filled in."""
    hints = typing.get_type_hints(cls)
    names = [field.name for field in fields(cls)]
    checked = {}
    for name, value in values.items():
        key = _join(path, str(name))
        if name not in names:
            raise InvalidConfig(key, f"is not a key{_nearest(str(name), names)}; allowed here: {', '.join(names)}")
        checked[name] = _read_value(hints[name], value, key, choices)
        allowed = choices.get((cls, name))
        if allowed is not None:
            _require_words(checked[name], key, allowed)
    return checked


def json_schema(cls: type[Any], choices: Choices) -> dict[str, object]:
    """A JSON schema (2020-12) of ``cls``: types, defaults, words allowed and meanings."""
    meanings = _meanings(cls)
    hints = typing.get_type_hints(cls)
    properties: dict[str, object] = {}
    for field in fields(cls):
        schema = _type_schema(hints[field.name], choices)
        if (cls, field.name) in choices:
            optional = [None] if isinstance(schema["type"], list) else []
            schema.get("items", schema)["enum"] = [*choices[cls, field.name], *optional]
        if not is_dataclass(hints[field.name]) and not _required(field):
            schema["default"] = _default(field)
        properties[field.name] = schema | ({"description": meanings[field.name]} if field.name in meanings else {})
    required = [field.name for field in fields(cls) if _required(field)]
    return {
        "type": "object",
        "description": _summary(cls),
        "properties": properties,
        "additionalProperties": False,
        **({"required": required} if required else {}),
    }


def document(cls: type[Any], choices: Choices, title: str) -> str:
    """A Markdown page with one table per section: every key, its type, default and meaning."""
    seen: dict[type[Any], str] = {}
    sections = [_section(path, section, choices, seen) for path, section in _sections(cls, "")]
    return f"# {title}\n\n" + "\n".join(sections)


def _read_value(hint: Any, value: object, key: str, choices: Choices) -> Any:
    if isinstance(hint, types.UnionType):
        options = [option for option in hint.__args__ if option is not type(None)]
        assert len(options) == 1, "a key is of one type, or absent"
        return None if value is None else _read_value(options[0], value, key, choices)
    if is_dataclass(hint):
        return read(typing.cast(type[Any], hint), _mapping(value, key), choices, key)
    if typing.get_origin(hint) is dict:
        _, item = typing.get_args(hint)
        return {name: _read_value(item, v, _join(key, name), choices) for name, v in _mapping(value, key).items()}
    if typing.get_origin(hint) is tuple:
        if not isinstance(value, list):
            raise InvalidConfig(key, f"must be a list, got {value!r}")
        item = _item(hint)
        return tuple(_read_value(item, v, f"{key}[{index}]", choices) for index, v in enumerate(value))
    if hint is object:
        return value
    scalar = _SCALARS[hint]
    if not isinstance(value, scalar.accepted) or (isinstance(value, bool) and hint is not bool):
        raise InvalidConfig(key, f"must be {scalar.words}, got {value!r}")
    if isinstance(value, float) and not math.isfinite(value):
        raise InvalidConfig(key, f"must be finite, got {value!r}")
    return float(value) if isinstance(value, int) and hint is float else value


def _item(hint: Any) -> Any:
    """What a list is a list of: ``tuple[X, ...]`` is the only kind of list."""
    item, rest = typing.get_args(hint)
    assert rest is Ellipsis, "a list has any number of items"
    return item


def _require_words(value: object, key: str, allowed: Collection[str]) -> None:
    """``value``, or each item of a list, is one of the allowed words; null is allowed where the type allows it."""
    for word, at in _named(value, key):
        if word is not None and word not in allowed:
            raise InvalidConfig(at, f"must be one of {', '.join(allowed)}, got {word!r}")


def _named(value: object, key: str) -> Iterator[tuple[object, str]]:
    if isinstance(value, tuple):
        yield from ((item, f"{key}[{index}]") for index, item in enumerate(value))
    else:
        yield value, key


def _mapping(value: object, key: str) -> Mapping[str, object]:
    if value is None:  # a section whose keys are all commented out
        return {}
    if not isinstance(value, dict) or not all(isinstance(name, str) for name in value):
        raise InvalidConfig(key, f"must be a mapping of keys to values, got {value!r}")
    return value


def _join(path: str, name: str) -> str:
    return f"{path}.{name}" if path else name


def _nearest(name: str, names: list[str]) -> str:
    near = difflib.get_close_matches(name, names, n=1)
    return f", did you mean {near[0]}?" if near else ""


def _required(field: Field[Any]) -> bool:
    return field.default is MISSING and field.default_factory is MISSING


def _default(field: Field[Any]) -> object:
    """As YAML and JSON write it."""
    value = field.default if field.default_factory is MISSING else field.default_factory()
    return list(value) if isinstance(value, tuple) else value


def _type_schema(hint: Any, choices: Choices) -> dict[str, Any]:
    if isinstance(hint, types.UnionType):
        inner = _type_schema(next(option for option in hint.__args__ if option is not type(None)), choices)
        return inner | {"type": [inner["type"], "null"]}
    if is_dataclass(hint):
        return json_schema(typing.cast(type[Any], hint), choices)
    if typing.get_origin(hint) is dict:
        item = typing.get_args(hint)[1]
        return {"type": "object", "additionalProperties": True if item is object else _type_schema(item, choices)}
    if typing.get_origin(hint) is tuple:
        return {"type": "array", "items": _type_schema(_item(hint), choices)}
    return {"type": _SCALARS[hint].json_type}


def _type_words(hint: Any, allowed: Collection[str] | None) -> str:
    if isinstance(hint, types.UnionType):
        inner = next(option for option in hint.__args__ if option is not type(None))
        return f"{_type_words(inner, allowed)} or null"
    if typing.get_origin(hint) is tuple:
        item = _item(hint)
        return "list of mappings" if is_dataclass(item) else f"list of {_type_words(item, allowed)}"
    if allowed is not None:
        return ", ".join(f"`{word}`" for word in allowed)
    if typing.get_origin(hint) is dict:
        item = typing.get_args(hint)[1]
        return "mapping" if item is object else f"mapping to {_SCALARS[item].json_type}"
    return _SCALARS[hint].json_type


def _sections(cls: type[Any], path: str) -> Iterator[tuple[str, type[Any]]]:
    yield path, cls
    hints = typing.get_type_hints(cls)
    for field in fields(cls):
        hint, key = hints[field.name], _join(path, field.name)
        if typing.get_origin(hint) is tuple:
            hint, key = _item(hint), f"{key}[]"
        if is_dataclass(hint):
            yield from _sections(typing.cast(type[Any], hint), key)


def _section(path: str, cls: type[Any], choices: Choices, seen: dict[type[Any], str]) -> str:
    heading = f"## `{path}`\n\n" if path else ""
    if cls in seen:
        return f"{heading}The same keys as `{seen[cls]}`.\n"
    seen[cls] = path
    meanings, hints = _meanings(cls), typing.get_type_hints(cls)
    lines = [f"{heading}{_summary(cls)}\n", "| key | type | default | meaning |", "|---|---|---|---|"]
    for field in fields(cls):
        if is_dataclass(hints[field.name]):
            continue
        kind = _type_words(hints[field.name], choices.get((cls, field.name)))
        default = "required" if _required(field) else f"`{json.dumps(_default(field))}`"
        lines.append(f"| `{_join(path, field.name)}` | {kind} | {default} | {meanings.get(field.name, '')} |")
    return "\n".join(lines) + "\n"


def _summary(cls: type[Any]) -> str:
    """The docstring up to its first entry."""
    return " ".join(line for names, line in _entries(cls) if not names)


def _meanings(cls: type[Any]) -> dict[str, str]:
    """Key |-> meaning, from the docstring's entries."""
    meanings: dict[str, str] = {}
    for names, line in _entries(cls):
        for name in names:
            meanings[name] = f"{meanings[name]} {line}" if name in meanings else line
    return {name: text[0].upper() + text[1:] for name, text in meanings.items()}


def _entries(cls: type[Any]) -> Iterator[tuple[tuple[str, ...], str]]:
    """The docstring's lines, each with the keys that it speaks of (none: it is part of the summary)."""
    names = {field.name for field in fields(cls)}
    current: tuple[str, ...] = ()
    for line in (cls.__doc__ or "").splitlines():
        text = line.strip()
        head, separator, rest = text.partition(": ")
        listed = tuple(re.split(r", ", head))
        if separator and names.issuperset(listed):
            current, text = listed, rest
        elif not text:
            current = ()
            continue
        yield current, text
