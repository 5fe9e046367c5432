"""How long does a request wait in a queue? Closed forms for one or several servers.

M/D/1 is DistServe's analysis of a prefill instance (section 3.1, equations 1 to 3). Plans use M/G/c: the Erlang C
probability of waiting, Pollaczek and Khinchine's mean scaled to several servers (Lee and Longton), and an exponential
tail, which is exact for M/M/c and close for the coefficients of variation of prompts.

Rates are requests/s, durations seconds. A queue at or beyond its capacity waits forever: inf.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray


def md1_ttft_s(rate_rps: float, service_s: float) -> float:
    """DistServe equation 1: D + R D^2 / (2 (1 - R D))."""
    load = rate_rps * service_s
    return service_s + rate_rps * service_s**2 / (2 * (1 - load)) if load < 1 else math.inf


def md1_pipelined_ttft_s(rate_rps: float, service_s: float) -> float:
    """DistServe equation 2, two pipeline stages: D + R D^2 / (4 (2 - R D))."""
    load = rate_rps * service_s
    return service_s + rate_rps * service_s**2 / (4 * (2 - load)) if load < 2 else math.inf


def md1_tensor_parallel_ttft_s(rate_rps: float, service_s: float, speedup: float) -> float:
    """DistServe equation 3, two GPUs in tensor parallel, K times as fast: D/K + R D^2 / (2 K (K - R D))."""
    load = rate_rps * service_s
    return (
        service_s / speedup + rate_rps * service_s**2 / (2 * speedup * (speedup - load)) if load < speedup else math.inf
    )


@dataclass(frozen=True)
class Wait:
    """The wait in one queue: none with probability 1 - ``probability``, else exponential."""

    probability: float
    mean_if_any_s: float

    @property
    def mean_s(self) -> float:
        """Over all requests."""
        return self.probability * self.mean_if_any_s if self.probability else 0.0

    def at_most(self, seconds: float) -> float:
        """P(wait <= seconds)."""
        return float(self.each_at_most(np.array([seconds]))[0])

    def each_at_most(self, seconds: NDArray[np.float64]) -> NDArray[np.float64]:
        """``at_most`` of every element."""
        if math.isinf(self.mean_if_any_s):
            return np.zeros_like(seconds)
        if not self.mean_if_any_s:
            return np.where(seconds < 0, 0.0, 1.0)
        waiting = self.probability * np.exp(np.maximum(seconds, 0.0) / -self.mean_if_any_s)
        return np.where(seconds < 0, 0.0, 1 - waiting)


NO_WAIT = Wait(0.0, 0.0)


def mgc_wait(rate_rps: float, num_servers: int, mean_service_s: float, variation: float) -> Wait:
    """The wait before ``num_servers`` servers with one queue; ``variation`` is the services' std / mean."""
    if not rate_rps:
        return NO_WAIT
    load = rate_rps * mean_service_s / num_servers if num_servers else math.inf
    if load >= 1:
        return Wait(1.0, math.inf)
    markov_s = mean_service_s / (num_servers * (1 - load))  # of M/M/c, given that there is a wait
    return Wait(erlang_c(num_servers, load), markov_s * (1 + variation**2) / 2)


def erlang_c(num_servers: int, load: float) -> float:
    """The probability that all ``num_servers`` are busy when each is busy ``load`` of the time."""
    offered = num_servers * load
    blocked = 1.0  # Erlang B, by its recursion: no factorials
    for servers in range(1, num_servers + 1):
        blocked = offered * blocked / (servers + offered * blocked)
    return blocked / (1 - load * (1 - blocked))
