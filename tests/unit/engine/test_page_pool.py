"""The pool's bytes are where a transport expects them, and its views show the same memory."""

from __future__ import annotations

import pytest
import torch

from engine.cache_layout import CacheLayout, LayerCache
from engine.page_pool import TORCH_DTYPES, PagePool

LAYOUT = CacheLayout(
    layers=(
        LayerCache(layer=0, num_kv_heads=2, key_dim=4, value_dim=4, dtype="float32"),
        LayerCache(layer=2, num_kv_heads=1, key_dim=6, value_dim=2, dtype="bfloat16"),
    ),
    page_size=3,
)
NUM_PAGES = 5


@pytest.fixture
def pool() -> PagePool:
    return PagePool(LAYOUT, NUM_PAGES)


def test_starts_as_zeros(pool: PagePool) -> None:
    assert not any(pool.pages(index).any() for index in range(LAYOUT.num_layers))


@pytest.mark.parametrize("index", [0, 1])
def test_views_have_the_layers_shapes(pool: PagePool, index: int) -> None:
    layer = LAYOUT.layers[index]

    assert pool.keys(index).shape == (NUM_PAGES, 3, layer.num_kv_heads, layer.key_dim)
    assert pool.values(index).shape == (NUM_PAGES, 3, layer.num_kv_heads, layer.value_dim)
    assert pool.keys(index).dtype == TORCH_DTYPES[layer.dtype]


@pytest.mark.parametrize("index", [0, 1])
def test_a_page_is_one_run_of_bytes_with_keys_before_values_and_heads_before_tokens(pool: PagePool, index: int) -> None:
    page_bytes = LAYOUT.page_bytes(index)
    keys = torch.randn(pool.keys(index).shape[1:]).to(pool.keys(index).dtype)
    values = torch.randn(pool.values(index).shape[1:]).to(pool.values(index).dtype)

    pool.keys(index)[2] = keys
    pool.values(index)[2] = values

    page = bytes(pool.layer_bytes(index)[2 * page_bytes : 3 * page_bytes])
    assert page == _bytes(keys.transpose(0, 1)) + _bytes(values.transpose(0, 1))
    assert not any(pool.layer_bytes(index)[: 2 * page_bytes])
    assert not any(pool.layer_bytes(index)[3 * page_bytes :])


@pytest.mark.parametrize("index", [0, 1])
def test_bytes_written_from_outside_are_seen_in_the_views(pool: PagePool, index: int) -> None:
    other, page_bytes = PagePool(LAYOUT, NUM_PAGES), LAYOUT.page_bytes(index)
    other.pages(index)[4] = torch.randn(other.pages(index).shape[1])

    memory = pool.layer_bytes(index)
    memory[page_bytes : 2 * page_bytes] = other.layer_bytes(index)[4 * page_bytes :]

    assert torch.equal(pool.keys(index)[1], other.keys(index)[4])
    assert torch.equal(pool.values(index)[1], other.values(index)[4])


@pytest.mark.parametrize("index", [0, 1])
def test_layer_bytes_cover_the_layer_and_can_be_written(pool: PagePool, index: int) -> None:
    memory = pool.layer_bytes(index)

    assert memory.nbytes == len(memory) == NUM_PAGES * LAYOUT.page_bytes(index)
    assert memory.format == "B"
    assert memory.contiguous
    assert not memory.readonly


def _bytes(tensor: torch.Tensor) -> bytes:
    return tensor.contiguous().view(torch.uint8).numpy().tobytes()
