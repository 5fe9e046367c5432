"""The two loops step by step, and for any view: reasons, no empty pool, and calm under constant demand."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cluster.length_distribution import LengthDistribution
from cluster.planning_policy import (
    FRESH,
    DualTimescale,
    FleetTarget,
    MeasuredDemand,
    PlannerMemory,
    PlannerSettings,
    PlanningPolicy,
    PlanningView,
    Roles,
    StaticPlan,
)
from cluster.throughput_model import Polynomial
from core.errors import InvalidConfig

_CELLS = LengthDistribution.log_normal(9.0, 1.0, 128, 131_072).tokens
LENGTHS = LengthDistribution.from_sample([float(cell) for cell in _CELLS[::64]])  # 256 of them are enough, and quick
CHAT = MeasuredDemand(LENGTHS, rate_rps=2.0, mean_output_tokens=300)
LONG_ANSWERS = replace(CHAT, mean_output_tokens=6000)
VIEW = PlanningView(
    at_s=0.0,
    num_prefill=3,
    num_decode=3,
    num_changing=0,
    num_prfaas=2,
    prfaas_prefill_s=Polynomial((0.1, 4e-5)),
    local_prefill_s=Polynomial((0.1, 1e-4)),
    kv_bytes=Polynomial((1e8, 2e4)),
    max_batch_size=20,
    decode_step_s=0.025,
    link_bytes_per_s=12.5e9,
    link_utilisation=0.3,
    prfaas_queue_s=0.0,
    local_queue_s=0.0,
    decode_queue=0,
)
POLICY = DualTimescale()


def run(
    view: PlanningView, demand: MeasuredDemand, memory: PlannerMemory = FRESH, *, start_s: float = 0.0, steps: int = 40
) -> Iterator[tuple[FleetTarget, PlannerMemory]]:
    """One call a second; workers change their roles at once."""
    for step in range(steps):
        view = replace(view, at_s=start_s + step)
        target, memory = POLICY.plan(view, demand, memory)
        yield target, memory
        view = replace(view, num_prefill=target.roles.num_prefill, num_decode=target.roles.num_decode)


def last(view: PlanningView, demand: MeasuredDemand, **options: object) -> tuple[FleetTarget, PlannerMemory]:
    *_, final = run(view, demand, **options)  # type: ignore[arg-type]
    return final


def test_a_narrow_link_raises_the_threshold_and_a_wide_one_lowers_it_again() -> None:
    wide, memory = POLICY.plan(VIEW, CHAT, FRESH)
    narrow, memory = POLICY.plan(replace(VIEW, at_s=1, link_bytes_per_s=0.05e9), CHAT, memory)
    again, _ = POLICY.plan(replace(VIEW, at_s=2), CHAT, memory)

    assert narrow.threshold_tokens > wide.threshold_tokens
    assert again.threshold_tokens == pytest.approx(wide.threshold_tokens, rel=0.1)
    assert "moved from" in narrow.reason


def test_the_longer_queue_moves_the_threshold_away_from_it_and_when_it_is_gone_it_moves_back() -> None:
    busy = replace(CHAT, rate_rps=2.5)  # prompts of 13,000 tokens on average: 1.4 s locally, 0.6 s there
    calm, memory = POLICY.plan(VIEW, busy, FRESH)
    there, _ = POLICY.plan(replace(VIEW, at_s=1, prfaas_queue_s=5.0), busy, memory)
    here, memory = POLICY.plan(replace(VIEW, at_s=1, local_queue_s=5.0), busy, memory)
    again, _ = POLICY.plan(replace(VIEW, at_s=2), busy, memory)

    assert here.threshold_tokens < calm.threshold_tokens < there.threshold_tokens
    assert again.threshold_tokens == pytest.approx(calm.threshold_tokens, rel=0.05)
    assert [t.causes["threshold"] for t in (here, there)] == ["local_queue", "prfaas_queue"]


def test_a_worker_that_drains_does_not_count_before_it_has() -> None:
    grown = replace(VIEW, num_prefill=4, num_decode=2, num_changing=1)
    before, _ = POLICY.plan(replace(VIEW, num_changing=1), CHAT, FRESH)
    draining, memory = POLICY.plan(replace(grown, num_draining=1), CHAT, FRESH)
    drained, _ = POLICY.plan(replace(grown, at_s=1), CHAT, memory)

    assert draining.threshold_tokens == before.threshold_tokens < drained.threshold_tokens


def test_queues_alike_on_both_sides_move_nothing() -> None:
    calm, memory = POLICY.plan(VIEW, CHAT, FRESH)
    both, _ = POLICY.plan(replace(VIEW, at_s=1, prfaas_queue_s=3.0, local_queue_s=3.0), CHAT, memory)

    assert both.threshold_tokens == calm.threshold_tokens


def test_a_full_link_without_a_queue_carries_what_it_should() -> None:
    calm, memory = POLICY.plan(VIEW, CHAT, FRESH)
    full, _ = POLICY.plan(replace(VIEW, at_s=1, link_utilisation=1.0), CHAT, memory)

    assert full.threshold_tokens == calm.threshold_tokens


@pytest.mark.parametrize(
    ("change", "reason"),
    [({"num_prfaas": 0}, "no PrfaaS worker"), ({"link_bytes_per_s": 0.0}, "the link to the PrfaaS workers is down")],
)
def test_what_cannot_be_reached_gets_nothing(change: dict[str, float], reason: str) -> None:
    target, _ = POLICY.plan(replace(VIEW, **change), CHAT, FRESH)

    assert target.threshold_tokens == math.inf
    assert reason in target.reason


@pytest.mark.parametrize(
    ("link_bytes_per_s", "threshold"),
    # 1e8 + 2e4 n bytes against 0.1 + 1e-4 n s: at 4e8 bytes/s one of 2,048 tokens is sooner here, one of 4,096 there
    [(12.5e9, 0.0), (4e8, 2048.0), (1e8, math.inf)],
)
def test_before_the_first_request_prompts_go_where_they_would_be_sooner(
    link_bytes_per_s: float, threshold: float
) -> None:
    target, memory = POLICY.plan(replace(VIEW, link_bytes_per_s=link_bytes_per_s), MeasuredDemand(None, 0, 0), FRESH)

    assert target.roles == Roles(3, 3)
    assert target.threshold_tokens == threshold
    assert target.causes["threshold"] == "no_demand"
    assert ("none is sooner there" in target.reason) == (threshold == math.inf)
    assert memory.threshold_tokens is None, "the first measured one is no move"


def test_long_answers_turn_a_prefill_worker_into_a_decode_worker_and_short_ones_turn_it_back() -> None:
    settled, memory = last(VIEW, CHAT, steps=200)
    view = replace(VIEW, num_prefill=settled.roles.num_prefill, num_decode=settled.roles.num_decode, decode_queue=9)

    surged, memory = last(view, LONG_ANSWERS, memory=memory, start_s=200.0, steps=200)
    assert surged.roles.num_decode > settled.roles.num_decode

    view = replace(view, num_prefill=surged.roles.num_prefill, num_decode=surged.roles.num_decode, decode_queue=0)
    back, _ = last(view, CHAT, memory=memory, start_s=400.0, steps=300)
    assert back.roles == settled.roles


def test_a_link_that_is_narrow_for_a_minute_converts_nobody_and_one_that_stays_narrow_does() -> None:
    """3 + 3 workers are right on 12.5 GB/s, 4 + 2 on 0.1."""
    _, memory = last(VIEW, CHAT, steps=100)
    narrow = replace(VIEW, link_bytes_per_s=1e8, local_queue_s=5.0)
    minute, at_its_end = last(narrow, CHAT, memory=memory, start_s=100.0, steps=60)
    later, _ = last(narrow, CHAT, memory=at_its_end, start_s=160.0, steps=600)

    assert minute.roles == Roles(3, 3)
    assert later.roles == Roles(4, 2)


def test_one_conversion_at_a_time_with_patience_and_cooldown() -> None:
    pressed = replace(VIEW, decode_queue=5)
    targets = [target for target, _ in run(pressed, LONG_ANSWERS, steps=50)]
    changes = [i for i, (a, b) in enumerate(pairwise(targets), 1) if a.roles != b.roles]

    assert changes[0] == 5  # the second look
    assert all(later - earlier >= 30 for earlier, later in pairwise(changes))
    assert targets[changes[0]].roles == Roles(2, 4)
    assert "one prefill worker becomes a decode worker" in targets[changes[0]].reason


def test_while_a_worker_changes_no_other_does() -> None:
    target, _ = last(replace(VIEW, decode_queue=5, num_changing=1), LONG_ANSWERS)

    assert target.roles == Roles(3, 3)
    assert "still change" in target.reason


def test_a_conversion_that_does_not_pay_is_not_made() -> None:
    dear = DualTimescale(PlannerSettings(conversion_s=1e6))
    memory = FRESH
    for second in range(60):
        target, memory = dear.plan(replace(VIEW, at_s=second, decode_queue=5), LONG_ANSWERS, memory)
        assert target.roles == Roles(3, 3)


# ---- what measured demand may be wrong by ----


def test_on_too_few_requests_no_worker_changes_its_role() -> None:
    few = replace(LONG_ANSWERS, num_requests=15.0)
    target, _ = last(replace(VIEW, decode_queue=5), few)

    assert target.roles == Roles(3, 3)
    assert "only 15 requests" in target.reason
    assert target.advice == ""


def test_what_chance_may_have_made_must_be_exceeded_by_a_gain() -> None:
    pressed = replace(VIEW, decode_queue=5)
    sure, _ = last(pressed, replace(LONG_ANSWERS, relative_error=0.0), steps=20)
    unsure, _ = last(pressed, replace(LONG_ANSWERS, relative_error=2.0), steps=20)

    assert sure.roles == Roles(2, 4)
    assert unsure.roles == Roles(3, 3)
    assert "210% of" in unsure.reason


@pytest.mark.parametrize("bounds", [{"min_prefill": 3}, {"max_decode": 3}])
def test_roles_stay_within_their_bounds(bounds: dict[str, int]) -> None:
    policy = DualTimescale(PlannerSettings(**bounds))  # type: ignore[arg-type]
    memory = FRESH
    for second in range(60):
        target, memory = policy.plan(replace(VIEW, at_s=second, decode_queue=5), LONG_ANSWERS, memory)
        assert target.roles == Roles(3, 3)


@pytest.mark.parametrize("roles", [(0, 4), (4, 0)])
def test_a_pool_that_is_empty_is_left_to_whoever_emptied_it(roles: tuple[int, int]) -> None:
    target, _ = last(replace(VIEW, num_prefill=roles[0], num_decode=roles[1], decode_queue=5), LONG_ANSWERS)

    assert target.roles == Roles(*roles)
    assert "a pool is empty" in target.reason


def test_without_costs_nothing_is_offloaded_and_nobody_converted() -> None:
    target, _ = last(replace(VIEW, unknown="no costs are known yet", decode_queue=5), LONG_ANSWERS)

    assert (target.threshold_tokens, target.roles, target.advice) == (math.inf, Roles(3, 3), "")
    assert "no costs are known yet: nothing is offloaded" in target.reason


# ---- the link ----


def test_a_link_queue_counts_beyond_one_hand_over() -> None:
    narrow = replace(VIEW, link_bytes_per_s=1e9)  # a long prompt of about 30,000 tokens takes 0.7 s
    settled, memory = POLICY.plan(narrow, CHAT, FRESH)
    one, _ = POLICY.plan(replace(narrow, at_s=2.0, link_queue_s=0.7), CHAT, memory)
    many, _ = POLICY.plan(replace(narrow, at_s=2.0, link_queue_s=14.0), CHAT, memory)

    assert one.threshold_tokens == settled.threshold_tokens
    assert many.threshold_tokens > settled.threshold_tokens
    assert many.causes["threshold"] == "link_queue"


def test_over_a_link_that_is_too_narrow_for_anything_nothing_goes() -> None:
    cut = replace(VIEW, link_bytes_per_s=1e5, link_utilisation=1.0)
    target, _ = POLICY.plan(cut, CHAT, FRESH)

    assert target.numbers["offload_fraction"] == 0


def test_when_not_all_can_be_served_one_side_is_kept_just_full_instead_of_overrunning_both() -> None:
    """On a link of 0.1 GB/s, 8 requests/s: balanced, both sides would take 60 % of theirs."""
    narrow = replace(VIEW, link_bytes_per_s=1e8)
    flood = replace(CHAT, rate_rps=8.0)
    calm, _ = POLICY.plan(narrow, replace(CHAT, rate_rps=1.0), FRESH)
    target, _ = POLICY.plan(narrow, flood, FRESH)

    assert target.threshold_tokens < calm.threshold_tokens
    short = 1 - target.numbers["offload_fraction"]
    assert 0.85 < 8.0 * short / target.numbers["theta_prefill_rps"] <= 0.96  # most_full


@pytest.mark.parametrize(
    ("change", "demand", "cause"),
    [
        ({"link_utilisation": 0.7}, CHAT, "link_busy"),
        ({}, replace(CHAT, rate_rps=600.0), "predicted_egress"),
        ({"link_queue_s": 30.0}, CHAT, "link_queue"),
        ({"num_prfaas": 0}, CHAT, "no_link"),
    ],
)
def test_bandwidth_is_scarce_at_once_for_each_of_its_reasons(
    change: dict[str, float], demand: MeasuredDemand, cause: str
) -> None:
    rich = PlannerMemory(abundant=True, calm_since_s=0.0)
    view = replace(VIEW, link_bytes_per_s=5e10, link_utilisation=0.0)
    kept, _ = POLICY.plan(view, CHAT, rich)
    lost, memory = POLICY.plan(replace(view, **change), demand, rich)

    assert kept.abundant
    assert not lost.abundant
    assert lost.causes["mode"] == cause
    assert memory.calm_since_s is None


def test_bandwidth_is_abundant_after_a_while_and_between_the_marks_stays_what_it_is() -> None:
    idle = replace(VIEW, link_bytes_per_s=5e10, link_utilisation=0.1)
    memory = FRESH
    modes = []
    for second in range(8):
        target, memory = POLICY.plan(replace(idle, at_s=second), CHAT, memory)
        modes.append(target.abundant)
    assert modes == [False] * 5 + [True] * 3

    between, memory = POLICY.plan(replace(idle, at_s=8.0, link_utilisation=0.5), CHAT, memory)
    assert between.abundant
    poor, _ = POLICY.plan(replace(idle, at_s=8.0, link_utilisation=0.5), CHAT, FRESH)
    assert not poor.abundant


# ---- whether to disaggregate ----


def test_colocation_is_advised_where_it_sustains_enough_more_and_until_it_does_not() -> None:
    # One prefill worker is far too few for this; it stays so, as the others are needed as they are.
    keep = DualTimescale(PlannerSettings(max_prefill=1))

    def look(view: PlanningView, memory: PlannerMemory, times: int) -> tuple[FleetTarget, PlannerMemory]:
        for _ in range(times):
            view = replace(view, at_s=view.at_s + 5.0)
            target, memory = keep.plan(view, CHAT, memory)
        return target, memory

    lopsided = replace(VIEW, num_prfaas=0, num_prefill=1, num_decode=5)
    soon, memory = look(lopsided, FRESH, 3)
    assert soon.advice == ""
    lop, memory = look(replace(lopsided, at_s=15.0), memory, 1)
    assert lop.advice == "colocate"
    assert lop.gain is not None
    assert lop.gain.throughput_ratio < 1 / 1.1
    assert lop.numbers["judged_throughput_rps"] == pytest.approx(lop.gain.disaggregated.throughput_rps)

    balanced = replace(VIEW, num_prfaas=2, at_s=100.0)
    once, memory = look(balanced, memory, 1)
    assert once.advice == "colocate", "one look changes nothing"
    assert look(replace(balanced, at_s=105.0), memory, 3)[0].advice == "disaggregate"


def test_static_plan_keeps_what_it_was_told() -> None:
    target, memory = StaticPlan(5000).plan(replace(VIEW, link_utilisation=1.0), LONG_ANSWERS, FRESH)

    assert (target.threshold_tokens, target.roles, memory) == (5000, Roles(3, 3), FRESH)
    assert target.reason


VIEWS = st.builds(
    lambda prefill, decode, prfaas, link, busy, queue, local, waiting: replace(
        VIEW,
        num_prefill=prefill,
        num_decode=decode,
        num_prfaas=prfaas,
        link_bytes_per_s=link,
        link_utilisation=busy,
        prfaas_queue_s=queue,
        local_queue_s=local,
        decode_queue=waiting,
    ),
    st.integers(1, 6),
    st.integers(1, 6),
    st.integers(0, 4),
    st.sampled_from([0.0, 1e7, 1e9, 1e10]),
    st.floats(0, 1),
    st.floats(0, 20),
    st.floats(0, 20),
    st.integers(0, 100),
)
DEMANDS = st.builds(
    lambda sample, rate, output: MeasuredDemand(LengthDistribution.from_sample(sample), rate, output),
    st.lists(st.integers(1, 131_072), min_size=1, max_size=30),
    st.floats(0, 100),
    st.floats(1, 20_000),
)


@settings(max_examples=15, deadline=None)
@given(VIEWS, DEMANDS)
def test_on_constant_demand_it_settles_and_stays(view: PlanningView, demand: MeasuredDemand) -> None:
    steps = 12 * 70  # eleven workers could each change once, a cooldown and a patience apart
    targets = []
    memory = FRESH
    for step in range(0, steps, 5):
        view = replace(view, at_s=float(step))
        target, memory = POLICY.plan(view, demand, memory)
        targets.append(target)
        view = replace(view, num_prefill=target.roles.num_prefill, num_decode=target.roles.num_decode)

    tail = targets[-20:]
    assert {(target.roles, target.threshold_tokens) for target in tail} == {(tail[0].roles, tail[0].threshold_tokens)}


EVERY_POLICY = (StaticPlan(5000), DualTimescale(PlannerSettings(patience=1, cooldown_s=0.0)))


@pytest.mark.parametrize("policy", EVERY_POLICY, ids=lambda policy: type(policy).__name__)
@settings(max_examples=60, deadline=None)
@given(VIEWS, DEMANDS, st.floats(0, 1000), st.integers(0, 1))
def test_every_target_has_a_reason_and_no_empty_pool_and_comes_twice_alike(
    policy: PlanningPolicy, view: PlanningView, demand: MeasuredDemand, at_s: float, num_changing: int
) -> None:
    memory = PlannerMemory(verdict=-1, verdicts=5)
    view = replace(view, at_s=at_s, num_changing=num_changing)

    target, kept = policy.plan(view, demand, memory)

    assert target.reason
    assert set(target.causes) == {"threshold", "mode", "roles", "advice"}
    assert all(target.causes.values())
    assert target.roles.num_prefill >= 1
    assert target.roles.num_decode >= 1
    assert target.roles.num_prefill + target.roles.num_decode == view.num_prefill + view.num_decode
    assert abs(target.roles.num_prefill - view.num_prefill) <= (0 if num_changing else 1)
    assert target.threshold_tokens >= 0
    assert policy.plan(view, demand, memory) == (target, kept)


@pytest.mark.parametrize(
    ("wrong", "key"),
    [
        ({"most_full": 1.1}, "most_full"),
        ({"balance_s": 0.0}, "balance_s"),
        ({"patience": 0}, "p"),
        ({"abundant_utilisation": 0.7}, "abundant_utilisation"),
        ({"min_prefill": 0}, "min_prefill"),
        ({"max_decode": 1, "min_decode": 2}, "max_decode"),
    ],
)
def test_wrong_settings_are_refused(wrong: dict[str, float], key: str) -> None:
    with pytest.raises(InvalidConfig, match=key):
        PlannerSettings(**wrong)  # type: ignore[arg-type]
