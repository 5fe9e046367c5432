"""What request rate can a fleet sustain, and which threshold and roles sustain most? PrfaaS section 3.4, as functions.

    (3) theta_prfaas = min(N_prfaas / T_prefill(l_long), B_out / S_kv(l_long))      summed over PrfaaS clusters
    (4) theta_prefill = N_p / T_prefill(l_short)                                    the local hardware's T
    (5) theta_decode = N_d * BS_max / (T_decode * L_out)
    (6) throughput = min(theta_prfaas / p, theta_prefill / (1 - p), theta_decode)
    (7), (8): the threshold balances the two prefill stages, the roles balance prefill with decode

A prompt whose uncached length l exceeds the threshold t is prefilled by a PrfaaS cluster, p = P(l > t). The model takes
a steady state, l_long and l_short for all lengths of their side, and a local network that is never the bottleneck.
Several PrfaaS clusters share the long prompts in proportion to what each can take; the paper has one.

Everything is pure. Rates are requests/s, link rates bytes/s, times seconds.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from cluster.length_distribution import Curve, LengthDistribution, Numbers, weighted_quantile

_GRID = 512  # thresholds tried at once; the best one's surroundings are then searched again
_LEAST_ARRIVING = 1e-3  # requests: when none come the backlogs alone are balanced
_SERVED_ALIKE = 1e-3  # share of the requests
_LONGEST_POWER = 18  # of 2: beyond it no prompt is expected before one has come
OFFLOAD_NOTHING = float("inf")

PRFAAS_COMPUTE, PRFAAS_LINK = "prfaas prefill", "link"
LOCAL_PREFILL, DECODE = "local prefill", "decode"


@dataclass(frozen=True)
class Polynomial:
    """c0 + c1 x + c2 x^2 + ...: a curve fitted to a profile."""

    coefficients: tuple[float, ...]

    @classmethod
    def fit(cls, points: Sequence[tuple[float, float]], degree: int = 2) -> Polynomial:
        """Least squares through (tokens, value) points, of a lower degree if there are too few points."""
        tokens, values = np.asarray(points, dtype=float).T
        scale = float(tokens.max())  # powers of raw lengths would leave the fit ill-conditioned
        fitted = np.polynomial.polynomial.polyfit(tokens / scale, values, min(degree, len(points) - 1))
        return cls(tuple(float(c) / scale**power for power, c in enumerate(fitted)))

    def __call__(self, tokens: Numbers) -> Numbers:
        return np.asarray(np.polynomial.polynomial.polyval(tokens, self.coefficients), dtype=float)


@dataclass(frozen=True)
class PrfaasCluster:
    """A cluster that only prefills, and its link to the cluster that decodes."""

    name: str
    num_instances: int
    prefill_s: Curve  # T_prefill on its hardware
    egress_bytes_per_s: float


@dataclass(frozen=True)
class Fleet:
    """What there is: hardware as curves and counts, and the demand. Roles and threshold are chosen for it."""

    lengths: LengthDistribution  # of uncached prompts
    mean_output_tokens: float  # L_out
    kv_bytes: Curve  # S_kv
    prfaas: tuple[PrfaasCluster, ...]
    num_local_gpus: int
    local_prefill_s: Curve
    local_link_bytes_per_s: float  # from one local prefill instance; counted in TTFT only
    max_batch_size: float  # BS_max of one decode instance
    decode_step_s: float  # T_decode at BS_max
    gpus_per_prefill: int = 1  # of one local prefill instance
    gpus_per_decode: int = 1

    @property
    def num_prfaas(self) -> int:
        """N_prfaas over all PrfaaS clusters."""
        return sum(cluster.num_instances for cluster in self.prfaas)

    @property
    def most_prefill(self) -> int:
        """N_p at most: one decode instance is left."""
        return (self.num_local_gpus - self.gpus_per_decode) // self.gpus_per_prefill

    def num_decode(self, num_prefill: int) -> int:
        """N_d beside ``num_prefill`` local prefill instances."""
        return (self.num_local_gpus - num_prefill * self.gpus_per_prefill) // self.gpus_per_decode

    def theta_prfaas_rps(self, l_long_tokens: Numbers) -> Numbers:
        """Equation 3; 0 without a PrfaaS cluster."""
        rates = (self.cluster_rps(cluster, l_long_tokens) for cluster in self.prfaas)
        return sum(rates, np.zeros_like(l_long_tokens, dtype=float))

    def cluster_rps(self, cluster: PrfaasCluster, l_long_tokens: Numbers) -> Numbers:
        """Equation 3 for one PrfaaS cluster."""
        compute = cluster.num_instances / cluster.prefill_s(l_long_tokens)
        return np.minimum(compute, cluster.egress_bytes_per_s / self.kv_bytes(l_long_tokens))

    def theta_prefill_rps(self, l_short_tokens: Numbers, num_prefill: float) -> Numbers:
        """Equation 4."""
        return np.asarray(num_prefill / self.local_prefill_s(l_short_tokens))

    def theta_decode_rps(self, num_decode: float) -> float:
        """Equation 5."""
        return num_decode * self.max_batch_size / (self.decode_step_s * self.mean_output_tokens)


@dataclass(frozen=True)
class OperatingPoint:
    """A choice of threshold and roles, and what the equations say of it."""

    threshold_tokens: float  # prompts longer than this go to PrfaaS; 0: all, inf: none
    num_prfaas: int
    num_prefill: int
    num_decode: int
    offload_fraction: float  # p
    l_long_tokens: float | None  # None where no prompt is on that side
    l_short_tokens: float | None
    theta_prfaas_rps: float
    theta_prefill_rps: float
    theta_decode_rps: float
    throughput_rps: float
    egress_bytes_per_s: float  # of all PrfaaS clusters, at throughput_rps
    bottleneck: str


def prefill_capacity_rps(fleet: Fleet, num_prefill: float, thresholds: Numbers) -> Numbers:
    """The prefill half of equation 6 for each threshold: what both prefill stages sustain together, [thresholds]."""
    p, l_long, l_short = fleet.lengths.split(thresholds)
    with np.errstate(divide="ignore", invalid="ignore"):
        remote = np.where(p > 0, fleet.theta_prfaas_rps(l_long) / p, np.inf)
        local = np.where(p < 1, fleet.theta_prefill_rps(l_short, num_prefill) / (1 - p), np.inf)
    return np.minimum(remote, local)


def best_threshold_tokens(fleet: Fleet, num_prefill: int) -> float:
    """The threshold of highest prefill capacity (equation 7), to a token; decode does not depend on it."""
    if not fleet.num_prfaas:
        return OFFLOAD_NOTHING
    if not num_prefill:
        return 0.0
    lengths = fleet.lengths.tokens
    low, high = 0.0, float(lengths[-1])
    picked = lengths[np.unique(np.linspace(0, len(lengths) - 1, _GRID).astype(int))]
    grid = np.concatenate([[0.0], picked])
    while True:
        capacity = prefill_capacity_rps(fleet, num_prefill, grid)
        best = int(np.argmax(capacity))
        low, high = float(grid[max(best - 1, 0)]), float(grid[min(best + 1, len(grid) - 1)])
        finer = np.unique(np.round(np.linspace(low, high, _GRID)))
        if high - low <= 2 or len(finer) < 3 or np.array_equal(finer, grid):
            return float(grid[best])
        grid = np.unique(np.concatenate([finer, [grid[best]]]))


@dataclass(frozen=True, slots=True)
class Backlog:
    """Work that waits already: seconds until each stage would have done it, one worker's share of it."""

    prfaas_s: float = 0.0
    link_s: float = 0.0
    local_s: float = 0.0


@dataclass(frozen=True, slots=True)
class Horizon:
    """What a threshold is chosen for: the next ``seconds``, ``rate_rps`` in them, behind ``backlog``.

    ``share``: of a stage's time that may be filled before its prompts wait too long: random arrivals queue long before
    a stage is full.
    """

    rate_rps: float
    seconds: float
    backlog: Backlog = Backlog()
    share: float = 1.0


@dataclass(frozen=True, slots=True)
class Outcome:
    """For each threshold: the share of the requests that are prefilled within the horizon, and how full its fullest
    stage is then, 1: as long as the horizon; [thresholds]."""

    served: Numbers
    fullness: Numbers


def outcome(fleet: Fleet, num_prefill: float, thresholds: Numbers, horizon: Horizon) -> Outcome:
    """Equations 3, 4 and 7 over a finite time, from queues as they are.

    A stage does its backlog first, and then so many of its prompts as fit. Without a backlog and with room for all the
    least fullness is at the threshold of equation 7. Where not all fit, most are served with a side that is just full
    and another that is overrun, not with both overrun; but a link that does not carry one of its prompts within the
    horizon serves nothing.
    """
    p, l_long, l_short = fleet.lengths.split(thresholds)
    backlog, arriving = horizon.backlog, max(horizon.rate_rps * horizon.seconds, _LEAST_ARRIVING)
    long, short = arriving * p, arriving * (1 - p)
    compute_rps = sum((c.num_instances / c.prefill_s(l_long) for c in fleet.prfaas), np.zeros_like(p))
    link_rps = sum((c.egress_bytes_per_s / fleet.kv_bytes(l_long) for c in fleet.prfaas), np.zeros_like(p))
    computed, compute_full = _stage(long, compute_rps, backlog.prfaas_s, horizon)
    shipped, link_full = _stage(long, link_rps, backlog.link_s, horizon)
    local, local_full = _stage(short, fleet.theta_prefill_rps(l_short, num_prefill), backlog.local_s, horizon)
    arrives = (long <= 0) | (link_rps * horizon.seconds >= 1)
    served = np.where(arrives, (np.minimum(computed, shipped) + local) / arriving, 0.0)
    return Outcome(served, np.maximum(np.maximum(compute_full, link_full), local_full))


def _stage(prompts: Numbers, rate_rps: Numbers, waits_s: float, horizon: Horizon) -> tuple[Numbers, Numbers]:
    """How many of ``prompts`` a stage does within the horizon, and how full it is then; [thresholds].

    What nobody is sent to is not full, however long its backlog: no threshold changes that.
    """
    rate_rps = np.where(prompts > 0, rate_rps, 1.0)
    done = np.minimum(prompts, max(0.0, horizon.share * horizon.seconds - waits_s) * rate_rps)
    return done, np.where(prompts > 0, (waits_s + prompts / rate_rps) / horizon.seconds, 0.0)


def threshold_for(fleet: Fleet, num_prefill: int, horizon: Horizon) -> float:
    """The threshold that serves most; of those that serve as much the one whose fullest stage is least full."""
    if not fleet.num_prfaas:
        return OFFLOAD_NOTHING
    if not num_prefill:
        return 0.0
    lengths = fleet.lengths.tokens
    picked = lengths[np.unique(np.linspace(0, len(lengths) - 1, _GRID).astype(int))]
    grid = np.concatenate([[0.0], picked])
    found = outcome(fleet, num_prefill, grid, horizon)
    enough = found.served >= found.served.max() - _SERVED_ALIKE
    return float(grid[int(np.argmin(np.where(enough, found.fullness, np.inf)))])


def sooner_beyond_tokens(cluster: PrfaasCluster, local_prefill_s: Curve, kv_bytes: Curve) -> float:
    """The length beyond which a prompt is prefilled and shipped by an idle PrfaaS cluster sooner than prefilled by an
    idle local instance: where prompts should go while nothing is known of what comes. inf: never."""
    tokens = np.exp2(np.arange(_LONGEST_POWER, dtype=np.float64))
    away_s = np.maximum(cluster.prefill_s(tokens), kv_bytes(tokens) / cluster.egress_bytes_per_s)
    stays = local_prefill_s(tokens) <= away_s
    return OFFLOAD_NOTHING if stays[-1] else float(tokens[stays].max(initial=0.0))


def operating_point(fleet: Fleet, num_prefill: int, threshold_tokens: float | None = None) -> OperatingPoint:
    """Equations 3 to 6 for ``num_prefill`` local prefill instances, the other local ones decoding.

    ``threshold_tokens`` None: the best one.
    """
    threshold = best_threshold_tokens(fleet, num_prefill) if threshold_tokens is None else threshold_tokens
    num_decode = fleet.num_decode(num_prefill)
    split_p, l_long, l_short = fleet.lengths.split(threshold)
    p = float(split_p)
    theta_prfaas = float(fleet.theta_prfaas_rps(l_long)) if p > 0 else 0.0
    theta_prefill = float(fleet.theta_prefill_rps(l_short, num_prefill)) if p < 1 else 0.0
    theta_decode = fleet.theta_decode_rps(num_decode)
    limits = {DECODE: theta_decode}
    if p < 1:
        limits[LOCAL_PREFILL] = theta_prefill / (1 - p)
    if p > 0:
        limits[_remote_limit(fleet, l_long)] = theta_prfaas / p
    bottleneck = min(limits, key=lambda stage: limits[stage])
    throughput = limits[bottleneck]
    kv_bytes = float(fleet.kv_bytes(l_long)) if p > 0 else 0.0
    return OperatingPoint(
        threshold_tokens=threshold,
        num_prfaas=fleet.num_prfaas,
        num_prefill=num_prefill,
        num_decode=num_decode,
        offload_fraction=p,
        l_long_tokens=float(l_long) if p > 0 else None,
        l_short_tokens=float(l_short) if p < 1 else None,
        theta_prfaas_rps=theta_prfaas,
        theta_prefill_rps=theta_prefill,
        theta_decode_rps=theta_decode,
        throughput_rps=throughput,
        egress_bytes_per_s=throughput * p * kv_bytes,
        bottleneck=bottleneck,
    )


def _remote_limit(fleet: Fleet, l_long: Numbers) -> str:
    """What stops the PrfaaS clusters: their GPUs or their links, whichever stops more of the rate."""
    by_link = sum(float(cluster.egress_bytes_per_s / fleet.kv_bytes(l_long)) for cluster in fleet.prfaas)
    by_compute = sum(float(cluster.num_instances / cluster.prefill_s(l_long)) for cluster in fleet.prfaas)
    return PRFAAS_LINK if by_link < by_compute else PRFAAS_COMPUTE


def best_operating_point(fleet: Fleet) -> OperatingPoint:
    """The roles and threshold of highest throughput, by trying all roles (PrfaaS 3.4.2: an exhaustive grid search).

    Between equal throughputs: the one whose other stages have more to spare.
    """
    first = 0 if fleet.num_prfaas else 1
    points = [operating_point(fleet, num_prefill) for num_prefill in range(first, fleet.most_prefill + 1)]
    assert points, "a fleet has a decode instance, and a prefill instance somewhere"
    return max(points, key=lambda point: (round(point.throughput_rps, 9), _spare_rps(point)))


def _spare_rps(point: OperatingPoint) -> float:
    """The sum of all prefill and decode rates: what a point has beyond its bottleneck."""
    return point.theta_prfaas_rps + point.theta_prefill_rps + point.theta_decode_rps


def egress_bytes_per_s(fleet: Fleet, point: OperatingPoint, rate_rps: float) -> tuple[float, ...]:
    """Bytes/s that leave each PrfaaS cluster when ``rate_rps`` requests arrive, in ``fleet.prfaas``'s order."""
    if point.l_long_tokens is None:
        return (0.0,) * len(fleet.prfaas)
    l_long = np.asarray(point.l_long_tokens)
    rates = [float(fleet.cluster_rps(cluster, l_long)) for cluster in fleet.prfaas]
    offloaded = rate_rps * point.offload_fraction * float(fleet.kv_bytes(l_long))
    return tuple(offloaded * rate / sum(rates) for rate in rates)


def kv_throughput_bytes_per_s(kv_bytes: float, prefill_s: float) -> float:
    """Equation 1: phi_kv(l) = S_kv(l) / T_prefill(l) of one instance."""
    return kv_bytes / prefill_s


def cluster_egress_bytes_per_s(num_gpus: float, gpus_per_instance: float, phi_bytes_per_s: float) -> float:
    """Equation 2: what a prefill cluster sends when all its instances prefill at phi_kv(L_avg)."""
    return num_gpus / gpus_per_instance * phi_bytes_per_s


@dataclass(frozen=True)
class IdleTtft:
    """TTFT of each length when nothing waits: prefill, then the whole transfer behind it, as in PrfaaS table 6.

    Layer-wise sending hides most of the transfer: this is the bound from above. [points] as the fleet's lengths.
    """

    seconds: Numbers
    remote: NDArray[np.bool_]  # which lengths are prefilled by a PrfaaS cluster
    weights: Numbers

    @property
    def mean_s(self) -> float:
        """Mean over requests."""
        return float(np.dot(self.weights, self.seconds))

    def quantile_s(self, fraction: float) -> float:
        """What ``fraction`` of the requests do not exceed."""
        return weighted_quantile(self.seconds, self.weights, fraction)


def idle_ttft(fleet: Fleet, point: OperatingPoint) -> IdleTtft:
    """TTFT without queueing; a long prompt goes to the PrfaaS clusters in proportion to their rates."""
    tokens = fleet.lengths.tokens
    remote = tokens > point.threshold_tokens
    kv_bytes = fleet.kv_bytes(tokens)
    seconds = fleet.local_prefill_s(tokens) + kv_bytes / fleet.local_link_bytes_per_s
    if point.l_long_tokens is not None:
        rates = [float(fleet.cluster_rps(c, np.asarray(point.l_long_tokens))) for c in fleet.prfaas]
        shares = [rate / sum(rates) for rate in rates]
        away = [c.prefill_s(tokens) + kv_bytes / c.egress_bytes_per_s for c in fleet.prfaas]
        mixed = sum((share * s for share, s in zip(shares, away, strict=True)), np.zeros_like(tokens))
        seconds = np.where(remote, mixed, seconds)
    return IdleTtft(np.asarray(seconds, dtype=float), remote, fleet.lengths.weights)
