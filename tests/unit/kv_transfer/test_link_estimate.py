"""The numbers of a link: the fit finds what made its samples, the rates follow what they are told."""

from __future__ import annotations

import math
import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kv_transfer.link_estimate import RecentRate, TransferFit, has_fallen

MB = 1_000_000
links = st.fixed_dictionaries({"t0": st.floats(0.001, 0.1), "beta": st.floats(1e6, 1e11)})


def transfers(t0: float, beta: float, seed: int, count: int = 60, noise: float = 0.05) -> list[tuple[int, float]]:
    """Sizes whose bytes take a tenth to thirty times t0: both costs can be seen."""
    dice = random.Random(seed)
    sizes = [int(t0 * beta * 10 ** dice.uniform(-1, 1.5)) + 1 for _ in range(count)]
    return [(size, (t0 + size / beta) * math.exp(dice.gauss(0, noise))) for size in sizes]


def fitted(samples: list[tuple[int, float]], fit: TransferFit | None = None) -> TransferFit:
    fit = fit or TransferFit()
    for num_bytes, seconds in samples:
        fit = fit.observe(num_bytes, seconds)
    return fit


@given(links, st.integers(0, 1 << 30))
def test_fit_finds_the_two_costs_in_noisy_samples(link: dict[str, float], seed: int) -> None:
    fit = fitted(transfers(**link, seed=seed))

    assert fit.beta == pytest.approx(link["beta"], rel=0.25)
    assert fit.t0_s == pytest.approx(link["t0"], rel=0.25)
    assert 0 < fit.variance < 0.02


@given(links, st.integers(0, 1 << 30), st.sampled_from([0.1, 0.3, 4.0, 10.0]))
def test_fit_follows_a_step_after_three_samples_of_long_transfers(
    link: dict[str, float], seed: int, factor: float
) -> None:
    fit = fitted(transfers(**link, seed=seed, noise=0.01))
    size = int(50 * link["t0"] * link["beta"]) + 1
    new_beta = link["beta"] * factor

    fit = fitted([(size, link["t0"] + size / new_beta)] * 3, fit)

    assert fit.beta == pytest.approx(new_beta, rel=0.2)


@given(links, st.integers(0, 1 << 30))
def test_one_slow_transfer_moves_nothing(link: dict[str, float], seed: int) -> None:
    fit = fitted(transfers(**link, seed=seed, noise=0.01))
    size = int(link["t0"] * link["beta"]) + 1

    after = fit.observe(size, 20 * fit.seconds(size))

    assert (after.t0_s, after.beta, after.variance) == (fit.t0_s, fit.beta, fit.variance)


@given(st.lists(st.tuples(st.integers(-5, 1 << 50), st.floats(0, 1e6)), max_size=60))
@settings(max_examples=200)
def test_fit_of_any_samples_is_finite_and_never_negative(samples: list[tuple[int, float]]) -> None:
    fit = fitted(samples)

    assert fit.t0_s >= 0
    assert fit.variance >= 0
    if fit.num_samples:
        assert fit.beta is not None
        assert 0 < fit.beta < math.inf
    assert all(math.isfinite(fit.seconds(size)) for size in (0, 1, 1 << 40))
    assert fitted(samples) == fit, "equal samples give equal fits"
    assert len(fit._surprises) < 3, "memory is bounded"


def test_fit_of_equal_sizes_takes_them_for_bytes() -> None:
    fit = fitted([(10 * MB, 0.1)] * 20)

    assert fit.seconds(10 * MB) == pytest.approx(0.1)
    assert fit.beta == pytest.approx(100 * MB, rel=0.01)


def test_rate_follows_a_tenth_within_two_seconds() -> None:
    recent = RecentRate(0.5)
    for _ in range(40):
        recent = recent.add(250 * MB, 0.25)
    assert recent.rate == pytest.approx(1000 * MB)

    for _ in range(8):
        recent = recent.add(25 * MB, 0.25)

    assert recent.rate is not None
    assert 100 * MB <= recent.rate < 125 * MB


@given(st.lists(st.tuples(st.floats(0, 1e12), st.floats(-1, 1e4)), max_size=50))
def test_rate_is_none_or_between_the_rates_it_was_told(spans: list[tuple[float, float]]) -> None:
    recent = RecentRate(0.5)
    for num_bytes, seconds in spans:
        recent = recent.add(num_bytes, seconds)

    told = [num_bytes / seconds for num_bytes, seconds in spans if seconds >= 1e-6]
    if recent.rate is not None:
        assert min(told) * 0.999 <= recent.rate <= max(told) * 1.001
    assert recent.seconds <= recent.window_s * 1.001


def test_fall_is_ucx_on_tcp() -> None:
    assert [path for path in ("tcp", "ucx:shm", "ucx:tcp", "ucx:rc,tcp", "local", "") if has_fallen(path)] == [
        "ucx:tcp",
        "ucx:rc,tcp",
    ]
