"""Which pair is tested when (pure), and the tester over real gRPC with fake workers."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import grpc
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cluster import link_tester
from cluster.link_tester import (
    AT_ONCE,
    MAX_BACK_OFF_S,
    NEVER,
    LinkTester,
    Pair,
    PairState,
    after,
    due,
    pairs_of,
)
from core.link import ProbeReport
from core.request import EngineId, Role, WorkerId
from protos import worker_pb2 as pb
from tests.unit.cluster.fake_worker import FakeWorker, Refusal
from tests.unit.cluster.gateway_and_fakes import Gateway, gateway, until

PASSED = ProbeReport("tcp", 8, True, 8, 1.0)
FAILED = ProbeReport("tcp", error="PeerLost", reason="no answer")


def pair(sender: int, receiver: int) -> Pair:
    return Pair(EngineId(f"p{sender}"), EngineId(f"d{receiver}"), WorkerId(f"p{sender}"), WorkerId(f"d{receiver}"))


PAIRS = st.builds(pair, st.integers(0, 3), st.integers(0, 3))
STATES = st.dictionaries(PAIRS, st.builds(PairState, st.none() | st.floats(0, 20)), max_size=16)


# ---- pure ----


@given(STATES, st.sets(PAIRS, max_size=2), st.floats(0, 20))
def test_due_pairs_share_no_engine_and_are_due(states: dict[Pair, PairState], running: set[Pair], now: float) -> None:
    chosen = due(states, running, now)

    engines = [engine for pair in chosen for engine in (pair.sender, pair.receiver)]
    busy = {engine for pair in running for engine in (pair.sender, pair.receiver)}
    assert len(engines) == len(set(engines))
    assert not busy & set(engines)
    for found in chosen:
        due_at = states[found].due_at
        assert due_at is not None
        assert due_at <= now
    for left, state in states.items():  # nobody waits without a reason
        if left not in chosen and left not in running and state.due_at is not None and state.due_at <= now:
            assert {left.sender, left.receiver} & (set(engines) | busy)


@pytest.mark.parametrize("size", [1, 3, 8])
def test_all_pairs_of_n_by_n_workers_take_few_rounds(size: int) -> None:
    states = {pair(p, d): AT_ONCE for p in range(size) for d in range(size)}
    num_rounds = 0
    while chosen := due(states, (), 0.0):
        num_rounds += 1
        states |= dict.fromkeys(chosen, NEVER)

    assert set(states.values()) == {NEVER}
    assert num_rounds <= 2 * size - 1


def test_a_failed_pair_backs_off_and_a_passed_one_rests() -> None:
    state, waits = AT_ONCE, []
    for _ in range(9):
        state = after(state, FAILED, 100.0)
        assert state.due_at is not None
        waits.append(state.due_at - 100.0)

    assert waits == [1, 2, 4, 8, 16, 32, MAX_BACK_OFF_S, MAX_BACK_OFF_S, MAX_BACK_OFF_S]
    assert after(state, PASSED, 100.0) == NEVER
    assert after(PairState(0.0, 10_000), FAILED, 0.0).due_at == MAX_BACK_OFF_S


# ---- the tester ----


@asynccontextmanager
async def with_tester(
    num_prefill: int, num_decode: int, *, unasked: bool = True
) -> AsyncIterator[tuple[Gateway, LinkTester]]:
    async with gateway(num_prefill, num_decode, self_test=unasked) as g:
        tester = LinkTester(g.membership, g.clock, unasked=unasked)
        tester.start()
        try:
            yield g, tester
        finally:
            await tester.close()


def states(g: Gateway) -> dict[tuple[str, str], str]:
    return {pair: link.reason or "usable" for pair, link in g.membership.view().links.items()}


def all_usable(g: Gateway, count: int) -> bool:
    return list(states(g).values()) == ["usable"] * count


async def test_every_pair_is_tested_once_and_then_usable() -> None:
    async with with_tester(2, 3) as (g, _):
        await until(lambda: all_usable(g, 6))
        await asyncio.sleep(0.05)

        assert sorted(g["prefill-0"].probed) == sorted(g["prefill-1"].probed) == ["decode-0", "decode-1", "decode-2"]
        assert g.membership.probes_by_outcome == {"passed": 6}
        assert g.membership.view().links["prefill-0", "decode-2"].probe is not None


async def test_a_worker_that_joins_is_tested_and_so_is_one_that_restarts() -> None:
    async with with_tester(1, 1) as (g, _):
        await until(lambda: all_usable(g, 1))
        await g.add(FakeWorker("decode-1", Role.DECODE))
        await until(lambda: all_usable(g, 2))

        await g["decode-0"].kill()
        await g.add(FakeWorker("decode-0", Role.DECODE, engine_id="decode-0-engine-2"))
        await until(lambda: all_usable(g, 2))

        assert g["prefill-0"].probed == ["decode-0", "decode-1", "decode-0"]


async def test_a_pair_that_rests_is_tested_again_when_somebody_wants_to_know() -> None:
    async with with_tester(1, 2) as (g, tester):
        await until(lambda: all_usable(g, 2))
        engines = {worker.worker_id: worker.engine_id for worker in g.membership.view().workers}
        before = g.membership.view().links["prefill-0", "decode-1"].probed_at
        tester.retest(engines["prefill-0"], engines["decode-1"])
        tester.retest(engines["decode-1"], engines["prefill-0"])  # no pair: nothing happens
        await until(lambda: g.membership.view().links["prefill-0", "decode-1"].probed_at > before)

        assert g["prefill-0"].probed == ["decode-0", "decode-1", "decode-1"]
        assert all_usable(g, 2), "it stays usable while it is tested"


async def test_a_failing_pair_is_not_usable_while_others_are() -> None:
    async with gateway(1, 0, self_test=True) as g:

        async def probe(request: pb.ProbeRequest) -> ProbeReport:
            return FAILED if request.worker_id == "decode-1" else PASSED

        g["prefill-0"].probe = probe
        for index in range(3):
            await g.add(FakeWorker(f"decode-{index}", Role.DECODE))
        tester = LinkTester(g.membership, g.clock, unasked=True)
        tester.start()
        try:
            await until(lambda: "not tested yet" not in states(g).values())
        finally:
            await tester.close()
        assert [reason for _, reason in sorted(states(g).items())] == ["usable", "PeerLost: no answer", "usable"]


async def test_a_pair_that_fails_is_tested_again_until_it_passes() -> None:
    async with gateway(1, 1, self_test=True) as g:
        answers = [FAILED, ProbeReport("tcp", 8, exact=False, error="Corrupted", reason="digest differs"), PASSED]

        async def probe(request: pb.ProbeRequest) -> ProbeReport:
            return answers.pop(0)

        g["prefill-0"].probe = probe
        tester = LinkTester(g.membership, g.clock, unasked=True)
        tester.start()
        try:
            await until(lambda: states(g)["prefill-0", "decode-0"] == "PeerLost: no answer")
            await until(lambda: states(g)["prefill-0", "decode-0"] == "Corrupted: digest differs")
            await until(lambda: all_usable(g, 1))
        finally:
            await tester.close()
        assert g.membership.probes_by_outcome == {"PeerLost": 1, "Corrupted": 1, "passed": 1}


async def test_a_worker_without_pages_is_asked_again_and_nothing_is_held_against_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(link_tester, "PAGE_WAIT_S", 0.01)
    async with gateway(1, 1, self_test=True) as g:
        num_refusals = 3

        async def probe(request: pb.ProbeRequest) -> ProbeReport:
            if len(g["prefill-0"].probed) <= num_refusals:
                raise Refusal(grpc.StatusCode.RESOURCE_EXHAUSTED, "no page to spare")
            return PASSED

        g["prefill-0"].probe = probe
        tester = LinkTester(g.membership, g.clock, unasked=True)
        tester.start()
        try:
            await until(lambda: all_usable(g, 1))
        finally:
            await tester.close()
        assert g.membership.probes_by_outcome == {"passed": 1}


async def test_unasked_nothing_is_tested_where_self_tests_are_off() -> None:
    async with with_tester(1, 2, unasked=False) as (g, tester):
        await asyncio.sleep(0.05)
        assert g["prefill-0"].probed == []
        assert all_usable(g, 2)

        results = [result async for result in tester.test_all()]

        assert sorted(result.pair.to_worker for result in results) == ["decode-0", "decode-1"]
        assert all(result.report.passed and result.num_pairs == 2 for result in results)


async def test_asked_for_twice_at_once_both_get_every_pair() -> None:
    async with with_tester(2, 2) as (_, tester):

        async def names() -> list[tuple[str, str]]:
            return sorted([(r.pair.from_worker, r.pair.to_worker) async for r in tester.test_all()])

        first, second = await asyncio.gather(names(), names())

    assert first == second
    assert len(first) == 4


async def test_who_waits_hears_of_a_pair_whose_worker_leaves() -> None:
    async with with_tester(1, 1, unasked=False) as (g, tester):
        entered = asyncio.Event()

        async def hang(request: pb.ProbeRequest) -> ProbeReport:
            entered.set()
            await asyncio.Event().wait()
            raise AssertionError

        g["prefill-0"].probe = hang

        async def results() -> list[ProbeReport]:
            return [result.report async for result in tester.test_all()]

        asked = asyncio.create_task(results())
        await entered.wait()
        await g["decode-0"].kill()
        (report,) = await asked

    assert (report.passed, report.error) == (False, "PeerLost")


async def test_pairs_are_of_workers_that_take_sequences() -> None:
    async with gateway(1, 2) as g:
        await g["decode-1"].change(draining=True)
        await until(lambda: len(pairs_of(g.membership.view())) == 1)

        assert [pair.to_worker for pair in pairs_of(g.membership.view())] == ["decode-0"]
