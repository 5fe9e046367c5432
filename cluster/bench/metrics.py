"""Which numbers does a run amount to? Percentiles, throughput and goodput of what the clients saw. Pure.

Definitions, those of ``vllm bench serve`` unless said otherwise (docs/benchmarking.md compares the tools):

    TTFT     sending to the first chunk with output
    TTST     first chunk to the second (AIPerf's)
    TPOT     (E2E - TTFT) / (output tokens - 1), one value for each request with two tokens or more
    ITL      every gap between chunks, pooled over requests
    TBT      mean of a request's longest tenth of gaps (Mooncake's)
    E2E      sending to the last output
    late     the schedule's instant to sending, less what --max-concurrency held back: the generator's own fault, and
             in none of the above; ``ttft_from_due_s`` contains both

Latencies are of requests that finished; percentiles are linearly interpolated. A request is good if it finished and
meets every limit; one that failed, or was never answered, is a miss and stays in the denominator. A limit on what a
request does not have (TPOT of a single token) is met.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from cluster.bench.client_record import ClientRecord
from core.errors import InvalidConfig

PERCENTILES = (50.0, 90.0, 95.0, 99.0)
SLO_SCALES = (0.25, 0.5, 0.75, 1.0, 1.25, 1.5, 2.0, 3.0, 4.0)

# A generator has kept up if no more than this share of its requests was sent more than LATE_S after its instant, and
# its event loop was no more than LATE_S behind, at the same share: then no latency is off by more than that.
LATE_S = 0.01
_LATE_SHARE = 0.01

_OF: Mapping[str, Callable[[ClientRecord], float | None]] = {
    "ttft": lambda record: record.ttft_s,
    "ttst": lambda record: record.ttst_s,
    "tpot": lambda record: record.tpot_s,
    "tbt": lambda record: record.tbt_s,
    "e2e": lambda record: record.e2e_s,
}


@dataclass(frozen=True)
class Slos:
    """Limits in seconds by metric (ttft, ttst, tpot, tbt, e2e). ``attainment``: the share that is to meet them all."""

    limits: Mapping[str, float]
    attainment: float = 0.9

    @classmethod
    def parse(cls, text: str) -> Slos:
        """``ttft=2,tpot=0.025,attainment=0.9``; ``InvalidConfig`` on ``--slo``."""
        limits: dict[str, float] = {}
        for part in text.split(","):
            name, _, value = (piece.strip() for piece in part.partition("="))
            try:
                limits[name] = float(value)
            except ValueError:
                limits[name] = math.nan
            if name not in (*_OF, "attainment") or not 0 < limits[name] < math.inf:
                allowed = ", ".join((*_OF, "attainment"))
                raise InvalidConfig("--slo", f"must be NAME=SECONDS,... of {allowed}, above 0 each; got {part!r}")
        attainment = limits.pop("attainment", 0.9)
        if attainment > 1:
            raise InvalidConfig("--slo", f"attainment must be a share of at most 1, got {attainment:g}")
        return cls(limits, attainment)

    def scaled(self, factor: float) -> Slos:
        """Every limit times ``factor``."""
        return Slos({name: limit * factor for name, limit in self.limits.items()}, self.attainment)

    def met_by(self, record: ClientRecord) -> bool:
        """Did the request finish within all limits?"""
        return record.ok and not self.missed_by(record)

    def missed_by(self, record: ClientRecord) -> list[str]:
        """The limits that a finished request is beyond."""
        seen = ((name, _OF[name](record), limit) for name, limit in self.limits.items())
        return [name for name, value, limit in seen if value is not None and value > limit]


NO_SLOS = Slos({})


def summary(
    records: Sequence[ClientRecord],
    slos: Slos = NO_SLOS,
    *,
    loop_lag_s: Sequence[float] = (),
    percentiles: Sequence[float] = PERCENTILES,
) -> dict[str, Any]:
    """One run's numbers as JSON values; null for what does not exist. ``loop_lag_s``: how late the generator's own
    event loop woke, sampled while the run went on."""
    finished = [record for record in records if record.ok]
    seconds = _span_s(records)
    output_tokens = sum(record.output_tokens for record in finished)
    prompt_tokens = sum(_prompt_tokens(record) for record in finished)
    num_good = sum(slos.met_by(record) for record in records)
    cached = [record.cached_tokens for record in finished if record.cached_tokens is not None]

    def spread(values: Sequence[float]) -> dict[str, float | None]:
        return distribution(values, percentiles)

    def of(name: str) -> dict[str, float | None]:
        return spread([value for record in finished if (value := _OF[name](record)) is not None])

    return {
        "num_requests": len(records),
        "num_finished": len(finished),
        "errors": dict(sorted(Counter(record.error for record in records if record.error is not None).items())),
        "seconds": seconds,
        "request_rps": _per(len(finished), seconds),
        "input_tokens_per_s": _per(prompt_tokens, seconds),
        "output_tokens_per_s": _per(output_tokens, seconds),
        "total_tokens_per_s": _per(prompt_tokens + output_tokens, seconds),
        "peak_concurrency": peak_concurrency(records),
        "slo": dict(slos.limits),
        "num_good": num_good,
        "goodput_rps": _per(num_good, seconds),
        "slo_attainment": _per(num_good, len(records)),
        "slo_met": None if not records else num_good / len(records) >= slos.attainment,
        "misses": _misses(records, slos),
        "attainment_by_scale": attainment_curve(records, slos),
        "ttft_s": of("ttft"),
        "ttft_from_due_s": spread(
            [record.sent_at - record.due_at + record.ttft_s for record in finished if record.ttft_s is not None]
        ),
        "ttst_s": of("ttst"),
        "tpot_s": of("tpot"),
        "itl_s": spread([gap for record in finished for gap in record.itl_s]),
        "tbt_s": of("tbt"),
        "e2e_s": of("e2e"),
        "prompt_tokens": spread([_prompt_tokens(record) for record in finished]),
        "output_tokens": spread([record.output_tokens for record in finished]),
        "asked_input_tokens": spread([record.asked_input_tokens for record in records]),
        "asked_output_tokens": spread([record.asked_output_tokens for record in records]),
        "output_tokens_counted_by": dict(sorted(Counter(record.counted_by for record in finished).items())),
        "cached_share": _per(sum(cached), prompt_tokens) if cached else None,
        "generator": generator_health(records, loop_lag_s),
    }


def distribution(values: Sequence[float], percentiles: Sequence[float] = PERCENTILES) -> dict[str, float | None]:
    """Mean, standard deviation, least, most and percentiles; null of no values."""
    kept = np.asarray(values, dtype=float)
    some = len(kept) > 0
    found: dict[str, float | None] = {
        "mean": float(kept.mean()) if some else None,
        "std": float(kept.std()) if some else None,
        "min": float(kept.min()) if some else None,
        "max": float(kept.max()) if some else None,
    }
    for percent in percentiles:
        found[f"p{percent:g}"] = float(np.percentile(kept, percent)) if some else None
    return found


def attainment_curve(records: Sequence[ClientRecord], slos: Slos) -> dict[str, float | None]:
    """Scale of all limits |-> share of requests that meet them; empty without limits."""
    if not slos.limits:
        return {}
    return {
        f"{scale:g}": _per(sum(slos.scaled(scale).met_by(record) for record in records), len(records))
        for scale in SLO_SCALES
    }


def generator_health(records: Sequence[ClientRecord], loop_lag_s: Sequence[float]) -> dict[str, Any]:
    """Did the generator do what it was asked to? ``kept_up`` is False if its lateness is in the numbers."""
    late = [record.late_s for record in records]
    kept_up = _share_above(late, LATE_S) <= _LATE_SHARE and _share_above(loop_lag_s, LATE_S) <= _LATE_SHARE
    return {
        "kept_up": kept_up,
        "late_s": distribution(late),
        "late_share": _share_above(late, LATE_S),
        "loop_lag_s": distribution(loop_lag_s),
        "loop_lag_share": _share_above(loop_lag_s, LATE_S),
    }


def peak_concurrency(records: Sequence[ClientRecord]) -> int:
    """Most requests that were under way at one instant; one that ends as another begins has ended."""
    changes = sorted(
        [(record.sent_at, 1) for record in records] + [(record.sent_at + record.ended_s, -1) for record in records]
    )
    now = most = 0
    for _, change in changes:
        now += change
        most = max(most, now)
    return most


def _misses(records: Sequence[ClientRecord], slos: Slos) -> dict[str, int]:
    """Limit |-> requests beyond it; one may be beyond several."""
    counts = Counter(name for record in records if record.ok for name in slos.missed_by(record))
    counts["failed"] = sum(not record.ok for record in records)
    return {name: counts[name] for name in (*slos.limits, "failed")}


def _prompt_tokens(record: ClientRecord) -> int:
    """As the server counted, else as asked for."""
    return record.asked_input_tokens if record.prompt_tokens is None else record.prompt_tokens


def _span_s(records: Sequence[ClientRecord]) -> float:
    """From the first sending to the last end."""
    if not records:
        return 0.0
    return max(r.sent_at + r.ended_s for r in records) - min(r.sent_at for r in records)


def _share_above(values: Sequence[float], limit: float) -> float:
    return sum(value > limit for value in values) / len(values) if values else 0.0


def _per(count: float, of: float) -> float | None:
    return count / of if of else None
