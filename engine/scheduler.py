"""Which tokens does the next step compute, and what became of the last one?

This file holds the plan of a step (``StepItem``, ``StepPlan``), what comes back from it (``SampledToken``), the
``Scheduler`` seam, and its implementation ``ChunkedPrefillScheduler``. Torch-free.
"""

from __future__ import annotations

from array import array
from collections.abc import Mapping
from collections.abc import Sequence as Tokens
from dataclasses import dataclass
from typing import Protocol

from core.request import SamplingParams, SequenceId, SequenceSpec, TokenChunk, TokenLogprob


@dataclass(frozen=True, slots=True)
class StepItem:
    """One sequence's share of a step.

    The step computes ``token_ids`` at positions ``start .. start + len(token_ids) - 1``, stores their K/V in
    ``page_ids`` (position ``i`` goes to slot ``i % page_size`` of ``page_ids[i // page_size]``) and, if ``samples``,
    needs the logits of the last of them.
    """

    sequence_id: SequenceId
    token_ids: tuple[int, ...]  # the tokens to compute, at least one
    start: int  # position of token_ids[0]; tokens 0 .. start - 1 are stored already
    page_ids: tuple[int, ...]  # the whole block table, pages of token_ids included; may hold more pages than that
    samples: bool  # a token is to be sampled from the last position's logits
    sampling: SamplingParams
    # Prompt and output so far, for penalties: a reference to the scheduler's own array, to be read before
    # commit_step and never kept (a tensor that shares its memory would stop it from growing).
    known_token_ids: array[int]
    num_prompt_tokens: int  # known_token_ids[:num_prompt_tokens] is the prompt, the rest is output

    @property
    def position(self) -> int:
        """Output index of the token to be sampled."""
        return len(self.known_token_ids) - self.num_prompt_tokens


@dataclass(frozen=True, slots=True)
class StartedSequence:
    """A sequence that begins, or begins again after a preemption, in this step."""

    spec: SequenceSpec
    num_cached_tokens: int  # tokens found in the prefix cache: nothing of them is computed
    page_ids: tuple[int, ...]  # pages for every known token; the first num_cached_tokens // page_size are full


@dataclass(frozen=True, slots=True)
class StepPlan:
    """One step: first the items that compute one token and sample, then the other prefill chunks; each in the order
    in which the sequences were started. Logits come back in the order of ``sampling_items``."""

    items: tuple[StepItem, ...]
    started: tuple[StartedSequence, ...] = ()

    @property
    def sampling_items(self) -> tuple[StepItem, ...]:
        """The items that need logits, in the plan's order."""
        return tuple(item for item in self.items if item.samples)

    @property
    def num_tokens(self) -> int:
        """Tokens that the step computes."""
        return sum(len(item.token_ids) for item in self.items)


@dataclass(frozen=True, slots=True)
class SampledToken:
    """What the sampler chose for one item. ``logprob`` is there if the item's ``sampling.logprobs`` is."""

    token_id: int
    logprob: TokenLogprob | None = None


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
class SchedulerLoad:
    """A snapshot for load reports; the counters run from the scheduler's start."""

    num_running: int
    num_waiting: int
    num_held: int
    num_reserved: int
    num_waiting_tokens: int  # known tokens not computed yet, of waiting and running sequences
    prompt_tokens: int  # of sequences that this engine prefilled, tokens found in the prefix cache included
    cached_tokens: int  # found in the prefix cache, by prefilled and by reserved sequences
    generated_tokens: int
    num_preemptions: int


class Scheduler(Protocol):
    """Decides what each step computes. One thread calls it; a plan is committed or dropped before the next one."""

    def add(self, spec: SequenceSpec, now: float) -> None:
        """Queue a sequence. Raises ``InvalidRequest`` (field ``prompt``) for one that can never run here."""
        ...

    def reserve(self, spec: SequenceSpec) -> Reservation | None:
        """Take pages for K/V from outside; None while there are none to spare. Raises as ``add`` does."""
        ...

    def cancel(self, reservation: Reservation) -> None:
        """Give a reservation's pages back; nobody may write to them any more. Unknown ones are ignored."""
        ...

    def admit(self, reservation: Reservation, first_token_ids: Tokens[int], now: float) -> None:
        """The K/V of all ``spec.token_ids`` is stored and ``first_token_ids`` follow them: go on from there.

        Raises ``ProtocolViolation``, changing nothing, if the reservation is unknown or the sequence already ended.
        """
        ...

    def release(self, sequence_id: SequenceId) -> bool:
        """Drop a held sequence's pages; False if no such sequence is held."""
        ...

    def abort(self, sequence_id: SequenceId) -> bool:
        """Forget a sequence in whatever state and free its pages; False if it is unknown."""
        ...

    def plan_step(self, now: float) -> StepPlan | None:
        """The next step, or None if nothing can run before something else changes."""
        ...

    def commit_step(self, plan: StepPlan, sampled: Mapping[SequenceId, SampledToken], now: float) -> list[TokenChunk]:
        """The step is computed: book it and return the new tokens, one chunk for each sampling sequence."""
        ...

    @property
    def has_work(self) -> bool:
        """False if ``plan_step`` would return None."""
        ...

    def load(self) -> SchedulerLoad:
        """What is queued, running and done."""
        ...
