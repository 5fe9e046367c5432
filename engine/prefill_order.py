"""Which waiting prompt is computed first, and may it hold up a step that is being computed? Pure.

    FirstCome    as they came; a step is never held up
    LeastSlack   whose first token is due first; and between two layers of a step that computes other prompts, one that
                 would be late by the end of that step is computed at once, and the step goes on where it was

The second is FlowPrefill's idea: a long prompt needs no small chunks to let short ones through. A prompt that cannot be
in time any more lets pass whoever can, until it is late by as much as it was promised; then it goes first. So nobody
waits for ever. What was promised nothing is due after ``PATIENCE_S``.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Protocol

from engine.sequence import Sequence

PATIENCE_S = 60.0


@dataclass(frozen=True, slots=True)
class Pace:
    """How fast the step that is being computed goes, all in seconds."""

    left_s: float  # until its end
    token_s: float  # for a prompt token
    step_s: float  # that any step takes


class PrefillOrder(Protocol):
    """An order of prompts. ``waiting``: next to start first, as ``insert`` has put them."""

    @property
    def interrupts(self) -> bool:
        """Whether ``is_urgent`` is ever true."""
        ...

    def insert(self, waiting: deque[Sequence], sequence: Sequence) -> None:
        """Put a sequence that came to its place."""
        ...

    def head(self, waiting: deque[Sequence], now: float) -> int:
        """The index of the one that is to start next; ``waiting`` is not empty."""
        ...

    def prefilling(self, sequences: Iterable[Sequence]) -> Iterable[Sequence]:
        """Sequences whose prefill is under way, those that go on first in front."""
        ...

    def is_urgent(self, sequence: Sequence, own_s: float, pace: Pace, now: float) -> bool:
        """Would a waiting sequence, which takes ``own_s``, be in time now and late after the step under way?"""
        ...


class FirstCome:
    """``fcfs``."""

    interrupts = False

    def insert(self, waiting: deque[Sequence], sequence: Sequence) -> None:
        waiting.append(sequence)

    def head(self, waiting: deque[Sequence], now: float) -> int:
        return 0

    def prefilling(self, sequences: Iterable[Sequence]) -> Iterable[Sequence]:
        return sequences

    def is_urgent(self, sequence: Sequence, own_s: float, pace: Pace, now: float) -> bool:
        return False


class LeastSlack:
    """``slack``."""

    interrupts = True

    def insert(self, waiting: deque[Sequence], sequence: Sequence) -> None:
        index, own = len(waiting), due_at(sequence)
        while index and waiting[index - 1].num_preemptions == 0 and due_at(waiting[index - 1]) > own:
            index -= 1
        waiting.insert(index, sequence)

    def head(self, waiting: deque[Sequence], now: float) -> int:
        first = waiting[0]
        if first.num_preemptions or now > 2 * due_at(first) - first.arrived_at:
            return 0  # it ran before, or is late by all that it was promised
        return next((index for index, sequence in enumerate(waiting) if due_at(sequence) >= now), 0)

    def prefilling(self, sequences: Iterable[Sequence]) -> Iterable[Sequence]:
        return sorted(sequences, key=due_at)

    def is_urgent(self, sequence: Sequence, own_s: float, pace: Pace, now: float) -> bool:
        due = due_at(sequence)
        return now + own_s <= due < now + pace.left_s + own_s


ORDERS: dict[str, type[FirstCome] | type[LeastSlack]] = {"fcfs": FirstCome, "slack": LeastSlack}


def due_at(sequence: Sequence) -> float:
    """When its first token is wanted, on the engine's Clock."""
    due = sequence.spec.first_token_by
    return sequence.arrived_at + PATIENCE_S if due is None else due
