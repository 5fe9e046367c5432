"""When does decoding go on while prompts are computed, and on how much of the device? Pure.

    layered       a decoding step after every *group* of the prompts' layers. Groups are as large as the promised time
                  between two tokens allows; without a promise there are as many as prompts have 512 tokens.
    partitioned   all the time, beside them. The prompts get the largest part of the device beside which a decoding
                  step keeps the promise; without one, beside which it takes ``NO_PROMISE`` times as long as alone.

Layered is *Layered Prefill* (Lee and others 2025): experts' weights are read once for a whole prompt in a layer, and
not once for each chunk of it, and nobody waits for more than a group. Partitioned is *Nexus* (Shi and others 2025):
prefill is bound by arithmetic and decoding by memory, so side by side both lose less than they would in turns.

Nobody knows what a decoding step takes beside prompts on some part of a device before it was tried: ``Slowdowns``
begins at a guess and learns it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from engine.step_seconds import StepSeconds

GROUP_TOKENS = 512  # of prompts, whose layers are one group if nothing was promised
NO_PROMISE = 1.75  # times as long as alone, that a decoding step may take
_LEARNING = 0.2  # share of the newest measurement


@dataclass(frozen=True, slots=True)
class StepShape:
    """What a step holds, as far as seconds are concerned."""

    prompt_tokens: int = 0
    prompt_pairs: float = 0.0
    batch: int = 0
    context_tokens: int = 0


@dataclass(frozen=True, slots=True)
class Choice:
    """``number``: layers of a group, or of the partition; and why."""

    number: int
    reason: str


def layer_group(
    costs: StepSeconds | None, slo_s: float | None, num_layers: int, prompts: StepShape, decoding: StepShape
) -> Choice:
    """How many layers of ``prompts`` are computed between two decoding steps: 1 to ``num_layers``."""
    if slo_s is None or costs is None:
        num_groups = min(num_layers, -(-prompts.prompt_tokens // GROUP_TOKENS))
        why = "nothing was promised" if slo_s is None else "no step was seen yet"
        layers = -(-num_layers // max(1, num_groups))
        return Choice(layers, f"{layers} of {num_layers} layers: {why}, {num_groups} groups of {GROUP_TOKENS} tokens")
    prompts_s = costs.once + costs.prompted + costs.prompts(prompts.prompt_tokens, prompts.prompt_pairs)
    layer_s = max(prompts_s, costs.launch) / num_layers
    decode_s = costs.decode(decoding.batch, decoding.context_tokens)
    layers = max(1, min(num_layers, int((slo_s - decode_s) / max(layer_s, 1e-9))))
    took = f"a layer takes {layer_s * 1e3:.2f} ms, decoding {decode_s * 1e3:.1f} of {slo_s * 1e3:.1f}"
    return Choice(layers, f"{layers} of {num_layers} layers: {took}")


class Slowdowns:
    """How many times as long a decoding step takes beside prompts on each part of a device. For one thread."""

    def __init__(self, shares: Sequence[float]) -> None:
        """``shares``: of the device's multiprocessors, the largest first."""
        self.shares = tuple(shares)
        self._known = [1 + share * share for share in shares]  # the first guess is hopeful, so it is tried

    def of(self, index: int) -> float:
        """Of the part number ``index``, as far as it is known."""
        return self._known[index]

    def learn(self, index: int, alone_s: float, seconds: float) -> None:
        """A decoding step that takes ``alone_s`` by itself took ``seconds`` beside prompts there."""
        if alone_s > 0:
            self._known[index] += _LEARNING * (max(1.0, seconds / alone_s) - self._known[index])

    def choose(self, costs: StepSeconds | None, slo_s: float | None, decoding: StepShape) -> Choice:
        """The part that prompts are to be computed on."""
        if not decoding.batch:
            return Choice(0, "the whole device: nobody decodes")
        alone_s = 0.0 if costs is None else costs.decode(decoding.batch, decoding.context_tokens)
        allowed = NO_PROMISE if slo_s is None or not alone_s else slo_s / alone_s
        within = (index for index, slowdown in enumerate(self._known) if slowdown <= allowed)
        index = next(within, len(self._known) - 1)
        took = f"decoding takes {self._known[index]:.2f} times its {alone_s * 1e3:.1f} ms, {allowed:.2f} are allowed"
        return Choice(index, f"{self.shares[index]:.0%} of the device for prompts: {took}")
