"""Tokens that share prefixes as a trace says, and instants with the moments that were asked for."""

from __future__ import annotations

from random import Random
from statistics import mean, pstdev

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cluster.simulator.conversation import Conversation, Prompt
from cluster.simulator.workload import ArrivalPlan, Workload, empirical, from_lengths, from_trace, log_normal
from cluster.workload_traces import TraceRequest
from core.errors import InvalidConfig


def blocks(*names: str, num_tokens: int, output: int = 10, turn: int = 0, session: str | None = "s") -> TraceRequest:
    return TraceRequest(
        num_tokens, output, 0.0 if turn == 0 else 5.0, session, turn, 2.0 * turn, prefix_blocks=names, block_tokens=100
    )


def common(a: tuple[int, ...], b: tuple[int, ...]) -> int:
    """Leading tokens that two prompts share."""
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


def gaps(workload: Workload) -> list[float]:
    starts = [conversation.starts_at for conversation in workload.conversations]
    return [b - a for a, b in zip([0.0, *starts], starts, strict=False)]


USERS = ArrivalPlan("users", num_users=3)


@given(st.integers(0, 40), st.integers(0, 40), st.integers(0, 25), st.integers(0, 3))
def test_a_slice_of_a_prompt_is_what_the_whole_has_there(start: int, end: int, size: int, num_blocks: int) -> None:
    prompt = Prompt(size, 9, tuple(range(num_blocks)), 7)

    assert len(prompt.tokens()) == size
    assert prompt.tokens(start, end) == prompt.tokens()[start:end]


def test_prompts_share_what_their_blocks_share() -> None:
    requests = [
        blocks("a", "b", num_tokens=250, session=None),
        blocks("a", "c", num_tokens=250, session=None),
        blocks("a", "b", num_tokens=150, session=None),
    ]

    one, other, shorter = (c.turns[0].prompt.tokens() for c in from_trace(requests, USERS).conversations)

    assert common(one, other) == 100
    assert common(one, shorter) == 150  # the last block reaches beyond the prompt
    assert len(set(one[200:]) & set(other[200:])) == 0


def test_the_next_turn_holds_the_answer_where_it_stood() -> None:
    """250 tokens, of which two blocks are named; then 420, whose blocks begin with those two. What the first prompt has
    behind its blocks, and the 60 tokens of its answer, are the second one's tokens 200 to 309."""
    first, second = (blocks("a", "b", num_tokens=250, output=60), blocks("a", "b", "c", "d", num_tokens=420, turn=1))

    (conversation,) = from_trace([first, second], USERS).conversations
    earlier, later = conversation.turns

    said = earlier.prompt.tokens() + earlier.answer.tokens(0, 60)
    assert said == later.prompt.tokens()[:310]
    assert later.think_s == 2.0


def test_a_turn_that_begins_anew_says_nothing_of_the_answer() -> None:
    first, second = blocks("a", "b", num_tokens=250), blocks("a", "x", "c", "d", num_tokens=420, turn=1)

    (conversation,) = from_trace([first, second], USERS).conversations
    earlier, later = conversation.turns

    assert common(earlier.prompt.tokens(), later.prompt.tokens()) == 100
    assert earlier.answer.token_ids == ()


def test_appended_texts_begin_with_the_last_prompt() -> None:
    requests = [TraceRequest(30, 5, 0.0, "s", 0), TraceRequest(50, 5, 1.0, "s", 1, appended=True)]

    (conversation,) = from_trace(requests, USERS).conversations
    earlier, later = conversation.turns

    assert common(earlier.prompt.tokens(), later.prompt.tokens()) == 30


def test_a_trace_s_instants_are_kept_or_stretched() -> None:
    requests = [TraceRequest(10, 5, at) for at in (4.0, 6.0, 14.0)]

    assert [c.starts_at for c in from_trace(requests, ArrivalPlan()).conversations] == [0.0, 2.0, 10.0]
    # 3 requests at 1/s take 3 s instead of 10
    stretched = from_trace(requests, ArrivalPlan(rate_rps=1.0)).conversations
    assert [c.starts_at for c in stretched] == pytest.approx([0.0, 0.6, 3.0])


def test_a_grid_is_spread_within_its_step() -> None:
    requests = [TraceRequest(10, 5, 3.0 * (number // 50)) for number in range(200)]

    starts = [c.starts_at for c in from_trace(requests, ArrivalPlan(spread_s=3.0)).conversations]

    assert starts == sorted(starts)
    assert all(3.0 * (number // 50) <= at < 3.0 * (number // 50) + 3.0 for number, at in enumerate(starts))
    assert len(set(starts)) == 200


@pytest.mark.parametrize("burstiness", [0.25, 1.0, 4.0])
def test_gamma_gaps_have_the_rate_and_the_shape(burstiness: float) -> None:
    """A gamma distribution of shape k has a coefficient of variation of 1 / sqrt(k)."""
    arrivals = ArrivalPlan("gamma", rate_rps=5.0, burstiness=burstiness)

    drawn = gaps(from_lengths(empirical([(10, 5)]), 20_000, arrivals))

    assert mean(drawn) == pytest.approx(0.2, rel=0.05)
    assert pstdev(drawn) / mean(drawn) == pytest.approx(burstiness**-0.5, rel=0.05)


def test_a_rate_of_requests_counts_turns() -> None:
    """Sessions of two turns at 4 requests/s begin 2 times a second."""
    requests = [blocks("a", num_tokens=150, turn=turn, session=str(n)) for n in range(4000) for turn in (0, 1)]

    drawn = gaps(from_trace(requests, ArrivalPlan("poisson", rate_rps=4.0)))

    assert mean(drawn) == pytest.approx(0.5, rel=0.06)


def test_log_normal_lengths_are_those_of_the_papers_case() -> None:
    """PrfaaS section 4: mu 9.90, sigma 1.00 between 128 and 131072 tokens has a mean of 27,486 (PAPERS.md A.12)."""
    draw, random = log_normal(9.9, 1.0, 128, 131072, 1024), Random(1)

    drawn = [draw(random) for _ in range(40_000)]

    assert mean(prompt for prompt, _ in drawn) == pytest.approx(27_486, rel=0.02)
    assert {output for _, output in drawn} == {1024}


def test_long_requests_and_what_follows_them_are_left_out() -> None:
    requests = [blocks("a", num_tokens=n, turn=t) for t, n in enumerate((100, 500, 120))]

    (conversation,) = from_trace(requests, USERS, max_tokens=200).conversations

    assert [turn.input_tokens for turn in conversation.turns] == [100]


def test_equal_seeds_make_equal_workloads() -> None:
    def starts(seed: int) -> list[float]:
        workload = from_lengths(empirical([(10, 5)]), 10, ArrivalPlan("poisson", rate_rps=1.0), seed=seed)
        return [conversation.starts_at for conversation in workload.conversations]

    assert starts(1) == starts(1) != starts(2)


def test_a_trace_without_instants_needs_a_process() -> None:
    with pytest.raises(InvalidConfig, match="choose poisson, gamma or users"):
        from_trace([TraceRequest(10, 5)], ArrivalPlan())
    with pytest.raises(InvalidConfig, match="choose poisson, gamma or users"):
        from_trace([blocks("a", num_tokens=150, turn=t) for t in (0, 1)], ArrivalPlan())


@pytest.mark.parametrize(
    ("plan", "key"),
    [
        ({"process": "often"}, "process"),
        ({"process": "poisson"}, "rate_rps"),
        ({"rate_rps": 0.0}, "rate_rps"),
        ({"burstiness": 0.0}, "burstiness"),
        ({"num_users": 0}, "num_users"),
        ({"spread_s": -1.0}, "spread_s"),
    ],
)
def test_a_wrong_plan_names_its_key(plan: dict[str, object], key: str) -> None:
    with pytest.raises(InvalidConfig, match=key):
        ArrivalPlan(**plan)  # type: ignore[arg-type]


def test_conversations_are_what_they_say() -> None:
    workload = from_trace([blocks("a", num_tokens=150, turn=t) for t in (1, 0)], USERS)

    assert isinstance(workload.conversations[0], Conversation)
    assert (workload.num_requests, workload.num_users) == (2, 3)
    assert [turn.think_s for turn in workload.conversations[0].turns] == [0.0, 2.0]
