"""The books of the tiers: whatever is aborted, preempted, damaged or fails, every page is right and none is lost."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from core.cache_tiers import ReloadOutcome, ReloadReport, Tier
from core.clock import VirtualClock
from core.compute import ComputeProfile
from core.prefix_hash import PageHash, page_hashes
from core.request import SamplingParams, SequenceId, SequenceSpec
from engine.cache_tiers import CacheTiers
from engine.chunked_prefill import ChunkedPrefillScheduler
from engine.config import EngineConfig
from engine.page_allocator import PageAllocator
from engine.page_tiers import Done, Drop, Load, Order, PageTiers, Save, Spill
from engine.reload_choice import PrefillCost, TierSpeed
from engine.reload_costs import ReloadCosts
from engine.scheduler import Reservation
from engine.step_plan import SampledToken, StepPlan

PAGE_SIZE, MAX_LEN = 2, 40
FAST = {Tier.HOST: TierSpeed(0.0, 1e12), Tier.DISK: TierSpeed(0.0, 1e12)}
SLOW = {Tier.HOST: TierSpeed(10.0, 1.0), Tier.DISK: TierSpeed(10.0, 1.0)}


class FixedCosts(ReloadCosts):
    """Speeds that a test sets."""

    def __init__(self, speeds: dict[Tier, TierSpeed]) -> None:
        super().__init__(VirtualClock(), ComputeProfile(), "cpu", {Tier.HOST: 1.0, Tier.DISK: 1.0})
        self.fixed = speeds

    @property
    def prefill(self) -> PrefillCost:
        return PrefillCost(1.0, 1.0, 0.0, 8)

    @property
    def speeds(self) -> dict[Tier, TierSpeed]:
        return self.fixed


class World:
    """A scheduler with tiers, and the bytes: what a page, a slot and a file hold is the name of a prefix, or junk."""

    def __init__(
        self, num_pages: int = 12, num_slots: int = 6, num_files: int = 8, speeds: dict[Tier, TierSpeed] | None = None
    ) -> None:
        self.tiers = PageTiers(num_slots, num_files, device_pages=num_pages, batch=3)
        self.allocator = PageAllocator(num_pages, PAGE_SIZE, below=self.tiers)
        self.costs = FixedCosts(speeds or FAST)
        self.books = CacheTiers(self.allocator, self.tiers, self.costs, 100, VirtualClock())
        config = EngineConfig(page_size=PAGE_SIZE, max_batch_tokens=8, max_batch_size=4)
        self.scheduler = ChunkedPrefillScheduler(config, self.allocator, MAX_LEN, tiers=self.books)
        self.pages: dict[int, object] = {}
        self.slots: dict[int, object] = {}
        self.files: dict[PageHash, object] = {}
        self.orders: list[Order] = []
        self.reports: dict[SequenceId, ReloadReport | None] = {}
        self.seen: dict[PageHash, Tier] = {}  # as the gateway's index would have it
        self._num_junk = 0

    # ---- steps ----

    def add(self, name: str, tokens: Sequence[int], max_tokens: int = 2, *, hold_kv: bool = False) -> None:
        sampling = SamplingParams(max_tokens=max_tokens, temperature=0.0)
        self.scheduler.add(SequenceSpec(SequenceId(name), tuple(tokens), sampling, hold_kv=hold_kv), 0.0)

    def step(self, *, ahead: bool = False) -> bool:
        """One step of the engine (two, launched one behind the other, with ``ahead``); False: nothing to compute."""
        self.advance()
        plan = self.scheduler.plan_step(0.0)
        self.take_orders()
        if plan is None:
            return False
        self.compute(plan)
        following = self.scheduler.plan_ahead(plan, 0.0) if ahead else None
        self.take_orders()
        self.commit(plan)
        if following is not None:
            self.compute(following)
            self.commit(following)
        return True

    def advance(self) -> None:
        self.books.copy_down(self.scheduler.num_growing)
        self.take_orders()

    def compute(self, plan: StepPlan) -> None:
        tokens = {item.sequence_id: item.known_token_ids for item in plan.items}
        for started in plan.started:
            known = page_hashes(tokens[started.spec.sequence_id], PAGE_SIZE)
            num_cached = started.num_cached_tokens // PAGE_SIZE
            assert [self.pages.get(page) for page in started.page_ids[:num_cached]] == list(known[:num_cached])
        for item in plan.items:
            first, last = item.start // PAGE_SIZE, (item.start + len(item.token_ids) - 1) // PAGE_SIZE
            for page in item.page_ids[first : last + 1]:
                self.pages[page] = self.junk()

    def commit(self, plan: StepPlan) -> None:
        for item in plan.items:  # what is computed may be registered: the bytes are there first
            known = page_hashes(item.known_token_ids, PAGE_SIZE)
            for index in range(item.start // PAGE_SIZE, (item.start + len(item.token_ids)) // PAGE_SIZE):
                if index < len(known):
                    self.pages[item.page_ids[index]] = known[index]
        sampled = {item.sequence_id: SampledToken(item.position % 2) for item in plan.sampling_items}
        for chunk in self.scheduler.commit_step(plan, sampled, 0.0):
            if chunk.stats is not None:
                self.reports[chunk.sequence_id] = chunk.stats.reload

    def run(self) -> None:
        """Until nothing is left to compute or to copy."""
        for _ in range(1000):
            worked = self.step() or bool(self.orders)
            while self.orders:
                self.carry_out(0)
            if not worked and not self.scheduler.has_work:
                return
        raise AssertionError("it does not end")

    def junk(self) -> object:
        self._num_junk += 1
        return ("junk", self._num_junk)

    # ---- copies ----

    def take_orders(self) -> None:
        for order in self.books.take_orders():
            if isinstance(order, Save):
                assert [self.pages[page] for page in order.page_ids] == list(order.page_hashes)
            elif isinstance(order, Load):
                for page in order.page_ids:
                    self.pages[page] = self.junk()
            self.orders.append(order)

    def carry_out(self, index: int, *, fails: bool = False, damaged: int | None = None) -> None:
        """What the mover does of an order, in any sequence but that of the disk's."""
        order = self.orders.pop(index)
        done: Done | None = None
        if isinstance(order, Save):
            done = Done(order, 0 if fails else len(order.slots))
            for page, slot, name in zip(order.page_ids, order.slots, order.page_hashes, strict=True):
                assert self.pages[page] == name, "a page was overwritten while it was copied"
                self.slots[slot] = self.junk() if fails else name
        elif isinstance(order, Spill):
            written = order.page_hashes[: len(order.slots) // 2] if fails else order.page_hashes
            for slot, name in zip(order.slots, order.page_hashes, strict=True):
                assert self.slots[slot] == name, "a slot was overwritten while it was written to disk"
                if name in written:
                    self.files[name] = name
            done = Done(order, written=written)
        elif isinstance(order, Load):
            done = self._load(order, fails=fails, damaged=damaged)
        else:
            for name in order.page_hashes:
                self.files.pop(name, None)
        if done is not None:
            self.books.settle([done])
            self.scheduler.pages_moved()

    def _load(self, order: Load, *, fails: bool, damaged: int | None) -> Done:
        num_good, bad = len(order.slots), ()
        for index in sorted(order.from_disk):
            name = order.page_hashes[index]
            assert self.files[name] == name, "a file is gone or another one"
            if index == damaged:
                del self.files[name]
                num_good, bad = index, (name,)
                break
            self.slots[order.slots[index]] = name
        num_good = 0 if fails else num_good
        for index in range(num_good):
            assert self.slots[order.slots[index]] == order.page_hashes[index], "a slot was overwritten before its load"
            self.pages[order.page_ids[index]] = order.page_hashes[index]
        return Done(order, num_good, damaged=bad, num_read=len(order.from_disk), read_s=1.0, copy_s=1.0)

    # ---- what gateways hear ----

    def follow(self) -> None:
        changes = self.allocator.take_changes()
        lower, gone = self.books.take_lower_changes(changes.removed)
        self.seen.update(dict.fromkeys(changes.stored, Tier.DEVICE))
        for tier, names in lower.items():
            self.seen.update(dict.fromkeys(names, tier))
        for name in gone:
            self.seen.pop(name, None)
        for name, tier in self.seen.items():
            here = Tier.DEVICE if self.allocator.knows(name) else self.tiers.tier_of(name)
            assert here is tier, f"a gateway takes {name.hex()} for {tier}, and it is {here}"

    def check(self) -> None:
        self.allocator.check_integrity()
        self.books.check_integrity()


def pressure(world: World, count: int) -> None:
    """Other prompts push everything out of the device."""
    for index in range(count):
        world.add(f"other-{index}", [9 + index] * 16)
        world.run()


def test_what_was_pushed_out_comes_back_from_host_memory() -> None:
    world = World(num_files=0, num_slots=20)
    world.add("first", range(12))
    world.run()
    pressure(world, 2)

    world.add("again", range(12))
    world.run()

    report = world.reports[SequenceId("again")]
    assert report is not None
    assert (report.outcome, report.host_tokens, report.disk_tokens) == (ReloadOutcome.LOADED, 10, 0)
    world.check()


def test_and_from_the_disk_once_host_memory_was_too_small() -> None:
    world = World(num_files=40, num_slots=6)
    world.add("first", range(12))
    world.run()
    pressure(world, 3)
    assert world.tiers.num_pages[Tier.DISK] >= 5

    world.add("again", range(12))
    world.run()

    report = world.reports[SequenceId("again")]
    assert report is not None
    assert (report.outcome, report.host_tokens + report.disk_tokens) == (ReloadOutcome.LOADED, 10)
    assert report.disk_tokens > 0
    world.check()


def test_a_damaged_file_ends_what_is_loaded_and_is_counted() -> None:
    world = World(num_files=40, num_slots=6)
    world.add("first", range(12))
    world.run()
    pressure(world, 3)
    world.add("again", range(12))
    world.step()
    index = next(i for i, order in enumerate(world.orders) if isinstance(order, Load))
    load = world.orders[index]
    assert isinstance(load, Load)
    world.carry_out(index, damaged=max(load.from_disk))
    world.run()

    report = world.reports[SequenceId("again")]
    assert report is not None
    assert report.outcome is ReloadOutcome.PARTLY
    assert world.books.states()[1].damaged_pages == 1
    world.check()


def test_what_is_computed_faster_is_computed_and_says_so() -> None:
    world = World(num_files=0, num_slots=20, speeds=SLOW)
    world.add("first", range(12))
    world.run()
    pressure(world, 2)

    world.add("again", range(12))
    world.run()

    assert world.books.outcomes == {ReloadOutcome.COMPUTED: 1}
    world.check()


def test_two_requests_with_one_prefix_load_it_once() -> None:
    world = World(num_files=0, num_slots=48, num_pages=24)
    world.add("first", range(12))
    world.run()
    pressure(world, 4)

    world.add("again", range(12))
    world.add("too", [*range(11), 1])
    world.run()

    assert world.books.outcomes == {ReloadOutcome.LOADED: 1, ReloadOutcome.SHARED: 1}
    assert world.books.states()[0].loaded_tokens == 10
    world.check()


def test_an_abort_during_a_load_frees_everything() -> None:
    world = World(num_files=0, num_slots=20)
    world.add("first", range(12))
    world.run()
    pressure(world, 2)
    world.add("again", range(12))
    assert not world.step()
    assert world.scheduler.load().num_waiting == 1

    assert world.scheduler.abort(SequenceId("again"))
    assert world.scheduler.load().num_waiting == 0
    world.run()

    assert world.allocator.whole()
    world.check()


def test_a_tier_that_holds_less_than_it_is_given_forgets_the_oldest() -> None:
    world = World(num_files=0, num_slots=4)
    for index in range(5):
        world.add(f"{index}", range(20 * index, 20 * index + 12))
        world.run()
    assert world.tiers.num_pages[Tier.HOST] <= 4
    assert world.tiers.counts(Tier.HOST).evicted > 0
    assert world.allocator.num_lost > 0, "more went at once than half of it holds"
    world.check()


@pytest.mark.parametrize("num_files", [0, 30])
def test_a_gateway_is_told_the_best_tier_of_each_page(num_files: int) -> None:
    world = World(num_files=num_files)
    for index in range(6):
        world.add(f"{index}", [index % 3] * 12)
        world.run()
        world.follow()
    assert set(world.seen.values()) >= {Tier.DEVICE, Tier.DISK if num_files else Tier.HOST}


class TiersMachine(RuleBasedStateMachine):
    """Random prompts, aborts, reservations, and copies that end in any order, or fail."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0
        self.names: list[SequenceId] = []
        self.reserved: list[Reservation] = []

    @initialize(num_slots=st.integers(1, 8), num_files=st.sampled_from([0, 1, 5, 30]), slow=st.booleans())
    def begin(self, num_slots: int, num_files: int, slow: bool) -> None:
        self.world = World(12, num_slots, num_files, SLOW if slow else FAST)

    @rule(
        first=st.integers(0, 2),
        length=st.integers(1, 18),
        tail=st.integers(0, 1),
        max_tokens=st.integers(1, 6),
        hold=st.booleans(),
    )
    def add(self, first: int, length: int, tail: int, max_tokens: int, hold: bool) -> None:
        self.count += 1
        self.world.add(f"s{self.count}", [*[first] * length, tail], max_tokens, hold_kv=hold)
        self.names.append(SequenceId(f"s{self.count}"))

    @rule(tokens=st.lists(st.integers(0, 1), min_size=1, max_size=10))
    def reserve(self, tokens: list[int]) -> None:
        self.count += 1
        sampling = SamplingParams(max_tokens=2, temperature=0.0)
        reservation = self.world.scheduler.reserve(SequenceSpec(SequenceId(f"r{self.count}"), tuple(tokens), sampling))
        if reservation is not None:
            for page in reservation.page_ids[reservation.num_cached_pages :]:
                self.world.pages[page] = self.world.junk()
            self.reserved.append(reservation)

    @precondition(lambda self: self.reserved)
    @rule(data=st.data())
    def cancel(self, data: st.DataObject) -> None:
        index = data.draw(st.integers(0, len(self.reserved) - 1))
        self.world.scheduler.cancel(self.reserved.pop(index))

    @precondition(lambda self: self.names)
    @rule(data=st.data())
    def abort(self, data: st.DataObject) -> None:
        index = data.draw(st.integers(0, len(self.names) - 1))
        self.world.scheduler.abort(self.names.pop(index))

    @rule(ahead=st.booleans())
    def step(self, ahead: bool) -> None:
        self.world.step(ahead=ahead)

    @precondition(lambda self: self.world.orders)
    @rule(data=st.data(), fails=st.sampled_from([False, False, False, True]))
    def carry_out(self, data: st.DataObject, fails: bool) -> None:
        orders = self.world.orders
        firsts = [i for i, order in enumerate(orders) if not isinstance(order, Spill | Drop)]
        filed = [i for i, order in enumerate(orders) if isinstance(order, Spill | Drop)]
        index = data.draw(st.sampled_from(firsts + filed[:1]))
        order = orders[index]
        damaged = None
        if isinstance(order, Load) and order.from_disk and data.draw(st.booleans()):
            damaged = data.draw(st.sampled_from(sorted(order.from_disk)))
        self.world.carry_out(index, fails=fails, damaged=damaged)

    @rule()
    def follow(self) -> None:
        self.world.follow()

    @invariant()
    def add_up(self) -> None:
        if hasattr(self, "world"):
            self.world.check()

    def teardown(self) -> None:
        if not hasattr(self, "world"):
            return
        for reservation in self.reserved:
            self.world.scheduler.cancel(reservation)
        self.world.run()
        for name in self.names:
            self.world.scheduler.abort(name)
        self.world.run()
        self.world.follow()
        self.world.check()
        assert self.world.tiers.idle, "an order never came back"
        assert self.world.allocator.whole(), "a page is lost"


TestTiersMachine = TiersMachine.TestCase
TestTiersMachine.settings = settings(
    max_examples=60, stateful_step_count=40, deadline=None, suppress_health_check=[HealthCheck.too_slow]
)
