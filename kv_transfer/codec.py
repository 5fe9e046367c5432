"""How do K/V bytes look on the wire?

RAW is the pool's own bytes, and the only codec that a link uses unless its configuration allows others.
"""

from __future__ import annotations

from collections.abc import Sequence
from enum import IntEnum


class Codec(IntEnum):
    """The codec byte of a WRITE frame."""

    RAW = 0
    LOSSLESS = 1
    INT8 = 2
    FP8 = 3


def encode(codec: Codec, views: Sequence[memoryview], dtype: str, block_bytes: int) -> Sequence[memoryview]:
    """``views`` (a payload's bytes in order, whole blocks each) as they go on the wire.

    RAW gives back ``views`` themselves. Thread-safe; works outside the interpreter's lock where it is long.
    """
    raise NotImplementedError


def decode(codec: Codec, payload: memoryview, views: Sequence[memoryview], dtype: str, block_bytes: int) -> None:
    """Fill ``views`` from what ``encode`` made. Raises ProtocolViolation for anything that it cannot have made."""
    raise NotImplementedError
