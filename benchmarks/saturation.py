"""What does the case study sustain by discrete events, and what by the paper's equations?

    python -m benchmarks.saturation [--json FILE] [--requests N]

The three fleets of PrfaaS table 6 are offered 1.3 times what equations 3 to 6 give. What they sustain is the rate of
answers from a minute on, when all stages are full, until the last request has come. Between the two stand

    own seconds    the equations, but each prompt takes its own seconds: they take those of the mean prompt of its side,
                   which is less, for prefill grows faster than the prompt (Jensen)
    same prompts   likewise, of the prompts that ended meanwhile: what the luck of the draw was
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from benchmarks.case_study import CaseStudy, play, requests
from benchmarks.report import Cell, Report, commit, machine
from benchmarks.simulation_runs import run_all
from cluster.config import PLANNER_OFF, PLANNER_STATIC, PlannerConfig
from cluster.length_distribution import LengthDistribution
from cluster.simulator.records import RequestRecord
from cluster.simulator.scenario import Scenario
from cluster.simulator.timeline import Sample
from cluster.throughput_model import OFFLOAD_NOTHING, Fleet, operating_point

_COLUMNS = {
    "fleet": "fleet",
    "paper_rps": "paper",
    "equations_rps": "equations",
    "own_seconds_rps": "own s",
    "same_prompts_rps": "same prompts",
    "events_rps": "events",
    "relative_error": "off eq.",
    "unexplained": "off same",
    "prfaas_busy": "PrfaaS",
    "prefill_busy": "prefill",
    "decode_busy": "batch",
}
_OVERLOAD = 1.3
_FULL_AFTER_S = 60.0  # the first answers take a prefill and 26 s of decoding
_THRESHOLD = 19_400


@dataclass(frozen=True)
class FleetCase:
    """One of the fleets of table 6, and what the table prints for it."""

    name: str
    num_prefill: int
    num_decode: int
    threshold_tokens: float  # inf: there is no PrfaaS cluster
    paper_rps: float
    num_requests: int

    @property
    def offloads(self) -> bool:
        """Is there a PrfaaS cluster?"""
        return self.threshold_tokens != OFFLOAD_NOTHING


def main() -> int:
    """Simulate, print, and write the JSON if asked."""
    options = _parser().parse_args()
    cases = (
        FleetCase("PrfaaS-PD", 3, 5, _THRESHOLD, 3.24, options.requests),
        FleetCase("naive heterogeneous", 0, 8, 0.0, 2.45, options.requests),
        FleetCase("homogeneous, 12 H20", 9, 3, OFFLOAD_NOTHING, 2.11, options.requests),
    )
    rows = run_all(saturate, cases, options.processes)
    report = Report(
        benchmark="saturation",
        commit=commit(),
        machine=machine(),
        rows=rows,
        figures={
            "saturation_error": max(abs(float(row["relative_error"] or 0.0)) for row in rows),
            "saturation_unexplained": max(abs(float(row["unexplained"] or 0.0)) for row in rows),
        },
    )
    title = "Saturation throughput of the case study, requests/s; how far events are off; how busy the stages are"
    report.print_table(_COLUMNS, title)
    if options.json is not None:
        report.write_json(options.json)
    return 0


def saturate(case: FleetCase) -> dict[str, Cell]:
    """One row."""
    study = CaseStudy()
    fleet = study.fleet()
    if not case.offloads:
        gpus = fleet.gpus_per_decode * (case.num_prefill + case.num_decode)
        fleet = replace(fleet, prfaas=(), num_local_gpus=gpus)
    equations_rps = operating_point(fleet, case.num_prefill, case.threshold_tokens).throughput_rps
    workload = requests(case.num_requests, _OVERLOAD * equations_rps)
    result, _ = play(_scenario(study, case), workload)
    until_s = max(record.arrived_at for record in result.records)
    ended = ended_between(result.records, _FULL_AFTER_S, until_s)
    played = LengthDistribution.from_sample([float(record.input_tokens) for record in ended])
    events_rps = len(ended) / (until_s - _FULL_AFTER_S)
    same_rps = with_own_seconds(fleet, case.num_prefill, case.threshold_tokens, played)
    return {
        "fleet": case.name,
        "paper_rps": case.paper_rps,
        "equations_rps": equations_rps,
        "own_seconds_rps": with_own_seconds(fleet, case.num_prefill, case.threshold_tokens, fleet.lengths),
        "same_prompts_rps": same_rps,
        "events_rps": events_rps,
        "relative_error": events_rps / equations_rps - 1,
        "unexplained": events_rps / same_rps - 1,
        "num_ended": len(ended),
        **busy(result.samples, until_s, fleet.max_batch_size),
    }


def ended_between(records: Sequence[RequestRecord], from_s: float, until_s: float) -> list[RequestRecord]:
    """Whose last token came then."""
    return [record for record in records if record.ok and from_s < record.arrived_at + record.total_s <= until_s]


def with_own_seconds(fleet: Fleet, num_prefill: int, threshold_tokens: float, lengths: LengthDistribution) -> float:
    """Requests/s of a fleet whose stages are all full, of prompts of ``lengths``, each with its own seconds.

    Each prefill stage is as fast as its prompts' mean seconds let it be, and both work all the time, whatever their
    shares: what one has too much of waits.
    """
    tokens, weights = lengths.tokens, lengths.weights
    long = tokens > threshold_tokens

    def per_s(side: np.typing.NDArray[np.bool_], seconds: np.typing.NDArray[np.float64], count: float) -> float:
        weight = float(weights[side].sum())
        return count * weight / float(np.dot(weights[side], seconds[side])) if weight else 0.0

    local_rps = per_s(~long, fleet.local_prefill_s(tokens), num_prefill)
    away_rps = sum(
        min(
            per_s(long, cluster.prefill_s(tokens), cluster.num_instances),
            per_s(long, fleet.kv_bytes(tokens), cluster.egress_bytes_per_s),
        )
        for cluster in fleet.prfaas
    )
    return min(local_rps + away_rps, fleet.theta_decode_rps(fleet.num_decode(num_prefill)))


def _scenario(study: CaseStudy, case: FleetCase) -> Scenario:
    """Nothing is colocated: the paper's stages."""
    planner = PlannerConfig(mode=PLANNER_OFF)
    if case.offloads:
        planner = PlannerConfig(mode=PLANNER_STATIC, threshold_tokens=int(case.threshold_tokens))
    scenario = study.scenario(planner, (case.num_prefill, case.num_decode))
    scenario = replace(scenario, router=replace(scenario.router, colocate="never"))
    if case.offloads:
        return scenario
    return replace(scenario, clusters=(scenario.home_cluster,), links=())


def busy(samples: Sequence[Sample], until_s: float, batch_size: float) -> dict[str, Cell]:
    """Mean shares of the time for which prefill workers computed, and of the decode batches that was filled; None where
    there is no worker of it."""
    full = [sample for sample in samples if _FULL_AFTER_S < sample.at_s <= until_s]
    shares: dict[str, list[float]] = {"prfaas_busy": [], "prefill_busy": [], "decode_busy": []}
    for cluster in (cluster for sample in full for cluster in sample.clusters):
        if cluster.num_prefill:
            shares["prefill_busy" if cluster.num_decode else "prfaas_busy"].append(cluster.prefill_utilisation)
        if cluster.num_decode:
            shares["decode_busy"].append(cluster.num_running / (cluster.num_decode * batch_size))
    return {name: float(np.mean(values)) if values else None for name, values in shares.items()}


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.saturation", description=(__doc__ or "").partition("\n")[0]
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the report there")
    parser.add_argument("--requests", type=int, default=800, help="of each fleet")
    parser.add_argument("--processes", type=int, metavar="N", help="at once; as many as there are cores")
    return parser


if __name__ == "__main__":
    sys.exit(main())
