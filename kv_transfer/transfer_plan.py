"""Which bytes go where, in which pieces? Pure.

A page of one layer holds ``[heads, page_size, key_dim]`` keys and then ``[heads, page_size, value_dim]`` values
(engine/page_pool.py). Two workers whose layers are alike move whole pages. Otherwise their pages may differ in size,
each may hold other heads of the model (one of several devices each), and in the width of an element; then what moves
is the run of tokens that one head's keys, or values, have in one page at both ends.

Invariants: every byte that both ends hold goes to its place exactly once, and no other byte moves; a strip never joins
bytes that do not follow each other at both ends; a piece holds at most ``max_bytes`` (but at least one page, or one run
of a head) and at most ``max_strips`` strips.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from core.errors import ProtocolViolation
from core.kv_layout import KvLayer, KvLayout
from kv_transfer.byte_ranges import ByteRanges
from kv_transfer.messages import Missing
from kv_transfer.transport import PageGeometry, Span, Strip, Strips, Write

# A piece is what a session sends per turn: large enough that headers, system calls and Python cost little beside the
# copy, small enough that a commit or another session waits about a millisecond on a 10 Gbit/s link.
MAX_WRITE_BYTES = 1 << 20
MAX_STRIPS = 256  # each strip is one buffer of a gathered send or scattered receive; the kernel takes 1,024
GROUP_BYTES = 1 << 19  # a piece of so many bytes is not dominated by what each piece costs
GROUP_S = 0.004  # what is held back for a group, and hence what is left after the last layer, travels in so long

Atom = tuple[int, int, int]  # source offset, destination offset, bytes at the destination


@dataclass(frozen=True, slots=True)
class PageTable:
    """Where a sequence's tokens lie: ``pages[i]`` holds those from ``(first_page + i) * page_size`` on."""

    page_size: int
    first_page: int
    pages: tuple[int, ...]

    @property
    def tokens(self) -> range:
        """The tokens that have a slot in these pages."""
        return range(self.first_page * self.page_size, (self.first_page + len(self.pages)) * self.page_size)


def layout_of_pages(geometry: PageGeometry) -> KvLayout:
    """The layout of a pool of which only the sizes are known: its tokens are its pages, and only an equal one fits."""
    return KvLayout(1, tuple(KvLayer(1, pages.page_bytes, 0, pages.dtype, 1) for pages in geometry.layers))


# ---- what is sent ----


def plan_writes(
    src_pages: Sequence[int],
    dst_pages: Sequence[int],
    page_bytes: int,
    max_bytes: int = MAX_WRITE_BYTES,
    max_strips: int = MAX_STRIPS,
) -> list[Strips]:
    """The pieces that put the whole of ``src_pages[i]`` into ``dst_pages[i]`` for every i, in that order.

    Raises ProtocolViolation when the two sides are not equally long.
    """
    if len(src_pages) != len(dst_pages):
        raise ProtocolViolation(f"{len(src_pages)} source pages for {len(dst_pages)} destination pages")
    if not src_pages:
        return []
    src, dst = np.array(src_pages, dtype=np.int64), np.array(dst_pages, dtype=np.int64)
    begins = np.ones(len(src), dtype=np.bool_)  # a strip, at this page
    begins[1:] = (src[1:] != src[:-1] + 1) | (dst[1:] != dst[:-1] + 1)
    cuts = _cuts(np.cumsum(begins), max(1, max_bytes // page_bytes), max_strips)
    begins[cuts] = True
    firsts = np.flatnonzero(begins)
    rows = np.empty((len(firsts), 3), dtype=np.int64)
    rows[:, 0], rows[:, 1] = src[firsts], dst[firsts]
    rows[:-1, 2], rows[-1, 2] = firsts[1:] - firsts[:-1], len(src) - firsts[-1]
    rows *= page_bytes
    bounds = [*np.searchsorted(firsts, cuts).tolist(), len(firsts)]
    return [Strips.of_rows(rows[first:end]) for first, end in pairwise(bounds)]


def _cuts(num_begun: NDArray[np.int64], max_pages: int, max_strips: int) -> list[int]:
    """At which pages a new piece begins, when up to each page, it included, so many strips have begun."""
    cuts: list[int] = []
    at = 0
    while at < len(num_begun):
        cuts.append(at)
        one_too_many = int(np.searchsorted(num_begun, num_begun[at] + max_strips))
        at = min(at + max_pages, one_too_many)
    return cuts


def plan_layer(
    src: PageTable,
    src_layer: KvLayer,
    dst: PageTable,
    dst_layer: KvLayer,
    tokens: range,
    max_bytes: int = MAX_WRITE_BYTES,
    max_strips: int = MAX_STRIPS,
) -> list[Strips]:
    """The pieces that put those of ``tokens`` which both tables hold, of the heads that both layers hold, in place.

    Whole pages (also the slots beyond ``tokens`` in the last one) where the two ends are alike. ``Strip.num_bytes``
    counts bytes at the destination: with elements of another size there, ``num_bytes * src itemsize / dst itemsize``
    bytes are read.
    """
    first = max(tokens.start, src.tokens.start, dst.tokens.start)
    stop = min(tokens.stop, src.tokens.stop, dst.tokens.stop)
    if first >= stop:
        return []
    if (src.page_size, src_layer) == (dst.page_size, dst_layer) and first % src.page_size == 0:
        first_page, num_pages = first // src.page_size, -(-(stop - first) // src.page_size)
        src_at, dst_at = first_page - src.first_page, first_page - dst.first_page
        page_bytes = src_layer.token_bytes * src.page_size
        src_pages, dst_pages = src.pages[src_at : src_at + num_pages], dst.pages[dst_at : dst_at + num_pages]
        return plan_writes(src_pages, dst_pages, page_bytes, max_bytes, max_strips)
    atoms = _head_runs(src, src_layer, dst, dst_layer, range(first, stop))
    return join_atoms(atoms, max_bytes, max_strips, src_layer.itemsize, dst_layer.itemsize)


def _head_runs(src: PageTable, src_layer: KvLayer, dst: PageTable, dst_layer: KvLayer, tokens: range) -> Iterator[Atom]:
    """Each head's keys, and then its values, of each stretch of tokens that lies in one page at both ends."""
    heads = range(max(src_layer.heads.start, dst_layer.heads.start), min(src_layer.heads.stop, dst_layer.heads.stop))
    at = tokens.start
    while at < tokens.stop:
        src_page, src_slot = divmod(at - src.tokens.start, src.page_size)
        dst_page, dst_slot = divmod(at - dst.tokens.start, dst.page_size)
        count = min(src.page_size - src_slot, dst.page_size - dst_slot, tokens.stop - at)
        for dim, src_half, dst_half in _halves(src.page_size, src_layer, dst.page_size, dst_layer):
            src_start = src.pages[src_page] * src_layer.token_bytes * src.page_size + src_half
            dst_start = dst.pages[dst_page] * dst_layer.token_bytes * dst.page_size + dst_half
            for head in heads:
                src_token = (head - src_layer.first_head) * src.page_size + src_slot
                dst_token = (head - dst_layer.first_head) * dst.page_size + dst_slot
                yield (
                    src_start + src_token * dim * src_layer.itemsize,
                    dst_start + dst_token * dim * dst_layer.itemsize,
                    count * dim * dst_layer.itemsize,
                )
        at += count


def _halves(
    src_page_size: int, src_layer: KvLayer, dst_page_size: int, dst_layer: KvLayer
) -> Iterator[tuple[int, int, int]]:
    """(elements of a token, where its half begins in a page at each end), of keys and of values."""
    assert (src_layer.key_dim, src_layer.value_dim) == (dst_layer.key_dim, dst_layer.value_dim), "one model"
    yield src_layer.key_dim, 0, 0
    if src_layer.value_dim:
        yield src_layer.value_dim, src_layer.key_bytes * src_page_size, dst_layer.key_bytes * dst_page_size


def join_atoms(
    atoms: Iterable[Atom], max_bytes: int, max_strips: int, src_itemsize: int = 1, dst_itemsize: int = 1
) -> list[Strips]:
    """Joins atoms that follow each other at both ends, and cuts pieces between atoms; ``plan_writes`` does the same
    with pages."""
    pieces: list[Strips] = []
    piece: list[Atom] = []
    room = max_bytes
    src = dst = num_bytes = 0  # the strip that grows
    src_end = dst_end = -1
    for atom_src, atom_dst, atom_bytes in atoms:
        full = room < atom_bytes and num_bytes > 0
        if atom_src == src_end and atom_dst == dst_end and not full:
            num_bytes += atom_bytes
        else:
            if num_bytes:
                piece.append((src, dst, num_bytes))
            if full or len(piece) == max_strips:
                pieces.append(_strips(piece))
                piece, room = [], max_bytes
            src, dst, num_bytes = atom_src, atom_dst, atom_bytes
        room -= atom_bytes
        src_end = atom_src + atom_bytes * src_itemsize // dst_itemsize
        dst_end = atom_dst + atom_bytes
    if num_bytes:
        pieces.append(_strips([*piece, (src, dst, num_bytes)]))
    return pieces


def _strips(rows: Sequence[Atom]) -> Strips:
    return Strips.of_rows(np.array(rows, dtype=np.int64))


def layer_group_size(layer_bytes: int, num_layers: int, link_bytes_per_s: float | None = None) -> int:
    """How many layers of ``layer_bytes`` bytes each a session lets pile up before it sends them as one.

    As many as make ``GROUP_BYTES``, but no more than a link of that speed carries in ``GROUP_S``: whatever the model
    and the chunk, what is left to send after the last layer was computed is at most one such group (or one layer).
    None: the link's speed is not known.
    """
    if layer_bytes <= 0:
        return num_layers
    wanted = -(-GROUP_BYTES // layer_bytes)
    if link_bytes_per_s is not None:
        wanted = min(wanted, int(link_bytes_per_s * GROUP_S / layer_bytes))
    return max(1, min(wanted, num_layers))


# ---- what is waited for, and sent again ----


def granted_bytes(layout: KvLayout, layer: int, pages: Sequence[int], heads: range) -> ByteRanges:
    """Where a sender that holds ``heads`` may write in ``layer`` of ``pages``: its heads, whole pages if it has all."""
    here = layout.layers[layer]
    page_bytes = layout.page_bytes(layer)
    if heads.start <= here.heads.start and here.heads.stop <= heads.stop:
        return ByteRanges((page * page_bytes, (page + 1) * page_bytes) for page in pages)
    return ByteRanges(
        (page * page_bytes + start, page * page_bytes + start + num_bytes)
        for start, num_bytes in _slots(here, layout.page_size, heads, range(layout.page_size))
        for page in pages
    )


def spare_bytes(layout: KvLayout, layer: int, last_page: int, num_used: int, heads: range) -> list[tuple[int, int]]:
    """(first, end) of what need not be written in a ``last_page`` of which only ``num_used`` slots hold tokens."""
    at = last_page * layout.page_bytes(layer)
    slots = _slots(layout.layers[layer], layout.page_size, heads, range(num_used, layout.page_size))
    return [(at + start, at + start + num_bytes) for start, num_bytes in slots if num_bytes]


def _slots(layer: KvLayer, page_size: int, heads: range, slots: range) -> Iterator[tuple[int, int]]:
    """(offset in a page, bytes) of the keys, and values, of ``slots`` for each of ``heads`` that lie here."""
    half = 0
    for dim in (layer.key_dim, layer.value_dim):
        token_bytes = dim * layer.itemsize
        for index, head in enumerate(layer.heads):
            if head in heads and token_bytes:
                yield half + (index * page_size + slots.start) * token_bytes, len(slots) * token_bytes
        half += layer.num_heads * page_size * token_bytes


def writes_for(missing: Iterable[Missing], sent: Iterable[Write], max_strips: int = MAX_STRIPS) -> list[Write]:
    """Those parts of ``sent`` that put ``missing`` in place, layer by layer.

    Raises ProtocolViolation if that is not every byte of it: then something was asked for that was never sent.
    """
    wanted: dict[int, ByteRanges] = {}
    for entry in missing:
        for layer in entry.layers:
            ranges = wanted.setdefault(layer, ByteRanges())
            for span in entry.spans:
                if any(ranges.overlap(span.offset, span.offset + span.num_bytes)):
                    raise ProtocolViolation(f"layer {layer}: a byte is asked for twice")
                ranges.put(span.offset, span.offset + span.num_bytes)
    again: list[Write] = []
    for write in sent:
        for layer in write.layers:
            if layer in wanted:
                strips = _strips_within(write.strips, wanted[layer])
                again += (
                    Write(write.session_id, write.token, layer, 1, strips[i : i + max_strips], write.order)
                    for i in range(0, len(strips), max_strips)
                )
    if sum(write.num_bytes for write in again) != sum(ranges.num_bytes for ranges in wanted.values()):
        raise ProtocolViolation("bytes are asked for again that were never sent")
    return again


def _strips_within(strips: Iterable[Strip], ranges: ByteRanges) -> tuple[Strip, ...]:
    return tuple(
        Strip(strip.src + first - strip.dst, first, end - first)
        for strip in strips
        for first, end in ranges.overlap(strip.dst, strip.dst + strip.num_bytes)
    )


def missing_spans(ranges: Sequence[ByteRanges], max_spans: int) -> tuple[Missing, ...]:
    """``ranges[layer]`` as a message says it: layers that follow each other and miss the same are one entry.

    At most ``max_spans`` spans; what does not fit is left out.
    """
    entries: list[Missing] = []
    last: ByteRanges | None = None
    for layer, waiting in enumerate(ranges):
        if waiting and waiting == last:
            before = entries[-1]
            entries[-1] = Missing(range(before.layers.start, layer + 1), before.spans)
        elif waiting:
            spans = tuple(Span(start, end - start) for start, end in waiting)[:max_spans]
            max_spans -= len(spans)
            if spans:
                entries.append(Missing(range(layer, layer + 1), spans))
        last = waiting if waiting and max_spans else None
    return tuple(entries)
