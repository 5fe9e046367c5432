"""Do `prfaas bench` and a stock load generator say the same of the same run?

    python3.11 -m venv VENV && VENV/bin/pip install aiperf==0.13.0
    python -m benchmarks.load_generators --aiperf VENV/bin/aiperf --json FILE [--runs scripted,service]

NVIDIA's AIPerf sends its requests through a proxy that times what passes (benchmarks/recording_proxy.py), and the
metrics of `prfaas bench` are computed from that: the same requests, the same bytes, seen by both.

    one run, scripted   AIPerf on an endpoint whose token times are written down (benchmarks/scripted_endpoint.py)
    two runs, scripted  `prfaas bench` on the same script beside AIPerf's report: nothing is shared but the script
    one run, service    AIPerf on `prfaas serve` with the default model: chat over HTTP, real times

The two cannot see the same instants: a proxy stands between, and on two cores whoever does not run waits.
What is compared is TTFT and TPOT (AIPerf calls it inter token latency; both are (E2E - TTFT) / (tokens - 1)) at P50,
P90, P95 and P99; figures are the largest difference of each, in percent of AIPerf's value.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console

from benchmarks import report
from benchmarks.orderly_exit import exit_on_sigterm
from benchmarks.report import Cell
from benchmarks.scripted_endpoint import MODEL
from cluster.bench.client_record import ClientRecord
from cluster.bench.metrics import summary
from cluster.config import ServiceConfig, load_config
from cluster.service_process import ServiceProcess, free_ports, prfaas_service
from engine.model_source import resolve

RUNS = ("scripted", "service")
PERCENTS = (50, 90, 95, 99)
METRICS = {"TTFT": ("time_to_first_token", "ttft_s"), "TPOT": ("inter_token_latency", "tpot_s")}
COLUMNS = {
    "run": "run",
    "metric": "metric",
    "percentile": "percentile",
    "stock_ms": "AIPerf ms",
    "ours_ms": "prfaas bench ms",
    "difference_percent": "difference %",
}
_CONCURRENCY = 4
_PROMPT_TOKENS, _OUTPUT_TOKENS = 100, 32
_START_TIMEOUT_S, _RUN_TIMEOUT_S = 30.0, 600.0

Percentiles = Mapping[str, Mapping[int, float]]  # TTFT, TPOT |-> percent |-> milliseconds


@dataclass(frozen=True)
class _Run:
    """What a stock generator is asked to send."""

    url: str
    model: str
    tokenizer: Path
    num_requests: int


def main(arguments: Sequence[str] | None = None) -> int:
    """Run, print the table, write the JSON."""
    options = _parser().parse_args(arguments)
    exit_on_sigterm()
    console = Console(stderr=True)
    config = load_config(options.config, options.set)
    tokenizer = resolve(config.model, config.model_cache_dir).folder
    rows: list[dict[str, Cell]] = []
    with tempfile.TemporaryDirectory(prefix="prfaas-bench-") as name:
        folder = Path(name)
        if "scripted" in options.runs:
            rows += _of_the_script(options, tokenizer, folder, console)
        if "service" in options.runs:
            rows += _of_the_service(options, config, tokenizer, folder, console)
    finished = report.Report("load_generators", report.commit(), report.machine(), rows, figures(rows))
    title = f"AIPerf beside prfaas bench: {_CONCURRENCY} at once, {_OUTPUT_TOKENS} tokens out, {finished.commit[:12]}"
    finished.print_table(COLUMNS, title)
    if options.json:
        finished.write_json(options.json)
    return 0


def comparison(run: str, stock: Percentiles, ours: Percentiles) -> list[dict[str, Cell]]:
    """A row for each percentile of each metric."""
    return [
        {
            "run": run,
            "metric": metric,
            "percentile": f"P{percent}",
            "stock_ms": stock[metric][percent],
            "ours_ms": ours[metric][percent],
            "difference_percent": 100 * (ours[metric][percent] / stock[metric][percent] - 1),
        }
        for metric in METRICS
        for percent in PERCENTS
    ]


def figures(rows: Sequence[Mapping[str, Cell]]) -> dict[str, float]:
    """The largest difference of each metric in each run."""
    worst: dict[str, float] = {}
    for row in rows:
        name = f"{str(row['run']).replace(', ', '_').replace(' ', '_')}_{row['metric']}_percent".lower()
        worst[name] = max(worst.get(name, 0.0), abs(float(row["difference_percent"] or 0.0)))
    return worst


def seen_percentiles(lines: str) -> Percentiles:
    """Our metrics of a proxy's records."""
    records = [ClientRecord.from_dict(json.loads(line), "record") for line in lines.splitlines()]
    return _of_summary(summary(records))


def stock_percentiles(exported: Mapping[str, Any]) -> Percentiles:
    """AIPerf's own, of its profile_export_aiperf.json."""
    found: dict[str, dict[int, float]] = {}
    for metric, (name, _) in METRICS.items():
        assert exported[name]["unit"] == "ms", "AIPerf exports milliseconds"
        found[metric] = {percent: float(exported[name][f"p{percent}"]) for percent in PERCENTS}
    return found


def _of_summary(found: Mapping[str, Any]) -> Percentiles:
    return {
        metric: {percent: 1e3 * float(found[key][f"p{percent}"]) for percent in PERCENTS}
        for metric, (_, key) in METRICS.items()
    }


def _both(aiperf: Path, run: _Run, endpoint: str | None, folder: Path) -> tuple[Percentiles, Percentiles]:
    """AIPerf's report of a run, and ours of the same one, through the proxy at ``run.url``."""
    if endpoint is not None:
        _post(f"{endpoint}/reset")
    _get(f"{run.url}/records")  # what others have left
    target = folder / f"aiperf-{run.model}"
    command = [str(aiperf), "profile", "-m", run.model, "--url", run.url, "--endpoint-type", "chat", "--streaming"]
    command += ["--tokenizer", str(run.tokenizer), "--isl", str(_PROMPT_TOKENS), "--osl", str(_OUTPUT_TOKENS)]
    command += ["--request-count", str(run.num_requests), "--concurrency", str(_CONCURRENCY)]
    command += ["--use-server-token-count", "--use-legacy-max-tokens", "--extra-inputs", "ignore_eos:true"]
    command += ["--artifact-dir", str(target), "--ui", "none"]
    finished = subprocess.run(command, capture_output=True, text=True, timeout=_RUN_TIMEOUT_S, check=False)
    if finished.returncode:
        raise SystemExit(
            f"{aiperf} ended with {finished.returncode}:\n{finished.stdout[-2000:]}{finished.stderr[-2000:]}"
        )
    exported = json.loads((target / "profile_export_aiperf.json").read_text(encoding="utf-8"))
    return stock_percentiles(exported), seen_percentiles(_get(f"{run.url}/records"))


def _ours(run: _Run, endpoint: str) -> Percentiles:
    """`prfaas bench` on the same script, by the same way."""
    _post(f"{endpoint}/reset")
    command = [sys.executable, "-m", "cluster", "bench", run.url, "--lengths", str(_PROMPT_TOKENS)]
    command += ["--output", str(_OUTPUT_TOKENS), "--requests", str(run.num_requests), "--warmup", "0"]
    command += ["--concurrency", str(_CONCURRENCY), "--json"]
    finished = subprocess.run(command, stdout=subprocess.PIPE, text=True, timeout=_RUN_TIMEOUT_S, check=True)
    (point,) = json.loads(finished.stdout)["points"]
    return _of_summary(point)


def _of_the_script(
    options: argparse.Namespace, tokenizer: Path, folder: Path, console: Console
) -> list[dict[str, Cell]]:
    with _scripted(folder) as endpoint, _proxied(endpoint, folder) as proxy:
        run = _Run(proxy, MODEL, tokenizer, options.requests)
        with console.status("AIPerf on the scripted endpoint"):
            stock, seen = _both(options.aiperf, run, endpoint, folder)
        with console.status("prfaas bench on the scripted endpoint"):
            ours = _ours(run, endpoint)
    return [*comparison("one run, scripted", stock, seen), *comparison("two runs, scripted", stock, ours)]


def _of_the_service(
    options: argparse.Namespace, config: ServiceConfig, tokenizer: Path, folder: Path, console: Console
) -> list[dict[str, Cell]]:
    with (
        console.status("the service starts") as status,
        prfaas_service(options.config, options.set, folder / "service.log") as doors,
        _proxied(doors.http_url, folder) as proxy,
    ):
        status.update("AIPerf on the service")
        run = _Run(proxy, config.model_name, tokenizer, options.requests)
        return comparison("one run, service", *_both(options.aiperf, run, None, folder))


@contextmanager
def _scripted(folder: Path) -> Iterator[str]:
    (port,) = free_ports(1)
    command = [sys.executable, "-m", "benchmarks.scripted_endpoint", str(port)]
    with _served(command, port, folder / "scripted.log") as url:
        yield url


@contextmanager
def _proxied(upstream: str, folder: Path) -> Iterator[str]:
    (port,) = free_ports(1)
    command = [sys.executable, "-m", "benchmarks.recording_proxy", str(port), upstream]
    with _served(command, port, folder / "proxy.log") as url:
        yield url


@contextmanager
def _served(command: Sequence[str], port: int, log: Path) -> Iterator[str]:
    url = f"http://127.0.0.1:{port}"
    with ServiceProcess(command, f"{url}/health", log) as service:
        service.wait_until_healthy(_START_TIMEOUT_S)
        yield url


def _get(url: str) -> str:
    with urllib.request.urlopen(url, timeout=_START_TIMEOUT_S) as response:
        return str(response.read().decode())


def _post(url: str) -> None:
    with urllib.request.urlopen(urllib.request.Request(url, method="POST"), timeout=_START_TIMEOUT_S):
        pass


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.load_generators", description=(__doc__ or "").partition("\n")[0]
    )
    parser.add_argument("--aiperf", type=Path, required=True, metavar="PATH", help="the command, of an own environment")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the report there")
    parser.add_argument("--config", type=Path, default=Path("deploy/examples/laptop.yaml"), help="the service's YAML")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="override one of its keys")
    parser.add_argument("--requests", type=int, default=60, help="of each run (default 60)")
    parser.add_argument("--runs", type=_runs, default=RUNS, metavar="A,B", help=f"of {', '.join(RUNS)} (default: all)")
    return parser


def _runs(text: str) -> tuple[str, ...]:
    chosen = tuple(text.split(","))
    if not set(chosen) <= set(RUNS):
        raise argparse.ArgumentTypeError(f"must be some of {', '.join(RUNS)}, got {text!r}")
    return chosen


if __name__ == "__main__":
    sys.exit(main())
