"""How do FlashInfer's kernels attend to our pages?

A page keeps its heads before its tokens and K before V, so a layer's memory is what FlashInfer calls HND,
[num_pages, 2, kv_heads, page_size, dim], as it lies. A step is cut into runs of neighbours that are computed alike:

    decode     leading segments of one token: FlashAttention 2 on tensor cores, keys split over the device
    fresh      nothing of the sequence was stored before: prefill from the step's K and V, which reads no pages at all
    gathered   a long chunk behind stored tokens: prefill from a copy of its keys in their order. FlashAttention 3 is a
               quarter slower from pages of 16 tokens, and the copy takes a twentieth of that from ``LONG_CHUNK`` on
    paged      the rest: prefill from pages

Prefill is FlashAttention 3 on Hopper, else 2, which reads pages as fast and gathers nothing.

A kernel's *plan* divides its work over the device, for all layers of one kind (heads, window, soft cap, scaling). It is
made on the host, from lengths, and copied to the device without waiting: the pinned block it is copied from is the
wrapper's own, so before it is written again the copy must have run (``_Planned``).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import flashinfer
import numpy as np
import torch
from numpy.typing import NDArray

from engine.attention import AttentionOptions, Segment, StaticAttention, StepAttention
from engine.cache_layout import LayerCache
from engine.page_pool import PagePool
from engine.uploads import upload

_LAYOUT = "HND"
# Partial results of a split are kept here; FlashInfer recommends 128 MiB, long prefills with many heads take more.
_WORKSPACE_BYTES = 384 << 20
_INT_WORKSPACE_BYTES = 8 << 20
_HOPPER = (9, 0)
LONG_CHUNK = 1024  # tokens
_MOST_GATHERED = 1 << 17  # tokens of a run: K and V of an 8B model's layer are half a GiB then

_Ints = NDArray[np.int32]


@dataclass(frozen=True, slots=True)
class _Kind:
    """Layers that share a plan."""

    cache: LayerCache  # without its number
    num_heads: int
    scaling: float
    softcap: float | None

    @property
    def plan_keywords(self) -> dict[str, Any]:
        """What every wrapper's ``plan`` is told of it."""
        dtype = getattr(torch, self.cache.dtype)
        return {
            "window_left": -1 if self.cache.window is None else self.cache.window - 1,
            "logits_soft_cap": self.softcap,
            "sm_scale": self.scaling,
            "q_data_type": dtype,
            "kv_data_type": dtype,
        }


class _Planned:
    """A wrapper of FlashInfer's, and the moment when its last plan had been copied to the device."""

    def __init__(self, wrapper: Any) -> None:
        self.wrapper = wrapper
        self._copied: torch.cuda.Event | None = None

    def plan(self, *arguments: Any, **keywords: Any) -> None:
        if self._copied is not None:
            self._copied.synchronize()
        self.wrapper.plan(*arguments, **keywords)
        self._copied = torch.cuda.Event()
        self._copied.record()


class _PageLists:
    """Block tables as arrays. A table is a tuple that is replaced when its sequence grows: its array lives as long."""

    def __init__(self) -> None:
        self._arrays: dict[
            int, tuple[tuple[int, ...], _Ints]
        ] = {}  # id of a tuple |-> the tuple, which keeps it, its array

    def of(self, segments: Sequence[Segment], page_size: int) -> tuple[_Ints, _Ints]:
        """(where each segment's pages begin [segments + 1], the pages that it has stored by then, one list)."""
        kept: dict[int, tuple[tuple[int, ...], _Ints]] = {}
        lists = []
        for segment in segments:
            key = id(segment.page_ids)
            entry = self._arrays.get(key) or kept.get(key) or (segment.page_ids, np.array(segment.page_ids, np.int32))
            kept[key] = entry
            lists.append(entry[1][: -(-segment.end // page_size)])
        self._arrays = kept
        starts = np.zeros(len(segments) + 1, np.int32)
        np.cumsum([len(pages) for pages in lists], out=starts[1:])
        return starts, np.concatenate(lists)


class FlashInferBackend:
    """FlashInfer's kernels on the pages of ``pool``, whose layers are such that ``choose_attention`` allows it."""

    def __init__(self, pool: PagePool) -> None:
        layout, device = pool.layout, pool.device
        self.page_size = layout.page_size
        self.device = device
        self.kinds = tuple(replace(layer, layer=0) for layer in layout.layers)
        self.halves = tuple((pool.keys(index), pool.values(index)) for index in range(layout.num_layers))
        self.pages = tuple(
            pool.pages(index).view(pool.num_pages, 2, layer.num_kv_heads, layout.page_size, layer.key_dim)
            for index, layer in enumerate(layout.layers)
        )
        self.workspace = torch.zeros(_WORKSPACE_BYTES, dtype=torch.uint8, device=device)
        self.page_lists = _PageLists()
        self.prefill_kernel = "fa3" if torch.cuda.get_device_capability(device) == _HOPPER else "fa2"
        self._wrappers: dict[tuple[str, _Kind], _Planned] = {}
        self._static: _StaticBuffers | None = None

    def prepare(self, segments: Sequence[Segment]) -> StepAttention:
        return _Step(self, segments)

    def allocate(self, num_sequences: int, max_tokens: int) -> StaticAttention | None:
        if self._static is None or self._static.num_sequences < num_sequences:
            max_pages = -(-max_tokens // self.page_size)
            self._static = _StaticBuffers(num_sequences, num_sequences * max_pages, self.device)
        return _StaticStep(self, self._static, num_sequences)

    def wrapper(self, part: str, kind: _Kind) -> _Planned:
        """The one for eager steps: ``part`` is a ``_Part.name``."""
        planned = self._wrappers.get((part, kind))
        if planned is None:
            planned = self._wrappers[part, kind] = _Planned(self._make_wrapper(part.split()[0]))
        return planned

    def _make_wrapper(self, way: str) -> Any:
        if way == "decode":
            return flashinfer.BatchDecodeWithPagedKVCacheWrapper(self.workspace, _LAYOUT, use_tensor_cores=True)
        if way == "paged":
            return flashinfer.BatchPrefillWithPagedKVCacheWrapper(self.workspace, _LAYOUT, backend=self.prefill_kernel)
        return flashinfer.BatchPrefillWithRaggedKVCacheWrapper(self.workspace, "NHD", backend=self.prefill_kernel)

    def kind(self, index: int, query: torch.Tensor, options: AttentionOptions) -> _Kind:
        """Of a layer that attends so."""
        assert options.sinks is None, "choose_attention lets no model with sinks come here"
        return _Kind(self.kinds[index], query.shape[1], options.scaling, options.softcap)


@dataclass(frozen=True, slots=True)
class _Part:
    """Neighbouring segments of a step that are computed alike. Arrays of the host are pinned."""

    way: str  # decode, fresh, gathered, paged
    number: int  # of the step's parts of that way
    tokens: slice  # of the packed batch
    starts: torch.Tensor  # host, [segments + 1]: where each segment's tokens begin, the first at 0
    page_starts: torch.Tensor  # host, [segments + 1]
    page_ids: torch.Tensor  # device
    last_page_lens: torch.Tensor  # host, [segments]
    key_starts: torch.Tensor  # host, [segments + 1]: of all tokens that are stored by then, one after the other
    slots: tuple[torch.Tensor, torch.Tensor] | None  # device: page and offset of each of those; if they are gathered

    @property
    def name(self) -> str:
        """Of its wrapper: two parts of one way have a plan each."""
        return f"{self.way} {self.number}"


class _Step:
    """One eager step."""

    def __init__(self, backend: FlashInferBackend, segments: Sequence[Segment]) -> None:
        self._backend = backend
        page_starts, page_ids = backend.page_lists.of(segments, backend.page_size)
        self._page_starts = upload(page_starts, torch.int32, backend.device)
        self._page_ids = upload(page_ids, torch.int32, backend.device)
        last = _last_page_lens(segments, backend.page_size)
        self._last_page_lens = upload(last, torch.int32, backend.device)
        counts = np.array([s.num_tokens for s in segments], np.int32)
        self._sequences = upload(
            np.repeat(np.arange(len(segments), dtype=np.int32), counts), torch.int32, backend.device
        )
        positions = np.concatenate([np.arange(s.start, s.end, dtype=np.int32) for s in segments])
        self._positions = upload(positions, torch.int32, backend.device)
        self._parts = [
            self._part(way, number, segments, range(first, end), page_starts, page_ids)
            for way, number, first, end in _runs(segments, gathers=backend.prefill_kernel == "fa3")
        ]
        self._planned: dict[_Kind, list[Any]] = {}
        self._stored: tuple[int, torch.Tensor, torch.Tensor] | None = None  # layer, its K and V of this step

    def _part(
        self,
        way: str,
        number: int,
        segments: Sequence[Segment],
        indices: range,
        page_starts: _Ints,
        page_ids: _Ints,
    ) -> _Part:
        device, page_size = self._backend.device, self._backend.page_size
        some = segments[indices.start : indices.stop]
        first_token = sum(segment.num_tokens for segment in segments[: indices.start])
        starts = _starts([segment.num_tokens for segment in some])
        slots = None
        if way == "gathered":
            positions = [np.arange(segment.end) for segment in some]
            pages = [
                page_ids[page_starts[i] : page_starts[i + 1]][of // page_size]
                for i, of in zip(indices, positions, strict=True)
            ]
            slots = (
                upload(np.concatenate(pages), torch.int64, device),
                upload(np.concatenate(positions) % page_size, torch.int64, device),
            )
        return _Part(
            way,
            number,
            slice(first_token, first_token + int(starts[-1])),
            _pinned(starts, device),
            _pinned(page_starts[indices.start : indices.stop + 1] - page_starts[indices.start], device),
            self._page_ids[page_starts[indices.start] : page_starts[indices.stop]],
            _pinned(_last_page_lens(some, page_size), device),
            _pinned(_starts([segment.end for segment in some]), device),
            slots,
        )

    def store(self, index: int, key: torch.Tensor, value: torch.Tensor) -> None:
        self._stored = (index, key, value)
        flashinfer.append_paged_kv_cache(
            key,
            value,
            self._sequences,
            self._positions,
            self._backend.pages[index],
            self._page_ids,
            self._page_starts,
            self._last_page_lens,
            _LAYOUT,
        )

    def attend(self, index: int, query: torch.Tensor, options: AttentionOptions) -> torch.Tensor:
        kind = self._backend.kind(index, query, options)
        wrappers = self._planned.get(kind)
        if wrappers is None:
            wrappers = self._planned[kind] = [self._plan(part, kind) for part in self._parts]
        out = torch.empty_like(query)
        for part, wrapper in zip(self._parts, wrappers, strict=True):
            rows, into = query[part.tokens], out[part.tokens]
            if part.slots is not None:
                keys, values = self._backend.halves[index]
                wrapper.run(rows, keys[part.slots], values[part.slots], out=into)
            elif part.way == "fresh":
                assert self._stored is not None, "store comes first"
                layer, key, value = self._stored
                assert layer == index, "store comes first"
                wrapper.run(rows, key[part.tokens], value[part.tokens], out=into)
            else:
                wrapper.run(rows, self._backend.pages[index], out=into)
        return out

    def _plan(self, part: _Part, kind: _Kind) -> Any:
        planned = self._backend.wrapper(part.name, kind)
        cache, keywords = kind.cache, kind.plan_keywords
        if part.way == "decode":
            planned.plan(
                part.page_starts,
                part.page_ids,
                part.last_page_lens,
                kind.num_heads,
                cache.num_kv_heads,
                cache.key_dim,
                self._backend.page_size,
                **keywords,
            )
        elif part.way == "paged":
            planned.plan(
                part.starts,
                part.page_starts,
                part.page_ids,
                part.last_page_lens,
                kind.num_heads,
                cache.num_kv_heads,
                cache.key_dim,
                self._backend.page_size,
                causal=True,
                **keywords,
            )
        else:
            planned.plan(
                part.starts, part.key_starts, kind.num_heads, cache.num_kv_heads, cache.key_dim, causal=True, **keywords
            )
        return planned.wrapper


class _StaticBuffers:
    """Device memory that the static steps of one backend share: one of them runs at a time."""

    def __init__(self, num_sequences: int, num_page_ids: int, device: torch.device) -> None:
        def ints(count: int) -> torch.Tensor:
            return torch.zeros(count, dtype=torch.int32, device=device)

        self.num_sequences = num_sequences
        self.page_starts = ints(num_sequences + 1)
        self.page_ids = ints(num_page_ids)
        self.last_page_lens = ints(num_sequences)
        self.positions = ints(num_sequences)
        self.sequences = torch.arange(num_sequences, dtype=torch.int32, device=device)
        self.int_workspaces: dict[_Kind, torch.Tensor] = {}


class _StaticStep:
    """Decode steps of one batch size. A layer kind's wrapper is made when such a layer first attends."""

    def __init__(self, backend: FlashInferBackend, buffers: _StaticBuffers, num_sequences: int) -> None:
        self._backend = backend
        self._num_sequences = num_sequences
        self._buffers = buffers
        self._page_starts = buffers.page_starts[: num_sequences + 1]
        self._last_page_lens = buffers.last_page_lens[:num_sequences]
        self._positions = buffers.positions[:num_sequences]
        self._sequences = buffers.sequences[:num_sequences]
        self._planned: dict[_Kind, _Planned] = {}
        self._filled: tuple[torch.Tensor, torch.Tensor, torch.Tensor] | None = None  # what wrappers plan with

    def fill(self, segments: Sequence[Segment]) -> None:
        assert len(segments) == self._num_sequences, "its kernels are for so many"
        device, page_size = self._backend.device, self._backend.page_size
        page_starts, page_ids = self._backend.page_lists.of(segments, page_size)
        filled = (
            _pinned(page_starts, device),
            upload(page_ids, torch.int32, device),
            _pinned(_last_page_lens(segments, page_size), device),
        )
        if not self._planned:  # plans copy these too, but the first store comes before the first plan
            self._page_starts.copy_(filled[0], non_blocking=True)
            self._buffers.page_ids[: len(page_ids)].copy_(filled[1])
            self._last_page_lens.copy_(filled[2], non_blocking=True)
        positions = np.array([s.start for s in segments], np.int32)
        self._positions.copy_(_pinned(positions, device), non_blocking=True)
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
            _LAYOUT,
        )

    def attend(self, index: int, query: torch.Tensor, options: AttentionOptions) -> torch.Tensor:
        kind = self._backend.kind(index, query, options)
        planned = self._planned.get(kind)
        if planned is None:
            planned = self._planned[kind] = _Planned(self._make_wrapper(kind))
            self._plan(kind, planned)
        out: torch.Tensor = planned.wrapper.run(query, self._backend.pages[index])
        return out

    def _make_wrapper(self, kind: _Kind) -> Any:
        wrapper = flashinfer.BatchDecodeWithPagedKVCacheWrapper(
            self._backend.workspace,
            _LAYOUT,
            use_cuda_graph=True,
            use_tensor_cores=True,
            paged_kv_indptr_buffer=self._page_starts,
            paged_kv_indices_buffer=self._buffers.page_ids,
            paged_kv_last_page_len_buffer=self._last_page_lens,
        )
        shared = self._buffers.int_workspaces.get(kind)
        if shared is None:
            shared = torch.empty(_INT_WORKSPACE_BYTES, dtype=torch.uint8, device=self._backend.device)
            self._buffers.int_workspaces[kind] = shared
        wrapper.reset_workspace_buffer(self._backend.workspace, shared)
        return wrapper

    def _plan(self, kind: _Kind, planned: _Planned) -> None:
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


def _runs(segments: Sequence[Segment], gathers: bool) -> Iterator[tuple[str, int, int, int]]:
    """(way, number among the runs of that way, first segment, the one after the last) of neighbours alike."""
    num_decoding = next((i for i, s in enumerate(segments) if s.num_tokens > 1), len(segments))
    numbers: Counter[str] = Counter()
    first = 0
    while first < len(segments):
        way = _way(segments[first], first < num_decoding, gathers)
        end, num_keys = first + 1, segments[first].end
        while end < len(segments) and _way(segments[end], end < num_decoding, gathers) == way:
            num_keys += segments[end].end
            if way == "gathered" and num_keys > _MOST_GATHERED:
                break
            end += 1
        yield way, numbers[way], first, end
        numbers[way] += 1
        first = end


def _way(segment: Segment, decodes: bool, gathers: bool) -> str:
    if decodes:
        return "decode"
    if segment.start == 0:
        return "fresh"
    return "gathered" if gathers and segment.num_tokens >= LONG_CHUNK and segment.end <= _MOST_GATHERED else "paged"


def _starts(counts: Sequence[int]) -> _Ints:
    """Where each begins, and where the last ends."""
    starts = np.zeros(len(counts) + 1, np.int32)
    np.cumsum(counts, out=starts[1:])
    return starts


def _last_page_lens(segments: Sequence[Segment], page_size: int) -> _Ints:
    ends = np.array([s.end for s in segments], np.int32)
    return (ends - 1) % page_size + 1


def _pinned(values: _Ints, device: torch.device) -> torch.Tensor:
    """In host memory, where plans are made, and ready to be copied without waiting."""
    return upload(values, torch.int32, device, keep=True)
