"""What is made of emissions and arrivals; the processes themselves are the benchmark's."""

from __future__ import annotations

import asyncio
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from benchmarks.gateway import Passed, Point, figures, kept_up, row
from benchmarks.gateway_clients import Arrivals, _SseClient
from benchmarks.stand_in_worker import Emission

POINT = Point("grpc", 2, 20, 5.0)  # two clients, a step every 0.1 s


def passed(added_s: float, growing_s: float = 0.0, num_messages: int = 100) -> Passed:
    """Fifty tokens of each client, so late; ``growing_s`` more with each."""
    emitted = 10 + 0.1 * np.arange(50)
    late = added_s + growing_s * np.arange(50)
    at = np.stack([emitted + late, emitted + late])
    window = float(at[0, -1] - at[0, 0])
    return Passed(emitted, at, num_messages, window, cpu_s=0.5 * window, worker_cpu_s=0.1, clients_cpu_s=0.2)


@given(st.integers(1, 2**20), st.integers(1, 2**25), st.integers(0, 2**14))
def test_what_is_to_be_emitted_is_told_in_token_ids_of_any_vocabulary(n: int, step_us: int, client: int) -> None:
    emission = Emission(n, step_us, client)

    assert Emission.of(emission.prompt()) == emission
    assert all(0 <= token < 2**15 for token in emission.prompt())


def test_a_step_is_no_shorter_than_an_engines() -> None:
    assert (Point("sse", 1, 20_000, 5.0).step_us, Point("sse", 1, 20_000, 5.0).offered) == (1000, 1000)
    assert (Point("sse", 64, 20_000, 5.0).step_us, Point("sse", 64, 20_000, 5.0).num_tokens) == (3200, 1562)


def test_rates_and_latencies_of_a_run_by_hand() -> None:
    found = row(POINT, [passed(0.004, num_messages=50)])

    assert found["added_ms_p50"] == pytest.approx(4.0)
    assert found["tokens_per_message"] == 2.0
    assert found["tokens_per_s"] == pytest.approx(98 / 4.9)  # all but the first ones, which begin the window
    assert found["tokens_per_cpu_s"] == pytest.approx(2 * 98 / 4.9)
    assert (found["gateway_cores"], found["kept_up"]) == (pytest.approx(0.5), "yes")


def test_two_gateways_add_up() -> None:
    one, two = row(POINT, [passed(0.004)]), row(POINT, [passed(0.004), passed(0.004)])

    assert two["tokens_per_s"] == pytest.approx(2 * float(one["tokens_per_s"] or 0))
    assert two["gateways"] == 2


def test_a_gateway_that_falls_behind_or_loses_tokens_has_not_kept_up() -> None:
    assert kept_up(POINT, passed(0.03))
    assert not kept_up(POINT, passed(0.03, growing_s=0.01))
    assert not kept_up(Point("grpc", 2, 40, 5.0), passed(0.03))  # half of what was offered came


def test_figures_are_of_the_highest_rate_that_was_kept_up_with() -> None:
    def made(door: str, offered: float, kept: str, gateways: int = 1) -> dict[str, str | float | int | None]:
        return {
            "door": door, "gateways": gateways, "clients": 64, "offered_tokens_per_s": offered, "kept_up": kept,
            "tokens_per_s": offered - 1, "tokens_per_cpu_s": 2 * offered, "added_ms_p99": offered / 1000,
        }  # fmt: skip

    found = figures(
        [made("grpc", 5_000, "yes"), made("grpc", 20_000, "yes"), made("grpc", 40_000, "no"), made("sse", 5_000, "yes"),
         made("grpc", 20_000, "yes", gateways=2)]
    )  # fmt: skip

    assert found == {
        "grpc_tokens_per_s": 19_999, "grpc_tokens_per_cpu_s": 40_000, "sse_tokens_per_s": 4_999,
        "sse_tokens_per_cpu_s": 10_000, "grpc_tokens_per_s_two_gateways": 19_999,
        "grpc_tokens_per_cpu_s_two_gateways": 40_000, "added_ms_p99": 5.0, "grpc_added_ms_p99_at_aim": 20.0,
    }  # fmt: skip


@given(st.lists(st.integers(0, 200), max_size=8))
def test_words_of_an_event_are_its_tokens_however_the_bytes_arrive(cuts: list[int]) -> None:
    stream = (
        b'HTTP/1.1 200\r\n\r\ndata: {"choices":[{"text":" one"}]}\n\n'
        + b'\r\n3\r\ndata: {"choices":[{"text":" a b"}]}\n\n'
    )
    stream += b'data: {"choices":[{"text":"","finish_reason":"length"}]}\n\ndata: [DONE]\n\n'

    async def feed() -> Arrivals:
        arrivals = Arrivals(1, 99)
        client = _SseClient("host", Emission(1, 1, 0), arrivals)
        places = [0, *sorted(min(cut, len(stream)) for cut in cuts), len(stream)]
        for begin, end in pairwise(places):
            client.data_received(stream[begin:end])
        return arrivals

    arrivals = asyncio.run(feed())

    assert (len(arrivals.at[0]), arrivals.num_messages) == (3, 2)
