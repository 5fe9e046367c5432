"""What does a made-up prompt say? Words, or token ids, of exactly the length that a trace asks for. Pure.

The simulator's workload says of every token of a prompt which number it has; two prompts share a beginning exactly as
far as their numbers agree. Here numbers become content: the token at position p with number n is drawn from the pool
of words (or of token ids) by a hash of seed, n and p. So prompts share what the trace shares, and nothing else.

    token ids   exact
    text        words that the model's tokenizer reads as one token each; the whole is counted, and words are taken away
                or added at its end until the count is right
    text, with no tokenizer given: common English words, one for each token, corrected by how many tokens the server
                said that it counted in a prompt of the like (``Facts.tokens_per_word``)

Where a conversation goes on, what stands in the place of an answer is the answer that came, cut or filled up to its
length: what decoding wrote is found in the caches, as with a real client.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from cluster.bench.target import ASSISTANT, CHAT, USER, Facts, Message, Prompt
from cluster.simulator.conversation import Prompt as Numbers
from cluster.simulator.conversation import Turn

_Ids = NDArray[np.int64]

# One token each, with the space before them, in the byte-level vocabularies of GPT-2, Llama 3, Qwen and SmolLM.
_COMMON = """
the of and to in is you that it he was for on are as with his they at be this have from or one had by word but
not what all were we when your can said there use an each which she do how their if will up other about out many
then them these so some her would make like him into time has look two more write go see number no way could
people my than first water been call who oil its now find long down day did get come made may part over new
sound take only little work know place year live me back give most very after thing our just name good man think
say great where help through much before line right too mean old any same tell boy follow came want show also
around form three small set put end does another well large must big even such because turn here why ask went
men read need land
"""
WORDS = tuple(_COMMON.split())
_LEAST_POOL = 16  # words; fewer would make prompts that repeat themselves
_CORRECTIONS = 8
_MIX = (0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB)  # of splitmix64


class TextTokenizer(Protocol):
    """Of the served model; ``cluster.tokenizer.Tokenizer`` is one."""

    def encode(self, text: str, *, field: str) -> Sequence[int]: ...


@dataclass(frozen=True, slots=True)
class Answered:
    """An answer that came, and where it stands in the prompts after it: tokens ``start .. end - 1``."""

    start: int
    end: int
    text: str
    token_ids: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Written:
    """A prompt, and how many tokens it has if that could be counted; else what was aimed at."""

    prompt: Prompt
    num_tokens: int


class Wording(Protocol):
    """Turns numbers into content."""

    def write(self, prompt: Numbers, answers: Sequence[Answered]) -> Written:
        """``prompt``, with the answers in their places, which ascend."""
        ...


def place_of_answer(turn: Turn, following: Turn) -> tuple[int, int] | None:
    """Where in the following prompt this turn's answer stands; None: it does not begin with all of this one."""
    if following.prompt.tokens(0, turn.input_tokens) != turn.prompt.tokens():
        return None
    end = min(turn.input_tokens + turn.output_tokens, following.input_tokens)
    return (turn.input_tokens, end) if end > turn.input_tokens else None


@dataclass(frozen=True)
class TokenWording:
    """Ids out of a vocabulary; ``first`` and below are left out, as special tokens stand there."""

    vocab_size: int
    seed: int = 0
    first: int = 0

    def write(self, prompt: Numbers, answers: Sequence[Answered]) -> Written:
        drawn = _draw(np.asarray(prompt.tokens(), dtype=np.int64), self.seed, self.vocab_size - self.first) + self.first
        for answer in answers:
            own = answer.token_ids[: answer.end - answer.start]
            drawn[answer.start : answer.start + len(own)] = own
        return Written(tuple(drawn.tolist()), len(drawn))


@dataclass(frozen=True)
class TextWording:
    """Text of so many tokens as ``count`` counts. ``pool``: words with the space before them.

    as_chat: whether a conversation is written as messages of user and assistant, or as one text.
    count: tokens of a prompt, all that the server adds included; None: nobody counts, ``facts`` are taken.
    """

    pool: tuple[str, ...]
    as_chat: bool
    facts: Facts
    count: Callable[[Prompt], int] | None = None
    seed: int = 0

    def write(self, prompt: Numbers, answers: Sequence[Answered]) -> Written:
        wanted = prompt.num_tokens
        drawn = _draw(np.asarray(prompt.tokens(), dtype=np.int64), self.seed, len(self.pool))
        words = [self.pool[index] for index in drawn.tolist()]
        parts: list[tuple[str, list[str]]] = []
        begin = 0
        for answer in answers:
            parts += [(USER, words[begin : answer.start]), (ASSISTANT, [answer.text])]
            begin = answer.end
        last = words[begin:]
        if self.count is None:
            last = self._estimated(last, wanted, begin)
            return Written(self._prompt(parts, last), wanted)
        return self._exact(parts, last, wanted)

    def _estimated(self, last: list[str], wanted: int, begin: int) -> list[str]:
        """So many words that the server should count ``wanted``, what stands before them included."""
        share = (wanted - self.facts.overhead_tokens - begin) / self.facts.tokens_per_word
        return _resized(last, max(1, round(share)))

    def _exact(self, parts: list[tuple[str, list[str]]], last: list[str], wanted: int) -> Written:
        assert self.count is not None, "asked only then"
        best: Written | None = None
        size, tokens_per_word = max(1, len(last)), 1.0
        tried: tuple[int, int] | None = None
        for _ in range(_CORRECTIONS):
            written = self._prompt(parts, _resized(last, size))
            counted = self.count(written)
            if best is None or abs(counted - wanted) < abs(best.num_tokens - wanted):
                best = Written(written, counted)
            if counted == wanted:
                break
            if tried is not None and size != tried[0]:
                tokens_per_word = max(1.0, (counted - tried[1]) / (size - tried[0]))
            tried = size, counted
            step = round((wanted - counted) / tokens_per_word) or (1 if counted < wanted else -1)
            size = max(1, size + step)
        assert best is not None, "at least one was tried"
        return best

    def _prompt(self, parts: Sequence[tuple[str, list[str]]], last: list[str]) -> Prompt:
        whole = [*parts, (USER, last)]
        if self.as_chat:
            return tuple(Message(role, "".join(words)) for role, words in whole)
        return "".join(word for _, words in whole for word in words)


def word_pool(tokenizer: TextTokenizer | None) -> tuple[str, ...]:
    """Words with a space before them that are one token each; all of them where too few are."""
    spaced = tuple(f" {word}" for word in WORDS)
    if tokenizer is None:
        return spaced
    # In the middle of a text: what a tokenizer adds at its beginning does not count.
    alone = len(tokenizer.encode(" the the", field="prompt"))
    single = tuple(word for word in spaced if len(tokenizer.encode(f" the the{word}", field="prompt")) == alone + 1)
    return single if len(single) >= _LEAST_POOL else spaced


def text_wording(
    api: str, facts: Facts, pool: tuple[str, ...], count: Callable[[Prompt], int] | None, seed: int
) -> TextWording:
    """For an endpoint of ``api``."""
    return TextWording(pool, api == CHAT, facts, count, seed)


def _resized(words: list[str], size: int) -> list[str]:
    """The first ``size``, repeated if there are fewer."""
    if size <= len(words):
        return words[:size]
    source = words or [f" {WORDS[0]}"]
    return (source * (size // len(source) + 1))[:size]


def _draw(numbers: _Ids, seed: int, num_choices: int) -> _Ids:
    """A choice for each token by its number and its position, evenly spread (splitmix64)."""
    mixed = numbers.astype(np.uint64) * np.uint64(_MIX[0]) + np.arange(len(numbers), dtype=np.uint64) * np.uint64(
        _MIX[2]
    )
    mixed ^= np.uint64((seed * _MIX[1] + _MIX[0]) % 2**64)
    mixed = (mixed ^ (mixed >> np.uint64(30))) * np.uint64(_MIX[1])
    mixed = (mixed ^ (mixed >> np.uint64(27))) * np.uint64(_MIX[2])
    mixed ^= mixed >> np.uint64(31)
    drawn: _Ids = (mixed % np.uint64(num_choices)).astype(np.int64)
    return drawn
