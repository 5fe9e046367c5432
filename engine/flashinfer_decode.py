"""How do FlashInfer's kernels compute decode steps that a CUDA graph may hold?

Their plans and page tables lie in memory that stays where it is; ``fill`` writes a step's into it. All batch sizes
share that memory, as one step runs at a time.

Steps whose sequences share leading pages (shared_prefixes.py) have kernels of their own, ``CascadeStep``:

    shared    one request for each group: all its queries over the pages that they share. Not causal, keys split over
              the device (FlashAttention 2; 3 splits no keys, and a group is few queries)
    rest      one request for each sequence, over the pages behind those: decode, as in every step; at the same time
    merge     by their weights (attention_cascade.py)

FlashInfer's own MultiLevelCascadeAttentionWrapper does the same with prefill kernels on both levels, which on Hopper
are FlashAttention 3 and so the wrong ones for one query over long keys.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import flashinfer
import numpy as np
import torch

from engine.attention import AttentionOptions, Segment
from engine.attention_cascade import behind_shared
from engine.flashinfer_plans import LAYOUT, FlashInferPool, Kind, PageLists, Planned, last_page_lens, pinned, starts_of
from engine.shared_prefixes import MAX_GROUPS, SharedPrefix
from engine.uploads import upload

# FlashInfer's 8 MiB hold plans of a hundred thousand requests, and every wrapper pins as many on the host.
_INT_WORKSPACE_BYTES = 1 << 20
# Partial results of the shared pages: for 64 heads of 128 they take half of this.
_SHARED_WORKSPACE_BYTES = 256 << 20


class StaticBuffers:
    """Device memory that the static steps of one backend share: one of them runs at a time."""

    def __init__(self, num_sequences: int, num_page_ids: int, device: torch.device, page_lists: PageLists) -> None:
        self.num_sequences = num_sequences
        self.page_lists = page_lists  # of the segments that it is filled with
        self.page_starts = _ints(num_sequences + 1, device)
        self.page_ids = _ints(num_page_ids, device)
        self.last_page_lens = _ints(num_sequences, device)
        self.positions = _ints(num_sequences, device)
        self.sequences = torch.arange(num_sequences, dtype=torch.int32, device=device)
        self.plans = PlanMemory(device)


class StaticStep:
    """Decode steps of one batch size. A layer kind's wrapper is made when such a layer first attends."""

    def __init__(self, backend: FlashInferPool, buffers: StaticBuffers, num_sequences: int) -> None:
        self._backend = backend
        self._num_sequences = num_sequences
        self._buffers = buffers
        self._page_starts = buffers.page_starts[: num_sequences + 1]
        self._last_page_lens = buffers.last_page_lens[:num_sequences]
        self._positions = buffers.positions[:num_sequences]
        self._sequences = buffers.sequences[:num_sequences]
        self._planned: dict[Kind, Planned] = {}
        self._filled: tuple[torch.Tensor, torch.Tensor, torch.Tensor] | None = None  # what wrappers plan with

    def fill(self, segments: Sequence[Segment]) -> None:
        assert len(segments) == self._num_sequences, "its kernels are for so many"
        device, page_size = self._backend.device, self._backend.page_size
        page_starts, page_ids = self._buffers.page_lists.of(segments, page_size)
        filled = (
            pinned(page_starts, device),
            upload(page_ids, torch.int32, device),
            pinned(last_page_lens(segments, page_size), device),
        )
        if not self._planned:  # plans copy these too, but the first store comes before the first plan
            self._page_starts.copy_(filled[0], non_blocking=True)
            self._buffers.page_ids[: len(page_ids)].copy_(filled[1])
            self._last_page_lens.copy_(filled[2], non_blocking=True)
        positions = np.array([s.start for s in segments], np.int32)
        self._positions.copy_(pinned(positions, device), non_blocking=True)
        self._filled = filled
        for kind, planned in self._planned.items():
            self._plan(kind, planned)

    def store(self, index: int, key: torch.Tensor, value: torch.Tensor) -> None:
        flashinfer.append_paged_kv_cache(
            key,
            value,
            self._sequences,
            self._positions,
            self._backend.pages[index],
            self._buffers.page_ids,
            self._page_starts,
            self._last_page_lens,
            LAYOUT,
        )

    def attend(self, index: int, query: torch.Tensor, options: AttentionOptions) -> torch.Tensor:
        out: torch.Tensor = self._wrapper(index, query, options).run(query, self._backend.pages[index])
        return out

    def attend_partially(
        self, index: int, query: torch.Tensor, options: AttentionOptions
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """(what ``attend`` gives, its weights [sequences, heads], logarithms to base 2)."""
        wrapper = self._wrapper(index, query, options)
        out, weights = wrapper.run(query, self._backend.pages[index], return_lse=True)
        return out, weights

    def _wrapper(self, index: int, query: torch.Tensor, options: AttentionOptions) -> Any:
        kind = self._backend.kind(index, query, options)
        planned = self._planned.get(kind)
        if planned is None:
            planned = self._planned[kind] = Planned(self._make_wrapper(kind))
            self._plan(kind, planned)
        return planned.wrapper

    def _make_wrapper(self, kind: Kind) -> Any:
        wrapper = flashinfer.BatchDecodeWithPagedKVCacheWrapper(
            self._backend.workspace,
            LAYOUT,
            use_cuda_graph=True,
            use_tensor_cores=True,
            paged_kv_indptr_buffer=self._page_starts,
            paged_kv_indices_buffer=self._buffers.page_ids,
            paged_kv_last_page_len_buffer=self._last_page_lens,
        )
        wrapper.reset_workspace_buffer(self._backend.workspace, self._buffers.plans.of(kind))
        return wrapper

    def _plan(self, kind: Kind, planned: Planned) -> None:
        assert self._filled is not None, "fill comes first"
        page_starts, page_ids, last_page_lens = self._filled
        planned.plan(
            page_starts,
            page_ids,
            last_page_lens,
            kind.num_heads,
            kind.cache.num_kv_heads,
            kind.cache.key_dim,
            self._backend.page_size,
            **kind.plan_keywords,
        )


class CascadeBuffers:
    """Device memory that the cascade steps of one backend share, beside that of the static steps."""

    def __init__(self, num_sequences: int, max_pages: int, backend: FlashInferPool) -> None:
        """``max_pages``: of a sequence."""
        device = backend.device
        self.num_sequences = num_sequences
        # Tables of the rests are new ones in each step, which must not drive out those of whole sequences.
        self.rests = StaticBuffers(num_sequences, num_sequences * max_pages, device, PageLists())
        num_requests = _num_requests(num_sequences)
        self.query_starts = _ints(num_requests + 1, device)
        self.page_starts = _ints(num_requests + 1, device)
        self.page_ids = _ints(num_requests * max_pages, device)
        self.last_page_lens = _ints(num_requests, device)
        self.plans = PlanMemory(device)
        self.workspace = torch.zeros(_SHARED_WORKSPACE_BYTES, dtype=torch.uint8, device=device)
        # Either level alone leaves multiprocessors idle while its last blocks run.
        self.stream = torch.cuda.Stream(device, priority=torch.cuda.current_stream(device).priority)


class CascadeStep:
    """Decode steps of one batch size whose sequences share leading pages. Layers with a window go as in others."""

    def __init__(
        self, backend: FlashInferPool, whole: StaticBuffers, buffers: CascadeBuffers, num_sequences: int
    ) -> None:
        self._backend = backend
        self._num_sequences = num_sequences
        self._num_requests = _num_requests(num_sequences)
        windows = any(kind.window is not None for kind in backend.kinds)
        self._whole = StaticStep(backend, whole, num_sequences) if windows else None
        self._rests = StaticStep(backend, buffers.rests, num_sequences)
        self._buffers = buffers
        self._planned: dict[Kind, Planned] = {}  # of the shared pages
        # What wrappers plan with: where requests' queries begin, where their pages do, these, tokens of the last ones.
        self._filled: tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor] | None = None
        self.store = self._rests.store  # a token's page is behind the shared ones

    def fill(self, segments: Sequence[Segment], shared: Sequence[SharedPrefix]) -> None:
        """As ``CascadeAttention``'s."""
        device, page_size = self._backend.device, self._backend.page_size
        if self._whole is not None:
            self._whole.fill(segments)
        self._rests.fill(behind_shared(segments, shared, page_size))
        # The first request is of those that share nothing, over no pages: its results have no weight.
        empty = self._num_requests - 1 - len(shared)
        assert empty >= 0, "a step has so many groups at most"
        alone = shared[0].first if shared else self._num_sequences
        counts = [alone, *(group.count for group in shared), *(0,) * empty]
        assert sum(counts) == self._num_sequences, "groups follow one another up to the last segment"
        pages = [segments[group.first].page_ids[: group.num_pages] for group in shared]
        self._filled = (
            pinned(starts_of(counts), device),
            pinned(starts_of([0, *(len(ids) for ids in pages), *(0,) * empty]), device),
            upload(np.array([page for ids in pages for page in ids], np.int32), torch.int32, device),
            pinned(np.array([0, *(page_size,) * len(shared), *(0,) * empty], np.int32), device),
        )
        for kind, planned in self._planned.items():
            self._plan(kind, planned)

    def attend(self, index: int, query: torch.Tensor, options: AttentionOptions) -> torch.Tensor:
        """As ``StepAttention``'s."""
        kind = self._backend.kind(index, query, options)
        if kind.cache.window is not None:
            assert self._whole is not None, "made for such layers"
            return self._whole.attend(index, query, options)
        planned = self._planned.get(kind)
        if planned is None:
            planned = self._planned[kind] = Planned(self._make_wrapper(kind))
            self._plan(kind, planned)
        shared = torch.empty_like(query)
        shared_weights = torch.empty(query.shape[:2], dtype=torch.float32, device=query.device)
        main, beside = torch.cuda.current_stream(), self._buffers.stream
        beside.wait_stream(main)
        with torch.cuda.stream(beside):
            planned.wrapper.run(query, self._backend.pages[index], out=shared, lse=shared_weights, return_lse=True)
        out, weights = self._rests.attend_partially(index, query, options)
        main.wait_stream(beside)
        flashinfer.merge_state_in_place(out, weights, shared, shared_weights)
        return out

    def _make_wrapper(self, kind: Kind) -> Any:
        buffers = self._buffers
        wrapper = flashinfer.BatchPrefillWithPagedKVCacheWrapper(
            buffers.workspace,
            LAYOUT,
            use_cuda_graph=True,
            qo_indptr_buf=buffers.query_starts[: self._num_requests + 1],
            paged_kv_indptr_buf=buffers.page_starts[: self._num_requests + 1],
            paged_kv_indices_buf=buffers.page_ids,
            paged_kv_last_page_len_buf=buffers.last_page_lens[: self._num_requests],
            backend="fa2",
        )
        wrapper.reset_workspace_buffer(buffers.workspace, buffers.plans.of(kind))
        return wrapper

    def _plan(self, kind: Kind, planned: Planned) -> None:
        assert self._filled is not None, "fill comes first"
        planned.plan(
            *self._filled,
            kind.num_heads,
            kind.cache.num_kv_heads,
            kind.cache.key_dim,
            self._backend.page_size,
            causal=False,
            **kind.plan_keywords,
        )


class PlanMemory:
    """Where plans lie on the device: one at a time of each kind of layer."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._blocks: dict[Kind, torch.Tensor] = {}

    def of(self, kind: Kind) -> torch.Tensor:
        """The block of that kind; the same for all batch sizes."""
        block = self._blocks.get(kind)
        if block is None:
            block = torch.empty(_INT_WORKSPACE_BYTES, dtype=torch.uint8, device=self._device)
            self._blocks[kind] = block
        return block


def _num_requests(num_sequences: int) -> int:
    """Of the level of shared pages: as many groups as there may be, and those that share nothing."""
    return min(MAX_GROUPS, num_sequences // 2) + 1


def _ints(count: int, device: torch.device) -> torch.Tensor:
    return torch.zeros(count, dtype=torch.int32, device=device)
