"""Leases, streams and refusals, over real gRPC."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Sequence
from dataclasses import replace

import grpc
import pytest

from cluster.cluster_links import by_cluster_pair
from cluster.config import RouterConfig
from cluster.cost_model import CostView
from cluster.membership import Membership
from cluster.view import Offload
from cluster.worker_client import Assignment, SequenceEvent, WorkerDescription, WorkerLost
from core.clock import VirtualClock, WallClock
from core.compute import StepSample
from core.errors import InvalidConfig
from core.link import LinkEstimate, ProbeReport
from core.prefix_hash import PageEvents, page_hashes, page_key
from core.request import ClusterId, EngineId, Role, SequenceId, WorkerId
from protos.channels import InternalGrpc
from tests.unit.cluster.fake_worker import FINGERPRINT, FakeWorker
from tests.unit.cluster.gateway_and_fakes import CONFIG, GATEWAY, Gateway, gateway, register, until


def ids(g: Gateway) -> list[str]:
    return [worker.engine_id for worker in g.membership.view().workers]


async def refusal(g: Gateway, worker: FakeWorker) -> grpc.aio.AioRpcError:
    await worker.start(g.fabric)
    g.workers[worker.engine_id] = worker
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await register(g.registry, worker)
    return caught.value


async def test_a_registered_worker_is_in_the_view_with_what_it_said() -> None:
    async with gateway(1, 1) as g:
        decode, prefill = g.membership.view().workers

        assert (decode.worker_id, decode.role, prefill.role) == ("decode-0", Role.DECODE, Role.PREFILL)
        assert (decode.address, decode.engine_id) == (g["decode-0"].address, "decode-0-engine-1")
        assert (decode.model.fingerprint, decode.load.pages_free, decode.pages_total) == (FINGERPRINT, 1000, 1000)


async def test_the_reply_is_the_lease_and_registering_again_opens_nothing_new() -> None:
    async with gateway(1, 0) as g:
        before = g.membership.client(EngineId("prefill-0-engine-1"))

        reply = await register(g.registry, g["prefill-0"])

        assert reply.lease_s == CONFIG.lease_s
        assert g.membership.client(EngineId("prefill-0-engine-1")) is before


async def test_the_view_is_the_same_object_until_something_changes() -> None:
    membership = Membership(RouterConfig(), GATEWAY, VirtualClock(), InternalGrpc(None))

    assert membership.view() is membership.view()


async def test_the_model_is_unknown_until_a_worker_registers_and_then_kept() -> None:
    async with gateway(0, 0) as g:
        assert g.membership.model() is None
        worker = await g.add(FakeWorker("decode-0", Role.DECODE))
        model = g.membership.model()
        await worker.kill()
        await until(lambda: not g.membership.view().workers)

        assert model is not None
        assert g.membership.model() == model


async def test_a_worker_that_dies_is_out_at_once_and_its_sequences_hear_of_it() -> None:
    async with gateway(1, 1) as g:
        client = g.membership.client(EngineId("decode-0-engine-1"))
        assert client is not None
        heard: list[SequenceEvent] = []
        client.open_sequence(SequenceId("s"), heard.append)

        await g["decode-0"].kill()
        await until(lambda: heard)

        assert isinstance(heard[0], WorkerLost)
        assert ids(g) == ["prefill-0-engine-1"]
        assert g.membership.client(EngineId("decode-0-engine-1")) is None


async def test_a_worker_that_falls_silent_is_out_when_its_lease_runs_out() -> None:
    async with gateway(1, 1, config=replace(CONFIG, lease_s=0.2)) as g:
        g["decode-0"].silent.set()

        await until(lambda: len(ids(g)) == 1)

        assert ids(g) == ["prefill-0-engine-1"]


async def test_leases_run_on_the_clock() -> None:
    async with gateway(0, 0) as g:
        clock = VirtualClock()
        membership = Membership(replace(CONFIG, lease_s=1000.0), GATEWAY, clock, InternalGrpc(None))
        registry = await membership.start("127.0.0.1")
        worker = FakeWorker("decode-0", Role.DECODE)
        worker.silent.set()
        await worker.start(g.fabric)
        g.workers["decode-0"] = worker
        await register(registry, worker)

        clock.advance(999.0)
        membership.expire()
        assert len(membership.view().workers) == 1
        clock.advance(1.0)
        assert membership.view().ready(Role.DECODE) == ()
        membership.expire()
        assert membership.view().workers == ()
        await membership.close()


async def test_heartbeats_keep_a_worker_in_the_view_beyond_its_lease() -> None:
    async with gateway(1, 0, config=replace(CONFIG, lease_s=0.1)) as g:
        await asyncio.sleep(0.3)

        assert ids(g) == ["prefill-0-engine-1"]


async def test_a_restarted_worker_replaces_its_old_engine_at_once() -> None:
    async with gateway(0, 1) as g:
        old = g.membership.client(EngineId("decode-0-engine-1"))
        assert old is not None
        heard: list[SequenceEvent] = []
        old.open_sequence(SequenceId("s"), heard.append)
        first = g["decode-0"]

        await g.add(FakeWorker("decode-0", Role.DECODE, engine_id="decode-0-engine-2"))

        assert isinstance(heard[0], WorkerLost)
        assert ids(g) == ["decode-0-engine-2"]
        await first.kill()


async def test_a_replaced_engine_does_not_come_back() -> None:
    async with gateway(0, 1) as g:
        first = g["decode-0"]
        await g.add(FakeWorker("decode-0", Role.DECODE, engine_id="decode-0-engine-2"))

        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await register(g.registry, first)

        assert caught.value.code() is grpc.StatusCode.FAILED_PRECONDITION
        assert ids(g) == ["decode-0-engine-2"]
        await first.kill()


async def test_a_worker_that_lost_its_connection_may_register_again() -> None:
    async with gateway(0, 1) as g:
        client = g.membership.client(EngineId("decode-0-engine-1"))
        assert client is not None
        await client.close()
        await until(lambda: not ids(g))

        await register(g.registry, g["decode-0"])

        assert ids(g) == ["decode-0-engine-1"]


@pytest.mark.parametrize("field", ["model", "revision"])
async def test_a_worker_with_another_model_is_refused_and_logged_once(
    field: str, caplog: pytest.LogCaptureFixture
) -> None:
    async with gateway(1, 0) as g:
        stranger = FakeWorker("decode-0", Role.DECODE, fingerprint=replace(FINGERPRINT, **{field: "other"}))
        with caplog.at_level(logging.ERROR, "cluster.membership"):
            error = await refusal(g, stranger)
            with pytest.raises(grpc.aio.AioRpcError):
                await register(g.registry, stranger)

        assert error.code() is grpc.StatusCode.FAILED_PRECONDITION
        assert field in (error.details() or "")
        assert [record.message for record in caplog.records if "decode-0" in record.message] == [
            f"worker decode-0 (engine decode-0-engine-1) refused: {error.details()}"
        ]
        assert ids(g) == ["prefill-0-engine-1"]


async def test_a_worker_with_another_page_size_is_taken_in_for_routing_to_decide() -> None:
    async with gateway(1, 0) as g:
        await g.add(FakeWorker("decode-0", Role.DECODE, fingerprint=replace(FINGERPRINT, page_size=64)))

        assert len(ids(g)) == 2


async def test_a_worker_that_cannot_be_reached_back_is_told_so() -> None:
    async with gateway(0, 0) as g:
        worker = FakeWorker("decode-0", Role.DECODE)
        await worker.start(g.fabric)
        other = FakeWorker("decode-1", Role.DECODE)
        await other.start(g.fabric)
        g.workers.update({"decode-0": worker, "decode-1": other})
        worker.address = other.address

        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await register(g.registry, worker)

        assert caught.value.code() is grpc.StatusCode.UNAVAILABLE
        assert "decode-1" in (caught.value.details() or "")


async def test_a_worker_that_leaves_is_forgotten_at_once() -> None:
    async with gateway(1, 1) as g:
        await register(g.registry, g["decode-0"], leaving=True)

        assert ids(g) == ["prefill-0-engine-1"]


async def test_role_and_draining_follow_the_watch_stream() -> None:
    async with gateway(2, 0) as g:
        await g["prefill-0"].change(role=Role.DECODE)
        await g["prefill-1"].change(draining=True)

        assert await g.membership.wait_until(
            lambda view: len(view.ready(Role.DECODE)) == 1 and not view.ready(Role.PREFILL), 5.0
        )


async def test_a_worker_can_be_turned_to_the_other_role() -> None:
    async with gateway(1, 0) as g:
        client = g.membership.client(EngineId("prefill-0-engine-1"))
        assert client is not None

        await client.set_role(Role.DECODE)

        assert await g.membership.wait_until(lambda view: len(view.ready(Role.DECODE)) == 1, 5.0)


async def test_open_sequences_are_counted_as_assigned() -> None:
    async with gateway(0, 1) as g:
        client = g.membership.client(EngineId("decode-0-engine-1"))
        assert client is not None
        client.open_sequence(SequenceId("s"), lambda event: None)
        assert g.membership.view().workers[0].num_assigned == 1

        client.close_sequence(SequenceId("s"))

        assert g.membership.view().workers[0].num_assigned == 0


async def test_wait_until_gives_up_after_its_time() -> None:
    async with gateway(0, 0) as g:
        assert not await g.membership.wait_until(lambda view: bool(view.workers), 0.01)


async def test_two_registrations_at_once_join_once() -> None:
    async with gateway(0, 0) as g:
        worker = FakeWorker("decode-0", Role.DECODE)
        await worker.start(g.fabric)
        g.workers["decode-0"] = worker

        await asyncio.gather(*(register(g.registry, worker) for _ in range(4)))

        assert ids(g) == ["decode-0-engine-1"]
        assert len(worker.watchers) == 1


PAIR = (WorkerId("prefill-0"), WorkerId("decode-0"))
PASSED = ProbeReport("tcp", num_bytes=8, exact=True, timed_bytes=8, seconds=1.0)
FAILED = ProbeReport("tcp", error="PeerLost", reason="no answer")


def engines(g: Gateway) -> tuple[EngineId, EngineId]:
    return EngineId(g[PAIR[0]].engine_id), EngineId(g[PAIR[1]].engine_id)


async def test_what_workers_say_of_their_links_is_in_the_view_and_ages() -> None:
    async with gateway(1, 1) as g:
        estimate = LinkEstimate(PAIR[1], ClusterId("test"), "tcp", 4, goodput=1e9, age_s=2.0)
        gone = LinkEstimate(WorkerId("decode-7"), ClusterId("test"), "tcp", 4)
        await g["prefill-0"].change(links=(estimate, gone))
        await until(lambda: g.membership.view().links[PAIR].estimate is not None)

        view = g.membership.view()

        assert set(view.links) == {PAIR}, "workers that are not there have no links"
        assert view.links[PAIR].estimate == estimate
        assert view.links[PAIR].age_s(view.links[PAIR].heard_at + 3.0) == 5.0


async def test_links_leave_the_view_with_their_workers() -> None:
    async with gateway(2, 2) as g:
        assert len(g.membership.view().links) == 4

        await g["prefill-0"].kill()
        await until(lambda: len(g.membership.view().links) == 2)

        assert {sender for sender, _ in g.membership.view().links} == {"prefill-1"}


async def test_without_self_tests_every_link_is_usable() -> None:
    async with gateway(1, 1) as g:
        assert g.membership.view().links[PAIR].usable

        g.membership.note_probe(*engines(g), FAILED)

        assert g.membership.view().links[PAIR].usable
        assert g.membership.view().links[PAIR].probe == FAILED


async def test_with_self_tests_a_link_is_usable_from_the_test_it_passes_to_one_it_fails() -> None:
    async with gateway(1, 1, self_test=True) as g:
        prefill, decode = g.membership.view().ready(Role.PREFILL)[0], g.membership.view().ready(Role.DECODE)[0]
        assert not g.membership.view().can_ship(prefill, decode)
        assert g.membership.view().links[PAIR].reason == "not tested yet"

        g.membership.note_probe(*engines(g), PASSED)
        assert g.membership.view().can_ship(prefill, decode)

        g.membership.note_probe(*engines(g), FAILED)
        assert not g.membership.view().can_ship(prefill, decode)
        assert g.membership.view().links[PAIR].reason == "PeerLost: no answer"
        assert g.membership.probes_by_outcome == {"passed": 1, "PeerLost": 1}


async def test_links_that_only_pulls_use_need_no_self_test() -> None:
    async with gateway(2, 1, self_test=True) as g:
        here = ClusterId("test")
        back = (WorkerId("decode-0"), WorkerId("prefill-1"))
        assert g.membership.view().link(*back) is None

        await g["decode-0"].change(links=(LinkEstimate(WorkerId("prefill-1"), here, "fake", 1),))
        await until(lambda: back in g.membership.view().links)

        assert g.membership.view().links[back].usable
        assert not g.membership.view().links[back[1], back[0]].usable


async def test_a_restarted_worker_and_a_new_role_are_untested() -> None:
    async with gateway(1, 1, self_test=True) as g:
        g.membership.note_probe(*engines(g), PASSED)
        before = engines(g)
        await g["decode-0"].kill()
        await until(lambda: not g.membership.view().links)
        await g.add(FakeWorker("decode-0", Role.DECODE, engine_id="decode-0-engine-2"))

        g.membership.note_probe(*before, PASSED)  # a test that ended late

        assert g.membership.view().links[PAIR].reason == "not tested yet"
        await g.add(FakeWorker("prefill-1", Role.PREFILL))
        await g["prefill-1"].change(role=Role.DECODE)
        await until(lambda: (PAIR[0], WorkerId("prefill-1")) in g.membership.view().links)
        assert not g.membership.view().links[PAIR[0], WorkerId("prefill-1")].usable


HASHES = page_hashes(range(8), 2)
KEYS = tuple(map(page_key, HASHES))


async def test_what_workers_cache_is_indexed_until_they_are_gone() -> None:
    async with gateway(1, 1) as g:
        sender, receiver = engines(g)
        await g["prefill-0"].change(page_events=PageEvents(5, snapshot=True, stored=KEYS[:3]))
        await g["decode-0"].change(page_events=PageEvents(2, snapshot=True, stored=KEYS))
        await until(lambda: g.membership.match_prefix(HASHES).pages_on(receiver) == 4)
        await g["prefill-0"].change(page_events=PageEvents(6, after=5, stored=(KEYS[3],)))
        await until(lambda: g.membership.match_prefix(HASHES).pages_on(sender) == 4)
        await g["prefill-0"].change(page_events=PageEvents(7, after=6, removed=KEYS[2:]))
        await until(lambda: g.membership.match_prefix(HASHES).pages_on(sender) == 2)

        await g["decode-0"].kill()
        await until(lambda: g.membership.match_prefix(HASHES).longest == 2)


async def test_a_worker_whose_page_events_have_a_gap_joins_again(caplog: pytest.LogCaptureFixture) -> None:
    async with gateway(1, 1) as g:
        sender, _ = engines(g)
        await g["prefill-0"].change(page_events=PageEvents(5, snapshot=True, stored=KEYS))
        await until(lambda: g.membership.match_prefix(HASHES).pages_on(sender) == 4)

        await g["prefill-0"].change(page_events=PageEvents(8, after=6, removed=KEYS[2:]))
        await until(lambda: "page events 5 to 6 never came" in caplog.text)
        assert g.membership.match_prefix(HASHES).pages_on(sender) == 0, "what it caches is not known"

        await register(g.registry, g["prefill-0"])
        await g["prefill-0"].change(page_events=PageEvents(8, snapshot=True, stored=KEYS[:2]))
        await until(lambda: g.membership.match_prefix(HASHES).pages_on(sender) == 2)


async def refused_by(own_cluster: str, worker: FakeWorker, first: FakeWorker | None = None) -> str:
    """What a gateway of that cluster, which has taken ``first``, says to the worker."""
    membership = Membership(CONFIG, GATEWAY, WallClock(), InternalGrpc(None), cluster_id=ClusterId(own_cluster))
    registry = await membership.start("127.0.0.1")
    try:
        for other in [first] if first is not None else []:
            await other.start({})
            await register(registry, other)
        await worker.start({})
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await register(registry, worker)
        return f"{caught.value.code().name} {caught.value.details()}"
    finally:
        await membership.close()
        for other in [worker, *([first] if first is not None else [])]:
            await other.kill()


async def test_a_name_that_could_meet_one_of_another_cluster_is_refused_by_its_key() -> None:
    own = FakeWorker("decode-0", Role.DECODE, cluster_id="east")

    alike = FakeWorker("east/prefill-0", Role.PREFILL, cluster_id="east")
    assert "PRECONDITION cluster_id: east is this gateway's own" in await refused_by("east", alike, own)
    plain = FakeWorker("prefill-0", Role.PREFILL, cluster_id="west")
    assert "PRECONDITION worker_id: must be west/NAME" in await refused_by("east", plain, own)
    borrowed = FakeWorker("north/prefill-0", Role.PREFILL, cluster_id="west")
    assert "PRECONDITION worker_id: must be west/NAME" in await refused_by("east", borrowed, own)


async def test_no_other_cluster_says_first_which_model_is_served() -> None:
    early = FakeWorker("west/prefill-0", Role.PREFILL, cluster_id="west")

    assert await refused_by("east", early) == (
        "UNAVAILABLE no worker of east has registered yet: they say which model is served"
    )


async def test_of_two_clusters_with_one_name_the_one_that_is_replaced_hears_what_may_be_wrong() -> None:
    async with gateway(0, 0) as g:
        first = await g.add(FakeWorker("west/prefill-0", Role.PREFILL, cluster_id="west"))
        second = FakeWorker("west/prefill-0", Role.PREFILL, engine_id="another", cluster_id="west")
        await second.start(g.fabric)
        g.workers["second"] = second
        await register(g.registry, second)

        with pytest.raises(grpc.aio.AioRpcError, match="do two clusters that joined have one cluster_id"):
            await register(g.registry, first)


async def test_a_registry_port_in_use_is_an_error_of_the_configuration() -> None:
    async with gateway(0, 0) as g:
        port = int(g.registry.rpartition(":")[2])
        another = Membership(CONFIG, GATEWAY, WallClock(), InternalGrpc(None))

        with pytest.raises(InvalidConfig, match=r"registry\.port"):
            await another.start("127.0.0.1", port)
        await another.close()


async def test_workers_and_links_of_two_clusters_are_in_the_view_and_can_be_looked_at_apart() -> None:
    async with gateway(1, 1) as g:
        far = await g.add(FakeWorker("west/prefill-0", Role.PREFILL, cluster_id="west"))
        crossing = LinkEstimate(WorkerId("decode-0"), ClusterId("local"), "tcp", 4, throughput=5e6, goodput=1e7)
        await far.change(links=(crossing,))
        pair = (WorkerId("west/prefill-0"), WorkerId("decode-0"))
        await until(lambda: (link := g.membership.view().links.get(pair)) is not None and link.estimate is not None)
        view = g.membership.view()

        assert (view.links[pair].from_cluster, view.links[pair].to_cluster) == ("west", "local")
        sums = by_cluster_pair(view, lambda source, _: 2e7 if source == "west" else None)
        within, over = sums  # local to local, west to local
        assert (over.from_cluster, over.to_cluster, over.capacity) == ("west", "local", 2e7)
        assert (over.throughput, over.utilisation, within.throughput) == (5e6, 0.25, 0.0)
        assert [w.worker_id for w in view.within(ClusterId("local")).workers] == ["decode-0", "prefill-0"]
        assert list(view.within(ClusterId("local")).links) == [("prefill-0", "decode-0")]
        assert view.within(ClusterId("west")).links == {}


class Listener:
    """Notes what it hears."""

    def __init__(self) -> None:
        self.joined: list[str] = []
        self.steps: list[tuple[str, StepSample]] = []
        self.tested: list[tuple[str, str, bool]] = []

    def worker_joined(self, worker: WorkerDescription) -> None:
        self.joined.append(worker.worker_id)

    def steps_measured(self, worker: WorkerDescription, steps: Sequence[StepSample]) -> None:
        self.steps += [(worker.worker_id, step) for step in steps]

    def link_tested(self, sender: WorkerDescription, receiver: WorkerDescription, report: ProbeReport) -> None:
        self.tested.append((sender.worker_id, receiver.worker_id, report.passed))


async def test_a_listener_hears_of_workers_steps_and_links() -> None:
    listener, step = Listener(), StepSample(3, 4.5, 0, 0, 0.25)
    async with gateway(1, 1, listener=listener) as g:
        assert listener.joined == ["prefill-0", "decode-0"]
        await g["prefill-0"].change(steps=(step,))
        await until(lambda: listener.steps)
        assert listener.steps == [("prefill-0", step)]
        report = ProbeReport("tcp", 10, True, 10, 0.5)
        g.membership.note_probe(EngineId("prefill-0-engine-1"), EngineId("decode-0-engine-1"), report)
        assert listener.tested == [("prefill-0", "decode-0", True)]


async def test_a_worker_is_the_same_object_in_every_view_until_something_of_it_changes() -> None:
    async with gateway(1, 1) as g:
        decode, prefill = g.membership.view().workers
        client = g.membership.client(prefill.engine_id)
        assert client is not None
        client.open_sequence(SequenceId("s"), lambda _: None, Assignment(tokens=5, kv_tokens=9))

        now_decode, now_prefill = g.membership.view().workers

        assert now_decode is decode
        assert now_prefill is not prefill
        sent = (now_prefill.num_unreported, now_prefill.unreported_tokens, now_prefill.unreported_kv_tokens)
        assert sent == (1, 5, 9)


async def test_costs_and_the_planners_word_are_in_the_next_view() -> None:
    async with gateway(1, 1) as g:
        costs, offload = CostView({}, {}), Offload(100.0, abundant=True, reason="a test")
        g.membership.note_costs(costs)
        g.membership.note_offload(offload)
        assert g.membership.view().costs is costs
        assert g.membership.view().offload is offload
