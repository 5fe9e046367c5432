"""What every benchmark hands over: a table for the reader and one JSON file for whoever compares runs.

The JSON is ``{"benchmark", "commit", "machine", "rows": [...], "figures": {name: number}}``; rows hold what was
measured, figures the few numbers that a claim in the README rests on.
"""

from __future__ import annotations

import json
import os
import platform
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import numpy as np
import psutil
from rich import box
from rich.console import Console
from rich.table import Table

Cell = str | float | int | None

_TABLE_WIDTH = 140
_ROOT = Path(__file__).resolve().parent.parent


@dataclass(frozen=True)
class Report:
    """One run of one benchmark."""

    benchmark: str
    commit: str
    machine: Mapping[str, str | int | float]
    rows: Sequence[Mapping[str, Cell]]
    figures: Mapping[str, float]

    def write_json(self, path: Path) -> None:
        """Write to ``path``, making its folder."""
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(asdict(self), indent=1) + "\n", encoding="utf-8")

    def print_table(self, columns: Mapping[str, str], title: str) -> None:
        """Print the rows, as Markdown; ``columns`` is key of a row |-> heading, in order."""
        console = Console(width=_TABLE_WIDTH, highlight=False)
        table = Table(box=box.MARKDOWN)
        for heading in columns.values():
            table.add_column(heading, justify="right", no_wrap=True)
        for row in self.rows:
            table.add_row(*(_shown(row.get(key)) for key in columns))
        console.print(title)
        console.print(table)
        for name, value in self.figures.items():
            console.print(f"{name} = {value:.2f}")


def percentile(values: Sequence[float], percent: float) -> float | None:
    """The ``percent``-th percentile, linearly interpolated; None of no values."""
    return float(np.percentile(values, percent)) if values else None


def commit() -> str:
    """The commit that runs, with ``-dirty`` when the working tree differs from it; ``unknown`` outside git."""
    described = subprocess.run(
        ["git", "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"],
        cwd=_ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    return described.stdout.strip() or "unknown"


def machine() -> dict[str, str | int | float]:
    """What a reader must know to compare two runs."""
    return {
        "cpu": _cpu_name(),
        "cores": os.cpu_count() or 0,
        "memory_gib": round(psutil.virtual_memory().total / 2**30, 1),
        "python": platform.python_version(),
        "torch": _version("torch"),
        "transformers": _version("transformers"),
    }


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine())


def _version(distribution: str) -> str:
    try:
        return version(distribution)
    except PackageNotFoundError:
        return "absent"


def _shown(cell: Cell) -> str:
    """Three significant digits of a number, more if it has more before the point."""
    if cell is None:
        return "-"
    if isinstance(cell, float):
        return f"{cell:.3g}" if abs(cell) < 1000 else f"{cell:.0f}"
    return str(cell)
