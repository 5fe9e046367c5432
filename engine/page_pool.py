"""Where do the K/V bytes of one engine live? One tensor for each cached layer, page after page.

    layer tensor  [num_pages, page_elements]
    one page      [num_kv_heads, page_size, key_dim] K, then [num_kv_heads, page_size, value_dim] V

Heads come before tokens within a page: attention wants its keys head by head, so a gather reads whole runs of tokens
(5% of a CPU decode step of 32), and the heads that one of several devices holds are one run of bytes.

Invariants:
- One page of one layer is one contiguous run of bytes, and page ``p`` starts at ``p * page_bytes(index)``: a transport
  may copy pages knowing nothing but that size.
- The memory starts as zeros and never moves, so a registered region stays valid for the life of the pool.
- The pool does not know which page belongs to whom: page ids are the PageAllocator's. Bytes are written by the
  attention backend (computed here) or by a transport (received), never by both at one time.
"""

from __future__ import annotations

import torch

from engine.cache_layout import CacheLayout

TORCH_DTYPES = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "float8_e4m3fn": torch.float8_e4m3fn,
    "float8_e5m2": torch.float8_e5m2,
    "float64": torch.float64,
}


class PagePool:
    """The K/V memory of ``num_pages`` pages on ``device``. ``index`` is a position in ``layout.layers``."""

    def __init__(self, layout: CacheLayout, num_pages: int, device: torch.device | str = "cpu") -> None:
        assert num_pages >= 1, "a pool holds at least one page"
        self.layout = layout
        self.num_pages = num_pages
        self.device = torch.device(device)
        self._layers = tuple(self._allocate(index) for index in range(layout.num_layers))
        self._keys = tuple(self._key_half(index) for index in range(layout.num_layers))
        self._values = tuple(self._value_half(index) for index in range(layout.num_layers))

    def _allocate(self, index: int) -> torch.Tensor:
        layer = self.layout.layers[index]
        elements = self.layout.page_size * layer.num_kv_heads * (layer.key_dim + layer.value_dim)
        return torch.zeros(self.num_pages, elements, dtype=TORCH_DTYPES[layer.dtype], device=self.device)

    def pages(self, index: int) -> torch.Tensor:
        """The layer's whole memory, [num_pages, page_elements], contiguous."""
        return self._layers[index]

    def keys(self, index: int) -> torch.Tensor:
        """The K halves as a view, [num_pages, page_size, num_kv_heads, key_dim]; not contiguous."""
        return self._keys[index]

    def values(self, index: int) -> torch.Tensor:
        """The V halves as a view, [num_pages, page_size, num_kv_heads, value_dim]; not contiguous."""
        return self._values[index]

    def _key_half(self, index: int) -> torch.Tensor:
        return self._half(index, 0, self.layout.layers[index].key_dim)

    def _value_half(self, index: int) -> torch.Tensor:
        layer = self.layout.layers[index]
        return self._half(index, self.layout.page_size * layer.num_kv_heads * layer.key_dim, layer.value_dim)

    def _half(self, index: int, first_element: int, dim: int) -> torch.Tensor:
        page_size, num_heads = self.layout.page_size, self.layout.layers[index].num_kv_heads
        half = self._layers[index].narrow(1, first_element, page_size * num_heads * dim)
        return half.view(self.num_pages, num_heads, page_size, dim).transpose(1, 2)

    def layer_bytes(self, index: int) -> memoryview:
        """The layer's memory as writable bytes, for a transport. Host memory only."""
        assert self.device.type == "cpu", "device memory has no host view; a transport must stage it"
        return self._layers[index].view(torch.uint8).view(-1).numpy().data
