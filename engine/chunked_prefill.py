"""The scheduler: prefill chunks and decode tokens share each step, or are kept apart where the config says so.

Its docstring lists the rules; scheduler.py tells what each call is for. Torch-free.
"""

from __future__ import annotations

import math
from array import array
from collections import deque
from collections.abc import Callable, Iterable, Mapping
from collections.abc import Sequence as AbstractSequence
from dataclasses import dataclass
from typing import TypeAlias

from core.errors import InvalidRequest, ProtocolViolation
from core.prefix_hash import PageHash, extend_page_hashes
from core.request import SequenceId, SequenceSpec, TokenChunk
from engine.cache_tiers import CacheTiers
from engine.config import APART_MODES, EngineConfig
from engine.page_allocator import PageAllocator
from engine.prefill_order import ORDERS, Pace, PrefillOrder, due_at
from engine.scheduler import PrefixRoom, Reservation, SchedulerLoad
from engine.sequence import Sequence, SequenceStatus
from engine.step_budget import Costs, StepBudget, StepBudgets
from engine.step_plan import SampledToken, StartedSequence, StepItem, StepPlan
from engine.steps_under_way import StepsUnderWay

TokenIds: TypeAlias = AbstractSequence[int]

_SHARE_TO_LEND = 4  # one page in so many that nobody waits for


class ChunkedPrefillScheduler:
    """Prefill chunks and decode tokens share each step; who waits is overtaken as its order says (prefill_order.py).

    Rules:
    1. Running sequences go first, in the order in which they were started (prompts: that of ``config.prefill_order``);
       then waiting ones, in that order. A head of the queue that does not fit blocks those behind it.
    2. A step computes at most ``max_batch_tokens`` tokens of at most ``max_batch_size`` sequences, and at most
       ``max_prefill_chunk`` tokens of one sequence; and beside decoding sequences no more than leaves them their
       ``tpot_slo_s`` (step_budget.py).
    3. A sequence starts when there are pages for every token known of it; what the prefix cache holds is taken from
       there, except the last token, whose logits are needed. From then on only decoding takes pages, one at a border.
    4. When such a page is missing, the youngest running sequence is preempted: its pages are released (they stay in
       the prefix cache while there is room) and it goes back to the front of the queue. Never one with ``hold_kv``,
       whose pages are being sent. The oldest is never preempted for a younger one, so somebody always finishes.
    5. Starting and reserving leave one free page for every sequence that will grow: else what was started last
       would be preempted for the next page border and its prefill lost.
    6. A reservation never takes the pages or the place in the batch that the head of the queue waits for.
    7. Lending leaves what rules 5 and 6 leave, takes at most a quarter of the rest, and cached prefixes only if no
       page is empty. Of what could be evicted, a prefix that is lent takes at most half of that rest: a transfer may be
       slow, and sequences come meanwhile. Room is made for a prefix as far as rules 5 and 6 allow.
    8. Every sequence fits the pool when it is alone: longer ones are refused, or end with LENGTH.
    9. A step that is planned ahead goes on with the sequences of the one before as if none of them met a stop token,
       and starts waiting ones; it preempts nobody. What ends meanwhile is computed once more, for nothing. While such
       a step is under way no page is freed that a sequence had when it was planned: the device may still write there
       (steps_under_way.py).
    10. A step that holds another one up starts waiting prompts that end in it, as far as that breaks no promise of the
       other's prompts, and makes its decoding sequences wait no longer than the rest of their step.
    11. Where ``colocated_mode`` keeps prompts and decoding apart, a step holds either. A step of prompts waits until
       every decoding sequence has, or can have, the page of its next token; decoding beside it preempts nobody, and who
       finds no page waits for its end.
    12. With lower tiers of the prefix cache, the head of the queue whose prefix goes on there leaves the queue until
       that is loaded, if loading is faster (cache_tiers.py), and is its head again then. Others start meanwhile.
    """

    def __init__(
        self,
        config: EngineConfig,
        allocator: PageAllocator,
        max_model_len: int,
        eos_token_ids: Iterable[int] = (),
        costs: Costs = lambda: None,
        tiers: CacheTiers | None = None,
    ) -> None:
        """``costs``: what steps take on this engine, as far as it is known now; for ``tpot_slo_s``."""
        self._allocator = allocator
        self._tiers = tiers
        self._page_size = allocator.page_size
        self._max_batch_tokens = config.max_batch_tokens
        self._apart = config.colocated_mode in APART_MODES
        self._budgets = StepBudgets(config.max_batch_tokens, None if self._apart else config.tpot_slo_s, costs)
        self._max_batch_size = config.max_batch_size
        self._max_chunk = config.max_prefill_chunk or config.max_batch_tokens
        self._max_len = min(max_model_len, allocator.num_pages * allocator.page_size)  # tokens, prompt and output
        self._eos_token_ids = frozenset(eos_token_ids)
        self._sequences: dict[SequenceId, Sequence] = {}  # whatever is not finished
        self._order: PrefillOrder = ORDERS[config.prefill_order]()
        self._waiting: deque[Sequence] = deque()  # next to start first
        self._running: list[Sequence] = []  # oldest start first; those beyond max_batch_size wait for a place
        self._num_running_growing = 0  # of them, those that ask for pages until they end
        self._reserved: dict[SequenceId, _Reserved] = {}
        self._num_lent = 0
        self._stalled = False  # the last plan was empty and nothing changed since
        self._under_way = StepsUnderWay()
        self._prompt_tokens = 0
        self._cached_tokens = 0
        self._generated_tokens = 0
        self._num_preemptions = 0

    # ---- what comes in, and what goes ----

    def add(self, spec: SequenceSpec, now: float) -> None:
        self._check(spec)
        self._stalled = False
        sequence = Sequence(spec, now, self._eos_token_ids, self._max_len)
        self._sequences[spec.sequence_id] = sequence
        self._order.insert(self._waiting, sequence)

    def reserve(self, spec: SequenceSpec) -> Reservation | None:
        self._check(spec)
        if self._waiting and len(self._running) + len(self._reserved) + 1 >= self._max_batch_size:
            return None
        token_ids = array("q", spec.token_ids)
        page_hashes = self._extend_hashes([], token_ids, spec.salt)
        # Every full page may be a hit: nothing is computed here, so no last token has to be left over.
        taken = self._take_pages(len(token_ids), page_hashes, spare=self._pages_to_leave())
        if taken is None:
            return None
        reservation = Reservation(spec, *taken)
        self._reserved[spec.sequence_id] = _Reserved(reservation, token_ids, page_hashes)
        return reservation

    def cancel(self, reservation: Reservation) -> None:
        known = self._reserved.get(reservation.sequence_id)
        if known is None or known.reservation is not reservation:
            return
        self._stalled = False
        del self._reserved[reservation.sequence_id]
        self._allocator.release(reservation.page_ids)

    def lend(self, max_pages: int) -> tuple[int, ...]:
        spare = self._allocator.num_free - self._pages_to_leave()
        empty = self._allocator.num_free - self._allocator.num_cached
        page_ids = self._allocator.allocate(max(0, min(max_pages, -(-spare // _SHARE_TO_LEND), max(empty, 1))))
        self._num_lent += len(page_ids or ())
        return tuple(page_ids or ())

    def take_back(self, page_ids: TokenIds) -> None:
        self._stalled = False
        self._num_lent -= len(page_ids)
        self._allocator.release(page_ids)

    def num_known_pages(self, page_hashes: AbstractSequence[PageHash]) -> int:
        return self._allocator.num_known(page_hashes)

    def lend_prefix(self, page_hashes: AbstractSequence[PageHash]) -> tuple[int, ...]:
        # Pages that a sequence uses anyway cost nothing; what nobody uses could be evicted, and while lent it cannot.
        num_free = self._allocator.num_free
        least = num_free - -(-max(0, num_free - self._pages_to_leave()) // 2)
        page_ids = self._allocator.match_prefix(page_hashes)
        while self._allocator.num_free < least:
            self._allocator.release([page_ids.pop()])
        self._num_lent += len(page_ids)
        return tuple(page_ids)

    def expect_prefix(self, page_hashes: AbstractSequence[PageHash], num_known: int) -> PrefixRoom | None:
        if not self._allocator.prefix_cache or self._allocator.num_known(page_hashes) < num_known:
            return None
        taken = self._take_pages(len(page_hashes) * self._page_size, page_hashes, spare=self._pages_to_leave())
        if taken is None:
            return None
        self._num_lent += len(taken[0])
        return PrefixRoom(tuple(page_hashes), *taken)

    def adopt(self, room: PrefixRoom) -> None:
        for page, page_hash in zip(room.missing, room.page_hashes[room.num_cached_pages :], strict=True):
            self._allocator.register(page, page_hash)
        self.take_back(room.page_ids)

    def admit(self, reservation: Reservation, first_token_ids: TokenIds, now: float) -> None:
        spec = reservation.spec
        known = self._reserved.get(spec.sequence_id)
        if known is None or known.reservation is not reservation:
            raise ProtocolViolation(f"{spec.sequence_id}: admitted without a reservation")
        if not first_token_ids:
            raise ProtocolViolation(f"{spec.sequence_id}: admitted without a first token")
        # A copy: should the sequence have ended with these already, the reservation stays as it is.
        sequence = Sequence(spec, now, self._eos_token_ids, self._max_len, known.token_ids[:])
        for token_id in first_token_ids:
            sequence.token_ids.append(token_id)
            if sequence.end is not None:
                raise ProtocolViolation(f"{spec.sequence_id}: admitted, but token {token_id} already ended it")
        self._stalled = False
        del self._reserved[spec.sequence_id]
        sequence.page_ids = reservation.page_ids
        sequence.page_hashes = known.page_hashes
        sequence.num_registered = reservation.num_cached_pages
        sequence.num_computed = len(spec.prompt_token_ids) + len(spec.output_token_ids)
        sequence.num_cached_tokens = reservation.num_cached_pages * self._page_size
        sequence.move(SequenceStatus.RUNNING)
        self._cached_tokens += sequence.num_cached_tokens
        self._register_pages(sequence)
        self._sequences[spec.sequence_id] = sequence
        self._join_batch(sequence)

    def release(self, sequence_id: SequenceId) -> bool:
        sequence = self._sequences.get(sequence_id)
        if sequence is None or sequence.status is not SequenceStatus.HELD:
            return False
        self._forget(sequence)
        return True

    def abort(self, sequence_id: SequenceId) -> bool:
        sequence = self._sequences.get(sequence_id)
        if sequence is None:
            return False
        if sequence.status is SequenceStatus.WAITING:
            if self._tiers is None or not self._tiers.forget(sequence):
                self._waiting.remove(sequence)
        elif sequence.status is SequenceStatus.RUNNING:
            self._leave_batch(sequence)
        self._forget(sequence)
        return True

    # ---- a step ----

    def plan_step(self, now: float) -> StepPlan | None:
        batch = self._running[: self._max_batch_size]
        decodes = self._continue_decoding(batch, now)
        if self._apart:
            plan = StepPlan(tuple(decodes)) if decodes else self.plan_prompts(now)
            self._stalled = plan is None
            return plan
        chunks: list[StepItem] = []
        batch_size, context = len(decodes), _context_of(decodes)
        budget = self._budgets.beside(batch_size, context)
        if batch_size < len(batch):
            self._continue_chunks(batch, chunks, budget)
        # A victim of this step cannot start again in it: it was taken because no page was free, and one of its own
        # went to somebody else, so at least that one is missing.
        started = self._start_waiting(decodes, chunks, budget, now)
        self._budgets.note(budget, batch_size, context)
        self._stalled = not decodes and not chunks
        if self._stalled:
            return None
        plan = StepPlan((*decodes, *chunks), tuple(started))
        if self._order.interrupts:
            self._under_way.begin(plan)
        return plan

    def plan_prompts(self, now: float) -> StepPlan | None:
        batch = self._running[: self._max_batch_size]
        lacking = sum(s.num_tokens > len(s.page_ids) * self._page_size for s in batch)
        if not self._apart or lacking > self._allocator.num_free:
            return None
        decodes: list[StepItem] = []  # prompts of which the last token alone is to be computed
        chunks: list[StepItem] = []
        budget = self._budgets.beside(0, lambda: 0)
        self._continue_chunks(batch, chunks, budget)
        started = self._start_waiting(decodes, chunks, budget, now)
        self._budgets.note(budget, 0, lambda: 0)
        if not decodes and not chunks:
            return None
        plan = StepPlan((*decodes, *chunks), tuple(started))
        self._under_way.begin(plan)
        return plan

    def plan_between(self, plan: StepPlan, now: float) -> StepPlan | None:
        prompts = {item.sequence_id for item in plan.items}
        items: list[StepItem] = []
        for sequence in self._running[: self._max_batch_size]:
            if sequence.num_remaining != 1 or sequence.sequence_id in prompts:
                continue
            if sequence.num_tokens > len(sequence.page_ids) * self._page_size:
                page_ids = self._allocator.allocate(1)
                if page_ids is None:
                    continue
                sequence.page_ids += tuple(page_ids)
            if sequence.started_at is None:
                sequence.started_at = now
            items.append(sequence.item(1))
        if not items:
            return None
        between = StepPlan(tuple(items))
        self._under_way.begin(between)
        return between

    def plan_urgent(self, plan: StepPlan, pace: Pace, now: float) -> StepPlan | None:
        if not self._waiting or not self._order.interrupts:
            return None
        slack_s = self._slack_of(plan, pace, now)
        budget, num_places = self._max_batch_tokens, self._max_batch_size - len(self._running)
        decodes: list[StepItem] = []
        chunks: list[StepItem] = []
        started: list[StartedSequence] = []
        for sequence in tuple(self._waiting):
            if len(started) == num_places:
                break
            num_tokens = self._num_uncached(sequence)
            own_s = max(pace.step_s, num_tokens * pace.token_s)
            if num_tokens > min(budget, self._max_chunk) or own_s > slack_s:
                continue
            if not self._order.is_urgent(sequence, own_s, pace, now):
                continue
            if not self._start(sequence):
                break
            self._waiting.remove(sequence)
            started.append(self._begin(sequence, num_tokens, decodes, chunks, now))
            budget -= num_tokens
            slack_s -= own_s
            now += own_s
        return StepPlan((*decodes, *chunks), tuple(started)) if started else None

    def _slack_of(self, plan: StepPlan, pace: Pace, now: float) -> float:
        """Seconds that a step may be held up for: rule 10."""
        slack_s = math.inf
        for item in plan.items:
            sequence = self._sequences.get(item.sequence_id)
            if sequence is None:
                continue
            if sequence.num_remaining == 1:
                slack_s = min(slack_s, pace.left_s)
                continue
            later = sequence.num_remaining - len(item.token_ids)
            left_s = due_at(sequence) - now - pace.left_s - later * pace.token_s
            if left_s >= 0:  # else it is late anyway
                slack_s = min(slack_s, left_s)
        return slack_s

    def plan_ahead(self, plan: StepPlan, now: float) -> StepPlan | None:
        if self._apart and self._prompts_may_go_on():
            return None
        decodes: list[StepItem] = []
        prefilling: list[tuple[Sequence, int]] = []  # and its tokens that are computed by then
        computing = {item.sequence_id: item for item in plan.items}
        rows = {item.sequence_id: row for row, item in enumerate(plan.sampling_items)}
        for sequence in self._running[: self._max_batch_size]:
            item = computing.get(sequence.spec.sequence_id)
            start, row = sequence.num_computed, None
            if item is not None:
                start += len(item.token_ids)
                row = rows.get(item.sequence_id)
            num_tokens = len(sequence.token_ids)
            if row is not None:
                num_tokens += 1
                if sequence.spec.hold_kv or num_tokens >= sequence.most_tokens:
                    continue  # the token that is being sampled is its last one here
            if num_tokens > len(sequence.page_ids) * self._page_size:
                page_ids = self._allocator.allocate(1)
                if page_ids is None:
                    return None  # somebody is to be preempted: that is decided when every token is known
                sequence.page_ids += tuple(page_ids)
            if num_tokens - start == 1:
                if sequence.started_at is None:
                    sequence.started_at = now
                decodes.append(sequence.next_item(start, row))
            else:
                prefilling.append((sequence, start))
        chunks: list[StepItem] = []
        started: list[StartedSequence] = []
        if not self._apart:
            batch_size, context = len(decodes), _context_of(decodes)
            budget = self._budgets.beside(batch_size, context)
            starts = {sequence.sequence_id: start for sequence, start in prefilling}
            for sequence in self._order.prefilling(sequence for sequence, _ in prefilling):
                start = starts[sequence.sequence_id]
                num_tokens = budget.take(start, min(len(sequence.token_ids) - start, self._max_chunk))
                if not num_tokens:
                    break
                chunks.append(sequence.item(num_tokens, start))
            started = self._start_waiting(decodes, chunks, budget, now)
            self._budgets.note(budget, batch_size, context)
        if not decodes and not chunks:
            return None
        ahead = StepPlan((*decodes, *chunks), tuple(started))
        self._under_way.begin(ahead)
        return ahead

    def drop_step(self, plan: StepPlan) -> None:
        self._stalled = False
        self._under_way.end(plan)
        self._free_leaving(plan)

    def commit_step(self, plan: StepPlan, sampled: Mapping[SequenceId, SampledToken], now: float) -> list[TokenChunk]:
        chunks = self._commit(plan, sampled, now)
        self._free_leaving(plan)
        return chunks

    def _commit(self, plan: StepPlan, sampled: Mapping[SequenceId, SampledToken], now: float) -> list[TokenChunk]:
        self._under_way.end(plan)
        chunks: list[TokenChunk] = []
        self._stalled = False
        sequences, page_size = self._sequences, self._page_size
        somebody_left, num_plain = False, 0
        for item in plan.items:
            sequence_id = item.sequence_id
            sequence = sequences.get(sequence_id)
            if sequence is None or sequence.status is not SequenceStatus.RUNNING:
                continue  # aborted (and perhaps queued anew) while the step was computed, or ended by the step before
            if sequence.token_ids is not item.known_token_ids:
                continue  # aborted, queued anew and started again
            num_computed = sequence.num_computed = sequence.num_computed + len(item.token_ids)
            if num_computed >= (sequence.num_registered + 1) * page_size:
                self._register_pages(sequence)
            if not item.samples:
                continue
            token, token_ids = sampled[sequence_id], sequence.token_ids
            num_tokens, token_id = len(token_ids), token.token_id
            if sequence.reported and num_tokens + 1 < sequence.most_tokens and token_id not in sequence.stop_ids:
                token_ids.append(token_id)  # neither the first nor the last: nearly always
                num_plain += 1
                logprobs = () if token.logprob is None else (token.logprob,)
                chunks.append(TokenChunk(sequence_id, num_tokens - item.num_prompt_tokens, (token_id,), logprobs))
            else:
                chunks.append(self._append_token(sequence, token, now))
                somebody_left = somebody_left or sequence.status is not SequenceStatus.RUNNING
        self._generated_tokens += num_plain
        if somebody_left:
            self._running = [s for s in self._running if s.status is SequenceStatus.RUNNING]
        return chunks

    def pages_moved(self) -> None:
        self._stalled = False
        if self._tiers is not None:
            self._waiting.extendleft(reversed(self._tiers.take_back()))

    # ---- what can be asked ----

    @property
    def budgets(self) -> StepBudgets:
        return self._budgets

    @property
    def num_growing(self) -> int:
        return len(self._reserved) + self._num_running_growing

    @property
    def has_work(self) -> bool:
        return bool(self._running or self._waiting) and not self._stalled

    def load(self) -> SchedulerLoad:
        prefilling = (s.num_remaining for s in self._running if s.num_remaining > 1)
        num_loading, num_held = (self._tiers.num_loading, self._tiers.num_held) if self._tiers is not None else (0, 0)
        return SchedulerLoad(
            num_running=len(self._running),
            num_waiting=len(self._waiting) + num_loading,
            num_held=len(self._sequences) - len(self._running) - len(self._waiting) - num_loading,
            num_reserved=len(self._reserved),
            num_lent=self._num_lent + num_held,
            num_waiting_tokens=sum(map(self._num_to_compute, self._waiting)) + sum(prefilling),
            prompt_tokens=self._prompt_tokens,
            cached_tokens=self._cached_tokens,
            generated_tokens=self._generated_tokens,
            num_preemptions=self._num_preemptions,
        )

    # ---- planning ----

    def _join_batch(self, sequence: Sequence) -> None:
        """The youngest of those that run, from now on."""
        self._running.append(sequence)
        self._num_running_growing += not sequence.spec.hold_kv

    def _leave_batch(self, sequence: Sequence) -> None:
        self._running.remove(sequence)
        self._num_running_growing -= not sequence.spec.hold_kv

    def _continue_decoding(self, batch: list[Sequence], now: float) -> list[StepItem]:
        """The next token of each sequence of the batch that decodes. This loop is what decoding costs a scheduler."""
        items: list[StepItem] = []
        page_size, running = self._page_size, SequenceStatus.RUNNING
        for sequence in batch:
            token_ids, start = sequence.token_ids, sequence.num_computed
            num_tokens = len(token_ids)
            if num_tokens > len(sequence.page_ids) * page_size:
                self._make_room(sequence)
            # A victim is younger than the one it makes room for, so it comes later in this loop: it is skipped here.
            if num_tokens - start != 1 or sequence.status is not running:
                continue
            if sequence.started_at is None:
                sequence.started_at = now
            spec = sequence.spec
            items.append(
                StepItem(
                    spec.sequence_id,
                    (token_ids[start],),
                    start,
                    sequence.page_ids,
                    True,
                    spec.sampling,
                    token_ids,
                    sequence.num_prompt_tokens,
                )
            )
        return items

    def _make_room(self, sequence: Sequence) -> None:
        """Give a running sequence pages for its known tokens, preempting the youngest where none are free: be it this
        one. Nothing happens if it does not run any more."""
        while (
            sequence.status is SequenceStatus.RUNNING and sequence.num_tokens > len(sequence.page_ids) * self._page_size
        ):
            page_ids = self._allocator.allocate(1)
            if page_ids is None:
                self._preempt(next(s for s in reversed(self._running) if not s.spec.hold_kv))
            else:
                sequence.page_ids += tuple(page_ids)

    def _preempt(self, sequence: Sequence) -> None:
        self._leave_batch(sequence)
        self._allocator.release(sequence.page_ids)
        sequence.page_ids = ()
        sequence.num_computed = 0
        sequence.num_registered = 0
        sequence.num_preemptions += 1
        sequence.reload_tried = False
        self._num_preemptions += 1
        sequence.move(SequenceStatus.WAITING)
        self._waiting.appendleft(sequence)

    def _continue_chunks(self, batch: list[Sequence], chunks: list[StepItem], budget: StepBudget) -> None:
        """Append the next chunk of each sequence whose prefill is under way, as far as the budget goes."""
        running = SequenceStatus.RUNNING
        for sequence in self._order.prefilling(s for s in batch if s.status is running and s.num_remaining > 1):
            num_tokens = budget.take(sequence.num_computed, min(sequence.num_remaining, self._max_chunk))
            if not num_tokens:
                break
            chunks.append(sequence.item(num_tokens))

    def _start_waiting(
        self, decodes: list[StepItem], chunks: list[StepItem], budget: StepBudget, now: float
    ) -> list[StartedSequence]:
        started: list[StartedSequence] = []
        while self._waiting and not budget.is_full and len(self._running) < self._max_batch_size:
            index = self._order.head(self._waiting, now)
            sequence = self._waiting[index]
            if self._tiers is not None and self._waits_for_load(sequence, self._tiers):
                del self._waiting[index]
                continue
            if budget.in_seconds:
                num_uncached = self._num_uncached(sequence)
                if not budget.fits(sequence.num_tokens - num_uncached, min(num_uncached, self._max_chunk)):
                    break
            if not self._start(sequence):
                break
            del self._waiting[index]
            num_tokens = budget.take(sequence.num_computed, min(sequence.num_remaining, self._max_chunk))
            started.append(self._begin(sequence, num_tokens, decodes, chunks, now))
        return started

    def _prompts_may_go_on(self) -> bool:
        """Whether a step of prompts could be planned now, but for what is being computed."""
        batch = self._running[: self._max_batch_size]
        if any(sequence.num_remaining > 1 for sequence in batch):
            return True
        if not self._waiting or len(self._running) >= self._max_batch_size:
            return False
        head = self._waiting[0]
        num_known = (head.num_tokens - self._num_uncached(head)) // self._page_size
        return self._num_pages(head.num_tokens) - num_known + self.num_growing <= self._allocator.num_free

    def _begin(
        self, sequence: Sequence, num_tokens: int, decodes: list[StepItem], chunks: list[StepItem], now: float
    ) -> StartedSequence:
        """A sequence that has its pages joins the batch, and the step with its next ``num_tokens``."""
        self._join_batch(sequence)
        if sequence.started_at is None:
            sequence.started_at = now
        (decodes if sequence.num_remaining == 1 else chunks).append(sequence.item(num_tokens))
        return StartedSequence(sequence.spec, sequence.num_computed, sequence.page_ids)

    def _start(self, sequence: Sequence) -> bool:
        """Take pages for every known token; False if there are not enough."""
        hashes = self._extend_hashes(sequence.page_hashes, sequence.token_ids, sequence.spec.salt)
        findable = hashes[: (sequence.num_tokens - 1) // self._page_size]
        taken = self._take_pages(sequence.num_tokens, findable, spare=self.num_growing)
        if taken is None:
            return False
        sequence.page_ids, sequence.num_registered = taken
        sequence.num_computed = sequence.num_registered * self._page_size
        sequence.move(SequenceStatus.RUNNING)
        if sequence.num_cached_tokens is None:
            sequence.num_cached_tokens = sequence.num_computed
            self._prompt_tokens += sequence.num_tokens
            self._cached_tokens += sequence.num_computed
        return True

    def _waits_for_load(self, sequence: Sequence, tiers: CacheTiers) -> bool:
        """Rule 12: if so, the tiers have it from now on."""
        hashes = self._extend_hashes(sequence.page_hashes, sequence.token_ids, sequence.spec.salt)
        findable = hashes[: (sequence.num_tokens - 1) // self._page_size]
        return tiers.begin(sequence, findable, spare=self.num_growing)

    def _num_to_compute(self, sequence: Sequence) -> int:
        """Tokens of a waiting sequence that no tier holds."""
        num_tokens = self._num_uncached(sequence)
        if self._tiers is None:
            return num_tokens
        findable = sequence.page_hashes[: (sequence.num_tokens - 1) // self._page_size]
        num_known = (sequence.num_tokens - num_tokens) // self._page_size
        return num_tokens - self._tiers.num_reachable(findable, num_known) * self._page_size

    def _num_uncached(self, sequence: Sequence) -> int:
        """Tokens that a waiting sequence would have to compute if it started now. What is hashed is kept for then."""
        hashes = self._extend_hashes(sequence.page_hashes, sequence.token_ids, sequence.spec.salt)
        findable = hashes[: (sequence.num_tokens - 1) // self._page_size]
        return sequence.num_tokens - self._allocator.num_known(findable) * self._page_size

    def _take_pages(
        self, num_tokens: int, findable: AbstractSequence[PageHash], spare: int
    ) -> tuple[tuple[int, ...], int] | None:
        """Pages for ``num_tokens`` tokens, and how many of them are cached ones; None (and nothing taken) unless
        ``spare`` pages are left after it."""
        cached = self._allocator.match_prefix(findable)
        num_missing = self._num_pages(num_tokens) - len(cached)
        fresh = self._allocator.allocate(num_missing) if num_missing + spare <= self._allocator.num_free else None
        if fresh is None:
            self._allocator.release(cached)
            return None
        return (*cached, *fresh), len(cached)

    def _pages_to_leave(self) -> int:
        """Free pages that whoever is not a waiting sequence leaves: rules 5 and 6."""
        return self.num_growing + self._pages_for_head()

    def _pages_for_head(self) -> int:
        """Pages that the head of the queue may need once one more sequence is reserved."""
        return self._num_pages(self._waiting[0].num_tokens) + 1 if self._waiting else 0

    def _num_pages(self, num_tokens: int) -> int:
        return -(-num_tokens // self._page_size)

    # ---- booking ----

    def _append_token(self, sequence: Sequence, token: SampledToken, now: float) -> TokenChunk:
        """Book a sampled token; ends or holds the sequence if it was its last one here."""
        token_ids, spec, token_id = sequence.token_ids, sequence.spec, token.token_id
        position = len(token_ids) - sequence.num_prompt_tokens
        token_ids.append(token_id)
        self._generated_tokens += 1
        logprobs = () if token.logprob is None else (token.logprob,)
        end = sequence.end
        last = end is not None or spec.hold_kv
        stats = sequence.stats(now) if last or not sequence.reported else None
        sequence.reported = True
        if spec.hold_kv:
            sequence.move(SequenceStatus.HELD)
        elif last:
            self._num_running_growing -= 1
            self._forget(sequence)
        return TokenChunk(
            spec.sequence_id,
            position,
            (token_id,),
            logprobs,
            end.reason if end else None,
            end.stop_token_id if end else None,
            stats,
        )

    def _register_pages(self, sequence: Sequence) -> None:
        """Make the pages that are full and stored by now findable."""
        num_full = sequence.num_computed // self._page_size
        if num_full <= sequence.num_registered or not self._allocator.prefix_cache:
            return
        hashes = self._extend_hashes(sequence.page_hashes, sequence.token_ids, sequence.spec.salt)
        for index in range(sequence.num_registered, num_full):
            self._allocator.register(sequence.page_ids[index], hashes[index])
        sequence.num_registered = num_full

    def _extend_hashes(self, hashes: list[PageHash], token_ids: TokenIds, salt: bytes) -> list[PageHash]:
        if self._allocator.prefix_cache:
            extend_page_hashes(hashes, token_ids, self._page_size, salt)
        return hashes

    def _forget(self, sequence: Sequence) -> None:
        """Free the pages of a sequence and end it."""
        self._stalled = False
        sequence.move(SequenceStatus.FINISHED)
        sequence_id = sequence.sequence_id
        if not self._under_way.keep(sequence_id, sequence.page_ids):
            self._allocator.release(sequence.page_ids)
        sequence.page_ids = ()
        del self._sequences[sequence_id]

    def _free_leaving(self, plan: StepPlan) -> None:
        """Free the pages of what has left and was last written by ``plan``."""
        for page_ids in self._under_way.freed_by(plan):
            self._allocator.release(page_ids)

    def _check(self, spec: SequenceSpec) -> None:
        """Raise ``InvalidRequest`` unless the sequence is new here and could run if it were alone."""
        if spec.sequence_id in self._sequences or spec.sequence_id in self._reserved:
            raise InvalidRequest("request_id", f"sequence {spec.sequence_id} is already here")
        if not spec.prompt_token_ids:
            raise InvalidRequest("prompt", "must hold at least one token")
        num_outputs = len(spec.output_token_ids)
        num_tokens = len(spec.prompt_token_ids) + num_outputs
        if num_tokens >= self._max_len:
            raise InvalidRequest(
                "prompt",
                f"has {num_tokens} tokens, which leaves no room for output: "
                f"a sequence holds at most {self._max_len} tokens here",
            )
        max_tokens = spec.sampling.max_tokens
        if max_tokens is not None and num_outputs >= max_tokens:
            raise InvalidRequest("max_tokens", f"must be above the {num_outputs} tokens that are already there")


@dataclass(frozen=True, slots=True)
class _Reserved:
    """A reservation as its scheduler keeps it: what a prompt costs once is not paid again for its admission."""

    reservation: Reservation
    token_ids: array[int]
    page_hashes: list[PageHash]


def _context_of(decodes: AbstractSequence[StepItem]) -> Callable[[], int]:
    """Tokens of those that decode by now, counted when asked for: that costs as much as planning some of them."""
    batch = len(decodes)
    return lambda: sum(item.start for item in decodes[:batch]) + batch
