"""Which bytes does the KV benchmark move? The cache of a prompt of an 8B model with grouped-query attention.

32 layers, 8 K/V heads of 128 dimensions, bfloat16, 16 tokens a page: 64 KiB per page and layer, 128 KiB per token. The
page tables are what an allocator in use gives: no page lies behind the one before it, at either end.

Every page of every layer begins with its own number, so a page that is missing or in the wrong place is found by
comparing; the rest are normal values, so that a codec sees what it would see.
"""

from __future__ import annotations

import random
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from core.fingerprint import CacheFingerprint
from kv_transfer.transport import LayerPages, PageGeometry

PAGE_TOKENS = 16
NUM_LAYERS = 32
KV_HEADS = 8
HEAD_DIM = 128
BLOCK_BYTES = PAGE_TOKENS * HEAD_DIM * 2  # one head's keys, or values, of a page
PAGE_BYTES = 2 * KV_HEADS * BLOCK_BYTES

FINGERPRINT = CacheFingerprint("8b-gqa", "random", "bfloat16", PAGE_TOKENS, f"{NUM_LAYERS}x{KV_HEADS}x{HEAD_DIM}")

_STAMP_DIGITS = 4  # base 256, one bfloat16 each: it holds integers of eight bits exactly
_STAMP_SCALE = 64  # so that a stamp is no larger than what surrounds it
_NOISE_PAGES = 256
LOSSY_ERROR = 1 / 16  # of a block's largest value: what an 8-bit float with three bits of mantissa may be off

Words = npt.NDArray[np.uint16]
Floats = npt.NDArray[np.float32]


@dataclass(frozen=True)
class Prompt:
    """A prompt whose K/V is moved."""

    num_tokens: int

    @property
    def num_pages(self) -> int:
        return -(-self.num_tokens // PAGE_TOKENS)

    @property
    def num_bytes(self) -> int:
        return self.num_pages * PAGE_BYTES * NUM_LAYERS


def geometry(num_pages: int) -> PageGeometry:
    """A pool of ``num_pages`` pages."""
    return PageGeometry((LayerPages(PAGE_BYTES, "bfloat16", BLOCK_BYTES),) * NUM_LAYERS, num_pages)


def pool_bytes(num_pages: int) -> int:
    return num_pages * PAGE_BYTES * NUM_LAYERS


def layer_views(memory: memoryview, num_pages: int) -> tuple[memoryview, ...]:
    """The layers of a pool that lie one behind the other in ``memory``."""
    size = num_pages * PAGE_BYTES
    return tuple(memory[layer * size : (layer + 1) * size] for layer in range(NUM_LAYERS))


def scrambled(num_pages: int, pool_pages: int, seed: int | str) -> tuple[int, ...]:
    """``num_pages`` different pages of the pool, in no order; equal seeds give equal tables."""
    return tuple(random.Random(seed).sample(range(pool_pages), num_pages))


def fill(memory: memoryview, num_pages: int, seed: int = 0) -> None:
    """Write a pool's content."""
    noise = np.random.default_rng(seed).standard_normal((_NOISE_PAGES, PAGE_BYTES // 2), dtype=np.float32)
    words = to_bfloat16(noise)
    for layer, view in enumerate(layer_views(memory, num_pages)):
        pool = np.frombuffer(view, dtype=np.uint16).reshape(num_pages, -1)
        for first in range(0, num_pages, _NOISE_PAGES):
            part = pool[first : first + _NOISE_PAGES]
            part[:] = words[: len(part)]
        pool[:, :_STAMP_DIGITS] = _stamps(layer, num_pages)


def count_wrong_pages(
    source: memoryview,
    target: memoryview,
    pool_pages: int,
    src_pages: tuple[int, ...],
    dst_pages: tuple[int, ...],
    lossy: bool,
    step: int = 1,
) -> int:
    """Pages (over all layers) of the target that are not those of the source; every ``step``-th page is looked at.

    ``lossy``: values may be off by ``LOSSY_ERROR`` of their block's largest.
    """
    src, dst = np.array(src_pages[::step]), np.array(dst_pages[::step])
    wrong = 0
    pairs = zip(layer_views(source, pool_pages), layer_views(target, pool_pages), strict=True)
    for ours, theirs in pairs:
        sent = np.frombuffer(ours, dtype=np.uint16).reshape(pool_pages, -1)[src]
        came = np.frombuffer(theirs, dtype=np.uint16).reshape(pool_pages, -1)[dst]
        wrong += int((~_alike(sent, came)).sum()) if lossy else int((sent != came).any(axis=1).sum())
    return wrong


def to_bfloat16(values: Floats) -> Words:
    """The upper half of each float32, rounded toward zero."""
    return (values.view(np.uint32) >> 16).astype(np.uint16)


def from_bfloat16(words: Words) -> Floats:
    return (words.astype(np.uint32) << 16).view(np.float32)


def _alike(sent: Words, came: Words) -> npt.NDArray[np.bool_]:
    """Per page: is no value further off than its block allows?"""
    blocks = (len(sent), -1, BLOCK_BYTES // 2)
    before, after = from_bfloat16(sent).reshape(blocks), from_bfloat16(came).reshape(blocks)
    allowed = np.abs(before).max(axis=2) * LOSSY_ERROR
    answer: npt.NDArray[np.bool_] = (np.abs(before - after).max(axis=2) <= allowed).all(axis=1)
    return answer


def _stamps(layer: int, num_pages: int) -> Words:
    """[num_pages, digits] bfloat16: the number of each page of ``layer`` among all of the pool's."""
    numbers = np.arange(num_pages) + layer * num_pages
    digits = np.stack([numbers >> (8 * place) & 255 for place in range(_STAMP_DIGITS)], axis=1)
    return to_bfloat16((digits / _STAMP_SCALE).astype(np.float32))
