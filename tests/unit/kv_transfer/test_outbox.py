from __future__ import annotations

from collections import Counter
from threading import Thread

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from core.clock import VirtualClock
from core.request import SessionId
from kv_transfer.outbox import Barrier, Notice, Outbox, Taker
from kv_transfer.transport import SendOrder, Strip, Write

A, B = SessionId("a"), SessionId("b")
NOBODY = SendOrder()


def write(session_id: SessionId, layer: int, num_bytes: int = 100, order: SendOrder = NOBODY) -> Write:
    return Write(session_id, b"", layer, 1, (Strip(0, 0, num_bytes),), order)


@pytest.fixture
def clock() -> VirtualClock:
    return VirtualClock()


@pytest.fixture
def outbox(clock: VirtualClock) -> Outbox:
    return Outbox(clock)


@pytest.fixture
def control() -> Taker:
    return Taker(control=True)


def take_all(outbox: Outbox, taker: Taker) -> list[Write | Notice | Barrier]:
    taken = []
    while (item := outbox.take(taker, 0)) is not None:
        taken.append(item)
        if isinstance(item, Write):
            outbox.done(item)
    return taken


# ---- order ----


def test_a_session_keeps_its_order_and_sessions_take_turns(outbox: Outbox, control: Taker) -> None:
    for layer in range(3):
        outbox.put(A, write(A, layer))
    outbox.put(A, b"commit a")
    outbox.put(B, write(B, 0))
    outbox.put(B, b"commit b")
    taken = [item.message if isinstance(item, Notice) else item for item in take_all(outbox, control)]
    assert taken == [write(A, 0), write(B, 0), b"commit b", write(A, 1), write(A, 2), b"commit a"]


def test_within_a_tenant_the_earliest_deadline_goes_first_and_none_last(outbox: Outbox, control: Taker) -> None:
    due = {"none": None, "late": 9.0, "soon": 1.0, "later": 10.0}
    for name, deadline in due.items():
        outbox.put(SessionId(name), write(SessionId(name), 0, order=SendOrder(deadline_at=deadline)))
    assert [item.session_id for item in take_all(outbox, control) if isinstance(item, Write)] == [
        "soon",
        "late",
        "later",
        "none",
    ]


def test_a_tenant_that_comes_late_gets_its_share_at_once_and_no_more(outbox: Outbox, control: Taker) -> None:
    one, other = SendOrder(tenant="one"), SendOrder(tenant="other")
    for layer in range(20):
        outbox.put(A, write(A, layer, order=one))
    for _ in range(10):
        outbox.take(control, 0)
    for layer in range(20):
        outbox.put(B, write(B, layer, order=other))
    taken = [outbox.take(control, 0) for _ in range(10)]
    assert Counter(item.session_id for item in taken if isinstance(item, Write)) == {A: 5, B: 5}


@given(
    weights=st.lists(st.sampled_from([0.5, 1.0, 2.0, 5.0]), min_size=2, max_size=5),
    sizes=st.lists(st.integers(1, 1000), min_size=2, max_size=5),
    num_takers=st.integers(1, 4),
)
@settings(deadline=None)
def test_backlogged_tenants_share_the_bytes_by_weight(weights: list[float], sizes: list[int], num_takers: int) -> None:
    outbox, takers = Outbox(VirtualClock()), [Taker(control=i == 0) for i in range(num_takers)]
    tenants = {f"t{i}": (weight, sizes[i % len(sizes)]) for i, weight in enumerate(weights)}
    for name, (weight, size) in tenants.items():
        session_id = SessionId(name)
        for layer in range(60):
            outbox.put(session_id, write(session_id, layer, size, SendOrder(tenant=name, weight=weight)))
    served: Counter[str] = Counter()
    num_taken: Counter[str] = Counter()
    while max(num_taken.values(), default=0) < 60:  # all of them have something queued up to here
        for taker in takers:
            item = outbox.take(taker, 0)
            assert isinstance(item, Write)
            served[item.order.tenant] += item.num_bytes
            num_taken[item.order.tenant] += 1
            if num_taken[item.order.tenant] == 60:
                break
    # SFQ's bound (Goyal et al., theorem 1): shares over weights differ by one largest write of each of the two.
    for one, (weight, size) in tenants.items():
        for two, (other_weight, other_size) in tenants.items():
            bound = size / weight + other_size / other_weight
            assert abs(served[one] / weight - served[two] / other_weight) <= bound + 1e-6


@given(st.data())
@settings(deadline=None)
def test_whatever_happens_each_lane_is_in_order_and_no_message_passes_a_write(data: st.DataObject) -> None:
    """Takers are drawn one after the other; the peer is modelled by what each connection carried, in order."""
    outbox = Outbox(VirtualClock())
    takers = [Taker(control=i == 0) for i in range(data.draw(st.integers(1, 4)))]
    put: dict[str, list[Write | bytes]] = {}
    carried: list[list[Write | Notice | Barrier]] = [[] for _ in takers]
    taken_in_order: list[Write | bytes] = []

    def take(i: int) -> bool:
        item = outbox.take(takers[i], 0)
        if item is None:
            return False
        carried[i].append(item)
        if not isinstance(item, Barrier):
            taken_in_order.append(item.message if isinstance(item, Notice) else item)
        return True

    for step in range(data.draw(st.integers(1, 60))):
        if data.draw(st.booleans()):
            name = data.draw(st.sampled_from("abc"))
            order = SendOrder(tenant=data.draw(st.sampled_from("xy")), deadline_at=data.draw(st.none() | st.just(1.0)))
            item: Write | bytes = (
                write(SessionId(name), step, order=order) if data.draw(st.booleans()) else f"{name}{step}".encode()
            )
            put.setdefault(name, []).append(item)
            outbox.put(SessionId(name), item)
        else:
            take(data.draw(st.integers(0, len(takers) - 1)))
    for i in range(len(takers)):  # the control connection first: what it takes raises the last barrier
        while take(i):
            pass
    for name, items in put.items():
        mine = [
            item
            for item in taken_in_order
            if (item.session_id if isinstance(item, Write) else item[:1].decode()) == name
        ]
        assert mine == items
    assert outbox.bytes_queued == 0
    for notice in (item for item in carried[0] if isinstance(item, Notice)):
        name = notice.message[:1].decode()
        before = put[name][: put[name].index(notice.message)]
        for stream in carried[1:]:
            shown = next(
                (at for at, x in enumerate(stream) if isinstance(x, Barrier) and x.number >= notice.barrier), -1
            )
            assert notice.barrier == 0 or shown >= 0, "a message waits for a barrier that never comes"
            late = [item for item in stream[shown + 1 :] if item in before]
            assert not late, "a write of the session came behind the barrier"


# ---- barriers ----


def test_a_message_with_no_write_before_it_waits_for_nothing(outbox: Outbox, control: Taker) -> None:
    outbox.put(A, b"begin")
    assert outbox.take(control, 0) == Notice(0, b"begin")
    assert outbox.take(Taker(control=False), 0) is None


def test_every_stripe_shows_the_barrier_behind_its_writes_and_a_new_one_at_once(outbox: Outbox, control: Taker) -> None:
    stripe = Taker(control=False)
    outbox.put(A, write(A, 0))
    outbox.put(A, b"commit")
    assert outbox.take(stripe, 0) == write(A, 0)
    assert outbox.take(stripe, 0) is None, "messages are the control connection's"
    assert outbox.take(control, 0) == Notice(1, b"commit")
    assert [outbox.take(stripe, 0), outbox.take(stripe, 0)] == [Barrier(1), None]
    assert outbox.take(Taker(control=False), 0) == Barrier(1)


def test_a_slow_stripe_shows_only_the_last_of_several_barriers(outbox: Outbox, control: Taker) -> None:
    for i in range(3):
        outbox.put(A, write(A, i))
        outbox.put(A, b"%d" % i)
    assert len(take_all(outbox, control)) == 6
    assert take_all(outbox, Taker(control=False)) == [Barrier(3)]


# ---- cancel ----


def test_an_empty_outbox_gives_nothing(outbox: Outbox, control: Taker) -> None:
    assert outbox.take(control, 0) is None


def test_cancel_forgets_what_is_queued_for_that_session_only(outbox: Outbox, control: Taker) -> None:
    outbox.put(A, write(A, 0))
    outbox.put(B, write(B, 0))
    assert outbox.cancel(A) is True
    assert outbox.take(control, 0) == write(B, 0)
    assert outbox.take(control, 0) is None


def test_the_last_of_several_writes_under_way_drains_a_cancelled_session(outbox: Outbox, control: Taker) -> None:
    writes = [write(A, layer) for layer in range(3)]
    for one in (*writes, write(B, 0)):
        outbox.put(one.session_id, one)
    taken = [outbox.take(taker, 0) for taker in (control, Taker(control=False), Taker(control=False))]
    assert taken == [writes[0], write(B, 0), writes[1]]
    assert outbox.cancel(A) is False
    assert [outbox.done(one) for one in taken if isinstance(one, Write)] == [False, False, True]
    assert outbox.cancel(A) is True


def test_a_session_that_was_not_cancelled_is_never_drained(outbox: Outbox, control: Taker) -> None:
    outbox.put(A, write(A, 0))
    outbox.take(control, 0)
    assert outbox.done(write(A, 0)) is False
    assert outbox.cancel(A) is True


def test_a_message_under_way_reads_no_pages(outbox: Outbox, control: Taker) -> None:
    outbox.put(A, b"commit")
    outbox.take(control, 0)
    assert outbox.cancel(A) is True


def test_what_is_put_after_a_cancel_is_taken(outbox: Outbox, control: Taker) -> None:
    outbox.put(A, write(A, 0))
    outbox.put(A, b"commit")
    outbox.cancel(A)
    outbox.put(A, b"abort")
    assert take_all(outbox, control) == [Notice(0, b"abort")]


# ---- waking, closing, counting ----


def test_a_closed_outbox_drops_everything(outbox: Outbox, control: Taker) -> None:
    outbox.put(A, b"before")
    outbox.close()
    outbox.put(A, b"after")
    assert outbox.closed
    assert outbox.take(control, 0) is None


@pytest.mark.parametrize("how", ["put", "close", "leave"])
def test_a_waiting_taker_is_woken(outbox: Outbox, how: str) -> None:
    taker = Taker(control=False)
    taken: list[object] = []
    thread = Thread(target=lambda: taken.append(outbox.take(taker, 20)))
    thread.start()
    match how:
        case "put":
            outbox.put(A, write(A, 0))
        case "close":
            outbox.close()
        case "leave":
            outbox.leave(taker)
    thread.join(20)
    assert taken == [write(A, 0) if how == "put" else None]


def test_it_is_busy_while_a_write_is_queued_or_under_way(outbox: Outbox, control: Taker, clock: VirtualClock) -> None:
    clock.advance(5)
    outbox.put(A, b"a message is nothing")
    clock.advance(5)
    outbox.put(A, write(A, 0, 300))
    assert outbox.bytes_queued == 300
    clock.advance(1)
    outbox.take(control, 0)
    item = outbox.take(control, 0)
    assert outbox.bytes_queued == 0
    clock.advance(2)
    assert isinstance(item, Write)
    assert outbox.busy_s == 3
    outbox.done(item)
    clock.advance(9)
    outbox.put(A, write(A, 1))
    clock.advance(1)
    outbox.cancel(A)
    clock.advance(7)
    assert outbox.busy_s == 4
