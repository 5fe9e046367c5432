"""How long do requests take at a given rate, and up to which rate are they fast enough? Queues around PrfaaS's model.

The paper's model has rates only. Here each stage is a queue (queueing.py): long prompts before all PrfaaS instances and
their links, short ones before the local prefill instances, sequences before the places of the decode batches. A stage
is one queue over all its instances, arrivals are Poisson, the step time is that of a full batch: the first is kinder
than a router that guesses, the other two are not. A simulation with the real router tells more and takes longer.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from cluster.length_distribution import Numbers
from cluster.queueing import NO_WAIT, Wait, mgc_wait
from cluster.throughput_model import Fleet, IdleTtft, OperatingPoint, idle_ttft

_BISECTIONS = 50


@dataclass(frozen=True)
class LatencySlo:
    """A request is good if it meets both; None: any."""

    ttft_s: float | None
    tpot_s: float | None
    attainment: float


@dataclass(frozen=True)
class Latency:
    """What requests see at one rate."""

    idle: IdleTtft
    remote: Wait  # of long prompts, before prefill or link, whichever queue is longer
    remote_more_s: float  # the mean of the shorter one
    local: Wait
    decode: Wait
    step_s: float
    mean_output_tokens: float

    def ttft_at_most(self, seconds: float) -> float:
        """P(TTFT <= seconds)."""
        left = seconds - self.idle.seconds
        remote = self.remote.each_at_most(left - self.remote_more_s)
        local = self.local.each_at_most(left)
        return float(np.dot(self.idle.weights, np.where(self.idle.remote, remote, local)))

    def ttft_quantile_s(self, fraction: float) -> float:
        """The TTFT that ``fraction`` of the requests do not exceed; inf where a queue grows without end."""
        low, high = 0.0, float(self.idle.seconds.max()) + 1.0
        while self.ttft_at_most(high) < fraction:
            high *= 2
            if high > 1e7:
                return float("inf")
        for _ in range(_BISECTIONS):
            middle = (low + high) / 2
            low, high = (low, middle) if self.ttft_at_most(middle) >= fraction else (middle, high)
        return high

    def tpot_at_most(self, seconds: float) -> float:
        """P(TPOT <= seconds), the wait for a place in a batch spread over the answer."""
        return self.decode.at_most((seconds - self.step_s) * max(1.0, self.mean_output_tokens - 1) + 1e-9)

    @property
    def tpot_mean_s(self) -> float:
        """Mean TPOT."""
        return self.step_s + self.decode.mean_s / max(1.0, self.mean_output_tokens - 1)

    def attainment(self, slo: LatencySlo) -> float:
        """The share of good requests, the two limits taken as independent."""
        ttft = 1.0 if slo.ttft_s is None else self.ttft_at_most(slo.ttft_s)
        return ttft * (1.0 if slo.tpot_s is None else self.tpot_at_most(slo.tpot_s))


def latency(fleet: Fleet, point: OperatingPoint, rate_rps: float) -> Latency:
    """Latencies of ``fleet`` at ``point`` when ``rate_rps`` requests arrive each second."""
    idle = idle_ttft(fleet, point)
    far, near = rate_rps * point.offload_fraction, rate_rps * (1 - point.offload_fraction)
    computing, sending = NO_WAIT, NO_WAIT
    if far:
        mean, variation = _moments(_remote_prefill_s(fleet, point), idle.weights * idle.remote)
        computing = mgc_wait(far, fleet.num_prfaas, mean, variation)
        rate = sum(cluster.egress_bytes_per_s for cluster in fleet.prfaas)
        mean, variation = _moments(fleet.kv_bytes(fleet.lengths.tokens) / rate, idle.weights * idle.remote)
        sending = mgc_wait(far, 1, mean, variation)
    local = NO_WAIT
    if near:
        mean, variation = _moments(fleet.local_prefill_s(fleet.lengths.tokens), idle.weights * ~idle.remote)
        local = mgc_wait(near, point.num_prefill, mean, variation)
    places = int(point.num_decode * fleet.max_batch_size)
    longer, shorter = (computing, sending) if computing.mean_s >= sending.mean_s else (sending, computing)
    return Latency(
        idle=idle,
        remote=longer,
        remote_more_s=shorter.mean_s,
        local=local,
        decode=mgc_wait(rate_rps, places, fleet.decode_step_s * fleet.mean_output_tokens, 1.0),
        step_s=fleet.decode_step_s,
        mean_output_tokens=fleet.mean_output_tokens,
    )


def goodput_rps(fleet: Fleet, point: OperatingPoint, slo: LatencySlo) -> float:
    """The highest rate at which ``slo.attainment`` of the requests are good; 0 if they are not even when idle."""

    def good(rate_rps: float) -> bool:
        return latency(fleet, point, rate_rps).attainment(slo) >= slo.attainment

    low, high = 0.0, point.throughput_rps
    if slo.ttft_s is None and slo.tpot_s is None:
        return high
    if not good(0.0):
        return 0.0
    for _ in range(24):
        middle = (low + high) / 2
        low, high = (middle, high) if good(middle) else (low, middle)
    return low


def _remote_prefill_s(fleet: Fleet, point: OperatingPoint) -> Numbers:
    """Prefill seconds of each length on the PrfaaS clusters, mixed by the shares that they take."""
    assert point.l_long_tokens is not None, "something is offloaded"
    rates = [float(fleet.cluster_rps(cluster, np.asarray(point.l_long_tokens))) for cluster in fleet.prfaas]
    tokens = fleet.lengths.tokens
    parts = (r / sum(rates) * c.prefill_s(tokens) for r, c in zip(rates, fleet.prfaas, strict=True))
    return sum(parts, np.zeros_like(tokens))


def _moments(seconds: Numbers, weights: Numbers) -> tuple[float, float]:
    """Mean, and standard deviation over mean."""
    total = float(weights.sum())
    mean = float(np.dot(weights, seconds)) / total
    variance = float(np.dot(weights, (seconds - mean) ** 2)) / total
    return mean, variance**0.5 / mean
