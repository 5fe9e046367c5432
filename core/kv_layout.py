"""What does one worker's pool hold of each token? The one description that both ends of a hand-over must share.

A page of one layer is ``[heads, page_size, key_dim]`` keys and then ``[heads, page_size, value_dim]`` values. Which
layers there are and what a head is follows from the model; how many tokens make a page, and which of the heads lie on
this device, is each worker's own affair: kv_transfer/transfer_plan.py moves K/V between pools that differ in these.
"""

from __future__ import annotations

from dataclasses import dataclass

from core.errors import Incompatible


@dataclass(frozen=True, slots=True)
class KvLayer:
    """One layer, of which heads ``first_head .. first_head + num_heads - 1`` of the model's lie here."""

    num_heads: int
    key_dim: int
    value_dim: int
    dtype: str
    itemsize: int  # bytes of an element
    first_head: int = 0

    @property
    def heads(self) -> range:
        return range(self.first_head, self.first_head + self.num_heads)

    @property
    def key_bytes(self) -> int:
        """Bytes of one token's keys."""
        return self.num_heads * self.key_dim * self.itemsize

    @property
    def token_bytes(self) -> int:
        """Bytes of one token's keys and values."""
        return self.key_bytes + self.num_heads * self.value_dim * self.itemsize


@dataclass(frozen=True, slots=True)
class KvLayout:
    """A pool: ``page_size`` tokens a page, and its cached layers in the model's order."""

    page_size: int
    layers: tuple[KvLayer, ...]

    def page_bytes(self, layer: int) -> int:
        return self.layers[layer].token_bytes * self.page_size

    @property
    def bytes_per_page(self) -> int:
        """Bytes of one page over all layers."""
        return sum(layer.token_bytes for layer in self.layers) * self.page_size

    def num_pages(self, num_tokens: int) -> int:
        """Pages that so many tokens need."""
        return -(-num_tokens // self.page_size)

    def require_compatible(self, theirs: KvLayout) -> None:
        """Raise ``Incompatible`` if K/V cannot be moved between a pool of this layout and one of ``theirs``."""
        if len(self.layers) != len(theirs.layers):
            raise Incompatible("layout", f"{len(self.layers)} layers", f"{len(theirs.layers)} layers")
        for index, (mine, other) in enumerate(zip(self.layers, theirs.layers, strict=True)):
            if (mine.key_dim, mine.value_dim) != (other.key_dim, other.value_dim):
                dims = (f"layer {index} of {layer.key_dim} + {layer.value_dim} a head" for layer in (mine, other))
                raise Incompatible("layout", *dims)
            if (mine.dtype, mine.itemsize) != (other.dtype, other.itemsize):
                raise Incompatible("dtype", mine.dtype, other.dtype)


@dataclass(frozen=True, slots=True)
class KvEnd:
    """One rank of a worker, as the worker tells others: what its pool holds, and how its transport is reached."""

    layout: KvLayout
    descriptor: bytes
