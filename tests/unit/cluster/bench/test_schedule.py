"""What is sent when: drawn conversations, warm-up, speeds, what does not fit."""

from __future__ import annotations

import pytest

from cluster.bench.schedule import DrawnRequests, make_schedule, parse_lengths
from cluster.length_distribution import LengthDistribution
from cluster.simulator.workload import POISSON, TRACE, USERS, ArrivalPlan
from cluster.workload_traces import TraceRequest
from core.errors import InvalidConfig

FIVE, TWO = LengthDistribution.from_sample([5]), LengthDistribution.from_sample([2])
INSTANTS = [TraceRequest(10, 3, at) for at in (0.0, 2.0, 6.0)]


def test_a_later_turn_goes_on_from_the_answer_before_it() -> None:
    drawn = list(DrawnRequests(FIVE, TWO, num_requests=6, turns=3, think_s=1.0).draw(seed=1))

    assert [one.input_tokens for one in drawn] == [5, 12, 19] * 2
    assert [one.session_id for one in drawn] == ["0"] * 3 + ["1"] * 3
    assert [one.think_s > 0 for one in drawn] == [False, True, True] * 2


def test_equal_seeds_draw_equal_requests_and_others_do_not() -> None:
    lengths = parse_lengths("uniform:1,1000", "--lengths")
    drawn = DrawnRequests(lengths, lengths, num_requests=20)

    assert list(drawn.draw(3)) == list(drawn.draw(3)) != list(drawn.draw(4))


def test_conversations_of_a_closed_loop_keep_their_turns_together() -> None:
    requests = list(DrawnRequests(FIVE, TWO, 6, turns=3).draw(0))

    schedule = make_schedule(requests, ArrivalPlan(USERS, num_users=2), warm_up=2)

    assert [len(one.turns) for one in schedule.workload.conversations] == [3, 3]
    assert (schedule.workload.num_users, schedule.num_requests, len(schedule.warm_up)) == (2, 6, 2)


def test_speed_brings_a_traces_instants_closer() -> None:
    schedule = make_schedule(INSTANTS, ArrivalPlan(TRACE), speed=4.0)

    assert [one.starts_at for one in schedule.workload.conversations] == [0.0, 0.5, 1.5]


def test_a_rate_stretches_them() -> None:
    schedule = make_schedule(INSTANTS, ArrivalPlan(TRACE, rate_rps=0.25))  # three in 12 s

    assert [one.starts_at for one in schedule.workload.conversations] == pytest.approx([0.0, 4.0, 12.0])


def test_what_is_longer_than_the_context_is_left_out_and_counted() -> None:
    requests = [TraceRequest(10, 3), TraceRequest(100, 3), TraceRequest(12, 3)]

    schedule = make_schedule(requests, ArrivalPlan(POISSON, 1.0), max_model_len=15)

    assert [turn.input_tokens for one in schedule.workload.conversations for turn in one.turns] == [10, 12]
    assert schedule.num_left_out == 1


@pytest.mark.parametrize(
    ("text", "mean"), [("64", 64), ("fixed:64", 64), ("uniform:1,3", 2), ("log_normal:4,0.001,1,1000", 54.6)]
)
def test_lengths_have_several_forms(text: str, mean: float) -> None:
    assert parse_lengths(text, "--lengths").mean_tokens == pytest.approx(mean, rel=0.01)


@pytest.mark.parametrize("text", ["many", "fixed:1,2", "uniform:5,2", "normal:1,2", "fixed:0", "log_normal:1,0,1,9"])
def test_wrong_lengths_name_the_option(text: str) -> None:
    with pytest.raises(InvalidConfig, match="--output: "):
        parse_lengths(text, "--output")


@pytest.mark.parametrize("wrong", [{"speed": 0.0}, {"warm_up": -1}])
def test_wrong_numbers_are_refused(wrong: dict[str, float]) -> None:
    with pytest.raises(InvalidConfig, match="must be"):
        make_schedule(INSTANTS, ArrivalPlan(TRACE), **wrong)  # type: ignore[arg-type]
