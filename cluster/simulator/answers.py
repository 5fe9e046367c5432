"""What does the model say? Tokens that were made up with the workload, so that every worker says the same.

An engine asks for the next token of a sequence; which answer is meant is in the sequence's ``sampling.seed``, which
router and scheduler pass on unchanged. So a sequence that is resumed elsewhere goes on as it would have, and the next
turn of a conversation finds what the last one said in the prefix caches.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import chain, islice, repeat

from core.request import SequenceId, SequenceSpec
from engine.step_plan import SampledToken


@dataclass(frozen=True, slots=True)
class Answer:
    """``token_ids``, then ``filler`` as often as is asked for."""

    filler: int
    token_ids: tuple[int, ...] = ()

    def tokens(self, start: int, end: int) -> tuple[int, ...]:
        """Tokens ``start .. end - 1``."""
        known = self.token_ids[start:end]
        return known + (self.filler,) * (end - start - len(known))

    def sampled_from(self, start: int) -> Iterator[SampledToken]:
        """Tokens ``start ..`` without end, as a sampler gives them."""
        known: Iterator[SampledToken] = map(SampledToken, islice(self.token_ids, start, None))
        return chain(known, repeat(SampledToken(self.filler)))


class AnswerBook:
    """The answers of the requests that are in flight, by seed."""

    def __init__(self) -> None:
        self._answers: dict[int, Answer] = {}

    def add(self, seed: int, answer: Answer) -> None:
        """From now on ``seed`` means ``answer``."""
        self._answers[seed] = answer

    def forget(self, seed: int) -> None:
        """Nobody will ask for it any more."""
        del self._answers[seed]

    def of(self, spec: SequenceSpec) -> Answer:
        """What is said to that sequence; a sequence that nobody waits for any more gets made-up zeros."""
        assert spec.sampling.seed is not None, "a gateway draws a seed for every request"
        return self._answers.get(spec.sampling.seed, _NOTHING)


_NOTHING = Answer(0)


class Sampler(dict[SequenceId, SampledToken]):
    """The next token of each sequence of one engine; every look takes one. What ``commit_step`` is given.

    The dict holds those that say the same token from now on, hence most; the others' are found missing.
    """

    def __init__(self) -> None:
        super().__init__()
        self._next: dict[SequenceId, Iterator[SampledToken]] = {}

    def begin(self, spec: SequenceSpec, num_known: int, answer: Answer) -> None:
        """The engine takes the sequence in, with ``num_known`` output tokens."""
        if num_known >= len(answer.token_ids):
            self[spec.sequence_id] = SampledToken(answer.filler)
        else:
            self._next[spec.sequence_id] = answer.sampled_from(num_known)

    def end(self, sequence_ids: Sequence[SequenceId]) -> None:
        """These have left the engine; unknown ones are ignored."""
        for sequence_id in sequence_ids:
            self.pop(sequence_id, None)
            self._next.pop(sequence_id, None)

    def __missing__(self, sequence_id: SequenceId) -> SampledToken:
        return next(self._next[sequence_id])
