"""Tokens computed over tokens needed, counted by hand and by the engine's own steps."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from benchmarks.packing import Tokens, needed, packed, padded
from cluster.workload_traces import TraceRequest
from engine.config import EngineConfig

REQUESTS = (TraceRequest(10, 4), TraceRequest(2, 9), TraceRequest(7, 1))


def test_padding_is_counted_to_the_longest_of_each_batch() -> None:
    assert needed(REQUESTS) == Tokens(19, 11)
    assert padded(REQUESTS, 2) == Tokens(20 + 7, 16 + 0)
    assert padded(REQUESTS, 3) == Tokens(30, 24)


@pytest.mark.parametrize("rate", [None, 1.0])
def test_packed_steps_compute_what_is_needed_and_graphs_add_rows(rate: float | None) -> None:
    run = packed(REQUESTS * 4, EngineConfig(max_batch_size=5, max_batch_tokens=16, page_size=4), rate)

    assert run.computed == needed(REQUESTS * 4)
    # Three sequences take the graph of four; one that is alone takes its own.
    assert (run.num_decode_rows > 0) == (run.mean_batch > 1)
    assert run.num_prompt_rows > 0, "prompts of 10, 2 and 7 tokens, in graphs of 16"


@settings(max_examples=25)
@given(
    st.lists(st.builds(TraceRequest, st.integers(1, 60), st.integers(1, 12)), min_size=1, max_size=12),
    st.integers(1, 6),
)
def test_no_token_is_computed_twice_whatever_the_lengths(requests: list[TraceRequest], batch: int) -> None:
    run = packed(requests, EngineConfig(max_batch_size=batch, max_batch_tokens=16, max_prefill_chunk=9, page_size=4))

    assert run.computed == needed(requests)
    assert padded(requests, batch).total >= needed(requests).total
