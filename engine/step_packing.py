"""What does the model see of a step? All tokens in one row without padding, and where each sequence's lie in it.

Packed short first: sequences that compute one token come together, those with few earlier tokens before those with
many, because like lengths share a tile of the attention; logits come back in the caller's order.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from engine.attention import Segment
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

    @property
    def is_decode(self) -> bool:
        """Every sequence computes one token."""
        return len(self.segments) == len(self.token_ids)


def pack(chunks: Sequence[Chunk]) -> PackedStep:
    """Put the chunks into one row."""
    order = sorted(range(len(chunks)), key=lambda i: (len(chunks[i].token_ids) > 1, chunks[i].start))
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
    )


def fill_pending(row: torch.Tensor, packed: PackedStep, previous: torch.Tensor | None) -> None:
    """Write the tokens that were not known to the host into ``row`` [tokens], on the device."""
    if len(packed.pending):
        assert previous is not None, "somebody waits for a token of the step before"
        indices, rows = upload(packed.pending, torch.int64, row.device).unbind(1)
        row.index_copy_(0, indices, previous.index_select(0, rows))
