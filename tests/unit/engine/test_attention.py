"""Paged attention equals the textbook's, whatever the page size, the packing and the backend."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from itertools import count
from typing import Any

import pytest
import torch

from core.errors import InvalidConfig
from engine import attention
from engine.attention import BACKENDS, AttentionOptions, Segment, create_backend
from engine.cache_layout import CacheLayout, LayerCache
from engine.page_pool import PagePool

HEADS, NUM_PAGES = 6, 64
KINDS = {
    "one head each": LayerCache(0, 6, 8, 8, "float32"),
    "grouped": LayerCache(0, 2, 8, 8, "float32"),
    "one shared head": LayerCache(0, 1, 8, 8, "float32"),
    "unequal dims": LayerCache(0, 2, 12, 8, "float32"),
    "window": LayerCache(0, 2, 8, 8, "float32", window=5),
}


class Case:
    """Sequences whose K/V is computed chunk by chunk, with all of it kept in the open as the reference."""

    def __init__(self, backend: str, layer: LayerCache, page_size: int, options: AttentionOptions) -> None:
        self.pool = PagePool(CacheLayout((layer,), page_size), NUM_PAGES)
        self.layer, self.options, self.page_size = layer, options, page_size
        self.backend = create_backend(backend, self.pool)
        self.random = random.Random(7)
        torch.manual_seed(7)
        self.free = list(range(NUM_PAGES))
        self.random.shuffle(self.free)
        self.pages: dict[str, list[int]] = {}
        self.keys: dict[str, torch.Tensor] = {}  # name -> [tokens, kv_heads, dim]
        self.values: dict[str, torch.Tensor] = {}

    def step(self, *shares: tuple[str, int]) -> float:
        """Compute (sequence, number of new tokens) shares in one step; the largest error of the output."""
        segments, new_keys, new_values = [], [], []
        for name, num_tokens in shares:
            start = len(self.keys[name]) if name in self.keys else 0
            segments.append(Segment(start, num_tokens, self._pages(name, start + num_tokens)))
            new_keys.append(torch.randn(num_tokens, self.layer.num_kv_heads, self.layer.key_dim))
            new_values.append(torch.randn(num_tokens, self.layer.num_kv_heads, self.layer.value_dim))
            self.keys[name] = torch.cat((self.keys.get(name, new_keys[-1][:0]), new_keys[-1]))
            self.values[name] = torch.cat((self.values.get(name, new_values[-1][:0]), new_values[-1]))
        query = torch.randn(sum(s.num_tokens for s in segments), HEADS, self.layer.key_dim)
        step = self.backend.prepare(segments)
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
        return float((actual - expected).abs().max())

    def _pages(self, name: str, num_tokens: int) -> tuple[int, ...]:
        pages = self.pages.setdefault(name, [])
        while len(pages) * self.page_size < num_tokens + self.random.randrange(3):  # now and then a page too many
            pages.append(self.free.pop())
        return tuple(pages)

    def _reference(self, name: str, segment: Segment, query: torch.Tensor) -> torch.Tensor:
        group = HEADS // self.layer.num_kv_heads
        keys = self.keys[name].repeat_interleave(group, 1)
        values = self.values[name].repeat_interleave(group, 1)
        outputs = []
        for position, q in zip(count(segment.start), query):
            first = 0 if self.layer.window is None else max(0, position - self.layer.window + 1)
            scores = torch.einsum("hd,khd->hk", q, keys[first : position + 1]) * self.options.scaling
            if self.options.softcap is not None:
                scores = self.options.softcap * torch.tanh(scores / self.options.softcap)
            if self.options.sinks is not None:
                scores = torch.cat((scores, self.options.sinks[:, None]), 1)
            weights = scores.softmax(-1)[:, : position + 1 - first]
            outputs.append(torch.einsum("hk,khd->hd", weights, values[first : position + 1]))
        return torch.stack(outputs)


OPTIONS = {
    "plain": AttentionOptions(scaling=0.3),
    "softcap": AttentionOptions(scaling=0.9, softcap=2.0),
    "sinks": AttentionOptions(scaling=0.3, sinks=torch.linspace(-1, 2, HEADS)),
}


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("page_size", [1, 4, 16])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_equals_the_textbook(backend: str, kind: str, page_size: int, options: AttentionOptions) -> None:
    case = Case(backend, KINDS[kind], page_size, options)

    errors = [
        case.step(("a", 7)),
        case.step(("a", 1), ("b", 3)),
        case.step(("b", 1), ("a", 1), ("c", 1), ("d", 6)),
        case.step(("d", 1), ("b", 1), ("c", 5), ("a", 4)),
        case.step(("a", 1), ("b", 1), ("c", 1), ("d", 1)),
    ]

    assert max(errors) < 1e-5


@pytest.mark.parametrize("kind", ["grouped", "window"])
def test_long_chunks_are_cut_into_tiles(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention, "MAX_MATMUL_QUERIES", 4)
    case = Case("matmul", KINDS[kind], 4, OPTIONS["plain"])

    assert max(case.step(("a", 3)), case.step(("b", 9), ("a", 13))) < 1e-5


def test_unlike_lengths_do_not_share_a_tile(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention, "MAX_PADDING_KEYS", 6)
    segments = [Segment(start, 1, tuple(range(40))) for start in (2, 3, 4, 20, 21, 35)]

    tiles = list(attention._tiles(segments, None))

    assert [tile.starts for tile in tiles] == [(2, 3, 4), (20, 21), (35,)]
    assert [tile.first_token for tile in tiles] == [0, 3, 5]


@pytest.mark.parametrize("backend", BACKENDS)
def test_nothing_in_other_pages_can_reach_a_sequence(backend: str) -> None:
    case = Case(backend, KINDS["grouped"], 4, OPTIONS["plain"])
    case.step(("a", 5), ("b", 2))
    own = [page for pages in case.pages.values() for page in pages]
    others = [page for page in range(NUM_PAGES) if page not in own]
    case.pool.pages(0)[others] = math.nan
    # The slots of their own pages that nothing was stored in yet, too.
    case.pool.keys(0)[case.pages["a"][1], 2:] = math.nan
    case.pool.values(0)[case.pages["a"][1], 2:] = math.nan

    assert case.step(("b", 1), ("a", 1)) < 1e-5


def test_layers_of_one_kind_share_their_row_numbers() -> None:
    layers = (
        LayerCache(0, 2, 8, 8, "float32"),
        LayerCache(1, 2, 8, 8, "float32"),
        LayerCache(2, 2, 8, 8, "float32", 4),
    )
    pool = PagePool(CacheLayout(layers, 4), NUM_PAGES)
    step: Any = create_backend("matmul", pool).prepare([Segment(8, 1, (3, 1, 2))])
    for index in range(3):
        step.store(index, torch.randn(1, 2, 8), torch.randn(1, 2, 8))
        step.attend(index, torch.randn(1, HEADS, 8), OPTIONS["plain"])

    assert len(step._keys) == 2


def test_store_writes_the_slots_of_the_positions_and_no_others() -> None:
    pool = PagePool(CacheLayout((KINDS["grouped"],), 4), 8)
    segments: Sequence[Segment] = [Segment(6, 3, (5, 2, 7)), Segment(0, 1, (0,))]
    key, value = torch.randn(4, 2, 8), torch.randn(4, 2, 8)

    create_backend("matmul", pool).prepare(segments).store(0, key, value)

    slots = [(2, 2), (2, 3), (7, 0), (0, 0)]
    for row, (page, offset) in enumerate(slots):
        assert torch.equal(pool.keys(0)[page, offset], key[row])
        assert torch.equal(pool.values(0)[page, offset], value[row])
        pool.keys(0)[page, offset] = 0
        pool.values(0)[page, offset] = 0
    assert not pool.pages(0).any()


def test_auto_is_matmul_on_cpu() -> None:
    pool = PagePool(CacheLayout((KINDS["grouped"],), 4), 1)

    assert type(create_backend("auto", pool)) is type(create_backend("matmul", pool))


def test_an_unknown_backend_is_refused_with_the_names() -> None:
    pool = PagePool(CacheLayout((KINDS["grouped"],), 4), 1)

    with pytest.raises(InvalidConfig, match=r"engine.attention: must be auto or one of matmul, sdpa"):
        create_backend("flash", pool)
