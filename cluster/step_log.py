"""Which engine steps has a gateway not heard of yet? The latest ones, numbered, so that each reader gets each once.

Bounded: a reader that is slow, or late, misses the older ones. Samples are for fitting costs, none of them matters.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable

from core.compute import StepSample

MAX_STEPS = 64  # of one report


class StepLog:
    """The latest steps of one engine. One thread."""

    def __init__(self, max_steps: int = MAX_STEPS) -> None:
        self._steps: deque[StepSample] = deque(maxlen=max_steps)
        self._number = 0

    @property
    def number(self) -> int:
        """Steps that were ever recorded."""
        return self._number

    def record(self, steps: Iterable[StepSample]) -> None:
        """The engine computed these."""
        for step in steps:
            self._steps.append(step)
            self._number += 1

    def since(self, number: int) -> tuple[StepSample, ...]:
        """What came after the first ``number`` steps and is still here."""
        num_new = min(self._number - number, len(self._steps))
        return tuple(self._steps)[len(self._steps) - num_new :]
