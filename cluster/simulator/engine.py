"""An engine whose steps take virtual time: the real scheduler and page allocator, no model.

The life of a step is Engine.step's (engine/engine.py), and calls run between steps as on EngineThread:

    plan_step ──> the listener hears of it ──> StepCost says how long ──> commit_step ──> listener ──> calls ──> ...

Decoding is lazy. While every sequence of a batch decodes and none can end, start or be preempted, nobody could notice a
step; such steps are planned and committed when somebody looks, at the instants at which they would have been. So a
thousand workers wake up for what happens, not for every token, and the scheduler still plans each of them.

Invariants: ``now`` of every call of the scheduler is the instant at which an engine would have made it; a call that
was submitted during a step runs at that step's end; whatever a step brings that anyone could hear of (a first or a last
token, a chunk of a prompt, a preemption) happens at its instant, by a timer.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable, Sequence
from typing import Protocol

from cluster.simulator.answers import AnswerBook, Sampler
from cluster.simulator.shared_device import SharedDevice
from cluster.simulator.step_cost import PromptChunk, StepCost, step_seconds
from core.compute import StepSample
from core.errors import InvalidConfig
from core.prefix_hash import PageHash
from core.request import SequenceId, SequenceSpec, TokenChunk
from engine.chunked_prefill import ChunkedPrefillScheduler
from engine.config import APART_MODES, EngineConfig
from engine.page_allocator import PageAllocator
from engine.scheduler import PrefixRoom, Reservation
from engine.step_plan import StepPlan

_MAX_SAMPLES = 64  # as many as a report of a real worker has
_NO_PROMPTS = (0, 0.0)

_Sample = tuple[int, float, int, int, float]  # the fields of a StepSample
Call = Callable[[], None]


class StepListener(Protocol):
    """Hears of every step that may matter to anyone, at its instant; of lazy ones only ``step_ended``, later."""

    def step_begun(self, plan: StepPlan, begins_at: float, ends_at: float) -> None:
        """This is computed from now on. Not called for steps that only decode."""
        ...

    def step_ended(self, chunks: Sequence[TokenChunk]) -> None:
        """These tokens were made; those of sequences that ended have left the engine."""
        ...


class SimulatedEngine:
    """One scheduler and one allocator on the loop's virtual time. ``config.num_pages`` is set."""

    def __init__(
        self,
        loop: asyncio.AbstractEventLoop,
        config: EngineConfig,
        cost: StepCost,
        max_model_len: int,
        answers: AnswerBook,
        listener: StepListener,
        device: SharedDevice | None = None,
    ) -> None:
        """``device``: on which others compute as well; None: it has one to itself."""
        assert config.num_pages is not None, "a simulated pool has a size"
        if config.colocated_mode in APART_MODES:
            raise InvalidConfig(
                "engine.colocated_mode",
                f"must be chunked in a simulation, whose steps follow one another, got {config.colocated_mode}",
            )
        self.allocator = PageAllocator(config.num_pages, config.page_size, config.prefix_cache)
        seconds = step_seconds(cost.seen(config.step_tokens))
        self.scheduler = ChunkedPrefillScheduler(config, self.allocator, max_model_len, costs=lambda: seconds)
        self._loop = loop
        self._cost = cost
        self._max_len = min(max_model_len, config.num_pages * config.page_size)
        self._answers = answers
        self._listener = listener
        self._sampler = Sampler()
        self._device = device
        self._in_line = False  # for a turn on the device
        self._has_turn = False
        self._silent: set[SequenceId] = set()  # whose first token was not made yet, or not here
        self._calls: deque[Call] = deque()  # to be made when the step has ended
        self._plan: StepPlan | None = None  # None: idle, paused, or within ``_finish_step``
        self._at = 0.0
        self._begun_at = 0.0
        self._ends_at = 0.0
        self._batch = 0
        self._context_tokens = 0
        self._prompts = _NO_PROMPTS  # of the present step: tokens, and pairs of tokens that attend
        self._num_quiet = 0  # steps from the present one on whose end nobody can notice
        self._between_steps = False
        self._paused_until = 0.0
        self._timer: asyncio.TimerHandle | None = None
        self._busy_s = 0.0
        self._stopped = False
        self._samples: deque[_Sample] | None = None  # None: nobody wants them

    # ---- what comes in ----

    def submit(self, call: Call) -> None:
        """Make ``call`` between two steps: now, if none is being computed. Nothing happens on a stopped engine."""
        if self._stopped:
            return
        if self._between_steps:
            self._calls.append(call)
            return
        self.settle()
        self._calls.append(call)
        self._wake()
        self._arm()

    def add(self, spec: SequenceSpec, arrived_at: float | None = None) -> None:
        """Queue a sequence that waits since ``arrived_at`` (None: now); to be submitted. Raises ``InvalidRequest``."""
        self.scheduler.add(spec, self._now if arrived_at is None else arrived_at)
        self._sampler.begin(spec, len(spec.output_token_ids), self._answers.of(spec))
        self._silent.add(spec.sequence_id)

    def admit(self, reservation: Reservation, first_token_ids: Sequence[int], arrived_at: float | None = None) -> None:
        """Go on with a sequence whose K/V has arrived, at ``arrived_at`` (None: now); to be submitted."""
        self.scheduler.admit(reservation, first_token_ids, self._now if arrived_at is None else arrived_at)
        spec = reservation.spec
        self._sampler.begin(spec, len(spec.output_token_ids) + len(first_token_ids), self._answers.of(spec))
        self._silent.add(spec.sequence_id)

    def abort(self, sequence_id: SequenceId) -> bool:
        """Forget a sequence in any state; to be submitted. False if it is unknown."""
        self._leave(sequence_id)
        return self.scheduler.abort(sequence_id)

    def release(self, sequence_id: SequenceId) -> bool:
        """Drop the pages of a held sequence; to be submitted. False if it is not held."""
        self._leave(sequence_id)
        return self.scheduler.release(sequence_id)

    def reserve(self, spec: SequenceSpec) -> Reservation | None:
        """Take pages for K/V from outside, now, whether a step is being computed or not; None: there are none."""
        if self._stopped:
            return None
        self.settle()
        reservation = self.scheduler.reserve(spec)
        if reservation is not None:
            self._pages_taken()
        return reservation

    def num_known_pages(self, names: Sequence[PageHash]) -> int:
        """How many of these pages, from the first on, are cached here, now."""
        self.settle()
        return self.scheduler.num_known_pages(names)

    def lend_prefix(self, names: Sequence[PageHash]) -> tuple[int, ...]:
        """Those of these pages, from the first on, that are cached here and can be spared, now."""
        self.settle()
        lent = self.scheduler.lend_prefix(names)
        self._pages_taken()
        return lent

    def expect_prefix(self, names: Sequence[PageHash], num_known: int) -> PrefixRoom | None:
        """Room for a prefix of which ``num_known`` pages are cached here, now; None: there is none."""
        if self._stopped:
            return None
        self.settle()
        room = self.scheduler.expect_prefix(names, num_known)
        self._pages_taken()
        return room

    def adopt(self, room: PrefixRoom) -> None:
        """What a room waited for is stored: it is found from now on."""
        if self._stopped:
            return
        self.settle()
        self.scheduler.adopt(room)
        self.submit(_nothing)  # a queue that waits for pages looks again

    def pause(self, seconds: float) -> None:
        """Compute nothing for so long, from the end of the present step on."""
        self.submit(lambda: self._pause_until(self._now + seconds))

    def stop(self) -> None:
        """Compute nothing more."""
        self.settle()
        self._stopped = True
        self._give_turn_back()
        self._calls.clear()
        self._cancel_timer()

    # ---- what can be asked ----

    @property
    def busy_s(self) -> float:
        """Seconds in which steps were computed, up to now."""
        computing = min(self._loop.time(), self._ends_at) - self._begun_at if self._plan is not None else 0.0
        return self._busy_s + max(0.0, computing)

    def positions(self) -> dict[SequenceId, int]:
        """Output tokens that exist by now, of each sequence in the batch."""
        self.settle()
        items = self._plan.items if self._plan is not None else ()
        return {item.sequence_id: item.position for item in items}

    def position(self, sequence_id: SequenceId) -> int | None:
        """Output tokens that exist by now of a sequence in the batch; None if it is not in it."""
        self.settle()
        items = self._plan.items if self._plan is not None else ()
        return next((item.position for item in items if item.sequence_id == sequence_id), None)

    def keep_samples(self) -> None:
        """From now on, for ``take_samples``."""
        self._samples = deque(maxlen=_MAX_SAMPLES)

    def take_samples(self) -> tuple[StepSample, ...]:
        """What the latest steps held and took, since this was called last."""
        if not self._samples:
            return ()
        taken = tuple(StepSample(*sample) for sample in self._samples)
        self._samples.clear()
        return taken

    def settle(self) -> None:
        """Make the steps that have ended by now."""
        if self._between_steps or self._stopped:
            return
        now = self._loop.time()
        while self._plan is not None and self._ends_at <= now:
            self._finish_step(self._plan)

    # ---- steps ----

    @property
    def _now(self) -> float:
        """The instant of what happens between two steps; of lazy ones it is earlier than the loop's."""
        return self._at if self._between_steps else self._loop.time()

    def _finish_step(self, plan: StepPlan) -> None:
        at = self._at = self._ends_at
        self._busy_s += at - self._begun_at
        self._plan = None
        chunks = self.scheduler.commit_step(plan, self._sampler, at)
        if self._num_quiet > 0:
            self._num_quiet -= 1
        else:
            self._between_steps = True
            for chunk in chunks:
                if chunk.stats is not None:
                    self._silent.discard(chunk.sequence_id)
            ended = [chunk.sequence_id for chunk in chunks if chunk.finish_reason is not None]
            self._sampler.end(ended)
            self._listener.step_ended(chunks)
            self._between_steps = False
            self._give_turn_back()
            self._make_calls()
        self._begin(at)

    def _make_calls(self) -> None:
        self._between_steps = True
        while self._calls:
            self._calls.popleft()()
        self._between_steps = False

    def _wake(self) -> None:
        """Go on if nothing is being computed and nothing forbids it."""
        now = self._loop.time()
        if self._plan is None and now >= self._paused_until:
            self._at = now
            self._make_calls()
            self._begin(now)

    def _begin(self, at: float) -> None:
        """Plan the next step and say when it ends; idle if there is none, or if it is not this engine's turn."""
        if at < self._paused_until or not self.scheduler.has_work or not self._take_turn():
            return
        plan = self.scheduler.plan_step(at)
        if plan is None:
            self._give_turn_back()
            return
        quiet = self._num_quiet > 0
        if quiet:
            self._prompts = _NO_PROMPTS
            self._context_tokens += self._batch
            seconds = self._cost.step_s((), self._batch, self._context_tokens)
        else:
            seconds = self._seconds_of(plan)
        if self._samples is not None:
            self._samples.append((*self._prompts, self._batch, self._context_tokens, seconds))
        self._plan = plan
        self._begun_at, self._ends_at = at, at + seconds
        if self._batch < len(plan.items):
            self._listener.step_begun(plan, at, self._ends_at)

    def _seconds_of(self, plan: StepPlan) -> float:
        started = {sequence.spec.sequence_id for sequence in plan.started}
        chunks: list[PromptChunk] = []
        batch = context_tokens = 0
        for item in plan.items:
            if item.start >= item.num_prompt_tokens and len(item.token_ids) == 1 and item.sequence_id not in started:
                batch += 1
                context_tokens += item.start + 1
            else:
                chunks.append(PromptChunk(len(item.token_ids), item.start, item.sequence_id in started))
        self._batch, self._context_tokens = batch, context_tokens
        self._prompts = _NO_PROMPTS
        if chunks and self._samples is not None:
            pairs = sum(chunk.num_tokens * (chunk.start + chunk.num_tokens / 2) for chunk in chunks)
            self._prompts = (sum(chunk.num_tokens for chunk in chunks), pairs)
        return self._cost.step_s(chunks, batch, context_tokens)

    # ---- when to wake up ----

    def _pages_taken(self) -> None:
        """Fewer pages are free: somebody may be preempted earlier."""
        plan = self._plan
        if self._between_steps or self._stopped or plan is None:
            return
        if self._num_quiet > self._steps_without_preemption(len(plan.items)):
            self._arm()

    def _arm(self) -> None:
        """Wake up no later than at the end of the first step that somebody could notice."""
        plan = self._plan
        if plan is None:
            self._num_quiet = 0
            if self._calls or (self.scheduler.has_work and self._loop.time() < self._paused_until):
                self._wake_at(max(self._paused_until, self._loop.time()))
            else:
                self._cancel_timer()
            return
        self._num_quiet = 0 if self._calls else self._quiet_steps(plan)
        # A batch's steps get longer with its context, never shorter: this is not later than what it stands for.
        self._wake_at(self._ends_at + self._num_quiet * (self._ends_at - self._begun_at))

    def _wake_at(self, at: float) -> None:
        if self._timer is not None:
            if self._timer.when() == at:
                return
            self._timer.cancel()
        self._timer = self._loop.call_at(at, self._on_timer)

    def _quiet_steps(self, plan: StepPlan) -> int:
        """How many steps, the present one first, end without anything that anyone could hear of."""
        items = plan.items
        if self._device is not None:
            return 0  # when a step ends is noticed by whoever has the next turn
        # The youngest are the last ones, and mostly those that nobody has heard of.
        if self._batch < len(items) or any(item.sequence_id in self._silent for item in reversed(items)):
            return 0
        # The step that makes a last token is noticed.
        max_len = self._max_len
        steps = -1 + min(
            [
                min(max_len, item.num_prompt_tokens + (item.sampling.max_tokens or max_len)) - len(item.known_token_ids)
                for item in items
            ]
        )
        return max(0, min(steps, self._steps_without_preemption(len(items))))

    def _steps_without_preemption(self, batch: int) -> int:
        """While every sequence can have a page more at each border, none is preempted."""
        return (self.allocator.num_free // batch - 1) * self.allocator.page_size

    def _on_timer(self) -> None:
        self._timer = None
        self.settle()
        if not self._stopped:
            self._wake()
            self._arm()

    # ---- turns on a shared device ----

    def _take_turn(self) -> bool:
        """Is it this engine's turn? If not it stands in line."""
        if self._device is None or self._has_turn:
            return True
        if not self._in_line:
            self._has_turn = self._device.try_take(self._on_turn)
            self._in_line = not self._has_turn
        return self._has_turn

    def _give_turn_back(self) -> None:
        if self._device is not None and self._has_turn:
            self._has_turn = False
            self._device.give_back()

    def _on_turn(self) -> None:
        self._in_line, self._has_turn = False, True
        if not self._stopped:
            self._wake()
        if self._plan is None:
            self._give_turn_back()
        if not self._stopped:
            self._arm()

    def _cancel_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _pause_until(self, at: float) -> None:
        self._paused_until = max(self._paused_until, at)

    def _leave(self, sequence_id: SequenceId) -> None:
        self._sampler.end((sequence_id,))
        self._silent.discard(sequence_id)


def _nothing() -> None:
    pass
