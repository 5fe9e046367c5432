"""How fast does K/V travel, beside what others do with the same bytes on the same path in the same run?

    python -m benchmarks.kv_transfer [--json FILE] [--quick] [--only loopback|shaped|delay]

The K/V of a 2,048- and a 32,768-token prompt of an 8B model (kv_prompt.py: 0.25 and 4 GiB, 16-token pages, scrambled
page tables) goes from one process to another by each arm (kv_arms.py): on loopback, on a veth pair shaped to 1 and 10
Gbit/s, and on a shaped path that is 15 ms long each way (network_lab.py). Needs iperf3 (apt-get install iperf3) and,
for the shaped paths, root; what cannot run is a row that says why.

Arms take turns: a warm-up each with the short prompt, then rounds, each beginning with another arm, so that what the
machine does meanwhile falls on all; what our arms moved is compared with the source. GB/s is the median round's, 10^9
bytes of K/V a second; "of rate" is that over the shaped rate, of which Ethernet, IP and TCP headers leave at most
``payload_share`` of the row to payload.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path

from rich.console import Console

from benchmarks import report
from benchmarks.child_process import CallFailed, ChildBroken
from benchmarks.iperf import IperfServer
from benchmarks.kv_arms import SMALL, Arm, Iperf, Ours, Section, pair_name, sections
from benchmarks.kv_end import Moved
from benchmarks.kv_pair import Pair, Side
from benchmarks.kv_pools import Pools
from benchmarks.kv_prompt import count_wrong_pages, pool_bytes, scrambled
from benchmarks.kv_results import ArmTimes, figures, row
from benchmarks.network_lab import NetworkLab
from benchmarks.orderly_exit import exit_on_sigterm
from benchmarks.report import Cell
from cluster.certificates import Authority, write_files
from core.credentials import Credentials

_SOURCE_SEED = 1
_CHECKED_PAGES = 256  # compared in every layer after the warm-up and after the first round
_ARM_BUDGET_S = 15.0  # a slow arm has fewer rounds
COLUMNS = {
    "section": "path",
    "num_tokens": "tokens",
    "arm": "arm",
    "connections": "conns",
    "gbytes_per_s": "GB/s",
    "gbytes_per_s_min": "min",
    "gbytes_per_s_max": "max",
    "share_of_rate": "of rate",
    "cpu_s_per_gb": "CPU s/GB",
    "num_rounds": "rounds",
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the sections, print the table, write the JSON."""
    options = _parser().parse_args(arguments)
    exit_on_sigterm()  # processes and namespaces are taken down
    console = Console(stderr=True)
    chosen = sections(options.only, options.quick)
    pool_pages = max(section.prompt.num_pages for section in chosen)
    rows: list[dict[str, Cell]] = []
    with Pools(pool_pages) as pools, one_certificate() as credentials:
        for section in chosen:
            console.print(f"{section.name}, {section.prompt.num_tokens} tokens: {len(section.arms)} arms")
            times = _measure_section(section, pools, pool_pages, credentials, console)
            rows += [row(section, one) for one in times]
    finished = report.Report("kv_transfer", report.commit(), report.machine(), rows, figures(rows))
    finished.print_table(COLUMNS, f"K/V of an 8B model between two processes, {finished.commit[:12]}")
    for failed in rows:
        if failed["error"] is not None:
            console.print(f"failed: {failed['section']}, {failed['arm']} x{failed['connections']}: {failed['error']}")
    if options.json:
        finished.write_json(options.json)
    return 0


class _Stage:
    """A path with everything that runs on it; pairs of processes and the iperf3 server start when first needed."""

    def __init__(self, section: Section, pools: Pools, pool_pages: int, credentials: Credentials) -> None:
        self._pools = pools
        self._pool_pages = pool_pages
        self._credentials = credentials
        self._cleanup = ExitStack()
        self._pairs: dict[str, Pair] = {}  # by pair_name
        self._iperf: IperfServer | None = None
        if section.path is None:
            self._left, self._right = (Side(list, "127.0.0.1", fd) for fd in pools.fds)
        else:
            lab = self._cleanup.enter_context(NetworkLab(section.path))
            ends = zip((lab.left, lab.right), pools.fds, strict=True)
            self._left, self._right = (Side(end.command, end.address, fd) for end, fd in ends)

    def __enter__(self) -> _Stage:
        return self

    def __exit__(self, *exception: object) -> None:
        for pair in self._pairs.values():
            pair.close()
        if self._iperf is not None:
            self._iperf.close()
        self._cleanup.close()

    def run(self, arm: Arm, src_pages: tuple[int, ...], dst_pages: tuple[int, ...]) -> tuple[Moved, float | None]:
        """One repetition: what was measured, and the processor seconds of both ends where they are known."""
        if isinstance(arm, Iperf):
            if self._iperf is None:
                self._iperf = IperfServer(self._right.wrap, self._right.host)
            return self._iperf.run(self._left.wrap, len(src_pages) * pool_bytes(1), arm.connections), None
        pair = self._pair(arm)
        pair.resume()
        try:
            return pair.move(arm, src_pages, dst_pages, self._credentials if _uses_tls(arm) else None)
        except ChildBroken:
            self._pairs.pop(pair_name(arm)).close()
            raise
        finally:
            pair.pause()

    def _pair(self, arm: Arm) -> Pair:
        name = pair_name(arm)
        if name not in self._pairs:
            self._pairs[name] = Pair(self._left, self._right, self._pool_pages, arm.environment)
        return self._pairs[name]


def _uses_tls(arm: Arm) -> bool:
    return isinstance(arm, Ours) and arm.tls


def _measure_section(
    section: Section, pools: Pools, pool_pages: int, credentials: Credentials, console: Console
) -> list[ArmTimes]:
    """Every arm's rounds; an arm that failed says why and sits out the rest."""
    times = [ArmTimes(arm) for arm in section.arms]
    src_pages = scrambled(section.prompt.num_pages, pool_pages, _SOURCE_SEED)
    deadline = time.monotonic() + section.budget_s
    try:
        stage = _Stage(section, pools, pool_pages, credentials)
    except (RuntimeError, OSError) as error:
        return [replace(one, error=str(error)) for one in times]
    with stage:
        for number in range(section.num_rounds + 1):
            first = number % len(times)
            for i in [*range(first, len(times)), *range(first)]:
                spent = sum(moved.seconds for moved in times[i].rounds)
                enough = bool(times[i].rounds) and (time.monotonic() > deadline or spent > _ARM_BUDGET_S)
                if times[i].error is None and not enough:
                    pages = src_pages if number else src_pages[: SMALL.num_pages]
                    times[i] = _one_round(stage, times[i], number, pages, pools, pool_pages)
    return times


def _one_round(
    stage: _Stage, times: ArmTimes, number: int, src_pages: tuple[int, ...], pools: Pools, pool_pages: int
) -> ArmTimes:
    """``times`` with one more round, or with the reason why there is none; round 0 is the warm-up."""
    arm = times.arm
    # A table of its own for each round and arm, so that what an earlier one left does not pass for what arrived.
    dst_pages = scrambled(len(src_pages), pool_pages, f"{arm.name} {arm.connections} {number}")
    try:
        moved, cpu_s = stage.run(arm, src_pages, dst_pages)
    except (CallFailed, RuntimeError, OSError, TimeoutError) as error:
        return replace(times, error=str(error))
    if number:
        times = times.add(moved, cpu_s)
    if number > 1 or not isinstance(arm, Ours):
        return times
    step = max(1, len(src_pages) // _CHECKED_PAGES)
    wrong = count_wrong_pages(pools.source, pools.target, pool_pages, src_pages, dst_pages, arm.lossy, step)
    return replace(times, error=f"{wrong} pages arrived wrong") if wrong else times


@contextmanager
def one_certificate() -> Iterator[Credentials]:
    """Files of mutual TLS for both ends, gone after the block."""
    with tempfile.TemporaryDirectory(prefix="prfaas-bench-") as folder:
        yield write_files(Path(folder) / "tls", Authority.create("benchmark", days=1).issue("benchmark", days=1))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.kv_transfer", description=(__doc__ or "").partition("\n")[0]
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the report there")
    parser.add_argument("--quick", action="store_true", help="one round, fewer arms, the short prompt alone")
    parser.add_argument("--only", choices=("loopback", "shaped", "delay"), help="one kind of path")
    return parser


if __name__ == "__main__":
    sys.exit(main())
