"""Sequences whose K/V is computed chunk by chunk through a backend, with all of it kept in the open as the reference.

Shared by the tests of the references on CPU and of the kernels on a GPU: what a backend must do is the same.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from itertools import count

import torch

from engine.attention import AttentionOptions, Segment, StaticAttention, StepAttention, create_backend
from engine.cache_layout import CacheLayout, LayerCache
from engine.page_pool import TORCH_DTYPES, PagePool


class Case:
    """One layer, ``num_heads`` query heads. With ``static``, steps of one token each go through a StaticAttention."""

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
        self.random = random.Random(7)
        torch.manual_seed(7)
        self.free = list(range(num_pages))
        self.random.shuffle(self.free)
        self.pages: dict[str, tuple[int, ...]] = {}
        self.keys: dict[str, torch.Tensor] = {}  # name -> [tokens, kv_heads, dim]
        self.values: dict[str, torch.Tensor] = {}

    def step(self, *shares: tuple[str, int]) -> float:
        """Compute (sequence, number of new tokens) shares in one step; the largest error of the output."""
        segments, new_keys, new_values = [], [], []
        for name, num_tokens in shares:
            start = len(self.keys[name]) if name in self.keys else 0
            segments.append(Segment(start, num_tokens, self._pages(name, start + num_tokens)))
            new_keys.append(self._random(num_tokens, self.layer.num_kv_heads, self.layer.key_dim))
            new_values.append(self._random(num_tokens, self.layer.num_kv_heads, self.layer.value_dim))
            self.keys[name] = torch.cat((self.keys.get(name, new_keys[-1][:0]), new_keys[-1]))
            self.values[name] = torch.cat((self.values.get(name, new_values[-1][:0]), new_values[-1]))
        query = self._random(sum(s.num_tokens for s in segments), self.num_heads, self.layer.key_dim)
        step = self._attention(segments)
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

    def _attention(self, segments: Sequence[Segment]) -> StepAttention:
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
