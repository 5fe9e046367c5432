"""Which requests are sent: the same ones to every arm, and no two that share a prefix.

A wave is ``concurrency`` requests sent at once. Every wave of a run has prompts of its own, so that no prefix cache
answers a repetition of the measurement; all prompts are cut from the LICENSE at the repository's root, English prose
that does not change when the documentation does.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from tokenizers import Tokenizer

TEXT_PATH = Path(__file__).resolve().parent.parent / "LICENSE"
MIN_PROMPT_TOKENS, MAX_PROMPT_TOKENS = 32, 256


@dataclass(frozen=True)
class Wave:
    """Requests that are sent at once. ``measured`` is False for a warm-up."""

    prompts: tuple[tuple[int, ...], ...]  # token ids
    num_new_tokens: int  # of each request, end-of-sequence tokens ignored
    measured: bool

    @property
    def concurrency(self) -> int:
        return len(self.prompts)


def waves(
    model_folder: Path, concurrencies: Sequence[int], num_repeats: int, num_new_tokens: int, seed: int = 0
) -> list[Wave]:
    """One warm-up and ``num_repeats`` measured waves for each concurrency, in order."""
    text = TEXT_PATH.read_text(encoding="utf-8")
    token_ids = Tokenizer.from_file(str(model_folder / "tokenizer.json")).encode(text).ids
    draw = random.Random(seed)
    num_prompts = sum(concurrencies) * (num_repeats + 1)
    starts = iter(draw.sample(range(len(token_ids) - MAX_PROMPT_TOKENS), num_prompts))

    def prompt() -> tuple[int, ...]:
        start = next(starts)
        return tuple(token_ids[start : start + draw.randint(MIN_PROMPT_TOKENS, MAX_PROMPT_TOKENS)])

    return [
        Wave(tuple(prompt() for _ in range(concurrency)), num_new_tokens, measured=repeat > 0)
        for concurrency in concurrencies
        for repeat in range(num_repeats + 1)
    ]
