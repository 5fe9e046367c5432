"""How does torch's own ``varlen_attn`` attend to our pages?

It takes a block table from torch 2.12 or 2.13 on (attention_choice.py looks), wants pages as
[num_pages, page_size, kv_heads, dim] with any strides, which ours are seen transposed, and lengths as arrays on the
device. One call serves decode and prefill alike; window and scaling are its arguments, soft caps and sinks it lacks.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch.nn.attention.varlen import varlen_attn

from engine.attention import AttentionOptions, CascadeAttention, Segment, StaticAttention, StepAttention, slots_of
from engine.page_pool import PagePool
from engine.uploads import upload


class VarlenBackend:
    """``varlen_attn`` on the pages of ``pool``, whose layers are such that ``choose_attention`` allows it."""

    def __init__(self, pool: PagePool) -> None:
        self._pool = pool

    def prepare(self, segments: Sequence[Segment]) -> StepAttention:
        return _VarlenStep(self._pool, segments)

    def allocate(self, num_sequences: int, max_tokens: int) -> StaticAttention | None:
        return _StaticVarlen(self._pool, num_sequences, max_tokens)

    def allocate_cascade(self, num_sequences: int, max_tokens: int) -> CascadeAttention | None:
        return None  # varlen_attn's log-sum-exp comes with paged keys in no release that this was tried with


class _VarlenStep:
    """One step; also one whose memory a graph has captured, if ``refill`` is given as many sequences."""

    def __init__(self, pool: PagePool, segments: Sequence[Segment], max_tokens: int | None = None) -> None:
        """``max_tokens``: as many as a sequence may ever have; None: as these have."""
        self._pool = pool
        self._max_q = max(s.num_tokens for s in segments)
        self._max_k = max_tokens or max(s.end for s in segments)
        self._arrays = self._arrays_of(segments)
        self._slots = slots_of(segments, pool.layout.page_size, pool.device)

    def refill(self, segments: Sequence[Segment]) -> None:
        """Copy these sequences' numbers over those of the last."""
        new = (*self._arrays_of(segments), *slots_of(segments, self._pool.layout.page_size, self._pool.device))
        for mine, its in zip((*self._arrays, *self._slots), new, strict=True):
            mine.copy_(its)

    def store(self, index: int, key: torch.Tensor, value: torch.Tensor) -> None:
        self._pool.keys(index)[self._slots] = key
        self._pool.values(index)[self._slots] = value

    def attend(self, index: int, query: torch.Tensor, options: AttentionOptions) -> torch.Tensor:
        assert options.softcap is None, "choose_attention lets no model with soft caps come here"
        assert options.sinks is None, "choose_attention lets no model with sinks come here"
        layer = self._pool.layout.layers[index]
        starts, ends, block_table = self._arrays
        attention: Any = varlen_attn  # torch 2.11's lacks the last four
        out: torch.Tensor = attention(
            query,
            self._pool.keys(index),
            self._pool.values(index),
            starts,
            None,
            self._max_q,
            self._max_k,
            scale=options.scaling,
            window_size=(-1 if layer.window is None else layer.window - 1, 0),
            enable_gqa=query.shape[1] != layer.num_kv_heads,
            seqused_k=ends,
            block_table=block_table,
        )
        return out

    def _arrays_of(self, segments: Sequence[Segment]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """(where each sequence's queries begin, how many tokens it has then, its pages), on the device."""
        page_size, device = self._pool.layout.page_size, self._pool.device
        starts = np.zeros(len(segments) + 1, np.int32)
        np.cumsum([s.num_tokens for s in segments], out=starts[1:])
        table = np.zeros((len(segments), -(-self._max_k // page_size)), np.int32)
        for row, segment in zip(table, segments, strict=True):
            page_ids = segment.page_ids[: -(-segment.end // page_size)]
            row[: len(page_ids)] = page_ids
        return (
            upload(starts, torch.int32, device),
            upload(np.array([s.end for s in segments], np.int32), torch.int32, device),
            upload(table, torch.int32, device),
        )


class _StaticVarlen:
    """Decode steps of one batch size."""

    def __init__(self, pool: PagePool, num_sequences: int, max_tokens: int) -> None:
        self._step = _VarlenStep(pool, [Segment(0, 1, (0,))] * num_sequences, max_tokens)
        self.store = self._step.store
        self.attend = self._step.attend

    def fill(self, segments: Sequence[Segment]) -> None:
        """As ``StaticAttention``'s."""
        self._step.refill(segments)
