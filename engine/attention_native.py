"""How does a decode step on CPU attend without copying its keys out of their pages? By a kernel of our own.

``matmul`` gathers keys and values into a row for each sequence, pads the shorter ones and multiplies: for a decode
step, which uses each key once, most of the time goes into copies. The kernel (paged_attention.cpp) reads pages where
they lie, as many keys as a sequence has. On an EPYC 7003 (AVX2), one thread, 64 sequences of 180 tokens with SmolLM2's
heads in float32, it took 2.7 ms a layer and ``matmul`` 8.7; code that inductor generates for the same formula 5.3.

Prompts use a key for many queries. There the copy costs little and the matrix product is the best that there is, so
chunks of several tokens go to ``matmul``.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from engine.attention import (
    AttentionBackend,
    AttentionOptions,
    CascadeAttention,
    Segment,
    StaticAttention,
    StepAttention,
    slots_of,
)
from engine.cpu_kernel import Kernel
from engine.page_pool import PagePool


class NativeBackend:
    """``kernel`` for leading segments of one token, ``prompts`` (of the same pool) for the rest."""

    def __init__(self, pool: PagePool, kernel: Kernel, prompts: AttentionBackend) -> None:
        self._pool = pool
        self._kernel = kernel
        self._prompts = prompts

    def prepare(self, segments: Sequence[Segment]) -> StepAttention:
        num_decode = next((i for i, segment in enumerate(segments) if segment.num_tokens > 1), len(segments))
        rest = segments[num_decode:]
        return _NativeStep(
            self._pool, self._kernel, segments, segments[:num_decode], self._prompts.prepare(rest) if rest else None
        )

    def allocate(self, num_sequences: int, max_tokens: int) -> StaticAttention | None:
        return self._prompts.allocate(num_sequences, max_tokens)

    def allocate_cascade(self, num_sequences: int, max_tokens: int) -> CascadeAttention | None:
        return self._prompts.allocate_cascade(num_sequences, max_tokens)


class _NativeStep:
    def __init__(
        self,
        pool: PagePool,
        kernel: Kernel,
        segments: Sequence[Segment],
        decode: Sequence[Segment],  # the first of ``segments``, one token each
        rest: StepAttention | None,  # of the others
    ) -> None:
        self._pool = pool
        self._kernel = kernel
        self._slots = slots_of(segments, pool.layout.page_size, pool.device)
        self._num_decode = len(decode)
        self._rest = rest
        self._table, self._ends = _page_table(decode, pool.layout.page_size)

    def store(self, index: int, key: torch.Tensor, value: torch.Tensor) -> None:
        self._pool.keys(index)[self._slots] = key
        self._pool.values(index)[self._slots] = value

    def attend(self, index: int, query: torch.Tensor, options: AttentionOptions) -> torch.Tensor:
        if self._num_decode == 0:
            assert self._rest is not None, "a step has tokens"
            return self._rest.attend(index, query, options)
        decode = self._attend_decode(index, query[: self._num_decode].contiguous(), options)
        if self._rest is None:
            return decode
        return torch.cat((decode, self._rest.attend(index, query[self._num_decode :], options)))

    def _attend_decode(self, index: int, query: torch.Tensor, options: AttentionOptions) -> torch.Tensor:
        layer, pages = self._pool.layout.layers[index], self._pool.pages(index)
        num_sequences, num_heads = query.shape[:2]
        assert query.dtype == pages.dtype, "the model computes in what its pages hold"
        out = query.new_empty(num_sequences, num_heads, layer.value_dim)
        sinks = None if options.sinks is None else options.sinks.float().contiguous()
        self._kernel(
            query.data_ptr(),
            pages.data_ptr(),
            out.data_ptr(),
            self._table.ctypes.data,
            self._table.shape[1],
            self._ends.ctypes.data,
            num_sequences,
            layer.num_kv_heads,
            num_heads // layer.num_kv_heads,
            layer.key_dim,
            layer.value_dim,
            self._pool.layout.page_size,
            layer.window or 0,
            options.scaling,
            options.softcap or 0.0,
            None if sinks is None else sinks.data_ptr(),
            int(pages.dtype == torch.bfloat16),
            torch.get_num_threads(),
        )
        return out


def _page_table(segments: Sequence[Segment], page_size: int) -> tuple[np.ndarray, np.ndarray]:
    """(page ids [sequences, most pages], padded with zeros that are not looked up; keys [sequences]), both int64."""
    ends = np.array([segment.end for segment in segments], np.int64)
    table = np.zeros((len(segments), -(-int(ends.max(initial=0)) // page_size)), np.int64)
    for row, segment in zip(table, segments, strict=True):
        ids = segment.page_ids[: len(row)]
        row[: len(ids)] = ids
    return table, ends
