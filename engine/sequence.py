"""What does an engine know of one sequence? The mutable record, what it adds to a step, and the moves of its status.

The Scheduler is the only writer. Intervals over ``token_ids`` (p prompt tokens, n tokens known so far):

    0                      num_computed          n-1
    |--- K/V is stored -----|--- to be computed --|
    |------- prompt ------ p |------ output ------|

Invariants:
- ``0 <= num_computed < num_tokens`` while a sequence waits or runs: the newest token's K/V is stored by the step that
  samples the token after it.
- ``page_ids`` is the block table: page ``i`` holds tokens ``[i * page_size, (i + 1) * page_size)``. It is a tuple, so
  a step may keep a reference to it; it is replaced, not changed, when the sequence grows by a page.
- ``page_hashes[i]`` names page ``i``; the first ``num_registered`` pages are known to the prefix index under it.
- A sequence that is WAITING or FINISHED holds no pages.
"""

from __future__ import annotations

from array import array
from dataclasses import dataclass
from enum import Enum, auto
from types import MappingProxyType

from core.cache_tiers import ReloadReport
from core.prefix_hash import PageHash
from core.request import FinishReason, Role, SequenceId, SequenceSpec, StageStats, WorkerId
from engine.step_plan import PENDING_TOKEN, StepItem

# An engine does not know whose it is: the worker writes its name and role over this one before stats leave it.
UNNAMED_WORKER = WorkerId("")


class SequenceStatus(Enum):
    """Where a sequence is in its life on this engine."""

    WAITING = auto()  # not started, or preempted; holds no pages
    RUNNING = auto()  # holds pages and is in the batch, or waits for a place in it
    HELD = auto()  # done here, but its pages are being sent (``hold_kv``)
    FINISHED = auto()  # gone; holds nothing


ALLOWED_MOVES = MappingProxyType(
    {
        SequenceStatus.WAITING: frozenset({SequenceStatus.RUNNING, SequenceStatus.FINISHED}),
        SequenceStatus.RUNNING: frozenset({SequenceStatus.WAITING, SequenceStatus.HELD, SequenceStatus.FINISHED}),
        SequenceStatus.HELD: frozenset({SequenceStatus.FINISHED}),
        SequenceStatus.FINISHED: frozenset[SequenceStatus](),
    }
)


@dataclass(frozen=True, slots=True)
class SequenceEnd:
    """Why an output token is a sequence's last one."""

    reason: FinishReason
    stop_token_id: int | None = None


class Sequence:
    """One sequence on one engine. ``arrived_at`` and ``started_at`` are on the engine's Clock."""

    __slots__ = (
        "arrived_at",
        "most_tokens",
        "num_cached_tokens",
        "num_computed",
        "num_preemptions",
        "num_prompt_tokens",
        "num_registered",
        "page_hashes",
        "page_ids",
        "reload",
        "reload_tried",
        "reported",
        "spec",
        "started_at",
        "status",
        "stop_ids",
        "token_ids",
    )

    def __init__(
        self,
        spec: SequenceSpec,
        arrived_at: float,
        eos_token_ids: frozenset[int],
        max_len: int,
        token_ids: array[int] | None = None,
    ) -> None:
        """``max_len``: tokens of any sequence here. ``token_ids``: those of ``spec``, if they are at hand as machine
        integers; the sequence owns them then."""
        self.spec = spec
        self.arrived_at = arrived_at
        self.status = SequenceStatus.WAITING
        # One flat array of machine integers: slices and copies to a tensor do not visit Python objects.
        self.token_ids: array[int] = array("q", spec.token_ids) if token_ids is None else token_ids
        self.num_prompt_tokens = len(spec.prompt_token_ids)
        self.num_computed = 0
        self.page_ids: tuple[int, ...] = ()
        self.page_hashes: list[PageHash] = []
        self.num_registered = 0
        self.num_cached_tokens: int | None = None  # found in the prefix cache when it first started
        self.started_at: float | None = None  # the first step that held it
        self.num_preemptions = 0
        self.reload: ReloadReport | None = None  # what became of its prefix in lower tiers; None: none was there
        self.reload_tried = False  # since it waits; it then starts with what is on the device
        self.reported = False  # a chunk with stats has left: the next stats go with the last chunk
        own = frozenset(spec.sampling.stop_token_ids)
        limit = spec.sampling.max_tokens
        # Prompt and output: it ends with that many.
        self.most_tokens = max_len if limit is None else min(max_len, self.num_prompt_tokens + limit)
        self.stop_ids = own if spec.sampling.ignore_eos else own | eos_token_ids

    @property
    def sequence_id(self) -> SequenceId:
        return self.spec.sequence_id

    @property
    def num_tokens(self) -> int:
        """Known tokens: the prompt's and the output's."""
        return len(self.token_ids)

    @property
    def num_output_tokens(self) -> int:
        """Output tokens known so far, those of earlier tries included; the next token's position."""
        return len(self.token_ids) - self.num_prompt_tokens

    @property
    def output_token_ids(self) -> array[int]:
        """A copy of the output so far."""
        return self.token_ids[self.num_prompt_tokens :]

    @property
    def num_remaining(self) -> int:
        """Known tokens whose K/V is not stored yet; 1 for a sequence that is decoding."""
        return len(self.token_ids) - self.num_computed

    @property
    def end(self) -> SequenceEnd | None:
        """Whether the newest output token is the last one, and why."""
        token_ids = self.token_ids
        if token_ids[-1] in self.stop_ids and self.num_output_tokens > self.spec.sampling.min_tokens:
            return SequenceEnd(FinishReason.STOP, token_ids[-1])
        if len(token_ids) >= self.most_tokens:
            return SequenceEnd(FinishReason.LENGTH)
        return None

    def item(self, num_tokens: int, start: int | None = None) -> StepItem:
        """The next ``num_tokens`` tokens, or those from ``start`` on."""
        start = self.num_computed if start is None else start
        token_ids = self.token_ids
        stop = start + num_tokens
        return StepItem(
            self.spec.sequence_id,
            tuple(token_ids[start:stop]),
            start,
            self.page_ids,
            stop == len(token_ids),
            self.spec.sampling,
            token_ids,
            self.num_prompt_tokens,
        )

    def next_item(self, start: int, row: int | None) -> StepItem:
        """One token at ``start``; with ``row``, the one that is being sampled there."""
        token_ids = self.token_ids
        return StepItem(
            self.spec.sequence_id,
            (PENDING_TOKEN if row is not None else token_ids[start],),
            start,
            self.page_ids,
            True,
            self.spec.sampling,
            token_ids,
            self.num_prompt_tokens,
            row,
        )

    def stats(self, now: float) -> StageStats:
        """What it has cost here until now; a step has held it."""
        assert self.started_at is not None, "a token was sampled, so a step held the sequence"
        return StageStats(
            worker_id=UNNAMED_WORKER,
            role=Role.PREFILL if self.spec.hold_kv else Role.DECODE,
            queue_s=self.started_at - self.arrived_at,
            compute_s=now - self.started_at,
            cached_tokens=self.num_cached_tokens or 0,
            num_preemptions=self.num_preemptions,
            reload=self.reload,
        )

    def move(self, status: SequenceStatus) -> None:
        """Change the status; a move that ``ALLOWED_MOVES`` lacks is our bug, and changes nothing."""
        assert status in ALLOWED_MOVES[self.status], f"{self.sequence_id}: {self.status.name} -> {status.name}"
        self.status = status
