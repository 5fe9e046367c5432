"""What does a self-test send, and how is it known to have arrived? Random bytes in real pages, and a digest of them.

Both ends go through ``Region.incoming`` and ``Region.outgoing``, as transfers do, so a pool in device memory is filled
and read back on the way that K/V takes. The order of the digest: layer after layer, in each the pages as they are
listed. The sender computes it of what the receiver's pages must hold, also where those are of another size.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterator, Sequence

from core.kv_layout import KvLayout
from core.request import SessionId
from kv_transfer.transfer_plan import PageTable, plan_layer
from kv_transfer.transport import Region, Span, Strip, Write

DIGEST_BYTES = 32
_PIECE_BYTES = 1 << 20  # the size of a write: what device memory is staged through holds one


def write_pattern(region: Region, pages: Sequence[int]) -> None:
    """Overwrite ``pages`` with random bytes. Nobody else may use the pages meanwhile."""
    _fill(region, pages, os.urandom)


def clear(region: Region, pages: Sequence[int]) -> None:
    """Overwrite ``pages`` with zeros. Nobody else may use the pages meanwhile."""
    _fill(region, pages, bytes)


def digest_there(
    region: Region, layout: KvLayout, pages: Sequence[int], there: KvLayout, num_pages: int, num_tokens: int
) -> bytes:
    """The digest of ``num_pages`` pages of a pool of layout ``there`` that held zeros, once it has got ``num_tokens``
    tokens out of ``pages``."""
    digest = hashlib.blake2b(digest_size=DIGEST_BYTES)
    src = PageTable(layout.page_size, 0, tuple(pages))
    dst = PageTable(there.page_size, 0, tuple(range(num_pages)))
    for layer, (ours, theirs) in enumerate(zip(layout.layers, there.layers, strict=True)):
        image = memoryview(bytearray(num_pages * there.page_bytes(layer)))
        for strips in plan_layer(src, ours, dst, theirs, range(num_tokens)):
            with region.outgoing(Write(SessionId(""), b"", layer, 1, strips)) as views:
                payload, at = b"".join(views), 0  # a region may lend one view for many strips
            for strip in strips:
                image[strip.dst : strip.dst + strip.num_bytes] = payload[at : at + strip.num_bytes]
                at += strip.num_bytes
        digest.update(image)
    return digest.digest()


def digest_of(region: Region, pages: Sequence[int]) -> bytes:
    """The digest of what ``pages`` hold."""
    digest = hashlib.blake2b(digest_size=DIGEST_BYTES)
    for layer, page_bytes, piece in _pieces(region, pages):
        strips = tuple(Strip(page * page_bytes, 0, page_bytes) for page in piece)
        with region.outgoing(Write(SessionId(""), b"", layer, 1, strips)) as views:
            for view in views:
                digest.update(view)
    return digest.digest()


def _fill(region: Region, pages: Sequence[int], make: Callable[[int], bytes]) -> None:
    for layer, page_bytes, piece in _pieces(region, pages):
        spans = [Span(page * page_bytes, page_bytes) for page in piece]
        with region.incoming(range(layer, layer + 1), spans) as views:
            for view in views:
                view[:] = make(view.nbytes)


def _pieces(region: Region, pages: Sequence[int]) -> Iterator[tuple[int, int, Sequence[int]]]:
    """(layer, bytes of a page, some of the pages), small enough to be staged."""
    for layer, shape in enumerate(region.geometry.layers):
        count = max(1, _PIECE_BYTES // shape.page_bytes)
        for start in range(0, len(pages), count):
            yield layer, shape.page_bytes, pages[start : start + count]
