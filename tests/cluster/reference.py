"""What transformers itself would generate: the expectation that every path through the service is held to."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM

from tests.tiny_models import generate_with

# One token, around page borders of 16 and 64, several windows, and a mixed batch of eight.
PROMPT_LENGTHS = (1, 5, 16, 17, 33, 64, 65, 100)


@dataclass
class ReferenceModel:
    """A model folder, prompts for it, and its own greedy continuations (computed once each)."""

    folder: Path
    prompts: tuple[tuple[int, ...], ...]
    _model: Any = None
    _expected: dict[tuple[tuple[int, ...], int], list[int]] = field(default_factory=dict)

    def expected(self, prompt: Sequence[int], num_new: int) -> list[int]:
        """The ``num_new`` tokens of ``transformers.generate``, greedy, float32."""
        key = (tuple(prompt), num_new)
        if key not in self._expected:
            self._expected[key] = self._generate(key[0], num_new)
        return self._expected[key]

    def _generate(self, prompt: tuple[int, ...], num_new: int) -> list[int]:
        if self._model is None:
            self._model = AutoModelForCausalLM.from_pretrained(self.folder, dtype=torch.float32).eval()
        return generate_with(self._model, list(prompt), num_new)


def make_prompts(vocab_size: int, seed: int = 7) -> tuple[tuple[int, ...], ...]:
    """Eight random prompts of mixed lengths."""
    draw = random.Random(seed)
    return tuple(tuple(draw.randrange(vocab_size) for _ in range(length)) for length in PROMPT_LENGTHS)
