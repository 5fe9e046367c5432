"""Which pages go where, in which pieces? Pure.

Invariants: every source page goes to its destination page exactly once; pieces keep the order of the pages; a strip
never joins pages that do not follow each other at both ends; a piece holds at most ``max_write_bytes`` (but at least
one page) and at most ``max_strips`` strips.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from core.errors import ProtocolViolation
from kv_transfer.transport import Strip

# A piece is what a session sends per turn: large enough that headers, system calls and Python cost little beside the
# copy, small enough that a commit or another session waits about a millisecond on a 10 Gbit/s link.
MAX_WRITE_BYTES = 1 << 20
MAX_STRIPS = 256  # each strip is one buffer of a gathered send or scattered receive; the kernel takes 1,024


def plan_writes(
    src_pages: Sequence[int],
    dst_pages: Sequence[int],
    page_bytes: int,
    max_write_bytes: int = MAX_WRITE_BYTES,
    max_strips: int = MAX_STRIPS,
) -> list[tuple[Strip, ...]]:
    """The pieces that put ``src_pages[i]`` into ``dst_pages[i]`` for every i; each piece is one write of one layer.

    Raises ProtocolViolation when the two sides are not equally long.
    """
    if len(src_pages) != len(dst_pages):
        raise ProtocolViolation(f"{len(src_pages)} source pages for {len(dst_pages)} destination pages")
    max_pages = max(1, max_write_bytes // page_bytes)
    pieces: list[tuple[Strip, ...]] = []
    piece: list[Strip] = []
    room = max_pages
    for src_page, dst_page, num_pages in _contiguous_runs(src_pages, dst_pages):
        start = 0
        while start < num_pages:
            if room == 0 or len(piece) == max_strips:
                pieces.append(tuple(piece))
                piece, room = [], max_pages
            count = min(room, num_pages - start)
            piece.append(Strip((src_page + start) * page_bytes, (dst_page + start) * page_bytes, count * page_bytes))
            room -= count
            start += count
    if piece:
        pieces.append(tuple(piece))
    return pieces


def _contiguous_runs(src_pages: Sequence[int], dst_pages: Sequence[int]) -> Iterator[tuple[int, int, int]]:
    """(source page, destination page, pages) of each stretch that follows itself at both ends."""
    start = 0
    for i in range(1, len(src_pages)):
        if src_pages[i] != src_pages[i - 1] + 1 or dst_pages[i] != dst_pages[i - 1] + 1:
            yield src_pages[start], dst_pages[start], i - start
            start = i
    if src_pages:
        yield src_pages[start], dst_pages[start], len(src_pages) - start
