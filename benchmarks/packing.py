"""How many of the tokens that the model is run on does somebody need?

    python -m benchmarks.packing [--json FILE] [--lengths TRACE] [--requests N]

A request needs its prompt's tokens and all of its output's but the last, each once. The lengths are ShareGPT's
(shared/traces), a sample of 1,000; no model is run, tokens are counted:

    padded    batches of 8, 16, 32 and 64 in the order of arrival: every prompt as long as the batch's longest, and a
              decode step for every sequence until the longest output of the batch is done
    sorted    the same, requests sorted by their prompts' lengths first
    packed    the engine's scheduler and step packing (engine/chunked_prefill.py, engine/step_packing.py): counted is
              each step's row as the model gets it. ``graphs``: steps run in captured graphs of the next larger size,
              decode steps whole (engine/decode_graphs.py), others between attentions (engine/prompt_graphs.py).
              ``stopped``: as graphs, and every sequence ends by a stop token while the step after it is launched
              already, which costs a row

``packed`` runs once with all requests at once, and at rates (Poisson) where batches come and go, which is what leaves
graphs partly empty. For the rates a step takes 9 ms and 26 us a token, an 8B model's on an H100 (docs/engine.md).

``efficiency`` is needed over computed; the figures are those of the largest batch and of all requests at once.
"""

from __future__ import annotations

import argparse
import random
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from benchmarks import report
from benchmarks.report import Cell
from benchmarks.simulation_runs import shared_traces
from cluster.workload_traces import TraceRequest, read_trace
from core.request import SamplingParams, SequenceId, SequenceSpec
from engine.chunked_prefill import ChunkedPrefillScheduler
from engine.config import EngineConfig
from engine.decode_graphs import batch_buckets
from engine.page_allocator import PageAllocator
from engine.prompt_graphs import token_buckets
from engine.step_packing import Chunk, pack
from engine.step_plan import SampledToken

SHAREGPT = "lengths_sharegpt8k_llama2tok.csv.gz"
BATCHES = (8, 16, 32, 64)
RATES_PER_S = (0.5, 2.0, 4.0)
COLUMNS = {
    "arm": "arm",
    "load": "load",
    "batch": "batch",
    "steps": "steps",
    "computed": "computed, M",
    "prefill": "prefill",
    "decode": "decode",
    "efficiency": "needed/computed",
}
_STEP_S, _TOKEN_S = 9e-3, 26e-6
_SAMPLE_SEED = 1


@dataclass(frozen=True, slots=True)
class Tokens:
    """Tokens of prompts and of outputs."""

    prefill: int
    decode: int

    @property
    def total(self) -> int:
        """Both."""
        return self.prefill + self.decode


@dataclass(frozen=True, slots=True)
class PackedRun:
    """What the engine's own steps came to."""

    computed: Tokens
    num_steps: int
    num_decode_rows: int  # that decode graphs add
    num_prompt_rows: int  # that graphs of steps with prompts add
    mean_batch: float  # sequences of a step


def needed(requests: Sequence[TraceRequest]) -> Tokens:
    """The last token of an output is read by nobody, so it is not computed on."""
    return Tokens(sum(r.input_tokens for r in requests), sum(r.output_tokens - 1 for r in requests))


def padded(requests: Sequence[TraceRequest], batch: int) -> Tokens:
    """Batches in the order given, padded to their longest prompt and run until their longest output ends."""
    prefill = decode = 0
    for first in range(0, len(requests), batch):
        some = requests[first : first + batch]
        prefill += len(some) * max(r.input_tokens for r in some)
        decode += len(some) * max(r.output_tokens - 1 for r in some)
    return Tokens(prefill, decode)


def packed(
    requests: Sequence[TraceRequest],
    config: EngineConfig,
    rate_per_s: float | None = None,
    on_finished: Callable[[], None] | None = None,
) -> PackedRun:
    """The scheduler's steps, packed. ``rate_per_s`` None: all requests are there at once."""
    most = max(r.input_tokens + r.output_tokens for r in requests) + 1
    num_pages = (config.max_batch_size + 1) * (-(-most // config.page_size) + 1)  # nobody is preempted
    scheduler = ChunkedPrefillScheduler(config, PageAllocator(num_pages, config.page_size, False), most)
    arrivals = list(_arrivals(requests, rate_per_s))
    arrivals.reverse()
    buckets = batch_buckets(config.max_batch_size)
    sizes = token_buckets(min(config.prompt_graph_tokens, config.max_batch_tokens))
    now, prefill, decode, num_steps, num_decode_rows, num_prompt_rows, num_sequences = 0.0, 0, 0, 0, 0, 0, 0
    while arrivals or scheduler.has_work:
        if not scheduler.has_work:
            now = max(now, arrivals[-1][0])
        while arrivals and arrivals[-1][0] <= now:
            at, spec = arrivals.pop()
            scheduler.add(spec, at)
        plan = scheduler.plan_step(now)
        assert plan is not None, "there is work and room for all of it"
        row = pack([Chunk(i.token_ids, i.start, i.page_ids, i.samples, i.pending_row) for i in plan.items])
        num_prompt = sum(len(i.token_ids) for i in plan.items if i.start < i.num_prompt_tokens)
        prefill += num_prompt
        decode += len(row.token_ids) - num_prompt
        if row.is_decode:
            num_decode_rows += next(size for size in buckets if size >= len(row.segments)) - len(row.segments)
        else:
            num_tokens = len(row.token_ids)
            num_prompt_rows += next((size for size in sizes if size >= num_tokens), num_tokens) - num_tokens
        num_steps += 1
        num_sequences += len(plan.items)
        now += _STEP_S + _TOKEN_S * len(row.token_ids)
        for chunk in scheduler.commit_step(plan, {i.sequence_id: SampledToken(1) for i in plan.sampling_items}, now):
            if chunk.finish_reason is not None and on_finished is not None:
                on_finished()
    computed = Tokens(prefill, decode)
    return PackedRun(computed, num_steps, num_decode_rows, num_prompt_rows, num_sequences / num_steps)


def _arrivals(requests: Sequence[TraceRequest], rate_per_s: float | None) -> Iterator[tuple[float, SequenceSpec]]:
    dice, at = random.Random(_SAMPLE_SEED), 0.0
    for number, request in enumerate(requests):
        at += dice.expovariate(rate_per_s) if rate_per_s else 0.0
        sampling = SamplingParams(max_tokens=request.output_tokens, temperature=0.0, ignore_eos=True)
        yield at, SequenceSpec(SequenceId(str(number)), (1,) * request.input_tokens, sampling)


def main(arguments: Sequence[str] | None = None) -> int:
    """Count all arms, print the table, write the JSON."""
    options = _parse(arguments)
    if options.lengths is None:
        print(f"no {SHAREGPT} in shared/traces; --lengths names a trace", file=sys.stderr)
        return 2
    everything = list(read_trace(options.lengths))
    requests = random.Random(_SAMPLE_SEED).sample(everything, min(options.requests, len(everything)))
    need = needed(requests)
    rows: list[dict[str, Cell]] = []
    for arm, ordered in (("padded", requests), ("sorted", sorted(requests, key=lambda r: r.input_tokens))):
        rows += [_row(arm, "all at once", batch, None, padded(ordered, batch), need) for batch in BATCHES]
    config = EngineConfig(prefix_cache=False)
    for rate in (None, *RATES_PER_S):
        rows += _packed_rows(requests, config, rate, need)
    whole = {str(row["arm"]): float(row["efficiency"] or 0.0) for row in rows if row["load"] == "all at once"}
    finished = report.Report("packing", report.commit(), report.machine(), rows, whole)
    finished.print_table(
        COLUMNS, f"{len(requests)} requests of {options.lengths.name}, {need.total / 1e6:.2f} M tokens"
    )
    if options.json is not None:
        finished.write_json(options.json)
    return 0


def _packed_rows(
    requests: Sequence[TraceRequest], config: EngineConfig, rate_per_s: float | None, need: Tokens
) -> list[dict[str, Cell]]:
    load = "all at once" if rate_per_s is None else f"{rate_per_s:g}/s"
    bar = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*bar, console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task(f"packed, {load}", total=len(requests))
        run = packed(requests, config, rate_per_s, lambda: progress.advance(task))
    exact = run.computed
    graphs = Tokens(exact.prefill + run.num_prompt_rows, exact.decode + run.num_decode_rows)
    arms = {"packed": exact, "graphs": graphs, "stopped": Tokens(graphs.prefill, graphs.decode + len(requests))}
    batch = round(run.mean_batch, 1)
    return [_row(arm, load, batch, run.num_steps, computed, need) for arm, computed in arms.items()]


def _row(arm: str, load: str, batch: float, steps: int | None, computed: Tokens, need: Tokens) -> dict[str, Cell]:
    return {
        "arm": arm,
        "load": load,
        "batch": batch,
        "steps": steps,
        "computed": computed.total / 1e6,
        "prefill": need.prefill / computed.prefill,
        "decode": need.decode / computed.decode,
        "efficiency": need.total / computed.total,
    }


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    traces = shared_traces()
    lengths = traces / SHAREGPT if traces is not None and (traces / SHAREGPT).is_file() else None
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--json", type=Path, help="write the report here")
    parser.add_argument("--lengths", type=Path, default=lengths, help="a trace (cluster/workload_traces.py)")
    parser.add_argument("--requests", type=int, default=1000, help="how many of its requests, drawn with a fixed seed")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    sys.exit(main())
