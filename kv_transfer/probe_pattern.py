"""What does a self-test send, and how is it known to have arrived? Random bytes in real pages, and a digest of them.

Both ends go through ``Region.incoming`` and ``Region.outgoing``, as transfers do, so a pool in device memory is filled
and read back on the way that K/V takes. The order of the digest: layer after layer, in each the pages as they are
listed; so sender and receiver get equal digests exactly if page i of the one holds what page i of the other does.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator, Sequence

from core.request import SessionId
from kv_transfer.transport import Region, Span, Strip, Write

DIGEST_BYTES = 32
_PIECE_BYTES = 1 << 20  # the size of a write: what device memory is staged through holds one


def write_pattern(region: Region, pages: Sequence[int]) -> bytes:
    """Overwrite ``pages`` with random bytes; returns their digest. Nobody else may use the pages meanwhile."""
    digest = hashlib.blake2b(digest_size=DIGEST_BYTES)
    for layer, page_bytes, piece in _pieces(region, pages):
        spans = [Span(page * page_bytes, page_bytes) for page in piece]
        with region.incoming(range(layer, layer + 1), spans) as views:
            for view in views:
                pattern = os.urandom(view.nbytes)
                view[:] = pattern
                digest.update(pattern)
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


def _pieces(region: Region, pages: Sequence[int]) -> Iterator[tuple[int, int, Sequence[int]]]:
    """(layer, bytes of a page, some of the pages), small enough to be staged."""
    for layer, shape in enumerate(region.geometry.layers):
        count = max(1, _PIECE_BYTES // shape.page_bytes)
        for start in range(0, len(pages), count):
            yield layer, shape.page_bytes, pages[start : start + count]
