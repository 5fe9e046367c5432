"""The live planner around a fleet on a virtual clock: what it publishes, whom it converts, and that it keeps calm."""

from __future__ import annotations

import asyncio
import logging
import math
from collections.abc import Iterable
from dataclasses import replace
from itertools import pairwise

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from cluster.config import PLANNER_MODES, PlannerConfig, PoolConfig
from cluster.cost_model import NO_COSTS
from cluster.demand import DemandMeter
from cluster.planner import HISTORY_KEPT, POLICIES, Planner
from cluster.planning_policy import PlannerSettings
from cluster.pool_scaler import PoolScaler, WorkerPhase
from cluster.role_conversion import Outcome
from cluster.scaling_policy import ScalingSettings
from core.errors import InvalidRequest
from core.request import ClusterId, EngineId, Role, WorkerId
from tests.unit.cluster.fake_fleet import Fleet, Stream
from tests.unit.cluster.fake_worker import DECODED, Visit, expected_tokens
from tests.unit.cluster.gateway_and_fakes import PROMPT, gateway, until

SHORT = Stream(2.0, (1500, 2000, 2500), output_tokens=128)  # 2 + 2 workers are right for it: 10 and 12.5 req/s
LONG = replace(SHORT, output_tokens=640)  # 1 + 3: 5 and 3.8 req/s, instead of 10 and 2.5
MIXED = Stream(4.0, (500, 1000, 1500, 2000, 3000, 4000, 6000, 8000), output_tokens=64)
WIDE, NARROW = 2e8, 2e7  # bytes/s: 2,500 and 250 tokens of K/V


async def run(fleet: Fleet, seconds: float, stream: Stream | None = None) -> list[tuple[float, tuple[int, int], float]]:
    """(time, roles, threshold) after each look."""
    seen = []
    for now in fleet.run(seconds, stream):
        await asyncio.sleep(0)  # what the planner asked of a worker
        seen.append((now, fleet.roles, fleet.threshold))
    return seen


def changes(values: Iterable[object]) -> int:
    return sum(a != b for a, b in pairwise(values))


def test_every_mode_has_a_policy() -> None:
    assert tuple(POLICIES) == PLANNER_MODES


# ---- roles ----


async def test_a_surge_of_long_answers_turns_a_prefill_worker_to_decode_and_back_when_it_is_over() -> None:
    fleet = Fleet(2, 2)
    calm = await run(fleet, 60, SHORT)
    surge = await run(fleet, 120, LONG)
    after = await run(fleet, 150, SHORT)

    assert {roles for _, roles, _ in calm} == {(2, 2)}
    assert (surge[-1][1], after[-1][1]) == ((1, 3), (2, 2))
    assert changes(roles for _, roles, _ in (*calm, *surge, *after)) == 2, "once there, once back"
    status = fleet.planner.status
    assert status.conversions == {(Role.DECODE, Outcome.DONE): 1, (Role.PREFILL, Outcome.DONE): 1}
    assert status.changes["roles", "more_decode"] == 1
    assert status.changes["roles", "more_prefill"] == 1
    assert status.target is not None
    assert status.target.numbers["mean_output_tokens"] == pytest.approx(128, rel=0.2)


@pytest.mark.parametrize("where", ["worker", "gateway"])
async def test_while_a_queue_grows_the_surge_is_answered_within_three_answers(where: str) -> None:
    fleet = Fleet(2, 2)
    await run(fleet, 60, SHORT)
    if where == "worker":
        for name in ("decode-0", "decode-1"):
            fleet.workers[name].load = replace(fleet.workers[name].load, num_waiting=4)
    else:
        fleet.num_queued = 3
    surge = await run(fleet, 39, LONG)  # of 12.8 s each

    assert surge[-1][1] == (1, 3)


async def test_one_worker_of_each_role_is_left_alone() -> None:
    fleet = Fleet(1, 1)
    await run(fleet, 60, SHORT)
    await run(fleet, 60, LONG)
    await run(fleet, 60, replace(SHORT, prompts=(20_000,), output_tokens=4))

    assert fleet.roles == (1, 1)
    assert not any(worker.told for worker in fleet.workers.values())


@pytest.mark.parametrize("bounds", [PlannerSettings(min_prefill=2), PlannerSettings(max_decode=2)])
async def test_configured_bounds_are_kept(bounds: PlannerSettings) -> None:
    fleet = Fleet(2, 2, config=PlannerConfig(dual=bounds))
    await run(fleet, 120, LONG)

    assert fleet.roles == (2, 2)


async def test_a_worker_that_never_drains_is_given_up_and_keeps_its_new_role(caplog: pytest.LogCaptureFixture) -> None:
    fleet = Fleet(2, 2, config=PlannerConfig(convert_timeout_s=20.0))
    fleet.workers["prefill-0"].stuck = fleet.workers["prefill-1"].stuck = True
    with caplog.at_level(logging.INFO):
        await run(fleet, 100, LONG)

    assert fleet.planner.status.conversions == {(Role.DECODE, Outcome.GAVE_UP): 1}
    assert fleet.planner.status.changing == ()
    assert fleet.roles == (1, 3)
    assert "prefill-0 to decode: gave_up: after 20 s 3 of its sequences are of its earlier role" in caplog.text
    # The next conversion does not wait for it.
    await run(fleet, 120, SHORT)
    assert fleet.planner.status.conversions[Role.PREFILL, Outcome.DONE] == 1


async def test_while_a_worker_changes_no_other_does() -> None:
    fleet = Fleet(3, 2)
    for worker in fleet.workers.values():
        worker.drain_s = 50.0
    stream = replace(LONG, output_tokens=1500)
    begun = {}
    for now in fleet.run(160, stream):
        await asyncio.sleep(0)
        for worker in fleet.workers.values():
            if worker.told and worker.worker_id not in begun:
                begun[worker.worker_id] = now
                assert sum(w.other_role_until > now for w in fleet.workers.values()) == 1
    first, second = sorted(begun.values())
    assert second - first >= 50


async def test_a_worker_that_dies_while_it_changes_is_said_and_the_rest_goes_on() -> None:
    fleet = Fleet(3, 2)
    fleet.workers["prefill-0"].drain_s = 30.0
    asked = None
    for now in fleet.run(120, LONG):
        await asyncio.sleep(0)
        if fleet.workers["prefill-0"].told and asked is None:
            asked = now
        if asked is not None and now > asked + 5:
            fleet.workers["prefill-0"].alive = False
    assert fleet.planner.status.conversions[Role.DECODE, Outcome.LOST] == 1
    assert fleet.planner.status.num_failures == 0
    assert fleet.roles == (1, 3), "another one took its place, after the cooldown"


async def test_a_worker_that_does_not_answer_is_counted_and_asked_again_only_after_the_cooldown() -> None:
    fleet = Fleet(2, 2)
    for worker in fleet.workers.values():
        worker.refusing = True
    await run(fleet, 100, LONG)

    assert fleet.roles == (2, 2)
    refused = fleet.planner.status.conversions[Role.DECODE, Outcome.REFUSED]
    assert 1 <= refused <= 3
    assert fleet.planner.status.changing == ()


async def test_a_change_that_somebody_else_asked_for_is_waited_for_too() -> None:
    fleet = Fleet(2, 2)
    await run(fleet, 10, SHORT)
    await fleet.workers["prefill-0"].set_role(Role.DECODE)
    await run(fleet, 0.5, SHORT)

    (changing,) = fleet.planner.status.changing
    assert (changing.worker_id, changing.role, changing.asked) == ("prefill-0", Role.DECODE, False)
    await run(fleet, 2, SHORT)
    assert fleet.planner.status.changing == ()
    assert fleet.planner.status.conversions == {}


@settings(max_examples=6, deadline=None)
@given(
    num_prefill=st.integers(1, 4),
    num_decode=st.integers(1, 4),
    num_away=st.integers(0, 2),
    rate=st.sampled_from([0.5, 2.0, 6.0]),
    prompts=st.lists(st.integers(16, 30_000), min_size=1, max_size=6),
    answer=st.integers(1, 1000),
    link=st.sampled_from([2e7, 2e8, 1e9]),
)
@example(num_prefill=4, num_decode=1, num_away=1, rate=6.0, prompts=[10_810], answer=389, link=2e8)  # settles late
@example(num_prefill=1, num_decode=1, num_away=1, rate=6.0, prompts=[3749], answer=1, link=2e8)  # takes turns
def test_on_constant_demand_roles_and_threshold_settle_and_stay(
    num_prefill: int, num_decode: int, num_away: int, rate: float, prompts: list[int], answer: int, link: float
) -> None:
    fleet = Fleet(num_prefill, num_decode, num_away=num_away, watch_s=1.0)
    fleet.link_bytes_per_s = link
    stream = Stream(rate, tuple(prompts), answer)

    async def play() -> list[tuple[float, tuple[int, int], float]]:
        # Roles are for what the links usually carry (link_memory_s), so the last conversion may come after minutes.
        await run(fleet, 600, stream)
        return await run(fleet, 60, stream)

    settled = asyncio.run(play())
    assert len({roles for _, roles, _ in settled}) == 1
    assert min(fleet.roles) >= 1
    assert sum(fleet.roles) == num_prefill + num_decode
    # Where neither side alone can take prompts of one length, they go to both in turns: no threshold divides a length.
    # A turn is as long as it takes a queue to grow by seconds, so there are few of them.
    assert changes(threshold for _, _, threshold in settled) <= 16
    assert len(fleet.planner.status.conversions) <= 1 or changes(roles for _, roles, _ in settled) == 0


async def test_over_grpc_a_worker_has_changed_when_its_last_sequence_of_the_earlier_role_has_ended() -> None:
    async with gateway(2, 2) as g:
        held = asyncio.Event()

        async def wait(visit: Visit) -> None:
            if visit.num_sent == 3:
                await held.wait()

        for name in ("decode-0", "decode-1"):
            g[name].hooks[DECODED] = wait
        answers = [asyncio.create_task(g.generate(g.request())) for _ in range(2)]  # one on each, in turn
        await until(lambda: g.router.num_open_tokens == 8)
        planner = Planner(
            g.membership,
            DemandMeter(g.clock, 30.0),
            g.router,
            PlannerConfig(interval_s=0.01),
            g.clock,
            cluster_id=ClusterId("test"),
            capacity=lambda *_: None,
            retest=lambda *_: None,
        )
        planner.start()
        client = g.membership.client(EngineId("decode-1-engine-1"))
        assert client is not None
        await client.set_role(Role.PREFILL)

        await until(lambda: planner.status.changing)
        assert (planner.status.num_prefill, planner.status.num_decode) == (3, 1)
        held.set()
        assert [answer.tokens[0] for answer in await asyncio.gather(*answers)] == [expected_tokens(PROMPT, 3, 8)] * 2
        await until(lambda: not planner.status.changing)
        assert "no PrfaaS worker" in g.membership.view().offload.reason
        await planner.close()


# ---- threshold and bandwidth ----


async def test_a_link_that_narrows_to_a_tenth_moves_the_threshold_within_two_seconds_and_back_when_it_widens() -> None:
    fleet = Fleet(2, 2, num_away=2)
    fleet.link_bytes_per_s = WIDE
    wide = (await run(fleet, 60, MIXED))[-1][2]
    fleet.link_bytes_per_s = NARROW
    narrow = await run(fleet, 2, MIXED)
    settled = await run(fleet, 58, MIXED)
    fleet.link_bytes_per_s = WIDE
    again = await run(fleet, 20, MIXED)

    assert wide < 8000, "some prompts go over the link"
    assert narrow[-1][2] > 1.5 * wide
    assert changes(threshold for _, _, threshold in settled[80:]) == 0, "on the narrow link it is calm"
    assert again[-1][2] < 0.8 * settled[-1][2]
    reasons = {kind_and_reason for kind_and_reason in fleet.planner.status.changes if kind_and_reason[0] == "threshold"}
    assert ("threshold", "capacity") in reasons


async def test_a_full_link_is_answered_within_a_second() -> None:
    fleet = Fleet(2, 2, num_away=2)
    fleet.link_bytes_per_s = WIDE
    before = (await run(fleet, 60, MIXED))[-1][2]
    fleet.queued_bytes += 20 * WIDE  # somebody else's traffic: 20 s of it
    after = await run(fleet, 1, MIXED)

    assert after[-1][2] > before
    offload = fleet.offloads[-1][1]
    assert not offload.abundant
    assert "queued on the link" in offload.reason or "in use" in offload.reason


async def test_on_a_path_that_carries_nothing_one_link_is_tested_now_and_then() -> None:
    fleet = Fleet(2, 2, num_away=2, config=PlannerConfig(retest_s=5.0))
    await run(fleet, 21)

    assert [round(at - 100) for at, *_ in fleet.retested] == [5, 11, 16], "each rests a moment when its bytes have gone"
    assert {(sender, receiver) for _, sender, receiver in fleet.retested} == {("east/prefill-0-e", "decode-0-e")}

    busy = Fleet(2, 2, num_away=2)
    busy.link_bytes_per_s = WIDE
    await run(busy, 60, MIXED)
    assert len(busy.retested) <= 1, "traffic tells enough"


async def test_a_lost_cluster_takes_its_threshold_along_and_brings_it_back() -> None:
    fleet = Fleet(2, 2, num_away=1)
    fleet.link_bytes_per_s = WIDE
    before = (await run(fleet, 40, MIXED))[-1][2]
    fleet.workers["east/prefill-0"].alive = False
    assert (await run(fleet, 0.5, MIXED))[-1][2] == math.inf
    assert "no PrfaaS worker" in fleet.offloads[-1][1].reason
    fleet.workers["east/prefill-0"].alive = True
    assert (await run(fleet, 0.5, MIXED))[-1][2] == pytest.approx(before, rel=0.5)


async def test_an_idle_link_makes_bandwidth_abundant_and_a_busy_one_scarce_at_once() -> None:
    fleet = Fleet(2, 2, num_away=2)
    fleet.link_bytes_per_s = 1e9
    await run(fleet, 30, MIXED)
    assert fleet.offloads[-1][1].abundant

    fleet.link_bytes_per_s = 1e8
    await run(fleet, 3, MIXED)
    assert not fleet.offloads[-1][1].abundant
    changed = fleet.planner.status.changes
    assert changed["mode", "link_idle"] == 2, "scarce for a while although the link idles, then abundant"


# ---- what it says ----


async def test_without_costs_everything_stays_and_it_says_why() -> None:
    fleet = Fleet(2, 2, num_away=1)
    fleet.costs = NO_COSTS
    await run(fleet, 60, LONG)

    status = fleet.planner.status
    assert status.target is not None
    assert "no costs are known yet" in status.target.reason
    assert (fleet.threshold, fleet.roles) == (math.inf, (2, 2))
    assert ("threshold", "no_costs") in status.changes


async def test_every_change_is_published_logged_counted_and_in_the_history_once(
    caplog: pytest.LogCaptureFixture,
) -> None:
    fleet = Fleet(2, 2, num_away=1)
    fleet.link_bytes_per_s = WIDE
    with caplog.at_level(logging.INFO, logger="cluster.planner"):
        await run(fleet, 40, MIXED)
    status = fleet.planner.status
    said = [sample.change for sample in status.history if sample.change]

    assert sum(status.changes.values()) == sum(change.count(";") + 1 for change in said)
    assert len([r for r in caplog.records if r.message.startswith("plan: threshold")]) == sum(
        count for (kind, _), count in status.changes.items() if kind == "threshold"
    )
    assert all(offload.reason for _, offload in fleet.offloads)
    assert len(fleet.offloads) < 40, "not at each of 160 looks"
    assert said[0].startswith("threshold 0 tokens")  # the PrfaaS worker is sooner for all of them while it idles


async def test_the_history_has_a_sample_each_second_and_no_end_of_them() -> None:
    fleet = Fleet(1, 1)
    await run(fleet, 10)
    assert 10 <= len(fleet.planner.status.history) <= 12

    await run(fleet, HISTORY_KEPT + 20)
    history = fleet.planner.status.history
    assert len(history) == HISTORY_KEPT
    assert history[-1].at - history[0].at == pytest.approx(HISTORY_KEPT, rel=0.05)


async def test_what_disaggregation_gains_is_told_once_enough_requests_were_measured() -> None:
    fleet = Fleet(2, 2)
    await run(fleet, 60, SHORT)
    target = fleet.planner.status.target

    assert target is not None
    assert target.gain is not None
    assert target.gain.disaggregated.throughput_rps == pytest.approx(10, rel=0.1)
    assert target.advice in ("disaggregate", "colocate")
    assert (target.advice == "colocate") == (target.gain.throughput_ratio < 1 / 1.1)


@pytest.mark.parametrize(("mode", "threshold"), [("static", 3000.0), ("off", math.inf)])
async def test_a_static_plan_keeps_its_threshold_and_an_off_one_offloads_nothing(mode: str, threshold: float) -> None:
    fleet = Fleet(2, 2, num_away=1, config=PlannerConfig(mode=mode, threshold_tokens=3000))
    fleet.planner.start()
    await asyncio.sleep(0)
    if mode == "static":
        await run(fleet, 60, LONG)
    await fleet.planner.close()

    assert fleet.threshold == threshold
    assert fleet.roles == (2, 2)
    assert fleet.planner.status.mode == mode
    assert fleet.offloads[-1][1].reason


async def test_a_look_that_fails_costs_the_look_and_not_the_plan(caplog: pytest.LogCaptureFixture) -> None:
    fleet = Fleet(1, 1, config=PlannerConfig(interval_s=0.001))

    def broken() -> None:
        raise ZeroDivisionError("a bug")

    fleet.view = broken  # type: ignore[method-assign, assignment]
    fleet.planner.start()
    async with asyncio.timeout(5):
        while fleet.planner.status.num_failures < 2:
            await asyncio.sleep(0.001)
    await fleet.planner.close()

    assert "the last plan stays" in caplog.text


# ---- pools ----


async def elastic(mode: str, fleet: Fleet) -> Planner:
    """A planner beside the fleet's own, with a decode pool that may have three workers; nobody starts any."""
    scaling = ScalingSettings(upscale_delay_s=5.0)
    config = PlannerConfig(mode=mode, scaling=scaling)
    pools = {Role.DECODE: PoolConfig(max_replicas=3)}
    scaler = PoolScaler(IdleFleet(), fleet, pools, scaling, 100.0, fleet.clock)
    await scaler.start()
    await scaler.close()
    return Planner(
        fleet,
        fleet.demand,
        fleet,
        config,
        fleet.clock,
        cluster_id=ClusterId("local"),
        capacity=lambda *_: None,
        retest=lambda *_: None,
        scaler=scaler,
    )


class IdleFleet:
    """Is asked for nothing but its members: the scaler does not run."""

    async def members(self) -> dict[WorkerId, Role]:
        return {WorkerId("decode-0"): Role.DECODE}

    async def add(self, role: Role) -> WorkerId:
        raise AssertionError

    async def phases(self) -> dict[WorkerId, WorkerPhase]:
        raise AssertionError

    async def retire(self, worker_id: WorkerId, timeout_s: float) -> None:
        raise AssertionError

    async def remove(self, worker_id: WorkerId) -> None:
        raise AssertionError


async def test_a_look_aims_the_pools_says_why_and_counts_the_change_once(caplog: pytest.LogCaptureFixture) -> None:
    fleet = Fleet(1, 1)
    planner = await elastic("dual", fleet)
    fleet.workers["decode-0"].load = replace(fleet.workers["decode-0"].load, num_waiting=4)
    with caplog.at_level(logging.INFO):
        for _ in range(8):
            fleet.clock.advance(1.0)
            planner.look()

    status = planner.status
    assert status.pools[Role.DECODE].wanted == 2
    assert {reason: count for (kind, reason), count in status.changes.items() if kind == "pools"} == {"queue": 1}
    assert "plan: decode pool 1 to 2: 1 more decode worker: 4 sequences wait to be decoded" in caplog.text
    assert status.target is not None
    assert "pools: " in status.target.reason


async def test_only_late_misses_of_objectives_are_a_reason_for_a_worker() -> None:
    fleet = Fleet(1, 1)
    planner = await elastic("dual", fleet)
    fleet.num_missed = {Role.DECODE: 7}
    for _ in range(8):
        fleet.clock.advance(1.0)
        planner.look()

    assert planner.status.pools[Role.DECODE].wanted == 1, "all of them were long ago"
    for second in range(16):
        fleet.num_missed = {Role.DECODE: 7 + second // 4}
        fleet.clock.advance(1.0)
        planner.look()
    assert planner.status.pools[Role.DECODE].wanted == 2
    assert planner.status.changes["pools", "tpot"] == 1


async def test_an_operator_holds_a_pool_in_every_mode_and_only_a_pool_that_may_grow() -> None:
    fleet = Fleet(1, 1)
    planner = await elastic("off", fleet)

    assert "held until" in planner.scale(Role.DECODE, 3)
    assert planner.status.pools[Role.DECODE].held == 3
    assert planner.status.changes == {("pools", "operator"): 1}
    for role, of in ((Role.PREFILL, planner), (Role.DECODE, fleet.planner)):
        with pytest.raises(InvalidRequest, match=f"pool: the {role} pool has a fixed size: set {role}.min_replicas"):
            of.scale(role, 2)
