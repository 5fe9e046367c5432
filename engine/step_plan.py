"""The plan of a step, and what comes back from it: what a scheduler and whoever computes its steps share. Torch-free.

A decode step costs the same for short and long contexts: an item refers to the block table and to the token array of
its sequence, it does not copy them.
"""

from __future__ import annotations

from array import array
from dataclasses import dataclass
from typing import NamedTuple

from core.request import SamplingParams, SequenceId, SequenceSpec, TokenLogprob

PENDING_TOKEN = 0  # stands where a token is not known yet


class StepItem(NamedTuple):
    """One sequence's share of a step. A tuple, because decode makes one for each token.

    The step computes ``token_ids`` at positions ``start .. start + len(token_ids) - 1``, stores their K/V in
    ``page_ids`` (position ``i`` goes to slot ``i % page_size`` of ``page_ids[i // page_size]``) and, if ``samples``,
    needs the logits of the last of them.
    """

    sequence_id: SequenceId
    token_ids: tuple[int, ...]  # the tokens to compute, at least one
    start: int  # position of token_ids[0]; tokens 0 .. start - 1 are stored already
    page_ids: tuple[int, ...]  # the whole block table, pages of token_ids included; may hold more pages than that
    samples: bool  # a token is to be sampled from the last position's logits
    sampling: SamplingParams
    # Prompt and output so far, for penalties: a reference to the scheduler's own array, to be read before
    # commit_step and never kept (a tensor that shares its memory would stop it from growing).
    known_token_ids: array[int]
    num_prompt_tokens: int  # known_token_ids[:num_prompt_tokens] is the prompt, the rest is output
    # The one token to compute is still being sampled, by this sampling item of the step before; its place in
    # ``token_ids`` is taken by PENDING_TOKEN, and ``known_token_ids`` lacks it. None: all tokens are known.
    pending_row: int | None = None

    @property
    def position(self) -> int:
        """Output index of the token to be sampled; to be asked before the step before is committed."""
        return len(self.known_token_ids) - self.num_prompt_tokens + (self.pending_row is not None)


@dataclass(frozen=True, slots=True)
class StartedSequence:
    """A sequence that begins, or begins again after a preemption, in this step."""

    spec: SequenceSpec
    num_cached_tokens: int  # tokens found in the prefix cache: nothing of them is computed
    page_ids: tuple[int, ...]  # pages for every known token; the first num_cached_tokens // page_size are full


@dataclass(frozen=True, slots=True)
class StepPlan:
    """One step: first the items that compute one token and sample, then the other prefill chunks; each in the order
    in which the sequences were started. Logits come back in the order of ``sampling_items``."""

    items: tuple[StepItem, ...]
    started: tuple[StartedSequence, ...] = ()

    @property
    def sampling_items(self) -> tuple[StepItem, ...]:
        """The items that need logits, in the plan's order."""
        return tuple(item for item in self.items if item.samples)

    @property
    def num_tokens(self) -> int:
        """Tokens that the step computes."""
        return sum(len(item.token_ids) for item in self.items)


@dataclass(frozen=True, slots=True)
class SampledToken:
    """What the sampler chose for one item. ``logprob`` is there if the item's ``sampling.logprobs`` is."""

    token_id: int
    logprob: TokenLogprob | None = None
