"""A slot holds a page of every layer, and gives it back to another page bit for bit. Threads carry orders out once."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from core.clock import WallClock
from core.fingerprint import CacheFingerprint
from core.prefix_hash import PageHash
from engine.cache_layout import CacheLayout, LayerCache
from engine.disk_pages import DiskPages
from engine.host_pages import HostPages, _runs
from engine.page_mover import PageMover
from engine.page_pool import PagePool
from engine.page_tiers import Drop, Load, Save, Spill

NAMES = [PageHash(bytes([i]) * 16) for i in range(8)]


@pytest.fixture
def pool() -> PagePool:
    """Layers of different sizes, with something else in every page."""
    layers = (LayerCache(0, 2, 4, 6, "bfloat16"), LayerCache(2, 1, 3, 5, "float32"))
    pool = PagePool(CacheLayout(layers, 4), 8)
    for index in range(2):
        memory = pool.pages(index)
        memory.copy_(torch.arange(memory.numel()).view(memory.shape) % 251)
    return pool


def test_pages_come_back_as_they_were(pool: PagePool) -> None:
    host = HostPages(pool, 5)
    before = [pool.pages(index).clone() for index in range(2)]
    host.save((6, 1, 3), (0, 4, 2), host.mark())
    assert host.measure(3) > 0
    host.save((6, 1, 3), (0, 4, 2), host.mark())
    host.load((4, 0), (2, 7), host.mark())
    for index in range(2):
        after = pool.pages(index)
        assert torch.equal(after[2], before[index][1])
        assert torch.equal(after[7], before[index][6])
        assert torch.equal(after[:2], before[index][:2])
    assert host.page_bytes == pool.layout.bytes_per_page == host.slot(0).nbytes


def test_neighbours_are_copied_at_once() -> None:
    assert list(_runs([3])) == [(0, 3, 1)]
    assert list(_runs([1, 2, 3, 7, 9, 10])) == [(0, 1, 3), (3, 7, 1), (4, 9, 2)]


def test_orders_are_carried_out_and_come_back_once(pool: PagePool, tmp_path: Path) -> None:
    host = HostPages(pool, 6)
    disk = DiskPages(tmp_path, CacheFingerprint("m", "w", "float32", 4, "l"), host.page_bytes)
    mover = PageMover(host, disk, WallClock())
    page = pool.pages(0)[3].clone()
    save, spill = Save((3,), (1,), (NAMES[3],)), Spill((1,), (NAMES[3],))
    mover.submit([save])
    assert mover.wait_idle(10)
    mover.submit([spill])
    assert mover.wait_idle(10)
    host.slot(1)[:] = 0
    mover.submit([Load(0, (5, 6), (1, 2), (NAMES[3], NAMES[4]), frozenset({0, 1}))])
    assert mover.wait_idle(10)
    mover.submit([Drop((NAMES[3],))])
    assert mover.wait_idle(10)

    first, second, third = mover.take_done()

    assert (first.order, first.num_good) == (save, 1)
    assert (second.order, second.written) == (spill, (NAMES[3],))
    assert (third.num_good, third.damaged, third.num_read) == (1, (NAMES[4],), 2)
    assert torch.equal(pool.pages(0)[5], page)
    assert not torch.equal(pool.pages(0)[6], page)
    assert not mover.has_done
    mover.close()
    assert [path.name for path in tmp_path.rglob("*") if path.is_file()] == ["lock"]


def test_a_copy_that_raises_comes_back_with_nothing_good(pool: PagePool, monkeypatch: pytest.MonkeyPatch) -> None:
    host = HostPages(pool, 2)
    mover = PageMover(host, None, WallClock())

    def fail(*_: Any) -> None:
        raise RuntimeError("the device is gone")

    monkeypatch.setattr(host, "save", fail)
    mover.submit([Save((1,), (0,), (NAMES[1],))])
    assert mover.wait_idle(10)
    assert [done.num_good for done in mover.take_done()] == [0]
    mover.close()
