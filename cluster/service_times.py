"""What did this gateway's own requests take? Measurements go in, frozen ``ServiceTimes`` come out.

They serve where the policy forecasts nothing and no cost model knows the workers. ``Measurements`` and ``DrainRate``
have one writer each, admission.py.
"""

from __future__ import annotations

import math
from bisect import bisect_left, insort
from collections import deque
from dataclasses import dataclass

MEASUREMENT_LIFE_S = 30.0  # who is refused for what was measured brings no new measurement, so old ones are forgotten
_DURATIONS_KEPT = 256
_FIT_SAMPLES = 64  # how many of the latest measurements a line is made of, about
_ONE_X = 1e-6  # variance over the square of the mean, below which all measurements are at one x
_DRAIN_MEMORY_S = 10.0
_LEAST_DRAIN_S = 0.25  # seconds of waiting before their rate says anything


@dataclass(frozen=True, slots=True)
class Line:
    """seconds = constant + slope x, both at least 0."""

    constant: float
    slope: float

    def at(self, x: float) -> float:
        return self.constant + self.slope * x


@dataclass(frozen=True, slots=True)
class ServiceTimes:
    """What this gateway measured of its own requests lately; seconds. None, or nothing: not known."""

    first_token: Line | None = None  # from release to first token, by tokens ahead of it and its own
    token: Line | None = None  # TPOT, by sequences on the decode worker
    decode: tuple[float, ...] = ()  # from first to last token, ascending
    token_s: float | None = None  # mean TPOT


class Measurements:
    """What this gateway's own requests took. Sole writer of ``ServiceTimes``."""

    def __init__(self) -> None:
        self._first_token = _Fit(through_origin=True)
        self._token = _Fit(through_origin=False)
        self._durations: deque[float] = deque()
        self._ascending: list[float] = []
        self._token_s = _Mean()
        self._times: ServiceTimes | None = None
        self._times_until = -math.inf

    def first_token(self, tokens: int, seconds: float, now: float) -> None:
        """With so many tokens to compute for it, the first token came after so long."""
        self._first_token.add(tokens, seconds, now)
        self._times = None

    def finished(self, batch: float, num_tokens: int, seconds: float, now: float) -> None:
        """A continuation had so many tokens; those after the first came in so many seconds, beside ``batch`` others."""
        if num_tokens < 2:
            return
        self._times = None
        self._token.add(batch, seconds / (num_tokens - 1), now)
        self._token_s.add(seconds / (num_tokens - 1))
        self._durations.append(seconds)
        insort(self._ascending, seconds)
        if len(self._durations) > _DURATIONS_KEPT:
            del self._ascending[bisect_left(self._ascending, self._durations.popleft())]

    def times(self, now: float) -> ServiceTimes:
        """What is known; lines that nothing was added to lately are not."""
        if self._times is None or now > self._times_until:
            self._times = ServiceTimes(
                first_token=self._first_token.line(now),
                token=self._token.line(now),
                decode=tuple(self._ascending),
                token_s=self._token_s.value,
            )
            ends = (fit.added_at + MEASUREMENT_LIFE_S for fit in (self._first_token, self._token))
            self._times_until = min((end for end in ends if end >= now), default=math.inf)
        return self._times


class _Mean:
    """Of about the last ``_FIT_SAMPLES`` values."""

    def __init__(self) -> None:
        self._weight = 0.0
        self._sum = 0.0

    @property
    def value(self) -> float | None:
        return self._sum / self._weight if self._weight else None

    def add(self, value: float) -> None:
        keep = 1 - 1 / _FIT_SAMPLES
        self._weight, self._sum = self._weight * keep + 1, self._sum * keep + value


class _Fit:
    """A line by least squares through about the last ``_FIT_SAMPLES`` measurements.

    Measurements that are all at the same x tell no slope: they are taken to lie on a line through the origin, or on a
    level one.
    """

    def __init__(self, *, through_origin: bool) -> None:
        self._through_origin = through_origin
        self._w = self._x = self._y = self._xx = self._xy = 0.0
        self.added_at = -math.inf

    def add(self, x: float, y: float, now: float) -> None:
        keep = 1 - 1 / _FIT_SAMPLES
        self._w = self._w * keep + 1
        self._x, self._y = self._x * keep + x, self._y * keep + y
        self._xx, self._xy = self._xx * keep + x * x, self._xy * keep + x * y
        self.added_at = now

    def line(self, now: float) -> Line | None:
        if not self._w or now > self.added_at + MEASUREMENT_LIFE_S:
            return None
        x, y = self._x / self._w, self._y / self._w
        variance = self._xx / self._w - x * x
        if variance <= _ONE_X * x * x:
            return Line(0.0, y / x) if self._through_origin and x > 0 else Line(y, 0.0)
        slope = max(0.0, (self._xy / self._w - x * y) / variance)
        constant = y - slope * x
        return Line(constant, slope) if constant >= 0 else Line(0.0, y / x)


class DrainRate:
    """Cost that was released per second while requests waited."""

    def __init__(self) -> None:
        self._cost = 0.0
        self._seconds = 0.0
        self._since = 0.0

    def rest(self, now: float) -> None:
        """Nothing has waited until now. What was measured long ago is forgotten."""
        if now - self._since > MEASUREMENT_LIFE_S:
            self._cost = self._seconds = 0.0
        self._since = now

    def note(self, cost: float, now: float) -> None:
        """Something was released while something waited."""
        seconds = now - self._since
        keep = math.exp(-seconds / _DRAIN_MEMORY_S)
        self._cost, self._seconds = self._cost * keep + cost, self._seconds * keep + seconds
        self._since = now

    def rate(self, now: float) -> float | None:
        """Cost per second; None: not known. It falls while nothing is released."""
        seconds = self._seconds + now - self._since
        return self._cost / seconds if self._cost and seconds >= _LEAST_DRAIN_S else None
