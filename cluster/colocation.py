"""What does disaggregation gain or cost? The fleet as it is, beside the same workers each prefilling and decoding.

A colocated instance prefills its own prompts, which hold up the steps of its other sequences: with a share s = rate *
E[T_prefill] of its time gone, a token takes step(b) / (1 - s), and by Little's law b = rate * L_out * step(b) / (1 - s)
sequences decode. Disaggregated, a step is held up by nothing, and prompts queue before fewer instances.

Compared are the *local* workers: a worker of a PrfaaS cluster only prefills, so colocation would leave it idle.
Latencies are means at one rate that both sustain, with queues as in latency_model.py. Pure.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from cluster.latency_model import latency
from cluster.length_distribution import Curve
from cluster.queueing import mgc_wait
from cluster.throughput_model import Fleet, OperatingPoint

_SUSTAINED = 0.9  # of the smaller throughput: the highest rate at which latencies are compared
_ROUNDS = 100


@dataclass(frozen=True, slots=True)
class Served:
    """What one way of using the workers gives."""

    throughput_rps: float  # the most that it sustains
    ttft_s: float  # means at the compared rate
    tpot_s: float


@dataclass(frozen=True, slots=True)
class Gain:
    """Both ways, and how they compare. Of each ratio, above 1 is in favour of disaggregation."""

    rate_rps: float  # at which latencies were compared
    disaggregated: Served
    colocated: Served

    @property
    def throughput_ratio(self) -> float:
        """How many times as many requests the disaggregated fleet sustains."""
        return self.disaggregated.throughput_rps / self.colocated.throughput_rps

    @property
    def ttft_ratio(self) -> float:
        """How many times as long a colocated worker takes to the first token."""
        return self.colocated.ttft_s / self.disaggregated.ttft_s

    @property
    def tpot_ratio(self) -> float:
        """How many times as long a colocated worker takes for a token."""
        return self.colocated.tpot_s / self.disaggregated.tpot_s

    @property
    def reason(self) -> str:
        """The comparison in words."""
        apart, together = self.disaggregated, self.colocated
        return (
            f"disaggregated sustains {apart.throughput_rps:.3g} req/s, colocated {together.throughput_rps:.3g} "
            f"(x{self.throughput_ratio:.2f}); at {self.rate_rps:.3g} req/s TTFT {apart.ttft_s:.3g} against "
            f"{together.ttft_s:.3g} s, TPOT {apart.tpot_s * 1e3:.3g} against {together.tpot_s * 1e3:.3g} ms"
        )


def colocated_rate(
    prefill_s: float, mean_output_tokens: float, step_of: Curve, max_batch_size: float, tpot_s: float | None
) -> tuple[float, float]:
    """The highest rate of one colocated instance within ``tpot_s``, and its TPOT then; (0, inf) if it meets it at none.

    ``prefill_s``: mean seconds of a prompt. ``step_of``: seconds of a decode step by batch size.
    """
    batches = np.geomspace(1e-3, max_batch_size, 200)
    steps_s = step_of(np.maximum(1.0, batches))
    rates = batches / (mean_output_tokens * steps_s + batches * prefill_s)
    tpots_s = steps_s / (1 - rates * prefill_s)
    within = np.full_like(rates, True, dtype=bool) if tpot_s is None else tpots_s <= tpot_s * (1 + 1e-9)
    if not within.any():
        return 0.0, float("inf")
    best = int(np.argmax(np.where(within, rates, -1.0)))
    return float(rates[best]), float(tpots_s[best])


def disaggregation_gain(
    fleet: Fleet, point: OperatingPoint, step_of: Curve, rate_rps: float, tpot_s: float | None
) -> Gain | None:
    """The fleet at ``point`` beside its local workers colocated; None if either can serve nothing.

    ``rate_rps``: what arrives; latencies are those of less, if one of the two would not sustain it.
    """
    num_workers = fleet.num_local_gpus
    seconds, weights = fleet.local_prefill_s(fleet.lengths.tokens), fleet.lengths.weights
    prefill_s = float(np.dot(weights, seconds))
    each, _ = colocated_rate(prefill_s, fleet.mean_output_tokens, step_of, fleet.max_batch_size, tpot_s)
    most = min(point.throughput_rps, each * num_workers)
    if most <= 0:
        return None
    rate = min(rate_rps, _SUSTAINED * most)
    apart = latency(fleet, point, rate)
    far = point.offload_fraction
    waits = far * (apart.remote.mean_s + apart.remote_more_s) if far > 0 else 0.0
    waits += (1 - far) * apart.local.mean_s if far < 1 else 0.0
    alone = rate / num_workers
    variation = float(np.dot(weights, (seconds - prefill_s) ** 2)) ** 0.5 / prefill_s
    return Gain(
        rate_rps=rate,
        disaggregated=Served(
            point.throughput_rps,
            apart.idle.mean_s + waits,
            _tpot_s(rate / point.num_decode, fleet, step_of, prefill_s=0.0),
        ),
        colocated=Served(
            each * num_workers,
            prefill_s + mgc_wait(alone, 1, prefill_s, variation).mean_s,
            _tpot_s(alone, fleet, step_of, prefill_s),
        ),
    )


def _tpot_s(rate_rps: float, fleet: Fleet, step_of: Curve, prefill_s: float) -> float:
    """Of one instance at that rate, beside its prompts."""
    left = 1 - rate_rps * prefill_s
    batch, step_s = 0.0, float(step_of(np.asarray(1.0)))
    for _ in range(_ROUNDS):
        more = min(fleet.max_batch_size, rate_rps * fleet.mean_output_tokens * step_s / left)
        if more - batch < 1e-3:
            break
        batch, step_s = more, float(step_of(np.asarray(max(1.0, more))))
    return step_s / left
