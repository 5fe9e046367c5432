"""How do K/V bytes look on the wire?

RAW is the pool's own bytes, and the only codec that a link uses unless its configuration allows others; which of those
a write gets is decided in codec_policy.py. A payload is the write's bytes in order, here ``num_bytes`` of them; all
numbers are little endian.

    RAW       the bytes
    LOSSLESS  for each byte plane: stored bytes u32     plane k holds byte k of every element; a plane is stored as it
              then each plane                           is where its stored bytes are its size, else as one zstd frame
    INT8      block bytes u32                           a block is a run of ``block bytes`` of the payload that has
              for each block: scale f32                 one scale; every view is a whole number of blocks
              for each element: code i8                 value = code * scale, code in -127..127
    FP8       the same with codes in e4m3fn             |code| <= 448, never NaN

What a value x of a block with the largest magnitude m comes back as, x', in a pool of float32, bfloat16 or float16
(u = 2^-24, 2^-8, 2^-11: the pool's own rounding; s: half its smallest subnormal):

    LOSSLESS  x' = x, bit for bit, whatever it is
    INT8      |x - x'| <= m/254 + (u + 2^-21) m + s
    FP8       |x - x'| <= max(|x|/16, m/458752) + (u + 2^-20) |x'| + s     (3 bits of mantissa)

- A block whose m is below ``448 * 2^-126`` (5e-36) may come back as zeros: its scale would not be a normal float.
- A block that holds NaN or an infinity comes back as NaN throughout. It has no scale, and inventing finite numbers
  would hide a broken model; the other blocks of the payload are not touched by it.
- Zeros come back as zeros, though not always with their sign.

A block is one head's keys, or values, within a page (``LayerPages.block_bytes``). Where a strip holds a part of it,
because the two pools have unequal pages or heads, the blocks of that payload are smaller: the largest run that divides
``block_bytes`` and every view. The bound holds all the more, as m is the maximum of fewer values. Below
``MIN_BLOCK_ELEMENTS`` the scales would eat the gain: ``can_encode`` is False, and such writes go raw.

Everything here is thread-safe, numpy and zstd work outside the interpreter's lock, each call on the caller's thread
alone: several connections encode in parallel. Both are imported by the first call that needs them.

Invariants: ``decode`` allocates at most twice ``num_bytes`` and a constant, whatever the payload says, and refuses what
is not of the format; the views hold anything after a refusal.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from enum import IntEnum
from math import gcd
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from core.errors import ProtocolViolation

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    Bytes = NDArray[np.uint8]
    Floats = NDArray[np.float32]

MIN_BLOCK_ELEMENTS = 16
LOSSY_DTYPES = frozenset({"float32", "bfloat16", "float16"})
ELEMENT_BYTES = MappingProxyType(
    {"uint8": 1, "float8_e4m3fn": 1, "float8_e5m2": 1, "bfloat16": 2, "float16": 2, "float32": 4, "float64": 8}
)

_U32 = struct.Struct("<I")
_SLICE_ELEMENTS = 1 << 18  # worked on at once: intermediate values stay in the cache and are no bigger for big writes
_SMALLEST_NORMAL = 2.0**-126
_FLOAT32_MAX = 3.4028234663852886e38  # of float32
_E4M3FN_NAN = 0x7F
_ZSTD_WINDOW_LOG = 19
# Exponents repeat, strings of them hardly do: entropy coding is what pays, so the match finder is made to give up early
# (three times as fast as zstd's level 1 on the high bytes of bfloat16, and smaller).
_ZSTD_FAST = MappingProxyType({"strategy": 1, "window_log": _ZSTD_WINDOW_LOG, "hash_log": 6, "min_match": 7})


class Codec(IntEnum):
    """The codec byte of a WRITE frame. In the order of what is lost: a later one loses more, or costs more."""

    RAW = 0
    LOSSLESS = 1
    INT8 = 2
    FP8 = 3


@dataclass(frozen=True, slots=True)
class CodecUse:
    """What one link has encoded with one codec since its start."""

    codec: Codec
    raw_bytes: int  # before
    wire_bytes: int  # after
    encode_s: float  # seconds in ``encode``, summed over threads


def can_encode(codec: Codec, dtype: str, block_bytes: int, sizes: Sequence[int]) -> bool:
    """May views of ``sizes`` bytes, of a pool of ``dtype`` and ``block_bytes``, be encoded with ``codec``?"""
    if codec is Codec.RAW:
        return True
    element_bytes = ELEMENT_BYTES.get(dtype)
    if element_bytes is None or not sizes:
        return False
    block = gcd(block_bytes, *sizes)
    if codec is Codec.LOSSLESS:
        return block % element_bytes == 0
    return dtype in LOSSY_DTYPES and block % element_bytes == 0 and block >= MIN_BLOCK_ELEMENTS * element_bytes


def encoded_bound(codec: Codec, num_bytes: int, dtype: str) -> int:
    """The most bytes that ``num_bytes`` of a pool of ``dtype`` can become on the wire, whatever the blocks."""
    element_bytes = ELEMENT_BYTES.get(dtype, 1)
    match codec:
        case Codec.RAW:
            return num_bytes
        case Codec.LOSSLESS:
            return _U32.size * element_bytes + num_bytes
        case Codec.INT8 | Codec.FP8:
            elements = num_bytes // element_bytes
            return _U32.size + 4 * (elements // MIN_BLOCK_ELEMENTS) + elements


def encode(codec: Codec, views: Sequence[memoryview], dtype: str, block_bytes: int) -> Sequence[memoryview]:
    """``views`` (a payload's bytes in order) as they go on the wire, in one or several pieces.

    ``dtype`` and ``block_bytes`` are the sending pool's (``LayerPages``). RAW gives back ``views`` themselves.
    Thread-safe; works outside the interpreter's lock where it is long. The caller has asked ``can_encode``.
    """
    if codec is Codec.RAW:
        return views
    assert can_encode(codec, dtype, block_bytes, [view.nbytes for view in views]), f"{codec.name} of {dtype} views"
    flat = _gather(views)
    if codec is Codec.LOSSLESS:
        return _encode_planes(flat, ELEMENT_BYTES[dtype])
    return [_encode_blocks(_NUMBERS[codec], flat, dtype, gcd(block_bytes, *(view.nbytes for view in views)))]


def decode(codec: Codec, payload: memoryview, views: Sequence[memoryview], dtype: str) -> None:
    """Fill ``views`` from what ``encode`` made of views of the same sizes and ``dtype``.

    Raises ProtocolViolation for anything that is not of the format, or whose size is not that of the views.
    """
    num_bytes = sum(view.nbytes for view in views)
    if codec is Codec.RAW:
        _require(payload.nbytes == num_bytes, f"a raw payload of {payload.nbytes} bytes for {num_bytes}")
        flat = _as_bytes(payload)
    else:
        supported = ELEMENT_BYTES if codec is Codec.LOSSLESS else LOSSY_DTYPES
        _require(dtype in supported, f"a {codec.name} payload for a pool of {dtype}")
        element_bytes = ELEMENT_BYTES[dtype]
        _require(all(view.nbytes % element_bytes == 0 for view in views), f"a {codec.name} payload for part of a value")
        flat = _as_bytes(views[0]) if len(views) == 1 else _empty(num_bytes)
        if codec is Codec.LOSSLESS:
            _decode_planes(_as_bytes(payload), flat, element_bytes)
        else:
            sizes = [view.nbytes for view in views]
            _decode_blocks(_NUMBERS[codec], _as_bytes(payload), flat, dtype, sizes)
    if codec is Codec.RAW or len(views) > 1:
        _scatter(flat, views)


# ---- between views and one run of bytes ----


def _as_bytes(view: memoryview) -> Bytes:
    import numpy as np

    return np.frombuffer(view, np.uint8)


def _empty(num_bytes: int) -> Bytes:
    import numpy as np

    return np.empty(num_bytes, np.uint8)


def _gather(views: Sequence[memoryview]) -> Bytes:
    import numpy as np

    return _as_bytes(views[0]) if len(views) == 1 else np.concatenate([_as_bytes(view) for view in views])


def _scatter(flat: Bytes, views: Sequence[memoryview]) -> None:
    at = 0
    for view in views:
        _as_bytes(view)[:] = flat[at : at + view.nbytes]
        at += view.nbytes


def _require(ok: bool, found: str) -> None:
    if not ok:
        raise ProtocolViolation(found)


# ---- LOSSLESS ----


def _encode_planes(flat: Bytes, element_bytes: int) -> list[memoryview]:
    import numpy as np
    import zstandard

    compressor = zstandard.ZstdCompressor(compression_params=zstandard.ZstdCompressionParameters(**_ZSTD_FAST))
    planes: list[memoryview] = []
    for k in range(element_bytes):
        plane = np.ascontiguousarray(flat[k::element_bytes])
        frame = compressor.compress(plane.data)
        planes.append(memoryview(frame) if len(frame) < plane.nbytes else plane.data)
    return [memoryview(b"".join(_U32.pack(plane.nbytes) for plane in planes)), *planes]


def _decode_planes(payload: Bytes, flat: Bytes, element_bytes: int) -> None:
    plane_bytes = flat.nbytes // element_bytes
    head_bytes = _U32.size * element_bytes
    _require(payload.nbytes >= head_bytes, f"a LOSSLESS payload of {payload.nbytes} bytes")
    stored = [size for (size,) in _U32.iter_unpack(payload[:head_bytes].tobytes())]
    _require(max(stored) <= plane_bytes, f"a byte plane of {max(stored)} bytes where {plane_bytes} are the most")
    _require(sum(stored) == payload.nbytes - head_bytes, "a LOSSLESS payload whose planes are not its size")
    at = head_bytes
    for k, size in enumerate(stored):
        plane = payload[at : at + size]
        flat[k::element_bytes] = plane if size == plane_bytes else _decompress(plane, plane_bytes)
        at += size


def _decompress(frame: Bytes, num_bytes: int) -> Bytes:
    """``num_bytes`` bytes out of one zstd frame that says of itself that it holds so many."""
    import numpy as np
    import zstandard

    try:
        said = zstandard.frame_content_size(frame.data)
        _require(said == num_bytes, f"a zstd frame of {said} bytes where {num_bytes} are expected")
        decompressor = zstandard.ZstdDecompressor(max_window_size=1 << _ZSTD_WINDOW_LOG)
        plane = decompressor.decompress(frame.data, allow_extra_data=False)
    except zstandard.ZstdError as error:
        raise ProtocolViolation(f"a byte plane that is not zstd: {error}") from error
    _require(len(plane) == num_bytes, f"a byte plane of {len(plane)} bytes where {num_bytes} are expected")
    return np.frombuffer(plane, np.uint8)


# ---- INT8 and FP8: one scale for each block ----


@dataclass(frozen=True, slots=True)
class _Int8:
    """Numbers -127..127, in steps of 1."""

    peak: float = 127.0

    def pack(self, numbers: Floats) -> Bytes:
        import numpy as np

        np.rint(numbers, out=numbers)
        return numbers.astype(np.int8).view(np.uint8)

    def unpack(self, codes: Bytes) -> NDArray[Any]:
        import numpy as np

        numbers = codes.view(np.int8)
        _require(numbers.size == 0 or int(numbers.min()) >= -self.peak, "an INT8 payload with the code -128")
        return numbers


@dataclass(frozen=True, slots=True)
class _E4m3fn:
    """Numbers with 4 bits of exponent and 3 of mantissa, up to 448 (Micikevicius et al. 2022, table 1).

    A float32 times 2^-120 has its exponent where e4m3fn's is, subnormals included; the code is then its upper bits,
    rounded to the nearest, ties to the even one.
    """

    peak: float = 448.0

    def pack(self, numbers: Floats) -> Bytes:
        import numpy as np

        numbers *= np.float32(2.0**-120)
        bits = numbers.view(np.uint32)
        rounded = (bits >> 20) & 1
        rounded += 0x7FFFF
        rounded += bits
        rounded >>= 20
        codes = rounded.astype(np.uint16)  # sign at bit 11, then zeros, then the 7 bits of the code
        sign = (codes >> 4) & 0x80
        codes |= sign
        return codes.astype(np.uint8)

    def unpack(self, codes: Bytes) -> NDArray[Any]:
        import numpy as np

        magnitudes = codes & 0x7F
        _require(magnitudes.size == 0 or int(magnitudes.max()) < _E4M3FN_NAN, "an FP8 payload with the code of NaN")
        every = np.arange(256, dtype=np.uint32)
        table = ((every & 0x7F) << 20 | (every & 0x80) << 24).view(np.float32) * np.float32(2.0**120)
        return table[codes]


_NUMBERS: MappingProxyType[Codec, _Int8 | _E4m3fn] = MappingProxyType({Codec.INT8: _Int8(), Codec.FP8: _E4m3fn()})


def _encode_blocks(numbers: _Int8 | _E4m3fn, flat: Bytes, dtype: str, block_bytes: int) -> memoryview:
    import numpy as np

    block_elements = block_bytes // ELEMENT_BYTES[dtype]
    num_blocks = flat.nbytes // block_bytes
    wire = bytearray(_U32.size + num_blocks * (4 + block_elements))
    _U32.pack_into(wire, 0, block_bytes)
    scales = np.frombuffer(wire, "<f4", num_blocks, _U32.size)
    codes = np.frombuffer(wire, np.uint8, offset=_U32.size + scales.nbytes).reshape(num_blocks, block_elements)
    blocks = flat.reshape(num_blocks, block_bytes)
    with np.errstate(all="ignore"):  # NaN and infinities have their place below
        for some in _slices(num_blocks, block_elements):
            values = _widen(blocks[some], dtype)
            largest = np.maximum(values.max(axis=1), -values.min(axis=1))  # NaN if there is one
            scales[some] = _scales_for(largest, numbers.peak)
            usable = scales[some] > 0
            values *= np.where(usable, np.float32(numbers.peak) / largest, np.float32(0))[:, None]
            codes[some] = numbers.pack(values)
            codes[some][~usable] = 0
    return memoryview(wire)


def _decode_blocks(numbers: _Int8 | _E4m3fn, payload: Bytes, flat: Bytes, dtype: str, sizes: Sequence[int]) -> None:
    import numpy as np

    _require(payload.nbytes >= _U32.size, f"a payload of {payload.nbytes} bytes")
    (block_bytes,) = _U32.unpack_from(payload.data)
    element_bytes = ELEMENT_BYTES[dtype]
    block_elements, part = divmod(block_bytes, element_bytes)
    _require(part == 0 and block_elements >= MIN_BLOCK_ELEMENTS, f"a payload in blocks of {block_bytes} bytes")
    _require(all(size % block_bytes == 0 for size in sizes), f"a strip that is no whole number of {block_bytes} bytes")
    num_blocks = flat.nbytes // block_bytes
    expected = _U32.size + num_blocks * (4 + block_elements)
    _require(payload.nbytes == expected, f"a payload of {payload.nbytes} bytes where {expected} are expected")
    scales = np.frombuffer(payload, "<f4", num_blocks, _U32.size).astype(np.float32)
    scales[np.isnan(scales)] = np.nan  # one NaN, whose bits survive being narrowed
    possible = (
        np.isnan(scales) | (scales == 0) | ((scales >= _SMALLEST_NORMAL) & (scales <= _largest_scale(numbers.peak)))
    )
    _require(bool(possible.all()), "a payload with a scale that is not one")
    codes = payload[_U32.size + scales.nbytes :].reshape(num_blocks, block_elements)
    blocks = flat.reshape(num_blocks, block_bytes)
    for some in _slices(num_blocks, block_elements):
        blocks[some] = _narrow(numbers.unpack(codes[some]) * scales[some, None], dtype)


def _slices(num_blocks: int, block_elements: int) -> Iterator[slice]:
    step = max(1, _SLICE_ELEMENTS // block_elements)
    return (slice(start, start + step) for start in range(0, num_blocks, step))


def _scales_for(largest: Floats, peak: float) -> Floats:
    """The scale of each block by its largest magnitude: 0 where that is too small, NaN where it is no number."""
    import numpy as np

    scales: Floats = np.minimum(largest / np.float32(peak), _largest_scale(peak))
    scales[scales < _SMALLEST_NORMAL] = 0
    scales[~np.isfinite(largest)] = np.nan
    return scales


def _largest_scale(peak: float) -> np.float32:
    """The largest scale with which ``peak`` is a float32."""
    import numpy as np

    scale: np.float32 = np.nextafter(np.float32(_FLOAT32_MAX / peak), np.float32(0))
    return scale


def _widen(blocks: Bytes, dtype: str) -> Floats:
    """[n, block bytes] as a new float32 array [n, block elements]."""
    import numpy as np

    match dtype:
        case "bfloat16":
            bits = blocks.view("<u2").astype(np.uint32)
            bits <<= 16
            return bits.view(np.float32)
        case "float16":
            return blocks.view("<f2").astype(np.float32)
        case _:
            return blocks.view("<f4").astype(np.float32)


def _narrow(values: Floats, dtype: str) -> Bytes:
    """The other way, to the nearest, ties to the even one; NaN must be the canonical one."""
    import numpy as np

    match dtype:
        case "bfloat16":
            bits = values.view(np.uint32)
            rounded = (bits >> 16) & 1
            rounded += 0x7FFF
            rounded += bits
            rounded >>= 16
            return rounded.astype("<u2").view(np.uint8)
        case "float16":
            return values.astype("<f2").view(np.uint8)
        case _:
            return values.view(np.uint8)
