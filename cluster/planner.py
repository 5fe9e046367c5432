"""Who carries out the plan? The live loop around a ``PlanningPolicy``: look, decide, publish, convert.

    every ``planner.interval_s``    Membership.view() and the demand  ──planning_view.py──>  PlanningView
                                    PlanningPolicy.plan               ──>  FleetTarget
    threshold and mode              Membership.note_offload, at every change; the router's policy reads it in its view
    roles                           WorkerClient.set_role, one worker at a time (role_conversion.py chooses and watches)
    sizes of pools                  PoolScaler.aim, where pools may grow (scaling_policy.py decides)

The policy decides, purely; here are the effects and what has been said so far. ``Planner.status`` is all that people
and metrics get to know. Everything happens on the gateway's loop; what a look costs is about a millisecond.

Invariants:
- a target is published when it changes, and every change is one line of the log, one count and one sample of history;
- a new conversion begins only when no worker is on its way to another role;
- a planner that fails keeps the last plan: routing goes on.
"""

from __future__ import annotations

import asyncio
import logging
import math
from collections import Counter, deque
from collections.abc import Callable, Coroutine, Mapping
from dataclasses import dataclass, field, replace
from typing import Protocol

from cluster.cluster_links import Capacity
from cluster.config import PLANNER_DUAL, PLANNER_OFF, PLANNER_STATIC, PlannerConfig
from cluster.demand import DemandMeter
from cluster.planning_policy import (
    ADVICE,
    FRESH,
    MODE,
    ROLES,
    THRESHOLD,
    DualTimescale,
    FleetTarget,
    MeasuredDemand,
    PlannerMemory,
    PlanningPolicy,
    PlanningView,
    Roles,
    StaticPlan,
)
from cluster.planning_view import Fleets, fleets, planning_view, scaling_view, silent_links
from cluster.pool_scaler import Ended, PoolScaler, PoolStatus
from cluster.role_conversion import Conversion, Ending, Outcome, choose, ending
from cluster.scaling_policy import NOTHING_YET, POOLS, PoolPlan, ScalingMemory, plan_pools
from cluster.throughput_model import OFFLOAD_NOTHING
from cluster.view import ClusterView, Offload
from core.clock import Clock
from core.errors import InvalidRequest, PrfaasError
from core.request import ClusterId, EngineId, Role

logger = logging.getLogger(__name__)

HISTORY_KEPT = 300  # samples: five minutes of a quiet fleet
SAMPLE_S = 1.0  # between two samples while nothing changes
_MISSED_S = 5.0  # a request that missed an objective so long ago is no reason for a worker any more
_MOST_OF_THE_LOOP = 0.1  # share of the gateway's time that looking may take; with many workers it looks less often


class RoleSetter(Protocol):
    """A connection to a worker."""

    async def set_role(self, role: Role) -> None:
        """Ask the worker to advertise ``role`` from now on. Raises ``PeerLost`` or another ``PrfaasError``."""
        ...


class PlannedMembership(Protocol):
    """What a planner needs of ``Membership``."""

    def view(self) -> ClusterView: ...

    def client(self, engine_id: EngineId) -> RoleSetter | None: ...

    def note_offload(self, offload: Offload) -> None: ...


class Traffic(Protocol):
    """What a planner needs of the router."""

    @property
    def num_open_tokens(self) -> int:
        """Tokens that the requests in flight have so far."""
        ...

    @property
    def num_answering(self) -> int:
        """Requests in flight that have a token."""
        ...

    @property
    def num_queued(self) -> int:
        """Requests that wait in the gateway for their turn."""
        ...

    @property
    def num_missed(self) -> Mapping[Role, int]:
        """Requests so far that were predicted to miss an objective, by the role that is too slow for it: those that
        were refused for it, and those that were served all the same."""
        ...


@dataclass(frozen=True, slots=True)
class PlanSample:
    """The plan and what it rested on, at one moment of the gateway's Clock."""

    at: float
    threshold_tokens: float  # inf: nothing is offloaded
    abundant: bool
    num_prefill: int
    num_decode: int
    num_changing: int
    num_prfaas: int
    link_bytes_per_s: float
    link_utilisation: float
    link_queue_s: float
    prfaas_queue_s: float
    local_queue_s: float
    decode_queue: int
    gateway_queue: int
    rate_rps: float
    change: str = ""  # what was new; empty: nothing


@dataclass(frozen=True, slots=True)
class PlannerStatus:
    """What the planner does, and why. ``target`` None: it has not looked yet, or is off."""

    mode: str
    target: FleetTarget | None = None
    num_prefill: int = 0  # local workers now; one that is changing counts as what it is becoming
    num_decode: int = 0
    changing: tuple[Conversion, ...] = ()
    changes: Mapping[tuple[str, str], int] = field(default_factory=dict)  # (kind, reason) |-> how often
    conversions: Mapping[tuple[Role, Outcome], int] = field(default_factory=dict)  # (to, how it ended) |-> how often
    num_failures: int = 0  # looks that raised
    pools: Mapping[Role, PoolStatus] = field(default_factory=dict)  # whose sizes may change
    starts: Mapping[tuple[Role, Ended], int] = field(default_factory=dict)  # and drains: how they ended
    history: tuple[PlanSample, ...] = ()  # oldest first


# ``planner.mode`` |-> factory
POLICIES: Mapping[str, Callable[[PlannerConfig], PlanningPolicy]] = {
    PLANNER_OFF: lambda _: StaticPlan(OFFLOAD_NOTHING),
    PLANNER_STATIC: lambda config: StaticPlan(float(config.threshold_tokens)),
    PLANNER_DUAL: lambda config: DualTimescale(config.dual),
}


class Planner:
    """Plans for the workers of one ``Membership``, for as long as it runs."""

    def __init__(
        self,
        membership: PlannedMembership,
        demand: DemandMeter,
        traffic: Traffic,
        config: PlannerConfig,
        clock: Clock,
        *,
        cluster_id: ClusterId,
        capacity: Capacity,
        retest: Callable[[EngineId, EngineId], None],
        tpot_s: float | None = None,
        ttft_s: float | None = None,
        scaler: PoolScaler | None = None,
    ) -> None:
        """``cluster_id``: of this gateway. ``capacity``: configured bytes/s between two clusters
        (``KvTransferConfig.capacity``). ``retest``: of the link between two engines (``LinkTester.retest``).
        ``tpot_s``: objective for the time between tokens, to which decode batches are kept; None: there is none.
        ``ttft_s``: likewise for the first token. ``scaler``: of the pools that may grow; None: none may."""
        self._membership = membership
        self._demand = demand
        self._traffic = traffic
        self._config = config
        self._clock = clock
        self._cluster_id = cluster_id
        self._tpot_s = tpot_s
        self._ttft_s = ttft_s
        self._scaler = scaler
        self._scaling_memory: ScalingMemory = NOTHING_YET
        self._missed: deque[tuple[float, Mapping[Role, int]]] = deque()  # so far, at each look of the last seconds
        self._capacity = capacity
        self._retest = retest
        self._retested_at: dict[tuple[ClusterId, ClusterId], float] = {}
        self._policy = POLICIES[config.mode](config)
        self._memory: PlannerMemory = FRESH
        self._target: FleetTarget | None = None
        self._seen: PlanningView | None = None
        self._changing: dict[EngineId, Conversion] = {}
        self._refusals: dict[EngineId, str] = {}  # of those that were asked
        self._given_up: set[EngineId] = set()  # that still have sequences of their earlier role
        self._changes: Counter[tuple[str, str]] = Counter()
        self._conversions: Counter[tuple[Role, Outcome]] = Counter()
        self._num_failures = 0
        self._history: deque[PlanSample] = deque(maxlen=HISTORY_KEPT)
        self._tasks: set[asyncio.Task[None]] = set()

    @property
    def status(self) -> PlannerStatus:
        """A snapshot."""
        return PlannerStatus(
            mode=self._config.mode,
            target=self._target,
            num_prefill=0 if self._seen is None else self._seen.num_prefill,
            num_decode=0 if self._seen is None else self._seen.num_decode,
            changing=tuple(self._changing.values()),
            changes=dict(self._changes),
            conversions=dict(self._conversions),
            num_failures=self._num_failures,
            pools={} if self._scaler is None else self._scaler.status,
            starts={} if self._scaler is None else self._scaler.ended,
            history=tuple(self._history),
        )

    def start(self) -> None:
        """Begin; ``close`` ends it. With ``planner.mode: off`` that nothing is planned is all that is published."""
        assert not self._tasks, "started already"
        if self._config.mode == PLANNER_OFF:
            self._membership.note_offload(Offload(reason="planner.mode is off: nothing is offloaded"))
        else:
            self._spawn(self._keep_planning())

    async def close(self) -> None:
        """End. A worker that is changing goes on to; nobody watches it any more."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    def scale(self, role: Role, size: int | None) -> str:
        """Hold a pool at so many workers, or with None let it follow the load again; what was done, in words.

        Raises ``InvalidRequest`` for a pool of a fixed size, or a size beyond its bounds.
        """
        if self._scaler is None:
            raise InvalidRequest(
                "pool", f"the {role} pool has a fixed size: set {role}.min_replicas and {role}.max_replicas"
            )
        said = self._scaler.hold(role, size)
        self._changes[POOLS, "operator"] += 1
        return said

    def look(self) -> None:
        """One turn of the loop."""
        now, view = self._clock.now(), self._membership.view()
        found = fleets(view, self._cluster_id, self._capacity)
        self._follow_conversions(view, found, now)
        demand = self._demand.measured(self._traffic.num_open_tokens, self._traffic.num_answering)
        becoming = {engine_id: conversion.role for engine_id, conversion in self._changing.items()}
        seen = planning_view(
            found,
            view.costs,
            demand,
            becoming=becoming,
            tpot_s=self._tpot_s,
            num_queued=self._traffic.num_queued,
            now=now,
        )
        target, self._memory = self._policy.plan(seen, demand, self._memory)
        target = self._with_pools(target, seen, found, demand)
        changes = self._changes_of(target, seen)
        for kind, said in changes.items():
            self._changes[kind, target.causes.get(kind, "unnamed")] += 1
            logger.info("plan: %s: %s", said, _reason_of(kind, target))
        self._publish(target)
        if self._scaler is not None and target.pools is not None:
            self._scaler.aim(target.pools)
        if ROLES in changes:
            self._convert(found, target, seen, now)
        self._target, self._seen = target, seen
        self._sample(now, target, seen, "; ".join(changes.values()))
        self._ask_silent_links(view, found, now)

    # ---- inside ----

    async def _keep_planning(self) -> None:
        while True:
            began_at = self._clock.now()
            try:
                self.look()
            except Exception:  # a bug of ours; requests go on by the last plan, and the next look may succeed
                self._num_failures += 1
                logger.exception("the planner's look failed, the last plan stays")
            took_s = self._clock.now() - began_at
            await asyncio.sleep(max(self._config.interval_s, took_s * (1 / _MOST_OF_THE_LOOP - 1)))

    def _with_pools(
        self, target: FleetTarget, seen: PlanningView, found: Fleets, demand: MeasuredDemand
    ) -> FleetTarget:
        """The target with the sizes of pools, if any may change and this planner decides them."""
        if self._scaler is None or self._config.mode != PLANNER_DUAL:
            return target
        self._missed.append((seen.at_s, self._traffic.num_missed))
        while self._missed[0][0] < seen.at_s - _MISSED_S:
            self._missed.popleft()
        before = self._missed[0][1]
        missed = {role: count - before.get(role, 0) for role, count in self._missed[-1][1].items()}
        scaling = scaling_view(found, self._scaler.views(), missed=missed, ttft_s=self._ttft_s)
        # While one is asked to change its role, that is what helps.
        aimed = replace(seen, num_changing=max(seen.num_changing, int(_roles_of(seen) != target.roles)))
        plan, self._scaling_memory = plan_pools(
            aimed,
            scaling,
            demand,
            target.threshold_tokens,
            self._scaling_memory,
            self._config.scaling,
            self._config.dual,
        )
        return _joined(target, plan)

    def _changes_of(self, target: FleetTarget, seen: PlanningView) -> dict[str, str]:
        """kind |-> what is new, in words."""
        last, found = self._target, {}
        if last is None or last.threshold_tokens != target.threshold_tokens:
            before = "" if last is None else f"{_tokens(last.threshold_tokens)} to "
            found[THRESHOLD] = f"threshold {before}{_tokens(target.threshold_tokens)}"
        if last is None or last.abundant != target.abundant:
            found[MODE] = f"bandwidth {'abundant' if target.abundant else 'scarce'}"
        aimed, now = target.roles, (seen.num_prefill, seen.num_decode)
        if (aimed.num_prefill, aimed.num_decode) != now:
            found[ROLES] = f"roles {now[0]} + {now[1]} to {aimed.num_prefill} + {aimed.num_decode}"
        if target.advice and (last is None or last.advice != target.advice):
            found[ADVICE] = f"advice {target.advice}"
        if self._scaler is not None and target.pools is not None:
            wanted = {role: status.wanted for role, status in self._scaler.status.items()}
            moved = [(role, wanted[role], size) for role, size in target.pools.sizes.items() if wanted[role] != size]
            if moved:
                found[POOLS] = ", ".join(f"{role} pool {before} to {size}" for role, before, size in moved)
        return found

    def _publish(self, target: FleetTarget) -> None:
        """Tell routers, if there is something new for them; that a number of the reason has changed is nothing."""
        last = self._target
        causes = [target.causes.get(kind) for kind in (THRESHOLD, MODE)]
        said = None if last is None else [last.causes.get(kind) for kind in (THRESHOLD, MODE)]
        plan = (target.threshold_tokens, target.abundant)
        if last is None or plan != (last.threshold_tokens, last.abundant) or causes != said:
            self._membership.note_offload(Offload(*plan, target.reason))

    def _ask_silent_links(self, view: ClusterView, found: Fleets, now: float) -> None:
        """Have one link tested of each path from a PrfaaS cluster on which nothing goes, lest it be forgotten.

        A path that has become too narrow for anything is known to be wide again only by sending something.
        """
        for pair in silent_links(view, found, self._config.retest_s):
            clusters = pair.from_cluster, pair.to_cluster
            if now - self._retested_at.get(clusters, -math.inf) >= self._config.retest_s:
                self._retested_at[clusters] = now
                engines = {worker.worker_id: worker.engine_id for worker in view.workers}
                self._retest(engines[pair.from_worker], engines[pair.to_worker])

    def _convert(self, found: Fleets, target: FleetTarget, seen: PlanningView, now: float) -> None:
        """Have one worker change its role, in the direction of the target."""
        role = Role.PREFILL if target.roles.num_prefill > seen.num_prefill else Role.DECODE
        worker = choose(found.local, role)
        client = None if worker is None else self._membership.client(worker.engine_id)
        if worker is None or client is None:
            self._conversions[role, Outcome.NO_WORKER] += 1
            logger.warning("plan: no worker can become a %s worker: every cluster needs those that it has", role)
            return
        conversion = Conversion(worker.worker_id, worker.engine_id, role, now)
        self._changing[worker.engine_id] = conversion
        logger.info(
            "plan: worker %s turns to %s, with %d running sequences and %d cached pages",
            worker.worker_id,
            role,
            worker.load.num_running,
            worker.load.pages_cached,
        )
        self._spawn(self._ask(client, conversion))

    async def _ask(self, client: RoleSetter, conversion: Conversion) -> None:
        try:
            await client.set_role(conversion.role)
        except PrfaasError as error:
            self._refusals[conversion.engine_id] = str(error)

    def _follow_conversions(self, view: ClusterView, found: Fleets, now: float) -> None:
        """Notice what has changed its role, what changes it unasked, and what takes too long."""
        for engine_id, conversion in list(self._changing.items()):
            refusal = self._refusals.get(engine_id, "")
            ended = ending(conversion, view, now, self._config.convert_timeout_s, refusal)
            if ended is not None:
                self._end(conversion, ended)
        leaving = {worker.engine_id: worker for worker in found.local if worker.load.num_other_role}
        self._given_up &= leaving.keys()
        for engine_id, worker in leaving.items():
            if engine_id not in self._changing and engine_id not in self._given_up:
                self._changing[engine_id] = Conversion(worker.worker_id, engine_id, worker.role, now, asked=False)

    def _end(self, conversion: Conversion, ended: Ending) -> None:
        del self._changing[conversion.engine_id]
        self._refusals.pop(conversion.engine_id, None)
        if ended.outcome is Outcome.GAVE_UP:
            self._given_up.add(conversion.engine_id)
        if not conversion.asked and ended.outcome is not Outcome.GAVE_UP:
            return
        self._conversions[conversion.role, ended.outcome] += 1
        level = logging.INFO if ended.outcome is Outcome.DONE else logging.WARNING
        logger.log(
            level, "plan: worker %s to %s: %s: %s", conversion.worker_id, conversion.role, ended.outcome, ended.reason
        )

    def _sample(self, now: float, target: FleetTarget, seen: PlanningView, change: str) -> None:
        soon = self._config.interval_s / 2  # the clock of a loop that sleeps is never exact
        if not change and self._history and now - self._history[-1].at < SAMPLE_S - soon:
            return
        self._history.append(
            PlanSample(
                at=now,
                threshold_tokens=target.threshold_tokens,
                abundant=target.abundant,
                num_prefill=seen.num_prefill,
                num_decode=seen.num_decode,
                num_changing=seen.num_changing,
                num_prfaas=seen.num_prfaas,
                link_bytes_per_s=seen.link_bytes_per_s,
                link_utilisation=seen.link_utilisation,
                link_queue_s=seen.link_queue_s,
                prfaas_queue_s=seen.prfaas_queue_s,
                local_queue_s=seen.local_queue_s,
                decode_queue=seen.decode_queue,
                gateway_queue=seen.num_queued,
                rate_rps=target.numbers.get("rate_rps", 0.0),
                change=change,
            )
        )

    def _spawn(self, work: Coroutine[None, None, None]) -> None:
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)


def _reason_of(kind: str, target: FleetTarget) -> str:
    """Why that changed: the gain or the pools' own reason, else the whole target's."""
    if kind == ADVICE and target.gain is not None:
        return target.gain.reason
    if kind == POOLS and target.pools is not None:
        return target.pools.reason
    return target.reason


def _roles_of(seen: PlanningView) -> Roles:
    return Roles(seen.num_prefill, seen.num_decode)


def _joined(target: FleetTarget, plan: PoolPlan) -> FleetTarget:
    """One target, of what both policies say."""
    return replace(
        target,
        pools=plan.pools,
        reason=f"{target.reason}; {plan.reason}",
        numbers={**target.numbers, **plan.numbers},
        causes={**target.causes, POOLS: plan.cause},
    )


def _tokens(threshold: float) -> str:
    return "none" if threshold == OFFLOAD_NOTHING else f"{threshold:,.0f} tokens"
