"""What is measured of one wave, and how a row of the report is made of several.

Definitions (those of `vllm bench serve`): TTFT is from sending a request to its first token at the client; TPOT is
(end to end - TTFT) / (output tokens - 1); tokens/s counts output tokens over the wave's wall time, from sending the
first request to the last token of the last one. Percentiles pool the requests of all repetitions; tokens/s is the
median repetition's.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median

from benchmarks.report import Cell, percentile

PERCENTS = (50, 90, 99)


@dataclass(frozen=True)
class RequestTimes:
    """One request, seen from the client; seconds."""

    ttft_s: float
    e2e_s: float
    num_output_tokens: int

    @property
    def tpot_s(self) -> float:
        assert self.num_output_tokens > 1, "a workload of single tokens has no time between tokens"
        return (self.e2e_s - self.ttft_s) / (self.num_output_tokens - 1)


@dataclass(frozen=True)
class WaveTimes:
    """One wave."""

    wall_s: float
    requests: tuple[RequestTimes, ...]

    @property
    def tokens_per_s(self) -> float:
        return sum(request.num_output_tokens for request in self.requests) / self.wall_s


def row(arm: str, concurrency: int, repetitions: Sequence[WaveTimes]) -> dict[str, Cell]:
    """The report's row for one arm at one concurrency."""
    requests = [request for times in repetitions for request in times.requests]
    cells: dict[str, Cell] = {
        "arm": arm,
        "concurrency": concurrency,
        "num_repetitions": len(repetitions),
        "num_requests": len(requests),
        "num_output_tokens": sum(request.num_output_tokens for request in requests),
        "tokens_per_s": median(times.tokens_per_s for times in repetitions),
        "tokens_per_s_min": min(times.tokens_per_s for times in repetitions),
        "tokens_per_s_max": max(times.tokens_per_s for times in repetitions),
    }
    for percent in PERCENTS:
        cells[f"ttft_p{percent}_s"] = percentile([request.ttft_s for request in requests], percent)
        cells[f"tpot_p{percent}_s"] = percentile([request.tpot_s for request in requests], percent)
    return cells
