"""How do FlashInfer's kernels attend to our pages?

A page keeps its heads before its tokens and K before V, so a layer's memory is what FlashInfer calls HND,
[num_pages, 2, kv_heads, page_size, dim], as it lies. A step is cut into runs of neighbours that are computed alike:

    decode     leading segments of one token: FlashAttention 2 on tensor cores, keys split over the device
    fresh      nothing of the sequence was stored before: prefill from the step's K and V, which reads no pages at all
    gathered   a long chunk behind stored tokens: prefill from a copy of its keys in their order. FlashAttention 3 is a
               quarter slower from pages of 16 tokens, and the copy takes a twentieth of that from ``LONG_CHUNK`` on
    paged      the rest: prefill from pages

Prefill is FlashAttention 3 on Hopper, else 2, which reads pages as fast and gathers nothing.

Decode steps that a CUDA graph may hold are in flashinfer_decode.py; what a plan is, in flashinfer_plans.py.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import flashinfer
import numpy as np
import torch

from engine.attention import AttentionOptions, CascadeAttention, Segment, StaticAttention, StepAttention
from engine.flashinfer_decode import CascadeBuffers, CascadeStep, StaticBuffers, StaticStep
from engine.flashinfer_plans import LAYOUT, FlashInferPool, Ints, Kind, Planned, last_page_lens, pinned, starts_of
from engine.page_pool import PagePool
from engine.uploads import upload

_HOPPER = (9, 0)
LONG_CHUNK = 1024  # tokens
_MOST_GATHERED = 1 << 17  # tokens of a run: K and V of an 8B model's layer are half a GiB then


class FlashInferBackend(FlashInferPool):
    """FlashInfer's kernels on the pages of ``pool``, whose layers are such that ``choose_attention`` allows it."""

    def __init__(self, pool: PagePool) -> None:
        super().__init__(pool)
        self.prefill_kernel = "fa3" if torch.cuda.get_device_capability(pool.device) == _HOPPER else "fa2"
        self._wrappers: dict[tuple[str, Kind], Planned] = {}
        self._static: StaticBuffers | None = None
        self._cascade: CascadeBuffers | None = None

    def prepare(self, segments: Sequence[Segment]) -> StepAttention:
        return _Step(self, segments)

    def allocate(self, num_sequences: int, max_tokens: int) -> StaticAttention | None:
        return StaticStep(self, self._static_buffers(num_sequences, max_tokens), num_sequences)

    def allocate_cascade(self, num_sequences: int, max_tokens: int) -> CascadeAttention | None:
        if self._cascade is None or self._cascade.num_sequences < num_sequences:
            self._cascade = CascadeBuffers(num_sequences, self.num_pages(max_tokens), self)
        return CascadeStep(self, self._static_buffers(num_sequences, max_tokens), self._cascade, num_sequences)

    def _static_buffers(self, num_sequences: int, max_tokens: int) -> StaticBuffers:
        if self._static is None or self._static.num_sequences < num_sequences:
            num_page_ids = num_sequences * self.num_pages(max_tokens)
            self._static = StaticBuffers(num_sequences, num_page_ids, self.device, self.page_lists)
        return self._static

    def wrapper(self, part: str, kind: Kind) -> Planned:
        """The one for eager steps: ``part`` is a ``_Part.name``."""
        planned = self._wrappers.get((part, kind))
        if planned is None:
            planned = self._wrappers[part, kind] = Planned(self._make_wrapper(part.split()[0]))
        return planned

    def _make_wrapper(self, way: str) -> Any:
        if way == "decode":
            return flashinfer.BatchDecodeWithPagedKVCacheWrapper(self.workspace, LAYOUT, use_tensor_cores=True)
        if way == "paged":
            return flashinfer.BatchPrefillWithPagedKVCacheWrapper(self.workspace, LAYOUT, backend=self.prefill_kernel)
        return flashinfer.BatchPrefillWithRaggedKVCacheWrapper(self.workspace, "NHD", backend=self.prefill_kernel)


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
        last = last_page_lens(segments, backend.page_size)
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
        self._planned: dict[Kind, list[Any]] = {}
        self._stored: tuple[int, torch.Tensor, torch.Tensor] | None = None  # layer, its K and V of this step

    def _part(
        self,
        way: str,
        number: int,
        segments: Sequence[Segment],
        indices: range,
        page_starts: Ints,
        page_ids: Ints,
    ) -> _Part:
        device, page_size = self._backend.device, self._backend.page_size
        some = segments[indices.start : indices.stop]
        first_token = sum(segment.num_tokens for segment in segments[: indices.start])
        starts = starts_of([segment.num_tokens for segment in some])
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
            pinned(starts, device),
            pinned(page_starts[indices.start : indices.stop + 1] - page_starts[indices.start], device),
            self._page_ids[page_starts[indices.start] : page_starts[indices.stop]],
            pinned(last_page_lens(some, page_size), device),
            pinned(starts_of([segment.end for segment in some]), device),
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
            LAYOUT,
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

    def _plan(self, part: _Part, kind: Kind) -> Any:
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
