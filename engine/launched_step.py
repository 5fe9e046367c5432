"""A step between its launch and its books, and what it brings."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from core.request import SequenceFailure, TokenChunk
from engine.sampler import Sampled
from engine.step_plan import StepPlan


@dataclass(frozen=True, slots=True)
class StepOutput:
    """What one step brought. Both empty: nothing could be computed, or only parts of prompts were."""

    chunks: tuple[TokenChunk, ...] = ()
    failures: tuple[SequenceFailure, ...] = ()


@dataclass(frozen=True, slots=True)
class LaunchedStep:
    """A step whose tokens have not been waited for.

    ``beside``: it decodes while a step of prompts is computed. ``mark``: on the device's stream before it.
    ``saved_tokens``: of its sequences, whose K/V it has read for another one of them and not again. ``launch_s``: that
    the host took for launching it on a GPU and nothing else; 0: it did something else too, or there is no GPU.
    """

    plan: StepPlan
    sampled: Sampled
    began_at: float
    beside: bool = False
    saved_tokens: int = 0
    mark: torch.cuda.Event | None = None
    launch_s: float = 0.0

    @property
    def is_done(self) -> bool:
        """Whether reading its tokens waits for nothing."""
        return self.sampled.is_ready

    @property
    def device_s(self) -> float | None:
        """Seconds that the device took, once it is done; None: there was no mark."""
        return None if self.mark is None else self.sampled.seconds_since(self.mark)
