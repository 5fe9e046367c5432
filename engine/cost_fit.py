"""Which line goes through these measured seconds? Pure: robust regression with coefficients that are never negative.

    seconds = sum over j of coefficients[j] * features[j]

Errors of a machine are relative: every row is divided by its predicted seconds. Some are wild (a pause, a compile, a
neighbour): Huber's weights bound what each can do (Huber 1964; k = 1.345), by iteratively reweighted least squares.
Old samples fade. What the samples cannot tell apart stays where the prior has it: ``PRIOR_WEIGHT`` is little beside
one sample, and much beside none.

``Samples`` keeps what is fitted: the latest of every *size* (powers of two of the features), not the latest of all.
An hour of short prompts does not make it forget what a long one costs.

Invariants: a fit is a function of prior and samples alone, so it is the same after a restart; no coefficient is below
0, so predictions are not negative and do not fall when a feature grows.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import product

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]

HUBER_K = 1.345  # 95% as efficient as least squares where all errors are Gaussian
ITERATIONS = 20
PRIOR_WEIGHT = 1e-4  # a coefficient at twice its prior costs what an error of 1% of one sample costs
FADING = 0.99  # weight of a sample once another one is known
LEAST_WEIGHT = 0.02  # of an old sample: alone in its size it still counts
SAMPLES_PER_SIZE = 16
MAX_SAMPLES = 1024
_LEAST_SCALE = 0.005  # relative; errors below it are not told apart
_LEAST_SECONDS = 1e-9


@dataclass(frozen=True, slots=True)
class Sample:
    features: tuple[float, ...]
    seconds: float
    number: int  # counts the samples of one fit from 0


def fit(prior: Sequence[float], samples: Iterable[Sample]) -> tuple[float, ...]:
    """The coefficients, each >= 0; ``prior`` itself without samples. A prior of 0 stays 0: that costs nothing."""
    known = list(samples)
    assert all(0 <= p < math.inf for p in prior), f"coefficients are not negative: {prior}"
    if not known:
        return tuple(prior)
    features = np.array([sample.features for sample in known], dtype=np.float64)  # [n, k]
    seconds = np.array([sample.seconds for sample in known], dtype=np.float64)  # [n]
    ages = max(sample.number for sample in known) - np.array([sample.number for sample in known])
    fading = np.maximum(FADING ** ages.astype(np.float64), LEAST_WEIGHT)
    scaled = features * np.array(prior)  # coefficients in units of their priors: all near 1
    weights = np.full(scaled.shape[1], _middle(seconds / _predict(scaled, np.ones(scaled.shape[1])), fading))
    for _ in range(ITERATIONS):
        predicted = _predict(scaled, weights)
        errors = seconds / predicted - 1
        scale = max(1.4826 * _middle(np.abs(errors), fading), _LEAST_SCALE)
        trust = fading * np.minimum(1.0, HUBER_K * scale / np.maximum(np.abs(errors), 1e-12))
        new = _solve(scaled / predicted[:, None], seconds / predicted, trust)
        settled = bool(np.allclose(new, weights, rtol=1e-9, atol=1e-12))
        weights = new
        if settled:
            break
    return tuple(float(w * p) for w, p in zip(weights, prior, strict=True))


def _predict(features: Floats, weights: Floats) -> Floats:
    predicted: Floats = np.maximum(features @ weights, _LEAST_SECONDS)
    return predicted


def _middle(values: Floats, weights: Floats) -> float:
    """The weighted median."""
    order = np.argsort(values, kind="stable")
    total = np.cumsum(weights[order])
    return float(values[order][np.searchsorted(total, total[-1] / 2)])


def _solve(rows: Floats, targets: Floats, trust: Floats) -> Floats:
    """Least squares with weights ``trust`` over coefficients >= 0, drawn weakly to 1: the best of all sets of zeros."""
    num = rows.shape[1]
    root = np.sqrt(trust)
    pull = math.sqrt(PRIOR_WEIGHT)
    left = np.vstack([rows * root[:, None], pull * np.eye(num)])
    right = np.append(targets * root, np.full(num, pull))
    best, least = np.zeros(num), math.inf
    for used in product((True, False), repeat=num):
        some = np.array(used)
        tried = np.zeros(num)
        if some.any():
            tried[some] = np.linalg.lstsq(left[:, some], right)[0]
        loss = float(np.sum((left @ tried - right) ** 2))
        if (tried >= 0).all() and loss < least:
            best, least = tried, loss
            if some.all():
                break  # the bound does not bind
    return best


class Samples:
    """At most ``SAMPLES_PER_SIZE`` samples of each size, the latest ones, and ``MAX_SAMPLES`` in all."""

    def __init__(self, samples: Iterable[Sample] = ()) -> None:
        self._sizes: dict[tuple[int, ...], deque[Sample]] = {}
        self._count = 0
        self._next = 0
        for sample in sorted(samples, key=lambda sample: sample.number):
            self._put(sample)

    def __iter__(self) -> Iterator[Sample]:
        """In the order in which they were added."""
        return iter(sorted((s for samples in self._sizes.values() for s in samples), key=lambda s: s.number))

    def __len__(self) -> int:
        return self._count

    @property
    def num_seen(self) -> int:
        """Samples that were ever added."""
        return self._next

    def add(self, features: tuple[float, ...], seconds: float) -> None:
        """One more measurement: finite, ``seconds`` > 0."""
        self._put(Sample(features, seconds, self._next))

    def _put(self, sample: Sample) -> None:
        size = tuple(math.frexp(feature)[1] for feature in sample.features)
        alike = self._sizes.setdefault(size, deque())
        alike.append(sample)
        self._count += 1
        self._next = sample.number + 1
        if len(alike) > SAMPLES_PER_SIZE:
            alike.popleft()
            self._count -= 1
        elif self._count > MAX_SAMPLES:
            oldest = min(self._sizes, key=lambda key: self._sizes[key][0].number)
            self._sizes[oldest].popleft()
            self._count -= 1
            if not self._sizes[oldest]:
                del self._sizes[oldest]
