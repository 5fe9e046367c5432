from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from core.errors import ProtocolViolation
from core.kv_layout import KvLayer, KvLayout
from core.request import SessionId
from kv_transfer.byte_ranges import ByteRanges
from kv_transfer.messages import Missing
from kv_transfer.session import Expected, ReceiveSession
from kv_transfer.transfer_plan import (
    GROUP_BYTES,
    GROUP_S,
    PageTable,
    join_atoms,
    layer_group_size,
    layout_of_pages,
    missing_spans,
    plan_layer,
    plan_writes,
    writes_for,
)
from kv_transfer.transport import LayerPages, PageGeometry, Span, Strip, Write

PAGE_BYTES = 100


@st.composite
def page_tables(draw: st.DrawFn) -> tuple[list[int], list[int]]:
    """Distinct pages at each end, with stretches that follow each other."""

    def pages(count: int) -> list[int]:
        order = draw(st.permutations(range(count)))
        keep_together = draw(st.integers(1, 8))
        return [page * keep_together + i for page in order for i in range(keep_together)]

    src, dst = pages(draw(st.integers(0, 12))), pages(draw(st.integers(0, 12)))
    count = min(len(src), len(dst))
    return src[:count], dst[:count]


@given(tables=page_tables(), max_pages=st.integers(1, 9), max_strips=st.integers(1, 5))
def test_every_page_goes_to_its_place_exactly_once_in_order(
    tables: tuple[list[int], list[int]], max_pages: int, max_strips: int
) -> None:
    src, dst = tables
    pieces = plan_writes(src, dst, PAGE_BYTES, max_pages * PAGE_BYTES, max_strips)
    strips = [strip for piece in pieces for strip in piece]
    moved = [
        ((strip.src + at) // PAGE_BYTES, (strip.dst + at) // PAGE_BYTES)
        for strip in strips
        for at in range(0, strip.num_bytes, PAGE_BYTES)
    ]
    assert all((strip.src % PAGE_BYTES, strip.dst % PAGE_BYTES) == (0, 0) for strip in strips)
    assert moved == list(zip(src, dst, strict=True))


@given(tables=page_tables(), max_pages=st.integers(1, 9), max_strips=st.integers(1, 5))
def test_pieces_keep_their_bounds_and_are_not_empty(
    tables: tuple[list[int], list[int]], max_pages: int, max_strips: int
) -> None:
    pieces = plan_writes(*tables, PAGE_BYTES, max_pages * PAGE_BYTES, max_strips)
    assert all(1 <= len(piece) <= max_strips for piece in pieces)
    assert all(sum(strip.num_bytes for strip in piece) <= max_pages * PAGE_BYTES for piece in pieces)
    assert all(strip.num_bytes >= 1 for piece in pieces for strip in piece)


@given(tables=page_tables(), max_bytes=st.integers(0, 9 * PAGE_BYTES), max_strips=st.integers(1, 5))
def test_pages_are_cut_as_any_other_run_of_bytes_is(
    tables: tuple[list[int], list[int]], max_bytes: int, max_strips: int
) -> None:
    atoms = [(src * PAGE_BYTES, dst * PAGE_BYTES, PAGE_BYTES) for src, dst in zip(*tables, strict=True)]
    assert plan_writes(*tables, PAGE_BYTES, max_bytes, max_strips) == join_atoms(atoms, max_bytes, max_strips)


def test_pages_that_follow_each_other_at_both_ends_become_one_run() -> None:
    assert plan_writes([4, 5, 6], [10, 11, 12], PAGE_BYTES) == [(Strip(400, 1000, 300),)]


def test_a_gap_at_either_end_parts_runs_within_one_piece() -> None:
    assert plan_writes([4, 5, 6], [10, 11, 13], PAGE_BYTES) == [(Strip(400, 1000, 200), Strip(600, 1300, 100))]
    assert plan_writes([4, 5, 9], [10, 11, 12], PAGE_BYTES) == [(Strip(400, 1000, 200), Strip(900, 1200, 100))]


def test_a_page_larger_than_the_bound_is_a_piece_of_its_own() -> None:
    assert plan_writes([0, 1], [0, 1], PAGE_BYTES, max_bytes=1) == [(Strip(0, 0, 100),), (Strip(100, 100, 100),)]


def test_unequal_sides_raise() -> None:
    with pytest.raises(ProtocolViolation):
        plan_writes([0, 1], [0], PAGE_BYTES)


# ---- between pools that are not alike ----


@dataclass(frozen=True)
class Side:
    """The pools of one worker's ranks, all with the same page table: layer 0 of each."""

    page_size: int
    pages: tuple[int, ...]
    ranks: tuple[KvLayer, ...]

    def slots(self, rank: int, num_tokens: int) -> Iterator[tuple[int, tuple[int, int, str, int]]]:
        """(element of the rank's memory, what it is: token, head, half, dim) of every token's K and V."""
        layer = self.ranks[rank]
        page_elements = layer.token_bytes // layer.itemsize * self.page_size
        for token in range(num_tokens):
            page, slot = self.pages[token // self.page_size], token % self.page_size
            half_at = page * page_elements
            for half, dim in (("k", layer.key_dim), ("v", layer.value_dim)):
                for index, head in enumerate(layer.heads):
                    for i in range(dim):
                        at = half_at + (index * self.page_size + slot) * dim + i
                        yield at, (token, head, half, i)
                half_at += layer.num_heads * self.page_size * dim


@st.composite
def sides(draw: st.DrawFn, num_heads: int, key_dim: int, value_dim: int, num_tokens: int) -> Side:
    page_size = draw(st.integers(1, 9))
    num_pages = -(-num_tokens // page_size)
    pages = draw(st.permutations(range(num_pages + 2)))[:num_pages]
    cuts = sorted(draw(st.sets(st.integers(1, num_heads - 1), max_size=3))) if num_heads > 1 else []
    itemsize = draw(st.sampled_from([1, 2, 4]))
    ranks = tuple(
        KvLayer(stop - start, key_dim, value_dim, f"dtype{itemsize}", itemsize, start)
        for start, stop in zip([0, *cuts], [*cuts, num_heads], strict=True)
    )
    return Side(page_size, tuple(pages), ranks)


@st.composite
def hand_overs(draw: st.DrawFn) -> tuple[Side, Side, int, int]:
    """Sender, receiver, tokens of the sequence, pages of it that the receiver caches."""
    num_tokens = draw(st.integers(1, 40))
    shape = (draw(st.integers(1, 4)), draw(st.integers(1, 3)), draw(st.integers(0, 3)))
    src, dst = draw(sides(*shape, num_tokens)), draw(sides(*shape, num_tokens))
    if draw(st.booleans()):
        dst = replace(dst, page_size=src.page_size, pages=src.pages[::-1])
    if draw(st.booleans()):
        dst = replace(dst, ranks=src.ranks)
    return src, dst, num_tokens, draw(st.integers(0, len(dst.pages)))


def plan_pair(
    src: Side, src_rank: int, dst: Side, dst_rank: int, num_tokens: int, first_page: int, chunk: int
) -> list[tuple[Strip, ...]]:
    """All pieces from one rank to another, planned in chunks of ``chunk`` source pages as they are stored."""
    there = PageTable(dst.page_size, first_page, dst.pages[first_page:])
    pieces: list[tuple[Strip, ...]] = []
    for start in range(0, len(src.pages), chunk):
        here = PageTable(src.page_size, start, src.pages[start : start + chunk])
        pieces += plan_layer(
            here, src.ranks[src_rank], there, dst.ranks[dst_rank], range(num_tokens), max_bytes=64, max_strips=3
        )
    return pieces


@given(hand_overs(), st.integers(1, 5))
@settings(max_examples=300)
def test_every_element_of_every_token_lands_exactly_once_in_its_place(
    case: tuple[Side, Side, int, int], chunk: int
) -> None:
    src, dst, num_tokens, first_page = case
    alike = src.page_size == dst.page_size
    for dst_rank, to in enumerate(dst.ranks):
        landed: dict[int, tuple[int, int, str, int]] = {}
        times: Counter[int] = Counter()
        for src_rank, layer in enumerate(src.ranks):
            held = dict(src.slots(src_rank, num_tokens))
            for strip in (
                s for piece in plan_pair(src, src_rank, dst, dst_rank, num_tokens, first_page, chunk) for s in piece
            ):
                assert strip.src % layer.itemsize == strip.dst % to.itemsize == strip.num_bytes % to.itemsize == 0
                for i in range(strip.num_bytes // to.itemsize):
                    at = strip.dst // to.itemsize + i
                    times[at] += 1
                    if (what := held.get(strip.src // layer.itemsize + i)) is not None:
                        landed[at] = what
        wanted = {at: what for at, what in dst.slots(dst_rank, num_tokens) if what[0] >= first_page * dst.page_size}
        assert landed == wanted
        assert set(times.values()) <= {1}
        if not alike:
            assert times.keys() == wanted.keys()  # alike, whole pages travel: the slots of no token too


@given(hand_overs(), st.integers(1, 5))
@settings(max_examples=200)
def test_the_receiving_session_waits_for_exactly_what_each_sender_ships(
    case: tuple[Side, Side, int, int], chunk: int
) -> None:
    src, dst, num_tokens, first_page = case
    for dst_rank, to in enumerate(dst.ranks):
        for src_rank, layer in enumerate(src.ranks):
            expected = Expected(
                KvLayout(dst.page_size, (to,)),
                first_page,
                dst.pages[first_page:],
                num_tokens,
                KvLayout(src.page_size, (layer,)),
            )
            session = ReceiveSession(SessionId("s"), bytes(16), expected, 0.0)
            session.begin()
            pieces = plan_pair(src, src_rank, dst, dst_rank, num_tokens, first_page, chunk)
            for i, piece in enumerate(pieces):
                if i == len(pieces) - 1:
                    assert session.commit() != ()
                session.admit(range(1), [Span(strip.dst, strip.num_bytes) for strip in piece])
                session.landed()
            assert session.commit() == ()


@given(hand_overs())
def test_pieces_between_unlike_pools_keep_their_bounds(case: tuple[Side, Side, int, int]) -> None:
    src, dst, num_tokens, first_page = case
    largest = max(layer.token_bytes * dst.page_size for layer in dst.ranks)
    for src_rank in range(len(src.ranks)):
        for dst_rank in range(len(dst.ranks)):
            pieces = plan_pair(src, src_rank, dst, dst_rank, num_tokens, first_page, len(src.pages))
            assert all(1 <= len(piece) <= 3 for piece in pieces)
            assert all(1 <= sum(strip.num_bytes for strip in piece) <= max(64, largest) for piece in pieces)


def test_pools_that_are_alike_move_whole_pages_and_join_them() -> None:
    layer = KvLayer(8, 128, 128, "bfloat16", 2)
    src, dst = PageTable(16, 0, (4, 5, 6)), PageTable(16, 1, (10, 11))
    (piece,) = plan_layer(src, layer, dst, layer, range(40))
    assert piece == (Strip(5 * layer.token_bytes * 16, 10 * layer.token_bytes * 16, 2 * layer.token_bytes * 16),)


def test_heads_that_follow_each_other_in_pages_of_one_size_travel_as_one_run_of_keys_and_one_of_values() -> None:
    all_heads = KvLayer(8, 4, 4, "bfloat16", 2)
    upper = replace(all_heads, num_heads=4, first_head=4)
    (piece,) = plan_layer(PageTable(16, 0, (0,)), all_heads, PageTable(16, 0, (0,)), upper, range(16))
    assert piece == (Strip(512, 0, 512), Strip(1536, 512, 512))


# ---- layer groups ----


@given(st.integers(1, 1 << 30), st.integers(1, 100), st.none() | st.floats(1.0, 1e12))
def test_a_group_is_worth_a_piece_and_never_more_than_the_link_carries_in_time(
    layer_bytes: int, num_layers: int, link_bytes_per_s: float | None
) -> None:
    size = layer_group_size(layer_bytes, num_layers, link_bytes_per_s)
    assert 1 <= size <= num_layers
    in_time = math.inf if link_bytes_per_s is None else link_bytes_per_s * GROUP_S
    if size > 1:
        assert size * layer_bytes <= in_time
        assert (size - 1) * layer_bytes < GROUP_BYTES
    if size < num_layers:
        assert size * layer_bytes >= GROUP_BYTES or (size + 1) * layer_bytes > in_time


def test_a_layer_of_a_long_chunk_is_a_group_and_those_of_a_short_prompt_pile_up() -> None:
    assert layer_group_size(2 << 20, 32) == 1  # 512 tokens of an 8B model
    assert layer_group_size(64 << 10, 32) == 8  # 16 tokens of it
    assert layer_group_size(64 << 10, 32, 125e6) == 7  # a link of 1 Gbit/s carries 500 kB in 4 ms
    assert layer_group_size(0, 32) == 32


# ---- sent again ----


def write(first_layer: int, num_layers: int, *strips: Strip) -> Write:
    return Write(SessionId("s"), bytes(16), first_layer, num_layers, strips)


def test_what_is_missing_is_cut_out_of_the_writes_that_covered_it() -> None:
    sent = [write(0, 2, Strip(0, 100, 10), Strip(50, 200, 10)), write(2, 1, Strip(0, 100, 10))]
    missing = [Missing(range(1, 3), (Span(105, 5),)), Missing(range(1), (Span(200, 1),))]
    assert writes_for(missing, sent) == [
        write(0, 1, Strip(50, 200, 1)),
        write(1, 1, Strip(5, 105, 5)),
        write(2, 1, Strip(5, 105, 5)),
    ]


def test_missing_spans_stop_at_the_bound_and_join_layers_that_miss_the_same() -> None:
    ranges = [ByteRanges([(0, 4), (8, 9)]), ByteRanges([(0, 4), (8, 9)]), ByteRanges(), ByteRanges([(1, 2), (3, 4)])]
    whole = (Missing(range(2), (Span(0, 4), Span(8, 1))), Missing(range(3, 4), (Span(1, 1), Span(3, 1))))
    assert missing_spans(ranges, 4) == whole
    assert missing_spans(ranges, 3) == (whole[0], Missing(range(3, 4), (Span(1, 1),)))
    assert missing_spans(ranges, 2)[0].spans == whole[0].spans


def test_a_layout_of_which_only_sizes_are_known_has_a_token_for_a_page() -> None:
    layout = layout_of_pages(PageGeometry((LayerPages(8), LayerPages(24)), num_pages=10))
    assert (layout.page_bytes(0), layout.page_bytes(1), layout.num_pages(7)) == (8, 24, 7)
