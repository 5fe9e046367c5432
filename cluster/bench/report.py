"""How is a run told? As a table for people; the JSON is ``metrics.summary`` of each point."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rich.table import Table

from cluster.bench.comparison import Loss, criteria, losses
from cluster.bench.metrics import LATE_S
from cluster.bench.target import Facts


@dataclass(frozen=True)
class Point:
    """One run: an arm at one load."""

    arm: str
    load: float
    load_name: str  # rate 2 req/s
    summary: Mapping[str, Any]


@dataclass(frozen=True)
class BenchReport:
    """All that was measured. ``axis``: what differs between points."""

    points: tuple[Point, ...]
    axis: str
    facts: Mapping[str, Facts]
    notes: tuple[str, ...]

    @property
    def has_slo(self) -> bool:
        """Were there limits?"""
        return any(point.summary["slo"] for point in self.points)

    @property
    def arms(self) -> tuple[str, ...]:
        """In the order in which they were measured."""
        return tuple(dict.fromkeys(point.arm for point in self.points))

    def losses(self) -> list[Loss]:
        """Where which arm is worse than the best other one."""
        found: list[Loss] = []
        for criterion in criteria(self.has_slo):
            curves = {
                arm: sorted(
                    (point.load, value)
                    for point in self.points
                    if point.arm == arm and (value := criterion.of(point.summary)) is not None
                )
                for arm in self.arms
            }
            if len(curves) > 1 and all(curves.values()):
                found += losses(curves, criterion)
        return found


def point_table(point: Point) -> Table:
    """Everything of one run."""
    summary = point.summary
    table = Table(title=f"{point.arm}, {point.load_name}", show_header=False, title_justify="left")
    table.add_column()
    table.add_column(justify="right")
    errors = ", ".join(f"{count} {kind}" for kind, count in summary["errors"].items())
    rows = [
        ("requests finished", f"{summary['num_finished']} of {summary['num_requests']}"),
        ("failed", errors or "none"),
        ("seconds", _shown(summary["seconds"], 1.0)),
        ("requests/s", _shown(summary["request_rps"], 1.0)),
        ("output tokens/s", _shown(summary["output_tokens_per_s"], 1.0)),
        ("total tokens/s", _shown(summary["total_tokens_per_s"], 1.0)),
        ("most at once", str(summary["peak_concurrency"])),
        ("prompt tokens, mean (asked for)", _pair(summary, "prompt_tokens", "asked_input_tokens")),
        ("output tokens, mean (asked for)", _pair(summary, "output_tokens", "asked_output_tokens")),
        ("prompt tokens cached", _shown(summary["cached_share"], 100.0, "%")),
    ]
    if summary["slo"]:
        limits = ", ".join(f"{name} {limit:g} s" for name, limit in summary["slo"].items())
        missed = ", ".join(f"{count} {name}" for name, count in summary["misses"].items() if count)
        rows += [
            ("SLO", limits),
            ("goodput, req/s", _shown(summary["goodput_rps"], 1.0)),
            ("within SLO", _shown(summary["slo_attainment"], 100.0, "%")),
            ("missed", missed or "none"),
        ]
    for name, value in rows:
        table.add_row(name, value)
    table.add_section()
    for name, key, scale, unit in _LATENCY_ROWS:
        spread = summary[key]
        percentiles = ", ".join(
            f"{percent} {_shown(value, scale)}" for percent, value in spread.items() if percent.startswith("p")
        )
        table.add_row(f"{name}, {unit}", f"mean {_shown(spread['mean'], scale)}, {percentiles}")
    health = summary["generator"]
    table.add_section()
    table.add_row("generator late, ms", _percentiles(health["late_s"]))
    table.add_row("its event loop late, ms", _percentiles(health["loop_lag_s"]))
    return table


def comparison_table(report: BenchReport) -> Table:
    """A row for each arm at each load; the last column says what it loses there."""
    table = Table()
    table.add_column(report.axis)
    table.add_column("arm")
    columns = criteria(report.has_slo)
    for criterion in columns:
        table.add_column(f"{criterion.name}, {criterion.unit}", justify="right")
    if report.has_slo:
        table.add_column("within SLO", justify="right")
    table.add_column("failed", justify="right")
    lost = report.losses()
    if len(report.arms) > 1:
        table.add_column("loses in")
    for load in sorted({point.load for point in report.points}):
        for point in (point for point in report.points if point.load == load):
            cells = [_shown(criterion.of(point.summary), 1.0) for criterion in columns]
            if report.has_slo:
                cells.append(_shown(point.summary["slo_attainment"], 100.0, "%"))
            cells.append(str(point.summary["num_requests"] - point.summary["num_finished"]))
            if len(report.arms) > 1:
                losing = [one.criterion for one in lost if one.arm == point.arm and one.begin <= load <= one.end]
                cells.append(", ".join(losing) or "-")
            table.add_row(f"{load:g}", point.arm, *cells)
        table.add_section()
    return table


def warnings(report: BenchReport) -> list[str]:
    """What a reader must know before believing the numbers."""
    said = list(report.notes)
    for point in report.points:
        summary, health = point.summary, point.summary["generator"]
        where = f"{point.arm}, {point.load_name}"
        if not health["kept_up"]:
            said.append(
                f"{where}: the load generator did not keep up: {health['late_share']:.0%} of the requests were sent "
                f"more than {LATE_S * 1e3:g} ms late, its event loop was so late in {health['loop_lag_share']:.0%} of "
                "the samples; the latencies contain its own"
            )
        asked, got = summary["asked_output_tokens"]["mean"], summary["output_tokens"]["mean"]
        if asked and got is not None and got < 0.98 * asked:
            said.append(f"{where}: answers had {got:.0f} tokens on average, {asked:.0f} were asked for")
        if "chunks" in summary["output_tokens_counted_by"]:
            said.append(f"{where}: the server counts no tokens; one for each chunk was assumed")
        asked, got = summary["asked_input_tokens"]["mean"], summary["prompt_tokens"]["mean"]
        if asked and got is not None and abs(got - asked) > 0.02 * asked:
            said.append(f"{where}: the server counted {got:.0f} prompt tokens on average, {asked:.0f} were aimed at")
    return said


_LATENCY_ROWS = (
    ("TTFT", "ttft_s", 1e3, "ms"),
    ("TTFT from the instant due", "ttft_from_due_s", 1e3, "ms"),
    ("TTST", "ttst_s", 1e3, "ms"),
    ("TPOT", "tpot_s", 1e3, "ms"),
    ("ITL", "itl_s", 1e3, "ms"),
    ("longest tenth of gaps", "tbt_s", 1e3, "ms"),
    ("E2E", "e2e_s", 1.0, "s"),
)


def _percentiles(spread: Mapping[str, float | None]) -> str:
    return ", ".join(f"{name} {_shown(spread[name], 1e3)}" for name in ("p50", "p99", "max"))


def _pair(summary: Mapping[str, Any], counted: str, asked: str) -> str:
    return f"{_shown(summary[counted]['mean'], 1.0)} ({_shown(summary[asked]['mean'], 1.0)})"


def _shown(value: float | None, scale: float, unit: str = "") -> str:
    if value is None:
        return "-"
    scaled = value * scale
    return f"{scaled:,.0f}{unit}" if abs(scaled) >= 1000 else f"{scaled:.4g}{unit}"


def loss_lines(found: Sequence[Loss], axis: str) -> list[str]:
    """Each region in words."""
    return [
        f"{one.arm} loses in {one.criterion} at {axis} "
        + (f"{one.begin:.3g}" if one.begin == one.end else f"{one.begin:.3g} to {one.end:.3g}")
        + f": {one.ratio:.0%} worse at {one.worst_at:.3g}"
        for one in found
    ]
