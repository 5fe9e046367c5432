"""Is the planner worth it? Against nothing offloaded, everything offloaded and the paper's threshold, on links of 2 to
100 Gbit/s, on one that falls to a fifth for a minute, and under bursts.

    python -m benchmarks.adaptive [--json FILE] [--traces DIR] [--requests N] [--rate R] [--seeds N] [--case NAME ...]
                                  [--no-slo]

Goodput is requests within 10 s to the first token and 40 ms between later ones, a second of those in which requests
come. Requests ask for that (as with ``x-slo-ttft-ms``), so one that is predicted to miss it is refused at once, whoever
plans; with ``--no-slo`` they do not, and what is too much waits. All start with the same 3 + 5 roles and know nothing
of what will come; only ``adaptive`` may change roles. Bursts are gamma gaps of shape 0.25, and the instants of Azure's
code trace (variance of counts in 10 s: 75 times a Poisson process's), stretched to the same rate. A row is the mean of
several draws of requests, the same for every planner: of one draw, 1% is three requests.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean

from benchmarks.case_study import PLANNERS, TPOT_SLO_S, TTFT_SLO_S, CaseStudy, at_instants_of, play, requests
from benchmarks.report import Cell, Report, commit, machine
from benchmarks.simulation_runs import run_all, shared_traces
from cluster.simulator.network import RateChange
from cluster.simulator.workload import Workload
from core.request import NO_SLO, Slo

_COLUMNS = {
    "case": "case",
    "planner": "planner",
    "goodput_rps": "goodput req/s",
    "goodput_rps_min": "of draws: least",
    "goodput_rps_max": "most",
    "ttft_p90_s": "TTFT P90 s",
    "ttft_mean_s": "TTFT mean s",
    "tpot_p90_s": "TPOT P90 s",
    "offloaded": "offloaded",
    "refused": "refused",
    "behind_best": "behind the best",
}
_GBPS = (2.0, 5.0, 10.0, 20.0, 50.0, 100.0)
_FALL = (RateChange(40.0, 0.2), RateChange(100.0, 1.0))
_BURSTINESS = 0.25
_BURSTY_TRACE = "azure2023_code_0000-1800s.csv.gz"
FLUCTUATING = "10 Gbit/s, 2 from 40 to 100 s"
ADAPTIVE = "adaptive"


@dataclass(frozen=True)
class Run:
    """One planner in one case. ``trace``: whose instants requests come at; None: at random, ``burstiness`` 1 evenly."""

    case: str
    planner: str
    gbps: float
    num_requests: int
    rate_rps: float
    changes: tuple[RateChange, ...] = ()
    burstiness: float = 1.0
    trace: Path | None = None
    slo: bool = True  # requests ask for the objective
    seed: int = 0  # of lengths and instants


def main() -> int:
    """Simulate, print, and write the JSON if asked."""
    options = _parser().parse_args()
    tasks = [
        run
        for run in runs(options.requests, options.rate, options.traces, slo=options.slo, num_seeds=options.seeds)
        if not options.case or run.case in options.case
    ]
    if not tasks:
        print(f"no case is called {' or '.join(options.case)}", file=sys.stderr)
        return 2
    rows = behind_best(mean_of_seeds(run_all(row_of, tasks, options.processes)))
    adaptive = [row for row in rows if row["planner"] == ADAPTIVE]
    figures = {"adaptive_behind_best": max(float(row["behind_best"] or 0.0) for row in adaptive)}
    if any(row["case"] == FLUCTUATING for row in rows):
        figures["adaptive_ahead_fluctuating"] = ahead(rows, FLUCTUATING)
    report = Report(benchmark="adaptive", commit=commit(), machine=machine(), rows=rows, figures=figures)
    report.print_table(_COLUMNS, f"The case study at {options.rate:g} req/s, mean of {options.seeds} draws")
    if options.json is not None:
        report.write_json(options.json)
    return 0


def runs(num_requests: int, rate_rps: float, traces: Path | None, *, slo: bool = True, num_seeds: int = 1) -> list[Run]:
    """Every planner in every case, with each seed; without ``traces`` those of a trace are left out."""

    def case(name: str, gbps: float, **how: object) -> list[Run]:
        shared = {"gbps": gbps, "num_requests": num_requests, "rate_rps": rate_rps, "slo": slo, **how}
        return [
            Run(name, planner, seed=seed, **shared)  # type: ignore[arg-type]
            for planner in PLANNERS
            for seed in range(num_seeds)
        ]

    cases = [case(f"{gbps:g} Gbit/s", gbps) for gbps in _GBPS]
    cases.append(case(FLUCTUATING, 10.0, changes=_FALL))
    cases.append(case("20 Gbit/s, gamma bursts", 20.0, burstiness=_BURSTINESS))
    if traces is not None:
        cases.append(case("20 Gbit/s, Azure's bursts", 20.0, trace=traces / _BURSTY_TRACE))
    return [run for each in cases for run in each]


def row_of(run: Run) -> dict[str, Cell]:
    """Simulate one."""
    study = CaseStudy(run.gbps, run.changes)
    result, found = play(study.scenario(PLANNERS[run.planner]), _workload(run))
    came_s = max(record.arrived_at for record in result.records)
    return {
        "case": run.case,
        "planner": run.planner,
        "goodput_rps": found["slo_attainment"] * found["num_requests"] / came_s,
        "within_slo": found["slo_attainment"],
        "refused": found["outcomes"].get("Overloaded", 0) / found["num_requests"],
        "ttft_p90_s": found["ttft_s"]["p90"],
        "ttft_mean_s": found["ttft_s"]["mean"],
        "tpot_p90_s": found["tpot_s"]["p90"],
        "offloaded": found["places"].get("prfaas", 0) / max(1, found["num_finished"]),
    }


def _workload(run: Run) -> Workload:
    slo = Slo(TTFT_SLO_S, TPOT_SLO_S) if run.slo else NO_SLO
    if run.trace is not None:
        return at_instants_of(run.trace, run.num_requests, run.rate_rps, seed=run.seed, slo=slo)
    return requests(run.num_requests, run.rate_rps, burstiness=run.burstiness, seed=run.seed, slo=slo)


def mean_of_seeds(rows: Sequence[dict[str, Cell]]) -> list[dict[str, Cell]]:
    """One row for each case and planner: means, and the least and the most goodput."""
    together: dict[tuple[Cell, Cell], list[dict[str, Cell]]] = {}
    for row in rows:
        together.setdefault((row["case"], row["planner"]), []).append(row)
    return [
        {
            "case": case,
            "planner": planner,
            "goodput_rps_min": min(map(_goodput, drawn)),
            "goodput_rps_max": max(map(_goodput, drawn)),
            **{
                key: fmean(float(row[key] or 0.0) for row in drawn)
                for key in drawn[0]
                if key not in ("case", "planner")
            },
        }
        for (case, planner), drawn in together.items()
    ]


def behind_best(rows: Sequence[dict[str, Cell]]) -> list[dict[str, Cell]]:
    """The rows, each with how far its goodput is behind the best one of its case, relative."""
    best: dict[Cell, float] = {}
    for row in rows:
        best[row["case"]] = max(best.get(row["case"], 0.0), _goodput(row))
    return [row | {"behind_best": 1 - _goodput(row) / best[row["case"]] if best[row["case"]] else 0.0} for row in rows]


def ahead(rows: Sequence[dict[str, Cell]], case: str) -> float:
    """How far ahead of the best other one the planner is, relative; below 0: behind."""
    by_planner = {str(row["planner"]): _goodput(row) for row in rows if row["case"] == case}
    others = max(rate for name, rate in by_planner.items() if name != ADAPTIVE)
    return by_planner[ADAPTIVE] / others - 1 if others else 0.0


def _goodput(row: dict[str, Cell]) -> float:
    return float(row["goodput_rps"] or 0.0)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.adaptive", description=(__doc__ or "").partition("\n\n")[0]
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the report there")
    parser.add_argument("--traces", type=Path, metavar="DIR", default=shared_traces(), help="the shared traces")
    parser.add_argument("--requests", type=int, default=320, help="of each run")
    parser.add_argument("--rate", type=float, default=2.2, help="requests/s")
    parser.add_argument("--seeds", type=int, default=1, metavar="N", help="draws of each case")
    parser.add_argument("--processes", type=int, metavar="N", help="at once; as many as there are cores")
    parser.add_argument("--slo", action=argparse.BooleanOptionalAction, default=True, help="requests ask for it")
    parser.add_argument("--case", action="append", default=[], metavar="NAME", help="only this one; may be repeated")
    return parser


if __name__ == "__main__":
    sys.exit(main())
