"""How long does a gateway think about where a prompt goes, and how many page events does it take in meanwhile?

    python -m benchmarks.router [--json FILE] [--quick] [--pages N] [--workers 10,100,1000]

A made-up fleet (benchmarks/fleet_history.py) caches 10 million pages of 16 tokens; prompts have 32K tokens. Each number
of workers is measured in a process of its own, on one core:

    index       from the bytes of a Watch report to the index: parsed, turned into ``PageEvents``, applied. Bytes for a
                page: what the process grew by while the index filled
    decision    looking the prompt up in the index, and the policy's route, for each policy; the view, which must be
                made before, apart; and so is hashing the prompt
    plain       the same with what is obvious (benchmarks/router_peers.py), on a tenth of the pages, beside our index
                with as many
"""

from __future__ import annotations

import argparse
import gc
import multiprocessing
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path

import psutil
from rich.console import Console

from benchmarks import report
from benchmarks.fleet_history import PAGE_TOKENS, FleetHistory
from benchmarks.report import Cell, percentile
from benchmarks.router_fleet import Fleet, Timings, decide, decide_plainly, engine_id
from benchmarks.router_peers import PLAIN_INDEXES, PlainIndex
from cluster.prefix_index import PrefixIndex
from cluster.routing_policy import POLICIES, make_policy
from core.prefix_hash import page_hashes
from protos import worker_pb2 as pb
from protos.wire import page_events_from_message, page_events_to_message

NUM_WORKERS = (10, 100, 1000)
NUM_PAGES, NUM_PAGES_QUICK = 10_000_000, 20_000
PROMPT_PAGES = 2048  # 32K tokens
REPORT_SIZES = (2, 50, 1000)  # page events; 1,000 workers that report 4 times a second send 200,000 events/s in 50s
FIGURE_SIZE = 50
PLAIN_SHARE = 10  # of the pages: a dict of sets of all would take gigabytes
OURS = "prefix_index"
HEADLINE = "prfaas" if "prfaas" in POLICIES else "cache_aware"  # the policy that looks at most

_Rows = list[dict[str, Cell]]

INDEX_COLUMNS = {
    "num_workers": "workers",
    "index": "index",
    "num_pages": "pages",
    "num_holdings": "x holders",
    "bytes_per_page": "bytes/page",
    "fill_events_per_s": "filled at events/s",
    **{f"events_per_s_{size}": f"events/s in {size}s" for size in REPORT_SIZES},
    "decode_share": "of it decoding",
    "report_us_p99": "report p99 µs",
}
DECISION_COLUMNS = {
    "num_workers": "workers",
    "index": "index",
    "num_pages": "pages",
    "policy": "policy",
    "match_us_p50": "match p50 µs",
    "route_us_p50": "route p50 µs",
    "decision_us_p50": "decision p50 µs",
    "decision_us_p99": "p99 µs",
    "view_us_p50": "view p50 µs",
    "num_levels": "levels",
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure every number of workers, print the tables, write the JSON."""
    options = _parser().parse_args(arguments)
    num_pages = options.pages or (NUM_PAGES_QUICK if options.quick else NUM_PAGES)
    work = _Work(num_decisions=50 if options.quick else 2000, num_events=5_000 if options.quick else 300_000)
    console = Console(stderr=True)
    rows: _Rows = []
    for num_workers in options.workers:
        rows += _apart(console, f"{num_workers} workers", _measure_ours, num_workers, num_pages, work)
    most = max(options.workers)
    few = replace(work, num_decisions=max(10, work.num_decisions // 10))
    rows += _apart(console, f"{OURS}, fewer pages", _measure_ours, most, num_pages // PLAIN_SHARE, few)
    for name in PLAIN_INDEXES:
        rows += _apart(console, name, _measure_plain, most, num_pages // PLAIN_SHARE, few, name)
    found = figures(rows, most, num_pages)
    finished = report.Report("router", report.commit(), report.machine(), rows, found | {"hash_us_32k": _hash_us()})
    for key, columns, title in (("bytes_per_page", INDEX_COLUMNS, "index"), ("policy", DECISION_COLUMNS, "decisions")):
        shown = [cells for cells in rows if key in cells]
        figure = finished.figures if key == "policy" else {}
        replace(finished, rows=shown, figures=figure).print_table(columns, f"{title}, {finished.commit[:12]}")
    if options.json:
        finished.write_json(options.json)
    return 0


def figures(rows: Iterable[Mapping[str, Cell]], num_workers: int, num_pages: int) -> dict[str, float]:
    """The numbers of issue 4, of the largest fleet with all pages. A decision is that of ``HEADLINE``."""
    found: dict[str, float] = {}
    for cells in rows:
        if (cells["index"], cells["num_workers"], cells["num_pages_wanted"]) != (OURS, num_workers, num_pages):
            continue
        fleet = f"{num_workers}w"
        if "bytes_per_page" in cells:
            found["index_bytes_per_page"] = float(cells["bytes_per_page"] or 0)
            found["events_per_s"] = float(cells[f"events_per_s_{FIGURE_SIZE}"] or 0)
        elif cells["policy"] == HEADLINE:
            found[f"decision_us_p50_{fleet}"] = float(cells["decision_us_p50"] or 0)
            found[f"decision_us_p99_{fleet}"] = float(cells["decision_us_p99"] or 0)
            found[f"view_us_{fleet}"] = float(cells["view_us_p50"] or 0)
    return found


@dataclass(frozen=True, slots=True)
class _Work:
    """How much is measured."""

    num_decisions: int
    num_events: int  # for each size of reports


def _apart(console: Console, title: str, measure: Callable[..., _Rows], *arguments: object) -> _Rows:
    """``measure`` in a process of its own, whose memory is then its own too."""
    began_at = time.monotonic()
    context = multiprocessing.get_context("spawn")
    with console.status(f"{title} ..."), ProcessPoolExecutor(1, context) as pool:
        rows = pool.submit(measure, *arguments).result()
    console.print(f"{title}: {time.monotonic() - began_at:.0f} s")
    return rows


def _measure_ours(num_workers: int, num_pages: int, work: _Work) -> _Rows:
    index = PrefixIndex()
    history = FleetHistory(num_workers, num_pages)
    shared: dict[str, Cell] = {"index": OURS, "num_workers": num_workers, "num_pages_wanted": num_pages}
    filled = _fill(index, history, num_workers)
    shared["num_pages"] = index.num_keys
    filled["bytes_per_page"] = filled.pop("grown_bytes") / index.num_keys
    rows: _Rows = [shared | filled | _absorb(index, history, work.num_events)]
    fleet = Fleet(num_workers)
    for name in POLICIES:
        prompts = history.prompts(work.num_decisions, PROMPT_PAGES)
        timings = decide(fleet, index, make_policy(name), prompts)
        levels = sum(len(index.match(prompt.hashes()).levels) for prompt in prompts) / len(prompts)
        rows.append(shared | {"policy": name, "num_levels": levels} | _percentiles(timings))
    return rows


def _measure_plain(num_workers: int, num_pages: int, work: _Work, name: str) -> _Rows:
    index = PLAIN_INDEXES[name]()
    history = FleetHistory(num_workers, num_pages)
    shared: dict[str, Cell] = {"index": name, "num_workers": num_workers, "num_pages_wanted": num_pages}
    filled = _fill(index, history, num_workers)
    shared["num_pages"] = history.num_pages
    filled["bytes_per_page"] = filled.pop("grown_bytes") / history.num_pages
    timings = decide_plainly(Fleet(num_workers), index, history.prompts(work.num_decisions, PROMPT_PAGES))
    return [
        shared | filled | _absorb(index, history, work.num_events),
        shared | {"policy": "look at each"} | _percentiles(timings),
    ]


def _fill(index: PrefixIndex | PlainIndex, history: FleetHistory, num_workers: int) -> dict[str, float]:
    """Let the fleet's history happen; the process must do nothing else meanwhile."""
    if isinstance(index, PrefixIndex):
        for worker in range(num_workers):
            index.add_worker(engine_id(worker))
    gc.collect()
    before, spent_s, num_events, num_holdings = psutil.Process().memory_info().rss, 0.0, 0, 0
    for told in history.fill():
        began_at = time.perf_counter()
        index.apply(engine_id(told.worker), told.events)
        spent_s += time.perf_counter() - began_at
        num_events += told.num_events
        num_holdings += len(told.events.stored) - len(told.events.removed)
    gc.collect()
    return {
        "grown_bytes": psutil.Process().memory_info().rss - before,
        "num_holdings": num_holdings,
        "fill_events_per_s": num_events / spent_s,
    }


def _absorb(index: PrefixIndex | PlainIndex, history: FleetHistory, num_events: int) -> dict[str, Cell]:
    """Events/s of a fleet in which as much is evicted as is stored, for each size of reports."""
    cells: dict[str, Cell] = {}
    for size in REPORT_SIZES:
        told = list(islice(history.churn(size), max(1, num_events // size)))
        messages = [page_events_to_message(one.events).SerializeToString() for one in told]
        names = [engine_id(one.worker) for one in told]
        decoding_s, seconds = 0.0, []
        for name, message in zip(names, messages, strict=True):
            began_at = time.perf_counter()
            events = page_events_from_message(pb.PageEvents.FromString(message))
            decoded_at = time.perf_counter()
            index.apply(name, events)
            ended_at = time.perf_counter()
            decoding_s += decoded_at - began_at
            seconds.append(ended_at - began_at)
        cells[f"events_per_s_{size}"] = sum(one.num_events for one in told) / sum(seconds)
        if size == FIGURE_SIZE:
            cells["decode_share"] = decoding_s / sum(seconds)
            cells["report_us_p99"] = _us(seconds, 99)
    return cells


def _percentiles(timings: Timings) -> dict[str, Cell]:
    return {
        "match_us_p50": _us(timings.match_s, 50),
        "route_us_p50": _us(timings.route_s, 50),
        "decision_us_p50": _us(timings.decision_s, 50),
        "decision_us_p99": _us(timings.decision_s, 99),
        "view_us_p50": _us(timings.view_s, 50),
        "view_us_p99": _us(timings.view_s, 99),
    }


def _us(seconds: Sequence[float], percent: float) -> float | None:
    value = percentile(seconds, percent)
    return None if value is None else value * 1e6


def _hash_us() -> float:
    """Microseconds to hash a prompt of 32K tokens, the median of a few."""
    tokens = tuple(range(PROMPT_PAGES * PAGE_TOKENS))
    seconds = []
    for _ in range(20):
        began_at = time.perf_counter()
        page_hashes(tokens, PAGE_TOKENS, b"tenant")
        seconds.append(time.perf_counter() - began_at)
    return _us(seconds, 50) or 0.0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.router", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the report there")
    parser.add_argument("--quick", action="store_true", help=f"{NUM_PAGES_QUICK} pages and few decisions")
    parser.add_argument("--pages", type=int, metavar="N", help=f"distinct pages in the index (default {NUM_PAGES})")
    parser.add_argument(
        "--workers",
        type=lambda text: [int(number) for number in text.split(",")],
        default=list(NUM_WORKERS),
        metavar="A,B",
        help="sizes of the fleet",
    )
    return parser


if __name__ == "__main__":
    sys.exit(main())
