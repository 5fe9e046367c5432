from __future__ import annotations

from dataclasses import replace

import pytest

from core.errors import Incompatible
from core.kv_layout import KvLayer, KvLayout


@pytest.mark.parametrize(
    ("theirs", "field"),
    [
        (KvLayout(16, (KvLayer(8, 4, 4, "bfloat16", 2),) * 3), "layout"),
        (KvLayout(16, (KvLayer(8, 4, 5, "bfloat16", 2),) * 2), "layout"),
        (KvLayout(16, (KvLayer(8, 4, 4, "float16", 2),) * 2), "dtype"),
    ],
)
def test_other_layers_dims_or_elements_are_incompatible(theirs: KvLayout, field: str) -> None:
    ours = KvLayout(16, (KvLayer(8, 4, 4, "bfloat16", 2),) * 2)
    with pytest.raises(Incompatible) as refused:
        ours.require_compatible(theirs)
    assert refused.value.field == field


def test_other_page_sizes_and_heads_are_compatible() -> None:
    layer = KvLayer(8, 4, 4, "bfloat16", 2)
    KvLayout(16, (layer,)).require_compatible(KvLayout(64, (replace(layer, num_heads=2, first_head=6),)))


def test_bytes_and_pages_are_counted() -> None:
    layout = KvLayout(16, (KvLayer(8, 4, 2, "bfloat16", 2, first_head=8),))
    assert (layout.layers[0].heads, layout.layers[0].key_bytes) == (range(8, 16), 64)
    assert layout.page_bytes(0) == 16 * 96
    assert [layout.num_pages(num_tokens) for num_tokens in (0, 1, 16, 17)] == [0, 1, 1, 2]
