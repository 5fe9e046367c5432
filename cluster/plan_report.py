"""How is a plan told? As one JSON object for programs, as tables for people.

The keys at the top of the JSON are those of PrfaaS table 6; rates are requests/s, link rates Gbit/s, times seconds. A
number that does not exist (the threshold where nothing is offloaded, a latency that grows without end) is null.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from rich.table import Table

from cluster.capacity_plan import PERCENTILES, Alternative, CapacityPlan
from cluster.throughput_model import OperatingPoint


def plan_as_dict(plan: CapacityPlan, inferred: Mapping[str, str]) -> dict[str, Any]:
    """The plan as JSON values."""
    base = plan.homogeneous.point.throughput_rps
    naive = plan.naive.point.throughput_rps if plan.naive else None
    found = {
        **_point(plan.point),
        "ratio_vs_homogeneous": plan.point.throughput_rps / base,
        "ratio_naive_vs_homogeneous": None if naive is None else naive / base,
        "egress_gbps": sum(link.egress_gbps for link in plan.links),
        "ttft_mean_s": plan.ttft_mean_s,
        "ttft_p90_s": plan.ttft_p90_s,
        "bottleneck": plan.point.bottleneck,
        "goodput_rps": plan.goodput_rps,
        "at_rate": _at_rate(plan),
        "links": {
            link.name: {"gbps": link.gbps, "egress_gbps": link.egress_gbps, "utilisation": link.utilisation}
            for link in plan.links
        },
        "parallelism": _parallelism(plan),
        "homogeneous": _alternative(plan.homogeneous),
        "naive": None if plan.naive is None else _alternative(plan.naive),
        "colocated": {
            "throughput_rps": plan.colocated.throughput_rps,
            "tpot_s": plan.colocated.tpot_s,
            "goodput_rps": plan.colocated.goodput_rps,
            "assumed_as_serving_hardware": list(plan.colocated.assumed),
        },
        "changes": [
            {
                "what": change.what,
                "throughput_rps": change.throughput_rps,
                "gain_rps": change.gain_rps,
                "gain_per_unit_rps": change.gain_per_unit_rps,
            }
            for change in plan.changes
        ],
        "cost": None
        if plan.cost is None
        else {
            "per_hour": plan.cost.per_hour,
            "per_million_tokens": plan.cost.per_million_tokens,
            "per_million_output_tokens": plan.cost.per_million_output_tokens,
        },
        "workload": {
            "mean_uncached_tokens": plan.demand.lengths.mean_tokens,
            "mean_input_tokens": plan.demand.mean_input_tokens,
            "mean_output_tokens": plan.demand.mean_output_tokens,
            "rate_rps": plan.demand.rate_rps,
        },
        "inferred": [{"key": key, "reason": reason} for key, reason in inferred.items()],
        "notes": notes(plan),
    }
    cleaned: dict[str, Any] = _finite(found)
    return cleaned


def notes(plan: CapacityPlan) -> list[str]:
    """What a reader must know before acting on the plan."""
    found = [
        "rates are the model's, not measured; ttft_* are of an idle fleet, the whole transfer following prefill",
    ]
    if plan.planned.fleet.prfaas and plan.point.throughput_rps < plan.homogeneous.point.throughput_rps:
        found.append("on these links the PrfaaS clusters' GPUs would do more as serving GPUs beside the decode workers")
    if plan.demand.rate_rps is not None and plan.demand.rate_rps > plan.point.throughput_rps:
        found.append(f"the workload's {plan.demand.rate_rps:.3g} req/s are more than the fleet sustains: queues grow")
    if not plan.goodput_rps:
        found.append("the SLO is not met by enough requests even when the fleet is idle")
    if plan.point.num_prefill + plan.point.num_prfaas == 0:
        found.append("nothing prefills")
    found += [f"{gpus} GPUs of {name} are left over" for name, gpus in _left_over(plan)]
    return found


def _left_over(plan: CapacityPlan) -> list[tuple[str, int]]:
    point, serving = plan.point, plan.planned.serving
    used = point.num_prefill * serving.gpus_per_prefill + point.num_decode * serving.gpus_per_decode
    rest = [(serving.name, serving.num_gpus - used)]
    rest += [(pool.name, pool.num_gpus % pool.gpus_per_prefill) for pool in plan.planned.prefill_only]
    return [(name, gpus) for name, gpus in rest if gpus]


def _point(point: OperatingPoint) -> dict[str, Any]:
    return {
        "threshold_tokens": point.threshold_tokens,
        "num_prfaas": point.num_prfaas,
        "num_prefill": point.num_prefill,
        "num_decode": point.num_decode,
        "offload_fraction": point.offload_fraction,
        "l_long_tokens": point.l_long_tokens,
        "l_short_tokens": point.l_short_tokens,
        "theta_prfaas_rps": point.theta_prfaas_rps,
        "theta_prefill_rps": point.theta_prefill_rps,
        "theta_decode_rps": point.theta_decode_rps,
        "throughput_rps": point.throughput_rps,
    }


def _alternative(alternative: Alternative) -> dict[str, Any]:
    times = {"ttft_mean_s": alternative.ttft_mean_s, "ttft_p90_s": alternative.ttft_p90_s}
    return _point(alternative.point) | times


def _at_rate(plan: CapacityPlan) -> dict[str, Any]:
    percentiles = {f"ttft_p{100 * q:.0f}_s": plan.latency.ttft_quantile_s(q) for q in PERCENTILES}
    return {
        "rate_rps": plan.rate_rps,
        "attainment": plan.attainment,
        **percentiles,
        "tpot_mean_s": plan.latency.tpot_mean_s,
        "tpot_full_batch_s": plan.latency.step_s,
    }


def _parallelism(plan: CapacityPlan) -> dict[str, dict[str, int]]:
    """GPUs in tensor parallel of each kind of instance."""
    serving = plan.planned.serving
    found = {serving.name: {"prefill": serving.gpus_per_prefill, "decode": serving.gpus_per_decode}}
    return found | {pool.name: {"prefill": pool.gpus_per_prefill} for pool in plan.planned.prefill_only}


def _finite(value: Any) -> Any:
    """``value`` with numbers that JSON does not have as null."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    return [_finite(item) for item in value] if isinstance(value, list) else value


# ---- tables ----


def plan_tables(plan: CapacityPlan, inferred: Mapping[str, str]) -> list[Table]:
    """The plan, its alternatives, what more would buy, and what to know."""
    tables = [_answer_table(plan), _alternative_table(plan), _change_table(plan)]
    remarks = Table(title="To know", show_header=False, box=None, title_justify="left", pad_edge=False)
    for note in notes(plan):
        remarks.add_row("note", note)
    for key, reason in inferred.items():
        remarks.add_row("inferred", f"{key}: {' '.join(reason.split())}")
    return [*tables, remarks]


def _answer_table(plan: CapacityPlan) -> Table:
    point, shown = plan.point, _at_rate(plan)
    table = Table(title="Plan", show_header=False, box=None, title_justify="left", pad_edge=False)
    serving = plan.planned.serving
    parallel = f"{serving.gpus_per_prefill} GPUs a prefill instance, {serving.gpus_per_decode} a decode instance"
    roles = f"{point.num_prefill} prefill, {point.num_decode} decode ({parallel})"
    remote = ", ".join(f"{c.num_instances} in {c.name}" for c in plan.planned.fleet.prfaas) or "none"
    percentiles = ", ".join(f"P{100 * q:.0f} {_s(shown[f'ttft_p{100 * q:.0f}_s'])}" for q in PERCENTILES)
    rows = [
        (f"roles in {serving.name}", roles),
        ("PrfaaS instances", remote),
        ("threshold", _threshold(point)),
        ("throughput", f"{point.throughput_rps:.3f} req/s; the bottleneck is {point.bottleneck}"),
        ("stages", f"{point.theta_prfaas_rps:.3f} PrfaaS, {point.theta_prefill_rps:.3f} local prefill, "
                   f"{point.theta_decode_rps:.3f} decode (req/s that each could take)"),
        ("goodput under the SLO", f"{plan.goodput_rps:.3f} req/s"),
        ("TTFT, idle", f"mean {_s(plan.ttft_mean_s)}, P90 {_s(plan.ttft_p90_s)}"),
        (f"TTFT at {plan.rate_rps:.2f} req/s", f"{percentiles}; {100 * plan.attainment:.1f} % of requests are good"),
        ("TPOT", f"{1e3 * plan.latency.tpot_mean_s:.1f} ms"),
    ]  # fmt: skip
    for link in plan.links:
        sent = f"{link.egress_gbps:.2f} of {link.gbps:g} Gbit/s, {100 * link.utilisation:.0f} %"
        rows.append((f"egress on {link.name}", sent))
    if plan.cost is not None:
        price = f"{plan.cost.per_million_tokens:.3f} for a million tokens, {plan.cost.per_million_output_tokens:.2f}"
        rows.append(("cost", f"{price} for a million generated ones ({plan.cost.per_hour:.2f} an hour)"))
    for row in rows:
        table.add_row(*row)
    return table


def _alternative_table(plan: CapacityPlan) -> Table:
    table = Table(title="Against the same GPUs used otherwise", box=None, title_justify="left", pad_edge=False)
    table.add_column("")
    for heading in ("req/s", "of this plan", "roles P+D", "TTFT mean", "TTFT P90"):
        table.add_column(heading, justify="right")
    mine = plan.point.throughput_rps
    for other in (plan.homogeneous, plan.naive):
        if other is not None:
            point = other.point
            roles = f"{point.num_prfaas + point.num_prefill}+{point.num_decode}"
            share = f"{100 * point.throughput_rps / mine:.0f} %"
            rate = f"{point.throughput_rps:.3f}"
            table.add_row(other.name, rate, share, roles, _s(other.ttft_mean_s), _s(other.ttft_p90_s))
    colocated = plan.colocated
    most = f"colocated (TPOT {1e3 * colocated.tpot_s:.0f} ms)"
    table.add_row(most, f"{colocated.throughput_rps:.3f}", f"{100 * colocated.throughput_rps / mine:.0f} %", "", "", "")
    if colocated.goodput_rps != colocated.throughput_rps:
        share = f"{100 * colocated.goodput_rps / mine:.0f} %"
        table.add_row("colocated within the TPOT SLO", f"{colocated.goodput_rps:.3f}", share, "", "", "")
    return table


def _change_table(plan: CapacityPlan) -> Table:
    table = Table(title="What more would buy", box=None, title_justify="left", pad_edge=False)
    table.add_column("")
    for heading in ("req/s", "gain", "gain per GPU or Gbit/s"):
        table.add_column(heading, justify="right")
    for change in plan.changes:
        gain = f"{change.gain_rps:+.3f}"
        table.add_row(change.what, f"{change.throughput_rps:.3f}", gain, f"{change.gain_per_unit_rps:+.4f}")
    return table


def _threshold(point: OperatingPoint) -> str:
    if not point.offload_fraction:
        return "none: nothing is offloaded"
    lengths = f"{100 * point.offload_fraction:.1f} % of the prompts"
    mean = "" if point.l_long_tokens is None else f", {point.l_long_tokens:,.0f} tokens on average"
    return f"{point.threshold_tokens:,.0f} uncached tokens; {lengths} go to PrfaaS{mean}"


def _s(seconds: float) -> str:
    return f"{seconds:.2f} s" if math.isfinite(seconds) else "without end"
