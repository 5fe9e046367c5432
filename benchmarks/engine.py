"""How near is the engine to what the GPU can do, and what makes up the rest?

    python -m benchmarks.engine [--json FILE] [--parts prefill decode mixed profile moe] [--peer FILE] [--rehearse]

One engine (no service around it) with a Llama of 8B parameters in bfloat16, random weights, on one GPU:

    prefill   1x1,024, 1x8,192, 8x1,024 and 1x32,768 tokens: from ``add`` to the last first token, prefix cache off
    decode    batches of 1, 64, 128 and 256 at 1,024 tokens of context and of 64 at 4,096: the median time between steps
    mixed     200 requests at once, 256-8,192 tokens in (444,944 in all), 128 out
    profile   kernels of a decode step, of a prefill and of the mixed load, by what they are for, and the time in which
              none ran
    moe       decode steps of a mixture of experts (mixture.py), captured and launched: batches of 1, 16 and 64

Floors are of the same run (engine_floors.py): for prefill the multiplications at the measured rate of a large
product; for decode the bytes of weights and K/V at the measured bandwidth, the better of a large copy and a large sum;
of a mixture those of the experts that the step meets.
``--peer`` adds a column from a ``results.json`` of shared/peers/vllm-gpu on the same machine. ``--rehearse``: a tiny
model, on whatever is here.
"""

from __future__ import annotations

import argparse
import gc
import json
import math
import random
import statistics
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import count, pairwise
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from benchmarks import report
from benchmarks.engine_floors import Floors, ModelCost, experts_met, measure_floors, unmet_bytes
from benchmarks.engine_profile import profile_terms
from benchmarks.mixture import QWEN3_MOE, TINY_QWEN3_MOE
from benchmarks.report import Cell
from core.clock import WallClock
from core.compute import StepSample
from core.request import SamplingParams, SequenceId, SequenceSpec
from engine.config import EngineConfig
from engine.engine import Engine

DENSE_PARTS = ("prefill", "decode", "mixed", "profile")
PARTS = (*DENSE_PARTS, "moe")
COLUMNS = {
    "what": "what",
    "ms": "ours, ms",
    "ms_mean": "mean",
    "ms_min": "min",
    "ms_max": "max",
    "floor_ms": "floor, ms",
    "over_floor": "ratio",
    "experts": "experts met",
    "tokens_per_s": "tokens/s",
    "peer_ms": "vLLM, ms",
    "peer_ratio": "ours/vLLM",
    "runs": "runs",
}
TERM_COLUMNS = {"what": "what", "term": "term", "ms": "ms", "share": "share", "kernels": "kernels", "steps": "steps"}
_UTILIZATION = 0.97  # nobody else is on the device
_STEP_TOKENS = 16384
_MAX_BATCH = 256
WARM_STEPS, TIMED_STEPS = 12, 64


@dataclass(frozen=True)
class Scale:
    """What is measured; ``REHEARSAL`` is for machines without a GPU."""

    config: Mapping[str, Any]  # a transformers config.json
    settings: Mapping[str, Any]  # of EngineConfig
    prefills: tuple[tuple[int, ...], ...]
    decodes: tuple[tuple[int, int], ...]  # (batch, context)
    num_mixed: int
    mixed_lengths: tuple[int, int]
    mixed_output: int


LLAMA_8B = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "vocab_size": 128256,
    "rms_norm_eps": 1e-5,
    "rope_theta": 500000.0,
    "max_position_embeddings": 131072,
    "tie_word_embeddings": False,
    "dtype": "bfloat16",
}
FULL = Scale(
    LLAMA_8B,
    {"max_batch_tokens": _STEP_TOKENS, "max_batch_size": _MAX_BATCH, "max_model_len": 40960, "prefix_cache": False},
    ((1024,), (8192,), (1024,) * 8, (32768,)),
    ((1, 1024), (64, 1024), (128, 1024), (256, 1024), (64, 4096)),
    200,
    (256, 8192),
    128,
)
FULL_MOE = Scale(
    QWEN3_MOE,
    {"max_batch_tokens": 8192, "max_batch_size": 64, "max_model_len": 8192, "prefix_cache": False, "num_pages": 5000},
    (),
    ((1, 1024), (16, 1024), (64, 1024)),
    0,
    (0, 0),
    0,
)
REHEARSAL = Scale(
    {
        **LLAMA_8B,
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "vocab_size": 512,
        "dtype": "float32",
    },
    {"max_batch_tokens": 256, "max_batch_size": 4, "max_model_len": 1024, "prefix_cache": False, "num_pages": 256},
    ((64,), (64,) * 4),
    ((1, 64), (4, 64)),
    6,
    (16, 128),
    8,
)
REHEARSAL_MOE = replace(FULL_MOE, config=TINY_QWEN3_MOE, settings=REHEARSAL.settings, decodes=((1, 64), (4, 64)))


class Bench:
    """An engine, and what is asked of it."""

    def __init__(self, engine: Engine, scale: Scale) -> None:
        self.engine = engine
        self.scale = scale
        self._clock = WallClock()
        self._random = random.Random(1)
        self._numbers = count()

    def prompt(self, length: int) -> tuple[int, ...]:
        """Random tokens."""
        return tuple(self._random.randrange(self.engine.model.vocab_size) for _ in range(length))

    def add(self, prompt: Sequence[int], num_tokens: int) -> None:
        """Queue a sequence of that many output tokens."""
        sampling = SamplingParams(max_tokens=num_tokens, temperature=0.0, ignore_eos=True)
        self.engine.add(SequenceSpec(SequenceId(str(next(self._numbers))), tuple(prompt), sampling))

    def drain(self) -> float:
        """Run until nothing is left; seconds."""
        began_at = self._clock.now()
        while self.engine.has_work:
            self.step()
        return self._clock.now() - began_at

    def step(self) -> int:
        """One step; how many tokens it brought."""
        output = self.engine.step()
        if output.failures:
            raise RuntimeError(output.failures[0].message)
        return len(output.chunks)

    def prefill(self, lengths: Sequence[int], runs: int) -> list[float]:
        """Seconds to the last first token of prompts that arrive together; the first run is not counted."""
        times = []
        for _ in range(runs + 1):
            prompts = [self.prompt(length) for length in lengths]
            for prompt in prompts:
                self.add(prompt, 1)
            times.append(self.drain())
        return times[1:]

    def decode(self, batch: int, context: int, shared: int = 0, groups: int = 1) -> list[float]:
        """Seconds between steps of the whole batch. Its prompts have ``context`` tokens of their own; in each of
        ``groups`` they begin with the same ``shared`` tokens, which the prefix cache holds by then."""
        num_tokens = WARM_STEPS + TIMED_STEPS + 8
        beginnings = [self.prompt(shared) for _ in range(groups)]
        for beginning in beginnings if shared else ():
            self.add(beginning, 1)
            self.drain()
        for i in range(batch):
            self.add(
                (*beginnings[i % groups], *self.prompt(context)), num_tokens + -(-batch * context // self.step_tokens)
            )
        ends: list[float] = []
        while self.engine.has_work:
            full = self.step() == batch
            if full:
                ends.append(self._clock.now())
        gaps = [later - earlier for earlier, later in pairwise(ends)]
        return gaps[WARM_STEPS : WARM_STEPS + TIMED_STEPS]

    def experts_met(self, batch: int, context: int) -> float:
        """Experts of a layer that a decode step of the whole batch meets."""
        for _ in range(batch):
            self.add(self.prompt(context), 4 + -(-batch * context // self.step_tokens))
        return experts_met(batch, self.drain)

    @property
    def step_tokens(self) -> int:
        """Of the prompts of one step."""
        tokens: int = self.scale.settings["max_batch_tokens"]
        return tokens

    def mixed(self) -> Mixed:
        """Requests that all come at once."""
        dice = random.Random(42)  # as the peer's script draws them
        low, high = self.scale.mixed_lengths
        lengths = [round(math.exp(dice.uniform(math.log(low), math.log(high)))) for _ in range(self.scale.num_mixed)]
        for length in lengths:
            self.add(self.prompt(length), self.scale.mixed_output)
        preempted_before = self.engine.load().num_preemptions
        self.engine.take_step_samples()
        samples: list[StepSample] = []
        began_at = self._clock.now()
        while self.engine.has_work:
            self.step()
            samples += self.engine.take_step_samples()
        seconds = self._clock.now() - began_at
        num_tokens = sum(lengths) + len(lengths) * self.scale.mixed_output
        return Mixed(seconds, num_tokens, samples, self.engine.load().num_preemptions - preempted_before)


@dataclass(frozen=True)
class Mixed:
    """What became of a mixed load."""

    seconds: float
    num_tokens: int  # in and out
    samples: Sequence[StepSample]
    num_preemptions: int

    def terms(self) -> list[dict[str, Cell]]:
        """Rows: what its steps took on the device, with and without prompts, and what lies between them."""
        with_prompts = [sample.seconds for sample in self.samples if sample.prefill_tokens]
        decode = [sample.seconds for sample in self.samples if not sample.prefill_tokens]
        between_s = self.seconds - sum(with_prompts) - sum(decode)
        parts = (
            ("steps with prompts", sum(with_prompts), len(with_prompts)),
            ("decode steps", sum(decode), len(decode)),
            ("between steps", between_s, None),
        )
        return [
            {"what": "mixed", "term": term, "ms": seconds * 1e3, "share": seconds / self.seconds, "steps": steps}
            for term, seconds, steps in parts
        ]


def main(arguments: Sequence[str] | None = None) -> int:
    options = _parse(arguments)
    scale = REHEARSAL if options.rehearse else FULL
    console = Console(highlight=False)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if device.type != "cuda" and not options.rehearse:
        console.print("no GPU here: --rehearse runs a tiny model on CPU")
        return 2
    floors = measure_floors(device, 1.0 if device.type == "cuda" else 0.02)
    console.print(floors.text)
    torch.cuda.empty_cache()  # nothing on CPU
    peer = json.loads(options.peer.read_text()) if options.peer else {}
    rows: list[dict[str, Cell]] = []
    terms: list[dict[str, Cell]] = []
    figures: dict[str, float] = dict(floors.figures)
    machine = report.machine()

    def write() -> None:
        if options.json is not None:
            report.Report("engine", report.commit(), machine, [*rows, *terms], figures).write_json(options.json)

    if dense := [part for part in options.parts if part in DENSE_PARTS]:
        bench, figures["engine_start_s"] = _ready(scale, device, console)
        machine |= {"device": bench.engine.model.compute.device, "attention": bench.engine.modes().attention}
        cost = ModelCost.of(bench.engine)
        runs: dict[str, Callable[[], None]] = {
            "prefill": lambda: _prefills(bench, floors, cost, peer, rows, figures),
            "decode": lambda: _decodes(bench, floors, cost, peer, rows, figures),
            "mixed": lambda: _mixed(bench, peer, rows, terms, figures),
            "profile": lambda: _profiles(bench, device, terms),
        }
        for part in dense:
            runs[part]()
            write()  # after every part: a run may be cut short
        del bench, runs
        _free()
    if "moe" in options.parts:
        moe_scale = REHEARSAL_MOE if options.rehearse else FULL_MOE
        machine["device"] = _mixtures(moe_scale, device, floors, console, rows, figures)
        write()
    title = f"engine on {machine['device']}"
    report.Report("engine", report.commit(), machine, rows, figures).print_table(COLUMNS, title)
    if terms:
        report.Report("engine", "", {}, terms, {}).print_table(TERM_COLUMNS, "what the time goes to")
    return 0


def _ready(scale: Scale, device: torch.device, console: Console, **settings: Any) -> tuple[Bench, float]:
    """A bench, and the seconds of its engine's start."""
    clock = WallClock()
    began_at = clock.now()
    bench = Bench(make_engine(scale, device, **settings), scale)
    start_s = clock.now() - began_at
    gc.collect()
    gc.freeze()  # as a worker does (cluster/worker_host.py)
    modes = bench.engine.modes()
    console.print(
        f"engine ready in {start_s:.1f} s: attention {modes.attention}, {modes.forward} {modes.forward_reason}; "
        f"pages for {bench.engine.load().pages_total * bench.engine.layout.page_size:,} tokens"
    )
    return bench, start_s


def _free() -> None:
    """Give back what an engine held that nobody names any more."""
    gc.unfreeze()
    gc.collect()
    torch.cuda.empty_cache()  # nothing on CPU


def make_engine(scale: Scale, device: torch.device, **more: Any) -> Engine:
    """With dummy weights, alone on its device. ``more``: settings beside the scale's."""
    settings = {"gpu_memory_utilization": _UTILIZATION, **scale.settings, **more}
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "config.json").write_text(json.dumps(scale.config))
        return Engine.load_model(EngineConfig(**settings), f"dummy:{folder}", WallClock())


def _prefills(
    bench: Bench,
    floors: Floors,
    cost: ModelCost,
    peer: Mapping[str, Any],
    rows: list[dict[str, Cell]],
    figures: dict[str, float],
) -> None:
    for lengths in bench.scale.prefills:
        name = f"{len(lengths)}x{lengths[0]}"
        seconds = bench.prefill(lengths, 4 if sum(lengths) > 16384 else 7)
        flops = cost.prefill_flops(lengths)
        theirs = peer.get("prefill_held", {}).get(name) or peer.get("prefill", {}).get(name)
        row = _row(f"prefill {name}", seconds, flops / floors.flops_per_s, theirs["ms"] if theirs else None)
        rows.append({**row, "tokens_per_s": sum(lengths) / statistics.median(seconds)})
        if lengths == (8192,):
            figures["prefill_mfu_8192"] = flops / statistics.median(seconds) / floors.flops_per_s
            figures["prefill_8192_ms"] = statistics.median(seconds) * 1e3


def _decodes(
    bench: Bench,
    floors: Floors,
    cost: ModelCost,
    peer: Mapping[str, Any],
    rows: list[dict[str, Cell]],
    figures: dict[str, float],
) -> None:
    for batch, context in bench.scale.decodes:
        seconds = bench.decode(batch, context)
        middle = context + WARM_STEPS + TIMED_STEPS // 2
        floor_s = cost.decode_bytes(batch, middle) / floors.bytes_per_s
        theirs = peer.get("decode", {}).get(f"B{batch}_L{context}")
        peer_ms = theirs["ms_step_median_gap"] if theirs else None  # a median as ours
        row = _row(f"decode {batch} at {context}", seconds, floor_s, peer_ms)
        rows.append({**row, "tokens_per_s": batch / statistics.median(seconds)})
        if context == 1024:
            figures[f"decode_over_floor_b{batch}"] = statistics.median(seconds) / floor_s
            figures[f"decode_ms_b{batch}"] = statistics.median(seconds) * 1e3


def _mixtures(
    scale: Scale,
    device: torch.device,
    floors: Floors,
    console: Console,
    rows: list[dict[str, Cell]],
    figures: dict[str, float],
) -> str:
    """Decode steps launched layer by layer, and captured; which device it was."""
    met: dict[int, float] = {}
    name = ""
    for how, switch in (("launched", "never"), ("captured", "always")):
        bench, _ = _ready(scale, device, console, decode_graphs=switch)
        if switch == "always" and not bench.engine.forward.graph_batch_sizes:
            raise RuntimeError(f"decode steps are not captured: {bench.engine.forward.graph_reason}")
        name, cost = bench.engine.model.compute.device, ModelCost.of(bench.engine)
        for batch, context in scale.decodes:
            seconds = bench.decode(batch, context)
            if switch == "never":
                met[batch] = bench.experts_met(batch, context)
            middle = context + WARM_STEPS + TIMED_STEPS // 2
            unmet = unmet_bytes(scale.config, met[batch])
            floor_s = cost.decode_bytes(batch, middle, unmet) / floors.bytes_per_s
            row = _row(f"mixture, decode {batch} at {context}, {how}", seconds, floor_s, None)
            per_s = batch / statistics.median(seconds)
            rows.append({**row, "experts": met[batch], "tokens_per_s": per_s})
            figures[f"moe_{how}_ms_b{batch}"] = statistics.median(seconds) * 1e3
            figures[f"moe_{how}_over_floor_b{batch}"] = statistics.median(seconds) / floor_s
        del bench
        _free()
    return name


def _mixed(
    bench: Bench,
    peer: Mapping[str, Any],
    rows: list[dict[str, Cell]],
    terms: list[dict[str, Cell]],
    figures: dict[str, float],
) -> None:
    runs = [bench.mixed() for _ in range(2)]
    best = min(runs, key=lambda run: run.seconds)
    theirs = min((run["s"] for run in peer.get("mixed", {}).get("runs", ())), default=None)
    row = _row(f"mixed, {bench.scale.num_mixed} requests", [run.seconds for run in runs], None, theirs and theirs * 1e3)
    rows.append({**row, "tokens_per_s": best.num_tokens / best.seconds})
    terms += best.terms()
    figures["mixed_tokens_per_s"] = best.num_tokens / best.seconds
    figures["mixed_s"] = best.seconds
    figures["mixed_preemptions"] = best.num_preemptions


def _profiles(bench: Bench, device: torch.device, terms: list[dict[str, Cell]]) -> None:
    batch, context = next((shape for shape in bench.scale.decodes if shape[0] == 64), bench.scale.decodes[-1])
    for _ in range(batch):
        bench.add(bench.prompt(context), 64)
    while bench.step() < batch:
        pass
    for _ in range(8):
        bench.step()
    terms += profile_terms(f"decode {batch} at {context}", bench.step, 16, device)
    bench.drain()
    lengths = bench.scale.prefills[1]

    def prefill() -> None:
        for prompt in prompts:
            bench.add(prompt, 1)
        bench.drain()

    prompts = [bench.prompt(length) for length in lengths]
    prefill()
    terms += profile_terms(f"prefill {len(lengths)}x{lengths[0]}", prefill, 3, device)
    terms += profile_terms("mixed", bench.mixed, 1, device)


def _row(what: str, seconds: Sequence[float], floor_s: float | None, peer_ms: float | None) -> dict[str, Cell]:
    middle = statistics.median(seconds)
    return {
        "what": what,
        "ms": middle * 1e3,
        "ms_mean": statistics.mean(seconds) * 1e3,
        "ms_min": min(seconds) * 1e3,
        "ms_max": max(seconds) * 1e3,
        "floor_ms": None if floor_s is None else floor_s * 1e3,
        "over_floor": None if floor_s is None else middle / floor_s,
        "peer_ms": peer_ms,
        "peer_ratio": None if peer_ms is None else middle * 1e3 / peer_ms,
        "runs": len(seconds),
    }


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--json", type=Path, help="write the report here")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--peer", type=Path, help="results.json of shared/peers/vllm-gpu, of the same machine")
    parser.add_argument("--rehearse", action="store_true", help="a tiny model, on whatever is here")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    sys.exit(main())
