"""How many virtual seconds does one engine step take? The only thing about an engine that a simulation makes up.

A step may hold parts of prompts and one token for each sequence of a decode batch. Three sources of seconds:

    FittedCost    coefficients of steps (cost_model.py)
    MeasuredCost  the same, saved by a live service, and spread about the line as its own steps were
    ProfiledCost  a table of whole prompts, measured alone: a prompt takes as long whatever its chunks and neighbours
    RooflineCost  a published model on a published device (roofline.py): the slower of compute and memory

Invariants: seconds are above 0 for a step that computes anything, equal for equal steps, and, but for what is spread,
do not fall when it computes more.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple, Protocol

from cluster.cost_model import ComputeCost, CostModel, LinearCost, SavedCosts, prefill_features
from cluster.roofline import Instance
from cluster.throughput_model import Polynomial
from engine.cost_fit import Sample, fit
from engine.step_seconds import StepSeconds

_LEAST_STEP_S = 1e-6
_NEGLIGIBLE = 1e-12  # prior of a coefficient that a profile leaves at 0


class PromptChunk(NamedTuple):
    """A part of a prompt that a step computes."""

    num_tokens: int
    start: int  # tokens before it, computed earlier or cached
    first: bool  # the first part of this prompt that this engine computes


class StepCost(Protocol):
    """Seconds of steps on one kind of worker. Pure."""

    def step_s(self, chunks: Sequence[PromptChunk], batch: int, context_tokens: int) -> float:
        """Of a step over ``chunks`` and one token for each of ``batch`` sequences of ``context_tokens`` together."""
        ...

    def seen(self, step_tokens: float) -> ComputeCost:
        """The same as linear costs, for policies that predict with it. A step computes ``step_tokens`` of prompts."""
        ...


def step_seconds(compute: ComputeCost) -> StepSeconds:
    """The same for a scheduler, which plans steps of prompts and decoding sequences together."""
    (once, token, pair), (base, row, context) = compute.prefill_cost.coefficients, compute.decode_cost.coefficients
    return StepSeconds(base, max(0.0, once - base), token, pair, row, context)


@dataclass(frozen=True)
class FittedCost:
    """Linear costs; what a step costs whatever it holds (weights are read) is paid once."""

    compute: ComputeCost

    def step_s(self, chunks: Sequence[PromptChunk], batch: int, context_tokens: int) -> float:
        seconds = 0.0
        if batch:
            base, each, context = self.compute.decode_cost.coefficients
            seconds = base + each * batch + context * context_tokens
        if chunks:
            once, token, pair = self.compute.prefill_cost.coefficients
            seconds += once - (min(once, base) if batch else 0.0)
            for chunk in chunks:
                num_tokens = chunk.num_tokens
                seconds += token * num_tokens + pair * num_tokens * (chunk.start + num_tokens / 2)
        return max(seconds, _LEAST_STEP_S)

    def seen(self, step_tokens: float) -> ComputeCost:
        return replace(self.compute, step_tokens=step_tokens)


@dataclass(frozen=True)
class MeasuredCost:
    """Steps of a live service are not all as long as the line through them says: others compute on the same cores, the
    machine has ups and downs. Which of the measured ratios a step gets is drawn by what it holds, so that it is the
    same whoever asks, and in which order."""

    saved: SavedCosts

    def step_s(self, chunks: Sequence[PromptChunk], batch: int, context_tokens: int) -> float:
        seconds = FittedCost(self.saved.compute).step_s(chunks, batch, context_tokens)
        ratios = self.saved.prefill_ratios if chunks else self.saved.decode_ratios
        if not ratios:
            return seconds
        # Of numbers alone: the same in every process, unlike that of text.
        drawn = hash((tuple(chunks), batch, context_tokens)) % len(ratios)
        return max(seconds * ratios[drawn], _LEAST_STEP_S)

    def seen(self, step_tokens: float) -> ComputeCost:
        return replace(self.saved.compute, step_tokens=step_tokens)


@dataclass(frozen=True)
class ProfiledCost:
    """``prefill_s``: of a whole prompt by its tokens; ``decode_step_s``: of a step, whatever its batch.

    A chunk takes what the curve rises by over it; the first one also what the curve has at 0. So chunks add up to the
    measured prompt, and what is cached costs nothing.
    """

    prefill_s: Polynomial
    decode_step_s: float

    def step_s(self, chunks: Sequence[PromptChunk], batch: int, context_tokens: int) -> float:
        seconds = self.decode_step_s if batch else 0.0
        coefficients = self.prefill_s.coefficients
        for chunk in chunks:
            seconds += coefficients[0] if chunk.first else 0.0
            end = chunk.start + chunk.num_tokens
            for power, coefficient in enumerate(coefficients[1:], start=1):
                seconds += coefficient * (end**power - chunk.start**power)
        return max(seconds, _LEAST_STEP_S)

    def seen(self, step_tokens: float) -> ComputeCost:
        once, token, square, *_ = (*self.prefill_s.coefficients, 0.0, 0.0)
        prefill = (once, token, 2 * square)  # a new token attends to half of the new ones
        if min(prefill) < 0:
            prefill = self._never_negative()
        # What is paid once is paid for each prompt, in however many steps.
        return ComputeCost(LinearCost(prefill), LinearCost((self.decode_step_s, 0.0, 0.0)))

    def _never_negative(self) -> tuple[float, float, float]:
        """The closest curve that policies can use: a quadratic through a few points may dip below 0."""
        lengths = [2**power for power in range(7, 18)]
        points = [(length, self.step_s([PromptChunk(length, 0, True)], 0, 0)) for length in lengths]
        samples = [Sample(prefill_features(n, 0), seconds, number) for number, (n, seconds) in enumerate(points)]
        once, token, pair = fit((_NEGLIGIBLE, points[-1][1] / lengths[-1], _NEGLIGIBLE), samples)
        return once, token, pair


@dataclass(frozen=True)
class RooflineCost:
    """A model on devices."""

    instance: Instance

    def step_s(self, chunks: Sequence[PromptChunk], batch: int, context_tokens: int) -> float:
        parts = [(chunk.num_tokens, chunk.start) for chunk in chunks]
        return max(self.instance.step_s(parts, batch, context_tokens), _LEAST_STEP_S)

    def seen(self, step_tokens: float) -> ComputeCost:
        model = CostModel()
        model.add_profile("roofline", self.instance.live(), step_tokens)
        return model.view().profiles["roofline"]
