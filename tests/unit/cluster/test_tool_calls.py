"""Calls in a model's output: what is found does not depend on how the text was split, and nothing else is lost."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cluster.tool_calls import PARSERS, Parsed, ParsedCall

NAMES = frozenset({"f", "get_weather"})
WEATHER = ParsedCall("get_weather", '{"city": "Ulm"}')
EMPTY = ParsedCall("f", "{}")

# What models write, right and wrong, and pieces of it.
FRAGMENTS = (
    "<tool_call>",
    "</tool_call>",
    "<tool_ca",
    "<",
    "[TOOL_CALLS]",
    "[TOOL_",
    "[ARGS]",
    "[",
    "]",
    ", ",
    "; ",
    ";",
    "<|python_tag|>",
    "<|py",
    "\n",
    "  ",
    "Let me look. ",
    "f",
    "get_weather",
    '{"name": "get_weather", "arguments": {"city": "Ulm"}}',
    '{"name": "f", "parameters": {}}',
    '{"name": "f"}',
    '{"name": "f", "arguments": "{\\"a\\": \\"</tool_call> {\\"}"}',
    '{"name": "nobody", "arguments": {}}',
    '{"name": ["f"], "arguments": 3}',
    '{"name": "f", "arguments": {"x": NaN}}',
    '{"answer": 42}',
    '{"city": "Ulm"}',
    '{"city": "U',
    "{",
    "}",
    '"',
    "\\",
)


def parse(kind: str, pieces: Sequence[str]) -> tuple[str, tuple[ParsedCall, ...], int]:
    """Text, calls and the number of malformed ones."""
    parser = PARSERS[kind](NAMES)
    found: list[Parsed] = []
    for piece in pieces:
        found += parser.push(piece)
    found += parser.flush()
    calls = tuple(call for parsed in found for call in parsed.calls)
    return "".join(parsed.text for parsed in found), calls, sum(parsed.num_malformed for parsed in found)


@settings(derandomize=True, deadline=None, max_examples=150)
@given(st.sampled_from(sorted(PARSERS)), st.lists(st.sampled_from(FRAGMENTS), max_size=9), st.data())
def test_how_the_text_is_split_makes_no_difference(kind: str, fragments: list[str], data: st.DataObject) -> None:
    text = "".join(fragments)
    cuts = sorted(data.draw(st.lists(st.integers(0, len(text)), max_size=12)))
    pieces = [text[start:end] for start, end in zip([0, *cuts], [*cuts, len(text)], strict=True)]
    whole = parse(kind, [text])
    assert parse(kind, pieces) == whole
    assert parse(kind, list(text)) == whole
    if not whole[1]:
        assert whole[0] == text, "without calls everything is text, as it was written"


@pytest.mark.parametrize(
    ("kind", "text", "expected"),
    [
        ("hermes", "Hello.", ("Hello.", (), 0)),
        (
            "hermes",
            'Sure.\n<tool_call>\n{"name": "get_weather", "arguments": {"city": "Ulm"}}\n</tool_call>\n',
            ("Sure.", (WEATHER,), 0),
        ),
        (
            "hermes",
            '<tool_call>{"name": "f", "arguments": {}}</tool_call>\n<tool_call>\n{"name": "get_weather", '
            '"arguments": {"city": "Ulm"}}',
            ("", (EMPTY, WEATHER), 0),
        ),
        ("hermes", '<tool_call>\n{"name": "f", "argu', ('<tool_call>\n{"name": "f", "argu', (), 1)),
        ("hermes", "<tool_call>\nnothing</tool_call>", ("<tool_call>\nnothing</tool_call>", (), 1)),
        (
            "hermes",
            'a <tool_call>{"name": "g", "arguments": {}}',
            ('a <tool_call>{"name": "g", "arguments": {}}', (), 1),
        ),
        ("llama3_json", '{"name": "get_weather", "parameters": {"city": "Ulm"}}', ("", (WEATHER,), 0)),
        (
            "llama3_json",
            '<|python_tag|>{"name": "f", "parameters": {}}; {"name": "get_weather", "parameters": {"city": "Ulm"}}',
            ("", (EMPTY, WEATHER), 0),
        ),
        ("llama3_json", '{"answer": 42}', ('{"answer": 42}', (), 0)),
        ("llama3_json", '{"name": "g", "parameters": {}}', ('{"name": "g", "parameters": {}}', (), 1)),
        ("llama3_json", 'I think {"name": "f"}', ('I think {"name": "f"}', (), 0)),
        (
            "mistral",
            '[TOOL_CALLS][{"name": "f", "arguments": {}}, {"name": "get_weather", "arguments": {"city": "Ulm"}}]',
            ("", (EMPTY, WEATHER), 0),
        ),
        (
            "mistral",
            'Ok[TOOL_CALLS]get_weather[ARGS]{"city": "Ulm"}[TOOL_CALLS]f{}',
            ("Ok", (WEATHER, EMPTY), 0),
        ),
        ("mistral", "[TOOL_CALLS]g{}", ("[TOOL_CALLS]g{}", (), 1)),
        ("mistral", "[TOOL_CALLS][]", ("[TOOL_CALLS][]", (), 1)),
    ],
)
def test_calls_are_found_and_the_rest_is_text(
    kind: str, text: str, expected: tuple[str, tuple[ParsedCall, ...], int]
) -> None:
    assert parse(kind, [text]) == expected


def test_text_that_can_be_no_call_is_not_held_back() -> None:
    parser = PARSERS["hermes"](NAMES)
    assert [parsed.text for parsed in parser.push("Hello <tool")] == ["Hello"]
    assert [parsed.text for parsed in parser.push("s> and")] == [" <tools> and"]
