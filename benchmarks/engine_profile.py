"""Which kernels does a step run, what are they for, and how long does none run? From torch's profiler.

Kernels are told apart by their names, which are the libraries': what is not recognised is ``other`` and is listed, not
spread over the rest. ``host gap`` is wall time in which no kernel ran.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable

import torch
from torch._C._autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from benchmarks.report import Cell
from core.clock import WallClock

# (term, parts of kernels' names), the first that fits
_TERMS = (
    (
        "attention",
        ("BatchPrefill", "BatchDecode", "SinglePrefill", "PrefillWithKVCache", "MergeStates", "fmha", "flash"),
    ),
    ("K/V store", ("AppendPagedKVCache", "index_put")),
    ("matmul", ("nvjet", "gemm", "gemv", "splitK", "cutlass", "sm90_xmma")),
    ("norms, rope, activations", ("triton_",)),
    ("sampler and copies", ("reduce_kernel", "Memcpy", "Memset", "copy_kernel", "gather", "elementwise", "index")),
)
_NUM_OTHERS = 3  # names of unrecognised kernels that are shown


def profile_terms(what: str, run: Callable[[], object], repeats: int, device: torch.device) -> list[dict[str, Cell]]:
    """Rows of the terms of ``run``, in milliseconds of one run. On CPU there are no kernels to see: no rows."""
    if device.type != "cuda":
        return []
    clock = WallClock()
    with profile(activities=[ProfilerActivity.CUDA]) as profiler:
        torch.cuda.synchronize(device)
        began_at = clock.now()
        for _ in range(repeats):
            run()
        torch.cuda.synchronize(device)
        wall_s = clock.now() - began_at
    kernels = [event for event in profiler.events() or () if event.device_type == DeviceType.CUDA]
    spent: dict[str, float] = defaultdict(float)
    counts: dict[str, int] = defaultdict(int)
    others: dict[str, float] = defaultdict(float)
    for event in kernels:
        term = next((name for name, parts in _TERMS if any(part in event.name for part in parts)), "other")
        spent[term] += event.device_time
        counts[term] += 1
        if term == "other":
            others[event.name] += event.device_time
    wall_ms = wall_s * 1e3 / repeats
    busy_ms = _union([(event.time_range.start, event.time_range.end) for event in kernels]) / 1e3 / repeats
    rows: list[dict[str, Cell]] = [
        _row(what, term, micros / 1e3 / repeats, wall_ms, counts[term] / repeats)
        for term, micros in sorted(spent.items(), key=lambda entry: -entry[1])
    ]
    rows.append(_row(what, "host gap", wall_ms - busy_ms, wall_ms, None))
    rows.append(_row(what, "whole, under the profiler", wall_ms, wall_ms, len(kernels) / repeats))
    for name, micros in sorted(others.items(), key=lambda entry: -entry[1])[:_NUM_OTHERS]:
        rows.append(_row(what, f"other: {name[:60]}", micros / 1e3 / repeats, wall_ms, None))
    return rows


def _row(what: str, term: str, ms: float, wall_ms: float, kernels: float | None) -> dict[str, Cell]:
    return {"what": what, "term": term, "ms": ms, "share": ms / wall_ms, "kernels": kernels}


def _union(spans: list[tuple[float, float]]) -> float:
    """The length of what the spans cover together."""
    total, reached = 0.0, float("-inf")
    for start, end in sorted(spans):
        total += max(0.0, end - max(start, reached))
        reached = max(reached, end)
    return total
