"""What does a YAML file say, and at which line does it say it? Reading, and setting single keys over what was read.

Knows YAML and lines, not keys. A file that cannot be read, or that does not hold a mapping, raises ``InvalidConfig``
naming the file; ``YamlSource.errors`` puts file and line before the key of an ``InvalidConfig`` raised within it.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.resources.abc import Traversable
from pathlib import Path
from typing import Any

import yaml

from core.errors import InvalidConfig


@dataclass(frozen=True)
class YamlSource:
    """One file that was read.

    name: of the file, as the user gave it.
    values: what it says.
    lines: path of a key (``links.wan.gbps``, ``pools[0].gpus``) |-> its line, from 1.
    """

    name: str
    values: dict[str, Any]
    lines: Mapping[str, int]

    def where(self, key: str) -> str:
        """File and line of ``key``, or of the nearest section around it that the file has."""
        while key and key not in self.lines:
            key = key[: max(key.rfind("."), key.rfind("["), 0)]
        return f"{self.name}:{self.lines[key]}" if key else self.name

    @contextmanager
    def errors(self, section: str = "", overridden_keys: Sequence[str] = ()) -> Iterator[None]:
        """Name file and line in errors about keys of ``section``; a key that was set by an option has neither."""
        try:
            yield
        except InvalidConfig as error:
            if any(error.key == key or error.key.startswith((f"{key}.", f"{key}[")) for key in overridden_keys):
                raise InvalidConfig(f"--set {error.key}", error.message) from error
            path = f"{section}.{error.key}" if section else error.key
            raise InvalidConfig(f"{self.where(path)}: {path}", error.message) from error


def read_yaml(path: str | Path | Traversable) -> YamlSource:
    """The mapping that the file at ``path`` holds; ``InvalidConfig`` naming the file if there is none."""
    place = Path(path) if isinstance(path, str) else path
    try:
        text = place.read_text(encoding="utf-8")
        node = yaml.compose(text, _StrictLoader)
        values = yaml.load(text, _StrictLoader)
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise InvalidConfig(str(path), f"cannot be read: {error}") from error
    if not isinstance(values, dict):
        raise InvalidConfig(str(path), "must hold a mapping of keys to values")
    return YamlSource(str(path), values, dict(_lines(node, "")))


def _lines(node: yaml.Node | None, path: str) -> Iterator[tuple[str, int]]:
    if isinstance(node, yaml.MappingNode):
        for key, value in node.value:
            name = f"{path}.{key.value}" if path else str(key.value)
            yield name, key.start_mark.line + 1
            yield from _lines(value, name)
    elif isinstance(node, yaml.SequenceNode):
        for index, item in enumerate(node.value):
            yield f"{path}[{index}]", item.start_mark.line + 1
            yield from _lines(item, f"{path}[{index}]")


_BOOL = "tag:yaml.org,2002:bool"


class _StrictLoader(yaml.SafeLoader):
    """YAML without three of its traps: a key given twice is an error (plain YAML silently takes the last), and as in
    YAML 1.2 only ``true`` and ``false`` are booleans (``on`` and ``off`` are words, and modes of ours), and ``48e9`` is
    a number.
    """

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys = [key.value for key, _ in node.value]
        twice = next((key for key in keys if keys.count(key) > 1), None)
        if twice is not None:
            raise yaml.constructor.ConstructorError(None, None, f"key {twice!r} is given twice", node.start_mark)
        return super().construct_mapping(node, deep)


_StrictLoader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if tag != _BOOL]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_StrictLoader.add_implicit_resolver(_BOOL, re.compile("true|True|TRUE|false|False|FALSE"), list("tTfF"))
_StrictLoader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)[eE][-+]?[0-9]+$"), list("-+.0123456789")
)


def overridden(values: dict[str, Any], override: str) -> dict[str, Any]:
    """``values`` with one ``a.b[0].c=value`` put in; the value is YAML.

    Raises ``InvalidConfig`` naming the key.
    """
    key, separator, text = override.partition("=")
    if not separator or not key:
        raise InvalidConfig(override, "must be KEY=VALUE, for example engine.page_size=32")
    try:
        value = yaml.load(text, _StrictLoader)
    except yaml.YAMLError as error:
        raise InvalidConfig(key, f"has a value that is not YAML: {text!r}") from error
    placed: dict[str, Any] = _placed(values, _steps(key), value, key)
    return placed


_KEY = re.compile(r"[^.\[\]]+(\[\d+\]|\.[^.\[\]]+)*")


def _steps(key: str) -> tuple[str | int, ...]:
    """``a.b[0].c`` as ``a``, ``b``, 0, ``c``."""
    if not _KEY.fullmatch(key):
        raise InvalidConfig(key, "is not a key such as engine.page_size or kv_transfer.links[0].connections")
    found = re.findall(r"\[(\d+)\]|([^.\[\]]+)", key)
    return tuple(int(index) if index else name for index, name in found)


def _placed(section: Any, steps: Sequence[str | int], value: object, key: str) -> Any:
    """``section`` with ``value`` at the end of ``steps``; sections, and a list's next item, are made where missing."""
    if not steps:
        return value
    step, rest = steps[0], steps[1:]
    if isinstance(step, int):
        items = [] if section is None else section
        if not isinstance(items, list):
            raise InvalidConfig(key, f"has the index [{step}], but what it is an index of is not a list")
        if step > len(items):
            raise InvalidConfig(key, f"has the index [{step}], but the list has {len(items)} items")
        old = items[step] if step < len(items) else None
        return [*items[:step], _placed(old, rest, value, key), *items[step + 1 :]]
    named = {} if section is None else section
    if not isinstance(named, dict):
        raise InvalidConfig(key, f"has the part {step!r}, but what it is a part of is not a section")
    return named | {step: _placed(named.get(step), rest, value, key)}
