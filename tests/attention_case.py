"""Sequences whose K/V is computed chunk by chunk through a backend, with all of it kept in the open as the reference.

Shared by the tests of the references on CPU and of the kernels on a GPU: what a backend must do is the same.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from itertools import count

import torch

from engine.attention import (
    AttentionOptions,
    CascadeAttention,
    Segment,
    StaticAttention,
    StepAttention,
    create_backend,
)
from engine.cache_layout import CacheLayout, LayerCache
from engine.page_pool import TORCH_DTYPES, PagePool
from engine.shared_prefixes import SharedPrefix


class Case:
    """One layer, ``num_heads`` query heads. With ``static``, steps of one token each go through a StaticAttention; with
    ``cascade``, those of so many sequences for which groups are given go through a CascadeAttention."""

    def __init__(
        self,
        backend: str,
        layer: LayerCache,
        page_size: int,
        options: AttentionOptions,
        *,
        num_heads: int = 6,
        num_pages: int = 128,
        device: str = "cpu",
        static: bool = False,
        cascade: int = 0,
        max_tokens: int = 64,
    ) -> None:
        self.pool = PagePool(CacheLayout((layer,), page_size), num_pages, device)
        self.layer, self.options, self.page_size, self.num_heads = layer, options, page_size, num_heads
        self.device, self.dtype = torch.device(device), TORCH_DTYPES[layer.dtype]
        self.backend = create_backend(backend, self.pool)
        self.static: dict[int, StaticAttention] = {}
        for size in (4, 3, 2, 1) if static else ():
            attention = self.backend.allocate(size, max_tokens)
            assert attention is not None
            self.static[size] = attention
        self.cascade: CascadeAttention | None = None
        if cascade:
            assert self.backend.allocate(cascade, max_tokens) is not None
            self.cascade = self.backend.allocate_cascade(cascade, max_tokens)
            assert self.cascade is not None
        self.random = random.Random(7)
        torch.manual_seed(7)
        self.free = list(range(num_pages))
        self.random.shuffle(self.free)
        self.pages: dict[str, tuple[int, ...]] = {}
        self.keys: dict[str, torch.Tensor] = {}  # name -> [tokens, kv_heads, dim]
        self.values: dict[str, torch.Tensor] = {}

    def fork(self, name: str, parent: str, num_pages: int) -> None:
        """A sequence that begins with the first pages of another one, as the prefix cache would have it."""
        num_tokens = num_pages * self.page_size
        self.pages[name] = self.pages[parent][:num_pages]
        self.keys[name], self.values[name] = self.keys[parent][:num_tokens], self.values[parent][:num_tokens]

    def step(self, *shares: tuple[str, int], shared: Sequence[SharedPrefix] | None = None) -> float:
        """Compute (sequence, number of new tokens) shares in one step, with these groups in a CascadeAttention; the
        largest error of the output."""
        segments, new_keys, new_values = [], [], []
        for name, num_tokens in shares:
            start = len(self.keys[name]) if name in self.keys else 0
            segments.append(Segment(start, num_tokens, self._pages(name, start + num_tokens)))
            new_keys.append(self._random(num_tokens, self.layer.num_kv_heads, self.layer.key_dim))
            new_values.append(self._random(num_tokens, self.layer.num_kv_heads, self.layer.value_dim))
            self.keys[name] = torch.cat((self.keys.get(name, new_keys[-1][:0]), new_keys[-1]))
            self.values[name] = torch.cat((self.values.get(name, new_values[-1][:0]), new_values[-1]))
        query = self._random(sum(s.num_tokens for s in segments), self.num_heads, self.layer.key_dim)
        step = self._attention(segments, shared)
        step.store(0, torch.cat(new_keys), torch.cat(new_values))
        actual = step.attend(0, query, self.options)
        expected = torch.cat(
            [
                self._reference(name, segment, part)
                for (name, _), segment, part in zip(
                    shares, segments, query.split([s.num_tokens for s in segments]), strict=True
                )
            ]
        )
        assert actual.shape == expected.shape
        return float((actual.float() - expected).abs().max())

    def _attention(self, segments: Sequence[Segment], shared: Sequence[SharedPrefix] | None) -> StepAttention:
        if shared is not None:
            assert self.cascade is not None, "made for it"
            self.cascade.fill(segments, shared)
            return self.cascade
        static = self.static.get(len(segments))
        if static is None or any(segment.num_tokens > 1 for segment in segments):
            return self.backend.prepare(segments)
        static.fill(segments)
        return static

    def _random(self, *shape: int) -> torch.Tensor:
        return torch.randn(*shape).to(self.device, self.dtype)

    def _pages(self, name: str, num_tokens: int) -> tuple[int, ...]:
        pages = self.pages.get(name, ())
        while len(pages) * self.page_size < num_tokens + self.random.randrange(3):  # now and then a page too many
            pages += (self.free.pop(),)
        self.pages[name] = pages
        return pages

    def _reference(self, name: str, segment: Segment, query: torch.Tensor) -> torch.Tensor:
        group = self.num_heads // self.layer.num_kv_heads
        keys = self.keys[name].float().repeat_interleave(group, 1)
        values = self.values[name].float().repeat_interleave(group, 1)
        outputs = []
        for position, q in zip(count(segment.start), query.float()):
            first = 0 if self.layer.window is None else max(0, position - self.layer.window + 1)
            scores = torch.einsum("hd,khd->hk", q, keys[first : position + 1]) * self.options.scaling
            if self.options.softcap is not None:
                scores = self.options.softcap * torch.tanh(scores / self.options.softcap)
            if self.options.sinks is not None:
                scores = torch.cat((scores, self.options.sinks[:, None]), 1)
            weights = scores.softmax(-1)[:, : position + 1 - first]
            outputs.append(torch.einsum("hk,khd->hd", weights, values[first : position + 1]))
        return torch.stack(outputs)


def ragged_steps(case: Case) -> list[float]:
    """Errors of steps in which sequences begin, go on in chunks, and decode, alone and together."""
    return [
        case.step(("a", 7)),
        case.step(("a", 1), ("b", 3)),
        case.step(("b", 1), ("a", 1), ("c", 1), ("d", 6)),
        case.step(("d", 1), ("b", 1), ("c", 5), ("a", 4)),
        case.step(("a", 1), ("b", 1), ("c", 1), ("d", 1)),
        case.step(("c", 1), ("a", 1)),
        case.step(("e", 17), ("f", 16)),
        case.step(("b", 1), ("e", 15), ("f", 2)),
        case.step(("f", 1), ("e", 1), ("b", 1)),
    ]


SHARING = 8  # sequences of the steps below


def shared_steps(case: Case) -> list[float]:
    """Errors of decode steps of two groups and two sequences that share nothing, of one group, and of none."""
    size = case.page_size
    prompts = case.step(("a", 3 * size + 5), ("b", 2 * size), ("c", 7), ("e", size + 1))
    for number, num_more in enumerate((0, 1, size + 2)):  # one goes on right where the shared pages end
        for parent, num_pages in (("a", 3), ("b", 2)):
            case.fork(f"{parent}{number}", parent, num_pages)
            if num_more:
                case.step((f"{parent}{number}", num_more))
    for number in range(5):
        case.fork(f"d{number}", "a", 3)
    apart = [(name, 1) for name in ("c", "e", "a0", "a1", "a2", "b0", "b1", "b2")]
    alike = [(name, 1) for name in ("a0", "a1", "a2", "d0", "d1", "d2", "d3", "d4")]
    return [
        prompts,
        case.step(*apart, shared=(SharedPrefix(2, 3, 3), SharedPrefix(5, 3, 2))),
        case.step(*apart, shared=(SharedPrefix(2, 3, 2), SharedPrefix(5, 3, 2))),
        case.step(*alike, shared=(SharedPrefix(0, 8, 3),)),
        case.step(*apart, shared=(SharedPrefix(5, 3, 1),)),
        case.step(*apart, shared=()),
        case.step(*alike, shared=(SharedPrefix(3, 5, 3),)),
    ]
