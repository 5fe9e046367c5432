"""Who copies pages between the device, host memory and the disk? Two threads, beside the engine's.

    engine thread ──submit──> copier   loads, then saves     between slots and the device (host_pages.py)
                  └─────────> disk     reads, then the rest   between slots and files (disk_pages.py); a load with pages
                                                             on disk goes to the copier when they are read
    both ──> done ──> ``take_done`` on the engine's thread, which ``on_done`` has woken

What is ordered is done once and comes back once, in whatever order, also if it fails: a copy that raises is a ``Done``
with nothing good in it. Who ordered knows what may be read and written meanwhile (page_tiers.py); nothing is checked
here. Files are written and deleted in the order of the orders.
"""

from __future__ import annotations

import logging
import threading
from collections import deque
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, NamedTuple

from core.clock import Clock
from core.prefix_hash import PageHash
from engine.disk_pages import DamagedPage, DiskPages
from engine.host_pages import HostPages
from engine.page_tiers import Done, Drop, Load, Order, Save, Spill

if TYPE_CHECKING:
    import torch

logger = logging.getLogger(__name__)


class _Job(NamedTuple):
    order: Order
    after: torch.cuda.Event | None  # what the device had to do when it was ordered
    num_good: int = 0  # of a load whose pages are read: from the first on
    damaged: tuple[PageHash, ...] = ()
    num_read: int = 0
    read_s: float = 0.0


class PageMover:
    """Carries out orders. ``submit`` and ``take_done`` are the engine thread's; ``on_done`` may be set before the first
    order, is called by any thread and must be quick."""

    def __init__(self, host: HostPages, disk: DiskPages | None, clock: Clock) -> None:
        self.on_done: Callable[[], None] = lambda: None
        self._host = host
        self._disk = disk
        self._clock = clock
        self._condition = threading.Condition()
        self._urgent: tuple[deque[_Job], deque[_Job]] = deque(), deque()  # of copier and disk
        self._later: tuple[deque[_Job], deque[_Job]] = deque(), deque()
        self._done: deque[Done] = deque()
        self._num_open = 0  # orders that were submitted and are not done
        self._closing = False
        self._threads = [threading.Thread(target=self._copy_all, name="page-copier", daemon=True)]
        if disk is not None:
            self._threads.append(threading.Thread(target=self._file_all, name="page-files", daemon=True))
        for thread in self._threads:
            thread.start()

    @property
    def has_done(self) -> bool:
        """Is there something to be taken?"""
        return bool(self._done)

    def submit(self, orders: Iterable[Order]) -> None:
        """Carry these out, after what the calling thread has launched on the device by now."""
        after = self._host.mark()
        with self._condition:
            for order in orders:
                to_disk = isinstance(order, Spill | Drop) or (isinstance(order, Load) and bool(order.from_disk))
                queues = self._urgent if isinstance(order, Load) else self._later
                num_good = len(order.slots) if isinstance(order, Load) else 0
                queues[to_disk].append(_Job(order, after, num_good))
                self._num_open += 1
            self._condition.notify_all()

    def take_done(self) -> list[Done]:
        """What is done since the last call."""
        done: list[Done] = []
        while self._done:
            done.append(self._done.popleft())
        return done

    def wait_idle(self, timeout_s: float) -> bool:
        """Wait until every order is done; False if that took longer. For tests, benchmarks and the end."""
        with self._condition:
            return self._condition.wait_for(lambda: not self._num_open, timeout_s)

    def close(self) -> None:
        """End both threads after what they are at; what waits is dropped."""
        with self._condition:
            self._closing = True
            self._condition.notify_all()
        for thread in self._threads:
            thread.join()
        self._host.close()
        if self._disk is not None:
            self._disk.close()

    # ---- the copier ----

    def _copy_all(self) -> None:
        try:
            self._host.bind_thread()
        except Exception as error:  # nobody may wait for ever: every copy fails below
            logger.exception("pages cannot be copied: %s", error)
        while (job := self._next(0)) is not None:
            order = job.order
            assert isinstance(order, Load | Save), "the rest is the disk's"
            began_at = self._clock.now()
            num_good = job.num_good if isinstance(order, Load) else len(order.slots)
            try:
                if isinstance(order, Save):
                    self._host.save(order.page_ids, order.slots, job.after)
                elif num_good:
                    self._host.load(order.slots[:num_good], order.page_ids[:num_good], job.after)
            except Exception as error:  # whatever a driver raises: nobody may wait for ever
                logger.exception("pages were not copied: %s", error)
                num_good = 0
            copy_s = self._clock.now() - began_at
            self._tell(
                Done(
                    order,
                    num_good,
                    damaged=job.damaged,
                    num_read=job.num_read,
                    read_s=job.read_s,
                    copy_s=copy_s,
                )
            )

    # ---- the disk ----

    def _file_all(self) -> None:
        while (job := self._next(1)) is not None:
            if isinstance(job.order, Load):
                read = self._read(job, job.order)
                with self._condition:
                    self._urgent[0].append(read)
                    self._condition.notify_all()
            elif isinstance(job.order, Spill):
                self._tell(Done(job.order, written=tuple(self._write(job.order))))
            else:
                self._delete(job.order)
                self._tell(None)

    def _read(self, job: _Job, load: Load) -> _Job:
        """The job, with its files read as far as they are good."""
        assert self._disk is not None, "who has no disk orders nothing from there"
        num_good, num_read, damaged = len(load.slots), 0, []
        began_at = self._clock.now()
        for index in sorted(load.from_disk):
            try:
                num_read += 1
                self._disk.read(load.page_hashes[index], self._host.slot(load.slots[index]).data)
            except DamagedPage:
                damaged.append(load.page_hashes[index])
                num_good = index
                break
        seconds = self._clock.now() - began_at
        return job._replace(num_good=num_good, damaged=tuple(damaged), num_read=num_read, read_s=seconds)

    def _write(self, spill: Spill) -> list[PageHash]:
        """Those that are on disk now."""
        assert self._disk is not None, "who has no disk orders nothing there"
        written: list[PageHash] = []
        for name, slot in zip(spill.page_hashes, spill.slots, strict=True):
            try:
                self._disk.write(name, self._host.slot(slot).data)
            except OSError as error:
                logger.warning("disk cache: %d pages are not written: %s", len(spill.slots) - len(written), error)
                break
            written.append(name)
        return written

    def _delete(self, order: Order) -> None:
        assert self._disk is not None, "who has no disk orders nothing there"
        assert isinstance(order, Drop), "the rest is the copier's"
        for name in order.page_hashes:
            self._disk.delete(name)

    # ---- both ----

    def _next(self, queue: int) -> _Job | None:
        """The next job of a thread; None: it is time to end."""
        urgent, later = self._urgent[queue], self._later[queue]
        with self._condition:
            self._condition.wait_for(lambda: self._closing or urgent or later)
            if self._closing:
                return None
            return urgent.popleft() if urgent else later.popleft()

    def _tell(self, done: Done | None) -> None:
        if done is not None:
            self._done.append(done)
        with self._condition:
            self._num_open -= 1
            self._condition.notify_all()
        if done is not None:
            self.on_done()
