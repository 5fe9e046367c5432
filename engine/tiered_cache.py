"""How does an engine come by lower tiers of its prefix cache, and when are copies ordered? Books and mover, joined.

``advance`` is called between two steps, with the engine's books locked: what the mover has done is booked, and the next
copies are ordered. It waits for nothing. What a step's plan has ordered meanwhile is sent by ``send``.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable
from pathlib import Path

from core.cache_tiers import ReloadOutcome, Tier, TierState
from core.clock import Clock
from core.compute import ComputeProfile, StepSample
from core.errors import InvalidConfig
from core.fingerprint import CacheFingerprint
from core.prefix_hash import PageHash
from engine.cache_tiers import CacheTiers
from engine.config import EngineConfig
from engine.disk_pages import DiskPages
from engine.host_pages import HostPages
from engine.page_allocator import PageAllocator
from engine.page_mover import PageMover
from engine.page_pool import PagePool
from engine.page_tiers import PageTiers
from engine.reload_costs import ReloadCosts
from engine.scheduler import Scheduler

logger = logging.getLogger(__name__)

ASSUMED_DISK_BYTES_PER_S = 1e9  # until files have been read: a test now would measure the kernel's memory
_ORDER_BYTES = 64 << 20  # of one order down, about: a load waits for the end of one


class TieredCache:
    """The lower tiers of one engine; made by ``open_cache``."""

    def __init__(self, books: CacheTiers, mover: PageMover, costs: ReloadCosts) -> None:
        self.books = books
        self.mover = mover
        self._costs = costs

    def has_work(self, num_growing: int) -> bool:
        """Would ``advance`` do something?"""
        return self.mover.has_done or self.books.num_to_save(num_growing) > 0

    def advance(self, scheduler: Scheduler) -> None:
        """Book what is done, and order what is next."""
        if self.mover.has_done:
            self.books.settle(self.mover.take_done())
            scheduler.pages_moved()
        self.books.copy_down(scheduler.num_growing)
        self.send()

    def send(self) -> None:
        """Give the mover what was ordered."""
        orders = self.books.take_orders()
        if orders:
            self.mover.submit(orders)

    def step(self, sample: StepSample) -> None:
        """A step was computed: that is what loading is compared with."""
        self._costs.step(sample)

    def lower_changes(self, removed: Iterable[PageHash]) -> tuple[dict[Tier, list[PageHash]], list[PageHash]]:
        """``CacheTiers.take_lower_changes``."""
        return self.books.take_lower_changes(removed)

    @property
    def states(self) -> tuple[TierState, ...]:
        return self.books.states()

    @property
    def outcomes(self) -> dict[ReloadOutcome, int]:
        return self.books.outcomes

    def close(self) -> None:
        """End the mover's threads; what is on disk stays."""
        self.mover.close()


def open_cache(
    config: EngineConfig, pool: PagePool, fingerprint: CacheFingerprint, profile: ComputeProfile, clock: Clock
) -> tuple[PageAllocator, TieredCache | None]:
    """The allocator of a pool, and its lower tiers; None: none is configured. Raises ``InvalidConfig``."""
    layout = pool.layout
    page_bytes = layout.bytes_per_page
    if not config.host_cache_bytes:
        return PageAllocator(pool.num_pages, layout.page_size, config.prefix_cache), None
    num_slots = config.host_cache_bytes // page_bytes
    if not num_slots:
        raise InvalidConfig("engine.host_cache_bytes", f"must hold at least one page, {page_bytes} bytes")
    disk: DiskPages | None = None
    num_files = 0
    if config.disk_cache_bytes:
        disk = DiskPages(Path(config.disk_cache_dir).expanduser(), fingerprint, page_bytes)
        num_files = config.disk_cache_bytes // disk.file_bytes
        if not num_files:
            raise InvalidConfig(
                "engine.disk_cache_bytes", f"must hold at least one page's file, {disk.file_bytes} bytes"
            )
    host = HostPages(pool, num_slots)
    batch = max(1, _ORDER_BYTES // page_bytes)
    tiers = PageTiers(num_slots, num_files, device_pages=pool.num_pages, batch=batch)
    if disk is not None:
        names, num_foreign = disk.scan(num_files)
        tiers.found_files(names, num_foreign)
        logger.info("disk cache: %d pages of earlier prefixes found, %d foreign files deleted", len(names), num_foreign)
    allocator = PageAllocator(pool.num_pages, layout.page_size, config.prefix_cache, below=tiers)
    measured = {Tier.HOST: host.measure(min(batch, num_slots, pool.num_pages))}
    if disk is not None:
        measured[Tier.DISK] = ASSUMED_DISK_BYTES_PER_S
    logger.info("host cache: %d pages, loaded at %.1f GB/s", num_slots, measured[Tier.HOST] / 1e9)
    costs = ReloadCosts(clock, profile, pool.device.type, measured)
    books = CacheTiers(allocator, tiers, costs, page_bytes, clock)
    return allocator, TieredCache(books, PageMover(host, disk, clock), costs)
