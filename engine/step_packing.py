"""What does the model see of a step? All tokens in one row without padding, and where each sequence's lie in it.

Packed short first: sequences that compute one token come together, those with few earlier tokens before those with
many, because like lengths share a tile of the attention; logits come back in the caller's order.

In a decode step whose sequences share prefixes that are worth reading once (shared_prefixes.py) those that share none
come first, and then group after group.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from engine.attention import Segment
from engine.shared_prefixes import CascadeTerms, SharedPrefix
from engine.uploads import upload


@dataclass(frozen=True, slots=True)
class Chunk:
    """Some consecutive tokens of one sequence."""

    token_ids: Sequence[int]
    start: int  # position of the first
    page_ids: tuple[int, ...]
    wanted: bool  # the last one's logits are
    pending_row: int | None = None  # the one token is the one that the step before samples in that row


@dataclass(frozen=True, slots=True)
class PackedStep:
    """One step's row of tokens."""

    token_ids: NDArray[np.int64]  # [tokens]
    positions: NDArray[np.int64]  # [tokens]
    wanted: NDArray[np.int64]  # indices in the row whose logits are wanted, in the caller's order
    pending: NDArray[np.int64]  # [n, 2]: index in the row, row of the step before's tokens
    segments: tuple[Segment, ...]
    # Of a decode step, one group after the other up to the last segment; empty: none, or not worth it.
    shared: tuple[SharedPrefix, ...] = ()

    @property
    def is_decode(self) -> bool:
        """Every sequence computes one token."""
        return len(self.segments) == len(self.token_ids)

    @property
    def shared_pages(self) -> int:
        """That need not be read again for another sequence of a group, if the groups are read once."""
        return sum((group.count - 1) * group.num_pages for group in self.shared)

    @property
    def repeated(self) -> int:
        """Of a decode step: the segment that is computed again where a graph has more places than there are. It is the
        shortest, or in a group, of which it reads only what it does not share."""
        return len(self.segments) - 1 if self.shared else 0


def pack(chunks: Sequence[Chunk], terms: CascadeTerms | None = None) -> PackedStep:
    """Put the chunks into one row. ``terms``: when shared prefixes are read once; None: never."""
    order = sorted(range(len(chunks)), key=lambda i: (len(chunks[i].token_ids) > 1, chunks[i].start))
    shared: tuple[SharedPrefix, ...] = ()
    if terms is not None and all(len(chunk.token_ids) == 1 for chunk in chunks):
        order, shared = _gathered(order, chunks, terms)
    token_ids: list[int] = []
    positions: list[int] = []
    segments: list[Segment] = []
    pending: list[tuple[int, int]] = []
    last = [0] * len(chunks)  # index of each chunk's last token in the row
    for i in order:
        chunk = chunks[i]
        if chunk.pending_row is not None:
            pending.append((len(token_ids), chunk.pending_row))
        segment = Segment(chunk.start, len(chunk.token_ids), chunk.page_ids)
        token_ids.extend(chunk.token_ids)
        positions.extend(range(segment.start, segment.end))
        segments.append(segment)
        last[i] = len(token_ids) - 1
    wanted = [index for index, chunk in zip(last, chunks, strict=True) if chunk.wanted]
    return PackedStep(
        np.array(token_ids, np.int64),
        np.array(positions, np.int64),
        np.array(wanted, np.int64),
        np.array(pending, np.int64).reshape(-1, 2),
        tuple(segments),
        shared,
    )


def _gathered(
    order: Sequence[int], chunks: Sequence[Chunk], terms: CascadeTerms
) -> tuple[list[int], tuple[SharedPrefix, ...]]:
    """(``order`` with groups as neighbours behind the rest, the groups). Longer first within a group and among them:
    a step that is filled up repeats its last sequence, whose own part is then the shortest."""
    groups = terms.groups([chunk.page_ids for chunk in chunks], [chunk.start for chunk in chunks])
    grouped = {i for group in groups for i in group.members}
    gathered = [i for i in order if i not in grouped]
    shared: list[SharedPrefix] = []

    def own_tokens(i: int, num_pages: int) -> int:
        return chunks[i].start - num_pages * terms.page_size

    for group in sorted(groups, key=lambda g: -min(own_tokens(i, g.num_pages) for i in g.members)):
        shared.append(SharedPrefix(len(gathered), len(group.members), group.num_pages))
        gathered += sorted(group.members, key=lambda i: -chunks[i].start)
    return gathered, tuple(shared)


def fill_pending(row: torch.Tensor, packed: PackedStep, previous: torch.Tensor | None) -> None:
    """Write the tokens that were not known to the host into ``row`` [tokens], on the device."""
    if len(packed.pending):
        assert previous is not None, "somebody waits for a token of the step before"
        indices, rows = upload(packed.pending, torch.int64, row.device).unbind(1)
        row.index_copy_(0, indices, previous.index_select(0, rows))
