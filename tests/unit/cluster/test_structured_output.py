"""Fields about the form of an answer, as grammars; and the grammars as texts that obey them."""

from __future__ import annotations

import json
from typing import Any

import pytest

from cluster.structured_output import AskedFor, asked_for, of_choice, of_response_format, of_schema
from cluster.tools import MAX_TOOLS, Tool, ToolUse, format_of
from core.errors import InvalidRequest
from core.grammar import MAX_GRAMMAR_BYTES, Grammar, GrammarKind
from engine.grammar import Vocabulary
from tests.unit.cluster.tiny_tokenizers import byte_level

SCHEMA = {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"], "additionalProperties": False}
BY_SCHEMA = of_schema(SCHEMA, "x")
ANY_OBJECT = of_schema({"type": "object"}, "x")
CITY = {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}
WEATHER = Tool("get_weather", "Says it.", CITY, "tools[0].function")
NOTHING = Tool("f-2", "", None, "tools[1].function")


@pytest.fixture(scope="module")
def vocabulary() -> Vocabulary:
    return Vocabulary(byte_level().to_str(), 384, (0,))


def obeys(vocabulary: Vocabulary, grammar: Grammar, text: str) -> bool:
    """Could the whole answer be ``text``?"""
    matcher = vocabulary.compile(grammar).start()
    matcher.advance([*byte_level().encode(text).ids, 0])
    return not matcher.error


@pytest.mark.parametrize(
    ("body", "expected"),
    [
        ({}, None),
        ({"response_format": {"type": "text"}, "structured_outputs": None}, None),
        ({"response_format": {"type": "json_object"}}, AskedFor(ANY_OBJECT, "response_format")),
        (
            {
                "response_format": {
                    "type": "json_schema",
                    "json_schema": {"name": "n", "strict": True, "schema": SCHEMA},
                }
            },
            AskedFor(BY_SCHEMA, "response_format.json_schema.schema"),
        ),
        ({"structured_outputs": {"json": SCHEMA}}, AskedFor(BY_SCHEMA, "structured_outputs.json")),
        ({"guided_json": json.dumps(SCHEMA)}, AskedFor(BY_SCHEMA, "guided_json")),
        ({"structured_outputs": {"json_object": True}}, AskedFor(ANY_OBJECT, "structured_outputs.json_object")),
        (
            {"structured_outputs": {"regex": "a+", "disable_fallback": True}},
            AskedFor(Grammar(GrammarKind.REGEX, "a+"), "structured_outputs.regex"),
        ),
        ({"guided_grammar": "start: /a/"}, AskedFor(Grammar(GrammarKind.LARK, "start: /a/"), "guided_grammar")),
    ],
)
def test_what_a_body_asks_for(body: dict[str, object], expected: AskedFor | None) -> None:
    assert asked_for(body) == expected


@pytest.mark.parametrize(
    ("body", "field"),
    [
        ({"response_format": 3}, "response_format"),
        (
            {"response_format": {"type": "json_schema", "json_schema": {"schema": [1]}}},
            "response_format.json_schema.schema",
        ),
        ({"guided_json": "{"}, "guided_json"),
        ({"guided_choice": ["a", ""]}, "guided_choice"),
        ({"structured_outputs": {"json_object": False}}, "structured_outputs.json_object"),
        ({"structured_outputs": {"disable_any_whitespace": True}}, "structured_outputs.disable_any_whitespace"),
        ({"structured_outputs": {"xml": "a"}}, "structured_outputs.xml"),
        ({"structured_outputs": {}}, "structured_outputs"),
        ({"guided_regex": "x" * (MAX_GRAMMAR_BYTES + 1)}, "grammar"),
    ],
)
def test_what_is_wrong_is_named(body: dict[str, object], field: str) -> None:
    with pytest.raises(InvalidRequest) as raised:
        asked_for(body)
    assert raised.value.field == field


def test_responses_have_the_schema_without_a_wrapper() -> None:
    given = {"type": "json_schema", "name": "n", "schema": SCHEMA}
    assert of_response_format(given, "text.format", nested=False) == AskedFor(BY_SCHEMA, "text.format.schema")


@pytest.mark.parametrize(
    ("grammar", "right", "wrong"),
    [
        (
            BY_SCHEMA,
            ['{"a":1}', '{ "a": -1 }', '{\n    "a": 1\n}'],
            ['{"a":"x"}', "{}", '{"a":1}x', '{"a":1' + " " * 25 + "}"],
        ),
        (ANY_OBJECT, ["{}", '{"x": [1, {"y": null}], "ü": "\\n"}'], ["[]", "1"]),
        (of_choice(["yes", "no (maybe)", "a.b"], "x"), ["yes", "no (maybe)", "a.b"], ["", "aXb", "yesno"]),
        (Grammar(GrammarKind.REGEX, r"\d{3}-\d{4}"), ["123-4567"], ["12-4567"]),
        (Grammar(GrammarKind.LARK, 'start: N ("+" N)*\nN: /[0-9]+/'), ["1", "1+22"], ["1+"]),
    ],
)
def test_a_grammar_takes_what_is_right(
    vocabulary: Vocabulary, grammar: Grammar, right: list[str], wrong: list[str]
) -> None:
    assert [text for text in right if not obeys(vocabulary, grammar, text)] == []
    assert [text for text in wrong if obeys(vocabulary, grammar, text)] == []


# ---- tools ----

CALLS = {
    "<tool_call>": '<tool_call>\n{"name": "get_weather", "arguments": {"city": "Ulm"}}\n</tool_call>',
    "<|python_tag|>": '{"name": "get_weather", "parameters": {"city": "Ulm"}}',
    "[TOOL_CALLS]": '[TOOL_CALLS][{"name": "get_weather", "arguments": {"city": "Ulm"}}]',
    "[TOOL_CALLS] [ARGS]": '[TOOL_CALLS]get_weather[ARGS]{"city": "Ulm"}',
}
MORE = {
    "<tool_call>": '\n<tool_call>\n{"name": "f-2", "arguments": {}}\n</tool_call>',
    "<|python_tag|>": '; {"name": "f-2", "parameters": {}}',
    "[TOOL_CALLS] [ARGS]": "[TOOL_CALLS]f-2[ARGS]{}",
}


@pytest.mark.parametrize("template", CALLS)
def test_a_demanded_call_is_written_as_it_is_parsed(vocabulary: Vocabulary, template: str) -> None:
    calls_as = format_of("auto", template)
    assert calls_as is not None
    text, no_token = CALLS[template], lambda marker: None

    required = ToolUse((WEATHER, NOTHING), "required")
    grammar = calls_as.grammar(required, no_token)
    assert grammar is not None
    assert obeys(vocabulary, grammar, text)
    assert not obeys(vocabulary, grammar, text.replace("city", "town"))
    assert not obeys(vocabulary, grammar, "Hello")
    one = calls_as.grammar(ToolUse((WEATHER, NOTHING), "required", parallel=False), no_token)
    assert one is not None
    if template in MORE:
        assert obeys(vocabulary, grammar, text + MORE[template])
        assert not obeys(vocabulary, one, text + MORE[template])
    named = calls_as.grammar(ToolUse((WEATHER, NOTHING), named="f-2"), no_token)
    assert named is not None
    assert not obeys(vocabulary, named, text)
    assert calls_as.grammar(ToolUse((WEATHER,)), no_token) is None

    found = [*calls_as.parser(required).push(text), *calls_as.parser(required).flush()]
    assert [(call.name, json.loads(call.arguments)) for parsed in found for call in parsed.calls] == [
        ("get_weather", {"city": "Ulm"})
    ]


def test_a_marker_that_is_a_token_is_demanded_as_that_token() -> None:
    tokenizer = byte_level()
    tokenizer.add_tokens(["<tool_call>", "</tool_call>"])
    vocabulary = Vocabulary(tokenizer.to_str(), 384, (0,))
    calls_as = format_of("hermes", "")
    assert calls_as is not None
    grammar = calls_as.grammar(ToolUse((WEATHER,), "required"), tokenizer.token_to_id)
    assert grammar is not None
    matcher = vocabulary.compile(grammar).start()
    matcher.advance([*tokenizer.encode(CALLS["<tool_call>"]).ids, 0])
    assert matcher.error == ""


@pytest.mark.parametrize("parser", ["none", "auto"])
def test_a_model_whose_calls_are_not_known_has_no_format(parser: str) -> None:
    assert format_of(parser, "{{ tools }}") is None


def test_ids_of_calls_suit_the_models_template() -> None:
    hermes, mistral = format_of("hermes", ""), format_of("mistral", "")
    assert hermes is not None
    assert mistral is not None
    assert len({hermes.call_id() for _ in range(9)}) == 9
    assert all(len(mistral.call_id()) == 9 and mistral.call_id().isalnum() for _ in range(9))


@pytest.mark.parametrize(
    ("make", "field"),
    [
        (lambda: Tool("", "", None, "tools[0]"), "tools[0]"),
        (lambda: ToolUse((), "required"), "tools"),
        (lambda: ToolUse((WEATHER, WEATHER)), "tools"),
        (lambda: ToolUse((WEATHER,), named="g"), "tool_choice"),
        (lambda: ToolUse(tuple(Tool(f"f{i}", "", None, "x") for i in range(MAX_TOOLS + 1))), "tools"),
    ],
)
def test_wrong_tools_are_named(make: Any, field: str) -> None:
    with pytest.raises(InvalidRequest) as raised:
        make()
    assert raised.value.field == field
