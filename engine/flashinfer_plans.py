"""What do all of FlashInfer's wrappers share? The layers' memory, kinds of layers, plans, and page tables as arrays.

A kernel's *plan* divides its work over the device, for all layers of one kind (heads, window, soft cap, scaling). It is
made on the host, from lengths, and copied to the device without waiting: the pinned block it is copied from is the
wrapper's own, so before it is written again the copy must have run (``Planned``).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from engine.attention import AttentionOptions, Segment
from engine.cache_layout import LayerCache
from engine.page_pool import PagePool
from engine.uploads import upload

LAYOUT = "HND"
# Partial results of a split are kept here; FlashInfer recommends 128 MiB, long prefills with many heads take more.
_WORKSPACE_BYTES = 384 << 20

Ints = NDArray[np.int32]


@dataclass(frozen=True, slots=True)
class Kind:
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


class Planned:
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


class PageLists:
    """Block tables as arrays. A table is a tuple that is replaced when its sequence grows: its array lives as long."""

    def __init__(self) -> None:
        self._arrays: dict[
            int, tuple[tuple[int, ...], Ints]
        ] = {}  # id of a tuple |-> the tuple, which keeps it, its array

    def of(self, segments: Sequence[Segment], page_size: int) -> tuple[Ints, Ints]:
        """(where each segment's pages begin [segments + 1], the pages that it has stored by then, one list)."""
        kept: dict[int, tuple[tuple[int, ...], Ints]] = {}
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


class FlashInferPool:
    """The pool as FlashInfer sees it, and what its kernels need beside."""

    def __init__(self, pool: PagePool) -> None:
        layout = pool.layout
        self.page_size = layout.page_size
        self.device = pool.device
        self.kinds = tuple(replace(layer, layer=0) for layer in layout.layers)
        self.halves = tuple((pool.keys(index), pool.values(index)) for index in range(layout.num_layers))
        self.pages = tuple(
            pool.pages(index).view(pool.num_pages, 2, layer.num_kv_heads, layout.page_size, layer.key_dim)
            for index, layer in enumerate(layout.layers)
        )
        self.workspace = torch.zeros(_WORKSPACE_BYTES, dtype=torch.uint8, device=pool.device)
        self.page_lists = PageLists()

    def num_pages(self, num_tokens: int) -> int:
        """That hold so many tokens."""
        return -(-num_tokens // self.page_size)

    def kind(self, index: int, query: torch.Tensor, options: AttentionOptions) -> Kind:
        """Of a layer that attends so."""
        assert options.sinks is None, "choose_attention lets no model with sinks come here"
        return Kind(self.kinds[index], query.shape[1], options.scaling, options.softcap)


def starts_of(counts: Sequence[int]) -> Ints:
    """Where each begins, and where the last ends."""
    starts = np.zeros(len(counts) + 1, np.int32)
    np.cumsum(counts, out=starts[1:])
    return starts


def last_page_lens(segments: Sequence[Segment], page_size: int) -> Ints:
    ends = np.array([s.end for s in segments], np.int32)
    return (ends - 1) % page_size + 1


def pinned(values: Ints, device: torch.device) -> torch.Tensor:
    """In host memory, where plans are made, and ready to be copied without waiting."""
    return upload(values, torch.int32, device, keep=True)
