"""What does an engine cost to run, and what did its last steps take? The nouns that workers report and cost models fit.

Counted where the model is (engine/), read where seconds are predicted (cluster/). No instants: these cross process
borders.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class ComputeProfile:
    """One loaded model on one device, as far as seconds are concerned. All 0 and empty: nothing is known.

    ``device``: what it is, as the driver or the kernel calls it; begins with ``cpu`` if it is one.
    """

    device: str = ""
    num_devices: int = 1  # that compute one step together; of a CPU: threads
    weight_bytes: int = 0  # that a step reads
    weight_flops: float = 0.0  # of one token outside attention: two for each weight that it meets
    attention_flops: float = 0.0  # of one token that attends to one token, in all layers that see every token
    step_tokens: int = 0  # prompt tokens that one step computes at most; 0: no limit is known


UNKNOWN_PROFILE = ComputeProfile()


@dataclass(frozen=True, slots=True)
class EngineModes:
    """What computes an engine's steps, and why not something faster. All empty: nothing is known."""

    attention: str = ""  # the backend's name
    attention_reason: str = ""
    forward: str = ""  # compiled or eager, and with which decode graphs
    forward_reason: str = ""  # why it is not compiled, or not captured; empty if it is both
    num_fallbacks: int = 0  # times that the engine left what it was asked for: compiled code, graphs
    colocated: str = ""  # how prompts and decoding share the engine: engine.colocated_mode
    colocated_reason: str = ""  # how the latest chunk, group of layers or partition was chosen
    prompt_steps: tuple[tuple[str, int], ...] = ()  # steps that held prompts, by what bounded these
    num_decode_beside: int = 0  # decoding steps between or beside the layers of prompts
    num_cascade: int = 0  # decoding steps that read prefixes once which their sequences share


UNKNOWN_MODES = EngineModes()


@dataclass(frozen=True, slots=True)
class StepSample:
    """One engine step: what it held, and how long it took. Sequences that computed one token each are decoding."""

    prefill_tokens: int
    prefill_pairs: float  # pairs of tokens that attend: each to what was stored before and to half of its own chunk
    decode_batch: int
    decode_context: int  # tokens of all those sequences, the one that was computed included; those read once, once
    seconds: float

    @property
    def is_prefill(self) -> bool:
        """Prompts alone."""
        return self.prefill_tokens > 0 and not self.decode_batch

    @property
    def is_decode(self) -> bool:
        """Decoding sequences alone."""
        return self.decode_batch > 0 and not self.prefill_tokens
