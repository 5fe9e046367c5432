"""What is said of hand-overs that overlap with prefill, and which figures follow? Pure."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from statistics import median

from benchmarks.report import Cell

ALONE, AFTER, WHILE = "no shipping", "after prefill", "while computed"


@dataclass(frozen=True)
class Handover:
    """One prompt."""

    prefill_s: float  # from its arrival to its first token
    num_bytes: int = 0  # shipped
    overlapped_bytes: int = 0  # of them read for sending before the first token
    num_groups: int = 0  # of layers that the sender queued as one
    exposed_s: float = 0.0  # from the first token to the acknowledged commit


@dataclass(frozen=True)
class Setting:
    """What is varied: tokens of one step, layers that are shipped together, and when."""

    chunk: int
    mode: str
    layers_per_group: int | None = None  # None: nothing is shipped while the prompt is computed


def row(setting: Setting, handovers: Sequence[Handover]) -> dict[str, Cell]:
    """The report's row: medians."""
    cells: dict[str, Cell] = {
        "chunk": setting.chunk,
        "mode": setting.mode,
        "layers_per_group": setting.layers_per_group,
        "num_rounds": len(handovers),
    }
    if not handovers:
        return cells
    cells["prefill_s"] = median(one.prefill_s for one in handovers)
    if setting.mode != ALONE:
        cells |= {
            "mib": median(one.num_bytes for one in handovers) / 2**20,
            "overlapped_mib": median(one.overlapped_bytes for one in handovers) / 2**20,
            "num_groups": median(one.num_groups for one in handovers),
            "exposed_s": median(one.exposed_s for one in handovers),
            "exposed_s_min": min(one.exposed_s for one in handovers),
            "exposed_s_max": max(one.exposed_s for one in handovers),
            "second_token_s": median(one.prefill_s + one.exposed_s for one in handovers),
        }
    return cells


def figures(rows: Iterable[Mapping[str, Cell]]) -> dict[str, float]:
    """At the setting that is ready for the second token first, beside shipping after prefill with the same chunk."""
    by_mode: dict[str, list[Mapping[str, Cell]]] = {ALONE: [], AFTER: [], WHILE: []}
    for cells in rows:
        if isinstance(cells.get("prefill_s"), float):
            by_mode[str(cells["mode"])].append(cells)
    if not by_mode[WHILE]:
        return {}
    best = min(by_mode[WHILE], key=lambda cells: _number(cells, "second_token_s"))
    found = {
        "best_chunk": _number(best, "chunk"),
        "exposed_ms": _number(best, "exposed_s") * 1e3,
        "overlapped_share": _number(best, "overlapped_mib") / _number(best, "mib"),
        "exposed_over_prefill": _number(best, "exposed_s") / _number(best, "prefill_s"),
    }
    for cells in by_mode[AFTER]:
        if cells["chunk"] == best["chunk"]:
            found["exposed_after_prefill_ms"] = _number(cells, "exposed_s") * 1e3
            found["second_token_speedup"] = _number(cells, "second_token_s") / _number(best, "second_token_s")
    for cells in by_mode[ALONE]:
        if cells["chunk"] == best["chunk"]:
            found["prefill_slowdown"] = _number(best, "prefill_s") / _number(cells, "prefill_s") - 1
    return found


def _number(cells: Mapping[str, Cell], key: str) -> float:
    return float(cells[key] or 0.0)
