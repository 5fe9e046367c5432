"""How do arms compare over load? Pictures by matplotlib, the regions where the first arm loses shaded.

matplotlib comes with the extra ``plot`` and is loaded here, when a picture is asked for.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from cluster.bench.comparison import Criterion, Loss, criteria
from cluster.bench.report import BenchReport
from core.errors import InvalidConfig

_LOSING = "tab:red"


def draw_report(report: BenchReport, folder: Path) -> list[Path]:
    """PNG files in ``folder``, which is made. Raises ``InvalidConfig`` if matplotlib is missing."""
    folder.mkdir(parents=True, exist_ok=True)
    drawn = [_comparison(report, folder / "comparison.png")]
    if report.has_slo:
        drawn.append(_attainment(report, folder / "attainment.png"))
    return drawn


def _figure(rows: int, columns: int, height: float, *, share_y: bool = False) -> tuple[Any, Any]:
    try:
        from matplotlib.figure import Figure  # no pyplot: it keeps global state and looks for a display
    except ImportError as error:
        raise InvalidConfig("--plot", "needs matplotlib: pip install 'prfaas[plot]'") from error
    figure = Figure(figsize=(5.2 * columns, height * rows + 1.0), layout="constrained")
    return figure, figure.subplots(rows, columns, squeeze=False, sharey=share_y).ravel()


def _comparison(report: BenchReport, path: Path) -> Path:
    """One panel for each number, all arms over the load."""
    panels = criteria(report.has_slo)
    columns = 2
    figure, axes = _figure(-(-len(panels) // columns), columns, 2.7)
    lost = report.losses()
    first = report.arms[0]
    for axis, criterion in zip(axes, panels, strict=False):
        for arm in report.arms:
            curve = _curve(report, arm, criterion)
            axis.plot([load for load, _ in curve], [value for _, value in curve], marker="o", label=arm)
        _shade(axis, [one for one in lost if one.arm == first and one.criterion == criterion.name], first)
        axis.set_xlabel(report.axis)
        axis.set_ylabel(f"{criterion.name} ({criterion.unit})")
        axis.margins(y=0.12)  # the curves below the upper edge
        axis.set_ylim(bottom=0)
        axis.grid(alpha=0.3)
        axis.legend(fontsize="small")
    for axis in axes[len(panels) :]:
        axis.set_visible(False)
    figure.savefig(path, dpi=120)
    return path


def _shade(axis: Any, lost: list[Loss], arm: str) -> None:
    for number, one in enumerate(lost):
        label = f"{arm} loses" if number == 0 else None
        if one.begin == one.end:
            axis.axvline(one.begin, color=_LOSING, alpha=0.35, linewidth=6, label=label)
        else:
            axis.axvspan(one.begin, one.end, color=_LOSING, alpha=0.15, label=label)


def _attainment(report: BenchReport, path: Path) -> Path:
    """Share of requests within their limits, all limits scaled alike; one panel for each load."""
    loads = sorted({point.load for point in report.points})
    columns = min(3, len(loads))
    figure, axes = _figure(-(-len(loads) // columns), columns, 2.7, share_y=True)
    for axis, load in zip(axes, loads, strict=False):
        for point in (point for point in report.points if point.load == load):
            curve = point.summary["attainment_by_scale"]
            axis.plot([float(scale) for scale in curve], list(curve.values()), marker=".", label=point.arm)
            axis.set_title(point.load_name, fontsize="small")
        axis.axvline(1.0, linestyle="--", color="grey")
        axis.set_xscale("log")
        axis.set_xlabel("SLO scale")
        axis.set_ylim(-0.02, 1.02)
        axis.grid(alpha=0.3)
        axis.legend(fontsize="small")
    axes[0].set_ylabel("share within SLO")
    for axis in axes[len(loads) :]:
        axis.set_visible(False)
    figure.savefig(path, dpi=120)
    return path


def _curve(report: BenchReport, arm: str, criterion: Criterion) -> list[tuple[float, float]]:
    found = ((point.load, criterion.of(point.summary)) for point in report.points if point.arm == arm)
    return sorted((load, value) for load, value in found if value is not None)
