"""The scheduler against a model that can be computed by hand.

``PagedModel`` stands for the runner. Its K/V of a token is the tuple of all tokens up to it, so every step can check
that each page of a block table still holds exactly the K/V of that sequence's prefix; the next token is a pure function
of the tokens so far, so what a sequence must give is known without any scheduler.
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from typing import Any

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from core.errors import InvalidRequest, ProtocolViolation
from core.prefix_hash import PageHash, page_hashes
from core.request import FinishReason, Role, SamplingParams, SequenceId, SequenceSpec, TokenChunk, TokenLogprob
from engine.chunked_prefill import ChunkedPrefillScheduler
from engine.config import EngineConfig
from engine.page_allocator import PageAllocator
from engine.scheduler import PrefixRoom, Reservation
from engine.step_plan import SampledToken, StepPlan

EOS = 0
VOCAB = 7
PAGE_SIZE = 2


def next_token(tokens: Sequence[int]) -> int:
    return (sum((index + 1) * token for index, token in enumerate(tokens)) + len(tokens)) % VOCAB


class PagedModel:
    """Computes plans over a pool whose slots hold the prefix that each K/V stands for."""

    def __init__(self) -> None:
        self.slots: dict[tuple[int, int], tuple[int, ...]] = {}  # (page, slot) |-> tokens up to it, itself included

    def store(self, page_ids: Sequence[int], tokens: Sequence[int], start: int) -> None:
        for position in range(start, len(tokens)):
            slot = (page_ids[position // PAGE_SIZE], position % PAGE_SIZE)
            self.slots[slot] = tuple(tokens[: position + 1])

    def check(self, page_ids: Sequence[int], tokens: Sequence[int], end: int) -> None:
        for position in range(end):
            slot = (page_ids[position // PAGE_SIZE], position % PAGE_SIZE)
            assert self.slots.get(slot) == tuple(tokens[: position + 1]), f"position {position} was overwritten"

    def run(self, plan: StepPlan) -> dict[SequenceId, SampledToken]:
        for item in plan.items:  # all reads see what is stored before the step, as on a device
            self.check(item.page_ids, item.known_token_ids, item.start)
        for item in plan.items:
            end = item.start + len(item.token_ids)
            assert item.token_ids == tuple(item.known_token_ids[item.start : end])
            assert item.samples == (end == len(item.known_token_ids))
            self.store(item.page_ids, item.known_token_ids[:end], item.start)
        return {item.sequence_id: SampledToken(next_token(item.known_token_ids)) for item in plan.sampling_items}


def spec(
    name: str, prompt: Sequence[int], hold_kv: bool = False, output: Sequence[int] = (), **sampling: Any
) -> SequenceSpec:
    params = SamplingParams(seed=1, **{"ignore_eos": True, **sampling})
    return SequenceSpec(SequenceId(name), tuple(prompt), params, tuple(output), hold_kv=hold_kv)


class Bench:
    """A scheduler, its pool and what came out of it."""

    def __init__(
        self, num_pages: int = 16, max_model_len: int = 1000, prefix_cache: bool = True, **config: int | str
    ) -> None:
        self.allocator = PageAllocator(num_pages, PAGE_SIZE, prefix_cache)
        limits: dict[str, Any] = {"max_batch_size": 4, "max_batch_tokens": 8, **config}
        self.scheduler = ChunkedPrefillScheduler(EngineConfig(**limits), self.allocator, max_model_len, (EOS,))
        self.model = PagedModel()
        self.now = 0.0
        self.outputs: dict[SequenceId, list[int]] = {}
        self.chunks: list[TokenChunk] = []

    def add(self, *specs: SequenceSpec) -> None:
        for one in specs:
            self.scheduler.add(one, self.now)

    def step(self) -> StepPlan | None:
        plan = self.scheduler.plan_step(self.now)
        if plan is not None:
            self.commit(plan)
        return plan

    def commit(self, plan: StepPlan) -> list[TokenChunk]:
        sampled = self.model.run(plan)
        self.now += 1.0
        chunks = self.scheduler.commit_step(plan, sampled, self.now)
        for chunk in chunks:
            assert chunk.position == len(self.outputs.setdefault(chunk.sequence_id, []))
            self.outputs[chunk.sequence_id] += chunk.token_ids
        self.chunks += chunks
        return chunks

    def drain(self) -> list[StepPlan]:
        plans: list[StepPlan] = []
        while (plan := self.step()) is not None:
            plans.append(plan)
            assert len(plans) < 1000, "the scheduler never comes to an end"
        return plans

    def receive(self, reservation: Reservation, first: int | None = None) -> None:
        """What a prefill worker does: write the pages that are not cached, then hand its token over."""
        tokens = reservation.spec.token_ids
        self.model.check(reservation.page_ids, tokens, reservation.num_cached_pages * PAGE_SIZE)
        self.model.store(reservation.page_ids, tokens, reservation.num_cached_pages * PAGE_SIZE)
        first = next_token(tokens) if first is None else first
        self.scheduler.admit(reservation, (first,), self.now)
        self.outputs[reservation.sequence_id] = [first]


def shape(plan: StepPlan | None) -> list[tuple[str, int]]:
    assert plan is not None
    return [(item.sequence_id, len(item.token_ids)) for item in plan.items]


def expected(one: SequenceSpec) -> list[int]:
    """The whole output of a sequence that is ended by max_tokens."""
    tokens = list(one.prompt_token_ids)
    for _ in range(one.sampling.max_tokens or 0):
        tokens.append(next_token(tokens))
    return tokens[len(one.prompt_token_ids) :]


# ---- steps ----


def test_decode_items_come_first_and_the_rest_of_the_budget_goes_to_prefill() -> None:
    bench = Bench(max_batch_tokens=8)
    bench.add(spec("a", [1, 2, 3], max_tokens=4))
    assert shape(bench.step()) == [("a", 3)]
    bench.add(spec("b", [4] * 10, max_tokens=2))
    assert shape(bench.step()) == [("a", 1), ("b", 7)]
    assert shape(bench.step()) == [("a", 1), ("b", 3)]
    assert shape(bench.step()) == [("a", 1), ("b", 1)]
    assert bench.step() is None


def test_several_prompts_are_packed_into_one_step_up_to_the_budget() -> None:
    bench = Bench(max_batch_tokens=8)
    bench.add(spec("a", [1] * 3, max_tokens=1), spec("b", [2] * 3, max_tokens=1), spec("c", [3] * 3, max_tokens=1))
    plan = bench.step()
    assert shape(plan) == [("a", 3), ("b", 3), ("c", 2)]
    assert plan is not None
    assert [item.samples for item in plan.items] == [True, True, False]
    assert [item.sequence_id for item in plan.sampling_items] == ["a", "b"]
    assert plan.num_tokens == 8


def test_a_prompt_takes_at_most_one_chunk_of_a_step() -> None:
    bench = Bench(max_prefill_chunk=3)
    bench.add(spec("a", [1] * 7, max_tokens=1))
    assert [shape(plan)[0][1] for plan in bench.drain()] == [3, 3, 1]


def test_no_more_sequences_than_the_batch_size_run() -> None:
    bench = Bench(max_batch_size=2)
    bench.add(*(spec(name, [1], max_tokens=2) for name in "abc"))
    assert [name for name, _ in shape(bench.step())] == ["a", "b"]
    assert [name for name, _ in shape(bench.step())] == ["a", "b"]
    assert [name for name, _ in shape(bench.step())] == ["c"]


def test_a_head_that_does_not_fit_is_not_overtaken() -> None:
    bench = Bench(num_pages=8, max_batch_tokens=16)
    bench.add(
        spec("a", [1] * 8, max_tokens=4), spec("big", [2] * 12, max_tokens=1), spec("small", [3, 3], max_tokens=1)
    )
    assert shape(bench.step()) == [("a", 8)]
    assert [shape(plan) for plan in bench.drain()] == [[("a", 1)]] * 3 + [[("big", 12), ("small", 2)]]


def test_an_item_names_its_place_and_its_block_table() -> None:
    bench = Bench(max_batch_tokens=4)
    bench.add(spec("a", [1, 2, 3, 4, 5], output=[6], max_tokens=3))
    plan = bench.scheduler.plan_step(0.0)
    assert plan is not None
    item = plan.items[0]
    assert (item.token_ids, item.start, item.page_ids, item.samples) == ((1, 2, 3, 4), 0, (0, 1, 2), False)
    assert (item.known_token_ids, item.num_prompt_tokens) == (array("q", [1, 2, 3, 4, 5, 6]), 5)
    assert item.position == 1


def test_a_started_sequence_is_announced_once_with_all_its_pages() -> None:
    bench = Bench(max_batch_tokens=4)
    one = spec("a", [1, 2, 3, 4, 5], max_tokens=3)
    bench.add(one)
    first, *others = bench.drain()
    assert [(s.spec, s.num_cached_tokens, s.page_ids) for s in first.started] == [(one, 0, (0, 1, 2))]
    assert all(plan.started == () for plan in others)


def test_decoding_takes_a_page_only_at_a_border() -> None:
    bench = Bench()
    bench.add(spec("a", [1, 2, 3], max_tokens=5))
    tables = [len(plan.items[0].page_ids) for plan in bench.drain()]
    assert tables == [2, 2, 3, 3, 4]


def test_logprobs_travel_with_their_token() -> None:
    bench = Bench()
    bench.add(spec("a", [1], max_tokens=1))
    plan = bench.scheduler.plan_step(0.0)
    assert plan is not None
    logprob = TokenLogprob(3, -0.5)
    (chunk,) = bench.scheduler.commit_step(plan, {SequenceId("a"): SampledToken(3, logprob)}, 1.0)
    assert (chunk.token_ids, chunk.logprobs) == ((3,), (logprob,))


# ---- the end of a sequence ----


def finish(bench: Bench, tokens: Sequence[int]) -> TokenChunk:
    """Sample ``tokens`` for the only sequence until it ends."""
    for count, token in enumerate(tokens):
        plan = bench.scheduler.plan_step(0.0)
        assert plan is not None
        (chunk,) = bench.scheduler.commit_step(plan, {plan.items[0].sequence_id: SampledToken(token)}, 0.0)
        if chunk.finish_reason is not None:
            assert count == len(tokens) - 1, "it ended early"
            assert bench.allocator.whole()
            return chunk
    raise AssertionError("it did not end")


def test_the_end_of_sequence_token_ends_it() -> None:
    bench = Bench()
    bench.add(spec("a", [1], ignore_eos=False))
    chunk = finish(bench, [3, EOS])
    assert (chunk.finish_reason, chunk.stop_token_id, chunk.token_ids) == (FinishReason.STOP, EOS, (EOS,))


def test_ignore_eos_ignores_it_but_not_a_stop_token() -> None:
    bench = Bench()
    bench.add(spec("a", [1], ignore_eos=True, stop_token_ids=(5,)))
    chunk = finish(bench, [EOS, EOS, 5])
    assert (chunk.finish_reason, chunk.stop_token_id) == (FinishReason.STOP, 5)


def test_stop_tokens_count_only_after_min_tokens() -> None:
    bench = Bench()
    bench.add(spec("a", [1], min_tokens=2, ignore_eos=False, stop_token_ids=(5,)))
    assert finish(bench, [5, EOS, 5]).finish_reason is FinishReason.STOP


def test_max_tokens_counts_the_tokens_of_earlier_tries() -> None:
    bench = Bench()
    bench.add(spec("a", [1], output=[2, 3], max_tokens=4))
    chunk = finish(bench, [4, 4])
    assert (chunk.finish_reason, chunk.stop_token_id, chunk.position) == (FinishReason.LENGTH, None, 3)


def test_a_stop_token_at_max_tokens_is_a_stop() -> None:
    bench = Bench()
    bench.add(spec("a", [1], max_tokens=2, stop_token_ids=(5,)))
    assert finish(bench, [4, 5]).finish_reason is FinishReason.STOP


def test_the_models_context_ends_it() -> None:
    bench = Bench(max_model_len=4)
    bench.add(spec("a", [1, 1]))
    assert finish(bench, [4, 4]).finish_reason is FinishReason.LENGTH


def test_a_pool_smaller_than_the_context_ends_it() -> None:
    bench = Bench(num_pages=2)
    bench.add(spec("a", [1, 1]))
    assert finish(bench, [4, 4]).finish_reason is FinishReason.LENGTH


# ---- what is refused ----


@pytest.mark.parametrize(
    ("one", "field"),
    [
        (spec("x", [1] * 8), "prompt"),
        (spec("x", [1] * 7, output=[1]), "prompt"),
        (spec("x", []), "prompt"),
        (spec("x", [1], output=[1, 1], max_tokens=2), "max_tokens"),
        (spec("known", [1]), "request_id"),
    ],
    ids=["too long", "too long with output", "empty", "already done", "already here"],
)
@pytest.mark.parametrize("door", ["add", "reserve"])
def test_what_can_never_run_is_refused_by_field_and_changes_nothing(one: SequenceSpec, field: str, door: str) -> None:
    bench = Bench(max_model_len=8)
    bench.add(spec("known", [1], max_tokens=1))
    before = bench.scheduler.load()
    enter = bench.add if door == "add" else bench.scheduler.reserve
    with pytest.raises(InvalidRequest) as error:
        enter(one)
    assert error.value.field == field
    assert bench.scheduler.load() == before
    bench.drain()
    assert bench.allocator.whole()


def test_the_longest_prompt_that_leaves_room_for_a_token_is_taken() -> None:
    bench = Bench(max_model_len=8)
    bench.add(spec("a", [1] * 7))
    bench.drain()
    assert bench.chunks[-1].finish_reason is FinishReason.LENGTH


# ---- prefix cache ----


def test_a_known_prefix_is_not_computed_again() -> None:
    bench = Bench()
    bench.add(spec("a", [1, 2, 3, 4, 5], max_tokens=1))
    bench.drain()
    bench.add(spec("b", [1, 2, 3, 4, 6, 6], max_tokens=1))
    assert shape(bench.step()) == [("b", 2)]
    load = bench.scheduler.load()
    assert (load.prompt_tokens, load.cached_tokens) == (11, 4)


def test_one_token_is_always_computed() -> None:
    bench = Bench()
    bench.add(spec("a", [1, 2, 3, 4], max_tokens=1))
    bench.drain()
    bench.add(spec("b", [1, 2, 3, 4], max_tokens=1))
    assert shape(bench.step()) == [("b", 2)]


def test_generated_pages_are_found_by_the_next_turn() -> None:
    bench = Bench()
    bench.add(spec("a", [1, 2, 3], max_tokens=4))
    bench.drain()
    bench.add(spec("b", [1, 2, 3, *bench.outputs[SequenceId("a")], 5], max_tokens=1))
    assert shape(bench.step()) == [("b", 2)]  # 8 tokens; 6 of "a"'s 7 are stored in full pages


def test_sequences_that_run_side_by_side_share_a_prefix_once_it_is_computed() -> None:
    bench = Bench()
    bench.add(spec("a", [1, 2, 3, 4, 5], max_tokens=4))
    bench.step()
    bench.add(spec("b", [1, 2, 3, 4, 6], max_tokens=4))
    plan = bench.step()
    assert plan is not None
    assert plan.items[0].page_ids[:2] == plan.items[1].page_ids[:2]
    bench.drain()
    assert bench.allocator.whole()


def test_tenants_do_not_share_pages() -> None:
    bench = Bench()
    bench.add(spec("a", [1, 2, 3, 4, 5], max_tokens=1))
    bench.drain()
    other = spec("b", [1, 2, 3, 4, 5], max_tokens=1)
    bench.add(SequenceSpec(other.sequence_id, other.prompt_token_ids, other.sampling, salt=b"tenant"))
    assert shape(bench.step()) == [("b", 5)]


def test_without_a_prefix_cache_everything_is_computed() -> None:
    bench = Bench(prefix_cache=False)
    for name in "ab":
        bench.add(spec(name, [1, 2, 3, 4], max_tokens=3))
        assert shape(bench.step()) == [(name, 4)]
        bench.drain()
    assert bench.allocator.num_cached == 0


# ---- preemption ----


def test_the_youngest_is_preempted_and_gives_the_same_tokens() -> None:
    bench = Bench(num_pages=8)
    specs = [spec(name, [1, token], max_tokens=8) for name, token in (("a", 2), ("b", 3), ("c", 4))]
    bench.add(*specs)
    bench.drain()
    assert bench.scheduler.load().num_preemptions > 0
    for one in specs:
        assert bench.outputs[one.sequence_id] == expected(one)
    last = {chunk.sequence_id: chunk.stats for chunk in bench.chunks if chunk.finish_reason}
    assert last[SequenceId("a")] is not None
    assert last[SequenceId("a")].num_preemptions == 0
    assert last[SequenceId("c")] is not None
    assert last[SequenceId("c")].num_preemptions > 0


def test_a_preempted_sequence_goes_before_those_that_waited() -> None:
    bench = Bench(num_pages=6, max_batch_size=2)
    bench.add(spec("a", [1, 2], max_tokens=8), spec("b", [3, 4], max_tokens=8), spec("c", [5], max_tokens=1))
    starts = [started.spec.sequence_id for plan in bench.drain() for started in plan.started]
    assert starts == ["a", "b", "b", "c"]


def test_pages_that_are_being_sent_are_never_preempted() -> None:
    bench = Bench(num_pages=6, max_prefill_chunk=1)
    bench.add(spec("a", [1, 2], max_tokens=8))
    bench.step()
    bench.step()
    bench.add(spec("held", [1, 3, 3, 3, 3, 3], hold_kv=True))
    bench.drain()
    load = bench.scheduler.load()
    assert (load.num_held, load.num_waiting, load.num_preemptions) == (1, 1, 1)  # "a" had to preempt itself
    assert not bench.scheduler.has_work
    assert bench.scheduler.release(SequenceId("held"))
    assert bench.scheduler.has_work
    bench.drain()
    assert bench.outputs[SequenceId("a")] == expected(spec("a", [1, 2], max_tokens=8))
    assert bench.allocator.whole()


# ---- hold, release, abort ----


def test_a_held_sequence_keeps_its_pages_until_release() -> None:
    bench = Bench()
    bench.add(spec("a", [1, 2, 3], hold_kv=True))
    bench.drain()
    (chunk,) = bench.chunks
    assert (len(chunk.token_ids), chunk.finish_reason) == (1, None)
    assert chunk.stats is not None
    assert chunk.stats.role is Role.PREFILL
    assert bench.allocator.num_free == 14
    assert bench.scheduler.release(SequenceId("a"))
    assert bench.allocator.whole()
    assert not bench.scheduler.release(SequenceId("a"))


def test_a_held_sequence_that_ended_keeps_its_pages_too() -> None:
    bench = Bench()
    bench.add(spec("a", [1, 2, 3], hold_kv=True, max_tokens=1))
    bench.drain()
    assert bench.chunks[0].finish_reason is FinishReason.LENGTH
    assert not bench.allocator.whole()
    assert bench.scheduler.release(SequenceId("a"))
    assert bench.allocator.whole()


def test_only_held_sequences_can_be_released() -> None:
    bench = Bench()
    bench.add(spec("a", [1, 2, 3], max_tokens=3))
    bench.step()
    assert not bench.scheduler.release(SequenceId("a"))
    assert not bench.scheduler.release(SequenceId("unknown"))


@pytest.mark.parametrize("num_steps", [0, 1, 2], ids=["waiting", "prefilling", "decoding"])
def test_abort_frees_the_pages_in_every_state(num_steps: int) -> None:
    bench = Bench(max_batch_tokens=4)
    bench.add(spec("a", [1] * 6))
    for _ in range(num_steps):
        bench.step()
    assert bench.scheduler.abort(SequenceId("a"))
    assert bench.allocator.whole()
    assert not bench.scheduler.has_work
    assert not bench.scheduler.abort(SequenceId("a"))


def test_abort_frees_a_held_sequence() -> None:
    bench = Bench()
    bench.add(spec("a", [1, 2, 3], hold_kv=True))
    bench.drain()
    assert bench.scheduler.abort(SequenceId("a"))
    assert bench.allocator.whole()


def test_a_sequence_aborted_during_its_step_is_not_booked() -> None:
    bench = Bench()
    bench.add(spec("a", [1, 2, 3], max_tokens=3), spec("b", [1, 2, 3], max_tokens=3))
    plan = bench.scheduler.plan_step(0.0)
    assert plan is not None
    bench.scheduler.abort(SequenceId("a"))
    bench.scheduler.add(spec("a", [1, 2, 3], max_tokens=3), 0.0)
    assert [chunk.sequence_id for chunk in bench.commit(plan)] == ["b"]
    bench.drain()
    assert bench.outputs[SequenceId("a")] == expected(spec("a", [1, 2, 3], max_tokens=3))


# ---- reservations ----


def reserve(bench: Bench, one: SequenceSpec) -> Reservation:
    reservation = bench.scheduler.reserve(one)
    assert reservation is not None
    return reservation


def test_an_admitted_sequence_goes_on_where_the_prefill_worker_stopped() -> None:
    bench = Bench()
    one = spec("a", [1, 2, 3, 4], max_tokens=4)
    reservation = reserve(bench, one)
    assert (len(reservation.page_ids), reservation.num_cached_pages) == (2, 0)
    bench.receive(reservation)
    assert shape(bench.step()) == [("a", 1)]
    bench.drain()
    assert bench.outputs[SequenceId("a")] == expected(one)
    assert bench.scheduler.load().prompt_tokens == 0


def test_every_full_page_of_a_reservation_may_be_cached() -> None:
    bench = Bench()
    bench.add(spec("a", [1, 2, 3, 4], max_tokens=1))
    bench.drain()
    reservation = reserve(bench, spec("b", [1, 2, 3, 4], max_tokens=2))
    assert reservation.num_cached_pages == 2
    bench.receive(reservation)
    bench.drain()
    stats = bench.chunks[-1].stats
    assert stats is not None
    assert stats.cached_tokens == 4


def test_received_pages_join_the_prefix_cache() -> None:
    bench = Bench()
    bench.receive(reserve(bench, spec("a", [1, 2, 3, 4, 5], max_tokens=2)))
    bench.add(spec("b", [1, 2, 3, 4, 6], max_tokens=1))
    assert ("b", 1) in shape(bench.step())


def test_a_cancelled_reservation_leaves_nothing_behind_and_cannot_be_admitted() -> None:
    bench = Bench()
    reservation = reserve(bench, spec("a", [1, 2, 3], max_tokens=2))
    bench.scheduler.cancel(reservation)
    bench.scheduler.cancel(reservation)
    assert bench.allocator.whole()
    with pytest.raises(ProtocolViolation):
        bench.scheduler.admit(reservation, (1,), 0.0)
    assert not bench.scheduler.has_work


def test_an_older_reservation_of_the_same_name_is_not_the_new_one() -> None:
    bench = Bench()
    old = reserve(bench, spec("a", [1, 2, 3], max_tokens=2))
    bench.scheduler.cancel(old)
    reserve(bench, spec("a", [1, 2, 3], max_tokens=2))
    bench.scheduler.cancel(old)
    with pytest.raises(ProtocolViolation):
        bench.scheduler.admit(old, (1,), 0.0)
    assert bench.scheduler.load().num_reserved == 1


@pytest.mark.parametrize("first", [(), (EOS,), (3, 3)], ids=["no token", "an end token", "max_tokens reached"])
def test_a_sequence_that_cannot_go_on_is_not_admitted_and_its_reservation_stays(first: tuple[int, ...]) -> None:
    bench = Bench()
    reservation = reserve(bench, spec("a", [1, 2, 3], max_tokens=2, ignore_eos=False))
    with pytest.raises(ProtocolViolation):
        bench.scheduler.admit(reservation, first, 0.0)
    assert bench.scheduler.load().num_reserved == 1
    bench.scheduler.cancel(reservation)
    assert bench.allocator.whole()


def test_abort_leaves_reserved_pages_alone_for_a_peer_may_still_write_to_them() -> None:
    bench = Bench()
    reserve(bench, spec("a", [1, 2, 3], max_tokens=2))
    assert not bench.scheduler.abort(SequenceId("a"))
    assert not bench.allocator.whole()


def test_a_reservation_waits_for_pages() -> None:
    bench = Bench(num_pages=4)
    bench.add(spec("a", [1] * 5, max_tokens=2))
    bench.step()
    assert bench.scheduler.reserve(spec("b", [2, 2], max_tokens=2)) is None
    bench.drain()
    assert bench.scheduler.reserve(spec("b", [2, 2], max_tokens=2)) is not None


def test_a_reservation_does_not_take_the_pages_that_the_head_of_the_queue_waits_for() -> None:
    bench = Bench(num_pages=10)
    bench.add(spec("a", [1] * 6, max_tokens=4), spec("head", [2] * 14, max_tokens=1))
    bench.step()
    assert bench.scheduler.load().num_waiting == 1
    assert bench.scheduler.reserve(spec("b", [3], max_tokens=2)) is None


def test_a_reservation_does_not_take_the_last_place_in_the_batch_from_the_queue() -> None:
    bench = Bench(max_batch_size=2)
    bench.add(spec("a", [1], max_tokens=3), spec("b", [2], max_tokens=3), spec("c", [3], max_tokens=1))
    bench.step()
    assert bench.scheduler.reserve(spec("d", [4], max_tokens=2)) is None


def test_admitted_sequences_over_the_batch_size_wait_their_turn_with_their_pages() -> None:
    bench = Bench(max_batch_size=2)
    specs = [spec(name, [1, token, 2], max_tokens=3) for name, token in (("a", 1), ("b", 2), ("c", 3))]
    for one in specs:
        bench.receive(reserve(bench, one))
    assert shape(bench.step()) == [("a", 1), ("b", 1)]
    assert bench.allocator.num_free == 10
    bench.drain()
    assert all(bench.outputs[one.sequence_id] == expected(one) for one in specs)
    assert bench.scheduler.load().num_preemptions == 0


# ---- reports ----


def test_the_first_and_the_last_chunk_say_where_the_seconds_went() -> None:
    bench = Bench()
    bench.add(spec("a", [1, 2, 3], max_tokens=3))
    bench.now = 5.0
    bench.drain()
    stats = [chunk.stats for chunk in bench.chunks]
    assert stats[1] is None
    assert [(s.queue_s, s.compute_s, s.role) for s in stats if s] == [(5.0, 1.0, Role.DECODE), (5.0, 3.0, Role.DECODE)]


def test_load_does_not_count_what_a_waiting_sequence_would_find_in_the_prefix_cache() -> None:
    bench = Bench()
    size = bench.allocator.page_size
    prompt = list(range(3 * size + 1))
    bench.add(spec("a", prompt, max_tokens=1))
    bench.drain()
    bench.add(spec("b", [*prompt, 7], max_tokens=1), spec("c", prompt[:size], max_tokens=1))
    assert bench.scheduler.load().num_waiting_tokens == 2 + size, "of the last page at least one token is computed"


def test_load_counts_tokens_that_are_not_computed_yet() -> None:
    bench = Bench(max_batch_tokens=4)
    bench.add(spec("a", [1] * 6, max_tokens=3), spec("b", [2] * 5, max_tokens=3))
    assert bench.scheduler.load().num_waiting_tokens == 11
    bench.step()
    load = bench.scheduler.load()
    assert (load.num_running, load.num_waiting, load.num_waiting_tokens) == (1, 1, 7)
    bench.drain()
    load = bench.scheduler.load()
    assert (load.num_running, load.num_waiting, load.num_waiting_tokens, load.generated_tokens) == (0, 0, 0, 6)


def test_an_empty_scheduler_has_no_work() -> None:
    bench = Bench()
    assert not bench.scheduler.has_work
    assert bench.step() is None


# ---- anything, in any order ----


PROMPTS = st.lists(st.integers(1, 2), min_size=1, max_size=12)


class SchedulerMachine(RuleBasedStateMachine):
    """Random calls on a small pool; whatever happened, at the end every sequence that nobody aborted has given exactly
    the tokens it had to, and the pool is whole."""

    def __init__(self) -> None:
        super().__init__()
        self.bench = Bench(num_pages=9, max_batch_size=3, max_batch_tokens=5, max_prefill_chunk=4)
        self.specs: dict[SequenceId, SequenceSpec] = {}
        self.queued: list[SequenceId] = []  # not started yet, in order
        self.held: set[SequenceId] = set()
        self.reservations: list[Reservation] = []
        self.lent: list[tuple[tuple[int, ...], list[int]]] = []  # pages of a prefix, the tokens that they hold
        self.rooms: list[tuple[PrefixRoom, list[int]]] = []
        self.num_named = 0

    def make(self, prompt: list[int], max_tokens: int, hold_kv: bool = False) -> SequenceSpec:
        self.num_named += 1
        max_tokens = min(max_tokens, 18 - len(prompt))
        one = spec(f"s{self.num_named}", prompt, hold_kv, max_tokens=max_tokens)
        self.specs[one.sequence_id] = one
        return one

    @rule(prompt=PROMPTS, max_tokens=st.integers(1, 8), hold_kv=st.booleans())
    def add(self, prompt: list[int], max_tokens: int, hold_kv: bool) -> None:
        one = self.make(prompt, max_tokens, hold_kv)
        self.bench.add(one)
        self.queued.append(one.sequence_id)

    @rule(prompt=PROMPTS, max_tokens=st.integers(2, 8))
    def reserve(self, prompt: list[int], max_tokens: int) -> None:
        one = self.make(prompt, max_tokens)
        reservation = self.bench.scheduler.reserve(one)
        if reservation is None:
            del self.specs[one.sequence_id]
        else:
            self.reservations.append(reservation)

    @precondition(lambda self: self.reservations)
    @rule(data=st.data(), arrives=st.booleans())
    def settle(self, data: st.DataObject, arrives: bool) -> None:
        reservation = self.reservations.pop(data.draw(st.integers(0, len(self.reservations) - 1)))
        if arrives:
            self.bench.receive(reservation)
        else:
            self.bench.scheduler.cancel(reservation)
            del self.specs[reservation.sequence_id]

    @rule(tokens=PROMPTS)
    def lend_prefix(self, tokens: list[int]) -> None:
        pages = self.bench.scheduler.lend_prefix(page_hashes(tokens, PAGE_SIZE))
        self.lent.append((pages, tokens[: len(pages) * PAGE_SIZE]))

    @precondition(lambda self: self.lent)
    @rule(data=st.data())
    def give_back(self, data: st.DataObject) -> None:
        self.end_loan(data.draw(st.integers(0, len(self.lent) - 1)))

    @rule(tokens=PROMPTS)
    def expect_prefix(self, tokens: list[int]) -> None:
        names = page_hashes(tokens, PAGE_SIZE)
        num_known = self.bench.scheduler.num_known_pages(names)
        room = self.bench.scheduler.expect_prefix(names, num_known)
        if room is not None:
            assert room.num_cached_pages == num_known
            assert len(room.page_ids) == len(names)
            self.rooms.append((room, tokens[: len(names) * PAGE_SIZE]))

    @precondition(lambda self: self.rooms)
    @rule(data=st.data(), arrives=st.booleans())
    def end_room(self, data: st.DataObject, arrives: bool) -> None:
        room, tokens = self.rooms.pop(data.draw(st.integers(0, len(self.rooms) - 1)))
        self.bench.model.check(room.page_ids, tokens, room.num_cached_pages * PAGE_SIZE)
        if not arrives:
            self.bench.scheduler.take_back(room.page_ids)
            return
        self.bench.model.store(room.page_ids, tokens, room.num_cached_pages * PAGE_SIZE)
        self.bench.scheduler.adopt(room)
        assert self.bench.scheduler.num_known_pages(room.page_hashes) == len(room.page_hashes)

    @precondition(lambda self: self.specs)
    @rule(data=st.data())
    def abort(self, data: st.DataObject) -> None:
        sequence_id = data.draw(st.sampled_from(sorted(self.specs)))
        if self.bench.scheduler.abort(sequence_id):
            self.forget(sequence_id)

    @precondition(lambda self: self.held)
    @rule(data=st.data())
    def release(self, data: st.DataObject) -> None:
        self.let_go(data.draw(st.sampled_from(sorted(self.held))))

    @rule(num_steps=st.integers(1, 6))
    def steps(self, num_steps: int) -> None:
        for _ in range(num_steps):
            self.step()

    @invariant()
    def the_books_are_right(self) -> None:
        self.bench.allocator.check_integrity()

    def end_loan(self, index: int) -> None:
        pages, tokens = self.lent.pop(index)
        self.bench.model.check(pages, tokens, len(tokens))  # nobody wrote them meanwhile
        self.bench.scheduler.take_back(pages)

    def step(self) -> bool:
        had_work = self.bench.scheduler.has_work
        plan = self.bench.step()
        if plan is None:
            return False
        assert had_work, "has_work was False and there was a plan"
        assert plan.num_tokens <= 5
        assert 1 <= len(plan.items) <= 3
        assert all(len(item.token_ids) <= 4 for item in plan.items)
        sizes = [len(item.token_ids) == 1 and item.samples for item in plan.items]
        assert sizes == sorted(sizes, reverse=True), "decode items come first"
        for started in plan.started:
            if started.spec.sequence_id in self.queued:
                assert self.queued.pop(0) == started.spec.sequence_id, "the head of the queue was overtaken"
        for chunk in self.bench.chunks[-len(plan.items) :]:
            if chunk.sequence_id in self.specs and self.specs[chunk.sequence_id].hold_kv:
                self.held.add(chunk.sequence_id)
        return True

    def forget(self, sequence_id: SequenceId) -> None:
        del self.specs[sequence_id]
        self.held.discard(sequence_id)
        if sequence_id in self.queued:
            self.queued.remove(sequence_id)

    def let_go(self, sequence_id: SequenceId) -> None:
        assert self.bench.scheduler.release(sequence_id)
        assert self.bench.outputs[sequence_id] == expected(self.specs[sequence_id])[:1]
        self.forget(sequence_id)

    def teardown(self) -> None:
        for reservation in self.reservations:
            self.bench.receive(reservation)
        while self.lent:
            self.end_loan(0)
        for room, _ in self.rooms:
            self.bench.scheduler.take_back(room.page_ids)
        for _ in range(5000):
            if not self.step():
                if not self.held:
                    break
                self.let_go(min(self.held))
        for sequence_id, one in self.specs.items():
            assert self.bench.outputs.get(sequence_id) == expected(one), f"{sequence_id} starved or went astray"
        assert self.bench.allocator.whole()
        load = self.bench.scheduler.load()
        assert (load.num_running, load.num_waiting, load.num_held, load.num_reserved) == (0, 0, 0, 0)
        assert load.num_lent == 0


SchedulerMachine.TestCase.settings = settings(max_examples=150, stateful_step_count=40, deadline=None, derandomize=True)
TestSchedulerMachine = SchedulerMachine.TestCase


# ---- lending ----


def test_lent_pages_are_nobodys_until_they_are_back() -> None:
    bench = Bench(num_pages=16)

    lent = bench.scheduler.lend(3)

    assert len(set(lent)) == 3
    assert bench.scheduler.load().num_lent == 3
    assert bench.allocator.num_free == 13
    bench.scheduler.take_back(lent)
    assert bench.allocator.whole()
    assert bench.scheduler.load().num_lent == 0


def test_at_most_a_quarter_of_what_nobody_waits_for_is_lent() -> None:
    bench = Bench(num_pages=16)
    assert len(bench.scheduler.lend(100)) == 4
    assert len(bench.scheduler.lend(100)) == 3

    full = Bench(num_pages=4)
    full.add(spec("a", [1] * 6, max_tokens=2))
    full.step()
    assert full.scheduler.lend(1) == (), "the last free page is for the sequence to grow into"


def test_lending_never_takes_a_page_of_a_sequence_or_what_the_queue_waits_for() -> None:
    bench = Bench(num_pages=16)
    bench.add(spec("a", [1] * 9, max_tokens=3))
    bench.add(spec("b", [2] * 9, max_tokens=3))
    bench.step()
    lent = [page for _ in range(20) for page in bench.scheduler.lend(8)]

    bench.drain()

    assert [len(tokens) for tokens in bench.outputs.values()] == [3, 3]
    assert lent, "so the sequences ran beside lent pages"
    assert bench.scheduler.load().num_preemptions == 0
    bench.scheduler.take_back(lent)
    assert bench.allocator.whole()


def test_cached_prefixes_are_lent_only_when_no_page_is_empty() -> None:
    bench = Bench(num_pages=4)
    bench.add(spec("a", [1, 2, 3, 4], max_tokens=1))
    bench.drain()
    num_cached = bench.allocator.num_cached
    assert num_cached >= 1

    lent = [*bench.scheduler.lend(1), *bench.scheduler.lend(1)]

    assert bench.allocator.num_cached == num_cached
    bench.scheduler.take_back(lent)


def test_a_sequence_that_waits_for_lent_pages_starts_when_they_are_back() -> None:
    bench = Bench(num_pages=4)
    lent = bench.scheduler.lend(4)
    bench.add(spec("a", [1] * 7, max_tokens=1))
    assert bench.scheduler.plan_step(0.0) is None
    assert not bench.scheduler.has_work

    bench.scheduler.take_back(lent)

    assert bench.scheduler.has_work
    bench.drain()
    assert bench.allocator.whole()


# ---- prefixes from and for other workers ----


def cached(bench: Bench, tokens: Sequence[int]) -> None:
    """Compute a prompt, whose full pages stay in the prefix cache."""
    bench.add(spec(f"warm-{len(bench.outputs)}", tokens, max_tokens=1))
    bench.drain()


def names(tokens: Sequence[int], salt: bytes = b"") -> tuple[PageHash, ...]:
    return page_hashes(tokens, PAGE_SIZE, salt)


TURN = [1, 2, 3, 4, 5, 6, 1, 1]


def test_a_lent_prefix_is_not_evicted_until_it_is_back() -> None:
    bench = Bench(num_pages=8)
    cached(bench, TURN[:6])
    lent = bench.scheduler.lend_prefix(names(TURN))
    assert len(lent) == 3
    assert bench.scheduler.load().num_lent == 3

    bench.add(spec("wants all", [5] * 15, max_tokens=1))
    assert bench.step() is None, "five pages are left, and eight are needed"
    bench.model.check(lent, TURN, 6)
    bench.scheduler.take_back(lent)

    bench.drain()
    assert bench.outputs[SequenceId("wants all")] == expected(spec("", [5] * 15, max_tokens=1))
    assert bench.allocator.whole()


def test_only_the_beginning_that_is_cached_is_lent_and_no_other_tenants() -> None:
    bench = Bench()
    cached(bench, TURN[:6])
    assert len(bench.scheduler.lend_prefix(names([*TURN[:4], 6, 6]))) == 2
    assert bench.scheduler.lend_prefix(names(TURN)[3:]) == ()
    assert len(bench.scheduler.lend_prefix(names(TURN)[1:])) == 2, "from the first page that is named"
    assert bench.scheduler.lend_prefix(names(TURN, salt=b"another")) == ()


def test_of_a_prefix_half_of_what_sequences_leave_is_lent() -> None:
    bench = Bench(num_pages=6)
    cached(bench, TURN[:6])
    bench.add(spec("runs", [2] * 4, max_tokens=8))
    bench.step()
    assert bench.allocator.num_free == 4

    lent = bench.scheduler.lend_prefix(names(TURN))

    assert len(lent) == 2, "one of four is for the sequence to grow, and half of the others for those that come"
    assert bench.scheduler.lend_prefix(names(TURN)[:2]) == lent, "which costs nothing more"
    bench.scheduler.take_back(lent)
    bench.scheduler.take_back(lent)
    bench.drain()
    assert bench.allocator.whole()

    full = Bench(num_pages=4)
    cached(full, TURN[:4])
    full.add(spec("runs", [2] * 5, max_tokens=3))
    full.step()
    assert full.allocator.num_free == 1
    assert full.scheduler.lend_prefix(names(TURN)) == ()


def test_what_arrives_in_a_room_is_found_by_the_next_sequence_and_told_to_the_gateways() -> None:
    bench = Bench()
    cached(bench, TURN[:4])
    bench.allocator.take_changes()
    room = bench.scheduler.expect_prefix(names(TURN), num_known=2)
    assert room is not None
    assert (room.num_cached_pages, len(room.missing)) == (2, 2)
    assert bench.allocator.take_changes().stored == (), "nothing has arrived yet"
    bench.model.store(room.page_ids, TURN, 4)

    bench.scheduler.adopt(room)

    assert bench.allocator.take_changes().stored == names(TURN)[2:]
    assert bench.scheduler.load().num_lent == 0
    bench.add(one := spec("next turn", [*TURN, 3], max_tokens=2))
    plan = bench.step()
    assert plan is not None
    assert plan.started[0].num_cached_tokens == len(TURN)
    bench.drain()
    assert bench.outputs[one.sequence_id] == expected(one)
    assert bench.allocator.whole()


def test_a_room_whose_pages_never_came_leaves_nothing_behind() -> None:
    bench = Bench()
    cached(bench, TURN[:4])
    room = bench.scheduler.expect_prefix(names(TURN), num_known=2)
    assert room is not None

    bench.scheduler.take_back(room.page_ids)

    assert bench.allocator.whole()
    assert bench.scheduler.num_known_pages(names(TURN)) == 2


def test_pages_that_were_computed_here_meanwhile_stay_the_known_ones() -> None:
    bench = Bench()
    room = bench.scheduler.expect_prefix(names(TURN), num_known=0)
    assert room is not None
    cached(bench, TURN)
    bench.model.store(room.page_ids, TURN, 0)

    bench.scheduler.adopt(room)

    assert bench.allocator.num_cached == 4
    assert bench.allocator.whole()
    bench.allocator.check_integrity()
    late = bench.scheduler.expect_prefix(names(TURN), num_known=0)
    assert late is not None
    assert late.missing == ()
    bench.scheduler.take_back(late.page_ids)


def test_there_is_no_room_where_sequences_need_it_or_where_the_known_part_is_gone() -> None:
    bench = Bench(num_pages=6)
    assert bench.scheduler.expect_prefix(names(TURN), num_known=1) is None, "page 0 was evicted since"
    bench.add(spec("runs", [2] * 4, max_tokens=4))
    bench.step()
    bench.add(spec("waits", [3] * 7, max_tokens=1))
    assert bench.scheduler.expect_prefix(names(TURN), num_known=0) is None
    bench.drain()
    assert bench.allocator.whole()
    without = Bench(prefix_cache=False)
    assert without.scheduler.expect_prefix(names(TURN), num_known=0) is None
