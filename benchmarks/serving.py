"""How does the default service compare with transformers and with vLLM, on this machine, in the same run?

    python -m benchmarks.serving --json FILE [--vllm-python VENV/bin/python] [--arms ours,transformers] [--quick]
                                 [--dtype float32]

The same requests (SmolLM2-135M, prompts of 32-256 tokens, 64 new ones, greedy) go at concurrency 1, 8 and 32 to each
arm, one arm after another:

    ours        `prfaas serve CONFIG`, prefill and decode in processes of their own, called over HTTP, token ids in,
                streamed (the first token is the prefill worker's, so TTFT is before the hand-over, TPOT contains it)
    static      transformers.generate on one left-padded batch, in process
    continuous  transformers' generate_batch, in process
    vllm        vLLM's server for CPU, called by the same client as ours

``throughput_ratio_cN`` is ours over the better of the two transformers modes, ``vllm_ratio_cN`` ours over vLLM.
What tokens/s, TTFT and TPOT mean: benchmarks/measurement.py. Which requests: benchmarks/workload.py.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from benchmarks import arms, report
from benchmarks.measurement import WaveTimes, row
from benchmarks.orderly_exit import exit_on_sigterm
from benchmarks.report import Cell
from benchmarks.workload import Wave, waves
from cluster.config import ServiceConfig, load_config

CONCURRENCIES = (1, 8, 32)
TRANSFORMERS = ("static", "continuous")
COLUMNS = {
    "arm": "arm",
    "concurrency": "at once",
    "tokens_per_s": "tokens/s",
    "ttft_p50_s": "TTFT p50 s",
    "ttft_p90_s": "TTFT p90 s",
    "ttft_p99_s": "TTFT p99 s",
    "tpot_p50_s": "TPOT p50 s",
    "tpot_p90_s": "TPOT p90 s",
    "tpot_p99_s": "TPOT p99 s",
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the chosen arms, print the table, write the JSON."""
    options = _parser().parse_args(arguments)
    exit_on_sigterm()
    console = Console(stderr=True)
    config = load_config(options.config, options.set)
    model_folder = _model_folder(config)
    work = waves(model_folder, CONCURRENCIES, num_repeats=1 if options.quick else 3, num_new_tokens=64)
    rows: list[dict[str, Cell]] = []
    with tempfile.TemporaryDirectory(prefix="prfaas-bench-") as folder, _progress(console) as progress:
        for name in _chosen(options):
            arm = _arm(name, options, config.model_name, model_folder, Path(folder))
            rows += _measure(name, arm, work, progress)
    finished = report.Report("serving", report.commit(), report.machine(), rows, figures(rows))
    finished.print_table(
        COLUMNS, f"{config.model_name}, {options.dtype}, 32-256 tokens in, 64 out, {finished.commit[:12]}"
    )
    if options.json:
        finished.write_json(options.json)
    return 0


def figures(rows: Iterable[Mapping[str, Cell]]) -> dict[str, float]:
    """The ratios of those arms that ran."""
    speed = {(row["arm"], row["concurrency"]): float(row["tokens_per_s"] or 0.0) for row in rows}
    ratios: dict[str, float] = {}
    for name, peers in (("throughput_ratio", TRANSFORMERS), ("vllm_ratio", ("vllm",))):
        for concurrency in CONCURRENCIES:
            ran = [speed[peer, concurrency] for peer in peers if (peer, concurrency) in speed]
            if ran and ("ours", concurrency) in speed:
                ratios[f"{name}_c{concurrency}"] = speed["ours", concurrency] / max(ran)
    return ratios


def _measure(name: str, arm: arms.Arm, work: Sequence[Wave], progress: Progress) -> list[dict[str, Cell]]:
    """Start ``arm``, send it every wave, stop it; a row for each concurrency."""
    task = progress.add_task(f"{name}: starting", total=len(work))
    measured: dict[int, list[WaveTimes]] = {}
    with arm as running:
        for wave in work:
            kind = "" if wave.measured else ", warm-up"
            progress.update(task, description=f"{name}: {wave.concurrency} at once{kind}")
            times = running.run(wave)
            if wave.measured:
                measured.setdefault(wave.concurrency, []).append(times)
            progress.advance(task)
    progress.update(task, description=f"{name}: done")
    return [row(name, concurrency, repetitions) for concurrency, repetitions in measured.items()]


def _arm(name: str, options: argparse.Namespace, model_name: str, model_folder: Path, logs: Path) -> arms.Arm:
    if name == "ours":
        return arms.prfaas(options.config, [*options.set, f"engine.dtype={options.dtype}"], model_name, logs)
    if name == "vllm":
        return arms.vllm(options.vllm_python, model_folder, options.dtype, logs)
    return arms.transformers(name, model_folder, options.dtype, logs)


def _chosen(options: argparse.Namespace) -> list[str]:
    """The arms to run, in a fixed order."""
    named = set(options.arms.split(",")) if options.arms else {"ours", "transformers"}
    if options.vllm_python and not options.arms:
        named.add("vllm")
    if "transformers" in named:
        named = (named - {"transformers"}) | set(TRANSFORMERS)
    return [name for name in ("ours", *TRANSFORMERS, "vllm") if name in named]


def _model_folder(config: ServiceConfig) -> Path:
    """The plain weights that every arm reads; made if need be, in a process that gives its memory back."""
    command = [sys.executable, "-m", "engine.model_source", config.model, "--cache-dir", config.model_cache_dir]
    return Path(subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout.strip())


def _progress(console: Console) -> Progress:
    columns = (TextColumn("{task.description:<32}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    return Progress(*columns, console=console)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.serving", description=(__doc__ or "").partition("\n")[0]
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the report there")
    parser.add_argument("--config", type=Path, default=Path("deploy/examples/laptop.yaml"), help="the service's YAML")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="override one of its keys")
    parser.add_argument("--vllm-python", type=Path, metavar="PATH", help="python of an environment that holds vLLM")
    parser.add_argument("--arms", metavar="A,B", help="of ours, transformers (static, continuous), vllm")
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16", help="of every arm")
    parser.add_argument("--quick", action="store_true", help="one repetition instead of three")
    return parser


if __name__ == "__main__":
    sys.exit(main())
