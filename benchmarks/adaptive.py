"""Is the planner worth it? Against nothing offloaded, everything offloaded and the paper's threshold, on links of 2 to
100 Gbit/s, on one that falls to a fifth for a minute, and under bursts.

    python -m benchmarks.adaptive [--json FILE] [--requests N] [--rate R]

Goodput is requests/s within 10 s to the first token and 40 ms between later ones. All start with the same 3 + 5 roles;
only ``adaptive`` may change them.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from benchmarks.case_study import PLANNERS, CaseStudy, play, requests
from benchmarks.report import Cell, Report, commit, machine
from cluster.simulator.network import RateChange
from cluster.simulator.workload import Workload

_COLUMNS = {
    "case": "case",
    "planner": "planner",
    "goodput_rps": "goodput req/s",
    "ttft_p90_s": "TTFT P90 s",
    "ttft_mean_s": "TTFT mean s",
    "offloaded": "offloaded",
    "behind_best": "behind the best",
}
_GBPS = (2.0, 5.0, 10.0, 20.0, 50.0, 100.0)
FLUCTUATING = "10 Gbit/s, a fifth from 40 to 100 s"


def main() -> int:
    """Simulate, print, and write the JSON if asked."""
    options = _parser().parse_args()
    steady = requests(options.requests, options.rate)
    cases: list[tuple[str, CaseStudy, Workload]] = [(f"{gbps:g} Gbit/s", CaseStudy(gbps), steady) for gbps in _GBPS]
    falling = (RateChange(40.0, 0.2), RateChange(100.0, 1.0))
    cases.append((FLUCTUATING, CaseStudy(10.0, falling), steady))
    bursts = requests(options.requests, options.rate, burstiness=0.25)
    cases.append(("20 Gbit/s, bursts", CaseStudy(20.0), bursts))
    rows = [row for case in cases for row in _rows(*case)]
    adaptive = [row for row in rows if row["planner"] == "adaptive"]
    report = Report(
        benchmark="adaptive",
        commit=commit(),
        machine=machine(),
        rows=rows,
        figures={
            "adaptive_behind_best": max(float(row["behind_best"] or 0.0) for row in adaptive),
            "adaptive_ahead_fluctuating": _ahead(rows, FLUCTUATING),
        },
    )
    report.print_table(_COLUMNS, f"The case study at {options.rate:g} req/s")
    if options.json is not None:
        report.write_json(options.json)
    return 0


def _rows(case: str, study: CaseStudy, workload: Workload) -> list[dict[str, Cell]]:
    rows: list[dict[str, Cell]] = []
    for name, planner in PLANNERS.items():
        _, found = play(study.scenario(planner), workload)
        rows.append(
            {
                "case": case,
                "planner": name,
                "goodput_rps": found["goodput_rps"],
                "ttft_p90_s": found["ttft_s"]["p90"],
                "ttft_mean_s": found["ttft_s"]["mean"],
                "offloaded": found["places"].get("prfaas", 0) / max(1, found["num_finished"]),
            }
        )
    best = max(float(row["goodput_rps"] or 0.0) for row in rows)
    for row in rows:
        row["behind_best"] = 1 - float(row["goodput_rps"] or 0.0) / best if best else 0.0
    return rows


def _ahead(rows: Sequence[dict[str, Cell]], case: str) -> float:
    """How far ahead of the best other one the planner is, relative; below 0: behind."""
    by_planner = {str(row["planner"]): float(row["goodput_rps"] or 0.0) for row in rows if row["case"] == case}
    others = max(rate for name, rate in by_planner.items() if name != "adaptive")
    return by_planner["adaptive"] / others - 1 if others else 0.0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.adaptive", description=(__doc__ or "").partition("\n")[0]
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the report there")
    parser.add_argument("--requests", type=int, default=400, help="of each run")
    parser.add_argument("--rate", type=float, default=2.2, help="requests/s")
    return parser


if __name__ == "__main__":
    sys.exit(main())
