"""Which pages go where, in which pieces? Pure.

Invariants: every source page goes to its destination page exactly once; pieces keep the order of the pages; a run
never joins pages that do not follow each other at both ends; a piece holds at most ``max_write_bytes`` (but at least
one page) and at most ``max_runs`` runs.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from core.errors import ProtocolViolation
from kv_transfer.transport import PageRun

# A piece is what a session sends per turn: large enough that headers, system calls and Python cost little beside the
# copy, small enough that a commit or another session waits about a millisecond on a 10 Gbit/s link.
MAX_WRITE_BYTES = 1 << 20
MAX_RUNS = 256  # each run is one buffer of a gathered send or scattered receive; the kernel takes 1,024


def plan_writes(
    src_pages: Sequence[int],
    dst_pages: Sequence[int],
    page_bytes: int,
    max_write_bytes: int = MAX_WRITE_BYTES,
    max_runs: int = MAX_RUNS,
) -> list[tuple[PageRun, ...]]:
    """The pieces that put ``src_pages[i]`` into ``dst_pages[i]`` for every i; each piece is one write of one layer.

    Raises ProtocolViolation when the two sides are not equally long.
    """
    if len(src_pages) != len(dst_pages):
        raise ProtocolViolation(f"{len(src_pages)} source pages for {len(dst_pages)} destination pages")
    max_pages = max(1, max_write_bytes // page_bytes)
    pieces: list[tuple[PageRun, ...]] = []
    piece: list[PageRun] = []
    room = max_pages
    for run in _contiguous_runs(src_pages, dst_pages):
        start = 0
        while start < run.num_pages:
            if room == 0 or len(piece) == max_runs:
                pieces.append(tuple(piece))
                piece, room = [], max_pages
            count = min(room, run.num_pages - start)
            whole = count == run.num_pages
            piece.append(run if whole else PageRun(run.src_page + start, run.dst_page + start, count))
            room -= count
            start += count
    if piece:
        pieces.append(tuple(piece))
    return pieces


def _contiguous_runs(src_pages: Sequence[int], dst_pages: Sequence[int]) -> Iterator[PageRun]:
    start = 0
    for i in range(1, len(src_pages)):
        if src_pages[i] != src_pages[i - 1] + 1 or dst_pages[i] != dst_pages[i - 1] + 1:
            yield PageRun(src_pages[start], dst_pages[start], i - start)
            start = i
    if src_pages:
        yield PageRun(src_pages[start], dst_pages[start], len(src_pages) - start)
