from __future__ import annotations

import dataclasses
from typing import Any

import pytest

from engine.cache_layout import CacheLayout, LayerCache

LAYER = LayerCache(layer=0, num_kv_heads=2, key_dim=8, value_dim=4, dtype="bfloat16")


def layout(*layers: LayerCache, page_size: int = 16) -> CacheLayout:
    return CacheLayout(layers or (LAYER,), page_size)


def test_a_token_costs_heads_times_key_and_value_dims() -> None:
    assert LAYER.token_bytes == 2 * (8 + 4) * 2


def test_sizes_add_up_over_layers_of_different_shapes() -> None:
    other = LayerCache(layer=3, num_kv_heads=1, key_dim=64, value_dim=64, dtype="float32", window=128)
    both = layout(LAYER, other, page_size=4)
    assert [both.page_bytes(index) for index in range(both.num_layers)] == [48 * 4, 512 * 4]
    assert both.bytes_per_token == 48 + 512
    assert both.bytes_per_page == 4 * (48 + 512)


def test_block_is_one_heads_keys_or_values_or_what_divides_both() -> None:
    equal = dataclasses.replace(LAYER, layer=1, key_dim=8, value_dim=8)
    both = layout(LAYER, equal, page_size=4)
    assert [both.block_bytes(index) for index in range(both.num_layers)] == [4 * 4 * 2, 4 * 8 * 2]


def test_equal_layouts_have_equal_fingerprints() -> None:
    assert layout().fingerprint() == layout(dataclasses.replace(LAYER)).fingerprint()


@pytest.mark.parametrize(
    "changes",
    [{"layer": 1}, {"num_kv_heads": 4}, {"key_dim": 4}, {"value_dim": 8}, {"dtype": "float16"}, {"window": 64}],
    ids=lambda changes: next(iter(changes)),
)
def test_any_difference_of_a_layer_changes_the_fingerprint(changes: dict[str, Any]) -> None:
    assert layout(dataclasses.replace(LAYER, **changes)).fingerprint() != layout().fingerprint()


def test_the_number_of_layers_is_part_of_the_fingerprint_and_the_page_size_is_not() -> None:
    two = layout(LAYER, dataclasses.replace(LAYER, layer=1))
    assert layout().fingerprint() == layout(page_size=32).fingerprint() != two.fingerprint()


def test_a_layout_tells_peers_its_page_size_and_each_layers_shape() -> None:
    told = layout(page_size=32).kv_layout()
    assert told.page_size == 32
    assert told.page_bytes(0) == layout(page_size=32).page_bytes(0)
    assert (told.layers[0].heads, told.layers[0].dtype) == (range(LAYER.num_kv_heads), LAYER.dtype)


def test_layers_out_of_order_or_twice_are_our_bug() -> None:
    with pytest.raises(AssertionError):
        layout(dataclasses.replace(LAYER, layer=1), LAYER)
    with pytest.raises(AssertionError):
        layout(LAYER, LAYER)
