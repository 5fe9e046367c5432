"""What does a worker over several devices give, and does it say the same?

    python -m benchmarks.tensor_parallel [--degrees 1 2] [--json FILE] [--parts tokens speed] [--rehearse]

One engine (no service around it) for each degree, its ranks in processes of their own as in a worker, one after the
other in fresh processes:

    tokens   a small model in float32: 24 greedy tokens of 8 prompts; how many differ from those of the first degree
    speed    Llama-3.1-8B's shape in bfloat16, random weights: seconds to the first token of 1x1,024, 1x8,192 and
             8x1,024 prompt tokens, the median decode step of 1 and of 64 sequences at 1,024 tokens of context, and
             the largest distance between log-probabilities of the most likely tokens and those of the first degree

``--rehearse``: both with the small model, on CPU.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from benchmarks import report
from benchmarks.engine import LLAMA_8B, REHEARSAL, Bench, Scale
from benchmarks.report import Cell
from cluster.config import WorkerConfig
from cluster.rank_host import COLLECTIVE_TIMEOUT_S, start_process
from cluster.rank_processes import RankProcesses
from core.clock import WallClock
from core.errors import PrfaasError
from core.request import ClusterId, Role, SamplingParams, SequenceId, SequenceSpec, WorkerId
from engine.config import EngineConfig
from engine.engine import Engine
from engine.model_loader import device_of
from engine.rank_group import RankGroup
from engine.rank_steps import RankLeader
from kv_transfer.config import KvTransferConfig

PARTS = ("tokens", "speed")
COLUMNS = {
    "degree": "ranks",
    "what": "what",
    "ms": "ms",
    "speedup": "times the first degree's speed",
    "forward": "layers",
}
SPEED = Scale(
    LLAMA_8B,
    {
        "max_batch_tokens": 8192,
        "max_batch_size": 64,
        "max_model_len": 16384,
        "prefix_cache": False,
        "num_pages": 6144,
    },
    ((1024,), (8192,), (1024,) * 8),
    ((1, 1024), (64, 1024)),
    0,
    (0, 0),
    0,
)
SMALL = replace(REHEARSAL, settings={**REHEARSAL.settings, "dtype": "float32"})
_NUM_PROMPTS, _NUM_NEW, _TOP = 8, 24, 20
_READY_S = 120.0


@dataclass(frozen=True)
class Seen:
    """What one degree gave in one part."""

    tokens: list[list[int]]
    top: list[dict[str, float]]  # of each prompt's first token: token id |-> log-probability
    ms: dict[str, float]
    forward: str
    device: str


def main(arguments: Sequence[str] | None = None) -> int:
    options = _parse(arguments)
    if options.child is not None:
        part, degree = options.child.split("/")
        seen = _measure(part, int(degree), options.rehearse)
        options.json.write_text(json.dumps(asdict(seen)))
        sys.stdout.flush()
        os._exit(0)  # NCCL's threads need not be waited for
    rows: list[dict[str, Cell]] = []
    figures: dict[str, float] = {}
    machine = dict(report.machine())
    for part in options.parts:
        first: Seen | None = None
        for degree in options.degrees:
            seen = _in_a_process(part, degree, options.rehearse)
            first = first or seen
            machine["device"] = seen.device
            for what, ms in seen.ms.items():
                speedup = first.ms[what] / ms
                rows.append({"degree": degree, "what": what, "ms": ms, "speedup": speedup, "forward": seen.forward})
                figures[f"{what.replace(' ', '_')}_ms_tp{degree}"] = ms
            if part == "tokens":
                differing = sum(a != b for a, b in zip(seen.tokens, first.tokens, strict=True))
                figures[f"answers_that_differ_tp{degree}"] = differing
            else:
                figures[f"largest_logprob_distance_tp{degree}"] = _distance(seen, first)
            result = report.Report("tensor_parallel", report.commit(), machine, rows, figures)
            if options.json is not None:
                options.json.parent.mkdir(parents=True, exist_ok=True)
                result.write_json(options.json)  # after each: a run may be cut short
    result.print_table(COLUMNS, f"one engine over several devices: {machine.get('device', '')}")
    return 0


def _in_a_process(part: str, degree: int, rehearse: bool) -> Seen:
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "seen.json"
        command = [
            sys.executable,
            "-m",
            "benchmarks.tensor_parallel",
            "--child",
            f"{part}/{degree}",
            "--json",
            str(out),
        ]
        subprocess.run(command + ["--rehearse"] * rehearse, check=True)
        return Seen(**json.loads(out.read_text()))


def _measure(part: str, degree: int, rehearse: bool) -> Seen:
    is_small = part == "tokens" or rehearse
    scale = SMALL if is_small else SPEED
    settings: dict[str, Any] = dict(scale.settings)
    if rehearse:
        settings |= {"device": "cpu", "threads": 1}
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "config.json").write_text(json.dumps(scale.config))
        clock = WallClock()
        began_at = clock.now()
        engine, stop = _engine(EngineConfig(**settings), f"dummy:{folder}", degree)
        ms: dict[str, float] = {}
        tokens, top = _answers(engine, scale)
        if part == "speed":
            ms["start"] = (clock.now() - began_at) * 1e3
            bench = Bench(engine, scale)
            for lengths in scale.prefills:
                name = f"prefill {len(lengths)}x{lengths[0]}"
                ms[name] = statistics.median(bench.prefill(lengths, 3)) * 1e3
            for batch, context in scale.decodes:
                ms[f"decode {batch}"] = statistics.median(bench.decode(batch, context)) * 1e3
        modes = engine.modes()
        compute = engine.model.compute
        stop()
    forward = f"{modes.attention}, {modes.forward} {modes.forward_reason}".strip()
    return Seen(tokens, top, ms, forward, f"{compute.num_devices} x {compute.device}")


def _engine(config: EngineConfig, model: str, degree: int) -> tuple[Engine, Callable[[], None]]:
    """An engine of so many ranks, as a worker makes it, and how its other ranks end."""
    if degree == 1:
        return Engine.load_model(config, model, WallClock()), lambda: None
    told = WorkerConfig(
        WorkerId("bench"),
        ClusterId("bench"),
        Role.DECODE,
        model,
        "~/.cache/prfaas/models",
        config,
        KvTransferConfig(host="127.0.0.1"),
        "127.0.0.1",
        (),
        tensor_parallel=degree,
    )
    ranks = RankProcesses(told, start_process, _end)
    ranks.start()
    ranks.lines.start()
    group = RankGroup.join(0, degree, ranks.meeting, device_of(config), COLLECTIVE_TIMEOUT_S)
    engine = Engine.load_model(config, model, WallClock(), leader=RankLeader(group, ranks.lines.send_all))
    ranks.wait_ready(_READY_S)
    return engine, ranks.stop


def _end(error: PrfaasError) -> None:
    sys.stderr.write(f"{error}\n")
    os._exit(1)


def _answers(engine: Engine, scale: Scale) -> tuple[list[list[int]], list[dict[str, float]]]:
    """Greedy tokens of some prompts, and what was likely at the first of them."""
    dice = random.Random(3)
    sampling = SamplingParams(max_tokens=_NUM_NEW, temperature=0.0, ignore_eos=True, logprobs=_TOP)
    tokens: dict[str, list[int]] = {}
    top: dict[str, dict[str, float]] = {}
    for number in range(_NUM_PROMPTS):
        prompt = tuple(dice.randrange(engine.model.vocab_size) for _ in range(5 + 11 * number))
        engine.add(SequenceSpec(SequenceId(f"answer-{number}"), prompt, sampling))
        tokens[f"answer-{number}"] = []
    while engine.has_work:
        output = engine.step()
        if output.failures:
            raise RuntimeError(output.failures[0].message)
        for chunk in output.chunks:
            tokens[chunk.sequence_id] += chunk.token_ids
            if chunk.sequence_id not in top and chunk.logprobs:
                first = chunk.logprobs[0]
                top[chunk.sequence_id] = {str(token): logprob for token, logprob in first.top}
    return list(tokens.values()), [top[name] for name in tokens]


def _distance(seen: Seen, first: Seen) -> float:
    pairs = zip(seen.top, first.top, strict=True)
    return max(abs(a[token] - b[token]) for a, b in pairs for token in a.keys() & b.keys())


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.tensor_parallel", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--degrees", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--json", type=Path, help="write the result there too")
    parser.add_argument("--rehearse", action="store_true", help="the small model, on CPU")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    return parser.parse_args(arguments)


if __name__ == "__main__":
    sys.exit(main())
