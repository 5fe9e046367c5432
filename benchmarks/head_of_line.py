"""What do short prompts lose behind long ones? Three ways of computing both on one engine, over rising rates.

    python -m benchmarks.head_of_line [--json FILE] [--plot FILE] [--device cpu|cuda] [--arms ARM ...] [--shares X ...]

    whole       prompts as they come, each in one step
    chunks      as they come, at most so many tokens of one prompt in a step, and as many of others beside it
    slack       whose first token is due first; a prompt that would be late holds up a step between two layers
                (engine/prefill_order.py, FlowPrefill's idea)

One prompt in ten is long. On a GPU: 512 and 32,768 tokens of a model in Llama-3.1-8B's shape with random weights,
wanted within 0.25 and 6 s. On a CPU everything is scaled: a small random model, and what a long prompt takes alone says
how many seconds a GPU's second is (32,768 tokens are taken for 1.2 s there). Prompts come at random (Poisson, the same
for all), at shares of the rate that this engine computes without any pause; goodput is those that have their first
token in time, a second. ``waited`` is from the arrival of a short prompt to the step that computes it.
"""

from __future__ import annotations

import argparse
import gc
import json
import sys
import tempfile
import threading
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from multiprocessing import get_context
from pathlib import Path
from random import Random
from statistics import fmean

from rich.console import Console

from benchmarks import report
from benchmarks.orderly_exit import exit_on_sigterm
from benchmarks.report import Cell, percentile
from core.clock import WallClock
from core.request import SamplingParams, SequenceId, SequenceSpec
from engine.config import EngineConfig
from engine.engine import Engine, StepOutput
from engine.engine_thread import EngineThread

LONG_SHARE = 0.1
GPU_LONG_S = 1.2  # 32,768 tokens of an 8B model on one H100, as vLLM 0.24 computes them (ARCHITECTURE.md, 8)
SHORT_SLO_S, LONG_SLO_S = 0.25, 6.0  # on a GPU
SHARES = (0.4, 0.6, 0.8, 1.0)  # of the rate that is computed without any pause
COLUMNS = {
    "arm": "arm",
    "rate_rps": "prompts/s",
    "share": "of what is computed",
    "goodput_rps": "in time/s",
    "short_in_time": "short in time",
    "long_in_time": "long in time",
    "short_p50_s": "short P50 s",
    "short_p90_s": "P90 s",
    "long_p90_s": "long P90 s",
    "waited_p90_ms": "waited P90 ms",
    "held_up": "held up",
}
_8B = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "vocab_size": 128256,
    "max_position_embeddings": 131072,
    "torch_dtype": "bfloat16",
}
_SMALL = _8B | {
    "hidden_size": 512,
    "intermediate_size": 1408,
    "num_hidden_layers": 16,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 64,
    "vocab_size": 4096,
    "max_position_embeddings": 8192,
}


@dataclass(frozen=True)
class Scale:
    """The sizes of one kind of machine."""

    device: str
    model: Mapping[str, object]
    short_tokens: int
    long_tokens: int
    chunk_tokens: int
    prompts: int  # of each rate


CPU = Scale("cpu", _SMALL, 64, 1024, 256, 80)
CUDA = Scale("cuda", _8B, 512, 32768, 2048, 80)
ARMS: Mapping[str, Mapping[str, object]] = {
    "whole": {"prefill_order": "fcfs"},
    "chunks": {"prefill_order": "fcfs", "chunked": True},
    "slack": {"prefill_order": "slack"},
}


@dataclass(frozen=True)
class Promise:
    """Seconds to the first token."""

    short_s: float
    long_s: float


@dataclass(frozen=True)
class Arrival:
    at_s: float
    is_long: bool


@dataclass(frozen=True)
class Seen:
    """One prompt. ``waited_s``: until the step that computed (or began to compute) it."""

    is_long: bool
    ttft_s: float
    waited_s: float


def main() -> int:
    """Run every arm at every rate, print, and write what is asked for."""
    options = _parser().parse_args()
    exit_on_sigterm()
    scale = CUDA if options.device == "cuda" else CPU
    shares: Sequence[float] = options.shares
    if options.quick:
        scale, shares = replace(scale, prompts=12), (0.5,)
    rows: list[dict[str, Cell]] = []
    alone: dict[bool, float] = {}
    finished = report.Report("head_of_line", report.commit(), report.machine(), rows, {})
    with tempfile.TemporaryDirectory(prefix="prfaas-bench-") as folder:
        (Path(folder) / "config.json").write_text(json.dumps(scale.model), encoding="utf-8")
        for arm in options.arms:
            # A process for each: an engine keeps the device's memory until its process ends.
            with ProcessPoolExecutor(1, get_context("spawn")) as one:
                alone, made = one.submit(run_arm, scale, folder, arm, shares, alone).result()
            rows += made
            finished = replace(finished, figures=figures(rows) | _figures_alone(scale, alone))
            if options.json is not None:
                finished.write_json(options.json)  # after every arm: a run may be cut short
    finished.print_table(COLUMNS, f"{scale.short_tokens} and {scale.long_tokens} tokens on {scale.device}")
    if options.plot is not None:
        draw(rows, options.plot)
    return 0


def run_arm(
    scale: Scale, folder: str, arm: str, shares: Sequence[float], alone: Mapping[bool, float]
) -> tuple[dict[bool, float], list[dict[str, Cell]]]:
    """(seconds of a short and of a long prompt alone, a row for each rate). Rates and promises of all arms are made of
    what the first one took alone, so that one gets ``alone`` empty."""
    console = Console(stderr=True)
    rows = []
    with _Bench(scale, folder, arm) as bench:
        own = {is_long: bench.alone_s(is_long) for is_long in (False, True)}
        console.print(f"{arm}, alone: {own[False] * 1e3:.1f} ms and {own[True]:.2f} s")
        known = dict(alone) or own
        promise = promise_of(scale, known[True])
        most_rps = 1 / (LONG_SHARE * known[True] + (1 - LONG_SHARE) * known[False])
        for share in shares:
            seen, held_up, took_s = bench.play(arrivals(share * most_rps, scale.prompts), promise)
            rows.append(row(arm, share, share * most_rps, seen, promise, held_up, took_s))
            console.print(f"{arm} at {share:g}: {rows[-1]['goodput_rps']:.2f} in time/s")
    return known, rows


def promise_of(scale: Scale, long_alone_s: float) -> Promise:
    """The GPU's, or what is as much beside a long prompt here."""
    factor = 1.0 if scale.device == "cuda" else long_alone_s / GPU_LONG_S
    return Promise(SHORT_SLO_S * factor, LONG_SLO_S * factor)


def arrivals(rate_rps: float, count: int, seed: int = 1) -> list[Arrival]:
    """A Poisson process; the same instants, stretched, and the same classes at every rate."""
    random, at_s, made = Random(seed), 0.0, []
    for _ in range(count):
        at_s += random.expovariate(1.0)
        made.append(Arrival(at_s / rate_rps, random.random() < LONG_SHARE))
    return made


def row(
    arm: str, share: float, rate_rps: float, seen: Sequence[Seen], promise: Promise, held_up: int, took_s: float
) -> dict[str, Cell]:
    """What one arm made of one rate, in ``took_s`` seconds."""
    short = [one for one in seen if not one.is_long]
    long = [one for one in seen if one.is_long]
    short_ok = [one.ttft_s <= promise.short_s for one in short]
    long_ok = [one.ttft_s <= promise.long_s for one in long]
    waited_s = percentile([one.waited_s for one in short], 90)
    return {
        "arm": arm,
        "share": share,
        "rate_rps": rate_rps,
        "goodput_rps": (sum(short_ok) + sum(long_ok)) / took_s,
        "in_time": (sum(short_ok) + sum(long_ok)) / len(seen),
        "short_in_time": fmean(short_ok) if short_ok else None,
        "long_in_time": fmean(long_ok) if long_ok else None,
        "short_p50_s": percentile([one.ttft_s for one in short], 50),
        "short_p90_s": percentile([one.ttft_s for one in short], 90),
        "long_p90_s": percentile([one.ttft_s for one in long], 90),
        "waited_p90_ms": None if waited_s is None else waited_s * 1e3,
        "held_up": held_up,
    }


def figures(rows: Sequence[Mapping[str, Cell]]) -> dict[str, float]:
    """The most goodput of each arm, and of the slack order over the others'."""
    best: dict[str, float] = {}
    for one in rows:
        best[str(one["arm"])] = max(best.get(str(one["arm"]), 0.0), float(one["goodput_rps"] or 0.0))
    found = {f"goodput_{arm}": rate for arm, rate in best.items()}
    for other in ("whole", "chunks"):
        if {"slack", other} <= best.keys():
            found[f"slack_over_{other}"] = best["slack"] / best[other] if best[other] else 0.0
    return found


def _figures_alone(scale: Scale, alone: Mapping[bool, float]) -> dict[str, float]:
    promise = promise_of(scale, alone[True])
    return {"short_alone_ms": alone[False] * 1e3, "long_alone_s": alone[True], "short_slo_s": promise.short_s}


def draw(rows: Sequence[Mapping[str, Cell]], path: Path) -> None:
    """Goodput over rate, and the share of short and of long prompts in time."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(1, 3, figsize=(13, 3.6), layout="constrained")
    panels = {"goodput_rps": "prompts in time, 1/s", "short_in_time": "short in time", "long_in_time": "long in time"}
    for axis, (key, title) in zip(axes, panels.items(), strict=True):
        for arm in ARMS:
            own = [(r["rate_rps"], r[key]) for r in rows if r["arm"] == arm and r[key] is not None]
            axis.plot([x for x, _ in own], [y for _, y in own], marker="o", label=arm)
        axis.set_xlabel("prompts/s")
        axis.set_title(title)
        axis.set_ylim(bottom=0)
    axes[0].legend()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)


class _Bench:
    """One engine on its thread, under one arm."""

    def __init__(self, scale: Scale, folder: str, arm: str) -> None:
        wishes = dict(ARMS[arm])
        step_tokens = scale.long_tokens + scale.short_tokens
        if wishes.pop("chunked", False):
            step_tokens = 2 * scale.chunk_tokens
            wishes["max_prefill_chunk"] = scale.chunk_tokens
        self._scale = scale
        self._clock = WallClock()
        self._first: dict[SequenceId, tuple[float, float]] = {}  # instant of the token, seconds of queue
        self._came = threading.Condition()
        self._number = 0
        config = EngineConfig(
            device=scale.device,
            num_pages=(6 * scale.long_tokens + 64 * scale.short_tokens) // 16,
            max_batch_tokens=step_tokens,
            max_batch_size=64,
            prefix_cache=False,
            decode_graphs="never",
            **wishes,  # type: ignore[arg-type]
        )
        self._thread = EngineThread(
            lambda: Engine.load_model(config, f"dummy:{folder}", self._clock), self._on_output, self._on_death
        )
        self._engine = self._thread.start()
        gc.collect()
        gc.freeze()  # as a worker does (cluster/worker_host.py)

    def __enter__(self) -> _Bench:
        return self

    def __exit__(self, *_: object) -> None:
        self._thread.stop(60.0)

    def alone_s(self, is_long: bool) -> float:
        """Seconds of one prompt with the engine to itself: the quickest of three, after another one."""
        times = []
        for _ in range(4):
            began_at = self._clock.now()
            self._wait_for([self._send(is_long, None)])
            times.append(self._clock.now() - began_at)
        return min(times[1:])

    def play(self, coming: Sequence[Arrival], promise: Promise) -> tuple[list[Seen], int, float]:
        """(what each saw, steps that were held up, seconds from the first arrival to the last token)."""
        before, began_at = self._engine.num_urgent_steps, self._clock.now()
        sent = []
        for arrival in coming:
            time.sleep(max(0.0, began_at + arrival.at_s - self._clock.now()))
            slo_s = promise.long_s if arrival.is_long else promise.short_s
            at = self._clock.now()
            sent.append((arrival, at, self._send(arrival.is_long, at + slo_s)))
        self._wait_for([name for *_, name in sent])
        seen = []
        for arrival, at, name in sent:
            token_at, queue_s = self._first.pop(name)
            seen.append(Seen(arrival.is_long, token_at - at, queue_s))
        return seen, self._engine.num_urgent_steps - before, self._clock.now() - began_at

    def _send(self, is_long: bool, first_token_by: float | None) -> SequenceId:
        self._number += 1
        name = SequenceId(f"s{self._number}")
        count = self._scale.long_tokens if is_long else self._scale.short_tokens
        vocabulary = int(str(self._scale.model["vocab_size"]))
        tokens = tuple((self._number * 7919 + 31 * i) % vocabulary for i in range(count))
        sampling = SamplingParams(max_tokens=1, temperature=0.0, ignore_eos=True)
        spec = SequenceSpec(name, tokens, sampling, first_token_by=first_token_by)
        arrived_at = self._clock.now()
        self._thread.submit(lambda engine: engine.add(spec, arrived_at))
        return name

    def _on_output(self, output: StepOutput) -> None:
        now = self._clock.now()
        with self._came:
            for chunk in output.chunks:
                assert chunk.stats is not None, "the first chunk is the last"
                self._first[chunk.sequence_id] = (now, chunk.stats.queue_s)
            for failure in output.failures:
                raise RuntimeError(failure.message)
            self._came.notify_all()

    def _on_death(self, error: Exception) -> None:
        with self._came:
            self._came.notify_all()

    def _wait_for(self, names: Sequence[SequenceId]) -> None:
        with self._came:
            came = self._came.wait_for(
                lambda: all(n in self._first for n in names) or not self._thread.alive, timeout=600.0
            )
            if not came or not self._thread.alive:
                raise RuntimeError("the engine made no token for ten minutes, or died")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.head_of_line", description=(__doc__ or "").partition("\n\n")[0]
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the report there")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="draw goodput over rate there (.png, .svg)")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="(default: cpu)")
    parser.add_argument("--arms", nargs="+", choices=list(ARMS), default=list(ARMS), help="(default: all)")
    parser.add_argument(
        "--shares", nargs="+", type=float, default=SHARES, metavar="X", help="of the rate that the first arm computes"
    )
    parser.add_argument("--quick", action="store_true", help="a few prompts at one rate")
    return parser


if __name__ == "__main__":
    sys.exit(main())
