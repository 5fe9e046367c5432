"""What comes to a simulated service? Conversations of one or more turns, with tokens that were made up.

A prompt is written as runs, (token id, how often): two prompts share a prefix exactly where their runs do, and a
hundred thousand prompts fit into memory. Tokens are spelt out when the request is sent.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from itertools import chain, repeat

from cluster.simulator.answers import Answer
from core.request import NO_SLO, GenerateRequest, RequestId, SamplingParams, Slo

Runs = tuple[tuple[int, int], ...]  # (token id, number of tokens)


def spell(runs: Runs) -> tuple[int, ...]:
    """The tokens of ``runs``."""
    if len(runs) == 1:
        return (runs[0][0],) * runs[0][1]
    return tuple(chain.from_iterable(repeat(token_id, count) for token_id, count in runs))


@dataclass(frozen=True, slots=True)
class Turn:
    """One request. ``number`` is its name, and unique; ``think_s`` passes between the last answer and it."""

    number: int
    prompt: Runs
    output_tokens: int
    answer: Answer
    think_s: float = 0.0
    slo: Slo = NO_SLO
    salt: bytes = b""

    @property
    def input_tokens(self) -> int:
        """Length of the prompt."""
        return sum(count for _, count in self.prompt)

    def request(self, now: float) -> GenerateRequest:
        """As a gateway makes it: greedy, of exactly ``output_tokens`` tokens, its seed naming the answer."""
        return GenerateRequest(
            request_id=RequestId(str(self.number)),
            prompt_token_ids=spell(self.prompt),
            sampling=SamplingParams(max_tokens=self.output_tokens, temperature=0.0, ignore_eos=True, seed=self.number),
            salt=self.salt,
            arrived_at=now,
            slo=self.slo,
        )


@dataclass(frozen=True, slots=True)
class Conversation:
    """Turns one after the other, the first ``starts_at`` seconds after the beginning."""

    starts_at: float
    turns: tuple[Turn, ...] = field(default=())
