"""Grammars against tokens, and masks of a step: followed token by token, made anew when need be, given up when slow."""

from __future__ import annotations

import sys
import threading
from array import array
from collections.abc import Sequence

import numpy as np
import pytest

from core.clock import WallClock
from core.errors import InvalidRequest
from core.grammar import Grammar, GrammarKind
from core.request import SamplingParams, SequenceId
from engine.grammar import CompiledGrammar, GrammarCompiler, Mask, Vocabulary
from engine.step_plan import StepItem
from engine.token_masks import Masks, TokenMasks
from tests.unit.cluster.tiny_tokenizers import byte_level

TOKENIZER = byte_level()
EOS, END_OF_TURN = 0, 2
WORD = Grammar(GrammarKind.REGEX, "ab+")


@pytest.fixture(scope="module")
def vocabulary() -> Vocabulary:
    return Vocabulary(TOKENIZER.to_str(), 384, (EOS, END_OF_TURN))


@pytest.fixture
def compiler(vocabulary: Vocabulary) -> GrammarCompiler:
    return GrammarCompiler(vocabulary, num_kept=2)


def ids(text: str) -> list[int]:
    return [TOKENIZER.token_to_id(char) for char in text]


def allowed(mask: Mask) -> set[int]:
    return set(np.flatnonzero(np.unpackbits(mask.view(np.uint8), bitorder="little")).tolist())


def next_after(compiled: CompiledGrammar, text: str) -> set[int]:
    matcher, mask = compiled.start(), np.zeros(384 // 32, np.int32)
    matcher.advance(ids(text))
    matcher.fill(mask)
    assert not matcher.error
    return allowed(mask)


def test_what_may_come_next_follows_the_output(vocabulary: Vocabulary) -> None:
    compiled = vocabulary.compile(WORD)
    assert next_after(compiled, "") == set(ids("a"))
    assert next_after(compiled, "a") == set(ids("b"))
    assert next_after(compiled, "ab") == {*ids("b"), EOS, END_OF_TURN}
    assert next_after(vocabulary.compile(Grammar(GrammarKind.REGEX, "ab")), "ab") == {EOS, END_OF_TURN}


def test_an_output_that_the_grammar_forbids_is_an_error_that_stays(vocabulary: Vocabulary) -> None:
    matcher = vocabulary.compile(WORD).start()
    matcher.advance(ids("ax"))
    assert "doesn't satisfy the grammar" in matcher.error
    first = matcher.error
    matcher.advance(ids("b"))
    assert (matcher.error, matcher.num_tokens) == (first, 2)


@pytest.mark.parametrize(
    ("grammar", "said"),
    [
        (Grammar(GrammarKind.REGEX, "("), "regex parse error"),
        (Grammar(GrammarKind.JSON_SCHEMA, "{"), "expected"),
        (Grammar(GrammarKind.JSON_SCHEMA, '{"uniqueItems": true}'), "uniqueItems"),
        (Grammar(GrammarKind.LARK, "start: x"), 'unknown name: "x"'),
    ],
)
def test_what_does_not_compile_says_why(compiler: GrammarCompiler, grammar: Grammar, said: str) -> None:
    with pytest.raises(InvalidRequest, match=said) as raised:
        compiler.compile(grammar).result()
    assert raised.value.field == "grammar"


def test_a_grammar_is_compiled_once_while_somebody_needs_it(compiler: GrammarCompiler) -> None:
    held = compiler.compile(WORD).result()
    for other in "xyz":  # more than are kept for nobody
        compiler.compile(Grammar(GrammarKind.REGEX, other)).result()
    assert compiler.compile(WORD).result() is held
    assert compiler.compile(Grammar(GrammarKind.REGEX, "z")).result() is not held


def test_without_the_library_or_an_end_there_are_no_grammars(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(InvalidRequest, match="no end-of-sequence token"):
        Vocabulary(TOKENIZER.to_str(), 384, ())
    monkeypatch.setitem(sys.modules, "llguidance", None)
    with pytest.raises(InvalidRequest, match=r"pip install 'prfaas\[structured\]'"):
        Vocabulary(TOKENIZER.to_str(), 384, (EOS,))


# ---- masks of a step ----


def item(name: str, output: Sequence[int], grammar: Grammar | None = WORD, pending_row: int | None = None) -> StepItem:
    known = array("q", [5, *output])
    sampling = SamplingParams(seed=1, grammar=grammar)
    return StepItem(SequenceId(name), (known[-1],), len(known) - 1, (0,), True, sampling, known, 1, pending_row)


def nothing_pending() -> list[int]:
    raise AssertionError("no token is awaited")


def by_row(masks: Masks | None) -> dict[int, set[int]]:
    assert masks is not None
    assert not masks.failed
    return {row: allowed(bits) for row, bits in zip(masks.rows, masks.bits, strict=True)}


def test_a_step_without_grammars_has_no_masks(compiler: GrammarCompiler) -> None:
    assert TokenMasks(compiler, 8, WallClock()).masks([item("a", ids("x"), None)], nothing_pending) is None


def test_rows_with_a_grammar_are_followed_and_made_anew_when_forgotten(compiler: GrammarCompiler) -> None:
    masks = TokenMasks(compiler, 2, WallClock())
    for _ in range(3):
        step = [item("a", ids("")), item("free", ids("xyz"), None), item("b", ids("ab"))]
        assert by_row(masks.masks(step, nothing_pending)) == {0: set(ids("a")), 2: {*ids("b"), EOS, END_OF_TURN}}
        later = [item("a", ids("a")), *(item(f"c{i}", ids("abb")) for i in range(3)), item("b", ids("abbb"))]
        found = by_row(masks.masks(later, nothing_pending))
        assert found[0] == set(ids("b"))
        assert found[4] == found[1] == {*ids("b"), EOS, END_OF_TURN}
        # Preempted, or known from another worker: what it has matched is in its output alone.


def test_a_token_that_is_still_being_sampled_is_waited_for(compiler: GrammarCompiler) -> None:
    masks = TokenMasks(compiler, 8, WallClock())
    masks.masks([item("a", ids("a"))], nothing_pending)
    ahead = [item("new", ids(""), None), item("a", ids("a"), pending_row=1)]
    assert by_row(masks.masks(ahead, lambda: [99, *ids("b")])) == {1: {*ids("b"), EOS, END_OF_TURN}}
    assert by_row(masks.masks([item("a", ids("abb"))], nothing_pending))[0] == {*ids("b"), EOS, END_OF_TURN}
    # One that ends it was sampled, and the step after was launched all the same: what it gives is for nobody.
    assert by_row(masks.masks([item("a", ids("abb"), pending_row=0)], lambda: [EOS]))[0] <= {EOS, END_OF_TURN}


def test_many_rows_are_done_by_several_threads(compiler: GrammarCompiler) -> None:
    step = [item(f"s{i}", ids("ab"[: i % 3])) for i in range(50)]
    found = by_row(TokenMasks(compiler, 64, WallClock()).masks(step, nothing_pending))
    expected = [set(ids("a")), set(ids("b")), {*ids("b"), EOS, END_OF_TURN}]
    assert found == {i: expected[i % 3] for i in range(50)}


def test_a_row_that_cannot_go_on_fails_alone(compiler: GrammarCompiler) -> None:
    masks = TokenMasks(compiler, 8, WallClock()).masks(
        [item("wrong", ids("x")), item("right", ids("a"))], nothing_pending
    )
    assert masks is not None
    assert list(masks.failed) == [0]
    assert masks.rows == (1,)
    assert allowed(masks.bits[0]) == set(ids("b"))


def test_a_mask_that_takes_too_long_holds_nobody_up_and_is_not_tried_again(compiler: GrammarCompiler) -> None:
    class Hanging:
        """A matcher that never comes back."""

        num_tokens, error = 0, ""
        release = threading.Event()

        def advance(self, token_ids: Sequence[int]) -> None:
            self.release.wait(20)

        def fill(self, mask: Mask) -> None: ...

    slow = Grammar(GrammarKind.REGEX, "slow")
    held = compiler.compile(slow).result()
    held.start = Hanging  # type: ignore[assignment, method-assign]
    masks = TokenMasks(compiler, 8, WallClock(), timeout_s=0.05)
    step = [item("a", ids("")), item("hangs", ids(""), slow), item("b", ids("a"))]
    for num_given_up in (1, 1):
        found = masks.masks(step, nothing_pending)
        assert found is not None
        assert "took longer than 0.05 s" in found.failed[1]
        assert [allowed(bits) for bits in found.bits] == [set(ids("a")), set(ids("b"))]
        assert found.rows == (0, 2)
        assert masks.num_timeouts == num_given_up
    Hanging.release.set()
