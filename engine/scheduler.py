"""Which tokens does the next step compute, and what became of the last one?

A sequence's life here, and who moves it:

    add ──> WAITING ── plan_step: pages taken ──> RUNNING ── commit_step: last token ──> FINISHED
               ^ └──── plan_step: preempted ────────┘ │ └─── commit_step: hold_kv ──> HELD ── release ──> FINISHED
    reserve ──> (a Reservation: pages only) ── admit ─┘                abort: from any state to FINISHED

Pages without a sequence: lent (``lend``, ``lend_prefix``), or room for a prefix that comes from another worker
(``expect_prefix``, a PrefixRoom), until ``adopt`` or ``take_back``.

This file is the seam; chunked_prefill.py is its implementation, step_plan.py what a step is. Torch-free.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from core.prefix_hash import PageHash
from core.request import SequenceId, SequenceSpec, TokenChunk
from engine.prefill_order import Pace
from engine.step_budget import StepBudgets
from engine.step_plan import SampledToken, StepPlan


@dataclass(frozen=True, slots=True)
class Reservation:
    """Pages for K/V that will be written from outside (by a prefill worker)."""

    spec: SequenceSpec
    page_ids: tuple[int, ...]  # for every token of spec.token_ids
    num_cached_pages: int  # the first that many pages are stored already and must not be written

    @property
    def sequence_id(self) -> SequenceId:
        return self.spec.sequence_id


@dataclass(frozen=True, slots=True)
class PrefixRoom:
    """Pages of a known prefix, the last of which will be written from outside (by another worker that caches it)."""

    page_hashes: tuple[PageHash, ...]
    page_ids: tuple[int, ...]  # one for each hash
    num_cached_pages: int  # the first that many are stored already and must not be written

    @property
    def missing(self) -> tuple[int, ...]:
        """Pages that are to be written."""
        return self.page_ids[self.num_cached_pages :]


@dataclass(frozen=True, slots=True)
class SchedulerLoad:
    """A snapshot for load reports; the counters run from the scheduler's start."""

    num_running: int
    num_waiting: int
    num_held: int
    num_reserved: int
    num_lent: int  # pages, those of rooms included and those that copies between tiers hold
    num_waiting_tokens: int  # known tokens that have to be computed yet: neither stored nor found in the prefix cache
    prompt_tokens: int  # of sequences that this engine prefilled, tokens found in the prefix cache included
    cached_tokens: int  # found in the prefix cache, by prefilled and by reserved sequences
    generated_tokens: int
    num_preemptions: int


class Scheduler(Protocol):
    """Decides what each step computes. One thread calls it.

    A plan of ``plan_step`` is committed or dropped before the next call of it. One of ``plan_ahead`` follows a plan
    that is being computed, and may be followed by another; both are committed, or given to ``drop_step``, in order.
    """

    def add(self, spec: SequenceSpec, now: float) -> None:
        """Queue a sequence. Raises ``InvalidRequest`` (mostly field ``prompt``) for one that can never run here."""
        ...

    def reserve(self, spec: SequenceSpec) -> Reservation | None:
        """Take pages for K/V from outside; None while there are none to spare. Raises as ``add`` does."""
        ...

    def cancel(self, reservation: Reservation) -> None:
        """Give a reservation's pages back; nobody may write to them any more. Unknown ones are ignored."""
        ...

    def lend(self, max_pages: int) -> tuple[int, ...]:
        """Up to ``max_pages`` pages that no sequence needs now, for somebody who needs memory for a moment."""
        ...

    def take_back(self, page_ids: Sequence[int]) -> None:
        """Lent pages, or those of a room, are back; nobody reads or writes them any more."""
        ...

    def num_known_pages(self, page_hashes: Sequence[PageHash]) -> int:
        """How many of these pages of a prefix, from the first on, are cached here."""
        ...

    def lend_prefix(self, page_hashes: Sequence[PageHash]) -> tuple[int, ...]:
        """Those of these pages, from the first on, that are cached here and can be spared: to be read, not written."""
        ...

    def expect_prefix(self, page_hashes: Sequence[PageHash], num_known: int) -> PrefixRoom | None:
        """Room for a prefix of which the first ``num_known`` pages are cached here and the rest will come from outside.

        None (and nothing taken) if there are no pages to spare, or fewer are cached by now.
        """
        ...

    def adopt(self, room: PrefixRoom) -> None:
        """The K/V of the room's missing pages is stored: whoever has that prefix finds it from now on."""
        ...

    def admit(self, reservation: Reservation, first_token_ids: Sequence[int], now: float) -> None:
        """The K/V of all ``spec.token_ids`` is stored and ``first_token_ids`` follow them: go on from there.

        Raises ``ProtocolViolation``, changing nothing, if the reservation is unknown or the sequence already ended.
        """
        ...

    def release(self, sequence_id: SequenceId) -> bool:
        """Drop a held sequence's pages; False if no such sequence is held."""
        ...

    def abort(self, sequence_id: SequenceId) -> bool:
        """Forget a sequence in whatever state and free its pages; False if it is unknown.

        Reservations are not touched: a peer may still write to their pages, so only ``cancel`` gives those back.
        """
        ...

    def plan_step(self, now: float) -> StepPlan | None:
        """The next step, or None if nothing can run before something else changes."""
        ...

    def plan_ahead(self, plan: StepPlan, now: float) -> StepPlan | None:
        """The step after ``plan``, the latest, which is being computed: its tokens are not known.

        None if there is nothing to compute, or if what would be computed has to be decided with ``plan`` committed.
        """
        ...

    def plan_prompts(self, now: float) -> StepPlan | None:
        """A step of prompts alone, beside which decoding goes on (``plan_between``), and one of which may be under way.

        None: nothing can start or go on, decoding must make room for itself first, or prompts and decoding share steps.
        """
        ...

    def plan_between(self, plan: StepPlan, now: float) -> StepPlan | None:
        """The next token of every decoding sequence, while ``plan``, which ``plan_prompts`` made, is being computed.

        None: nobody decodes, or has a page for it.
        """
        ...

    def plan_urgent(self, plan: StepPlan, pace: Pace, now: float) -> StepPlan | None:
        """A step to be computed between two layers of ``plan``, which goes on afterwards, and committed before it.

        None: nobody would be late for want of it, or somebody would be because of it.
        """
        ...

    def commit_step(self, plan: StepPlan, sampled: Mapping[SequenceId, SampledToken], now: float) -> list[TokenChunk]:
        """The step is computed: book it and return the new tokens, one chunk for each sampling sequence."""
        ...

    def drop_step(self, plan: StepPlan) -> None:
        """The step failed, and the device writes no page of it any more; its sequences are to be aborted."""
        ...

    def pages_moved(self) -> None:
        """Copies between tiers of the prefix cache have ended: who waited for one is in the queue again, in front."""
        ...

    @property
    def num_growing(self) -> int:
        """Sequences that hold pages and will ask for more, one at a time."""
        ...

    @property
    def budgets(self) -> StepBudgets:
        """What bounded the prompts of steps."""
        ...

    @property
    def has_work(self) -> bool:
        """False while nothing is queued or running, or while what is queued can only start after another call."""
        ...

    def load(self) -> SchedulerLoad:
        """What is queued, running and done."""
        ...
