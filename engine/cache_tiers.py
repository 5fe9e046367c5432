"""How do prefix pages leave the device before they are evicted, and come back before their prompt is computed?

The life of a page that is not used for long:

    cached on the device ──hold, Save, put back──> also in host memory ──Spill──> also on disk
    evicted on the device; evicted in host memory; evicted on disk: gone

The life of a request whose prefix goes on in a lower tier:

    1  begin()     its turn has come, there is room for it, and loading is predicted to be faster than computing
                   (reload_choice.py): it leaves the queue, and pages for what is loaded are taken
    2  settle()    the copies are made: the pages are the prefix cache's, and it is the first in the queue again
    3              it starts as any other, and finds them

Who waits for pages that another request is loading waits for that load. A request begins one load of its own each time
that it waits for its turn, so whatever the loads bring, it starts. One that is aborted meanwhile is forgotten; its load
goes on and ends in the prefix cache, since a copy cannot be called back.

Torch-free, and called with the engine's books locked. Owns who waits for which load, and which pages are held or
referenced for copies; states of pages are PageAllocator's and PageTiers'. Invariant: every page that is taken here goes
back when its copy is done, once.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Iterable
from collections.abc import Sequence as AbstractSequence
from dataclasses import dataclass, field

from core.cache_tiers import LOWER_TIERS, ReloadOutcome, ReloadReport, Tier, TierState, joined_reloads
from core.clock import Clock
from core.prefix_hash import PageHash
from core.request_log import about
from engine.page_allocator import PageAllocator
from engine.page_tiers import Done, Load, Order, PageTiers, Save, Spill
from engine.reload_choice import ReloadChoice, ReloadView, choose_reload
from engine.reload_costs import ReloadCosts
from engine.sequence import Sequence

logger = logging.getLogger(__name__)

_SHARE_HELD = 8  # one page of the device in so many is held for copies down at most


@dataclass(slots=True)
class _Reload:
    """A load and who waits for it."""

    load: Load
    choice: ReloadChoice
    page_ids: list[int]  # one reference each: those that were known before, then the load's
    began_at: float
    sequences: list[Sequence] = field(default_factory=list)  # the first one began it; they may be aborted


class CacheTiers:
    """Moves pages of one engine between its tiers, in orders to a mover (page_mover.py)."""

    def __init__(
        self, allocator: PageAllocator, tiers: PageTiers, costs: ReloadCosts, page_bytes: int, clock: Clock
    ) -> None:
        self._allocator = allocator
        self._tiers = tiers
        self._costs = costs
        self._page_bytes = page_bytes
        self._clock = clock
        self._most_held = max(1, allocator.num_pages // _SHARE_HELD)
        self._reloads: dict[int, _Reload] = {}  # number of its load |-> it
        self._waiting: dict[int, tuple[_Reload, Sequence]] = {}  # id of a sequence |-> the reload that it waits for
        self._back: list[Sequence] = []  # whose load has ended
        self._num_saving = 0  # pages of the device that are held
        self._num_referenced = 0  # by reloads
        self._queued_bytes: Counter[Tier] = Counter()
        self._outcomes: Counter[ReloadOutcome] = Counter()
        self._loaded_tokens: Counter[Tier] = Counter()

    # ---- the scheduler's ----

    @property
    def num_loading(self) -> int:
        """Sequences that wait for a load: they are in no queue."""
        return len(self._waiting)

    @property
    def num_held(self) -> int:
        """Pages that are held or referenced for copies; one that is shared counts as often."""
        return self._num_saving + self._num_referenced

    def num_reachable(self, page_hashes: AbstractSequence[PageHash], num_known: int) -> int:
        """Pages of a prefix that are in lower tiers behind the ``num_known`` on the device."""
        return len(self._tiers.reachable(page_hashes[num_known:]))

    def begin(self, sequence: Sequence, page_hashes: AbstractSequence[PageHash], spare: int) -> bool:
        """Must the head of the queue wait for a load? If so it is kept here until ``take_back``.

        ``page_hashes``: of the pages that it could be given, ``spare``: pages that must be left to others.
        """
        num_known = self._allocator.num_known(page_hashes)
        if num_known == len(page_hashes):
            return False
        running = self._tiers.loading(page_hashes[num_known])
        if running is not None:
            self._wait_for(self._reloads[running], sequence)
            return True
        if sequence.reload_tried:
            return False
        num_pages = -(-sequence.num_tokens // self._allocator.page_size)
        if num_pages - num_known + spare > self._allocator.num_free:
            return False  # it cannot start yet, so nothing is decided
        below = self._tiers.reachable(page_hashes[num_known:])
        if not below:
            return False
        sequence.reload_tried = True
        choice = self._choose(sequence, num_known, below)
        if not choice.num_pages:
            self._note(sequence, ReloadReport(ReloadOutcome.COMPUTED, reason=choice.reason))
            return False
        return self._begin(sequence, page_hashes[: num_known + choice.num_pages], num_known, choice)

    def forget(self, sequence: Sequence) -> bool:
        """A sequence is aborted; False if it waits for no load."""
        known = self._waiting.pop(id(sequence), None)
        if known is None:
            return False
        reload, _ = known
        reload.sequences.remove(sequence)
        return True

    def take_back(self) -> list[Sequence]:
        """Sequences whose load has ended since this was called last, in the order in which they were to start."""
        back, self._back = self._back, []
        return back

    # ---- the engine's ----

    def num_to_save(self, num_growing: int) -> int:
        """Pages that ``copy_down`` would save now. ``num_growing``: free pages that it must leave."""
        allocator = self._allocator
        missing = self._tiers.ahead_of_device - self._num_saving - (allocator.num_free - allocator.num_unsaved)
        spare = (allocator.num_free - num_growing) // 2
        num_more = self._most_held - self._num_saving
        return min(missing, allocator.num_unsaved, self._tiers.room_for_saves(), num_more, spare)

    def copy_down(self, num_growing: int) -> None:
        """Order the next copies of what would be evicted soon."""
        num_pages = self.num_to_save(num_growing)
        if num_pages > 0:
            pages = self._allocator.hold_unsaved(num_pages)
            self._num_saving += len(pages)
            self._tiers.save(pages)
        self._tiers.plan_spills()
        self._tell_allocator()

    def take_orders(self) -> list[Order]:
        """For the mover."""
        return self._tiers.take_orders()

    def settle(self, done: Iterable[Done]) -> None:
        """The mover has carried these out."""
        for one in done:
            order = one.order
            if isinstance(order, Save):
                self._tiers.saved(order, ok=one.num_good == len(order.slots))
                self._allocator.put_back(order.page_ids)
                self._num_saving -= len(order.page_ids)
            elif isinstance(order, Spill):
                self._tiers.spilled(order, one.written)
            else:
                self._loaded(order, one)
        self._tell_allocator()

    def take_lower_changes(self, removed: Iterable[PageHash]) -> tuple[dict[Tier, list[PageHash]], list[PageHash]]:
        """Where pages are that are not on the device, of those that have left it (``removed``) and those whose lower
        tiers have changed since this was called last; and those that are nowhere any more."""
        lower: dict[Tier, list[PageHash]] = {}
        gone: list[PageHash] = []
        for name in dict.fromkeys([*removed, *self._tiers.take_noted()]):
            if self._allocator.knows(name):
                continue  # the device's is the best
            tier = self._tiers.tier_of(name)
            if tier is None:
                gone.append(name)
            else:
                lower.setdefault(tier, []).append(name)
        return lower, gone

    @property
    def outcomes(self) -> dict[ReloadOutcome, int]:
        """Reloads so far."""
        return dict(self._outcomes)

    def states(self) -> tuple[TierState, ...]:
        """Each lower tier, as it is told."""
        totals = {Tier.HOST: self._tiers.num_slots, Tier.DISK: self._tiers.num_files}
        return tuple(self._state(tier, totals[tier]) for tier in LOWER_TIERS if totals[tier])

    def check_integrity(self) -> None:
        """Raise ``AssertionError`` if the lower tiers do not add up; for idle moments and tests."""
        self._tiers.check_integrity()
        if self._tiers.idle:
            assert not self.num_held, "no copy runs, yet pages are held for one"
            assert not self._waiting, "no copy runs, yet a sequence waits for one"

    # ---- inside ----

    def _choose(self, sequence: Sequence, num_known: int, below: AbstractSequence[Tier]) -> ReloadChoice:
        page_size = self._allocator.page_size
        return choose_reload(
            ReloadView(
                sequence.num_tokens,
                num_known * page_size,
                below,
                page_size,
                self._page_bytes,
                self._costs.speeds,
                self._costs.prefill,
                self._queued_bytes,
            )
        )

    def _begin(
        self,
        sequence: Sequence,
        page_hashes: AbstractSequence[PageHash],
        num_known: int,
        choice: ReloadChoice,
    ) -> bool:
        known = self._allocator.match_prefix(page_hashes[:num_known])
        fresh = self._allocator.allocate(len(page_hashes) - num_known)
        load = None if fresh is None else self._tiers.load(page_hashes[num_known:], fresh)
        self._tell_allocator()
        if load is None or fresh is None:
            self._allocator.release(known + (fresh or []))
            self._note(sequence, ReloadReport(ReloadOutcome.NO_ROOM, reason=choice.reason))
            return False
        self._allocator.release(fresh[len(load.page_ids) :])
        pages = [*known, *load.page_ids]
        self._num_referenced += len(pages)
        reload = self._reloads[load.number] = _Reload(load, choice, pages, self._clock.now())
        self._wait_for(reload, sequence)
        for tier, num_bytes in self._bytes_of(load).items():
            self._queued_bytes[tier] += num_bytes
        return True

    def _wait_for(self, reload: _Reload, sequence: Sequence) -> None:
        reload.sequences.append(sequence)
        self._waiting[id(sequence)] = reload, sequence

    def _loaded(self, load: Load, done: Done) -> None:
        reload = self._reloads.pop(load.number)
        from_host, from_disk = self._tiers.loaded(load, done.num_good, done.damaged)
        for page, name in zip(load.page_ids[: done.num_good], load.page_hashes, strict=False):
            self._allocator.register(page, name)
        self._allocator.release(reload.page_ids)
        self._num_referenced -= len(reload.page_ids)
        for tier, num_bytes in self._bytes_of(load).items():
            self._queued_bytes[tier] -= num_bytes
        self._costs.load(Tier.HOST, done.num_good * self._page_bytes, done.copy_s)
        self._costs.load(Tier.DISK, done.num_read * self._page_bytes, done.read_s)
        page_size, seconds = self._allocator.page_size, self._clock.now() - reload.began_at
        self._loaded_tokens.update({Tier.HOST: from_host * page_size, Tier.DISK: from_disk * page_size})
        outcome = ReloadOutcome.LOADED if done.num_good == len(load.slots) else ReloadOutcome.PARTLY
        outcome = outcome if done.num_good or done.damaged else ReloadOutcome.FAILED
        for sequence in reload.sequences:
            report = ReloadReport(outcome, from_host * page_size, from_disk * page_size, seconds, reload.choice.reason)
            self._note(sequence, report)
            del self._waiting[id(sequence)]
            self._back.append(sequence)
            outcome = ReloadOutcome.SHARED

    def _note(self, sequence: Sequence, report: ReloadReport) -> None:
        self._outcomes[report.outcome] += 1
        sequence.reload = joined_reloads([sequence.reload, report] if sequence.reload is not None else [report])
        logger.info(
            "sequence %s: reload %s: %d tokens from host memory and %d from disk in %.4f s (%s)",
            sequence.sequence_id,
            report.outcome,
            report.host_tokens,
            report.disk_tokens,
            report.seconds,
            report.reason,
            extra=about(sequence.sequence_id),
        )

    def _bytes_of(self, load: Load) -> dict[Tier, int]:
        num_pages = {Tier.HOST: len(load.slots), Tier.DISK: len(load.from_disk)}
        return {tier: count * self._page_bytes for tier, count in num_pages.items() if count}

    def _tell_allocator(self) -> None:
        for name in self._tiers.take_gone():
            if name not in self._tiers:
                self._allocator.copy_is_gone(name)

    def _state(self, tier: Tier, total: int) -> TierState:
        speed, counts = self._costs.speeds[tier], self._tiers.counts(tier)
        return TierState(
            tier,
            total,
            self._tiers.num_pages[tier],
            speed.bytes_per_s,
            speed.t0_s,
            self._queued_bytes[tier],
            counts.stored,
            self._loaded_tokens[tier],
            counts.evicted,
            counts.damaged,
            counts.foreign,
        )
