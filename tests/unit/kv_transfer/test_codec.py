"""Every codec keeps its stated error, never writes past its views, and refuses what it did not make."""

from __future__ import annotations

import struct
import threading
from contextlib import suppress
from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
import torch
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st

from core.errors import ProtocolViolation
from core.request import SessionId
from engine.cache_layout import CacheLayout, LayerCache
from engine.page_pool import PagePool
from kv_transfer.codec import ELEMENT_BYTES, LOSSY_DTYPES, Codec, can_encode, decode, encode, encoded_bound
from kv_transfer.transport import TOKEN_BYTES, LayerPages, PageGeometry, Region, Span, Strip, Write

LOSSY = (Codec.INT8, Codec.FP8)
DTYPES = sorted(LOSSY_DTYPES)
BLOCK_ELEMENTS = 32
# the pool's own rounding, and half its smallest subnormal
ROUNDING = {"float32": (2.0**-24, 2.0**-150), "bfloat16": (2.0**-8, 2.0**-134), "float16": (2.0**-11, 2.0**-25)}
FLOOR = 448 * 2.0**-126


def to_bytes(values: np.ndarray, dtype: str) -> bytes:
    """float64 ``values`` as the pool holds them, to the nearest; bfloat16 by truncation, which is as good here."""
    match dtype:
        case "float16":
            return values.astype("<f2").tobytes()
        case "bfloat16":
            return (values.astype("<f4").view("<u4") >> 16).astype("<u2").tobytes()
        case _:
            return values.astype("<f4").tobytes()


def from_bytes(data: bytes | bytearray, dtype: str) -> np.ndarray:
    match dtype:
        case "float16":
            return np.frombuffer(data, "<f2").astype(np.float64)
        case "bfloat16":
            return (np.frombuffer(data, "<u2").astype("<u4") << 16).view("<f4").astype(np.float64)
        case _:
            return np.frombuffer(data, "<f4").astype(np.float64)


def cut(data: bytes | bytearray, sizes: list[int]) -> list[memoryview]:
    edges = np.cumsum([0, *sizes])
    return [memoryview(data)[start:end] for start, end in pairwise(edges)]


def through(codec: Codec, data: bytes, dtype: str, block_bytes: int, sizes: list[int] | None = None) -> bytearray:
    sizes = sizes or [len(data)]
    payload = b"".join(encode(codec, cut(data, sizes), dtype, block_bytes))
    assert len(payload) <= encoded_bound(codec, len(data), dtype)
    arrived = bytearray(b"\x55" * len(data))
    decode(codec, memoryview(payload), cut(arrived, sizes), dtype)
    return arrived


def bound(codec: Codec, sent: np.ndarray, arrived: np.ndarray, dtype: str) -> np.ndarray:
    """The module's promise for blocks [n, BLOCK_ELEMENTS]."""
    rounding, subnormal = ROUNDING[dtype]
    largest = np.abs(sent).max(axis=1, keepdims=True)
    if codec is Codec.INT8:
        allowed = largest / 254 + (rounding + 2.0**-21) * largest + subnormal
    else:
        allowed = np.maximum(np.abs(sent) / 16, largest / 458752) + (rounding + 2.0**-20) * np.abs(arrived) + subnormal
    return np.where(largest < FLOOR, np.maximum(allowed, largest), allowed)


def finite(dtype: str) -> st.SearchStrategy[float]:
    width = 16 if dtype == "float16" else 32
    return st.floats(allow_nan=False, allow_infinity=False, width=width) | st.floats(-4, 4, width=width)


@st.composite
def blocks_of_a_dtype(draw: st.DrawFn) -> tuple[str, np.ndarray]:
    """Up to four blocks of a few drawn values, scattered: to draw each of the hundreds would take seconds."""
    dtype = draw(st.sampled_from(DTYPES))
    values = draw(st.lists(finite(dtype), min_size=1, max_size=24))
    scattered = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    return dtype, scattered.choice(values, draw(st.integers(1, 4)) * BLOCK_ELEMENTS)


@pytest.mark.parametrize("codec", LOSSY)
@settings(deadline=None, max_examples=150)
@given(blocks_of_a_dtype())
def test_lossy_codec_keeps_its_error_bound(codec: Codec, drawn: tuple[str, np.ndarray]) -> None:
    dtype, values = drawn
    data = to_bytes(values, dtype)

    arrived = from_bytes(through(codec, data, dtype, BLOCK_ELEMENTS * ELEMENT_BYTES[dtype]), dtype)

    sent = from_bytes(data, dtype).reshape(-1, BLOCK_ELEMENTS)
    arrived = arrived.reshape(-1, BLOCK_ELEMENTS)
    assert np.isfinite(arrived).all()
    assert (np.abs(sent - arrived) <= bound(codec, sent, arrived, dtype)).all()


@pytest.mark.parametrize("codec", LOSSY)
@pytest.mark.parametrize("dtype", DTYPES)
def test_error_of_ordinary_values_is_near_the_bound_and_not_beyond(codec: Codec, dtype: str) -> None:
    data = to_bytes(np.random.default_rng(0).standard_normal(64 * BLOCK_ELEMENTS), dtype)

    arrived = from_bytes(through(codec, data, dtype, BLOCK_ELEMENTS * ELEMENT_BYTES[dtype]), dtype)

    sent, arrived = (x.reshape(-1, BLOCK_ELEMENTS) for x in (from_bytes(data, dtype), arrived))
    worst = (np.abs(sent - arrived) / bound(codec, sent, arrived, dtype)).max()
    assert 0.5 < worst <= 1


@pytest.mark.parametrize("codec", LOSSY)
@pytest.mark.parametrize("dtype", DTYPES)
def test_zeros_arrive_as_zeros_and_the_largest_arrives_as_itself(codec: Codec, dtype: str) -> None:
    values = np.zeros(2 * BLOCK_ELEMENTS)
    values[BLOCK_ELEMENTS] = -7.0
    data = to_bytes(values, dtype)

    arrived = from_bytes(through(codec, data, dtype, BLOCK_ELEMENTS * ELEMENT_BYTES[dtype]), dtype)

    assert np.allclose(arrived, values, rtol=2.0**-9, atol=0)


@pytest.mark.parametrize("codec", LOSSY)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_subnormal_blocks_arrive_as_zeros(codec: Codec, dtype: str) -> None:
    data = to_bytes(np.full(BLOCK_ELEMENTS, 2.0**-130), dtype)

    assert from_bytes(through(codec, data, dtype, len(data)), dtype).tolist() == [0.0] * BLOCK_ELEMENTS


@pytest.mark.parametrize("codec", LOSSY)
def test_subnormal_float16_blocks_keep_the_bound(codec: Codec) -> None:
    data = to_bytes(np.arange(BLOCK_ELEMENTS) * 2.0**-24, "float16")

    arrived = from_bytes(through(codec, data, "float16", len(data)), "float16")

    sent = from_bytes(data, "float16")
    assert (np.abs(sent - arrived) <= bound(codec, sent[None], arrived[None], "float16")[0]).all()


@pytest.mark.parametrize("codec", LOSSY)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_block_with_a_bad_value_arrives_as_nan_and_touches_no_other(codec: Codec, dtype: str, bad: float) -> None:
    values = np.ones(3 * BLOCK_ELEMENTS)
    values[BLOCK_ELEMENTS + 5] = bad
    data = to_bytes(values, dtype)

    arrived = from_bytes(through(codec, data, dtype, BLOCK_ELEMENTS * ELEMENT_BYTES[dtype]), dtype)

    assert np.isnan(arrived[BLOCK_ELEMENTS : 2 * BLOCK_ELEMENTS]).all()
    assert np.allclose(np.delete(arrived, range(BLOCK_ELEMENTS, 2 * BLOCK_ELEMENTS)), 1, rtol=2.0**-8)


@pytest.mark.parametrize("codec", LOSSY)
def test_largest_float32_stays_finite(codec: Codec) -> None:
    data = to_bytes(np.full(BLOCK_ELEMENTS, np.finfo(np.float32).max), "float32")

    arrived = from_bytes(through(codec, data, "float32", len(data)), "float32")

    assert np.allclose(arrived, np.finfo(np.float32).max, rtol=1e-6)


def test_fp8_codes_are_the_nearest_of_torch() -> None:
    values = np.random.default_rng(1).standard_normal(1 << 14).astype(np.float32)
    values[0] = 448  # so that the scale is 1
    values[1:4096] *= 2.0**-8  # many subnormal codes
    payload = b"".join(encode(Codec.FP8, [memoryview(values.tobytes())], "float32", values.nbytes))

    expected = torch.from_numpy(values).to(torch.float8_e4m3fn).view(torch.uint8).numpy()

    assert np.array_equal(np.frombuffer(payload, np.uint8, offset=8), expected)


@settings(deadline=None, max_examples=100)
@given(
    st.sampled_from(sorted(ELEMENT_BYTES)),
    st.lists(st.binary(min_size=8, max_size=64).map(lambda data: data[: len(data) // 8 * 8]), min_size=1, max_size=6),
)
def test_lossless_is_lossless(dtype: str, strips: list[bytes]) -> None:
    data = b"".join(strips)

    assert through(Codec.LOSSLESS, data, dtype, 0, [len(strip) for strip in strips]) == data


@pytest.mark.parametrize(("dtype", "ratio"), [("bfloat16", 1.35), ("float16", 1.1), ("float32", 1.1)])
def test_lossless_is_smaller_for_values_of_like_size(dtype: str, ratio: float) -> None:
    data = to_bytes(np.random.default_rng(0).standard_normal(1 << 16), dtype)

    payload = b"".join(encode(Codec.LOSSLESS, [memoryview(data)], dtype, 0))

    assert len(data) / len(payload) > ratio


@pytest.mark.parametrize("codec", LOSSY)
def test_lossy_halves_a_bfloat16_pool(codec: Codec) -> None:
    data = to_bytes(np.ones(1 << 14), "bfloat16")

    assert len(data) / len(b"".join(encode(codec, [memoryview(data)], "bfloat16", 2048))) > 1.98


@pytest.mark.parametrize("codec", Codec)
def test_strips_arrive_each_in_its_place(codec: Codec) -> None:
    sizes = [256, 64, 128, 64]
    values = np.repeat(np.arange(1, 5.0), [size // 2 for size in sizes])

    arrived = from_bytes(through(codec, to_bytes(values, "bfloat16"), "bfloat16", 64, sizes), "bfloat16")

    assert np.allclose(arrived, values, rtol=2.0**-8)


@pytest.mark.parametrize("codec", LOSSY)
def test_part_of_a_block_gets_smaller_blocks(codec: Codec) -> None:
    values = np.concatenate([np.full(16, 1000.0), np.full(48, 0.001)])  # the first strip is half a block
    sizes = [32, 96]

    arrived = from_bytes(through(codec, to_bytes(values, "bfloat16"), "bfloat16", 64, sizes), "bfloat16")

    assert np.allclose(arrived, values, rtol=2.0**-7)


@pytest.mark.parametrize("codec", LOSSY)
def test_blocks_too_small_for_a_scale_cannot_be_encoded(codec: Codec) -> None:
    assert can_encode(codec, "bfloat16", 64, [64, 32])
    assert not can_encode(codec, "bfloat16", 64, [64, 16])
    assert not can_encode(codec, "float8_e4m3fn", 64, [64])
    assert not can_encode(codec, "bfloat16", 64, [])


def test_lossless_needs_whole_elements_and_raw_nothing() -> None:
    assert can_encode(Codec.LOSSLESS, "bfloat16", 64, [6, 8])
    assert not can_encode(Codec.LOSSLESS, "bfloat16", 64, [3])
    assert not can_encode(Codec.LOSSLESS, "int3", 64, [8])
    assert can_encode(Codec.RAW, "int3", 64, [3])


def test_more_than_one_slice_of_work() -> None:
    data = to_bytes(np.random.default_rng(0).standard_normal(1 << 20), "bfloat16")

    arrived = from_bytes(through(Codec.INT8, data, "bfloat16", 2048), "bfloat16")

    sent = from_bytes(data, "bfloat16").reshape(-1, 1024)
    assert (np.abs(sent - arrived.reshape(sent.shape)) <= bound(Codec.INT8, sent, sent, "bfloat16")).all()


def test_threads_do_not_disturb_each_other() -> None:
    data = [to_bytes(np.random.default_rng(seed).standard_normal(1 << 16), "bfloat16") for seed in range(4)]
    alone = [through(codec, d, "bfloat16", 2048) for d in data for codec in Codec]
    together: list[bytearray | None] = [None] * len(alone)

    def run(index: int) -> None:
        together[index] = through(Codec(index % len(Codec)), data[index // len(Codec)], "bfloat16", 2048)

    threads = [threading.Thread(target=run, args=(index,)) for index in range(len(alone))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()

    assert together == alone


# ---- what encode cannot have made ----


def a_payload(codec: Codec) -> bytes:
    data = to_bytes(np.random.default_rng(0).standard_normal(64), "bfloat16")
    return b"".join(encode(codec, [memoryview(data)], "bfloat16", 64))


def refused(codec: Codec, payload: bytes, dtype: str = "bfloat16", size: int = 128) -> None:
    with pytest.raises(ProtocolViolation):
        decode(codec, memoryview(payload), [memoryview(bytearray(size))], dtype)


@pytest.mark.parametrize("codec", Codec)
def test_payload_of_another_size_is_refused(codec: Codec) -> None:
    payload = a_payload(codec)

    for changed in (payload[:-1], payload + b"\0", payload[:3], b""):
        refused(codec, changed)
    refused(codec, payload, size=64)
    refused(codec, payload, size=256)


@pytest.mark.parametrize("codec", [c for c in Codec if c is not Codec.RAW])
@settings(deadline=None, max_examples=200)
@given(st.data())
def test_garbage_decodes_or_is_refused_and_nothing_else(codec: Codec, data: st.DataObject) -> None:
    payload = bytearray(a_payload(codec))
    for at in data.draw(st.lists(st.integers(0, len(payload) - 1), max_size=8)):
        payload[at] = data.draw(st.integers(0, 255))
    guarded = bytearray(b"\x55" * 192)

    with suppress(ProtocolViolation):
        decode(codec, memoryview(payload), [memoryview(guarded)[32:160]], "bfloat16")

    assert guarded[:32] == guarded[160:] == b"\x55" * 32


@pytest.mark.parametrize("codec", LOSSY)
@pytest.mark.parametrize("block_bytes", [0, 2, 30, 33, 256, 2**32 - 1])
def test_impossible_block_size_is_refused(codec: Codec, block_bytes: int) -> None:
    refused(codec, struct.pack("<I", block_bytes) + a_payload(codec)[4:])


@pytest.mark.parametrize("codec", LOSSY)
@pytest.mark.parametrize("scale", [-1.0, np.inf, 1e-45, 3.4e38])
def test_impossible_scale_is_refused(codec: Codec, scale: float) -> None:
    payload = a_payload(codec)

    refused(codec, payload[:4] + struct.pack("<f", scale) + payload[8:])


@pytest.mark.parametrize(("codec", "code"), [(Codec.INT8, 0x80), (Codec.FP8, 0x7F), (Codec.FP8, 0xFF)])
def test_impossible_code_is_refused(codec: Codec, code: int) -> None:
    refused(codec, a_payload(codec)[:-1] + bytes([code]))


@pytest.mark.parametrize("codec", LOSSY)
def test_lossy_payload_for_a_pool_that_has_none_is_refused(codec: Codec) -> None:
    refused(codec, a_payload(codec), dtype="float8_e4m3fn")
    refused(codec, a_payload(codec), dtype="int3")


def plane(frame: bytes, plane_bytes: int = 64) -> bytes:
    return struct.pack("<II", len(frame), plane_bytes) + frame + bytes(plane_bytes)


@pytest.mark.parametrize(
    "frame",
    [
        pytest.param(zstandard.compress(bytes(1 << 24)), id="a bomb"),
        pytest.param(zstandard.compress(bytes(63)), id="too little"),
        pytest.param(zstandard.ZstdCompressor(write_content_size=False).compress(bytes(64)), id="no size"),
        pytest.param(zstandard.compress(bytes(64)) + b"x", id="bytes left over"),
        pytest.param(zstandard.compress(bytes(64))[:-1], id="cut short"),
        pytest.param(b"no frame at all", id="no frame"),
        pytest.param(b"", id="nothing"),
    ],
)
def test_plane_that_is_not_one_frame_of_its_size_is_refused(frame: bytes) -> None:
    assert len(frame) != 64
    refused(Codec.LOSSLESS, plane(frame))


def test_plane_larger_than_the_views_is_refused() -> None:
    refused(Codec.LOSSLESS, struct.pack("<II", 65, 63) + bytes(128))


def test_frame_whose_content_is_not_what_it_says_is_refused() -> None:
    frame = bytearray(zstandard.compress(bytes(64)))
    frame[5] = 65  # the content size of a single-segment frame

    refused(Codec.LOSSLESS, plane(bytes(frame)))
    refused(Codec.LOSSLESS, plane(bytes(frame), 65), size=130)


# ---- a real pool ----


@pytest.mark.parametrize("codec", Codec)
@pytest.mark.parametrize("dtype", DTYPES)
def test_each_head_of_a_pool_has_a_scale_of_its_own(codec: Codec, dtype: str) -> None:
    layer = LayerCache(layer=0, num_kv_heads=3, key_dim=8, value_dim=4, dtype=dtype)
    layout = CacheLayout((layer, replace(layer, layer=1)), page_size=8)
    source, target = (PagePool(layout, num_pages=6) for _ in range(2))
    size = torch.tensor([1e-3, 1.0, 1e3])[:, None]  # by head: a shared scale would wipe the small ones out
    for index in range(layout.num_layers):
        for half in (source.keys(index), source.values(index)):  # [pages, tokens, heads, dim]
            half.copy_(torch.randn(half.shape, generator=torch.Generator().manual_seed(index)) * size)
    page_bytes = layout.page_bytes(0)
    strips = (Strip(0, 3 * page_bytes, 2 * page_bytes), Strip(4 * page_bytes, 0, page_bytes))
    write = Write(SessionId("a"), bytes(TOKEN_BYTES), 0, 2, strips, codec=codec)
    spans = [Span(strip.dst, strip.num_bytes) for strip in strips]
    pages = region(source).geometry.layers[0]

    with region(source).outgoing(write) as views:
        payload = b"".join(encode(codec, views, pages.dtype, pages.block_bytes))
    with region(target).incoming(write.layers, spans) as views:
        decode(codec, memoryview(payload), views, pages.dtype)

    rounding = ROUNDING[dtype][0]
    share = {Codec.RAW: 0.0, Codec.LOSSLESS: 0.0, Codec.INT8: 1 / 254 + rounding + 1e-6, Codec.FP8: 1 / 16 + rounding}
    for index in range(layout.num_layers):
        halves = ((source.keys(index), target.keys(index)), (source.values(index), target.values(index)))
        for sent, arrived in halves:
            for src, dst in ((0, 3), (1, 4), (4, 0)):
                error = (sent[src].double() - arrived[dst].double()).abs().amax(dim=(0, 2))  # by head
                assert (error <= share[codec] * sent[src].double().abs().amax(dim=(0, 2))).all()


def region(pool: PagePool) -> Region:
    layout = pool.layout
    layers = range(layout.num_layers)
    pages = (LayerPages(layout.page_bytes(i), layout.layers[i].dtype, layout.block_bytes(i)) for i in layers)
    return Region(PageGeometry(tuple(pages), pool.num_pages), tuple(pool.layer_bytes(i) for i in layers))
