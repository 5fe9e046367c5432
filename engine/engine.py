"""One model on one device: what to compute next, compute it, choose tokens, book them.

The life of a step (``Engine.step``):
1. The scheduler plans it: which tokens of which sequences, in which pages.
2. The listener hears which sequences start (with what is cached already) and what is about to be computed.
3. The runner computes it; the listener hears of each layer as soon as its K/V is stored, while later ones compute.
4. The sampler chooses a token for each sequence that has none left to compute.
5. The scheduler books the tokens and ends what is finished.

With ``engine.prefill_order: slack`` the thread that computes may do something else between two layers of a step
(``between_layers``): what others submit is run there, and a prompt that would be late after this step is computed, in
a step of its own (``step_urgent``), after which this one goes on. No more than one step is held up at a time.

With ``engine.colocated_mode: layered`` or ``partitioned`` prompts have steps of their own, and decoding goes on between
their layers, or beside them on another stream (decode_beside.py).

A GPU runs behind the host, so there the next step is planned and launched (1 to 4) before this one's tokens are
waited for (``engine.plan_ahead``): its inputs that are still being sampled are read on the device, and the GPU goes
from step to step without waiting for the host, unless launching takes as long as computing (launch_pace.py). Two
steps are under way then, never three.

Invariants:
- Single-threaded: every call comes from one thread (see engine_thread.py), except where it says otherwise. The books
  (scheduler, pages) are under a lock that is free while a step computes, so ``reserve`` and what is about prefixes of
  other workers wait for no step: a step reads and writes only pages that its plan holds.
- A step that raises fails its own sequences and no others; their pages are free, and the engine goes on. Of a model
  that is divided among ranks it ends the engine: nobody knows how far the others came.
"""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, replace
from pathlib import Path
from threading import Lock
from typing import Protocol

import torch

from core.cache_tiers import ReloadOutcome, Tier, TierState
from core.clock import Clock
from core.compute import EngineModes, StepSample
from core.errors import InvalidRequest, RankLost
from core.prefix_hash import PageHash
from core.request import Role, SequenceFailure, SequenceId, SequenceSpec
from core.request_log import about
from engine.cache_layout import CacheLayout
from engine.config import EngineConfig
from engine.decode_beside import DecodeBeside, EngineCalls, shape_of
from engine.engine_parts import EngineParts, load_parts
from engine.grammar import CompiledGrammar
from engine.launch_pace import LaunchPace
from engine.launched_step import LaunchedStep, StepOutput
from engine.model_runner import ForwardMode
from engine.page_allocator import CacheChanges
from engine.page_pool import PagePool
from engine.prefill_order import Pace
from engine.rank_steps import RankLeader
from engine.sampler import Sampled
from engine.scheduler import PrefixRoom, Reservation
from engine.step_budget import Bound
from engine.step_plan import StepItem, StepPlan

__all__ = ["Engine", "EngineLoad", "StepListener", "StepOutput"]

logger = logging.getLogger(__name__)

_MAX_SAMPLES = 64  # steps that wait to be reported; of more the latest are


@dataclass(slots=True)
class _UnderWay:
    """A step whose layers are being launched."""

    plan: StepPlan
    began_at: float
    num_layers: int = 0  # that are launched


@dataclass(frozen=True, slots=True)
class EngineLoad:
    """A snapshot for load reports; the counters run from the engine's start."""

    num_running: int
    num_waiting: int
    num_waiting_tokens: int  # known tokens that have to be computed yet, of waiting and running sequences
    pages_free: int  # free, or cached and evictable
    pages_cached: int
    pages_total: int
    prompt_tokens: int
    generated_tokens: int
    cached_tokens: int
    num_preemptions: int
    pages_lost: int = 0  # that were evicted before they were copied to a lower tier
    tiers: tuple[TierState, ...] = ()
    reloads: tuple[tuple[ReloadOutcome, int], ...] = ()


class StepListener(Protocol):
    """Hears of a step while it runs, on the engine's thread; must be quick and must not raise."""

    def sequence_started(self, spec: SequenceSpec, num_cached_tokens: int, page_ids: Sequence[int]) -> None:
        """The sequence gets its first step, or its first after a preemption. ``page_ids`` are all its pages; the
        K/V of the first ``num_cached_tokens`` tokens is in them already."""
        ...

    def step_planned(self, plan: StepPlan) -> Callable[[int], None]:
        """This is computed now. What is returned is called with 0, 1, ... when the K/V of every token of the plan is in
        its pages in ``layout.layers[0]``, ``[1]``, ...; in between another step may be planned and computed."""
        ...


class Engine:
    """A scheduler, a page allocator, a model and a sampler (engine_parts.py), joined. Made by ``load_model``.

    ``listener`` may be set once, before the first step.
    """

    def __init__(self, parts: EngineParts, clock: Clock) -> None:
        self._runner = parts.runner
        self._scheduler = parts.scheduler
        self._allocator = parts.allocator
        self._tiers = parts.tiers
        self._sampler = parts.sampler
        self._grammars = parts.grammars
        self._attention = parts.attention
        self._step_clock = parts.step_clock
        self._learns = parts.learns
        self._interrupts = parts.interrupts
        self._plans_ahead = parts.plans_ahead
        self._colocated_mode = parts.config.colocated_mode
        self._beside = self._make_beside(parts)
        self._pace = LaunchPace(parts.config.plan_ahead == "always")
        self._clock = clock
        self._books = Lock()
        self._samples: deque[StepSample] = deque(maxlen=_MAX_SAMPLES)
        self._ahead: LaunchedStep | None = None  # launched before the step before it was committed
        self._ended_at = 0.0  # the last step
        self._under_way: _UnderWay | None = None
        self._held_up_s = 0.0  # the step under way, by urgent ones
        self._num_urgent = 0
        self._unpublished: list[StepOutput] = []  # of steps between layers, that nobody was given yet
        self.model = parts.model
        self.fingerprint = parts.fingerprint
        self.listener: StepListener | None = None
        self.between_layers: Callable[[], None] | None = None  # called there, if steps may be held up
        self.wake: Callable[[], None] = lambda: None  # called by any thread when ``has_work`` may have become true
        if parts.tiers is not None:
            parts.tiers.mover.on_done = lambda: self.wake()

    def _make_beside(self, parts: EngineParts) -> DecodeBeside | None:
        if parts.streams is None:
            return None
        config, step_clock, layers = parts.config, parts.step_clock, parts.runner.pool.layout.num_layers
        calls = EngineCalls(self._plan_between, self._launch_beside, self._finish)
        return DecodeBeside(
            config.colocated_mode, parts.streams, config.tpot_slo_s, lambda: step_clock.seconds, layers, calls
        )

    @classmethod
    def load_model(
        cls,
        config: EngineConfig,
        model: str,
        clock: Clock,
        *,
        cache_dir: str | Path = "~/.cache/prfaas/models",
        leader: RankLeader | None = None,
    ) -> Engine:
        """Load ``model`` (see ``model_source.resolve``), try it out, and make an engine of it.

        ``leader``: the model is divided among the ranks of its group, of which this is the first, and which load their
        parts at the same time (rank_follower.py); None: it is whole.
        Raises ``UnsupportedModel`` with the reason, or ``InvalidConfig`` if the configuration does not suit it.
        """
        return cls(load_parts(config, model, clock, cache_dir, leader), clock)

    @property
    def pool(self) -> PagePool:
        """The K/V memory."""
        return self._runner.pool

    @property
    def layout(self) -> CacheLayout:
        """What a page holds."""
        return self.pool.layout

    # ---- sequences in and out ----

    def check(self, spec: SequenceSpec) -> None:
        """Raise ``InvalidRequest`` if this engine could never run ``spec``. Reads constants only: any thread may."""
        num_tokens, vocab_size = len(spec.prompt_token_ids) + len(spec.output_token_ids), self.model.vocab_size
        if num_tokens >= self.model.max_model_len:
            raise InvalidRequest(
                "prompt",
                f"has {num_tokens} tokens, which leaves no room for output: "
                f"a sequence holds at most {self.model.max_model_len} tokens here",
            )
        # An unknown token would fail the whole step, other people's sequences included.
        _check_vocabulary("prompt", spec.prompt_token_ids, vocab_size)
        _check_vocabulary("output_token_ids", spec.output_token_ids, vocab_size)
        _check_vocabulary("logit_bias", tuple(spec.sampling.logit_bias), vocab_size)
        if spec.sampling.grammar is not None:
            self._grammars.require()

    def compile_grammar(self, spec: SequenceSpec) -> Future[CompiledGrammar] | None:
        """Begin to compile what ``spec`` has to obey; None: nothing. From any thread. Who queues the sequence waits for
        it first and holds it until the sequence has ended, or a step waits for it. Raises ``InvalidRequest`` or gives
        it."""
        grammar = spec.sampling.grammar
        return None if grammar is None else self._grammars.require().compile(grammar)

    def add(self, spec: SequenceSpec, arrived_at: float | None = None) -> None:
        """Queue a sequence. Raises ``InvalidRequest`` for one that can never run here or is here already.

        ``arrived_at``: since when it waits, on the engine's clock, if that was before this call: calls wait for a step.
        """
        self.check(spec)
        with self._books:
            self._scheduler.add(spec, self._clock.now() if arrived_at is None else arrived_at)

    def reserve(self, spec: SequenceSpec) -> Reservation | None:
        """Take pages for K/V that will be written from outside; None while there are none to spare. From any thread."""
        self.check(spec)
        with self._books:
            return self._scheduler.reserve(spec)

    def cancel(self, reservation: Reservation) -> None:
        """Give a reservation's pages back. Only call it when nobody can write to them any more."""
        with self._books:
            self._scheduler.cancel(reservation)

    def lend(self, max_pages: int) -> tuple[int, ...]:
        """Up to ``max_pages`` pages that no sequence needs now, contents unknown; give them back soon."""
        with self._books:
            return self._scheduler.lend(max_pages)

    def take_back(self, page_ids: Sequence[int]) -> None:
        """Lent pages are back. Only call it when nobody reads or writes them any more."""
        with self._books:
            self._scheduler.take_back(page_ids)

    def num_known_pages(self, page_hashes: Sequence[PageHash]) -> int:
        """How many of these pages of a prefix, from the first on, are cached here. From any thread."""
        with self._books:
            return self._scheduler.num_known_pages(page_hashes)

    def lend_prefix(self, page_hashes: Sequence[PageHash]) -> tuple[int, ...]:
        """Those of these pages, from the first on, that are cached and can be spared, to be read. From any thread."""
        with self._books:
            return self._scheduler.lend_prefix(page_hashes)

    def expect_prefix(self, page_hashes: Sequence[PageHash], num_known: int) -> PrefixRoom | None:
        """Room for a prefix that will be written from outside after its first ``num_known`` pages; None: there is
        none to spare, or fewer are cached by now. From any thread."""
        with self._books:
            return self._scheduler.expect_prefix(page_hashes, num_known)

    def adopt(self, room: PrefixRoom) -> None:
        """What a room was made for has arrived; sequences find it from now on. From any thread."""
        with self._books:
            self._scheduler.adopt(room)

    def admit(self, reservation: Reservation, first_token_ids: Sequence[int], arrived_at: float | None = None) -> None:
        """Go on with a sequence whose K/V has arrived in its reservation's pages, at ``arrived_at``. Raises
        ``ProtocolViolation``."""
        with self._books:
            now = self._clock.now() if arrived_at is None else arrived_at
            self._scheduler.admit(reservation, first_token_ids, now)

    def release(self, sequence_id: SequenceId) -> bool:
        """Drop the pages that a sequence with ``hold_kv`` kept; False if no such sequence is held."""
        with self._books:
            return self._scheduler.release(sequence_id)

    def abort(self, sequence_id: SequenceId) -> bool:
        """Forget a sequence in any state; False if it is unknown."""
        with self._books:
            return self._scheduler.abort(sequence_id)

    # ---- steps ----

    @property
    def has_work(self) -> bool:
        """True if ``step`` may compute something; False until another call changes that."""
        beside = self._beside is not None and self._beside.is_under_way
        if self._ahead is not None or beside or self._scheduler.has_work:
            return True
        return self._tiers is not None and self._tiers.has_work(self._scheduler.num_growing)

    def step(self) -> StepOutput:
        """Compute one step, or finish the one that is under way already and launch the next."""
        current, self._ahead = self._ahead, None
        if self._tiers is not None:
            with self._books:
                self._tiers.advance(self._scheduler)
        if current is None:
            began_at = self._clock.now()
            plan = self._plan(began_at)
            if plan is None:
                beside = self._beside
                return beside.finish() if beside is not None and beside.is_under_way else StepOutput()
            launched = self._launch(plan, began_at, None)
            if isinstance(launched, StepOutput):
                return self._with_unpublished(launched)
            current = launched
        apart = self._beside is not None and (self._beside.is_under_way or _holds_prompts(current.plan))
        launches = self._plans_ahead and not apart and self._pace.launching_pays()
        failures = self._launch_ahead(current) if launches else ()
        output = self._finish(current)
        return self._with_unpublished(StepOutput(output.chunks, output.failures + failures))

    def _plan(self, now: float) -> StepPlan | None:
        """The next step; None: there is none, or decoding that is under way is to be booked before."""
        with self._books:
            plan = self._scheduler.plan_prompts(now) if self._beside is not None else None
            if plan is None and (self._beside is None or not self._beside.is_under_way):
                plan = self._scheduler.plan_step(now)
            self._send_orders()
            return plan

    def _with_unpublished(self, output: StepOutput) -> StepOutput:
        """What steps between layers brought goes first."""
        if not self._unpublished:
            return output
        outputs, self._unpublished = [*self._unpublished, output], []
        return _joined(outputs)

    def _launch_ahead(self, current: LaunchedStep) -> tuple[SequenceFailure, ...]:
        """Launch the step after ``current``, if there is one that can be planned; what failed of it."""
        began_at = self._clock.now()
        with self._books:
            plan = self._scheduler.plan_ahead(current.plan, began_at)
            self._send_orders()
        if plan is None:
            return ()
        launched = self._launch(plan, began_at, current.sampled)
        if isinstance(launched, StepOutput):
            return launched.failures
        self._ahead = launched
        return ()

    def _send_orders(self) -> None:
        """Loads that a plan has begun."""
        if self._tiers is not None:
            self._tiers.send()

    def _launch(self, plan: StepPlan, began_at: float, before: Sampled | None) -> LaunchedStep | StepOutput:
        launching_at, waited_s = self._clock.now(), self._sampler.mask_seconds
        try:
            mark = self._mark()
            sampled = self._execute(plan, before)
            waited_s = self._sampler.mask_seconds - waited_s  # beside the layers, for what comes next in any case
            launch_s = self._clock.now() - launching_at - waited_s
            if self._beside is None or not _holds_prompts(plan):  # else decoding was looked after meanwhile
                self._pace.launched(launch_s)
            if mark is None or self._beside is not None or self._interrupts:
                launch_s = 0.0
            saved_tokens = 0 if _holds_prompts(plan) else self._runner.saved_tokens
            return LaunchedStep(plan, sampled, began_at, mark=mark, saved_tokens=saved_tokens, launch_s=launch_s)
        except Exception as error:  # a model may fail in any way; others' sequences must not suffer for it
            return self._fail(plan, error)

    @torch.inference_mode()
    def _execute(self, plan: StepPlan, before: Sampled | None) -> Sampled:
        on_layer_stored = None
        if self.listener is not None:
            for started in plan.started:
                self.listener.sequence_started(started.spec, started.num_cached_tokens, started.page_ids)
            on_layer_stored = self.listener.step_planned(plan)
        if self._under_way is None:
            if self._beside is not None and _holds_prompts(plan):
                return self._execute_beside(self._beside, plan, on_layer_stored)
            if self.between_layers is not None and self._interrupts:
                return self._execute_in_layers(plan, before, on_layer_stored)
        return self._compute(plan, before, on_layer_stored)

    def _compute(
        self, plan: StepPlan, before: Sampled | None, on_layer_stored: Callable[[int], None] | None
    ) -> Sampled:
        previous = None if before is None else before.token_ids
        beside = self._under_way is not None and self._under_way.plan is not plan
        logits = self._runner.run(plan, on_layer_stored, previous, beside=beside)
        return self._sampler.launch(logits, plan.sampling_items, before)

    def _execute_in_layers(
        self, plan: StepPlan, before: Sampled | None, on_layer_stored: Callable[[int], None] | None
    ) -> Sampled:
        """As ``_compute``, and look up between two layers."""
        under_way = self._under_way = _UnderWay(plan, self._clock.now())
        between_layers = self.between_layers
        assert between_layers is not None, "the caller's condition"

        def layer_stored(index: int) -> None:
            if on_layer_stored is not None:
                on_layer_stored(index)
            under_way.num_layers = index + 1
            self._runner.keep_close()
            between_layers()

        try:
            return self._compute(plan, before, layer_stored)
        finally:
            self._under_way = None

    def _execute_beside(
        self, beside: DecodeBeside, plan: StepPlan, on_layer_stored: Callable[[int], None] | None
    ) -> Sampled:
        """Compute prompts, and look after decoding before, between and after their layers."""
        under_way = self._under_way = _UnderWay(plan, self._clock.now())

        def look() -> None:
            if self.between_layers is not None:
                self.between_layers()
            else:
                output = self.step_between()
                self._unpublished.append(output)

        def layer_stored(index: int) -> None:
            if on_layer_stored is not None:
                on_layer_stored(index)
            under_way.num_layers = index + 1
            self._runner.note_layer()
            while not self._runner.is_close():
                look()
                beside.pause()
            look()

        try:
            partition, outputs = beside.begin(plan)
            self._unpublished += outputs
            with beside.streams.prompts(partition):
                look()
                sampled = self._compute(plan, None, layer_stored)
                while not sampled.is_ready:
                    look()
                    beside.pause()
        finally:
            beside.end()
            self._under_way = None
        return sampled

    def _plan_between(self, prompts: StepPlan) -> StepPlan | None:
        with self._books:
            return self._scheduler.plan_between(prompts, self._clock.now())

    def _launch_beside(self, plan: StepPlan) -> LaunchedStep | StepOutput:
        launched = self._launch(plan, self._clock.now(), None)
        return launched if isinstance(launched, StepOutput) else replace(launched, beside=True)

    def _mark(self) -> torch.cuda.Event | None:
        """The moment at which a GPU has done all that was launched on the current stream."""
        if self.pool.device.type != "cuda":
            return None
        mark = torch.cuda.Event(enable_timing=True)
        mark.record()
        return mark

    def step_between(self) -> StepOutput:
        """Compute what cannot wait for the step under way, between its layers: urgent prompts, or decoding."""
        if self._beside is None:
            return self.step_urgent()
        under_way = self._under_way
        if under_way is None:
            return StepOutput()
        return self._with_unpublished(_joined(self._beside.look(under_way.num_layers)))

    def step_urgent(self) -> StepOutput:
        """Compute a step for prompts that cannot wait for the one under way, if there are any; between its layers."""
        held_up = self._under_way
        if held_up is None or not held_up.num_layers:
            return StepOutput()
        began_at = self._clock.now()
        share = held_up.num_layers / self.layout.num_layers
        elapsed_s = began_at - held_up.began_at - self._held_up_s
        pace = Pace(elapsed_s * (1 / share - 1), elapsed_s / share / held_up.plan.num_tokens, self._pace.step_s)
        with self._books:
            plan = self._scheduler.plan_urgent(held_up.plan, pace, began_at)
        if plan is None:
            return StepOutput()
        self._num_urgent += 1
        launched = self._launch(plan, began_at, None)
        return launched if isinstance(launched, StepOutput) else self._finish(launched)

    def _finish(self, step: LaunchedStep) -> StepOutput:
        """Wait for a step's tokens, and book them."""
        plan = step.plan
        try:
            tokens = step.sampled.read()
        except Exception as error:
            return self._fail(plan, error)
        items = plan.sampling_items
        sampled = {item.sequence_id: token for item, token in zip(items, tokens, strict=True)}
        failures = self._give_up(items, step.sampled.failed)
        with self._books:
            chunks = tuple(self._scheduler.commit_step(plan, sampled, self._clock.now()))
        now = self._clock.now()
        exact = True  # nothing else was computed in these seconds
        # Of a GPU only it knows them: a host that is late with one step's books would take the next for a short one.
        device_s = step.device_s
        if step.beside:
            seconds = now - step.began_at if device_s is None else device_s
            exact = self._note_beside(plan, seconds)
        elif self._under_way is not None:  # it holds another one up
            seconds = now - step.began_at
            self._held_up_s += seconds
        else:
            # A step that was launched ahead began when the one before it ended.
            own_s = now - max(step.began_at, self._ended_at) if device_s is None else device_s
            seconds = own_s - self._held_up_s
            self._ended_at, self._held_up_s = now, 0.0
            if self._beside is not None and self._beside.streams.overlaps and _holds_prompts(plan):
                exact = not self._beside.is_crowded
        self._pace.stepped(seconds)
        sample = _sample(step, seconds)
        self._samples.append(sample)
        if exact and self._learns:
            self._step_clock.observe(sample, step.launch_s)
        if self._tiers is not None:
            self._tiers.step(sample)
        return StepOutput(chunks, failures)

    def _give_up(self, items: Sequence[StepItem], failed: Mapping[int, str]) -> tuple[SequenceFailure, ...]:
        """End the sequences of rows that no token can be chosen for; those of the others go on."""
        failures: list[SequenceFailure] = []
        for row, reason in failed.items():
            sequence_id = items[row].sequence_id
            if self.abort(sequence_id):  # else it has ended, or failed in the step before
                logger.warning("sequence %s: no token can be chosen: %s", sequence_id, reason, extra=about(sequence_id))
                # Another worker would find the same.
                failures.append(SequenceFailure(sequence_id, f"no token can be chosen: {reason}", False, Role.DECODE))
        return tuple(failures)

    def _note_beside(self, plan: StepPlan, seconds: float) -> bool:
        """A decoding step ended that ran beside prompts; whether its seconds are its own."""
        assert self._beside is not None, "it was launched by it"
        if self._beside.streams.overlaps:
            self._beside.took(shape_of(plan), seconds)
            return False
        self._held_up_s += seconds
        return True

    def _fail(self, plan: StepPlan, error: Exception) -> StepOutput:
        if self._runner.is_divided:
            raise RankLost(f"a step failed on rank 0: {type(error).__name__}: {error}") from error
        logger.error("a step of %d sequences failed", len(plan.items), exc_info=error)
        self._runner.wait()
        with self._books:
            self._scheduler.drop_step(plan)
        message = f"the engine's step failed: {type(error).__name__}: {error}"
        failed = [item.sequence_id for item in plan.items]
        for sequence_id in failed:
            self.abort(sequence_id)
        # The engine does not know which stage it serves; the worker puts its own in.
        return StepOutput(failures=tuple(SequenceFailure(s, message, True, Role.DECODE) for s in failed))

    # ---- reports ----

    @property
    def num_urgent_steps(self) -> int:
        """Steps that held another one up, since the engine's start."""
        return self._num_urgent

    def take_cache_changes(self) -> CacheChanges:
        """Prefix pages that became known, or unknown, since this was called last; one caller."""
        with self._books:
            changes = self._allocator.take_changes()
            if self._tiers is None:
                return changes
            lower, gone = self._tiers.lower_changes(changes.removed)
        return CacheChanges(
            changes.stored, tuple(gone), tuple(lower.get(Tier.HOST, ())), tuple(lower.get(Tier.DISK, ()))
        )

    def take_step_samples(self) -> tuple[StepSample, ...]:
        """The latest steps since this was called last, and what each took; one caller."""
        samples = tuple(self._samples)
        self._samples.clear()
        return samples

    def modes(self) -> EngineModes:
        """What computes the steps. From any thread."""
        mode = self._runner.mode
        parts = ["compiled" if mode.compiled else "eager"]
        if mode.graph_batch_sizes:
            parts.append(f"decode graphs up to {mode.graph_batch_sizes[-1]}")
        if mode.prompt_graph_tokens:
            parts.append(f"prompt graphs up to {mode.prompt_graph_tokens} tokens")
        if mode.experts:
            parts.append(mode.experts)
        if mode.cascade:
            parts.append("shared prefixes read once")
        if self._plans_ahead:
            pays = self._pace.launching_pays()
            parts.append("planned ahead" if pays else "not planned ahead: launching takes as long as computing")
        if self.model.weights:
            parts.append(self.model.weights)
        if self._runner.is_divided:
            parts.append(f"on {self.layout.num_ranks} ranks")
        all_reasons = (mode.reason, mode.graph_reason, mode.order_reason, mode.cascade_reason, mode.prompt_graph_reason)
        reasons = dict.fromkeys(reason for reason in all_reasons if reason)
        choice = self._attention
        budgets = self._scheduler.budgets
        latest = budgets.latest if self._beside is None else self._beside.reason
        return EngineModes(
            choice.name,
            choice.reason,
            ", ".join(parts),
            "; ".join(reasons),
            self._runner.num_fallbacks,
            self._colocated_mode,
            str(latest or ""),
            tuple((bound.value, budgets.counts[bound]) for bound in Bound if budgets.counts[bound]),
            self._beside.num_steps if self._beside is not None else 0,
            self._runner.num_cascade_steps,
        )

    @property
    def forward(self) -> ForwardMode:
        """How the model's layers run, in numbers. From any thread."""
        return self._runner.mode

    def load(self) -> EngineLoad:
        """What is queued, running and done."""
        with self._books:
            return self._load()

    def _load(self) -> EngineLoad:
        load = self._scheduler.load()
        return EngineLoad(
            num_running=load.num_running,
            num_waiting=load.num_waiting,
            num_waiting_tokens=load.num_waiting_tokens,
            pages_free=self._allocator.num_free,
            pages_cached=self._allocator.num_cached,
            pages_total=self._allocator.num_pages,
            prompt_tokens=load.prompt_tokens,
            generated_tokens=load.generated_tokens,
            cached_tokens=load.cached_tokens,
            num_preemptions=load.num_preemptions,
            pages_lost=self._allocator.num_lost,
            tiers=() if self._tiers is None else self._tiers.states,
            reloads=() if self._tiers is None else tuple(self._tiers.outcomes.items()),
        )

    def close(self) -> None:
        """End the threads that copy between tiers of the prefix cache; nothing is computed any more."""
        if self._tiers is not None:
            self._tiers.close()

    def wait_for_copies(self, timeout_s: float = 60.0) -> bool:
        """Wait until no page is being copied between tiers; ``has_work`` may be true then, as copies are to be booked.
        For who calls ``step`` himself; False if it took longer."""
        return self._tiers is None or self._tiers.mover.wait_idle(timeout_s)

    def check_integrity(self) -> None:
        """Raise ``AssertionError`` unless every page is accounted for, and all are free or cached when idle."""
        self._allocator.check_integrity()
        if self._tiers is not None:
            self._tiers.books.check_integrity()
        load = self._scheduler.load()
        if not (load.num_running or load.num_held or load.num_reserved or load.num_lent):
            assert self._allocator.whole(), "nothing runs, yet pages are in use"


def _holds_prompts(plan: StepPlan) -> bool:
    return any(len(item.token_ids) > 1 for item in plan.items)


def _joined(outputs: Sequence[StepOutput]) -> StepOutput:
    if len(outputs) == 1:
        return outputs[0]
    chunks = tuple(chunk for output in outputs for chunk in output.chunks)
    return StepOutput(chunks, tuple(failure for output in outputs for failure in output.failures))


def _sample(step: LaunchedStep, seconds: float) -> StepSample:
    shape = shape_of(step.plan)
    context_tokens = shape.context_tokens - step.saved_tokens  # seconds follow what is read
    return StepSample(shape.prompt_tokens, shape.prompt_pairs, shape.batch, context_tokens, seconds)


def _check_vocabulary(field: str, token_ids: Sequence[int], vocab_size: int) -> None:
    if token_ids and (min(token_ids) < 0 or max(token_ids) >= vocab_size):
        raise InvalidRequest(field, f"token ids must be below the vocabulary's size, {vocab_size}")
