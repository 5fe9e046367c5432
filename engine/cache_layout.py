"""What does one page hold? The shape of a model's K/V cache, layer by layer, without torch.

A *page* is ``page_size`` consecutive tokens of one sequence, in every cached layer at once: one page id names one
slice of every layer's pool. So a page costs ``bytes_per_page`` bytes. Two workers may exchange K/V when their layouts
have equal fingerprints, and whole pages as raw bytes when page sizes and ranks are equal too.

Invariants:
- ``layers`` is ordered by ``LayerCache.layer`` and names no layer twice; a model layer that stores nothing of its own
  (it reads another layer's cache) is left out, so positions in ``layers`` and layer numbers may differ.
- The K half of a page comes first, then the V half: ``[num_kv_heads, page_size, key_dim]`` and
  ``[num_kv_heads, page_size, value_dim]``.
"""

from __future__ import annotations

import hashlib
from dataclasses import astuple, dataclass, replace
from itertools import pairwise
from math import gcd
from types import MappingProxyType

from core.kv_layout import KvLayer, KvLayout

PAGE_ORDER = "heads, tokens, dims"  # of K and of V within a page: a change of it makes two layouts differ
DTYPE_BYTES = MappingProxyType(
    {"float32": 4, "bfloat16": 2, "float16": 2, "float8_e4m3fn": 1, "float8_e5m2": 1, "float64": 8}
)


@dataclass(frozen=True, slots=True)
class LayerCache:
    """What one layer stores for each token. ``window`` None: every token attends to all earlier ones."""

    layer: int  # the model's number of the layer
    num_kv_heads: int
    key_dim: int
    value_dim: int
    dtype: str  # torch's name without the prefix: "bfloat16"
    window: int | None = None  # tokens that a sliding-window layer sees, itself included

    def __post_init__(self) -> None:
        assert self.dtype in DTYPE_BYTES, f"no size is known for dtype {self.dtype}"
        assert min(self.num_kv_heads, self.key_dim, self.value_dim) >= 1, f"a layer stores something: {self}"

    @property
    def token_bytes(self) -> int:
        """Bytes of one token's key and value."""
        return self.num_kv_heads * (self.key_dim + self.value_dim) * DTYPE_BYTES[self.dtype]


@dataclass(frozen=True, slots=True)
class CacheLayout:
    """Every cached layer of a model, and the page size in tokens.

    Of a model that is divided among ``num_ranks`` devices: what this one, number ``rank``, holds: of every layer as
    many heads as the others.
    """

    layers: tuple[LayerCache, ...]
    page_size: int
    rank: int = 0
    num_ranks: int = 1

    def __post_init__(self) -> None:
        assert 0 <= self.rank < self.num_ranks, "a rank is one of them"
        assert self.page_size >= 1, "a page holds at least one token"
        assert all(a.layer < b.layer for a, b in pairwise(self.layers)), "layers ascend and appear once"

    @property
    def num_layers(self) -> int:
        """Cached layers, which may be fewer than the model has."""
        return len(self.layers)

    def page_bytes(self, index: int) -> int:
        """Bytes of one page in ``layers[index]``."""
        return self.layers[index].token_bytes * self.page_size

    def block_bytes(self, index: int) -> int:
        """A run that never joins two heads, nor keys and values: one head's keys, or values, within a page.

        Where keys and values are not equally wide it is the largest run that divides both. Lossy codecs give each
        such run a scale of its own.
        """
        layer = self.layers[index]
        return gcd(layer.key_dim, layer.value_dim) * self.page_size * DTYPE_BYTES[layer.dtype]

    @property
    def bytes_per_token(self) -> int:
        """Bytes of one token in all layers."""
        return sum(layer.token_bytes for layer in self.layers)

    @property
    def bytes_per_page(self) -> int:
        """Bytes of one page in all layers."""
        return self.bytes_per_token * self.page_size

    def fingerprint(self) -> str:
        """A digest that is equal exactly for equal layers, over processes and versions of Python; whatever the page
        size and the number of ranks, which a transfer plan bridges."""
        whole = (replace(layer, num_kv_heads=layer.num_kv_heads * self.num_ranks) for layer in self.layers)
        text = repr((PAGE_ORDER, tuple(astuple(layer) for layer in whole)))
        return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()

    def kv_layout(self) -> KvLayout:
        """The same, as a worker tells its peers."""
        layers = (
            KvLayer(
                la.num_kv_heads,
                la.key_dim,
                la.value_dim,
                la.dtype,
                DTYPE_BYTES[la.dtype],
                first_head=self.rank * la.num_kv_heads,
            )
            for la in self.layers
        )
        return KvLayout(self.page_size, tuple(layers))
