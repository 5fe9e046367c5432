from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from core.errors import Incompatible, PeerLost
from core.kv_layout import KvLayer, KvLayout
from core.request import SessionId
from kv_transfer.probe_pages import bytes_there, shared_layout
from kv_transfer.rank_parts import grant_for, senders_of, together
from kv_transfer.session import Grant, GrantPart, SendReport
from kv_transfer.transfer_plan import PageTable, plan_layer

NUM_HEADS = 8
DEGREES = st.sampled_from([1, 2, 4, 8])


def layout_of(rank: int, num_ranks: int, page_size: int = 4) -> KvLayout:
    heads = NUM_HEADS // num_ranks
    return KvLayout(page_size, (KvLayer(heads, 4, 2, "bfloat16", 2, first_head=rank * heads),) * 2)


def ranks_of(num_ranks: int) -> list[KvLayout]:
    return [layout_of(rank, num_ranks) for rank in range(num_ranks)]


@given(DEGREES, DEGREES)
def test_each_byte_of_each_receiving_rank_comes_from_exactly_one_part(num_senders: int, num_receivers: int) -> None:
    senders = ranks_of(num_senders)
    table = PageTable(4, 0, (3, 1))
    for receiver in ranks_of(num_receivers):
        landed: list[int] = []
        for rank in senders_of(receiver, senders):
            for strips in plan_layer(table, senders[rank].layers[0], table, receiver.layers[0], range(8)):
                landed += (byte for strip in strips for byte in range(strip.dst, strip.dst + strip.num_bytes))
        size = receiver.page_bytes(0)
        assert sorted(landed) == [page * size + byte for page in (1, 3) for byte in range(size)]


@given(DEGREES, DEGREES)
def test_no_rank_sends_to_more_than_must_have_its_heads(num_senders: int, num_receivers: int) -> None:
    senders, receivers = ranks_of(num_senders), ranks_of(num_receivers)
    num_parts = sum(len(senders_of(receiver, senders)) for receiver in receivers)
    assert num_parts == max(num_senders, num_receivers)


def test_heads_that_no_rank_sends_are_refused() -> None:
    with pytest.raises(Incompatible, match=r"heads \[0, 1, 2, 3\] of these"):
        senders_of(layout_of(0, 1), ranks_of(2)[:1])


def test_heads_that_two_ranks_send_are_refused() -> None:
    with pytest.raises(Incompatible, match="layout differs"):
        senders_of(layout_of(0, 2), [layout_of(0, 2), layout_of(0, 1)])


def grant(*senders: int) -> Grant:
    parts = tuple(
        GrantPart(sender, SessionId(f"a/{sender}-0"), bytes([sender]) * 16, b"there", layout_of(0, 1))
        for sender in senders
    )
    return Grant(SessionId("a"), b"t" * 16, 0, (1, 2), b"there", 30.0, layout_of(0, 1), parts=parts)


def test_a_rank_is_told_of_its_own_parts_only() -> None:
    assert [part.sender for part in grant_for(grant(0, 1), 1).parts] == [1]
    with pytest.raises(Incompatible):
        grant_for(grant(0), 1)


def test_a_hand_over_has_failed_if_a_part_has_and_takes_as_long_as_the_longest() -> None:
    parts = [SendReport(None, 10, 1, 2.0, 0.5), SendReport(None, 30, 2, 1.0, 0.7)]
    whole = together(parts)
    assert (whole.error, whole.bytes_sent, whole.num_writes, whole.transfer_s, whole.exposed_s) == (
        None,
        40,
        3,
        2.0,
        0.7,
    )
    error = PeerLost("gone")
    assert together([*parts, SendReport(error)]).error is error


def test_shared_heads_are_those_of_both_and_bytes_are_those_of_every_receiving_rank() -> None:
    shared = shared_layout(layout_of(0, 1), layout_of(1, 4))
    assert [list(layer.heads) for layer in shared.layers] == [[2, 3]] * 2
    assert bytes_there(grant(0, 1), layout_of(0, 1), 3) == 3 * layout_of(0, 1).bytes_per_page  # one rank, two parts
