"""How do a link's numbers follow from what was seen of it? Pure; link_monitor.py does the seeing.

Two kinds of evidence meet here. *Fast* ones follow a link that narrows within about a second of traffic: ``RecentRate``
over the last half second in which bytes were moving, and the kernel's own delivery rate. A *slow* one,
``TransferFit``, takes whole transfers and tells the fixed cost of a transfer from the cost of its bytes:

    seconds = t0 + bytes / beta          (weighted least squares, older transfers fade)

Invariants: every number is finite; a rate is above 0 or None; nothing here divides by what a peer or a clock may make
zero; equal samples in equal order give equal estimates. Bytes and bytes/s everywhere, never bits, but for
configuration (``LinkConfig.capacity_gbps``).
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace

GOODPUT_WINDOW_S = 0.5  # of traffic: after 2 s of it a change has arrived to 98%
THROUGHPUT_WINDOW_S = 2.0  # of wall-clock time

_MIB = float(1 << 20)
_FORGETTING = 0.97  # weight of a transfer once another one is known: about 33 transfers are remembered
_PRIOR_WEIGHT = 1e-3  # of the fixed cost known before, beside the samples: it decides only what they cannot
_MIN_SECONDS = 1e-6  # less tells of the clock
_FIRST_VARIANCE = 0.04
_VARIANCE_FORGETTING = 0.9
_SURPRISE_DEVIATIONS, _MIN_DEVIATION = 4.0, 0.05
_SURE_SAMPLES = 6  # fewer cannot be contradicted
_SURPRISES_FOR_A_CHANGE = 3


@dataclass(frozen=True, slots=True)
class RecentRate:
    """Bytes per second over about the last ``window_s`` seconds of what it is told; older seconds fade."""

    window_s: float
    num_bytes: float = 0.0  # faded
    seconds: float = 0.0  # faded; at most window_s

    def add(self, num_bytes: float, seconds: float) -> RecentRate:
        """``num_bytes`` moved evenly within the next ``seconds``; spans too short to be measured change nothing."""
        if seconds < _MIN_SECONDS:
            return self
        kept = math.exp(-seconds / self.window_s)
        new_s = self.window_s * -math.expm1(-seconds / self.window_s)
        return replace(
            self,
            num_bytes=self.num_bytes * kept + max(0.0, num_bytes) / seconds * new_s,
            seconds=self.seconds * kept + new_s,
        )

    @property
    def rate(self) -> float | None:
        """Bytes/s; None while nothing was ever moved."""
        if self.seconds <= 0 or self.num_bytes <= 0:
            return None
        return self.num_bytes / self.seconds


@dataclass(frozen=True, slots=True)
class TransferFit:
    """``seconds = t0 + bytes / beta``, fitted online: each sample weighs 1/expected², so relative errors count.

    A sample that is far off is put aside; when three in a row are off to the same side the link has changed, and the
    fit begins anew with them (keeping t0 until they say otherwise). One slow transfer so moves nothing, and a link
    that narrows to a tenth is followed after three. ``variance`` is of ln(measured / expected): 0.01 is about 10%.
    """

    num_samples: int = 0
    variance: float = _FIRST_VARIANCE
    _w: float = 0.0  # sums of weights, weighted MiB, MiB², seconds, MiB * seconds
    _wx: float = 0.0
    _wxx: float = 0.0
    _wy: float = 0.0
    _wxy: float = 0.0
    _prior_t0_s: float = 0.0
    _surprises: tuple[tuple[float, float], ...] = field(default=(), repr=False)  # at most two samples of one side

    def observe(self, num_bytes: int, seconds: float) -> TransferFit:
        """The fit with one more transfer. What moved no bytes, or took no measurable time, tells nothing."""
        if num_bytes <= 0 or not _MIN_SECONDS <= seconds < math.inf:
            return self
        error = 0.0 if self.num_samples == 0 else math.log(seconds / self.seconds(num_bytes))
        limit = _SURPRISE_DEVIATIONS * max(math.sqrt(self.variance), _MIN_DEVIATION)
        if self.num_samples >= _SURE_SAMPLES and abs(error) > limit:
            return self._put_aside(num_bytes, seconds, error)
        return replace(self._with(num_bytes / _MIB, seconds, error), _surprises=())

    @property
    def t0_s(self) -> float:
        """Seconds that a transfer takes beside those of its bytes; at least 0."""
        return self._line()[0]

    @property
    def beta(self) -> float | None:
        """Bytes/s of a long transfer; None before the first sample."""
        return _MIB / self._line()[1] if self.num_samples else None

    def seconds(self, num_bytes: float) -> float:
        """Expected seconds of a transfer; 0 before the first sample."""
        t0_s, s_per_mib = self._line()
        return t0_s + num_bytes / _MIB * s_per_mib

    def _line(self) -> tuple[float, float]:
        """(t0, seconds per MiB), the least squares of the samples and of one weak sample (0 bytes, the earlier t0)."""
        if self.num_samples == 0:
            return 0.0, 0.0
        prior = self._w * _PRIOR_WEIGHT
        w, wy = self._w + prior, self._wy + prior * self._prior_t0_s
        slope = (w * self._wxy - self._wx * wy) / (w * self._wxx - self._wx * self._wx)
        t0_s = (wy - slope * self._wx) / w
        if slope <= 0 or t0_s < 0:  # no link is like that: noise; then the line goes through 0
            return 0.0, self._wxy / self._wxx
        return t0_s, slope

    def _with(self, mib: float, seconds: float, error: float) -> TransferFit:
        expected = self.seconds(mib * _MIB) if self.num_samples >= 2 else seconds
        weight = max(expected, _MIN_SECONDS) ** -2
        return replace(
            self,
            num_samples=self.num_samples + 1,
            variance=_VARIANCE_FORGETTING * self.variance + (1 - _VARIANCE_FORGETTING) * error * error,
            _w=_FORGETTING * self._w + weight,
            _wx=_FORGETTING * self._wx + weight * mib,
            _wxx=_FORGETTING * self._wxx + weight * mib * mib,
            _wy=_FORGETTING * self._wy + weight * seconds,
            _wxy=_FORGETTING * self._wxy + weight * mib * seconds,
        )

    def _put_aside(self, num_bytes: int, seconds: float, error: float) -> TransferFit:
        slower = error > 0
        same_side = tuple(s for s in self._surprises if (s[1] > self.seconds(s[0])) is slower)
        surprises = (*same_side, (float(num_bytes), seconds))
        if len(surprises) < _SURPRISES_FOR_A_CHANGE:
            return replace(self, _surprises=surprises)
        fit = TransferFit(_prior_t0_s=min(self.t0_s, *(seconds for _, seconds in surprises)))
        for size, took in surprises:
            fit = fit.observe(int(size), took)
        return replace(fit, num_samples=self.num_samples + 1)


def has_fallen(path: str) -> bool:
    """Was this path to be RDMA, NVLink or shared memory, and is TCP? (UCX falls back without a word.)"""
    transport, _, lanes = path.partition(":")
    return transport == "ucx" and "tcp" in lanes
