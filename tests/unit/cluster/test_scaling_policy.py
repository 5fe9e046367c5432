"""The sizes of pools, decided: when one grows or shrinks, that a conversion comes first, and that it keeps calm."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cluster.length_distribution import LengthDistribution
from cluster.planning_policy import FRESH, DualTimescale, MeasuredDemand, PlannerMemory, PlannerSettings, PlanningView
from cluster.scaling_policy import (
    NOTHING_YET,
    PoolPlan,
    PoolView,
    ScalingMemory,
    ScalingSettings,
    ScalingView,
    plan_pools,
)
from cluster.throughput_model import OFFLOAD_NOTHING, Polynomial
from core.errors import InvalidConfig
from core.request import Role

PREFILL_S, STEP_S, BATCH, OUTPUT = 0.1, 0.02, 10.0, 100.0  # a decode worker: 5 req/s, a prefill worker: 10
SETTINGS = ScalingSettings(upscale_delay_s=10, downscale_delay_s=60, start_s=20)
LOOK_S = 1.0
WORLD_LOOK_S = 5.0


def demand(rate_rps: float) -> MeasuredDemand:
    return MeasuredDemand(LengthDistribution.from_sample([1000]), rate_rps, OUTPUT)


def view(at_s: float, num_prefill: int = 2, num_decode: int = 2, **changes: object) -> PlanningView:
    seen = PlanningView(
        at_s=at_s,
        num_prefill=num_prefill,
        num_decode=num_decode,
        num_changing=0,
        num_prfaas=0,
        prfaas_prefill_s=Polynomial((0.0,)),
        local_prefill_s=Polynomial((PREFILL_S,)),
        kv_bytes=Polynomial((0.0, 1000.0)),
        max_batch_size=BATCH,
        decode_step_s=STEP_S,
        link_bytes_per_s=0.0,
        link_utilisation=0.0,
        prfaas_queue_s=0.0,
        local_queue_s=0.0,
        decode_queue=0,
    )
    return replace(seen, **changes)  # type: ignore[arg-type]


def pool(role: Role, size: int = 2, least: int = 1, most: int = 4, **changes: object) -> PoolView:
    return replace(PoolView(least, most, size, {role: size}), **changes)  # type: ignore[arg-type]


def both(prefill: int = 2, decode: int = 2) -> dict[Role, PoolView]:
    return {Role.PREFILL: pool(Role.PREFILL, prefill), Role.DECODE: pool(Role.DECODE, decode)}


def looks(
    seconds: float,
    see: Callable[[float], PlanningView],
    scaling: ScalingView,
    rate_rps: float,
    chosen: ScalingSettings = SETTINGS,
    memory: ScalingMemory = NOTHING_YET,
    from_s: float = 0.0,
) -> list[PoolPlan]:
    """What is said at each look at a fleet that nobody changes."""
    said = []
    for step in range(round(seconds / LOOK_S) + 1):
        at_s = from_s + step * LOOK_S
        plan, memory = plan_pools(
            see(at_s), scaling, demand(rate_rps), OFFLOAD_NOTHING, memory, chosen, PlannerSettings()
        )
        said.append(plan)
    return said


def causes(plans: list[PoolPlan]) -> list[str]:
    """Without repetitions."""
    return [
        plan.cause
        for plan, before in zip(plans, [None, *plans], strict=False)
        if before is None or plan.cause != before.cause
    ]


def test_a_role_whose_time_is_used_up_gets_as_many_workers_as_its_load_needs_after_the_delay() -> None:
    # 14 req/s are 2.8 decode workers, 3.3 at 85 %, and 1.4 prefill workers: none of those is to be had by conversion
    plans = looks(10, view, ScalingView(both()), 14.0)

    assert [plan.pools.sizes[Role.DECODE] for plan in plans] == [2] * 10 + [4]
    assert plans[-1].cause == "utilisation"
    assert plans[-1].reason == "pools: 2 more decode workers: 140% of its time is in use, 85% are enough"
    assert plans[-1].numbers["decode_load_workers"] == pytest.approx(2.8)
    assert plans[-1].numbers["prefill_utilisation"] == pytest.approx(0.7)


def test_while_the_other_role_has_slack_a_conversion_comes_first_and_a_machine_only_if_none_came() -> None:
    # 9 req/s: 1.8 of 2 decode workers, and 0.9 of 4 prefill workers
    plans = looks(50, lambda at: view(at, 4, 2), ScalingView(both(4, 2)), 9.0)

    assert causes(plans) == ["delay", "conversion_first", "utilisation"]
    assert [plan.cause for plan in plans].index("utilisation") == 10 + SETTINGS.conversion_wait_s


def test_while_a_worker_changes_its_role_nothing_is_asked_for() -> None:
    plans = looks(30, lambda at: view(at, num_changing=1), ScalingView(both()), 14.0)

    assert set(causes(plans)) == {"changing"}


@pytest.mark.parametrize(
    ("seen", "scaling", "role", "cause"),
    [
        ({"decode_queue": 300}, {}, Role.DECODE, "queue"),
        ({"num_queued": 300}, {"decode_fullness": 1.0}, Role.DECODE, "queue"),
        ({"num_queued": 300}, {"decode_fullness": 0.5}, Role.PREFILL, "queue"),
        ({"local_queue_s": 30.0}, {}, Role.PREFILL, "queue"),
        ({"local_queue_s": 0.6}, {"ttft_s": 1.0, "pools": both(2, 2)}, None, ""),
        ({}, {"missed": {Role.PREFILL: 1}}, Role.PREFILL, "ttft"),
        ({}, {"missed": {Role.DECODE: 1}}, Role.DECODE, "tpot"),
    ],
)
def test_what_waits_asks_for_one_worker_of_the_role_that_it_waits_for(
    seen: dict[str, object], scaling: dict[str, object], role: Role | None, cause: str
) -> None:
    # 6 req/s: neither role is loaded beyond its mark, and neither could spare a worker
    (*_, plan) = looks(10, lambda at: view(at, 1, 2, **seen), ScalingView(**{"pools": both(1, 2)} | scaling), 6.0)  # type: ignore[arg-type]

    if role is None:
        assert plan.cause == "delay", "0.6 s of prefill at 60 % of the time should be gone in 1.5 s, a start takes 20"
    else:
        before = {Role.PREFILL: 1, Role.DECODE: 2}
        assert (plan.cause, plan.pools.sizes) == (cause, {**before, role: before[role] + 1})


def test_a_queue_that_should_be_gone_before_a_worker_is_ready_is_given_as_long() -> None:
    quick, slow = (ScalingView({Role.PREFILL: pool(Role.PREFILL, 1, start_s=start_s)}) for start_s in (4.0, 30.0))
    queued = lambda at: view(at, 1, 2, local_queue_s=2.0)  # noqa: E731

    # 6 req/s use 60 % of its time: 2 s of queue should be gone in 5 s
    assert causes(looks(10, queued, quick, 6.0)) == ["delay", "queue"]
    assert causes(looks(29, queued, slow, 6.0)) == ["delay"]
    assert causes(looks(30, queued, slow, 6.0)) == ["delay", "queue"], "and was not"


def test_workers_on_their_way_count_and_no_more_than_max_pending_are() -> None:
    coming = {Role.DECODE: pool(Role.DECODE, 2, most=9, wanted=4, num_pending=2)}

    assert causes(looks(30, view, ScalingView(coming), 14.0)) == ["balanced"]
    assert causes(looks(30, lambda at: view(at, 4, 2), ScalingView(coming), 30.0))[-1] == "pending"
    unasked = {Role.DECODE: replace(coming[Role.DECODE], num_pending=0)}  # nobody could place them
    assert causes(looks(30, lambda at: view(at, 4, 2), ScalingView(unasked), 30.0))[-1] == "pending"


def test_while_something_waits_what_is_on_its_way_is_not_withdrawn() -> None:
    coming = {Role.DECODE: pool(Role.DECODE, 1, wanted=2, num_pending=1)}

    plans = looks(200, lambda at: view(at, 1, 1, decode_queue=3), ScalingView(coming), 0.5)
    assert causes(plans) == ["balanced"]
    assert plans[-1].pools.sizes == {Role.DECODE: 2}


def test_a_pool_that_has_its_most_says_so() -> None:
    full = {Role.DECODE: pool(Role.DECODE, 2, most=2, least=1)}

    plans = looks(30, view, ScalingView(full), 14.0)
    assert causes(plans) == ["at_max"]
    assert plans[-1].pools.sizes == {Role.DECODE: 2}


def test_the_bounds_of_the_roles_hold_whatever_the_pools_may() -> None:
    bounds = PlannerSettings(max_decode=2, min_decode=2)
    plan, _ = plan_pools(view(0.0), ScalingView(both()), demand(14.0), OFFLOAD_NOTHING, NOTHING_YET, SETTINGS, bounds)
    assert (plan.cause, plan.reason.endswith("planner.dual.max_decode is 2")) == ("at_max", True)
    memory = NOTHING_YET
    for at in range(200):
        seen = view(float(at), 1, 2)
        plan, memory = plan_pools(seen, ScalingView(both(1, 2)), demand(1.0), OFFLOAD_NOTHING, memory, SETTINGS, bounds)
    assert plan.pools.sizes[Role.DECODE] == 2


def test_a_worker_too_many_goes_after_the_delay_the_price_of_a_start_included() -> None:
    # 4 req/s: 0.8 of 2 decode workers; 1 would be used to 80 %. At 2 req/s to 40 %.
    assert causes(looks(100, lambda at: view(at, 1, 2), ScalingView(both(1, 2)), 4.0)) == ["balanced"]
    plans = looks(60, lambda at: view(at, 1, 2), ScalingView(both(1, 2)), 2.0)
    assert causes(plans) == ["delay", "slack"]
    assert plans[-1].pools.sizes == {Role.PREFILL: 1, Role.DECODE: 1}
    assert plans[-1].pools.give_back is Role.DECODE
    assert len(plans) == 61

    dear = {Role.PREFILL: pool(Role.PREFILL, 1), Role.DECODE: pool(Role.DECODE, 2, start_s=90.0)}
    assert causes(looks(89, lambda at: view(at, 1, 2), ScalingView(dear), 2.0)) == ["delay"]
    assert causes(looks(90, lambda at: view(at, 1, 2), ScalingView(dear), 2.0)) == ["delay", "slack"]


def test_a_worker_of_the_other_pool_goes_if_it_is_the_one_that_has_the_role_now() -> None:
    pools = {Role.PREFILL: replace(pool(Role.PREFILL, 2), ready={Role.PREFILL: 1, Role.DECODE: 1})}

    plans = looks(60, lambda at: view(at, 1, 3), ScalingView(pools), 2.0)

    assert (plans[-1].cause, plans[-1].pools.sizes) == ("slack", {Role.PREFILL: 1})
    assert plans[-1].pools.give_back is Role.DECODE


def test_what_is_not_ready_and_not_needed_any_more_is_withdrawn() -> None:
    pools = {Role.DECODE: pool(Role.DECODE, 1, wanted=2, num_pending=1)}

    plans = looks(60, lambda at: view(at, 1, 1), ScalingView(pools), 0.5)

    assert plans[-1].pools.sizes == {Role.DECODE: 1}
    assert "not needed any more" in plans[-1].reason


def test_the_share_at_which_a_role_was_pressed_is_not_come_near_again_until_the_demand_has_halved() -> None:
    # The model says 30 % at 1.5 req/s, yet a queue grew: workers are slower than they are taken for.
    one, two = ScalingView({Role.DECODE: pool(Role.DECODE, 1)}), ScalingView({Role.DECODE: pool(Role.DECODE, 2)})
    memory = NOTHING_YET
    for at in range(21):
        seen = view(float(at), 1, 1, decode_queue=4)
        plan, memory = plan_pools(seen, one, demand(1.5), OFFLOAD_NOTHING, memory, SETTINGS, PlannerSettings())
    assert (plan.cause, plan.pools.sizes) == ("queue", {Role.DECODE: 2})

    calm = looks(600, lambda at: view(at, 1, 2), two, 1.5, memory=memory, from_s=21.0)
    assert set(causes(calm)) == {"balanced"}
    less = looks(80, lambda at: view(at, 1, 2), two, 0.6, memory=memory, from_s=21.0)
    assert less[-1].pools.sizes == {Role.DECODE: 1} or "slack" in causes(less)


def test_an_idle_prefill_pool_goes_to_zero_if_it_may_and_comes_back_with_the_first_request() -> None:
    may = {Role.PREFILL: pool(Role.PREFILL, 1, least=0)}
    plans = looks(60, lambda at: view(at, 1, 1), ScalingView(may), 0.0)
    assert (plans[-1].cause, plans[-1].pools.sizes) == ("idle", {Role.PREFILL: 0})
    busy = looks(200, lambda at: view(at, 1, 1), ScalingView(may, num_running=1), 0.0)
    assert set(causes(busy)) == {"balanced"}
    must = {Role.PREFILL: pool(Role.PREFILL, 1)}
    assert {
        plan.pools.sizes[Role.PREFILL] for plan in looks(200, lambda at: view(at, 1, 1), ScalingView(must), 0.0)
    } == {1}

    gone = {Role.PREFILL: pool(Role.PREFILL, 0, least=0)}
    back = looks(10, lambda at: view(at, 0, 1), ScalingView(gone), 0.1)
    assert (back[-1].cause, back[-1].pools.sizes) == ("demand", {Role.PREFILL: 1})


def test_what_an_operator_holds_stays_whatever_comes_and_within_the_bounds() -> None:
    pools = {Role.DECODE: pool(Role.DECODE, 2, held=3), Role.PREFILL: pool(Role.PREFILL, 2, held=99)}

    plans = looks(100, view, ScalingView(pools), 100.0)

    assert causes(plans) == ["held"]
    assert plans[-1].pools.sizes == {Role.DECODE: 3, Role.PREFILL: 4}


def test_without_costs_only_what_waits_counts() -> None:
    unknown = lambda at: view(at, 1, 2, unknown="no costs are known yet")  # noqa: E731
    assert causes(looks(100, unknown, ScalingView(both(1, 2)), 100.0)) == ["balanced"]
    queued = lambda at: view(at, 1, 2, unknown="no costs are known yet", decode_queue=1)  # noqa: E731
    assert causes(looks(10, queued, ScalingView(both(1, 2)), 100.0)) == ["delay", "queue"]


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("downscale_utilisation", 0.9),
        ("upscale_utilisation", 1.1),
        ("max_pending", 0),
        ("upscale_delay_s", -1.0),
        ("start_price", -1.0),
        ("placement_timeout_s", 0.0),
        ("max_retry_s", 1.0),
    ],
)
def test_settings_that_mean_nothing_are_refused_by_name(key: str, value: float) -> None:
    with pytest.raises(InvalidConfig, match=r"downscale_utilisation|" + key):
        replace(SETTINGS, **{key: value})  # type: ignore[arg-type]


# ---- in a fleet that does what it is told ----


@dataclass
class World:
    """Workers whose true speed is ``truth`` times the predicted one, starts that take ``start_s``, real queues."""

    least: dict[Role, int]
    most: dict[Role, int]
    roles: dict[Role, int]  # ready, by role
    start_s: float
    truth: float
    now: float = 0.0
    wanted: dict[Role, int] = field(default_factory=dict)
    from_pool: dict[Role, dict[Role, int]] = field(default_factory=dict)  # pool |-> role |-> ready
    pending: list[tuple[float, Role]] = field(default_factory=list)
    waiting: dict[Role, float] = field(default_factory=lambda: dict.fromkeys(Role, 0.0))  # requests
    scaling_memory: ScalingMemory = NOTHING_YET
    memory: PlannerMemory = FRESH
    changes: list[tuple[float, str]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.wanted = dict(self.roles)
        self.from_pool = {
            role: {each: count if each is role else 0 for each in Role} for role, count in self.roles.items()
        }

    def run(self, seconds: float, rate_rps: float, bounds: PlannerSettings) -> None:
        policy = DualTimescale(bounds)
        end = self.now + seconds
        while self.now < end:
            self.now += WORLD_LOOK_S
            self._serve(rate_rps)
            for ready in [p for p in self.pending if p[0] <= self.now]:
                self.pending.remove(ready)
                self.roles[ready[1]] += 1
                self.from_pool[ready[1]][ready[1]] += 1
            seen = view(
                self.now,
                self.roles[Role.PREFILL],
                self.roles[Role.DECODE],
                local_queue_s=self.waiting[Role.PREFILL] * PREFILL_S / max(1, self.roles[Role.PREFILL]),
                decode_queue=int(self.waiting[Role.DECODE]),
            )
            asked = demand(rate_rps)
            target, self.memory = policy.plan(seen, asked, self.memory)
            moved = target.roles.num_prefill - seen.num_prefill
            pools = {
                role: PoolView(
                    self.least[role],
                    self.most[role],
                    self.wanted[role],
                    dict(self.from_pool[role]),
                    num_pending=sum(p is role for _, p in self.pending),
                    start_s=self.start_s,
                )
                for role in Role
            }
            plan, self.scaling_memory = plan_pools(
                replace(seen, num_changing=int(moved != 0)),
                ScalingView(pools, num_running=int(rate_rps > 0)),
                asked,
                OFFLOAD_NOTHING,
                self.scaling_memory,
                SETTINGS,
                bounds,
            )
            self._convert(moved)
            self._resize(plan)

    def _serve(self, rate_rps: float) -> None:
        each = {Role.PREFILL: PREFILL_S, Role.DECODE: OUTPUT * STEP_S / BATCH}
        for role in Role:
            room = self.roles[role] * self.truth / each[role]
            self.waiting[role] = max(0.0, self.waiting[role] + (rate_rps - room) * WORLD_LOOK_S)
        if not self.roles[Role.PREFILL]:
            self.waiting[Role.PREFILL] = 0.0  # decode workers prefill

    def _convert(self, moved: int) -> None:
        if not moved:
            return
        source, to = (Role.DECODE, Role.PREFILL) if moved > 0 else (Role.PREFILL, Role.DECODE)
        owner = next(p for p in (source, to) if self.from_pool[p][source])
        self.from_pool[owner][source] -= 1
        self.from_pool[owner][to] += 1
        self.roles[source] -= 1
        self.roles[to] += 1
        self.changes.append((self.now, f"{source} to {to}"))

    def _resize(self, plan: PoolPlan) -> None:
        for role, size in plan.pools.sizes.items():
            assert self.least[role] <= size <= self.most[role]
            if size != self.wanted[role]:
                self.changes.append((self.now, f"{role} {self.wanted[role]} to {size}: {plan.cause}"))
            while size > self.wanted[role]:
                self.wanted[role] += 1
                self.pending.append((self.now + self.start_s, role))
            while size < self.wanted[role]:
                self.wanted[role] -= 1
                mine = [p for p in self.pending if p[1] is role]
                if mine:
                    self.pending.remove(max(mine))
                    continue
                gone = plan.pools.give_back
                assert gone is not None, "it says of which role"
                self.from_pool[role][gone] -= 1
                self.roles[gone] -= 1
                assert self.from_pool[role][gone] >= 0, "the pool has one of that role"
        assert self.roles[Role.DECODE] >= 1
        assert self.roles[Role.PREFILL] >= min(1, self.least[Role.PREFILL])


POOL_BOUNDS = st.tuples(st.integers(1, 3), st.integers(0, 3), st.integers(0, 3))


@settings(max_examples=8, deadline=None)
@given(
    prefill=POOL_BOUNDS,
    decode=POOL_BOUNDS,
    rate_rps=st.floats(0.0, 40.0),
    truth=st.floats(0.3, 2.0),
    start_s=st.floats(1.0, 120.0),
)
def test_on_a_constant_demand_the_pools_settle_and_stay(
    prefill: tuple[int, int, int], decode: tuple[int, int, int], rate_rps: float, truth: float, start_s: float
) -> None:
    least = {Role.PREFILL: prefill[0], Role.DECODE: decode[0]}
    start = {Role.PREFILL: prefill[0] + prefill[1], Role.DECODE: decode[0] + decode[1]}
    most = {Role.PREFILL: start[Role.PREFILL] + prefill[2], Role.DECODE: start[Role.DECODE] + decode[2]}
    world = World(least, most, dict(start), start_s, truth)

    world.run(1800, rate_rps, PlannerSettings())

    late = [change for at, change in world.changes if at > 1200]
    assert not late, world.changes
    assert len(world.changes) <= 4 * sum(most.values())


def test_a_surge_is_answered_and_its_end_gives_every_machine_back() -> None:
    world = World(
        {Role.PREFILL: 1, Role.DECODE: 1},
        {Role.PREFILL: 1, Role.DECODE: 4},
        {Role.PREFILL: 1, Role.DECODE: 1},
        20.0,
        1.0,
    )
    world.run(300, 1.0, PlannerSettings())
    assert not world.changes
    world.run(300, 9.0, PlannerSettings())
    assert (world.wanted[Role.DECODE], world.waiting[Role.DECODE]) in ((3, 0), (4, 0)), (
        "what had queued may ask for one"
    )
    world.run(600, 1.0, PlannerSettings())
    assert world.roles == {Role.PREFILL: 1, Role.DECODE: 1}
    assert math.isclose(world.now, 1200)
