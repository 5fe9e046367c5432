"""Conditional means and quantiles against sums by hand, and against the integrals of the log-normal."""

from __future__ import annotations

import math
from statistics import NormalDist

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cluster.length_distribution import LengthDistribution, weighted_quantile
from core.errors import InvalidConfig

LENGTHS = st.lists(st.integers(1, 100_000), min_size=1, max_size=50)


def test_split_has_each_sides_share_and_mean() -> None:
    lengths = LengthDistribution.from_sample([100, 200, 300, 400])

    p, l_long, l_short = lengths.split(200)

    assert (float(p), float(l_long), float(l_short)) == (0.5, 350.0, 150.0)


def test_side_without_prompts_has_no_mean() -> None:
    lengths = LengthDistribution.from_sample([100, 200])

    p, l_long, l_short = lengths.split(np.array([0.0, 200.0]))

    assert p.tolist() == [1.0, 0.0]
    assert math.isnan(l_short[0])
    assert math.isnan(l_long[1])
    assert (float(l_long[0]), float(l_short[1])) == (150.0, 150.0)


def test_histogram_puts_a_bin_at_its_middle() -> None:
    lengths = LengthDistribution.from_histogram([1, 3, 7], [1, 3])

    assert lengths.tokens.tolist() == [2, 5]
    assert lengths.weights.tolist() == [0.25, 0.75]


def test_log_normal_has_the_truncated_integrals() -> None:
    """E[L; L > t] = exp(mu + sigma^2 / 2) (F(b) - F(t)) with F of a normal about mu + sigma^2, over the same of 1."""
    mu, sigma, low, high, t = 9.9, 1.0, 128, 131_072, 19_400
    lengths = LengthDistribution.log_normal(mu, sigma, low, high)
    plain, shifted = NormalDist(mu, sigma), NormalDist(mu + sigma**2, sigma)
    mass = plain.cdf(math.log(high)) - plain.cdf(math.log(low))
    expected_p = (plain.cdf(math.log(high)) - plain.cdf(math.log(t))) / mass
    part = math.exp(mu + sigma**2 / 2) * (shifted.cdf(math.log(high)) - shifted.cdf(math.log(t))) / mass

    p, l_long, _ = lengths.split(t)

    assert float(p) == pytest.approx(expected_p, rel=2e-4)
    assert float(l_long) == pytest.approx(part / expected_p, rel=2e-4)
    assert lengths.mean_tokens == pytest.approx(27_486, rel=1e-4)  # PAPERS.md A.12


@given(LENGTHS, st.integers(0, 100_001))
def test_the_two_sides_make_the_whole(sample: list[int], threshold: int) -> None:
    lengths = LengthDistribution.from_sample(sample)

    p, l_long, l_short = (float(x) for x in lengths.split(threshold))

    parts = (p * l_long if p else 0.0) + ((1 - p) * l_short if p < 1 else 0.0)
    assert parts == pytest.approx(sum(sample) / len(sample))
    assert not p or l_long > threshold * (1 - 1e-9)
    assert p == 1 or l_short <= threshold * (1 + 1e-9)


@given(LENGTHS, st.floats(0.01, 1))
def test_quantile_is_the_smallest_that_covers(sample: list[int], fraction: float) -> None:
    quantile = LengthDistribution.from_sample(sample).quantile(fraction)

    covered = sum(length <= quantile for length in sample) / len(sample)
    below = sum(length < quantile for length in sample) / len(sample)
    assert quantile in sample
    assert covered >= fraction * (1 - 1e-9)
    assert below < fraction


def test_quantile_of_unordered_values() -> None:
    assert weighted_quantile(np.array([3.0, 1.0, 2.0]), np.array([0.2, 0.5, 0.3]), 0.6) == 2.0


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: LengthDistribution.from_sample([]), "at least one length"),
        (lambda: LengthDistribution.from_sample([0]), "at least 1 token"),
        (lambda: LengthDistribution.from_counts([5], [-1]), "none below 0"),
        (lambda: LengthDistribution.from_histogram([3, 2], [1]), "ascending edges"),
        (lambda: LengthDistribution.log_normal(9, 0, 1, 10), "above 0"),
        (lambda: LengthDistribution.log_normal(9, 1, 10, 10), "below maximum"),
        (lambda: LengthDistribution.log_normal(900, 1, 1, 10), "no length between"),
    ],
)
def test_what_is_no_distribution_is_refused(make: object, message: str) -> None:
    with pytest.raises(InvalidConfig, match=message):
        make()  # type: ignore[operator]
