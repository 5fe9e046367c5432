"""How many tokens will a sequence generate? Nobody knows; the mean of those that ended lately is what routing plans by.

A moving mean over the last few hundred sequences, never more than the request allows. (Mooncake takes one uniform
decode time for every request in the same place, PAPERS.md C.5.)
"""

from __future__ import annotations

ASSUMED_TOKENS = 256.0  # before any sequence has ended; the conversation trace of PAPERS.md C.7 has a mean of 343
_MEMORY = 256  # sequences after which an old one has faded to about a third


class OutputLengths:
    """The lengths of what was generated. One writer, the router."""

    def __init__(self) -> None:
        self._mean = ASSUMED_TOKENS
        self._num_seen = 0

    @property
    def mean(self) -> float:
        """Tokens of a sequence."""
        return self._mean

    def note(self, num_tokens: int) -> None:
        """A sequence has ended with so many tokens."""
        self._num_seen += 1
        self._mean += (num_tokens - self._mean) / min(self._num_seen, _MEMORY)

    def expected(self, num_tokens: int, limit: int | None) -> int:
        """Tokens that a sequence which has ``num_tokens`` of at most ``limit`` will still generate; at least one."""
        # Of one that is longer than the mean already nothing better is known than that it may go on as long again.
        further = self._mean - num_tokens if num_tokens < self._mean else self._mean
        left = further if limit is None else min(further, limit - num_tokens)
        return max(1, round(left))
