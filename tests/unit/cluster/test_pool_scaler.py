"""Pools brought to their sizes, by a fleet that does what a test says: no Ray, no process, a clock set by hand."""

from __future__ import annotations

import itertools
import logging
import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace

import pytest

from cluster.config import PoolConfig
from cluster.planning_policy import PoolSizes
from cluster.pool_scaler import Ended, Phase, PoolScaler, WorkerPhase, choose_to_drain
from cluster.scaling_policy import ScalingSettings
from cluster.view import ClusterView, LinkView, WorkerLoad, WorkerView
from core.clock import VirtualClock
from core.errors import InvalidRequest
from core.request import ClusterId, EngineId, Role, WorkerId
from tests.unit.cluster.fake_fleet import MODEL

HERE = ClusterId("local")
SETTINGS = ScalingSettings(placement_timeout_s=30, retry_s=10, max_retry_s=25, drain_timeout_s=60, max_pending=2)
START_TIMEOUT_S = 100.0


@dataclass
class Process:
    """One worker as Ray and the gateway see it."""

    pool: Role
    role: Role
    phase: WorkerPhase = WorkerPhase(Phase.PLACING)  # noqa: RUF009 (frozen)
    load: WorkerLoad = field(default_factory=WorkerLoad)
    retired: float | None = None  # the time that it was given to drain

    @property
    def serves(self) -> bool:
        return self.phase.phase is Phase.UP


@dataclass
class Service:
    """A fleet and a membership; ``room``: workers for which there is a machine."""

    room: int = 99
    processes: dict[WorkerId, Process] = field(default_factory=dict)
    removed: list[WorkerId] = field(default_factory=list)
    links: dict[tuple[WorkerId, WorkerId], LinkView] = field(default_factory=dict)

    async def members(self) -> Mapping[WorkerId, Role]:
        return {name: process.pool for name, process in self.processes.items()}

    async def add(self, role: Role) -> WorkerId:
        names = (WorkerId(f"{role}-{index}") for index in itertools.count())
        name = next(name for name in names if name not in self.processes)
        self.processes[name] = Process(role, role)
        self.place()
        return name

    async def phases(self) -> Mapping[WorkerId, WorkerPhase]:
        return {name: process.phase for name, process in self.processes.items()}

    async def retire(self, worker_id: WorkerId, timeout_s: float) -> None:
        self.processes[worker_id].retired = timeout_s

    async def remove(self, worker_id: WorkerId) -> None:
        del self.processes[worker_id]
        self.removed.append(worker_id)
        self.place()

    def view(self) -> ClusterView:
        workers = sorted((n, p) for n, p in self.processes.items() if p.serves)
        return ClusterView(
            0.0, tuple(worker(name, p.role, p.load, p.retired is not None) for name, p in workers), self.links
        )

    def place(self) -> None:
        """Where there is room, as a cluster would."""
        waiting = [p for p in self.processes.values() if p.phase.phase is Phase.PLACING]
        for process in waiting[: max(0, self.room - len(self.processes) + len(waiting))]:
            process.phase = WorkerPhase(Phase.STARTING)

    def come_up(self) -> None:
        """Those that have a place are ready."""
        for process in self.processes.values():
            if process.phase.phase is Phase.STARTING:
                process.phase = WorkerPhase(Phase.UP)


def worker(name: str, role: Role, load: WorkerLoad | None = None, draining: bool = False) -> WorkerView:
    return WorkerView(
        worker_id=WorkerId(name),
        engine_id=EngineId(f"{name}-e"),
        cluster_id=HERE,
        address="nowhere",
        role=role,
        draining=draining,
        lease_expires_at=math.inf,
        model=MODEL,
        transport="fake",
        pages_total=100,
        load=load or WorkerLoad(),
    )


@dataclass
class Running:
    """A scaler at work on a service."""

    service: Service
    scaler: PoolScaler
    clock: VirtualClock

    async def pass_time(self, seconds: float = 1.0, step_s: float = 1.0) -> None:
        for _ in range(round(seconds / step_s)):
            self.clock.advance(step_s)
            await self.scaler.look()

    @property
    def ended(self) -> dict[tuple[Role, Ended], int]:
        return dict(self.scaler.ended)


async def running(decode: PoolConfig, prefill: PoolConfig | None = None, room: int = 99) -> Running:
    """The first workers are ready; ``prefill`` None: one worker that is none of the scaler's affair."""
    service, clock = Service(room), VirtualClock(100.0)
    pools = {Role.DECODE: decode} | ({Role.PREFILL: prefill} if prefill else {})
    for role, config in pools.items():
        for _ in range(config.count):
            await service.add(role)
    service.come_up()
    scaler = PoolScaler(service, service, pools, SETTINGS, START_TIMEOUT_S, clock)
    await scaler.start()
    await scaler.close()  # the test looks, when it wants to
    if prefill is None:
        service.processes[WorkerId("fixed")] = Process(Role.PREFILL, Role.PREFILL, WorkerPhase(Phase.UP))
    return Running(service, scaler, clock)


def decode(size: int) -> PoolSizes:
    return PoolSizes({Role.DECODE: size}, give_back=Role.DECODE)


async def test_a_worker_is_asked_for_is_pending_and_is_ready_when_it_is_in_the_view() -> None:
    run = await running(PoolConfig(count=1, max_replicas=3))
    run.scaler.aim(decode(2))
    await run.pass_time(5)

    status = run.scaler.status[Role.DECODE]
    assert (status.wanted, status.ready[Role.DECODE], status.pending) == (2, 1, (("decode-1", "starting", 101.0),))
    assert run.scaler.views()[Role.DECODE].num_pending == 1
    run.service.come_up()
    await run.pass_time(1)

    status = run.scaler.status[Role.DECODE]
    assert (status.ready[Role.DECODE], status.pending, status.start_s) == (2, (), 5.0)
    assert run.ended == {(Role.DECODE, Ended.STARTED): 1}
    await run.pass_time(100)
    assert len(run.service.processes) == 3, "and nothing more"


async def test_no_more_are_on_their_way_than_may_be_and_what_is_wanted_no_more_is_withdrawn_the_youngest_first() -> (
    None
):
    run = await running(PoolConfig(count=1, max_replicas=9))
    run.scaler.aim(decode(6))
    await run.pass_time(3)
    assert [name for name, *_ in run.scaler.status[Role.DECODE].pending] == ["decode-1", "decode-2"]

    run.scaler.aim(decode(2))
    await run.pass_time(1)

    assert [name for name, *_ in run.scaler.status[Role.DECODE].pending] == ["decode-1"]
    assert run.ended == {(Role.DECODE, Ended.WITHDRAWN): 1}
    assert run.service.processes.keys() == {"decode-0", "decode-1", "fixed"}


async def test_what_finds_no_room_is_given_up_said_and_asked_for_again_later_and_later(
    caplog: pytest.LogCaptureFixture,
) -> None:
    run = await running(PoolConfig(count=1, max_replicas=2), room=2)  # the fixed worker has the second place
    asked: list[float] = []
    run.scaler.aim(decode(2))
    with caplog.at_level(logging.INFO):
        for _ in range(180):
            before = run.service.processes.keys()
            had = "decode-1" in before
            await run.pass_time(1)
            if not had and "decode-1" in run.service.processes:
                asked.append(run.clock.now())

    waits = [later - earlier - 31 for earlier, later in itertools.pairwise(asked)]
    assert waits == [10, 20, 25], "after 31 s each, the first whole second beyond the timeout"
    assert run.ended == {(Role.DECODE, Ended.UNPLACED): 4}
    status = run.scaler.status[Role.DECODE]
    assert (status.wanted, status.ready[Role.DECODE]) == (2, 1), "the target stays"
    assert status.problem == "decode-1: unplaced: no machine has room for it after 30 s"
    assert status.retry_at is not None
    assert (
        "worker decode-1: unplaced: no machine has room for it after 30 s; the next is asked for in 10 s" in caplog.text
    )

    run.service.room = 9
    await run.pass_time(40)
    run.service.come_up()
    await run.pass_time(1)
    assert (run.scaler.status[Role.DECODE].problem, run.scaler.status[Role.DECODE].retry_at) == ("", None)


@pytest.mark.parametrize(
    ("phase", "ended", "said"),
    [
        (WorkerPhase(Phase.FAILED, "OSError: no space left"), Ended.FAILED, "decode-1: failed: OSError: no space left"),
        (WorkerPhase(Phase.STARTING), Ended.NOT_READY, "it is not ready 100 s after it was placed"),
    ],
)
async def test_a_start_that_fails_or_never_ends_is_given_up(phase: WorkerPhase, ended: Ended, said: str) -> None:
    run = await running(PoolConfig(count=1, max_replicas=2))
    run.scaler.aim(decode(2))
    await run.pass_time(1)
    run.service.processes[WorkerId("decode-1")].phase = phase
    await run.pass_time(102)

    assert run.ended[Role.DECODE, ended] >= 1
    assert said in run.scaler.status[Role.DECODE].problem


async def test_the_least_used_worker_drains_and_leaves_only_when_it_has_stopped() -> None:
    run = await running(PoolConfig(count=3, min_replicas=1))
    for name, busy in (("decode-0", 2), ("decode-1", 1), ("decode-2", 3)):
        run.service.processes[WorkerId(name)].load = WorkerLoad(num_running=busy)
    run.scaler.aim(decode(1))
    await run.pass_time(20)

    status = run.scaler.status[Role.DECODE]
    assert (status.ready[Role.DECODE], status.draining) == (2, (("decode-1", 101.0),)), "one at a time"
    assert run.service.processes[WorkerId("decode-1")].retired == SETTINGS.drain_timeout_s
    run.service.processes[WorkerId("decode-1")].phase = WorkerPhase(Phase.STOPPED)
    await run.pass_time(1)

    assert run.service.removed == ["decode-1"]
    assert run.scaler.status[Role.DECODE].draining == (("decode-0", 121.0),)
    assert run.ended == {(Role.DECODE, Ended.DRAINED): 1}


async def test_one_that_does_not_stop_in_time_or_dies_meanwhile_is_cut_short_and_said() -> None:
    run = await running(PoolConfig(count=2, min_replicas=1))
    run.scaler.aim(decode(1))
    await run.pass_time(60)
    assert not run.service.removed
    await run.pass_time(10)
    assert run.service.removed == ["decode-1"]
    assert run.ended == {(Role.DECODE, Ended.CUT_SHORT): 1}

    run = await running(PoolConfig(count=2, min_replicas=1))
    run.scaler.aim(decode(1))
    await run.pass_time(2)
    run.service.processes[WorkerId("decode-1")].phase = WorkerPhase(Phase.STOPPED, "The actor died")
    await run.pass_time(1)
    assert run.ended == {(Role.DECODE, Ended.CUT_SHORT): 1}


async def test_a_worker_that_dies_is_counted_is_pending_and_is_no_reason_for_another() -> None:
    run = await running(PoolConfig(count=2, min_replicas=1, max_replicas=3))
    died = run.service.processes[WorkerId("decode-1")]
    died.phase = WorkerPhase(Phase.STARTING)
    await run.pass_time(5)

    status = run.scaler.status[Role.DECODE]
    assert [name for name, *_ in status.pending] == ["decode-1"]
    assert run.ended == {(Role.DECODE, Ended.DIED): 1}
    assert len(run.service.processes) == 3
    died.phase = WorkerPhase(Phase.UP)
    await run.pass_time(5)
    assert run.scaler.status[Role.DECODE].ready[Role.DECODE] == 2
    assert run.scaler.status[Role.DECODE].start_s is None, "a restart is not a start that was asked for"


async def test_an_operators_size_is_held_within_the_bounds_until_it_is_given_back() -> None:
    run = await running(PoolConfig(count=1, max_replicas=3))

    assert run.scaler.hold(Role.DECODE, 3) == "decode: 1 to 3 workers, held until: prfaas scale decode auto"
    run.scaler.aim(decode(1))
    await run.pass_time(1)
    assert run.scaler.status[Role.DECODE].wanted == 3
    for size in (0, 4):
        with pytest.raises(InvalidRequest, match=r"replicas: must be from min_replicas 1 to max_replicas 3"):
            run.scaler.hold(Role.DECODE, size)
    with pytest.raises(InvalidRequest, match="the prefill pool has a fixed size"):
        run.scaler.hold(Role.PREFILL, 1)
    assert "follows the load again, from 3 workers" in run.scaler.hold(Role.DECODE, None)
    run.scaler.aim(decode(2))
    assert run.scaler.status[Role.DECODE].wanted == 2


async def test_the_last_worker_that_decodes_never_drains_and_that_is_said_once(
    caplog: pytest.LogCaptureFixture,
) -> None:
    run = await running(PoolConfig(count=1, max_replicas=2), PoolConfig(count=2, min_replicas=0))
    # the decode pool's own worker has become a prefill worker, one of the prefill pool decodes
    run.service.processes[WorkerId("decode-0")].role = Role.PREFILL
    run.service.processes[WorkerId("prefill-0")].role = Role.DECODE
    run.scaler.aim(PoolSizes({Role.PREFILL: 0}, give_back=Role.PREFILL))
    with caplog.at_level(logging.WARNING):
        await run.pass_time(1)
        run.service.processes[WorkerId("prefill-1")].phase = WorkerPhase(Phase.STOPPED)
        await run.pass_time(50)

    assert run.service.removed == ["prefill-1"]
    assert caplog.text.count("but each of its workers is the last one of its role") == 1


def test_who_drains() -> None:
    workers = (
        worker("decode-0", Role.DECODE, WorkerLoad(num_running=1, pages_cached=5)),
        worker("decode-1", Role.DECODE, WorkerLoad(num_running=1, pages_cached=2)),
        worker("decode-2", Role.DECODE, WorkerLoad(num_running=0), draining=True),
        worker("prefill-0", Role.PREFILL, WorkerLoad(num_sessions=9)),
        worker("prefill-1", Role.PREFILL, WorkerLoad(num_sessions=8)),
    )
    view = ClusterView(0.0, workers, {})
    names = [w.worker_id for w in workers]

    def chosen(
        role: Role | None, pool: list[WorkerId] = names, of: ClusterView = view, on: Mapping[str, str] = {}
    ) -> str:
        machines = {WorkerId(name): machine for name, machine in on.items()}
        found = choose_to_drain(of, pool, role, may_be_empty=False, machines=machines)
        return found if isinstance(found, str) else found.worker_id

    assert chosen(None) == "decode-1", "fewer cached pages"
    assert chosen(Role.PREFILL) == "prefill-1", "fewer sequences"
    assert chosen(Role.PREFILL, names[:3]) == "decode-1", "the pool has none of that role"
    assert chosen(None, []) == "none of its workers is ready"
    on = {"decode-0": "a", "decode-1": "b", "prefill-0": "b", "prefill-1": "b"}
    assert chosen(None, on=on) == "decode-0", "it has more than decode-1, but its machine comes free"
    assert chosen(None, on={"prefill-0": "a"}) == "prefill-0", "the machines of the others stay"
    links = {
        (p.worker_id, d.worker_id): LinkView(
            p.worker_id,
            HERE,
            d.worker_id,
            HERE,
            0.0,
            usable=d.worker_id == "decode-1",
            reason="it failed its self-test",
        )
        for p in workers[3:]
        for d in workers[:3]
    }
    assert chosen(None, of=replace(view, links=links)) == "decode-0", "decode-1 is the only one that can be shipped to"
    assert chosen(None, [WorkerId("decode-1")], replace(view, links=links)).startswith("without any of its workers")
