"""Whatever happened to the workers, a live view is the view that would be made of them from nothing."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from cluster.cost_model import NO_COSTS
from cluster.live_view import LiveView
from cluster.view import NO_OFFLOAD, ClusterView, LinkView, WorkerLoad, WorkerPool, WorkerView
from core.link import LinkEstimate, ProbeReport
from core.request import ClusterId, EngineId, Role, WorkerId
from tests.unit.cluster.test_routing_policy import other_layout, other_page_size
from tests.unit.cluster.test_routing_policy import worker as made_worker

WORKERS = [WorkerId(f"w{index}") for index in range(6)]
NAMES = st.sampled_from(WORKERS)
PASSED, FAILED = ProbeReport("tcp", num_bytes=8, exact=True), ProbeReport("tcp", error="PeerLost", reason="cut")


def estimate(worker_id: WorkerId) -> LinkEstimate:
    return LinkEstimate(worker_id, ClusterId("test"), "tcp", 1)


class LiveViewMachine(RuleBasedStateMachine):
    """``expected`` is what was told last; from it a view is made with plain dictionaries."""

    @property
    def self_test(self) -> bool:
        return True

    def __init__(self) -> None:
        super().__init__()
        self.live = LiveView(self_test=self.self_test)
        self.now = 0.0
        self.num_engines = 0
        self.workers: dict[WorkerId, WorkerView] = {}
        self.heard: dict[WorkerId, tuple[tuple[LinkEstimate, ...], float]] = {}
        self.probes: dict[tuple[EngineId, EngineId], tuple[ProbeReport, float]] = {}

    def put(self, worker: WorkerView, estimates: tuple[LinkEstimate, ...], heard_at: float) -> None:
        self.workers[worker.worker_id] = worker
        self.heard[worker.worker_id] = estimates, heard_at
        self.live.put(worker, estimates, heard_at)

    @rule(name=NAMES, role=st.sampled_from(Role), kind=st.integers(0, 2))
    def join(self, name: WorkerId, role: Role, kind: int) -> None:
        if name in self.workers:
            self.lose(name)
        self.num_engines += 1
        worker = made_worker(name, role, engine_id=EngineId(f"e{self.num_engines}"), lease_expires_at=self.now + 5)
        self.put((worker, other_layout(worker), other_page_size(worker))[kind], (), self.now)

    @precondition(lambda self: self.workers)
    @rule(data=st.data())
    def leave(self, data: st.DataObject) -> None:
        self.lose(data.draw(st.sampled_from(sorted(self.workers))))

    def lose(self, name: WorkerId) -> None:
        engine = self.workers.pop(name).engine_id
        del self.heard[name]
        self.probes = {pair: report for pair, report in self.probes.items() if engine not in pair}
        self.live.remove(name)

    @precondition(lambda self: self.workers)
    @rule(data=st.data(), load=st.builds(WorkerLoad, st.integers(0, 9), st.integers(0, 9), st.integers(0, 99)))
    def report(self, data: st.DataObject, load: WorkerLoad) -> None:
        """What a Watch message changes."""
        before = self.workers[data.draw(st.sampled_from(sorted(self.workers)))]
        role = data.draw(st.sampled_from([before.role, before.role, *Role]))
        draining = data.draw(st.sampled_from([before.draining, before.draining, True, False]))
        known = tuple(map(estimate, data.draw(st.sets(NAMES, max_size=2))))
        worker = replace(before, load=load, role=role, draining=draining, lease_expires_at=self.now + 5)
        self.put(worker, known, self.now)

    @precondition(lambda self: self.workers)
    @rule(data=st.data(), num_assigned=st.integers(0, 9))
    def assign(self, data: st.DataObject, num_assigned: int) -> None:
        name = data.draw(st.sampled_from(sorted(self.workers)))
        self.put(replace(self.workers[name], num_assigned=num_assigned), *self.heard[name])

    @precondition(lambda self: self.workers)
    @rule(data=st.data(), report=st.sampled_from([PASSED, PASSED, FAILED]))
    def probe(self, data: st.DataObject, report: ProbeReport) -> None:
        names = st.sampled_from(sorted(self.workers))
        sender, receiver = data.draw(names), data.draw(names)
        self.probes[self.workers[sender].engine_id, self.workers[receiver].engine_id] = report, self.now
        self.live.note_probe(sender, receiver, report, self.now)

    @rule(seconds=st.sampled_from([0.0, 1.0, 6.0]))
    def wait(self, seconds: float) -> None:
        """Leases may run out; whoever is late is not dropped for that."""
        self.now += seconds

    def expected(self) -> ClusterView:
        links = {}
        for sender in self.workers.values():
            estimates, heard_at = self.heard[sender.worker_id]
            for receiver in self.workers.values():
                known = next((e for e in estimates if e.worker_id == receiver.worker_id), None)
                ships = (sender.role, receiver.role) == (Role.PREFILL, Role.DECODE)
                if known is None and not ships:
                    continue
                probe, probed_at = self.probes.get((sender.engine_id, receiver.engine_id), (None, -np.inf))
                reason = ""
                if self.self_test and probe is None and ships:
                    reason = "not tested yet"
                elif self.self_test and probe is not None and not probe.passed:
                    reason = f"{probe.error}: {probe.reason}"
                pair = sender.worker_id, receiver.worker_id
                link = LinkView(pair[0], sender.cluster_id, pair[1], receiver.cluster_id, heard_at, known, probe)
                links[pair] = replace(link, usable=not reason, reason=reason, probed_at=probed_at)
        return ClusterView(self.now, tuple(worker for _, worker in sorted(self.workers.items())), links)

    @invariant()
    def the_view_is_as_if_made_from_nothing(self) -> None:
        self.check(self.live.view(self.now, NO_COSTS, NO_OFFLOAD), self.expected())
        late = [w.lease_expires_at for w in self.workers.values() if w.lease_expires_at > self.now]
        assert self.live.next_expiry_at == min(late, default=np.inf)

    def check(self, view: ClusterView, expected: ClusterView) -> None:
        assert view == expected
        assert len(view.links) == len(expected.links)
        for role in Role:
            assert same(view.pools.of(role), expected.pools.of(role))
        assert may_ship(view) == may_ship(expected)
        for prefill in view.ready(Role.PREFILL):
            for decode in view.ready(Role.DECODE):
                compatible = prefill.model.fingerprint.compatible(decode.model.fingerprint)
                allowed = compatible and view.can_ship(prefill, decode)
                assert ((prefill.worker_id, decode.worker_id) in may_ship(view)) == allowed


class LiveViewSeldomLookedAt(LiveViewMachine):
    """Views are made at every step and looked at later, in whatever order."""

    def __init__(self) -> None:
        super().__init__()
        self.kept: list[tuple[ClusterView, ClusterView]] = []

    @invariant()
    def the_view_is_as_if_made_from_nothing(self) -> None:
        self.kept.append((self.live.view(self.now, NO_COSTS, NO_OFFLOAD), self.expected()))

    @precondition(lambda self: self.kept)
    @rule(data=st.data())
    def look(self, data: st.DataObject) -> None:
        self.check(*self.kept.pop(data.draw(st.integers(0, len(self.kept) - 1))))

    def teardown(self) -> None:
        for view, expected in self.kept:
            self.check(view, expected)


class LiveViewWithoutSelfTests(LiveViewMachine):
    @property
    def self_test(self) -> bool:
        return False


def same(pool: WorkerPool, other: WorkerPool) -> bool:
    return (
        pool.workers == other.workers
        and np.array_equal(pool.numbers, other.numbers)
        and pool.roster.position_of == other.roster.position_of
        and np.array_equal(pool.roster.page_sizes, other.roster.page_sizes)
    )


def may_ship(view: ClusterView) -> set[tuple[WorkerId, WorkerId]]:
    pools = view.pools
    return {
        (prefill.worker_id, decode.worker_id)
        for p, prefill in enumerate(pools.prefill.workers)
        for d, decode in enumerate(pools.decode.workers)
        if pools.may_ship is None or pools.may_ship[p, d]
    }


TestLiveView = LiveViewMachine.TestCase
TestLiveView.settings = settings(max_examples=25, deadline=None)
TestLiveViewSeldomLookedAt = LiveViewSeldomLookedAt.TestCase
TestLiveViewSeldomLookedAt.settings = settings(max_examples=15, stateful_step_count=25, deadline=None)
TestLiveViewWithoutSelfTests = LiveViewWithoutSelfTests.TestCase
TestLiveViewWithoutSelfTests.settings = settings(max_examples=10, deadline=None)


def test_a_view_stays_as_it_was_whatever_comes_after_it() -> None:
    live = LiveView(self_test=True)
    prefill, decode = made_worker("p", Role.PREFILL), made_worker("d", Role.DECODE)
    live.put(prefill, (), 0.0)
    live.put(decode, (), 0.0)
    before = live.view(1.0, NO_COSTS, NO_OFFLOAD)

    live.note_probe(prefill.worker_id, decode.worker_id, PASSED, 1.5)
    live.put(replace(prefill, num_assigned=7), (estimate(decode.worker_id),), 2.0)
    after = live.view(2.0, NO_COSTS, NO_OFFLOAD)
    live.remove(decode.worker_id)
    live.view(3.0, NO_COSTS, NO_OFFLOAD)

    link = before.link(prefill.worker_id, decode.worker_id)
    assert link is not None
    assert (link.usable, link.reason, link.estimate, link.heard_at) == (False, "not tested yet", None, 0.0)
    assert before.pools.prefill.num_assigned.tolist() == [0]
    assert may_ship(before) == set()
    assert may_ship(after) == {(prefill.worker_id, decode.worker_id)}
    assert after.pools.prefill.num_assigned.tolist() == [7]
    assert len(after.links) == 1
