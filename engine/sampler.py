"""Which token comes next? From logits to token ids, a pure function of (logits, parameters, seed, position)."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from engine.scheduler import SampledToken, StepItem


class Sampler:
    """Samples one token for each row of logits. ``eos_token_ids`` are masked until ``min_tokens`` are out."""

    def __init__(self, eos_token_ids: tuple[int, ...]) -> None:
        self._eos_token_ids = eos_token_ids

    def sample(self, logits: torch.Tensor, items: Sequence[StepItem]) -> list[SampledToken]:
        """One token for each row. ``logits``: [len(items), vocab], any float dtype and device."""
        return [SampledToken(token_id) for token_id in logits.argmax(dim=-1).tolist()]
