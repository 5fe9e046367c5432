"""How is a simulation told? As one JSON object for programs, as a table for people.

Latencies are over requests that finished, goodput over all that came. Equal results make equal bytes: numbers are not
rounded, and keys have one order.
"""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np
from rich.table import Table

from cluster.simulator.timeline import Sample
from cluster.simulator.world import SimulationResult

PERCENTILES = (50, 90, 99)


def result_as_dict(result: SimulationResult, ttft_slo_s: float | None, tpot_slo_s: float | None) -> dict[str, Any]:
    """The result as JSON values; null for what does not exist."""
    records = result.records
    finished = [record for record in records if record.ok]
    timings = [record.timing for record in finished if record.timing is not None]
    num_good = sum(record.meets(ttft_slo_s, tpot_slo_s) for record in records)
    prompt_tokens = sum(record.input_tokens for record in finished)
    return {
        "num_requests": len(records),
        "num_finished": len(finished),
        "outcomes": dict(sorted(Counter(record.outcome for record in records).items())),
        "seconds": result.seconds,
        "throughput_rps": _per(len(finished), result.seconds),
        "output_tokens_per_s": _per(sum(record.output_tokens for record in records), result.seconds),
        "goodput_rps": _per(num_good, result.seconds),
        "slo_attainment": _per(num_good, len(records)),
        "ttft_s": distribution([record.ttft_s for record in finished if record.ttft_s is not None]),
        "tpot_s": distribution([tpot for record in finished if (tpot := record.tpot_s) is not None]),
        "e2e_s": distribution([record.total_s for record in finished]),
        "hit_rate": _per(sum(timing.cached_tokens for timing in timings), prompt_tokens),
        "bytes_shipped": sum(timing.bytes_shipped for timing in timings),
        "bytes_pulled": sum(timing.bytes_pulled for timing in timings),
        "places": dict(sorted(Counter(_place(timing.prefill_worker) for timing in timings).items())),
        "num_retries": result.num_retries,
        "num_resumes": result.num_resumes,
        "timeline": [_sample(sample) for sample in result.samples],
    }


def result_as_json(result: SimulationResult, ttft_slo_s: float | None, tpot_slo_s: float | None) -> str:
    """The same as text."""
    return json.dumps(result_as_dict(result, ttft_slo_s, tpot_slo_s), indent=1, allow_nan=False) + "\n"


def distribution(values: Sequence[float]) -> dict[str, float | None]:
    """Mean and percentiles; null of no values."""
    found: dict[str, float | None] = {"mean": float(np.mean(values)) if values else None}
    for percent in PERCENTILES:
        found[f"p{percent}"] = float(np.percentile(values, percent)) if values else None
    return found


def result_table(results: Sequence[tuple[str, dict[str, Any]]]) -> Table:
    """One column for each named result (``result_as_dict``)."""
    table = Table()
    table.add_column("")
    for name, _ in results:
        table.add_column(name, justify="right")
    for label, path, unit in _ROWS:
        table.add_row(label, *(_shown(_at(found, path), unit) for _, found in results))
    return table


_ROWS = (
    ("requests finished", "num_finished", ""),
    ("throughput", "throughput_rps", "req/s"),
    ("goodput", "goodput_rps", "req/s"),
    ("within SLO", "slo_attainment", "%"),
    ("TTFT mean", "ttft_s.mean", "s"),
    ("TTFT P50", "ttft_s.p50", "s"),
    ("TTFT P90", "ttft_s.p90", "s"),
    ("TTFT P99", "ttft_s.p99", "s"),
    ("TPOT mean", "tpot_s.mean", "ms"),
    ("TPOT P90", "tpot_s.p90", "ms"),
    ("prompt tokens cached", "hit_rate", "%"),
    ("K/V shipped", "bytes_shipped", "GB"),
    ("retries", "num_retries", ""),
    ("resumes", "num_resumes", ""),
)
_SCALES = {"%": 100.0, "ms": 1e3, "GB": 1e-9}


def _at(found: dict[str, Any], path: str) -> Any:
    for key in path.split("."):
        found = found[key]
    return found


def _shown(value: float | None, unit: str) -> str:
    if value is None:
        return "-"
    if not unit:
        return str(value)
    return f"{value * _SCALES.get(unit, 1.0):.4g} {unit}"


def _place(worker: str | None) -> str:
    """Where a prompt was prefilled: a cluster, or the decode worker itself."""
    return "decode worker" if worker is None else worker.partition("/")[0]


def _per(count: float, of: float) -> float | None:
    return count / of if of else None


def _sample(sample: Sample) -> dict[str, Any]:
    threshold = sample.threshold_tokens
    return {
        "at_s": sample.at_s,
        "num_inflight": sample.num_inflight,
        "threshold_tokens": threshold if math.isfinite(threshold) else None,
        "clusters": {
            cluster.cluster_id: {
                "num_prefill": cluster.num_prefill,
                "num_decode": cluster.num_decode,
                "prefill_utilisation": cluster.prefill_utilisation,
                "decode_utilisation": cluster.decode_utilisation,
                "num_waiting": cluster.num_waiting,
                "num_running": cluster.num_running,
                "pages_used": cluster.pages_used,
            }
            for cluster in sample.clusters
        },
        "links": {
            f"{link.from_cluster} to {link.to_cluster}": {
                "bytes_per_s": link.bytes_per_s,
                "capacity_bytes_per_s": link.capacity,
                "num_flows": link.num_flows,
            }
            for link in sample.links
        },
    }
