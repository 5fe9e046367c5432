"""Grammars are checked in a process that can be ended: right, wrong, and one that never ends."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path

import pytest

from cluster.config import StructuredOutputConfig
from cluster.grammar_check import Finding, GrammarChecker
from core.errors import InvalidRequest
from core.grammar import Grammar, GrammarKind
from tests.unit.cluster import tiny_tokenizers
from tests.unit.cluster.scripted_router import MODEL

GOOD = Grammar(GrammarKind.REGEX, "[a-z]+")
# A few bytes that keep llguidance's compiler for minutes: its time grows with the divisor, 0.7 s for 99,991.
BOMB = Grammar(GrammarKind.JSON_SCHEMA, '{"type": "integer", "multipleOf": 9999991}')


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_tokenizers.save(tmp_path_factory.mktemp("model"))


@pytest.fixture
def found() -> list[Finding]:
    return []


@pytest.fixture
async def checker(folder: Path, found: list[Finding]) -> AsyncIterator[GrammarChecker]:
    config = StructuredOutputConfig(compile_timeout_s=1.0, max_bytes=1000)
    checker = GrammarChecker(folder, config, found.append)
    yield checker
    await checker.close()


async def refusal(checker: GrammarChecker, grammar: Grammar) -> str:
    with pytest.raises(InvalidRequest) as raised:
        await checker.check(grammar, MODEL)
    assert raised.value.field == "grammar"
    return raised.value.message


async def test_what_is_wrong_is_told_and_what_never_ends_is_ended(
    checker: GrammarChecker, found: list[Finding]
) -> None:
    await asyncio.gather(*(checker.check(GOOD, MODEL) for _ in range(3)))
    assert "Unimplemented keys" in await refusal(checker, Grammar(GrammarKind.JSON_SCHEMA, '{"not": {}}'))
    assert "regex parse error" in await refusal(checker, Grammar(GrammarKind.REGEX, "("))
    assert found == [Finding.COMPILED, Finding.REFUSED, Finding.REFUSED]

    assert "takes more than 1 s" in await refusal(checker, BOMB)
    assert "takes more than 1 s" in await refusal(checker, BOMB), "and nobody tries it again"
    await checker.check(replace(GOOD, text="[0-9]+"), MODEL)
    await checker.check(GOOD, MODEL)
    assert found[3:] == [Finding.TOO_COSTLY, Finding.KNOWN, Finding.COMPILED, Finding.KNOWN]


async def test_a_grammar_that_is_too_long_is_not_even_tried(checker: GrammarChecker, found: list[Finding]) -> None:
    assert "at most 1000" in await refusal(checker, Grammar(GrammarKind.REGEX, "a" * 1001))
    assert found == []


async def test_a_model_without_such_a_tokenizer_serves_none(tmp_path: Path, found: list[Finding]) -> None:
    checker = GrammarChecker(tmp_path, StructuredOutputConfig(), found.append)
    assert "has no tokenizer.json" in await refusal(checker, GOOD)
    assert found == [Finding.UNAVAILABLE]
    await checker.close()
