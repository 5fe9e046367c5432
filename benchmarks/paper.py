"""Do our formulas give the papers' numbers? Every number of PrfaaS, DistServe and Mooncake that can be computed here.

    python -m benchmarks.paper [--json FILE] [--traces DIR]

Nothing is fitted to make a number agree; what does not agree says why in its row. Exit code 0 whatever the verdicts.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping
from pathlib import Path

from benchmarks import paper_distserve, paper_mooncake, paper_prfaas
from benchmarks.paper_check import NOT_CHECKED, WITHIN, Check
from benchmarks.report import Cell, Report, commit, machine

_ROOT = Path(__file__).resolve().parent.parent
_COLUMNS = {
    "name": "number",
    "expected": "expected",
    "computed": "computed",
    "unit": "unit",
    "error_percent": "err %",
    "allowed_percent": "±%",
    "verdict": "verdict",
}


def main() -> int:
    """Check, print, and write the JSON if asked."""
    options = _parser().parse_args()
    report = make_report(options.traces)
    report.print_table(_COLUMNS, "Numbers of the papers against ours")
    for row in report.rows:
        if row["note"] and row["verdict"] != WITHIN:
            print(f"{row['verdict']}: {row['name']}: {row['note']}")
    if options.json is not None:
        report.write_json(options.json)
    return 0


def make_report(traces: Path | None) -> Report:
    """All checks; ``traces``: folder of the shared traces, None: what needs one is not checked."""
    checks = [*paper_prfaas.checks(), *paper_distserve.checks(traces), *paper_mooncake.checks()]
    checked = [check for check in checks if check.verdict != NOT_CHECKED]
    return Report(
        benchmark="paper",
        commit=commit(),
        machine=machine(),
        rows=[_row(check) for check in checks],
        figures={
            "checked": len(checked),
            "within_tolerance": sum(check.verdict == WITHIN for check in checked),
        },
    )


def _row(check: Check) -> Mapping[str, Cell]:
    error = check.relative_error
    return {
        "name": check.name,
        "source": check.source,
        "expected": check.expected,
        "computed": check.computed,
        "unit": check.unit,
        "relative_error": error,
        "tolerance": check.allowed,
        "error_percent": None if error is None else 100 * error,
        "allowed_percent": 100 * check.allowed,
        "verdict": check.verdict,
        "note": check.note,
    }


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.paper", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the report there")
    near = (folder for folder in (_ROOT / "shared/traces", _ROOT.parent / "shared/traces") if folder.is_dir())
    parser.add_argument("--traces", type=Path, metavar="DIR", default=next(near, None), help="the shared traces")
    return parser


if __name__ == "__main__":
    sys.exit(main())
