"""Turns of tenants: fair shares within the stated bound, nothing starves, nothing is remembered of who left."""

from __future__ import annotations

from collections import Counter
from itertools import count

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cluster.fair_queue import FairQueue, Order, Place

WEIGHTS = {"a": 1.0, "b": 2.0, "c": 0.5}
tenants = st.sampled_from(sorted(WEIGHTS))
costs = st.integers(1, 50).map(float)


def queue() -> FairQueue[str]:
    return FairQueue(lambda tenant: WEIGHTS.get(tenant, 1.0))


def place(tenant: str, cost: float = 1.0, order: Order = (0.0,), size: int = 1) -> Place[str]:
    return Place(f"{tenant}{order}", tenant, cost, size, order)


def served(q: FairQueue[str]) -> Place[str]:
    turn = next(q.turns())
    q.serve(turn)
    return turn


def test_tenants_take_turns_and_one_of_twice_the_weight_goes_twice_as_often() -> None:
    q = queue()
    for number in range(6):
        q.push(place("a", order=(number,)))
        q.push(place("b", order=(10 + number,)))

    first_six = [served(q).tenant for _ in range(6)]

    assert first_six == ["b", "a", "b", "b", "a", "b"]


def test_within_a_tenant_the_smaller_order_goes_first_whenever_it_came() -> None:
    q = queue()
    for order in (3.0, 1.0, 2.0):
        q.push(place("a", order=(order,)))

    assert [served(q).order for _ in range(3)] == [(1.0,), (2.0,), (3.0,)]


def test_a_newcomer_does_not_make_up_for_the_time_when_it_waited_for_nothing() -> None:
    q = queue()
    for number in range(10):
        q.push(place("a", order=(number,)))
    for _ in range(5):
        served(q)
    for number in range(10):
        q.push(place("new", order=(100 + number,)))

    assert Counter(served(q).tenant for _ in range(6)) == {"a": 3, "new": 3}


def test_one_that_is_passed_over_keeps_its_turn() -> None:
    q = queue()
    first, second = place("a", order=(1.0,)), place("a", order=(2.0,))
    q.push(first)
    q.push(second)

    q.serve(second)

    assert next(q.turns()) is first


def test_cost_ahead_is_what_is_served_before() -> None:
    q = queue()
    places = [place("a", 4, (1,)), place("a", 3, (2,)), place("b", 6, (3,)), place("b", 6, (4,))]
    for waiting in places:
        q.push(waiting)

    # b stands at 3 and 6, a at 4 and 7: b, a, b, a.
    assert [p.order[0] for p in q.turns()] == [3, 1, 4, 2]
    assert q.cost_ahead(places[2]) == pytest.approx(3)  # a's share until b's first is served, of which nothing is whole
    assert q.cost_ahead(places[1]) == pytest.approx(4 + 12)


def test_who_gives_way_is_the_last_of_the_tenant_that_waits_for_most() -> None:
    q = queue()
    for number in range(3):
        q.push(place("a", 10, (number,)))
    q.push(place("b", 50, (9,)))

    assert (q.last_of_longest().tenant, q.last_of_longest().order) == ("a", (2,))  # 30 / 1 against 50 / 2


@settings(max_examples=200, deadline=None)
@given(st.lists(st.tuples(tenants, costs), min_size=1, max_size=60), st.data())
def test_it_is_whole_whatever_comes_and_goes(arrivals: list[tuple[str, float]], data: st.DataObject) -> None:
    q, waiting = queue(), []
    for number, (tenant, cost) in enumerate(arrivals):
        waiting.append(place(tenant, cost, (data.draw(st.integers(-2, 2)), number), size=data.draw(st.integers(1, 3))))
        q.push(waiting[-1])
        action = data.draw(st.sampled_from(["wait", "serve next", "serve any", "remove"]))
        if action != "wait":
            gone = next(q.turns()) if action == "serve next" else data.draw(st.sampled_from(waiting))
            (q.remove if action == "remove" else q.serve)(gone)
            waiting.remove(gone)
        assert sorted(p.order for p in q.turns()) == sorted(p.order for p in waiting)
        assert (len(q), q.size) == (len(waiting), sum(p.size for p in waiting))
        for tenant in WEIGHTS:
            orders = [p.order for p in q.turns() if p.tenant == tenant]
            assert orders == sorted(orders)
            assert q.size_of(tenant) == sum(p.size for p in waiting if p.tenant == tenant)
    for gone in list(waiting):
        q.remove(gone)
    assert q.sizes == {}


@settings(max_examples=200, deadline=None)
@given(
    st.dictionaries(tenants, st.lists(costs, min_size=30, max_size=30), min_size=2),
    st.integers(0, 25),
    st.integers(1, 30),
)
def test_two_tenants_that_wait_all_the_time_are_served_by_weight_within_one_request_of_each(
    backlogs: dict[str, list[float]], skipped: int, watched: int
) -> None:
    q, numbers = queue(), count()
    for tenant, backlog in sorted(backlogs.items()):
        for cost in backlog:
            q.push(place(tenant, cost, (next(numbers),)))
    got: Counter[str] = Counter()
    for step in range(skipped + watched):
        if any(not q.size_of(tenant) for tenant in backlogs):
            break  # from here on not all of them wait
        turn = served(q)
        if step >= skipped:
            got[turn.tenant] += int(turn.cost)

    for a in backlogs:
        for b in backlogs:
            bound = max(backlogs[a]) / WEIGHTS[a] + max(backlogs[b]) / WEIGHTS[b]
            assert abs(got[a] / WEIGHTS[a] - got[b] / WEIGHTS[b]) <= bound + 1e-9


@settings(max_examples=100, deadline=None)
@given(costs, st.lists(costs, min_size=51, max_size=51))
def test_one_request_is_served_in_time_although_a_new_tenant_comes_for_every_turn(
    cost: float, newcomers: list[float]
) -> None:
    q = queue()
    patient = place("patient", cost, (-1.0,))
    q.push(patient)

    turns = []
    for number, newcomer in enumerate(newcomers):
        q.push(place(f"new-{number}", newcomer, (number,)))
        turns.append(served(q))

    assert patient in turns[: int(cost) + 1]  # each turn before its own moves the clock by 1 at least
