"""Paged attention equals the textbook's, whatever the page size, the packing and the backend."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import pytest
import torch

from engine import attention, cpu_kernel
from engine.attention import AttentionOptions, Segment, create_backend
from engine.cache_layout import CacheLayout, LayerCache
from engine.config import DEFAULT_CODE_FOLDER
from engine.page_pool import PagePool
from tests.attention_case import SHARING, Case, ragged_steps, shared_steps

REFERENCES = ("matmul", "sdpa")  # flashinfer and varlen need a GPU: tests/gpu
needs_kernel = pytest.mark.skipif(
    cpu_kernel.missing(DEFAULT_CODE_FOLDER) is not None, reason="no attention kernel for this processor"
)
ON_CPU = (*REFERENCES, pytest.param("native", marks=needs_kernel))
HEADS, NUM_PAGES = 6, 128  # as Case has them
KINDS = {
    "one head each": LayerCache(0, 6, 8, 8, "float32"),
    "grouped": LayerCache(0, 2, 8, 8, "float32"),
    "one shared head": LayerCache(0, 1, 8, 8, "float32"),
    "unequal dims": LayerCache(0, 2, 12, 8, "float32"),
    "window": LayerCache(0, 2, 8, 8, "float32", window=5),
}


OPTIONS = {
    "plain": AttentionOptions(scaling=0.3),
    "softcap": AttentionOptions(scaling=0.9, softcap=2.0),
    "sinks": AttentionOptions(scaling=0.3, sinks=torch.linspace(-1, 2, HEADS)),
}


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("page_size", [1, 4, 16])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("static", [False, True], ids=["eager", "static"])
@pytest.mark.parametrize("backend", REFERENCES)
def test_equals_the_textbook(backend: str, static: bool, kind: str, page_size: int, options: AttentionOptions) -> None:
    case = Case(backend, KINDS[kind], page_size, options, static=static)

    assert max(ragged_steps(case)) < 1e-5


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("kind", ["grouped", "unequal dims", "window"])
def test_shared_prefixes_read_once_equal_the_textbook(kind: str, options: AttentionOptions) -> None:
    case = Case("matmul", KINDS[kind], 4, options, cascade=SHARING)

    assert max(shared_steps(case)) < 1e-5


@needs_kernel
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("page_size", [1, 4, 16])
@pytest.mark.parametrize("kind", KINDS)
def test_the_kernel_equals_the_textbook(kind: str, page_size: int, options: AttentionOptions) -> None:
    case = Case("native", KINDS[kind], page_size, options)

    assert max(ragged_steps(case)) < 1e-5


@needs_kernel
@pytest.mark.parametrize("dim", [64, 128, 80])
@pytest.mark.parametrize(("dtype", "bound"), [("float32", 1e-5), ("bfloat16", 0.02)])
def test_the_kernel_has_known_and_unknown_head_sizes_in_both_types(dim: int, dtype: str, bound: float) -> None:
    case = Case("native", LayerCache(0, 2, dim, dim, dtype), 16, AttentionOptions(dim**-0.5), num_heads=8)

    assert max(ragged_steps(case)) < bound


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_a_type_that_the_processor_lacks_is_multiplied_in_float32(dtype: str) -> None:
    case = Case("matmul", LayerCache(0, 2, 64, 64, dtype), 16, AttentionOptions(0.125))

    assert max(ragged_steps(case)) < 0.02


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


@pytest.mark.parametrize("backend", ON_CPU)
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


def test_no_static_steps_where_gathering_their_padding_would_cost_more_than_a_graph_saves() -> None:
    backend = create_backend("matmul", PagePool(CacheLayout((KINDS["grouped"],), 4), NUM_PAGES))

    assert backend.allocate(1, attention.MAX_STATIC_KEYS) is not None
    assert backend.allocate(2, attention.MAX_STATIC_KEYS) is None
