"""What comes to a simulated service? Conversations of one or more turns, with tokens that were made up.

A prompt is written as blocks, each standing for tokens that all have the block's number: two prompts share a prefix
exactly as far as their blocks agree, and a hundred thousand prompts fit into memory. Tokens are spelt out when the
request is sent.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain, repeat

from cluster.simulator.answers import Answer
from core.request import NO_SLO, GenerateRequest, RequestId, SamplingParams, Slo


@dataclass(frozen=True, slots=True)
class Prompt:
    """``num_tokens`` tokens: block i is tokens ``i * block_tokens ..``, all with the number ``blocks[i]``; what no
    block covers has the number ``tail``."""

    num_tokens: int
    tail: int
    blocks: Sequence[int] = ()
    block_tokens: int = 0

    def tokens(self, start: int = 0, end: int | None = None) -> tuple[int, ...]:
        """Tokens ``start .. end - 1``; beyond the prompt's end there are none."""
        end = self.num_tokens if end is None else min(end, self.num_tokens)
        if start >= end:
            return ()
        if not self.blocks:
            return (self.tail,) * (end - start)
        size = self.block_tokens
        first = start // size
        covered = self.blocks[first : -(-end // size)]
        known = tuple(chain.from_iterable(repeat(number, size) for number in covered))
        known = known[start - first * size : end - first * size]
        return known + (self.tail,) * (end - start - len(known))


@dataclass(frozen=True, slots=True)
class Turn:
    """One request. ``number`` is its name, and unique; ``think_s`` passes between the last answer and it."""

    number: int
    prompt: Prompt
    output_tokens: int
    answer: Answer
    think_s: float = 0.0
    slo: Slo = NO_SLO
    salt: bytes = b""

    @property
    def input_tokens(self) -> int:
        """Length of the prompt."""
        return self.prompt.num_tokens

    def request(self, now: float) -> GenerateRequest:
        """As a gateway makes it: greedy, of exactly ``output_tokens`` tokens, its seed naming the answer."""
        return GenerateRequest(
            request_id=RequestId(str(self.number)),
            prompt_token_ids=self.prompt.tokens(),
            sampling=SamplingParams(max_tokens=self.output_tokens, temperature=0.0, ignore_eos=True, seed=self.number),
            salt=self.salt,
            arrived_at=now,
            slo=self.slo,
        )


@dataclass(frozen=True, slots=True)
class Conversation:
    """Turns one after the other. ``starts_at``: of the first, seconds from the workload's beginning; 0 where users
    take their turns (``Workload.num_users``)."""

    starts_at: float
    turns: tuple[Turn, ...]
