"""The benchmark's pages are of the stated size, tell themselves apart, and a comparison misses nothing."""

from __future__ import annotations

import numpy as np

from benchmarks.kv_prompt import (
    BLOCK_BYTES,
    NUM_LAYERS,
    PAGE_BYTES,
    Prompt,
    count_wrong_pages,
    fill,
    from_bfloat16,
    geometry,
    layer_views,
    pool_bytes,
    scrambled,
    to_bfloat16,
)

POOL_PAGES = 6
SRC, DST = (4, 0, 3), (1, 5, 2)


def moved() -> tuple[memoryview, memoryview]:
    """A filled pool and one that holds its pages ``SRC`` at ``DST``."""
    source, target = (memoryview(bytearray(pool_bytes(POOL_PAGES))) for _ in range(2))
    fill(source, POOL_PAGES)
    for ours, theirs in zip(layer_views(source, POOL_PAGES), layer_views(target, POOL_PAGES), strict=True):
        for src, dst in zip(SRC, DST, strict=True):
            theirs[dst * PAGE_BYTES : (dst + 1) * PAGE_BYTES] = ours[src * PAGE_BYTES : (src + 1) * PAGE_BYTES]
    return source, target


def test_prompts_have_the_bytes_of_an_8b_model() -> None:
    assert PAGE_BYTES == 64 << 10
    assert Prompt(2_048).num_bytes == 256 << 20
    assert Prompt(32_768).num_bytes == 4 << 30
    assert Prompt(32_769).num_pages == 2_049
    assert geometry(7).bytes_per_page * 7 == pool_bytes(7)


def test_page_tables_are_scrambled_and_repeatable() -> None:
    table = scrambled(64, 128, "seed")

    assert len(set(table)) == 64
    assert set(table) <= set(range(128))
    assert list(table) != sorted(table)
    assert table == scrambled(64, 128, "seed")
    assert table != scrambled(64, 128, "other")


def test_every_page_of_every_layer_is_different() -> None:
    source, _ = moved()

    pages = {bytes(view[i * PAGE_BYTES :][:8]) for view in layer_views(source, POOL_PAGES) for i in range(POOL_PAGES)}

    assert len(pages) == NUM_LAYERS * POOL_PAGES


def test_pages_that_arrived_are_right() -> None:
    source, target = moved()

    assert count_wrong_pages(source, target, POOL_PAGES, SRC, DST, lossy=False) == 0
    assert count_wrong_pages(source, target, POOL_PAGES, SRC, DST, lossy=True) == 0


def test_a_flipped_bit_is_one_wrong_page() -> None:
    source, target = moved()
    target[7 * POOL_PAGES * PAGE_BYTES + DST[1] * PAGE_BYTES + 12_345] ^= 1

    assert count_wrong_pages(source, target, POOL_PAGES, SRC, DST, lossy=False) == 1


def test_pages_in_the_wrong_place_are_wrong_even_for_a_lossy_codec() -> None:
    source, target = moved()

    swapped = (DST[1], DST[0], DST[2])

    assert count_wrong_pages(source, target, POOL_PAGES, SRC, swapped, lossy=True) == 2 * NUM_LAYERS


def test_a_lossy_codec_may_be_off_by_its_share_of_the_largest_value_and_no_more() -> None:
    source, target = moved()
    block = np.frombuffer(target[DST[0] * PAGE_BYTES + BLOCK_BYTES :][:BLOCK_BYTES], dtype=np.uint16)
    exact = from_bfloat16(block)
    largest = np.abs(exact).max()

    block[:] = to_bfloat16(exact + np.float32(largest / 32))
    assert count_wrong_pages(source, target, POOL_PAGES, SRC, DST, lossy=True) == 0
    block[:] = to_bfloat16(exact + np.float32(largest / 8))
    assert count_wrong_pages(source, target, POOL_PAGES, SRC, DST, lossy=True) == 1
