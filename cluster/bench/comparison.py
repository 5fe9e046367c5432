"""Where does one arm lose against the others? Curves over load, straight between their points. Pure."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

LEVEL = 0.02  # within this share of the other's value neither loses: two runs of one thing differ as much


@dataclass(frozen=True)
class Criterion:
    """One number by which arms are compared: its path in a summary."""

    name: str
    path: tuple[str, ...]
    unit: str
    lower_is_better: bool
    scale: float = 1.0  # to ``unit``

    def of(self, summary: Mapping[str, Any]) -> float | None:
        """Its value in a summary; None if it has none."""
        found: Any = summary
        for key in self.path:
            found = found.get(key) if isinstance(found, Mapping) else None
        return None if found is None else float(found) * self.scale


GOODPUT = Criterion("goodput", ("goodput_rps",), "req/s", False)
THROUGHPUT = Criterion("output tokens", ("output_tokens_per_s",), "tokens/s", False)
LATENCIES = tuple(
    Criterion(f"{label} p{percent}", (key, f"p{percent}"), unit, True, scale)
    for label, key, unit, scale in (("TTFT", "ttft_s", "s", 1.0), ("TPOT", "tpot_s", "ms", 1e3))
    for percent in (50, 99)
)


def criteria(has_slo: bool) -> tuple[Criterion, ...]:
    """What is compared; goodput only under limits."""
    return (*((GOODPUT,) if has_slo else ()), THROUGHPUT, *LATENCIES)


@dataclass(frozen=True)
class Loss:
    """From ``begin`` to ``end`` of the load, ``arm`` is worse than the best other one; at worst by ``ratio`` (0.3: its
    value is 30% worse), at ``worst_at``."""

    arm: str
    criterion: str
    begin: float
    end: float
    ratio: float
    worst_at: float


Curve = Sequence[tuple[float, float]]  # load |-> value, the load ascending


def losses(curves: Mapping[str, Curve], criterion: Criterion) -> list[Loss]:
    """Of every arm, wherever it loses. Loads that not all arms have been measured at are left out."""
    shared = sorted(set.intersection(*(set(dict(curve)) for curve in curves.values()))) if len(curves) > 1 else []
    values = {arm: dict(curve) for arm, curve in curves.items()}
    found = []
    for arm in curves:
        others = [values[other] for other in curves if other != arm]
        best = min if criterion.lower_is_better else max
        behind = [
            (load, _behind(values[arm][load], best(other[load] for other in others), criterion.lower_is_better))
            for load in shared
        ]
        found += [
            Loss(arm, criterion.name, begin, end, *_worst(behind, begin, end)) for begin, end in regions_above(behind)
        ]
    return found


def regions_above(points: Curve, limit: float = LEVEL) -> list[tuple[float, float]]:
    """Where the line through ``points`` is above ``limit``; a single point makes a region without width."""
    regions: list[tuple[float, float]] = []
    for begin, end in _pieces_above(points, limit):
        if regions and regions[-1][1] >= begin:
            regions[-1] = (regions[-1][0], end)
        else:
            regions.append((begin, end))
    return regions


def _pieces_above(points: Curve, limit: float) -> Iterator[tuple[float, float]]:
    if len(points) == 1 and points[0][1] > limit:
        yield points[0][0], points[0][0]
    for (x0, y0), (x1, y1) in pairwise(points):
        if y0 > limit and y1 > limit:
            yield x0, x1
        elif y0 > limit or y1 > limit:
            crossing = x0 + (limit - y0) / (y1 - y0) * (x1 - x0)
            yield (x0, crossing) if y0 > limit else (crossing, x1)


def _behind(own: float, best: float, lower_is_better: bool) -> float:
    """By what share of the best other value the own one is worse; below 0: better."""
    if best == own:
        return 0.0
    worse = own - best if lower_is_better else best - own
    return worse / best if best > 0 else (1.0 if worse > 0 else -1.0)


def _worst(behind: Curve, begin: float, end: float) -> tuple[float, float]:
    load, ratio = max(((x, y) for x, y in behind if begin <= x <= end), key=lambda point: point[1])
    return ratio, load
