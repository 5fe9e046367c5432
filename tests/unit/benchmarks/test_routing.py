"""Prompts share what the trace's blocks share, and rows and figures are what the answers said."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks.routing import figures, row, served_of
from benchmarks.shared_prefixes import (
    MAX_OUTPUT_TOKENS,
    MIN_OUTPUT_TOKENS,
    PAGE_TOKENS,
    SharedPrompt,
    conversations,
    ideal_hit_rate,
    shared_prompts,
)
from cluster.workload_traces import TraceRequest


def turn(at: float, *blocks: str, tokens: int | None = None) -> TraceRequest:
    return TraceRequest(tokens or 512 * len(blocks), 100, at, prefix_blocks=blocks, block_tokens=512)


def test_whole_conversations_of_several_turns_are_taken_in_the_order_of_their_turns() -> None:
    first, lonely, second, answer = turn(0, "s", "a"), turn(3, "s", "b"), turn(6, "s", "c"), turn(9, "s", "a", "d")
    reply = turn(12, "s", "c", "e")

    assert conversations([first, lonely, second, answer, reply], 4) == [first, second, answer, reply]
    assert conversations([first, lonely, second, answer, reply], 2) == [first, answer]


def test_conversations_are_taken_from_the_whole_trace() -> None:
    begun = [turn(at, "s", f"{at}") for at in range(8)]
    ended = [turn(8 + at, "s", f"{at}", "end") for at in range(8)]

    assert [request.arrival_s for request in conversations(begun + ended, 4)] == [0, 4, 8, 12]


def test_made_up_prompts_keep_their_bounds_share_beginnings_and_come_at_the_rate(tmp_path: Path) -> None:
    prompts = shared_prompts(tmp_path, 12, rate=2.0, max_tokens=300)

    assert prompts == shared_prompts(None, 12, rate=2.0, max_tokens=300)
    assert all(0 < len(prompt.token_ids) <= 300 for prompt in prompts)
    assert all(MIN_OUTPUT_TOKENS <= prompt.num_new_tokens <= MAX_OUTPUT_TOKENS for prompt in prompts)
    assert [prompt.at_s for prompt in prompts] == sorted(prompt.at_s for prompt in prompts)
    assert (prompts[0].at_s, prompts[-1].at_s) == (0.0, pytest.approx(11 / 2.0))
    assert len({prompt.token_ids[: 4 * PAGE_TOKENS] for prompt in prompts}) == 1, "one system prompt"
    assert 0.3 < ideal_hit_rate(prompts) < 0.9


def test_the_ideal_is_whole_pages_that_came_before_but_never_a_whole_prompt() -> None:
    long, short = tuple(range(40)), tuple(range(32))
    prompts = [SharedPrompt(0.0, tokens, 2) for tokens in (long, short, long)]

    assert ideal_hit_rate(prompts) == pytest.approx((0 + 16 + 32) / 112)


def test_rows_and_figures_by_hand() -> None:
    timing = {"cached_tokens": 16, "bytes_shipped": 2**20, "prefill_worker": "prefill-0"}
    alone = {"cached_tokens": 0, "bytes_shipped": 0, "prefill_worker": None}
    by_turns = row("round_robin", [served_of(64, 1.0, 0.1, timing), served_of(64, 3.0, 0.1, timing)], 9.0, 0.5)
    better = row("prfaas", [served_of(64, 1.0, 0.1, timing), None, served_of(64, 1.0, 0.1, alone)], 9.0, 0.5)

    assert (by_turns["hit_rate"], by_turns["hit_of_ideal"], by_turns["mib_shipped"]) == (0.25, 0.5, 2.0)
    assert (by_turns["ttft_mean_s"], by_turns["num_colocated"], better["num_colocated"]) == (2.0, 0, 1)
    assert [(cells["num_requests"], cells["num_refused"]) for cells in (by_turns, better)] == [(2, 0), (3, 1)]
    found = figures([by_turns, better], 0.5)
    assert found["ttft_mean_over_round_robin_prfaas"] == 0.5
    assert found["shipped_over_round_robin_prfaas"] == 0.5
    assert (found["hit_rate_prfaas"], found["hit_rate_ideal"]) == (0.125, 0.5)
