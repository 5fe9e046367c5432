"""How many prompt tokens may a step hold, and what bounds them? Pure, but for one step's own tally.

A step takes as long as all that it holds, and its decoding sequences wait for all of it. So beside them the budget of
prompts is in *seconds*: what the promised time between two tokens (``engine.tpot_slo_s``) leaves after decoding, by
what steps on this engine take (step_seconds.py). The same promise gives a chunk of 1,500 tokens beside ten short
sequences, and one of 300 beside a hundred long ones or far into a long prompt; a constant is wrong in one of them.

Chunks that are cut by it are multiples of ``TILE``, because matrix kernels compute whole tiles. Where decoding alone
takes longer than was promised, prompts still get one tile a step: nobody starves, and the reason says so (``LEAST``).
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from enum import StrEnum

from engine.step_seconds import StepSeconds

TILE = 64  # tokens

Costs = Callable[[], StepSeconds | None]


class Bound(StrEnum):
    """What kept a step's prompt tokens from being more."""

    WHOLE = "whole"  # nothing: all that could be computed was
    TOKENS = "tokens"  # engine.max_batch_tokens
    TPOT = "tpot"  # engine.tpot_slo_s
    LEAST = "least"  # decoding alone takes longer than engine.tpot_slo_s: one tile


class StepBudget:
    """The prompt tokens of one step. ``take`` them bit by bit."""

    def __init__(self, num_tokens: int, seconds: float = math.inf, costs: StepSeconds | None = None) -> None:
        """``seconds``: for prompts, by ``costs``; without costs only tokens count."""
        self.bound = Bound.WHOLE
        self.num_taken = 0
        self._num_tokens = num_tokens
        self._seconds = seconds
        self._costs = costs

    @property
    def in_seconds(self) -> bool:
        """Whether seconds are counted."""
        return self._costs is not None

    @property
    def is_full(self) -> bool:
        """Not even one token is left."""
        return self._num_tokens <= 0

    def fits(self, start: int, wanted: int) -> bool:
        """Would ``take`` give anything? If not, what bounds the step is noted."""
        num_tokens, bound = self._most(start, wanted)
        if not num_tokens:
            self._note(bound)
        return num_tokens > 0

    def take(self, start: int, wanted: int) -> int:
        """Tokens, of ``wanted`` of a prompt behind ``start`` earlier ones, that the step computes too."""
        num_tokens, bound = self._most(start, wanted)
        self._note(bound)
        self.num_taken += num_tokens
        self._num_tokens -= num_tokens
        if self._costs is not None:
            self._seconds -= self._costs.prompts(num_tokens, num_tokens * (start + num_tokens / 2))
        return num_tokens

    def _most(self, start: int, wanted: int) -> tuple[int, Bound]:
        num_tokens = min(wanted, max(0, self._num_tokens))
        bound = Bound.WHOLE if num_tokens == wanted else Bound.TOKENS
        if self._costs is None or num_tokens == 0:
            return num_tokens, bound
        fitting = self._costs.fitting(self._seconds, start)
        if fitting >= num_tokens:
            return num_tokens, bound
        if fitting >= TILE:
            return fitting - fitting % TILE, Bound.TPOT
        if self.num_taken == 0:
            return min(num_tokens, TILE), Bound.LEAST
        return 0, Bound.TPOT

    def _note(self, bound: Bound) -> None:
        """The latest bound counts, but what the promise could not hold stays said."""
        if bound is not Bound.WHOLE and self.bound is not Bound.LEAST:
            self.bound = bound


@dataclass(frozen=True, slots=True)
class BudgetChoice:
    """How the budget of the latest step that held prompts was found. Seconds are predicted."""

    bound: Bound
    num_tokens: int
    batch: int  # decoding sequences beside them
    decode_s: float | None  # that decoding takes; None: not asked
    slo_s: float | None
    launch_s: float = 0.0  # that launching takes; 0: not known, or the host is the device

    def __str__(self) -> str:
        beside = f"{self.num_tokens:,} prompt tokens beside {self.batch} decoding, bound: {self.bound.value}"
        if self.decode_s is None or self.slo_s is None:
            return beside
        launching = f", launching {self.launch_s * 1e3:.1f}" if self.launch_s else ""
        return f"{beside}; decoding takes {self.decode_s * 1e3:.1f} of {self.slo_s * 1e3:.1f} ms{launching}"


class StepBudgets:
    """Makes the budget of every step, and counts what bounded them."""

    def __init__(self, num_tokens: int, slo_s: float | None, costs: Costs) -> None:
        """``slo_s``: seconds that a step with decoding sequences may take; None: any. ``costs``: what is known now."""
        self.counts: Counter[Bound] = Counter()  # steps that held prompts
        self.latest: BudgetChoice | None = None
        self._num_tokens = num_tokens
        self._slo_s = slo_s
        self._costs = costs

    def beside(self, batch: int, context_tokens: Callable[[], int]) -> StepBudget:
        """Of a step that makes a token for each of ``batch`` sequences of ``context_tokens()`` together."""
        costs = self._costs() if self._slo_s is not None and batch else None
        if costs is None or self._slo_s is None:
            return StepBudget(self._num_tokens - batch)
        left_s = costs.left(self._slo_s, batch, context_tokens())
        return StepBudget(self._num_tokens - batch, left_s, costs)

    def note(self, budget: StepBudget, batch: int, context_tokens: Callable[[], int]) -> None:
        """A step was planned with it."""
        if not budget.num_taken:
            return
        self.counts[budget.bound] += 1
        costs = self._costs() if budget.in_seconds else None
        decode_s = None if costs is None else costs.decode(batch, context_tokens())
        launch_s = 0.0 if costs is None else costs.launch
        self.latest = BudgetChoice(budget.bound, budget.num_taken, batch, decode_s, self._slo_s, launch_s)
