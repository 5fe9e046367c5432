"""How many workers should each pool have now? Role conversion first, a new worker second; one pure function.

    load     of a role, in workers: requests/s times the predicted seconds that one of its workers spends on each
    short    its load is more than ``upscale_utilisation`` of its workers, or something waits for it (pressure): a
             queue, a missed TTFT or TPOT objective, requests in the gateway
    slack    without one of its workers the others would be used less than ``downscale_utilisation``

A role that has been short for ``upscale_delay_s`` gets a worker: at first the planner's long loop may convert one of
the other role, if that has slack (``conversion_wait_s``); if it has none, or nothing was converted, a new one is asked
for. A worker that has been too many for ``downscale_delay_s`` is given back, one at a time. What keeps the fleet calm:

- between the two marks nothing happens, and each delay begins anew whenever the number of workers changes;
- the price of a start is the seconds that starts took: a queue that should be gone before a worker is ready is given
  as long, to show that it is; and an idle worker is kept at least ``start_price`` times as long as it takes to get
  another one (at 1 that at most doubles the cost of the best choice in hindsight, whatever comes: ski rental);
- the cost model may be wrong. The share in use at which a role was pressed for the whole delay is remembered: nothing
  is given back that would bring it near that again, until the demand has halved;
- what waits asks for one worker at a time, and for the next only when that one is ready and it still waits;
- no more than ``max_pending`` workers are on their way.

Invariants: pure; a target lies within the pool's bounds; each has a reason; the last worker that decodes is never given
back, the last one that prefills only if its pool may go to 0 and nothing is asked; on a constant demand it settles.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace

import numpy as np

from cluster.planning_policy import MeasuredDemand, PlannerSettings, PlanningView, PoolSizes, Roles
from core.errors import InvalidConfig
from core.request import Role

POOLS = "pools"  # what of a target this file decides, beside planning_policy's kinds
_IDLE_REQUESTS = 0.5  # expected within the delay: fewer are none
_FORGET = 0.5  # share of the rate at which a role was pressed, below which that says nothing any more
_NOTHING = 1e-9


@dataclass(frozen=True)
class ScalingSettings:
    """When pools with ``max_replicas`` above ``min_replicas`` grow and shrink (docs/planning.md).

    upscale_utilisation: predicted share of a role's time in use, from which on it is short of workers.
    downscale_utilisation: share up to which those that are left may be used for one to be given back.
    upscale_delay_s: how long a role must have been short before a worker is asked for.
    downscale_delay_s: how long one must have been too many before it is given back.
    start_price: it is kept at least so many times as long as a start takes, which is measured.
    conversion_wait_s: a role that is short while the other has slack waits so much longer, for a conversion.
    max_pending: workers that may be on their way at most, of all pools together.
    start_s: seconds that a worker is taken to need from being asked for to being ready, until one was measured.
    placement_timeout_s: a worker for which Ray has found no room by then is given up, and asked for again later.
    retry_s: wait before that; it doubles with each failure, up to ``max_retry_s``.
    max_retry_s: the longest such wait.
    drain_timeout_s: seconds that the sequences of a worker get to end when it is given back; what is left is continued
        on others.
    """

    upscale_utilisation: float = 0.85
    downscale_utilisation: float = 0.6
    upscale_delay_s: float = 10.0
    downscale_delay_s: float = 300.0
    start_price: float = 1.0
    conversion_wait_s: float = 40.0
    max_pending: int = 2
    start_s: float = 30.0
    placement_timeout_s: float = 600.0
    retry_s: float = 10.0
    max_retry_s: float = 300.0
    drain_timeout_s: float = 300.0

    def __post_init__(self) -> None:
        _require(
            0 < self.downscale_utilisation < self.upscale_utilisation <= 1,
            "downscale_utilisation",
            "above 0 and below upscale_utilisation, which is at most 1",
        )
        _require(self.max_pending >= 1, "max_pending", "at least 1")
        for name in ("upscale_delay_s", "downscale_delay_s", "conversion_wait_s", "start_s", "drain_timeout_s"):
            _require(getattr(self, name) >= 0, name, "at least 0 s")
        _require(self.start_price >= 0, "start_price", "at least 0")
        for name in ("placement_timeout_s", "retry_s"):
            _require(getattr(self, name) > 0, name, "above 0 s")
        _require(self.max_retry_s >= self.retry_s, "max_retry_s", "at least retry_s")


@dataclass(frozen=True, slots=True)
class PoolView:
    """The workers that were started for one pool, whatever they do now."""

    least: int
    most: int
    wanted: int  # the last target
    ready: Mapping[Role, int]  # by the role that they have; draining ones are none of it
    num_pending: int = 0  # asked for, and not ready yet
    num_draining: int = 0
    held: int | None = None  # what an operator set; None: it follows the load
    start_s: float | None = None  # that the last starts took; None: none was measured

    @property
    def size(self) -> int:
        """Workers, ready or on their way."""
        return sum(self.ready.values()) + self.num_pending

    @property
    def num_missing(self) -> int:
        """Workers that are wanted and not ready, asked for or to be asked for."""
        return max(0, max(self.size, self.wanted) - sum(self.ready.values()))


@dataclass(frozen=True, slots=True)
class ScalingView:
    """What the sizes of pools are decided by, beside the ``PlanningView``."""

    pools: Mapping[Role, PoolView]  # those whose size may change
    decode_fullness: float = 0.0  # of the decode workers' batches and pages, the fuller; 0 to 1 and more
    num_running: int = 0  # sequences on all local workers, in whatever state
    missed: Mapping[Role, int] = field(default_factory=dict)  # requests that missed an objective lately
    ttft_s: float | None = None  # the objective; None: there is none


@dataclass(frozen=True, slots=True)
class RoleMemory:
    """What is remembered of one role."""

    num_workers: int = -1  # that it had at the last look
    short_since_s: float | None = None
    slack_since_s: float | None = None
    pressed_at: float | None = None  # share in use at which something waited; None: it never did, at such a demand
    pressed_rps: float = 0.0  # requests/s then


@dataclass(frozen=True, slots=True)
class ScalingMemory:
    """What the policy remembers from one call to the next; ``NOTHING_YET`` at the start."""

    roles: Mapping[Role, RoleMemory] = field(default_factory=lambda: {role: RoleMemory() for role in Role})


NOTHING_YET = ScalingMemory()


@dataclass(frozen=True, slots=True)
class PoolPlan:
    """The sizes, why, and the numbers behind them."""

    pools: PoolSizes
    cause: str  # one word
    reason: str
    numbers: Mapping[str, float]


def plan_pools(
    view: PlanningView,
    scaling: ScalingView,
    demand: MeasuredDemand,
    threshold_tokens: float,
    memory: ScalingMemory,
    settings: ScalingSettings,
    bounds: PlannerSettings,
) -> tuple[PoolPlan, ScalingMemory]:
    """The sizes of the elastic pools. ``threshold_tokens``: beyond which prompts go to PrfaaS clusters. ``bounds``: of
    the roles, whatever the pools. Pure."""
    judge = _Judge(view, scaling, demand, threshold_tokens, settings, bounds)
    roles = {role: judge.remember(role, memory.roles[role]) for role in Role}
    sizes, word, text, give_back = judge.decide(roles)
    if word in _ACTIONS:  # each delay begins anew
        roles = {role: replace(seen, short_since_s=None, slack_since_s=None) for role, seen in roles.items()}
    plan = PoolPlan(PoolSizes(sizes, text, give_back), word, f"pools: {text}", judge.numbers())
    return plan, ScalingMemory(roles)


_ACTIONS = frozenset({"utilisation", "queue", "ttft", "tpot", "demand", "slack", "idle"})


class _Judge:
    """One look. Everything in it is a function of what it was made of."""

    def __init__(
        self,
        view: PlanningView,
        scaling: ScalingView,
        demand: MeasuredDemand,
        threshold_tokens: float,
        settings: ScalingSettings,
        bounds: PlannerSettings,
    ) -> None:
        self._view = view
        self._scaling = scaling
        self._demand = demand
        self._settings = settings
        self._bounds = bounds
        self._has = {Role.PREFILL: view.num_prefill, Role.DECODE: view.num_decode}
        self._load = _loads(view, demand, threshold_tokens)

    def numbers(self) -> dict[str, float]:
        """Every name says its unit."""
        found = {"decode_fullness": self._scaling.decode_fullness}
        for role in Role:
            load = self._load[role]
            if load is not None:
                found[f"{role}_load_workers"] = load
                found[f"{role}_utilisation"] = _share(load, self._has[role])
        return found

    # ---- what is seen of a role ----

    def remember(self, role: Role, before: RoleMemory) -> RoleMemory:
        """Since when it is short or has slack, and what is known of its limits."""
        now, num_workers = self._view.at_s, self._has[role]
        seen = before if before.num_workers == num_workers else replace(before, short_since_s=None, slack_since_s=None)
        seen = replace(seen, num_workers=num_workers)
        waits = self._pressure(role) is not None
        pressed = waits and not self._on_its_way(role)
        seen = self._learn_limit(role, seen, pressed)
        short = pressed or self._overloaded(role)
        slack = not (short or waits) and self._spare(role, seen)
        return replace(
            seen,
            short_since_s=(now if seen.short_since_s is None else seen.short_since_s) if short else None,
            slack_since_s=(now if seen.slack_since_s is None else seen.slack_since_s) if slack else None,
        )

    def _learn_limit(self, role: Role, seen: RoleMemory, pressed: bool) -> RoleMemory:
        """At which share in use the role was pressed for the whole delay, the least of them."""
        rate, load = self._demand.rate_rps, self._load[role]
        if seen.pressed_at is not None and rate < _FORGET * seen.pressed_rps:
            seen = replace(seen, pressed_at=None)
        lasted_s = -1.0 if seen.short_since_s is None else self._view.at_s - seen.short_since_s
        if not pressed or load is None or not self._has[role] or lasted_s < self._up_delay_s(role):
            return seen
        at = min(_share(load, self._has[role]), self._settings.upscale_utilisation)
        known = seen.pressed_at is not None and seen.pressed_at <= at
        return seen if known or at < _NOTHING else replace(seen, pressed_at=at, pressed_rps=rate)

    def _overloaded(self, role: Role) -> bool:
        load, coming = self._load[role], self._has[role] + self._on_its_way(role)
        if coming == 0:
            return role is Role.PREFILL and not self._idle
        return load is not None and load > self._settings.upscale_utilisation * coming

    def _pressure(self, role: Role) -> tuple[str, str] | None:
        """What waits for it, as a word and words; None: nothing does."""
        view, missed = self._view, self._scaling.missed.get(role, 0)
        decode_is_full = self._scaling.decode_fullness >= 1
        if role is Role.DECODE:
            if missed:
                return "tpot", f"{missed} requests were to miss their TPOT"
            if view.decode_queue:
                return "queue", f"{view.decode_queue} sequences wait to be decoded"
            if view.num_queued and decode_is_full:
                return "queue", f"{view.num_queued} requests wait in the gateway, and decode workers are full"
            return None
        if not self._has[role]:
            return None  # decode workers prefill
        if missed and not decode_is_full:
            return "ttft", f"{missed} requests were to miss their TTFT"
        if view.num_queued and not decode_is_full:
            return "queue", f"{view.num_queued} requests wait in the gateway"
        objective = self._scaling.ttft_s
        mark = self._bounds.high_queue_s if objective is None else min(self._bounds.high_queue_s, objective / 2)
        if view.local_queue_s >= mark:
            return "queue", f"{view.local_queue_s:.1f} s of prefill wait before each worker"
        return None

    def _up_delay_s(self, role: Role) -> float:
        """How long it must have been short: as long as a start takes, if its queue should be gone by then."""
        delay_s, pool = self._settings.upscale_delay_s, self._scaling.pools.get(role)
        pressure, load, rate = self._pressure(role), self._load[role], self._demand.rate_rps
        if pool is None or load is None or not rate or pressure is None or pressure[0] != "queue":
            return delay_s
        has, view = self._has[role], self._view
        waiting = view.num_queued + (view.decode_queue if role is Role.DECODE else 0)
        queue_s = waiting * load / rate / has + (view.local_queue_s if role is Role.PREFILL else 0.0)
        spare = 1 - _share(load, has)
        gone = spare > 0 and queue_s / spare < self._start_s(pool)
        return max(delay_s, self._start_s(pool)) if gone else delay_s

    def _spare(self, role: Role, seen: RoleMemory) -> bool:
        """Would the others do without one of its workers?"""
        coming = self._on_its_way(role)  # it would be given up before one that works
        left, load = self._has[role] - (not coming), self._load[role]
        if left < 0 or (left == 0 and role is Role.DECODE) or 0 < left < self._bounds_of(role)[0]:
            return False
        if left == 0:
            return self._idle
        if load is None:
            return self._idle
        settings = self._settings
        known = settings.upscale_utilisation if seen.pressed_at is None else seen.pressed_at
        mark = settings.downscale_utilisation * min(1.0, known / settings.upscale_utilisation)
        return _share(load, left) <= mark

    @property
    def _idle(self) -> bool:
        """Is nothing asked of the service?"""
        expected = self._demand.rate_rps * self._settings.downscale_delay_s
        return expected < _IDLE_REQUESTS and not self._view.num_queued and not self._scaling.num_running

    def _on_its_way(self, role: Role) -> int:
        pool = self._scaling.pools.get(role)
        return 0 if pool is None else pool.num_missing

    def _start_s(self, pool: PoolView) -> float:
        return self._settings.start_s if pool.start_s is None else pool.start_s

    # ---- what is done about it ----

    def decide(self, roles: Mapping[Role, RoleMemory]) -> tuple[dict[Role, int], str, str, Role | None]:
        """Sizes, a word, words, and of which role to give one back."""
        pools = self._scaling.pools
        sizes = {
            role: min(pool.most, max(pool.least, pool.wanted if pool.held is None else pool.held))
            for role, pool in pools.items()
        }
        free = [role for role, pool in pools.items() if pool.held is None]
        if not free:
            return sizes, "held", "an operator set their sizes", None
        if self._view.num_changing:
            return sizes, "changing", f"{self._view.num_changing} worker(s) still change their role", None
        short = sorted(
            (role for role in Role if roles[role].short_since_s is not None),
            key=lambda role: -self._need(role),
        )
        said: tuple[str, str] | None = None
        for role in short:
            found = self._grow(role, roles, sizes, free)
            if found[0] in _ACTIONS:
                return sizes, *found, None
            said = said or found
        if said is not None:
            return sizes, *said, None
        return self._shrink(roles, sizes, free)

    def _need(self, role: Role) -> float:
        """How short it is, to compare the two."""
        load, has = self._load[role], self._has[role]
        return math.inf if not has else _share(load or 0.0, has) + (1.0 if self._pressure(role) else 0.0)

    def _grow(
        self, role: Role, roles: Mapping[Role, RoleMemory], sizes: dict[Role, int], free: list[Role]
    ) -> tuple[str, str]:
        """Ask for a worker of a role that is short, or say why not; ``sizes`` is changed."""
        settings, now, since_s = self._settings, self._view.at_s, roles[role].short_since_s
        assert since_s is not None, "asked of roles that are short only"
        word, why = self._why_short(role)
        pool = self._scaling.pools.get(role)
        if pool is None or role not in free:
            return "fixed", f"{role} is short ({why}), but its pool has a fixed size"
        if sizes[role] >= pool.most:
            return "at_max", f"{role} is short ({why}), but its pool has its {pool.most} workers"
        most = self._bounds_of(role)[1]
        if self._has[role] + self._on_its_way(role) >= most:
            return "at_max", f"{role} is short ({why}), but planner.dual.max_{role} is {most:.0f}"
        delay_s = self._up_delay_s(role)
        if now - since_s < delay_s:
            waited = f"for {now - since_s:.0f} s, {delay_s:g} s are waited"
            return "delay", f"{role} is short ({why}) {waited}"
        other = Role.DECODE if role is Role.PREFILL else Role.PREFILL
        if self._may_convert(other, roles) and now - since_s < delay_s + settings.conversion_wait_s:
            return "conversion_first", f"{role} is short ({why}); a {other} worker may be converted first"
        num_missing = sum(each.num_missing for each in self._scaling.pools.values())
        room = settings.max_pending - num_missing
        if room < 1:
            return "pending", f"{role} is short ({why}); {num_missing} workers are on their way"
        more = int(max(1, min(self._missing(role), room, pool.most - sizes[role], most - self._has[role])))
        sizes[role] += more
        return word, f"{more} more {role} worker{'s' if more > 1 else ''}: {why}"

    def _why_short(self, role: Role) -> tuple[str, str]:
        pressed = self._pressure(role)
        if pressed is not None:
            return pressed
        if not self._has[role]:
            return "demand", "requests come, and nobody prefills"
        share = _share(self._load[role] or 0.0, self._has[role])
        return "utilisation", f"{share:.0%} of its time is in use, {self._settings.upscale_utilisation:.0%} are enough"

    def _missing(self, role: Role) -> int:
        """Workers that bring its predicted load back to the mark."""
        load = self._load[role]
        if load is None:
            return 1
        needed = math.ceil(load / self._settings.upscale_utilisation - _NOTHING)
        return needed - self._has[role] - self._on_its_way(role)

    def _bounds_of(self, role: Role) -> tuple[int, float]:
        """Workers that have the role at least, where it has any, and at most."""
        if role is Role.PREFILL:
            return self._bounds.min_prefill, self._bounds.max_prefill or math.inf
        return self._bounds.min_decode, self._bounds.max_decode or math.inf

    def _may_convert(self, other: Role, roles: Mapping[Role, RoleMemory]) -> bool:
        """Has the other role a worker that it could lose, by load, history and the configured bounds?"""
        if self._has[other] < 2 or min(self._has.values()) < 1:
            return False  # the long loop leaves a service with an empty pool alone
        if roles[other].short_since_s is not None or self._load[other] is None:
            return False
        step = 1 if other is Role.PREFILL else -1
        after = Roles(self._has[Role.PREFILL] - step, self._has[Role.DECODE] + step)
        known = roles[other].pressed_at or self._settings.upscale_utilisation
        return self._bounds.allows(after) and _share(self._load[other] or 0.0, self._has[other] - 1) <= known

    def _shrink(
        self, roles: Mapping[Role, RoleMemory], sizes: dict[Role, int], free: list[Role]
    ) -> tuple[dict[Role, int], str, str, Role | None]:
        """Give one worker back, or say why not."""
        slack = [role for role in Role if roles[role].slack_since_s is not None]
        if not slack:
            return sizes, "balanced", "as they are: no role is short, and none can spare a worker", None
        slack.sort(key=lambda role: _share(self._load[role] or 0.0, max(1, self._has[role])))
        said = ("at_min", "as they are: pools with workers to spare have their fewest")
        for role in slack:
            pool = self._pool_to_shrink(role, sizes, free)
            if pool is None:
                continue
            since_s, delay_s = roles[role].slack_since_s, self._give_back_delay_s(pool)
            assert since_s is not None, "of those that have slack"
            if (waited_s := self._view.at_s - since_s) < delay_s:
                said = "delay", f"{role} could spare a worker for {waited_s:.0f} s, {delay_s:g} s are waited"
                continue
            sizes[pool] -= 1
            if self._on_its_way(role):
                return sizes, "slack", f"the {role} worker that is not ready is not needed any more", role
            if self._idle:
                return sizes, "idle", f"one {role} worker less: nothing is asked", role
            share = _share(self._load[role] or 0.0, self._has[role] - 1)
            return sizes, "slack", f"one {role} worker less: the others would be in use for {share:.0%}", role
        return sizes, *said, None

    def _pool_to_shrink(self, role: Role, sizes: Mapping[Role, int], free: list[Role]) -> Role | None:
        """Whose worker of that role may go, its own pool's first; None: none, or not while others start or drain."""
        pools = self._scaling.pools
        if self._on_its_way(role):
            return role if role in free and sizes[role] > pools[role].least else None
        if any(pool.num_missing or pool.num_draining for pool in pools.values()):
            return None
        owners = (role, *(other for other in Role if other is not role))
        may = (p for p in owners if p in free and pools[p].ready.get(role, 0) and sizes[p] > pools[p].least)
        return next(may, None)

    def _give_back_delay_s(self, pool: Role) -> float:
        settings = self._settings
        return max(settings.downscale_delay_s, settings.start_price * self._start_s(self._scaling.pools[pool]))


def _loads(view: PlanningView, demand: MeasuredDemand, threshold_tokens: float) -> dict[Role, float | None]:
    """Workers that the measured demand keeps busy, by role; None: not known."""
    if view.unknown or demand.lengths is None:
        return dict.fromkeys(Role)
    lengths = demand.lengths
    p_long, _, l_short = lengths.split(min(threshold_tokens, float(lengths.tokens[-1])))
    each_s = 0.0 if math.isnan(float(l_short)) else float(view.local_prefill_s(np.asarray(float(l_short))))
    prefill = demand.rate_rps * (1 - float(p_long)) * each_s
    decode = demand.rate_rps * demand.mean_output_tokens * view.decode_step_s / max(1.0, view.max_batch_size)
    return {Role.PREFILL: prefill, Role.DECODE: decode}


def _share(load: float, num_workers: int) -> float:
    return load / num_workers if num_workers else (math.inf if load > _NOTHING else 0.0)


def _require(ok: bool, key: str, allowed: str) -> None:
    if not ok:
        raise InvalidConfig(key, f"must be {allowed}")
