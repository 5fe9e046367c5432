"""What does the case study sustain by discrete events, and what by the paper's equations?

    python -m benchmarks.saturation [--json FILE] [--requests N]

The fleet is offered 1.3 times what the equations give; throughput is the rate of answers while it is full, between 40%
and 80% of them. Rows are the three fleets of PrfaaS table 6.
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import replace
from pathlib import Path

from benchmarks.case_study import CaseStudy, play, requests
from benchmarks.report import Cell, Report, commit, machine
from cluster.config import PLANNER_OFF, PLANNER_STATIC, PlannerConfig
from cluster.simulator.scenario import Scenario
from cluster.simulator.world import SimulationResult

_COLUMNS = {
    "fleet": "fleet",
    "equations_rps": "equations req/s",
    "paper_rps": "paper req/s",
    "events_rps": "events req/s",
    "relative_error": "events / equations - 1",
    "ttft_mean_s": "TTFT mean s",
    "tpot_mean_s": "TPOT mean s",
}
_OVERLOAD = 1.3
_FROM, _TO = 0.4, 0.8  # of the answers


def main() -> int:
    """Simulate, print, and write the JSON if asked."""
    options = _parser().parse_args()
    static = PlannerConfig(mode=PLANNER_STATIC, threshold_tokens=19_400)
    study = CaseStudy()
    rows = [
        _row("PrfaaS-PD", study.scenario(static), 3.247, 3.24, options.requests),
        _row(
            "naive heterogeneous",
            study.scenario(replace(static, threshold_tokens=0), (0, 8)),
            2.469,
            2.45,
            options.requests,
        ),
        _row("homogeneous, 12 H20 instances", _homogeneous(study), 2.110, 2.11, options.requests),
    ]
    report = Report(
        benchmark="saturation",
        commit=commit(),
        machine=machine(),
        rows=rows,
        figures={"saturation_error": max(abs(float(row["relative_error"] or 0.0)) for row in rows)},
    )
    report.print_table(_COLUMNS, "Saturation throughput of the case study")
    if options.json is not None:
        report.write_json(options.json)
    return 0


def _homogeneous(study: CaseStudy) -> Scenario:
    """No PrfaaS cluster; 9 + 3 instances of the serving cluster's kind (PrfaaS table 6)."""
    scenario = study.scenario(PlannerConfig(mode=PLANNER_OFF), (9, 3))
    home = tuple(cluster for cluster in scenario.clusters if cluster.cluster_id == scenario.home)
    return replace(scenario, clusters=home, links=())


def _row(fleet: str, scenario: Scenario, equations_rps: float, paper_rps: float, count: int) -> dict[str, Cell]:
    apart = replace(scenario, router=replace(scenario.router, colocate="never"))
    result, found = play(apart, requests(count, _OVERLOAD * equations_rps))
    events_rps = _while_full(result)
    return {
        "fleet": fleet,
        "equations_rps": equations_rps,
        "paper_rps": paper_rps,
        "events_rps": events_rps,
        "relative_error": events_rps / equations_rps - 1,
        "ttft_mean_s": found["ttft_s"]["mean"],
        "tpot_mean_s": found["tpot_s"]["mean"],
    }


def _while_full(result: SimulationResult) -> float:
    ends = sorted(record.arrived_at + record.total_s for record in result.records if record.ok)
    first, last = int(len(ends) * _FROM), int(len(ends) * _TO)
    return (last - first) / (ends[last] - ends[first])


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.saturation", description=(__doc__ or "").partition("\n")[0]
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the report there")
    parser.add_argument("--requests", type=int, default=1000, help="of each fleet")
    return parser


if __name__ == "__main__":
    sys.exit(main())
