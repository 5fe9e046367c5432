from __future__ import annotations

import random

from hypothesis import given
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from core.request import SessionId
from kv_transfer.staging import HostRing, Slots, make_ring, pieces_of
from kv_transfer.transport import LayerPages, PageGeometry, Region, Span, Strip, Write

GEOMETRY = PageGeometry((LayerPages(24), LayerPages(24), LayerPages(24)), num_pages=10)
LAYER_BYTES = 240


def make_region(seed: int | None = None) -> Region:
    layers = [
        bytearray(LAYER_BYTES if seed is None else random.Random(seed + i).randbytes(LAYER_BYTES)) for i in range(3)
    ]
    return Region(GEOMETRY, tuple(memoryview(layer) for layer in layers))


def write_of(first_layer: int, num_layers: int, *strips: Strip) -> Write:
    return Write(SessionId("a"), bytes(16), first_layer, num_layers, strips)


strips = st.lists(st.integers(1, 30), min_size=1, max_size=8).map(
    lambda sizes: tuple(Strip(sum(sizes[:i]), LAYER_BYTES - sum(sizes[: i + 1]), n) for i, n in enumerate(sizes))
)
writes = st.tuples(st.integers(0, 2), strips).flatmap(
    lambda what: st.integers(1, 3 - what[0]).map(lambda count: write_of(what[0], count, *what[1]))
)


def moves(write: Write) -> list[tuple[int, int, int]]:
    """(layer, source byte, destination byte) of each byte of the write."""
    return [(layer, s.src + i, s.dst + i) for layer in write.layers for s in write.strips for i in range(s.num_bytes)]


@given(writes, st.integers(1, 400))
def test_pieces_move_each_byte_of_a_write_once_in_order(write: Write, max_bytes: int) -> None:
    pieces = list(pieces_of(write, max_bytes))
    assert all(0 < piece.num_bytes <= max_bytes for piece in pieces)
    assert all(strip.num_bytes > 0 for piece in pieces for strip in piece.strips)
    assert [move for piece in pieces for move in moves(piece)] == moves(write)
    assert {(piece.session_id, piece.token, piece.order) for piece in pieces} == {
        (write.session_id, write.token, write.order)
    }


@given(st.lists(writes, min_size=1, max_size=3))
def test_what_a_ring_gathers_it_scatters_byte_for_byte(them: list[Write]) -> None:
    source, target = make_region(seed=1), make_region()
    slot_bytes = sum(write.num_bytes for write in them)
    here, there = make_ring(source, 2, slot_bytes), make_ring(target, 2, slot_bytes)
    assert isinstance(here, HostRing)
    here.gather(1, them).synchronize()
    on_the_wire, arrived = here.payload(1, 0, slot_bytes), there.payload(0, 0, slot_bytes)
    assert on_the_wire is not None
    assert arrived is not None
    arrived[:] = on_the_wire
    at, parts = 0, []
    for write in them:
        parts.append((at, write.layers, tuple(Span(strip.dst, strip.num_bytes) for strip in write.strips)))
        at += write.num_bytes
    there.scatter(0, parts).synchronize()

    expected = [bytearray(LAYER_BYTES) for _ in range(3)]
    for write in them:
        for layer, src, dst in moves(write):
            expected[layer][dst] = source.bytes_at(layer, src, 1)[0]
    assert [bytes(target.pages(layer, 0, 10)) for layer in range(3)] == expected


class SlotsAgainstAModel(RuleBasedStateMachine):
    """Whoever takes gets a slot that nobody holds; what nobody holds cannot be given back."""

    def __init__(self) -> None:
        super().__init__()
        self.slots = Slots(3)
        self.held: set[int] = set()

    @rule()
    def take(self) -> None:
        slot = self.slots.take()
        assert (slot is None) == (len(self.held) == 3)
        if slot is not None:
            assert slot in range(3)
            assert slot not in self.held
            self.held.add(slot)

    @rule(slot=st.integers(-1, 4))
    def give_back(self, slot: int) -> None:
        assert self.slots.give_back(slot) == (slot in self.held)
        self.held.discard(slot)

    @invariant()
    def counts(self) -> None:
        assert self.slots.num_held == len(self.held)


TestSlotsAgainstAModel = SlotsAgainstAModel.TestCase
