"""What is predicted of one route: by hand for small loads, and that prediction keeps load from swinging."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cluster.admission import Bound, judge, lack_of_room
from cluster.config import AdmissionConfig
from cluster.cost_model import ComputeCost, CostView, LinearCost
from cluster.load_forecast import (
    Demand,
    Outlook,
    Released,
    RunningSum,
    lasts,
    load_at,
    predict_tpot,
    predict_ttft,
    queue_s,
    seconds_until_tpot,
)
from cluster.service_times import Line, ServiceTimes
from cluster.view import Forecast, WorkerLoad, WorkerView
from core.request import Role, Slo
from tests.unit.cluster.scripted_router import worker

DEMAND = Demand(num_tokens=100, uncached_tokens=100, num_sequences=1, num_output=32, max_tokens=50)
TIMES = ServiceTimes(
    first_token=Line(0.1, 0.001),
    token=Line(0.010, 0.001),
    decode=(1.0, 2.0, 3.0, 4.0),
    token_s=1.0,
)
# 1 ms a token of prefill; a step of 10 ms and 1 ms for each sequence.
COSTS = CostView({"": ComputeCost(LinearCost((0.0, 0.001, 0.0)), LinearCost((0.010, 0.001, 0.0)))}, {})
NO_COSTS = CostView({}, {})


def ahead(tokens: int, prompts: int = 1, load: WorkerLoad = WorkerLoad()) -> WorkerView:
    """A prefill worker to which so many tokens were sent since its last report."""
    idle = worker("prefill-0", Role.PREFILL, load=load)
    return replace(idle, num_unreported=prompts, unreported_tokens=tokens)


def outlook(**changes: object) -> Outlook:
    plain = Outlook(
        now=100.0,
        prefill=worker("prefill-0", Role.PREFILL, load=WorkerLoad()),
        decode=worker("decode-0", Role.DECODE, load=WorkerLoad(pages_free=100)),
        costs=NO_COSTS,
        times=ServiceTimes(),
    )
    return replace(plain, **changes)  # type: ignore[arg-type]


def decoding(since: float, **changes: object) -> Released:
    return Released(replace(DEMAND, **changes), since, decodes=True)  # type: ignore[arg-type]


def arriving(at: float) -> Released:
    return Released(DEMAND, at, decodes=False)


# ---- seconds ----


def test_nothing_known_predicts_nothing_and_no_objective_is_held_against_it() -> None:
    assert (predict_ttft(outlook(), DEMAND), predict_ttft(outlook(prefill=ahead(10_000)), DEMAND)) == (None, None)
    assert predict_tpot(outlook(foreign=1000), DEMAND, 1.0) is None
    assert judge(Slo(0.001, 0.001), outlook(foreign=1000), DEMAND, waited_s=0.0) is None


def test_ttft_is_the_queue_and_the_prompt_by_the_costs() -> None:
    # 900 tokens of three prompts ahead, 60 of the 100 own ones to compute: 0.9 s and 0.06 s.
    seen = outlook(costs=COSTS, prefill=ahead(900, 3))

    assert queue_s(seen) == pytest.approx(0.9)
    assert predict_ttft(seen, replace(DEMAND, uncached_tokens=60)) == pytest.approx(0.96)


def test_quadratic_costs_are_of_prompts_and_not_of_the_queue_as_one_prompt() -> None:
    quadratic = CostView({"": ComputeCost(LinearCost((0.0, 0.0, 1e-6)), LinearCost((0.0, 0.0, 0.0)))}, {})

    # three prompts of 300 tokens: 3 * 300^2 / 2 pairs
    assert queue_s(outlook(costs=quadratic, prefill=ahead(900, 3))) == pytest.approx(0.135)


def test_ttft_is_the_measured_line_where_no_costs_are_known() -> None:
    seen = outlook(times=TIMES, prefill=ahead(900))

    assert predict_ttft(seen, DEMAND) == pytest.approx(0.1 + 1.0)


def test_what_was_sent_since_the_workers_report_is_ahead_too() -> None:
    reported = WorkerLoad(num_waiting_tokens=500)

    assert predict_ttft(outlook(costs=COSTS, prefill=ahead(200, load=reported)), DEMAND) == pytest.approx(0.8)


def test_the_policys_forecast_is_used_if_there_is_one() -> None:
    expected = Forecast(ttft_s=7.0, tpot_s=0.5, bytes_shipped=0)

    seen = outlook(expected=expected)

    assert (predict_ttft(seen, DEMAND), predict_tpot(seen, DEMAND, 7.0)) == (7.0, 0.5)


def test_the_policys_tpot_is_moved_from_the_load_now_to_the_load_when_prefill_ends() -> None:
    # Two decode now and one of them ends for sure within 7 s; the step shrinks from 3 sequences to 2: 13 to 12 ms.
    running = (decoding(since=95.0, max_tokens=8), decoding(since=99.9))
    expected = Forecast(ttft_s=7.0, tpot_s=0.26, bytes_shipped=0)
    times = replace(TIMES, decode=())  # nothing ended yet: only max_tokens ends anything

    seen = outlook(expected=expected, costs=COSTS, times=times, released=running)

    assert predict_tpot(seen, DEMAND, 7.0) == pytest.approx(0.26 * 12 / 13)
    assert predict_tpot(seen, DEMAND, 7.0, ahead=False) == pytest.approx(0.26)


# ---- the load then ----

_RELEASED = st.builds(
    Released,
    st.builds(Demand, st.integers(1, 9), st.integers(0, 9), st.integers(1, 3), st.integers(1, 999), st.just(50)),
    st.just(100.0),
    st.booleans(),
)


@given(st.lists(_RELEASED, max_size=12), st.lists(_RELEASED, max_size=12))
def test_a_sum_that_is_kept_is_the_sum_of_what_is_there(gone: list[Released], there: list[Released]) -> None:
    kept = RunningSum([*gone, *there])

    for released in gone:
        kept.subtract(released)

    seen = outlook(released=tuple(there), foreign=2)
    assert seen.sum == kept.now()
    assert load_at(replace(seen, known_sum=kept.now()), None) == load_at(seen, None)
    assert load_at(seen, None).sequences == 2 + sum(released.demand.num_sequences for released in there)


@given(st.lists(st.floats(0, 100), max_size=20).map(sorted).map(tuple), st.floats(0, 50), st.floats(0, 50))
def test_chances_are_chances_and_fall_with_time(durations: tuple[float, ...], age_s: float, longer_s: float) -> None:
    now, later = lasts(durations, age_s, longer_s), lasts(durations, age_s, longer_s + 1.0)

    assert 0.0 <= later <= now <= 1.0
    assert lasts(durations, age_s, 0.0) == 1.0


def test_of_those_that_lasted_as_long_so_many_last_longer() -> None:
    assert lasts((1.0, 2.0, 3.0, 4.0), 0.0, 2.5) == 0.5
    assert lasts((1.0, 2.0, 3.0, 4.0), 1.5, 1.0) == pytest.approx(2 / 3)
    assert lasts((2.0, 2.0, 2.0), 1.0, 0.9) == 1.0  # all alike, as in Mooncake's system-level prediction
    assert lasts((2.0, 2.0, 2.0), 1.0, 1.0) == 0.0
    assert lasts((1.0,), 5.0, 1.0) == 1.0  # nothing lasted so long: it stays


def test_the_load_then_is_what_stays_and_what_arrives() -> None:
    released = (decoding(since=99.0), decoding(since=98.0, num_sequences=2), arriving(at=101.0), arriving(at=109.0))
    seen = outlook(times=TIMES, released=released, foreign=3)

    # In 2 s: of age 1, two of the three that lasted as long reach 3 s ... (3 and 4, at more than 3 only one): 1/3.
    # Of age 2, of two (3 s, 4 s) none lasts beyond 4. The third arrives in 1 s and lasts 1 s more with 3/4.
    # The fourth is not there yet. Those of other gateways stay.
    assert load_at(seen, 2.0).sequences == pytest.approx(3 + 1 / 3 + 2 * 0 + 3 / 4)
    assert load_at(seen, 0.0).sequences == pytest.approx(3 + 1 + 2)


def test_a_continuation_ends_with_its_last_allowed_token() -> None:
    times = replace(TIMES, decode=(), token_s=0.1)  # 50 tokens take 5 s

    assert load_at(outlook(times=times, released=(decoding(since=96.0),)), 0.5).sequences == 1
    assert load_at(outlook(times=times, released=(decoding(since=96.0),)), 1.0).sequences == 0


def test_pages_that_are_free_now_may_be_spoken_for() -> None:
    # 16 tokens a page. 100 tokens are announced and will grow by 32: 8.25 pages; what decodes has 16 tokens to grow.
    decode = worker("decode-0", Role.DECODE, load=WorkerLoad(pages_free=100, num_announced=1, num_announced_tokens=100))
    times = replace(TIMES, decode=())
    seen = outlook(decode=decode, times=times, released=(arriving(at=100.5), decoding(since=99.0)))

    assert load_at(seen, 1.0).pages_free == pytest.approx(100 - 132 / 16 - 1)
    assert load_at(replace(seen, decode=replace(decode, unreported_kv_tokens=160)), 1.0).pages_free == pytest.approx(
        100 - 132 / 16 - 1 - 10
    )
    # Of two decodes that lasted as long as this one, one ended within a second: half of its 100 tokens come back.
    gone = outlook(times=replace(TIMES, decode=(1.5, 9.0)), released=(decoding(since=99.0),))
    assert load_at(gone, 1.0).pages_free == pytest.approx(100 + 50 / 16 - 8 / 16)


# ---- room ----


def test_an_idle_route_has_room_for_anything() -> None:
    huge = replace(DEMAND, num_tokens=10**6, uncached_tokens=10**6, num_sequences=128)

    assert lack_of_room(outlook(times=TIMES), huge, AdmissionConfig(decode_slots=1)) is None


def test_a_prefill_worker_is_full_by_seconds_or_by_tokens_while_its_speed_is_not_known() -> None:
    config = AdmissionConfig(prefill_queue_s=1.0, prefill_queue_tokens=500)

    assert lack_of_room(outlook(costs=COSTS, prefill=ahead(1000)), DEMAND, config) is None
    assert lack_of_room(outlook(costs=COSTS, prefill=ahead(1001)), DEMAND, config) == "prefill-0"
    assert lack_of_room(outlook(prefill=ahead(500)), DEMAND, config) is None
    assert lack_of_room(outlook(prefill=ahead(501)), DEMAND, config) == "prefill-0"


def test_a_decode_worker_is_full_by_slots_when_the_prefill_ends() -> None:
    batch = replace(worker("decode-0", Role.DECODE, load=WorkerLoad(pages_free=1000)), max_batch_size=4)
    seen = outlook(decode=batch, times=TIMES, foreign=2, released=(decoding(since=99.9),))

    assert lack_of_room(seen, DEMAND, AdmissionConfig()) is None
    assert lack_of_room(seen, replace(DEMAND, num_sequences=2), AdmissionConfig()) == "decode-0"
    assert lack_of_room(seen, DEMAND, AdmissionConfig(decode_slots=3)) == "decode-0"
    # An hour of prefill: whatever is ours has ended by then.
    slow = replace(seen, times=replace(TIMES, first_token=Line(3600.0, 0.0)))
    assert lack_of_room(slow, replace(DEMAND, num_sequences=2), AdmissionConfig()) is None


def test_a_decode_worker_is_full_when_its_pages_are_spoken_for() -> None:
    small = worker("decode-0", Role.DECODE, load=WorkerLoad(pages_free=16, num_announced_tokens=100))
    seen = outlook(decode=small, times=replace(TIMES, decode=()), released=(arriving(at=100.0),))

    # 16 pages less 8.25 for the one that arrives leaves 7.75, and this one needs 8.25.
    assert lack_of_room(seen, DEMAND, AdmissionConfig()) == "decode-0"
    assert lack_of_room(seen, replace(DEMAND, num_tokens=90), AdmissionConfig()) is None


def test_what_ends_with_its_first_token_needs_no_decode_worker() -> None:
    seen = outlook(times=TIMES, foreign=1000)

    assert lack_of_room(seen, replace(DEMAND, max_tokens=1), AdmissionConfig(decode_slots=1)) is None
    assert judge(Slo(None, 0.001), seen, replace(DEMAND, max_tokens=1), 0.0) is None


# ---- objectives ----


def test_a_ttft_that_would_be_missed_says_by_how_much_and_when_to_come_again() -> None:
    seen = outlook(costs=COSTS, prefill=ahead(900, 3))

    miss = judge(Slo(ttft_s=1.5), seen, DEMAND, waited_s=0.3, delay_s=0.5)

    assert miss is not None
    assert (miss.bound, miss.hopeless) == (Bound.SLO_TTFT, False)
    assert (miss.predicted_s, miss.retry_after_s) == (pytest.approx(1.8), pytest.approx(0.3))
    assert str(miss) == "a TTFT of 1.8 s is predicted, 1.5 s is allowed"
    assert judge(Slo(ttft_s=1.81), seen, DEMAND, waited_s=0.3, delay_s=0.5) is None


def test_what_no_wait_explains_is_said_to_be_hopeless() -> None:
    miss = judge(Slo(ttft_s=0.05), outlook(costs=COSTS, prefill=ahead(900)), DEMAND, waited_s=0.3)

    assert miss is not None
    assert miss.hopeless
    assert miss.retry_after_s == 60.0
    assert "even with nothing ahead of it" in str(miss)


def test_a_tpot_that_would_be_missed_says_when_it_would_not_be() -> None:
    # All decodes take 4 s; five began 2 s ago. With them a step takes 16 ms, alone 11 ms.
    times = replace(TIMES, decode=(4.0, 4.0), token_s=None)
    seen = outlook(costs=COSTS, times=times, released=tuple(decoding(since=98.0) for _ in range(5)))

    miss = judge(Slo(tpot_s=0.012), seen, DEMAND, waited_s=0.0)

    assert miss is not None
    assert (miss.bound, miss.predicted_s) == (Bound.SLO_TPOT, pytest.approx(0.016))
    assert miss.retry_after_s == pytest.approx(2.0)  # TTFT is 0.1 s; looked at in steps of a quarter of a second
    assert seconds_until_tpot(seen, DEMAND, 0.001, 0.1) is None


def test_the_worked_example_of_the_documentation() -> None:
    seen = outlook(
        prefill=worker("prefill-0", Role.PREFILL, load=WorkerLoad(num_running=1, num_waiting_tokens=6000)),
        decode=replace(worker("decode-0", Role.DECODE, load=WorkerLoad(pages_free=10_000)), max_batch_size=4),
        costs=CostView({"": ComputeCost(LinearCost((0.0, 0.0005, 0.0)), LinearCost((0.010, 0.001, 0.0)))}, {}),
        times=ServiceTimes(decode=(5.0, 6.0, 7.0, 8.0, 9.0, 10.0)),
        released=(*(decoding(since=100.0 - age) for age in (1, 4, 9)), arriving(at=103.0)),
    )
    demand = replace(DEMAND, num_tokens=1000, uncached_tokens=1000)

    assert lack_of_room(seen, demand, AdmissionConfig()) == "prefill-0"
    assert predict_ttft(seen, demand) == pytest.approx(3.5)
    assert load_at(seen, 3.5).sequences == pytest.approx(2.5)
    assert predict_tpot(seen, demand, 0.0, ahead=False) == pytest.approx(0.014)
    miss = judge(Slo(5.0, 0.013), seen, demand, waited_s=0.0)
    assert miss is not None
    assert (miss.bound, miss.predicted_s, miss.retry_after_s) == (Bound.SLO_TPOT, pytest.approx(0.0135), 2.5)
    assert judge(Slo(5.0, 0.020), seen, demand, waited_s=0.0) is None


# ---- the oscillation (PAPERS.md C.5) ----


@dataclass
class _Fleet:
    """A prefill stage of a fixed duration before one decode worker, on a clock that steps; loads are easily worked out.

    Each request decodes for 10 s; a step takes 10 ms and 1 ms for each sequence; the objective, a TPOT of 30 ms, allows
    20 sequences, hence 2 requests/s. Eight come each second.
    """

    ahead: bool
    prefill_s: float = 8.0
    decode_s: float = 10.0

    def loads(self, seconds: int) -> Iterator[int]:
        prefilling: deque[float] = deque()  # when each begins to decode
        running: deque[float] = deque()  # when each began
        times = ServiceTimes(decode=(self.decode_s,) * 8)
        costs = CostView({"": ComputeCost(LinearCost((self.prefill_s, 0.0, 0.0)), COSTS.profiles[""].decode_cost)}, {})
        for tick in range(seconds * 8):
            now = tick / 8
            while prefilling and prefilling[0] <= now:
                running.append(prefilling.popleft())
            while running and running[0] + self.decode_s <= now:
                running.popleft()
            released = (*(decoding(since=at) for at in running), *(arriving(at=at) for at in prefilling))
            seen = outlook(now=now, costs=costs, times=times, released=released)
            if judge(Slo(tpot_s=0.030), seen, DEMAND, 0.0, ahead=self.ahead) is None:
                prefilling.append(now + self.prefill_s)
            yield len(running)


def test_judging_the_load_as_it_will_be_does_not_oscillate_as_judging_it_as_it_is_does() -> None:
    settled = slice(40 * 8, None)
    naive = list(_Fleet(ahead=False).loads(100))[settled]
    predicted = list(_Fleet(ahead=True).loads(100))[settled]

    def swing(loads: list[int]) -> int:
        return max(loads) - min(loads)

    def held(loads: list[int]) -> float:
        """Share of sequence seconds within the objective."""
        return sum(n for n in loads if n <= 20) / sum(loads)

    assert (min(naive), swing(naive)) == (0, 80)  # idle and overloaded in turn: what came during a prefill time decodes
    assert held(naive) < 0.3
    assert max(predicted) == 20
    assert swing(predicted) <= 1
    assert held(predicted) == 1.0


def test_a_request_without_a_limit_of_tokens_is_predicted_too() -> None:
    endless = replace(DEMAND, max_tokens=math.inf)

    assert predict_tpot(outlook(costs=COSTS, times=TIMES, released=(decoding(since=1.0),)), endless, 1.0) is not None
