"""How did a simulation go? Pictures of latencies, goodput, utilisation, links, threshold and roles, by matplotlib.

matplotlib comes with the extra ``plot`` and is loaded here, when a picture is asked for.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from cluster.simulator.world import SimulationResult
from core.errors import InvalidConfig

Results = Sequence[tuple[str, SimulationResult]]


def draw_results(results: Results, folder: Path, ttft_slo_s: float | None, tpot_slo_s: float | None) -> list[Path]:
    """PNG files in ``folder``, which is made. Raises ``InvalidConfig`` if matplotlib is missing."""
    folder.mkdir(parents=True, exist_ok=True)
    name, first = results[0]
    return [
        _cumulative(folder / "ttft.png", results, "TTFT (s)", _ttfts, ttft_slo_s),
        _cumulative(folder / "tpot.png", results, "TPOT (s)", _tpots, tpot_slo_s),
        _goodput(folder / "goodput.png", results, ttft_slo_s, tpot_slo_s),
        _utilisation(folder / "utilisation.png", name, first),
        _plan(folder / "threshold-and-roles.png", results),
    ]


def _ttfts(result: SimulationResult) -> list[float]:
    return [record.ttft_s for record in result.records if record.ok and record.ttft_s is not None]


def _tpots(result: SimulationResult) -> list[float]:
    return [tpot for record in result.records if (tpot := record.tpot_s) is not None]


def _figure(num_axes: int = 1) -> tuple[Any, list[Any]]:
    try:
        from matplotlib.figure import Figure  # no pyplot: it keeps global state and looks for a display
    except ImportError as error:
        raise InvalidConfig("--plot", "needs matplotlib: pip install 'prfaas[plot]'") from error
    figure = Figure(figsize=(7, 2.6 * num_axes + 1.4), layout="constrained")
    axes = figure.subplots(num_axes, sharex=True, squeeze=False)
    return figure, list(axes[:, 0])


def _save(figure: Any, axes: list[Any], path: Path) -> Path:
    for each in axes:
        each.grid(alpha=0.3)
        if each.get_legend_handles_labels()[0]:
            each.legend(fontsize="small")
    figure.savefig(path, dpi=120)
    return path


def _cumulative(
    path: Path, results: Results, label: str, of: Callable[[SimulationResult], list[float]], slo_s: float | None
) -> Path:
    figure, axes = _figure()
    for name, result in results:
        values = np.sort(of(result))
        if len(values):
            axes[0].step(values, np.arange(1, len(values) + 1) / len(values), where="post", label=name)
    if slo_s is not None:
        axes[0].axvline(slo_s, linestyle="--", color="grey", label=f"SLO {slo_s:g} s")
    axes[0].set_xlabel(label)
    axes[0].set_xscale("log")
    axes[0].set_ylabel("share of requests")
    return _save(figure, axes, path)


def _goodput(path: Path, results: Results, ttft_slo_s: float | None, tpot_slo_s: float | None) -> Path:
    """Good requests by when they came, in twenty parts of the time."""
    figure, axes = _figure()
    for name, result in results:
        span = max((record.arrived_at for record in result.records), default=0.0) or 1.0
        good = [record.arrived_at for record in result.records if record.meets(ttft_slo_s, tpot_slo_s)]
        counts, edges = np.histogram(good, bins=20, range=(0.0, span))
        axes[0].step(edges[:-1], counts / (span / 20), where="post", label=name)
    axes[0].set_xlabel("arrival (s)")
    axes[0].set_ylabel("goodput (req/s)")
    return _save(figure, axes, path)


def _utilisation(path: Path, name: str, result: SimulationResult) -> Path:
    figure, axes = _figure(2)
    samples = result.samples
    at = [sample.at_s for sample in samples]
    for index, cluster in enumerate(samples[0].clusters if samples else ()):
        of = [sample.clusters[index] for sample in samples]
        axes[0].plot(at, [one.prefill_utilisation for one in of], label=f"{cluster.cluster_id} prefill")
        if any(one.num_decode for one in of):
            axes[0].plot(at, [one.decode_utilisation for one in of], label=f"{cluster.cluster_id} decode")
            axes[1].plot(at, [one.num_running for one in of], label=f"{cluster.cluster_id} decoding")
        axes[1].plot(at, [one.num_waiting for one in of], label=f"{cluster.cluster_id} waiting for prefill")
    for index, link in enumerate(samples[0].links if samples else ()):
        shares = [sample.links[index].bytes_per_s / max(1.0, sample.links[index].capacity) for sample in samples]
        axes[0].plot(at, shares, linestyle=":", label=f"link {link.from_cluster} to {link.to_cluster}")
    axes[0].set_ylabel("share in use")
    axes[0].set_ylim(0, 1.1)
    axes[0].set_title(name)
    axes[1].set_ylabel("sequences")
    axes[1].set_xlabel("time (s)")
    return _save(figure, axes, path)


def _plan(path: Path, results: Results) -> Path:
    figure, axes = _figure(2)
    for name, result in results:
        at = [sample.at_s for sample in result.samples]
        thresholds = [s.threshold_tokens if math.isfinite(s.threshold_tokens) else math.nan for s in result.samples]
        axes[0].step(at, thresholds, where="post", label=name)
        axes[1].step(at, [sum(c.num_decode for c in s.clusters) for s in result.samples], where="post", label=name)
    axes[0].set_ylabel("threshold (tokens)")
    axes[1].set_ylabel("decode workers")
    axes[1].set_xlabel("time (s)")
    return _save(figure, axes, path)
