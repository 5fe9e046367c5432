"""Who starts and gives back workers, so that each pool has as many as it should? The carrier of ``PoolSizes``.

    target    the planner's (scaling_policy.py), or an operator's (``hold``, behind `prfaas scale`)
    more      ask Ray for one: a pending placement group, which an autoscaler answers with a machine; it is ready when
              it is in the view. No room within ``placement_timeout_s``, a start that fails, or one that takes longer
              than ``start_timeout_s``: it is given up, counted and said, and asked for again after a back-off
    fewer     one that is not ready is given up first; else one drains, chosen so that a machine comes free, and then
              by use: it is routed nothing new, ends what it has (``drain_timeout_s``; what is left then is continued
              on other workers), gives its pages to whoever is pulling them, leaves; then its placement group is
              removed, so that the machine may go

A worker of an elastic pool that dies is started again by Ray under its name; that is counted, and it is pending until
it is back. Everything happens on the gateway's loop; the fleet's own calls are its affair (``PoolFleet``).

Invariants: a target is clamped to the pool's bounds; one worker drains at a time; the last worker that decodes never
does, nor the last that K/V can be shipped to or from, and the last one that prefills only if its pool may be empty;
every end of a start or a drain is counted once.
"""

from __future__ import annotations

import asyncio
import logging
import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Protocol

from cluster.config import PoolConfig
from cluster.planning_policy import PoolSizes
from cluster.scaling_policy import PoolView, ScalingSettings
from cluster.view import ClusterView, WorkerView
from core.clock import Clock
from core.errors import InvalidRequest
from core.request import Role, WorkerId

logger = logging.getLogger(__name__)

LOOK_S = 0.5  # between two looks at what Ray has done
_STOP_SLACK_S = 5.0  # a worker has stopped so long after its time to drain, or will not
_START_MEMORY = 0.5  # weight of the last start in the measured seconds of one


class Phase(StrEnum):
    """How far a worker's process is, as the fleet knows it."""

    PLACING = "placing"  # no machine has room for it yet
    STARTING = "starting"  # it has its place, and loads the model
    UP = "up"
    FAILED = "failed"  # it will not start
    STOPPED = "stopped"  # it was asked to stop and has, or it died meanwhile


@dataclass(frozen=True, slots=True)
class WorkerPhase:
    """``said``: why it failed, or how it stopped if not in order. ``machine``: names the one that it is on, if that may
    be given back once nothing is on it; empty: it is on one that stays, as Ray's head does, or on none yet."""

    phase: Phase
    said: str = ""
    machine: str = ""


class PoolFleet(Protocol):
    """Starts and ends single workers of elastic pools."""

    async def members(self) -> Mapping[WorkerId, Role]:
        """The workers of elastic pools that there are, ready or not, and the pool of each."""
        ...

    async def add(self, role: Role) -> WorkerId:
        """Ask for one more worker of a pool; returns its name at once, whether there is room for it or not."""
        ...

    async def phases(self) -> Mapping[WorkerId, WorkerPhase]:
        """How far each of them is."""
        ...

    async def retire(self, worker_id: WorkerId, timeout_s: float) -> None:
        """Ask it to drain and stop within so long; ``phases`` says when it has."""
        ...

    async def remove(self, worker_id: WorkerId) -> None:
        """End its process if it still runs, and give back what was reserved for it."""
        ...


class ScalerMembership(Protocol):
    """What a scaler needs of ``Membership``."""

    def view(self) -> ClusterView: ...


class Ended(StrEnum):
    """How a start or a drain ended."""

    STARTED = "started"
    UNPLACED = "unplaced"  # Ray found no room in time
    FAILED = "failed"  # the process could not start
    NOT_READY = "not_ready"  # it was placed, and not ready in time
    WITHDRAWN = "withdrawn"  # not needed any more before it was ready
    DRAINED = "drained"
    CUT_SHORT = "cut_short"  # its time to drain was over, or it died meanwhile: others continue what it had
    DIED = "died"  # it was ready; Ray starts it again


_FAILURES = frozenset({Ended.UNPLACED, Ended.FAILED, Ended.NOT_READY})


@dataclass(frozen=True, slots=True)
class PoolStatus:
    """One pool now. Seconds are the gateway's Clock's."""

    least: int
    most: int
    wanted: int
    ready: Mapping[Role, int]
    pending: tuple[tuple[WorkerId, str, float], ...]  # name, placing or starting, since when
    draining: tuple[tuple[WorkerId, float], ...]  # name, since when
    held: int | None
    start_s: float | None  # that starts took
    retry_at: float | None  # nothing is asked for before; None: no start has failed lately
    problem: str  # why the last start failed; empty: it did not


@dataclass
class _Worker:
    """One worker of an elastic pool."""

    pool: Role
    since: float  # it was asked for, lost, or began to drain
    phase: Phase = Phase.PLACING
    said: str = ""  # of it: why it failed, or how it stopped if not in order
    machine: str = ""  # likewise
    placed_at: float | None = None
    ready: bool = False
    draining: bool = False
    first: bool = True  # it was never ready: its start is one to measure


@dataclass
class _Pool:
    """One elastic pool."""

    config: PoolConfig
    wanted: int
    held: int | None = None
    give_back: Role | None = None  # of which role one goes, if one does; None: whichever
    start_s: float | None = None
    retry_at: float | None = None
    wait_s: float = 0.0  # the last back-off
    problem: str = ""


class PoolScaler:
    """Keeps the sizes of the elastic pools of one service. The one owner of their targets."""

    def __init__(
        self,
        fleet: PoolFleet,
        membership: ScalerMembership,
        pools: Mapping[Role, PoolConfig],
        settings: ScalingSettings,
        start_timeout_s: float,
        clock: Clock,
    ) -> None:
        """``pools``: those that are elastic."""
        self._fleet = fleet
        self._membership = membership
        self._settings = settings
        self._start_timeout_s = start_timeout_s
        self._clock = clock
        self._pools = {role: _Pool(config, config.count) for role, config in pools.items()}
        self._workers: dict[WorkerId, _Worker] = {}
        self._ended: Counter[tuple[Role, Ended]] = Counter()
        self._stuck = ""  # why nothing can drain although a pool is too large; said once
        self._task: asyncio.Task[None] | None = None

    # ---- what others read ----

    @property
    def status(self) -> Mapping[Role, PoolStatus]:
        """A snapshot of each pool."""
        return {role: self._status(role, pool) for role, pool in self._pools.items()}

    @property
    def ended(self) -> Mapping[tuple[Role, Ended], int]:
        """Starts and drains by how they ended."""
        return dict(self._ended)

    def views(self) -> Mapping[Role, PoolView]:
        """What the policy sees."""
        return {
            role: PoolView(
                status.least,
                status.most,
                status.wanted,
                status.ready,
                num_pending=len(status.pending),
                num_draining=len(status.draining),
                held=status.held,
                start_s=status.start_s,
            )
            for role, status in self.status.items()
        }

    # ---- what changes a target ----

    def aim(self, sizes: PoolSizes) -> None:
        """The planner's target; pools that an operator holds keep theirs."""
        for role, size in sizes.sizes.items():
            pool = self._pools[role]
            if pool.held is None:
                self._want(pool, size, sizes.give_back)

    def hold(self, role: Role, size: int | None) -> str:
        """An operator's target, kept until it is None again; what to answer. ``InvalidRequest`` beyond the bounds."""
        pool = self._pools.get(role)
        if pool is None:
            raise InvalidRequest(
                "pool", f"the {role} pool has a fixed size: set {role}.min_replicas and {role}.max_replicas"
            )
        least, most = pool.config.least, pool.config.most
        if size is None:
            pool.held = None
            said = f"{role}: follows the load again, from {pool.wanted} workers, within {least} to {most}"
        elif not least <= size <= most:
            bounds = f"min_replicas {least} to max_replicas {most}"
            raise InvalidRequest("replicas", f"must be from {bounds} of the {role} pool, got {size}")
        else:
            before, pool.held, pool.retry_at, pool.wait_s = pool.wanted, size, None, 0.0
            self._want(pool, size, None)
            said = f"{role}: {before} to {size} workers, held until: prfaas scale {role} auto"
        logger.info("scale: an operator: %s", said)
        return said

    # ---- its life ----

    async def start(self) -> None:
        """Begin; the fleet's first workers are ready, or on their way."""
        assert self._task is None, "started already"
        now = self._clock.now()
        for worker_id, role in (await self._fleet.members()).items():
            self._workers[worker_id] = _Worker(role, now, first=False)
        self._note_view(now)
        self._task = asyncio.create_task(self._keep())

    async def close(self) -> None:
        """End; the workers stay as they are."""
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)

    async def look(self) -> None:
        """One turn: what has happened, then one step towards each target."""
        self._note_phases(await self._fleet.phases())
        self._note_view(self._clock.now())
        for worker_id, worker in list(self._workers.items()):
            await self._settle(worker_id, worker)
        for role, pool in self._pools.items():
            mine = [w for w in self._workers.values() if w.pool is role and not w.draining]
            if len(mine) < pool.wanted:
                await self._ask(role, pool)
            elif len(mine) > pool.wanted:
                await self._one_less(role)

    # ---- inside ----

    async def _keep(self) -> None:
        while True:
            try:
                await self.look()
            except Exception:  # of Ray, or a bug of ours: the workers serve, and the next look may succeed
                logger.exception("scale: a look at the pools failed")
            await asyncio.sleep(LOOK_S)

    @staticmethod
    def _want(pool: _Pool, size: int, give_back: Role | None) -> None:
        size = min(pool.config.most, max(pool.config.least, size))
        if size < pool.wanted:
            pool.give_back = give_back
            pool.retry_at, pool.wait_s, pool.problem = None, 0.0, ""
        pool.wanted = size

    def _note_phases(self, phases: Mapping[WorkerId, WorkerPhase]) -> None:
        now = self._clock.now()
        for worker_id, worker in self._workers.items():
            found = phases.get(worker_id, WorkerPhase(Phase.FAILED, "its process is gone"))
            if found.phase is not Phase.PLACING and worker.placed_at is None:
                worker.placed_at = now
                if worker.first:
                    logger.info("scale: worker %s has its place after %.1f s", worker_id, now - worker.since)
            elif found.phase is Phase.PLACING and worker.placed_at is not None:
                worker.placed_at, worker.since = None, now  # its machine is gone
            worker.phase, worker.said, worker.machine = found.phase, found.said, found.machine

    def _note_view(self, now: float) -> None:
        """Who is ready, who died."""
        live = {worker.worker_id for worker in self._membership.view().workers if not worker.draining}
        for worker_id, worker in self._workers.items():
            if worker.draining or (worker_id in live) == worker.ready:
                continue
            worker.ready = not worker.ready
            if not worker.ready:
                worker.since = now
                self._count(worker_id, worker, Ended.DIED, "it is out of the view; Ray starts it again", now)
            elif worker.first:
                worker.first = False
                self._started(worker_id, worker, now)

    def _started(self, worker_id: WorkerId, worker: _Worker, now: float) -> None:
        pool, took_s = self._pools[worker.pool], now - worker.since
        known = took_s if pool.start_s is None else pool.start_s
        pool.start_s = known + _START_MEMORY * (took_s - known)
        pool.retry_at, pool.wait_s, pool.problem = None, 0.0, ""
        self._count(worker_id, worker, Ended.STARTED, f"ready after {took_s:.1f} s", now)

    async def _settle(self, worker_id: WorkerId, worker: _Worker) -> None:
        """End what has drained, and what will not be."""
        now = self._clock.now()
        if worker.draining:
            overdue_s = now - worker.since - self._settings.drain_timeout_s
            if worker.phase in (Phase.STOPPED, Phase.FAILED) or overdue_s > _STOP_SLACK_S:
                in_order = worker.phase is Phase.STOPPED and overdue_s < 0 and not worker.said
                ended = Ended.DRAINED if in_order else Ended.CUT_SHORT
                why = f": {worker.said}" if worker.said else ""
                await self._end(worker_id, worker, ended, f"after {now - worker.since:.1f} s{why}")
            return
        if worker.ready:
            return
        if worker.phase is Phase.FAILED:
            await self._give_up(worker_id, worker, Ended.FAILED, worker.said)
        elif worker.placed_at is None and now - worker.since > self._settings.placement_timeout_s:
            said = f"no machine has room for it after {self._settings.placement_timeout_s:g} s"
            await self._give_up(worker_id, worker, Ended.UNPLACED, said)
        elif worker.placed_at is not None and now - max(worker.placed_at, worker.since) > self._start_timeout_s:
            said = f"it is not ready {self._start_timeout_s:g} s after it was placed"
            await self._give_up(worker_id, worker, Ended.NOT_READY, said)

    async def _give_up(self, worker_id: WorkerId, worker: _Worker, ended: Ended, said: str) -> None:
        pool, settings = self._pools[worker.pool], self._settings
        pool.wait_s = min(settings.max_retry_s, max(settings.retry_s, 2 * pool.wait_s))
        pool.retry_at, pool.problem = self._clock.now() + pool.wait_s, f"{worker_id}: {ended}: {said}"
        await self._end(worker_id, worker, ended, f"{said}; the next is asked for in {pool.wait_s:g} s")

    async def _end(self, worker_id: WorkerId, worker: _Worker, ended: Ended, said: str) -> None:
        await self._fleet.remove(worker_id)
        del self._workers[worker_id]
        self._count(worker_id, worker, ended, said, self._clock.now())

    async def _ask(self, role: Role, pool: _Pool) -> None:
        now = self._clock.now()
        if pool.retry_at is not None and now < pool.retry_at:
            return
        num_pending = sum(not (w.ready or w.draining) for w in self._workers.values())
        if num_pending >= self._settings.max_pending:
            return
        worker_id = await self._fleet.add(role)
        self._workers[worker_id] = _Worker(role, now)
        logger.info("scale: worker %s is asked for: the %s pool wants %d", worker_id, role, pool.wanted)

    async def _one_less(self, role: Role) -> None:
        mine = {name: worker for name, worker in self._workers.items() if worker.pool is role and not worker.draining}
        pending = [(worker.since, name) for name, worker in mine.items() if not worker.ready]
        if pending:
            _, worker_id = max(pending)
            await self._end(worker_id, self._workers[worker_id], Ended.WITHDRAWN, "it is not needed any more")
            return
        if any(worker.draining for worker in self._workers.values()):
            return
        may_be_empty = Role.PREFILL in self._pools and self._pools[Role.PREFILL].config.least == 0
        machines = {name: worker.machine for name, worker in self._workers.items() if worker.machine}
        chosen = choose_to_drain(self._membership.view(), mine, self._pools[role].give_back, may_be_empty, machines)
        if isinstance(chosen, str):
            if chosen != self._stuck:
                logger.warning("scale: the %s pool has more workers than it should, but %s", role, chosen)
            self._stuck = chosen
            return
        self._stuck = ""
        worker = self._workers[chosen.worker_id]
        worker.draining, worker.ready, worker.since = True, False, self._clock.now()
        logger.info(
            "scale: worker %s on %s drains, with %d running sequences and %d cached pages",
            chosen.worker_id,
            f"machine {worker.machine}" if worker.machine else "a machine that stays",
            chosen.load.num_running,
            chosen.load.pages_cached,
        )
        await self._fleet.retire(chosen.worker_id, self._settings.drain_timeout_s)

    def _count(self, worker_id: WorkerId, worker: _Worker, ended: Ended, said: str, now: float) -> None:
        self._ended[worker.pool, ended] += 1
        bad = ended in _FAILURES or ended in (Ended.CUT_SHORT, Ended.DIED)
        logger.log(logging.WARNING if bad else logging.INFO, "scale: worker %s: %s: %s", worker_id, ended, said)

    def _status(self, role: Role, pool: _Pool) -> PoolStatus:
        mine = {name: worker for name, worker in self._workers.items() if worker.pool is role}
        roles = {worker.worker_id: worker.role for worker in self._membership.view().workers}
        ready = Counter(roles[name] for name, worker in mine.items() if worker.ready and name in roles)
        pending = [(n, w) for n, w in mine.items() if not (w.ready or w.draining)]
        return PoolStatus(
            least=pool.config.least,
            most=pool.config.most,
            wanted=pool.wanted,
            ready={each: ready[each] for each in Role},
            pending=tuple((n, Phase.PLACING if w.placed_at is None else Phase.STARTING, w.since) for n, w in pending),
            draining=tuple((n, w.since) for n, w in mine.items() if w.draining),
            held=pool.held,
            start_s=pool.start_s,
            retry_at=pool.retry_at,
            problem=pool.problem,
        )


def choose_to_drain(
    view: ClusterView,
    pool: Iterable[WorkerId],
    role: Role | None,
    may_be_empty: bool,
    machines: Mapping[WorkerId, str],
) -> WorkerView | str:
    """The worker of a pool that should go, or why none may. ``role``: of which one should go, if any has it;
    ``may_be_empty``: the last worker that prefills may go; ``machines``: where the workers of every elastic pool are
    whose machines may be given back.

    First who leaves the fewest others on such a machine, because only an empty one is given back, then who has the
    fewest sequences, then who caches the fewest pages, then the larger name: younger ones go first.
    """
    names = set(pool)
    live = [worker for worker in view.workers if not worker.draining]
    left = Counter(worker.role for worker in live)
    least = {Role.DECODE: 1, Role.PREFILL: 0 if may_be_empty else 1}
    mine = [worker for worker in live if worker.worker_id in names]
    spare = [worker for worker in mine if left[worker.role] > least[worker.role]]
    candidates = [worker for worker in spare if _ships_without(view, live, worker)]
    if not spare:
        return "each of its workers is the last one of its role" if mine else "none of its workers is ready"
    if not candidates:
        return "without any of its workers no link between a prefill and a decode worker could be used"
    wanted: Sequence[WorkerView] = [w for w in candidates if w.role is role] or candidates
    by_name = sorted(wanted, key=lambda w: w.worker_id, reverse=True)
    num_on = Counter(machines.values())

    def price(worker: WorkerView) -> tuple[float, int, int]:
        machine = machines.get(worker.worker_id)
        num_there = math.inf if machine is None else num_on[machine]
        return num_there, _num_sequences(worker), worker.load.pages_cached

    return min(by_name, key=price)


def _ships_without(view: ClusterView, live: Sequence[WorkerView], gone: WorkerView) -> bool:
    """Can K/V still be shipped when it is gone, if there are two to ship it between?"""
    left = [worker for worker in live if worker is not gone]
    prefill, decode = ([w for w in left if w.role is role] for role in (Role.PREFILL, Role.DECODE))
    pairs = [(sender, receiver) for sender in prefill for receiver in decode]
    return not pairs or any(view.can_ship(*pair) for pair in pairs)


def _num_sequences(worker: WorkerView) -> int:
    """What it has, as it says itself or as this gateway knows, whichever is more: its report may be a moment old."""
    return max(worker.load.num_running + worker.load.num_waiting + worker.load.num_sessions, worker.num_assigned)
