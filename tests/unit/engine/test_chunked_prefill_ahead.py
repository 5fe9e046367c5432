"""Steps planned before the tokens of the one before are known: the same tokens, and no page freed too early."""

from __future__ import annotations

from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st

from core.request import SamplingParams, SequenceId, SequenceSpec
from engine.chunked_prefill import ChunkedPrefillScheduler
from engine.config import EngineConfig
from engine.page_allocator import PageAllocator
from engine.step_plan import SampledToken, StepPlan

PAGE_SIZE = 4
STOP = 3


def next_token(tokens: list[int]) -> int:
    """A model that depends on everything before, and now and then says STOP."""
    return (sum((i + 1) * token for i, token in enumerate(tokens)) * 7 + len(tokens)) % 23


class Loop:
    """What an engine does with its scheduler; with ``ahead``, one step ahead of the tokens that it knows."""

    def __init__(self, ahead: bool, num_pages: int = 32, **config: int) -> None:
        self.allocator = PageAllocator(num_pages, PAGE_SIZE, prefix_cache=True)
        limits: dict[str, Any] = {"max_batch_size": 4, "max_batch_tokens": 8, **config}
        self.scheduler = ChunkedPrefillScheduler(EngineConfig(**limits), self.allocator, 1000, ())
        self.ahead = ahead
        self.outputs: dict[str, list[int]] = {}

    def add(self, name: str, prompt: list[int], max_tokens: int, *, hold_kv: bool = False) -> None:
        sampling = SamplingParams(seed=1, max_tokens=max_tokens, stop_token_ids=(STOP,), ignore_eos=True)
        self.scheduler.add(SequenceSpec(SequenceId(name), tuple(prompt), sampling, hold_kv=hold_kv), 0.0)
        self.outputs[name] = []

    def sample(self, plan: StepPlan, before: list[int]) -> list[int]:
        """What the device samples, which knows the tokens of the step before."""
        tokens = []
        for item in plan.items:
            row = item.pending_row
            known = list(item.known_token_ids) + ([] if row is None else [before[row]])
            assert item.position == len(known) - item.num_prompt_tokens
            if row is None:
                assert item.token_ids == tuple(known[item.start : item.start + len(item.token_ids)])
            assert len(item.page_ids) * PAGE_SIZE >= item.start + len(item.token_ids)
            if item.samples:
                assert item.start + len(item.token_ids) == len(known)
                tokens.append(next_token(known))
        return tokens

    def commit(self, plan: StepPlan, tokens: list[int]) -> None:
        sampled = {
            item.sequence_id: SampledToken(token) for item, token in zip(plan.sampling_items, tokens, strict=True)
        }
        for chunk in self.scheduler.commit_step(plan, sampled, 0.0):
            self.outputs[chunk.sequence_id] += chunk.token_ids

    def drain(self) -> dict[str, list[int]]:
        under_way: tuple[StepPlan, list[int]] | None = None
        for _ in range(2000):
            if under_way is None:
                plan = self.scheduler.plan_step(0.0)
                if plan is None:
                    break
                under_way = plan, self.sample(plan, [])
            plan, tokens = under_way
            following = self.scheduler.plan_ahead(plan, 0.0) if self.ahead else None
            under_way = None if following is None else (following, self.sample(following, tokens))
            self.commit(plan, tokens)
        assert not self.scheduler.has_work
        assert self.allocator.whole()
        return self.outputs


PROMPTS = st.lists(st.lists(st.integers(0, 20), min_size=1, max_size=20), min_size=1, max_size=7)


@given(PROMPTS, st.integers(1, 9), st.integers(8, 20), st.integers(3, 12))
@settings(max_examples=60)
def test_planning_ahead_changes_no_token(
    prompts: list[list[int]], max_tokens: int, num_pages: int, batch_tokens: int
) -> None:
    outputs = []
    for ahead in (False, True):
        loop = Loop(ahead, num_pages, max_batch_tokens=batch_tokens, max_batch_size=3)
        for number, prompt in enumerate(prompts):
            loop.add(str(number), prompt, max_tokens)
        outputs.append(loop.drain())
    assert outputs[0] == outputs[1]


def test_a_decoding_sequence_goes_on_with_the_token_that_is_being_sampled() -> None:
    loop = Loop(ahead=True)
    loop.add("a", [5, 6, 7], 4)
    loop.add("b", [8, 9], 4)
    plan = loop.scheduler.plan_step(0.0)
    assert plan is not None

    ahead = loop.scheduler.plan_ahead(plan, 0.0)

    assert ahead is not None
    assert [(item.sequence_id, item.start, item.pending_row, item.position) for item in ahead.items] == [
        ("a", 3, 0, 1),
        ("b", 2, 1, 1),
    ]


def test_what_surely_ends_is_not_planned_and_what_waits_is_started() -> None:
    loop = Loop(ahead=True, max_batch_size=3)
    loop.add("last token", [5], 1)
    loop.add("held", [6], 4, hold_kv=True)
    plan = loop.scheduler.plan_step(0.0)
    assert plan is not None
    loop.add("new", [7, 8], 4)

    ahead = loop.scheduler.plan_ahead(plan, 0.0)

    assert ahead is not None
    assert [item.sequence_id for item in ahead.items] == ["new"]
    assert [started.spec.sequence_id for started in ahead.started] == ["new"]


def test_nothing_is_planned_ahead_that_needs_a_preemption() -> None:
    loop = Loop(ahead=True, num_pages=3)
    loop.add("a", [5, 6, 7], 9)
    loop.add("b", [8], 9)
    plan = loop.scheduler.plan_step(0.0)
    assert plan is not None
    taken = loop.allocator.allocate(loop.allocator.num_free)
    assert taken is not None
    loop.commit(plan, loop.sample(plan, []))
    plan = loop.scheduler.plan_step(0.0)  # the fourth token of "a" fits its page, the fifth does not
    assert plan is not None

    assert loop.scheduler.plan_ahead(plan, 0.0) is None

    loop.allocator.release(taken)
    loop.commit(plan, loop.sample(plan, []))
    loop.drain()


def test_pages_of_what_ends_are_freed_when_the_step_ahead_is_over() -> None:
    loop = Loop(ahead=True)
    loop.add("a", [5, 6, 7], 6)
    plan = loop.scheduler.plan_step(0.0)
    assert plan is not None
    ahead = loop.scheduler.plan_ahead(plan, 0.0)
    assert ahead is not None
    free = loop.allocator.num_free

    loop.commit(plan, [STOP])
    assert loop.allocator.num_free == free
    loop.commit(ahead, [1])

    assert loop.outputs["a"] == [STOP]
    assert loop.allocator.whole()


def test_a_step_that_is_dropped_frees_what_left_meanwhile() -> None:
    loop = Loop(ahead=True)
    loop.add("a", [5, 6, 7], 6)
    plan = loop.scheduler.plan_step(0.0)
    assert plan is not None
    ahead = loop.scheduler.plan_ahead(plan, 0.0)
    assert ahead is not None
    loop.scheduler.abort(SequenceId("a"))
    loop.commit(plan, [1])
    assert not loop.allocator.whole()

    loop.scheduler.drop_step(ahead)

    assert loop.allocator.whole()


def test_a_sequence_that_was_queued_anew_takes_no_token_of_its_former_self() -> None:
    loop = Loop(ahead=True)
    loop.add("a", [5, 6, 7], 6)
    plan = loop.scheduler.plan_step(0.0)
    assert plan is not None
    ahead = loop.scheduler.plan_ahead(plan, 0.0)
    assert ahead is not None
    loop.scheduler.abort(SequenceId("a"))
    loop.commit(plan, [1])
    loop.add("a", [9, 9], 2)
    anew = loop.scheduler.plan_ahead(ahead, 0.0)
    assert anew is not None

    loop.commit(ahead, [2])

    assert loop.outputs["a"] == []
    loop.commit(anew, [4])
    assert loop.outputs["a"] == [4]
