"""A self-test's pattern: what is written is what its digest says, page by page and layer by layer."""

from __future__ import annotations

import pytest

from kv_transfer.probe_pattern import DIGEST_BYTES, clear, digest_of, digest_there, write_pattern
from kv_transfer.transfer_plan import layout_of_pages
from kv_transfer.transport import LayerPages, PageGeometry, Region

PAGES = (5, 2, 3)


def pool(page_bytes: tuple[int, ...] = (64, 700_000), num_pages: int = 8) -> Region:
    geometry = PageGeometry(tuple(LayerPages(size) for size in page_bytes), num_pages)
    return Region(geometry, tuple(memoryview(bytearray(size * num_pages)) for size in page_bytes))


def copy(source: Region, target: Region, pages: dict[int, int]) -> None:
    for layer in range(source.geometry.num_layers):
        for src, dst in pages.items():
            target.pages(layer, dst, 1)[:] = source.pages(layer, src, 1)


def test_the_digest_follows_the_pages_to_other_places() -> None:
    source, target = pool(), pool()

    write_pattern(source, PAGES)
    written = digest_of(source, PAGES)
    copy(source, target, dict(zip(PAGES, (0, 7, 1), strict=True)))

    assert len(written) == DIGEST_BYTES
    layout = layout_of_pages(source.geometry)
    assert digest_there(source, layout, PAGES, layout, len(PAGES), len(PAGES)) == written
    assert digest_of(target, (0, 7, 1)) == written
    assert digest_of(target, (7, 0, 1)) != written, "the order counts"


@pytest.mark.parametrize("layer", [0, 1])
@pytest.mark.parametrize("page", PAGES)
def test_one_changed_bit_changes_the_digest(layer: int, page: int) -> None:
    region = pool()
    write_pattern(region, PAGES)
    written = digest_of(region, PAGES)

    region.pages(layer, page, 1)[-1] ^= 1

    assert digest_of(region, PAGES) != written


def test_cleared_pages_are_zeros_and_no_other_page_is() -> None:
    region = pool()
    write_pattern(region, range(8))

    clear(region, PAGES)

    for layer in range(2):
        assert [page for page in range(8) if not any(region.pages(layer, page, 1))] == sorted(PAGES)


def test_only_the_named_pages_are_written_and_each_time_differently() -> None:
    region = pool()

    write_pattern(region, PAGES)
    first = digest_of(region, PAGES)
    write_pattern(region, PAGES)

    assert digest_of(region, PAGES) != first
    for layer in range(2):
        for page in set(range(8)) - set(PAGES):
            assert not any(region.pages(layer, page, 1)), f"page {page} of layer {layer} is somebody else's"
        assert all(any(region.pages(layer, page, 1)) for page in PAGES)
