"""Where in a model's output are calls of tools? Parsers of the formats that models were taught, for text that streams.

    hermes         <tool_call>\\n{"name": "f", "arguments": {...}}\\n</tool_call>, any number of them (Qwen, Hermes)
    llama3_json    {"name": "f", "parameters": {...}}, the whole output; more of them after "; " (Llama 3.1 and later)
    mistral        [TOOL_CALLS][{"name": "f", "arguments": {...}}, ...], or, newer, [TOOL_CALLS]f[ARGS]{...} for each

A parser decides only what no later text can change: how the text is split into pieces makes no difference, neither to
the calls nor to the text around them. So text that may be the beginning of a call is held back, and a call is given as
a whole, when its JSON was read to the end and names a tool that was offered. What looks like a call and is none comes
back as text, as the model wrote it. Pure.
"""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Protocol

HERMES_BEGIN, HERMES_END = "<tool_call>", "</tool_call>"
LLAMA_BEGIN = "<|python_tag|>"
MISTRAL_BEGIN, MISTRAL_ARGUMENTS = "[TOOL_CALLS]", "[ARGS]"
_NAME = re.compile(r"[A-Za-z0-9_.:-]{1,128}")
_SPACE = " \t\r\n"


@dataclass(frozen=True, slots=True)
class ParsedCall:
    """One call. ``arguments``: JSON text of an object."""

    name: str
    arguments: str


@dataclass(frozen=True, slots=True)
class Parsed:
    """What is decided: the text comes before the calls."""

    text: str = ""
    calls: tuple[ParsedCall, ...] = ()
    num_malformed: int = 0


class ToolCallParser(Protocol):
    """The output of one sequence, piece by piece."""

    def push(self, text: str) -> tuple[Parsed, ...]:
        """Take more of it; what is decided now, in order."""
        ...

    def flush(self) -> tuple[Parsed, ...]:
        """There is no more: what was held back."""
        ...


class _Parser:
    """The loop that parsers share. ``_next`` looks at what is left and takes something off it, or wants more."""

    def __init__(self, names: Collection[str]) -> None:
        """``names``: of the tools that were offered."""
        self._names = names
        self._rest = ""
        self._ended = False
        self._value = _JsonValue()  # that is being read, at the beginning of ``_rest``
        self._num_calls = 0
        self._space = ""  # taken off the end of the text before a marker: part of it, if no call follows

    def push(self, text: str) -> tuple[Parsed, ...]:
        self._rest += text
        return self._decide()

    def flush(self) -> tuple[Parsed, ...]:
        self._ended = True
        return self._decide()

    def _decide(self) -> tuple[Parsed, ...]:
        found: list[Parsed] = []
        while (step := self._next()) is not None:
            if step.text or step.calls or step.num_malformed:
                found.append(step)
                self._num_calls += len(step.calls)
        return tuple(found)

    def _next(self) -> Parsed | None:
        raise NotImplementedError

    def _take(self, num_chars: int) -> str:
        taken, self._rest = self._rest[:num_chars], self._rest[num_chars:]
        self._value = _JsonValue()
        return taken

    def _text_until(self, marker: str) -> Parsed | None:
        """Text before ``marker``, or what can be no part of it; None: it is next, or more is wanted.

        Spaces are held back: those before a call, and those at the end if there was one, are not part of the text.
        """
        index = self._rest.find(marker)
        if index == 0:
            return None
        if index > 0:
            before = self._take(index)
            text = before.rstrip(_SPACE)
            self._space = before[len(text) :]
            return Parsed(text)
        if self._ended:
            text = self._take(len(self._rest))
            return Parsed(text if text.strip(_SPACE) or not self._num_calls else "") if text else None
        longest = min(len(marker) - 1, len(self._rest))
        num_held = next(n for n in range(longest, -1, -1) if self._rest.endswith(marker[:n]))
        num_shown = len(self._rest[: len(self._rest) - num_held].rstrip(_SPACE))
        return Parsed(self._take(num_shown)) if num_shown else None

    def _no_call(self, num_chars: int) -> Parsed:
        """So much of what is left looked like the beginning of a call, and is text."""
        space, self._space = self._space, ""
        return Parsed(space + self._take(num_chars), num_malformed=1)

    def _calls(self, calls: tuple[ParsedCall, ...], num_chars: int) -> Parsed:
        """So much of what is left is calls."""
        self._space = ""
        self._take(num_chars)
        return Parsed(calls=calls)

    def _call(self, value: object, keys: Collection[str]) -> ParsedCall | None:
        """``value`` as a call, if it is one."""
        if not isinstance(value, dict):
            return None
        name: object = value.get("name")
        arguments: object = next((value[key] for key in keys if key in value), {})
        if isinstance(arguments, str):
            arguments = _loaded(arguments)
        if not isinstance(name, str) or name not in self._names or not isinstance(arguments, dict):
            return None
        return ParsedCall(name, json.dumps(arguments, ensure_ascii=False))


class HermesParser(_Parser):
    """``<tool_call>`` around each call."""

    def _next(self) -> Parsed | None:
        if not self._rest.startswith(HERMES_BEGIN):
            return self._text_until(HERMES_BEGIN)
        begin = len(HERMES_BEGIN)
        start = _after_space(self._rest, begin)
        end = self._value.end(self._rest, start)
        if end is None:
            return self._unfinished(start < len(self._rest) and self._rest[start] != "{")
        rest = _after_space(self._rest, end)
        whole = rest + len(HERMES_END)
        if not self._ended and len(self._rest) < whole and HERMES_END.startswith(self._rest[rest:]):
            return None
        call = self._call(_loaded(self._rest[start:end]), ("arguments", "parameters"))
        if call is None:
            return self._unfinished(True)
        return self._calls((call,), whole if self._rest.startswith(HERMES_END, rest) else end)

    def _unfinished(self, hopeless: bool) -> Parsed | None:
        """It is not a call, or not yet: the marker was text, and what follows it is looked at anew."""
        if hopeless:
            return self._no_call(len(HERMES_BEGIN))
        return self._no_call(len(self._rest)) if self._ended else None


class LlamaParser(_Parser):
    """The whole output is calls, or none of it is."""

    def __init__(self, names: Collection[str]) -> None:
        super().__init__(names)
        self._is_text = False  # from here on

    def _next(self) -> Parsed | None:
        if not self._rest:
            return None
        if self._is_text:
            return Parsed(self._take(len(self._rest)))
        start = _after_space(self._rest, 0)
        if self._num_calls:
            if self._rest.startswith(";", start):
                start = _after_space(self._rest, start + 1)
        else:
            marker = self._rest[start : start + len(LLAMA_BEGIN)]
            if marker == LLAMA_BEGIN:
                start = _after_space(self._rest, start + len(LLAMA_BEGIN))
            elif LLAMA_BEGIN.startswith(marker) and not self._ended:
                return None
        if start == len(self._rest):
            # Spaces and separators after calls are nothing; alone they are what the model wrote.
            return self._give_up(0) if self._ended and not self._num_calls else None
        if self._rest[start] != "{":
            return self._give_up(0)
        end = self._value.end(self._rest, start)
        if end is None:
            return self._give_up(1) if self._ended else None
        value = _loaded(self._rest[start:end])
        call = self._call(value, ("parameters", "arguments"))
        if call is None:
            return self._give_up(int(not isinstance(value, dict) or "name" in value))
        return self._calls((call,), end)

    def _give_up(self, num_malformed: int) -> Parsed:
        self._is_text = True
        return Parsed(self._take(len(self._rest)), num_malformed=num_malformed)


class MistralParser(_Parser):
    """``[TOOL_CALLS]``, then a list of calls, or a name and its arguments."""

    def _next(self) -> Parsed | None:
        if not self._rest.startswith(MISTRAL_BEGIN):
            return self._text_until(MISTRAL_BEGIN)
        start = _after_space(self._rest, len(MISTRAL_BEGIN))
        if start == len(self._rest):
            return self._unfinished(False)
        if self._rest[start] == "[":
            return self._list(start)
        name = _NAME.match(self._rest, start)
        if name is None:
            return self._unfinished(True)
        begin = name.end()
        if begin == len(self._rest):
            return self._unfinished(False)
        if self._rest[begin] == "[":
            said = self._rest[begin : begin + len(MISTRAL_ARGUMENTS)]
            if not MISTRAL_ARGUMENTS.startswith(said):
                return self._unfinished(True)
            if len(said) < len(MISTRAL_ARGUMENTS):
                return self._unfinished(False)
            begin += len(MISTRAL_ARGUMENTS)
        begin = _after_space(self._rest, begin)
        if begin < len(self._rest) and self._rest[begin] != "{":
            return self._unfinished(True)
        end = self._value.end(self._rest, begin)
        if end is None:
            return self._unfinished(False)
        call = self._call({"name": name.group(), "arguments": _loaded(self._rest[begin:end])}, ("arguments",))
        return self._unfinished(True) if call is None else self._calls((call,), end)

    def _list(self, start: int) -> Parsed | None:
        end = self._value.end(self._rest, start)
        if end is None:
            return self._unfinished(False)
        values = _loaded(self._rest[start:end])
        calls = [self._call(value, ("arguments", "parameters")) for value in values] if isinstance(values, list) else []
        known = tuple(call for call in calls if call is not None)
        return self._calls(known, end) if known and len(known) == len(calls) else self._unfinished(True)

    def _unfinished(self, hopeless: bool) -> Parsed | None:
        if hopeless:
            return self._no_call(len(MISTRAL_BEGIN))
        return self._no_call(len(self._rest)) if self._ended else None


class _JsonValue:
    """Where does an object or a list end? Reads on from where it stopped: a long call costs no more for its pieces."""

    def __init__(self) -> None:
        self._position = -1  # of the first character that was not looked at; -1: none was
        self._depth = 0
        self._in_string = False
        self._escaped = False

    def end(self, text: str, start: int) -> int | None:
        """The index after it, in ``text``, which begins as it did at the last call; None: it goes on."""
        for index in range(start if self._position < 0 else self._position, len(text)):
            char = text[index]
            if self._escaped:
                self._escaped = False
            elif self._in_string:
                self._escaped = char == "\\"
                self._in_string = char != '"'
            elif char == '"':
                self._in_string = True
            elif char in "{[":
                self._depth += 1
            elif char in "}]":
                self._depth -= 1
                if self._depth <= 0:
                    self._position = index
                    return index + 1
        self._position = len(text)
        return None


def _after_space(text: str, start: int) -> int:
    while start < len(text) and text[start] in _SPACE:
        start += 1
    return start


def _loaded(text: str) -> object:
    """JSON; None if it is none."""

    def refuse(constant: str) -> object:
        raise ValueError(f"{constant} is not JSON")

    try:
        value: object = json.loads(text, parse_constant=refuse)
    except (ValueError, RecursionError):
        return None
    return value


PARSERS: Mapping[str, type[HermesParser] | type[LlamaParser] | type[MistralParser]] = {
    "hermes": HermesParser,
    "llama3_json": LlamaParser,
    "mistral": MistralParser,
}
