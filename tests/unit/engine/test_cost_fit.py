"""The regression finds what is there, under noise and lies, and never leaves what a machine can be."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.cost_fit import MAX_SAMPLES, SAMPLES_PER_SIZE, Sample, Samples, fit

TRUE = (0.02, 1e-4, 3e-9)
PRIOR = (0.005, 3e-5, 1e-8)


def features(tokens: float, cached: float) -> tuple[float, float, float]:
    return 1.0, tokens, tokens * (cached + tokens / 2)


def seconds(coefficients: tuple[float, ...], x: tuple[float, ...]) -> float:
    return sum(c * f for c, f in zip(coefficients, x, strict=True))


def measured(
    seed: int, count: int, noise: float, share_of_lies: float = 0.0, true: tuple[float, ...] = TRUE, first: int = 0
) -> list[Sample]:
    rng = np.random.default_rng(seed)
    samples = []
    for number in range(first, first + count):
        x = features(float(int(2 ** rng.uniform(4, 16))), float(int(rng.uniform(0, 30000))))
        took = seconds(true, x) * float(np.exp(rng.normal(0, noise)))
        if rng.random() < share_of_lies:
            took *= float(rng.uniform(5, 100))
        samples.append(Sample(x, took, number))
    return samples


def assert_predicts(found: tuple[float, ...], true: tuple[float, ...], within: float) -> None:
    for tokens in (16, 256, 4096, 65536):
        for cached in (0, 1000, 30000):
            x = features(tokens, cached)
            assert seconds(found, x) == pytest.approx(seconds(true, x), rel=within)


def test_no_samples_leave_the_prior() -> None:
    assert fit(PRIOR, []) == PRIOR


def test_exact_samples_give_the_exact_coefficients() -> None:
    assert fit(PRIOR, measured(0, 200, 0.0)) == pytest.approx(TRUE, rel=1e-2)


@settings(deadline=None, max_examples=25)
@given(st.integers(0, 2**32 - 1), st.floats(0, 0.1), st.floats(0, 0.15))
def test_coefficients_are_found_under_noise_and_outliers(seed: int, noise: float, lies: float) -> None:
    found = fit(PRIOR, measured(seed, 300, noise, lies))

    assert_predicts(found, TRUE, within=0.02 + noise)


def test_outliers_move_least_squares_far_and_this_little() -> None:
    samples = measured(3, 300, 0.05, 0.15)
    rows = np.array([s.features for s in samples]) / np.array([[seconds(TRUE, s.features)] for s in samples])
    targets = np.array([s.seconds / seconds(TRUE, s.features) for s in samples])
    plain = tuple(float(c) for c in np.linalg.lstsq(rows, targets, rcond=None)[0])
    x = features(4096, 1000)

    assert seconds(plain, x) > 2 * seconds(TRUE, x)
    assert seconds(fit(PRIOR, samples), x) == pytest.approx(seconds(TRUE, x), rel=0.07)


@settings(deadline=None, max_examples=60)
@given(
    st.lists(st.floats(0, 1), min_size=3, max_size=3),
    st.lists(
        st.tuples(st.integers(1, 10**6), st.integers(0, 10**6), st.floats(1e-9, 1e6)),
        min_size=1,
        max_size=30,
    ),
)
def test_coefficients_are_never_negative_and_always_finite(
    prior: list[float], measurements: list[tuple[int, int, float]]
) -> None:
    samples = [Sample(features(n, c), took, i) for i, (n, c, took) in enumerate(measurements)]

    found = fit(prior, samples)

    assert all(0 <= coefficient < np.inf for coefficient in found)
    assert found == fit(prior, samples)


def test_one_size_alone_is_fitted_and_the_rest_follows_the_prior() -> None:
    x = features(100, 0)

    found = fit(PRIOR, [Sample(x, 10 * seconds(PRIOR, x), number) for number in range(20)])

    assert seconds(found, x) == pytest.approx(10 * seconds(PRIOR, x), rel=0.01)
    assert all(coefficient >= 0 for coefficient in found)


def test_machine_that_becomes_slower_is_followed() -> None:
    slower = tuple(2 * c for c in TRUE)
    samples = Samples([*measured(0, 300, 0.03), *measured(1, 300, 0.03, true=slower, first=300)])

    assert_predicts(fit(PRIOR, samples), slower, within=0.1)


def test_prior_of_zero_stays_zero() -> None:
    assert fit((0.005, 3e-5, 0.0), measured(0, 50, 0.0))[2] == 0.0


def test_hour_of_short_prompts_does_not_forget_the_long_one() -> None:
    samples = Samples()
    for tokens in (10000, 20000, 40000):
        samples.add(features(tokens, 0), seconds(TRUE, features(tokens, 0)))
    for number in range(5000):
        x = features(64 + number % 60, 0)
        samples.add(x, seconds(TRUE, x))

    assert len(samples) < 200
    x = features(40000, 0)
    assert seconds(fit(PRIOR, samples), x) == pytest.approx(seconds(TRUE, x), rel=0.05)


def test_samples_are_bounded_and_in_order() -> None:
    samples = Samples()
    for number in range(3 * MAX_SAMPLES):
        samples.add((1.0, 2.0 ** (number % 200), 2.0 ** (number % 7)), 1.0)

    assert len(samples) == len(list(samples)) == MAX_SAMPLES
    assert samples.num_seen == 3 * MAX_SAMPLES
    numbers = [sample.number for sample in samples]
    assert numbers == sorted(numbers)
    assert numbers[-1] == 3 * MAX_SAMPLES - 1


def test_each_size_keeps_its_latest() -> None:
    samples = Samples()
    for _ in range(100):
        samples.add((1.0, 5.0), 1.0)

    assert [sample.number for sample in samples] == list(range(100 - SAMPLES_PER_SIZE, 100))
