"""Prompts have the length that is asked for, share what the trace shares, and hold the answers that came."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cluster.bench.prompts import Answered, TextWording, TokenWording, place_of_answer, word_pool
from cluster.bench.target import ASSISTANT, USER, Facts, Message, Prompt
from cluster.simulator.conversation import Prompt as Numbers
from cluster.simulator.workload import ArrivalPlan, from_trace
from cluster.tokenizer import ChatMessage, Tokenizer
from cluster.workload_traces import TraceRequest

FACTS = Facts("tiny")


def numbers(blocks: list[int], tail: int, num_tokens: int, size: int = 4) -> Numbers:
    return Numbers(num_tokens, tail, blocks, size)


@given(st.integers(1, 60), st.integers(0, 5), st.integers(1, 1000))
def test_token_ids_are_exact_and_within_the_vocabulary(num_tokens: int, seed: int, vocabulary: int) -> None:
    written = TokenWording(vocabulary + 3, seed, first=3).write(numbers([1, 2], 9, num_tokens), ())

    assert len(written.prompt) == written.num_tokens == num_tokens
    assert all(3 <= token < vocabulary + 3 for token in written.prompt)  # type: ignore[operator]


def test_prompts_share_a_beginning_exactly_as_far_as_their_blocks_agree() -> None:
    wording = TokenWording(10_000)

    one, two = (wording.write(numbers([1, 2, last], 9, 12), ()).prompt for last in (3, 4))

    assert one[:8] == two[:8]
    assert all(a != b for a, b in zip(one[8:], two[8:], strict=True))
    assert len(set(one)) > 10  # a block is not one token repeated


def test_another_seed_shares_nothing() -> None:
    one, two = (TokenWording(10_000, seed).write(numbers([1], 9, 8), ()).prompt for seed in (0, 1))

    assert not set(zip(one, two, strict=True)) & {(a, a) for a in one}


def test_answers_stand_in_their_places_cut_or_filled_up() -> None:
    prompt = numbers([1, 2, 3], 9, 12)
    made_up = TokenWording(1000).write(prompt, ()).prompt

    written = TokenWording(1000).write(prompt, [Answered(2, 5, "", (7, 7, 7, 7)), Answered(8, 11, "", (8,))]).prompt

    assert written == (*made_up[:2], 7, 7, 7, *made_up[5:8], 8, *made_up[9:])


def test_the_place_of_an_answer_is_where_the_next_prompt_goes_on() -> None:
    turns = [
        TraceRequest(6, 3, session_id="s", turn=0),
        TraceRequest(14, 2, session_id="s", turn=1, appended=True),
        TraceRequest(5, 2, session_id="s", turn=2),  # begins anew
    ]
    requests = [TraceRequest(6, 3, session_id="s", prefix_blocks=("a",), block_tokens=4), *turns[1:]]
    (conversation,) = from_trace(requests, ArrivalPlan("users")).conversations

    first, second, third = conversation.turns

    assert place_of_answer(first, second) == (6, 9)
    assert place_of_answer(second, third) is None


def counter(tokenizer: Tokenizer, prompt: Prompt) -> int:
    if isinstance(prompt, str):
        return len(tokenizer.encode(prompt, field="prompt"))
    return len(tokenizer.encode_chat([ChatMessage(m.role, m.content) for m in prompt], field="m"))  # type: ignore[union-attr]


@pytest.mark.parametrize("as_chat", [False, True])
@pytest.mark.parametrize("num_tokens", [60, 61, 200, 333])
def test_text_has_exactly_as_many_tokens_as_the_tokenizer_counts(
    tiny_tokenizer: Tokenizer, as_chat: bool, num_tokens: int
) -> None:
    wording = TextWording(
        word_pool(tiny_tokenizer), as_chat, FACTS, lambda prompt: counter(tiny_tokenizer, prompt), seed=5
    )

    written = wording.write(numbers([1, 2], 9, num_tokens), ())

    # The tiny vocabulary knows few words whole, so a count may be one word off; what was counted is what is said.
    assert written.num_tokens == counter(tiny_tokenizer, written.prompt)
    assert abs(written.num_tokens - num_tokens) <= 3


def test_words_of_one_token_make_exact_prompts() -> None:
    def count(prompt: Prompt) -> int:
        return 7 + sum(len(m.content.split()) for m in prompt)  # type: ignore[union-attr]

    written = TextWording((" a", " b", " c"), True, FACTS, count).write(numbers([1], 9, 50), ())

    assert written.num_tokens == count(written.prompt) == 50


def test_without_a_tokenizer_the_servers_own_counts_correct_the_words() -> None:
    wording = TextWording((" a",), False, Facts("m", tokens_per_word=2.0, overhead_tokens=10.0))

    assert wording.write(numbers([], 9, 50), ()).prompt == " a" * 20


def test_a_chat_goes_on_in_messages_of_user_and_assistant() -> None:
    wording = TextWording((" w",), True, FACTS)

    written = wording.write(numbers([], 9, 10), [Answered(4, 7, "I say", ())])

    assert written.prompt == (
        Message(USER, " w w w w"),
        Message(ASSISTANT, "I say"),
        Message(USER, " w w w"),
    )


def test_a_pool_holds_words_of_one_token_if_there_are_enough() -> None:
    class HalfKnown:
        def encode(self, text: str, *, field: str) -> list[int]:
            return [0 for word in text.split() for _ in range(1 if len(word) < 4 else 2)]

    assert {len(word) for word in word_pool(HalfKnown())} <= {2, 3, 4}  # with the space
    assert len(word_pool(None)) > 100
