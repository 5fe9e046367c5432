"""How does throughput move with the threshold, the roles and the link? Three pictures, drawn with matplotlib.

matplotlib comes with the extra ``plot`` and is loaded here, when a picture is asked for.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from cluster.capacity_plan import CapacityPlan, throughput_by_link, throughput_by_roles, throughput_by_threshold
from core.errors import InvalidConfig

_RATE = "throughput (req/s)"


def draw_plan(plan: CapacityPlan, folder: Path) -> list[Path]:
    """PNG files in ``folder``, which is made: throughput by threshold, by N_p and by link, as far as there are any.

    Raises ``InvalidConfig`` if matplotlib is missing.
    """
    folder.mkdir(parents=True, exist_ok=True)
    drawn = [
        _draw(
            folder / "throughput-by-roles.png",
            [(float(n), rate) for n, rate in throughput_by_roles(plan)],
            f"local prefill instances of {plan.point.num_prefill + plan.point.num_decode}",
            float(plan.point.num_prefill),
        )
    ]
    by_threshold = throughput_by_threshold(plan)
    if by_threshold:
        path, chosen = folder / "throughput-by-threshold.png", plan.point.threshold_tokens
        drawn.append(_draw(path, by_threshold, "threshold (uncached tokens)", chosen, logarithmic=True))
        by_link = [(gbps, point.throughput_rps) for gbps, point in throughput_by_link(plan)]
        path, chosen = folder / "throughput-by-link.png", sum(link.gbps for link in plan.links)
        drawn.append(
            _draw(path, by_link, "links (Gbit/s), roles and threshold at their best", chosen, logarithmic=True)
        )
    return drawn


def _draw(
    path: Path, points: Sequence[tuple[float, float]], label: str, chosen: float, *, logarithmic: bool = False
) -> Path:
    try:
        from matplotlib.figure import Figure  # no pyplot: it keeps global state and looks for a display
    except ImportError as error:
        raise InvalidConfig("--plot", "needs matplotlib: pip install 'prfaas[plot]'") from error
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    x, y = zip(*points, strict=True)
    axes.plot(x, y, marker=None if logarithmic else "o")
    axes.axvline(chosen, linestyle="--", color="grey", label=f"this plan: {chosen:,.6g}")
    if logarithmic:
        axes.set_xscale("log")
    axes.set_xlabel(label)
    axes.set_ylabel(_RATE)
    axes.set_ylim(bottom=0)
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path, dpi=120)
    return path
