"""How long are the prompts? A discrete distribution of token counts, and the conditional means that planning needs.

One form for every source: points of ascending length with weights that sum to 1. A sample is its own distribution, a
histogram puts each bin's weight at the bin's middle, a log-normal is cut into cells of equal probability.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from statistics import NormalDist

import numpy as np
from numpy.typing import NDArray

from core.errors import InvalidConfig

Numbers = NDArray[np.float64]
Curve = Callable[[Numbers], Numbers]  # of a number of tokens: seconds, or bytes

LOG_NORMAL_CELLS = 16384  # quantiles: the mean of PrfaaS's workload is off by less than 1e-4


@dataclass(frozen=True, eq=False)
class LengthDistribution:
    """``tokens`` ascending, ``weights`` positive with sum 1; both of shape [points]."""

    tokens: Numbers
    weights: Numbers

    def __post_init__(self) -> None:
        assert self.tokens.shape == self.weights.shape, "one weight for each length"
        assert len(self.tokens) > 0, "a distribution has at least one length"
        assert bool(np.all(np.diff(self.tokens) > 0)), "lengths ascend"
        assert abs(float(self.weights.sum()) - 1) < 1e-9, "weights sum to 1"

    @classmethod
    def from_sample(cls, lengths: Sequence[float]) -> LengthDistribution:
        """Each observed length with its frequency; ``InvalidConfig`` if there is none, or one below 1."""
        return cls.from_counts(lengths, [1.0] * len(lengths))

    @classmethod
    def from_counts(cls, lengths: Sequence[float], counts: Sequence[float]) -> LengthDistribution:
        """A length |-> its count (or any other weight); counts of equal lengths are added."""
        values, weights = np.asarray(lengths, dtype=float), np.asarray(counts, dtype=float)
        kept = weights > 0
        if not kept.any() or bool((weights < 0).any()):
            raise InvalidConfig("lengths", "must hold at least one length with a count above 0 and none below 0")
        if float(values[kept].min()) < 1 or not bool(np.isfinite(values[kept]).all()):
            raise InvalidConfig("lengths", f"must be at least 1 token each, got {float(values[kept].min()):g}")
        tokens, index = np.unique(values[kept], return_inverse=True)
        summed = np.bincount(index, weights=weights[kept])
        return cls(tokens, summed / summed.sum())

    @classmethod
    def from_histogram(cls, edges: Sequence[float], counts: Sequence[float]) -> LengthDistribution:
        """``len(edges) == len(counts) + 1``, edges ascending; a bin's requests lie at its middle."""
        if len(edges) != len(counts) + 1 or any(a >= b for a, b in pairwise(edges)):
            raise InvalidConfig("lengths", "must have ascending edges, one more than there are counts")
        return cls.from_counts([(a + b) / 2 for a, b in pairwise(edges)], counts)

    @classmethod
    def log_normal(cls, mu: float, sigma: float, minimum: float, maximum: float) -> LengthDistribution:
        """exp(Normal(mu, sigma)), truncated to [minimum, maximum] tokens (PrfaaS section 4)."""
        if not sigma > 0:
            raise InvalidConfig("lengths.sigma", f"must be above 0, got {sigma:g}")
        if not 1 <= minimum < maximum:
            raise InvalidConfig("lengths.minimum", f"must be at least 1 and below maximum, got {minimum:g}")
        normal = NormalDist(mu, sigma)
        low, high = normal.cdf(np.log(minimum)), normal.cdf(np.log(maximum))
        if high - low < 1e-12:
            raise InvalidConfig("lengths.mu", f"puts no length between {minimum:g} and {maximum:g} tokens")
        places = low + (np.arange(LOG_NORMAL_CELLS) + 0.5) / LOG_NORMAL_CELLS * (high - low)
        return cls.from_sample([float(np.exp(normal.inv_cdf(float(place)))) for place in places])

    @cached_property
    def _above(self) -> tuple[Numbers, Numbers]:
        """Weight, and weight times length, of the points from each index on; shape [points + 1]."""
        weight = np.concatenate([np.cumsum(self.weights[::-1])[::-1], [0.0]])
        total = np.concatenate([np.cumsum((self.weights * self.tokens)[::-1])[::-1], [0.0]])
        return weight, total

    @property
    def mean_tokens(self) -> float:
        """E[L]."""
        return float(self._above[1][0])

    def split(self, threshold_tokens: Numbers | float) -> tuple[Numbers, Numbers, Numbers]:
        """p = P(L > t), l_long = E[L | L > t] and l_short = E[L | L <= t] for each t; nan for an empty side."""
        weight, total = self._above
        index = np.searchsorted(self.tokens, np.asarray(threshold_tokens, dtype=float), side="right")
        above, sum_above = weight[index], total[index]
        below, sum_below = weight[0] - above, total[0] - sum_above
        below = np.where(index == 0, 0.0, below)  # exactly nothing, whatever the sums' rounding errors
        with np.errstate(divide="ignore", invalid="ignore"):
            l_long = np.where(above > 0, sum_above / above, np.nan)
            l_short = np.where(below > 0, sum_below / below, np.nan)
        return above / weight[0], l_long, l_short

    def mean_of(self, curve: Curve) -> float:
        """E[curve(L)]."""
        return float(np.dot(self.weights, curve(self.tokens)))

    def quantile(self, fraction: float) -> float:
        """The smallest length that at least ``fraction`` of the requests do not exceed."""
        return weighted_quantile(self.tokens, self.weights, fraction)


def weighted_quantile(values: Numbers, weights: Numbers, fraction: float) -> float:
    """The smallest of ``values`` that at least ``fraction`` of the weight does not exceed."""
    order = np.argsort(values, kind="stable")
    reached = np.cumsum(weights[order])
    index = int(np.searchsorted(reached, fraction * reached[-1] * (1 - 1e-12), side="left"))
    return float(values[order][min(index, len(values) - 1)])
