"""A pair of processes moves the pages that it is told to, says why it cannot, and is gone afterwards."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from benchmarks.child_process import CallFailed, ChildBroken
from benchmarks.kv_arms import Ours, Sketch
from benchmarks.kv_pair import Pair, Side
from benchmarks.kv_pools import Pools
from benchmarks.kv_prompt import count_wrong_pages, pool_bytes
from benchmarks.kv_transfer import one_certificate

POOL_PAGES = 4


@pytest.fixture(scope="module")
def pools() -> Iterator[Pools]:
    with Pools(POOL_PAGES) as pools:
        yield pools


@pytest.fixture
def pair(pools: Pools) -> Iterator[Pair]:
    left, right = (Side(list, "127.0.0.1", fd) for fd in pools.fds)
    with Pair(left, right, POOL_PAGES, ()) as pair:
        yield pair


def test_bare_sockets_move_the_first_bytes_of_the_pool(pools: Pools, pair: Pair) -> None:
    for _ in range(2):
        moved, cpu_s = pair.move(Sketch(2), (0, 1), (0, 1), None)

    num_bytes = pool_bytes(2)
    assert moved.num_bytes == num_bytes
    assert moved.seconds > 0
    assert cpu_s > 0
    assert pools.target[:num_bytes] == pools.source[:num_bytes]
    assert pools.target[num_bytes:] != pools.source[num_bytes:]


@pytest.mark.parametrize(
    "arm",
    [Ours(1), Ours(2, "xxh3"), Ours(2, tls=True), Ours(2, codec="fp8")],
    ids=lambda arm: f"{arm.name} x{arm.connections}",
)
def test_our_arms_move_scrambled_pages_over_the_link_that_they_are_about(arm: Ours, pools: Pools, pair: Pair) -> None:
    src_pages, dst_pages = (3, 0, 2), (1, 3, 0)
    with one_certificate() as credentials:
        for _ in range(2):
            moved, _ = pair.move(arm, src_pages, dst_pages, credentials if arm.tls else None)

    assert moved.num_bytes == pool_bytes(3)
    assert ("tls" in moved.path) == arm.tls
    assert count_wrong_pages(pools.source, pools.target, POOL_PAGES, src_pages, dst_pages, arm.lossy) == 0


def test_a_paused_pair_goes_on_where_it_was(pair: Pair) -> None:
    pair.move(Sketch(), (0,), (0,), None)

    pair.pause()
    pair.resume()

    assert pair.move(Sketch(), (0,), (0,), None)[0].num_bytes == pool_bytes(1)


def test_an_arm_that_cannot_run_says_why_and_the_next_one_runs(pair: Pair) -> None:
    with pytest.raises(CallFailed, match="transport: must be one of"):
        pair.move(Ours(transport="pigeon"), (0,), (0,), None)

    assert pair.move(Sketch(), (0,), (0,), None)[0].num_bytes == pool_bytes(1)


def test_a_pair_that_lost_a_process_is_broken(pair: Pair) -> None:
    left, _ = pair.process_ids
    os.kill(left, signal.SIGKILL)

    with pytest.raises(ChildBroken, match="the process ended in"):
        pair.move(Sketch(), (0,), (0,), None)


def test_no_process_is_left_even_of_a_paused_pair(pools: Pools) -> None:
    left, right = (Side(list, "127.0.0.1", fd) for fd in pools.fds)
    with Pair(left, right, POOL_PAGES, ()) as pair:
        pair.pause()

    assert [number for number in pair.process_ids if Path(f"/proc/{number}").exists()] == []
