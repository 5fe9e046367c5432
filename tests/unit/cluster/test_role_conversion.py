"""Who changes its role, and when it has: for workers as a view shows them."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cluster.role_conversion import Conversion, Outcome, choose, ending
from cluster.view import ClusterView, Links, LinkView, WorkerLoad, WorkerView
from core.request import ClusterId, EngineId, Role, WorkerId
from tests.unit.cluster.scripted_router import worker

CONVERSION = Conversion(WorkerId("a"), EngineId("a-e"), Role.DECODE, began_at=10.0)


def loaded(name: str, role: Role = Role.PREFILL, cluster: str = "local", **load: int) -> WorkerView:
    return replace(worker(name, role, load=WorkerLoad(**load)), cluster_id=ClusterId(cluster))


def view(*workers: WorkerView, links: Links | None = None) -> ClusterView:
    return ClusterView(0.0, workers, links or {})


def link(sender: WorkerView, receiver: WorkerView, *, usable: bool) -> Links:
    found = LinkView(
        sender.worker_id,
        sender.cluster_id,
        receiver.worker_id,
        receiver.cluster_id,
        0.0,
        usable=usable,
        reason="" if usable else "not tested yet",
    )
    return {(sender.worker_id, receiver.worker_id): found}


@pytest.mark.parametrize(
    ("workers", "chosen"),
    [
        ((loaded("a", num_running=2), loaded("b", num_running=1, pages_cached=90)), "b"),
        ((loaded("a", pages_cached=9), loaded("b", pages_cached=3)), "b"),
        ((loaded("b"), loaded("a")), "a"),
        ((loaded("a", num_waiting=1), loaded("b", num_sessions=2)), "a"),
        ((replace(loaded("a"), num_assigned=5), loaded("b", num_running=1)), "b"),  # its report is a moment old
    ],
)
def test_the_worker_with_the_least_to_lose_is_chosen(workers: tuple[WorkerView, ...], chosen: str) -> None:
    found = choose(workers, Role.DECODE)

    assert found is not None
    assert found.worker_id == chosen


def test_no_cluster_gives_its_last_worker_of_a_role() -> None:
    east = (loaded("a", cluster="east"), loaded("b", Role.DECODE, "east"))
    west = (loaded("c", cluster="west", num_running=9), loaded("d", cluster="west", num_running=8))

    assert choose(east, Role.DECODE) is None
    assert choose(east, Role.PREFILL) is None
    found = choose((*east, *west), Role.DECODE)
    assert found is not None
    assert found.worker_id == "d"


@given(
    st.lists(
        st.builds(
            loaded,
            st.text("abc", min_size=1, max_size=3),
            st.sampled_from(Role),
            st.sampled_from(["east", "west"]),
            num_running=st.integers(0, 5),
            pages_cached=st.integers(0, 5),
        ),
        max_size=8,
        unique_by=lambda w: w.worker_id,
    ),
    st.sampled_from(Role),
    st.randoms(),
)
def test_the_choice_empties_no_pool_and_does_not_depend_on_the_order(workers, role, draw) -> None:
    found = choose(workers, role)
    shuffled = list(workers)
    draw.shuffle(shuffled)

    assert choose(shuffled, role) == found
    if found is not None:
        assert found.role is not role
        assert any(w is not found and w.role is found.role and w.cluster_id == found.cluster_id for w in workers)


def test_a_conversion_ends_when_nothing_of_the_earlier_role_is_left() -> None:
    before, drains, done = (
        loaded("a"),
        loaded("a", Role.DECODE, num_other_role=2),
        loaded("a", Role.DECODE),
    )
    assert ending(CONVERSION, view(before), 11.0, 60.0, "") is None
    assert ending(CONVERSION, view(drains), 11.0, 60.0, "") is None
    ended = ending(CONVERSION, view(done), 12.5, 60.0, "")
    assert ended is not None
    assert (ended.outcome, ended.reason) == (Outcome.DONE, "changed in 2.5 s")


@pytest.mark.parametrize("role", list(Role))
def test_it_has_not_changed_before_one_of_its_new_links_works(role: Role) -> None:
    conversion = replace(CONVERSION, role=role)
    changed = loaded("a", role)
    other = loaded("b", Role.PREFILL if role is Role.DECODE else Role.DECODE)
    pair = (changed, other) if role is Role.PREFILL else (other, changed)

    assert ending(conversion, view(changed, other, links=link(*pair, usable=False)), 11.0, 60.0, "") is None
    ended = ending(conversion, view(changed, other, links=link(*pair, usable=True)), 11.0, 60.0, "")
    assert ended is not None
    assert ended.outcome is Outcome.DONE
    gave_up = ending(conversion, view(changed, other, links=link(*pair, usable=False)), 70.0, 60.0, "")
    assert gave_up is not None
    assert gave_up.reason == "after 60 s no link of it can be used: not tested yet"


@pytest.mark.parametrize(
    ("workers", "refusal", "outcome", "reason"),
    [
        ((), "", Outcome.LOST, "it left"),
        ((replace(loaded("a", Role.DECODE), engine_id=EngineId("a-again")),), "", Outcome.LOST, "it left"),
        ((loaded("a"),), "no answer", Outcome.REFUSED, "no answer"),
        ((loaded("a"),), "", Outcome.GAVE_UP, "after 60 s it still advertises prefill"),
        (
            (loaded("a", Role.DECODE, num_other_role=3),),
            "",
            Outcome.GAVE_UP,
            "after 60 s 3 of its sequences are of its earlier role",
        ),
    ],
)
def test_what_goes_wrong_is_said(workers: tuple[WorkerView, ...], refusal: str, outcome: Outcome, reason: str) -> None:
    ended = ending(CONVERSION, view(*workers), 70.0, 60.0, refusal)

    assert ended is not None
    assert (ended.outcome, ended.reason) == (outcome, reason)
