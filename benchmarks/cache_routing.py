"""What does knowing the caches give? Random, load-only, local-cache and global-cache routing on traces that share
prefixes, in mean TTFT and hit rate, against an endless cache.

    python -m benchmarks.cache_routing [--json FILE] [--traces DIR] [--requests N] [--users N] [--rate R]
                                       [--workers N]

    random        any prefill and any decode worker
    load          the fewest tokens ahead (``least_loaded``)
    local cache   predicted seconds, each worker's own cache counted (``prfaas`` without pulls)
    global cache  likewise, and cached pages are fetched from whoever has them (``prfaas``)

Prefill and decode workers (eight of each) of Llama-3.1-8B on one H100 each, by the roofline. Conversations: Mooncake's,
open loop at its own instants, spread over their grid of 3 s, or stretched to a rate. Coding sessions: a closed loop of
users that think, of whom none leaves for longer than half a minute (the trace has users that come back the next day,
when no cache is left).
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from benchmarks.report import Cell, Report, commit, machine
from benchmarks.simulation_runs import run_all, shared_traces
from cluster.catalogue import load_catalogue
from cluster.config import RouterConfig
from cluster.roofline import Instance
from cluster.routing_policy import RouteRequest, RoutingPolicy
from cluster.simulator.hand_over import KvShape
from cluster.simulator.host import WorkerKind
from cluster.simulator.planned_scenario import UNBOUNDED
from cluster.simulator.result_report import result_as_dict
from cluster.simulator.scenario import ClusterSpec, Scenario
from cluster.simulator.step_cost import RooflineCost
from cluster.simulator.workload import USERS, ArrivalPlan, from_trace
from cluster.simulator.world import simulate
from cluster.view import ClusterView, ModelInfo, Route
from cluster.workload_traces import TraceRequest, read_trace, uncached_tokens
from core.compute import ComputeProfile
from core.fingerprint import CacheFingerprint
from core.request import ClusterId, Role
from engine.config import EngineConfig

_COLUMNS = {
    "trace": "trace",
    "routing": "routing",
    "ttft_mean_s": "TTFT mean s",
    "ttft_p90_s": "TTFT P90 s",
    "hit_rate": "hit rate",
    "ideal_hit_rate": "endless cache",
    "share_of_ideal": "of it",
    "shipped_gb": "shipped GB",
    "pulled_gb": "pulled GB",
}
_LONGEST = 131_072
_LONGEST_THINK_S = 30.0
CODING = "coding sessions"
# name |-> tokens of a block, file
TRACES: Mapping[str, tuple[int, str]] = {
    "mooncake conversation": (512, "mooncake_conversation_0000-1800s.jsonl.gz"),
    CODING: (64, "claudecode_sessions_A.jsonl.gz"),
}
ROUTINGS = ("random", "load", "local cache", "global cache")


@dataclass(frozen=True)
class AnyWorker:
    """Any prefill and any decode worker, by the request's ordinal."""

    uses_prefixes: bool = False

    def route(self, request: RouteRequest, view: ClusterView) -> Route:
        """Equal arguments give equal routes: the ordinal is scrambled, not drawn."""
        prefill, decode = view.ready(Role.PREFILL), view.ready(Role.DECODE)
        scrambled = (request.ordinal + 1) * 2654435761 % 2**32
        return Route(prefill[scrambled % len(prefill)], decode[scrambled // 7 % len(decode)], "random")


@dataclass(frozen=True)
class Run:
    """One way of routing on one trace."""

    trace: str
    routing: str
    folder: Path
    num_requests: int
    num_users: int
    rate_rps: float | None  # None: the trace's own
    num_workers: int = 8  # of each role


def main() -> int:
    """Simulate, print, and write the JSON if asked."""
    options = _parser().parse_args()
    if options.traces is None:
        print("there is no folder shared/traces here or beside the repository: name it with --traces", file=sys.stderr)
        return 2
    tasks = [
        Run(trace, routing, options.traces, options.requests, options.users, options.rate, options.workers)
        for trace in TRACES
        for routing in ROUTINGS
    ]
    rows = run_all(row_of, tasks, options.processes)
    figures = {
        f"{name}_{trace.split()[0]}": ratio(rows, trace, routing)
        for trace in TRACES
        for name, routing in (("global_vs_load", "load"), ("global_vs_local", "local cache"))
    }
    report = Report(benchmark="cache_routing", commit=commit(), machine=machine(), rows=rows, figures=figures)
    report.print_table(_COLUMNS, "Routing by what caches hold")
    if options.json is not None:
        report.write_json(options.json)
    return 0


def row_of(run: Run) -> dict[str, Cell]:
    """Simulate one."""
    page_size, name = TRACES[run.trace]
    trace = whole_sessions(read_trace(run.folder / name), run.num_requests)
    if run.trace == CODING:
        trace = [replace(request, think_s=min(request.think_s, _LONGEST_THINK_S)) for request in trace]
        arrivals = ArrivalPlan(USERS, num_users=run.num_users)
    else:
        arrivals = ArrivalPlan(spread_s=3.0, rate_rps=run.rate_rps)
    scenario, policy = _routed(_scenario(page_size, run.num_workers), run.routing)
    workload = from_trace(trace, arrivals, max_tokens=_LONGEST)
    found = result_as_dict(simulate(scenario, workload, policy=policy), None, None)
    ideal = 1 - sum(uncached_tokens(trace)) / sum(request.input_tokens for request in trace)
    return {
        "trace": run.trace,
        "routing": run.routing,
        "ttft_mean_s": found["ttft_s"]["mean"],
        "ttft_p90_s": found["ttft_s"]["p90"],
        "hit_rate": found["hit_rate"],
        "ideal_hit_rate": ideal,
        "share_of_ideal": found["hit_rate"] / ideal if ideal else None,
        "shipped_gb": found["bytes_shipped"] / 1e9,
        "pulled_gb": found["bytes_pulled"] / 1e9,
        "num_requests": found["num_finished"],
        "virtual_s": found["seconds"],
    }


def whole_sessions(requests: Iterable[TraceRequest], count: int) -> list[TraceRequest]:
    """The first ``count`` requests, and the rest of the last one's session."""
    kept: list[TraceRequest] = []
    for request in requests:
        if len(kept) >= count and request.turn == 0:
            break
        kept.append(request)
    return kept


def _routed(scenario: Scenario, routing: str) -> tuple[Scenario, RoutingPolicy | None]:
    """The scenario under that way of routing; a policy of its own, or None: the one that the scenario names."""
    ways: Mapping[str, tuple[RouterConfig, RoutingPolicy | None]] = {
        "random": (scenario.router, AnyWorker()),
        "load": (replace(scenario.router, policy="least_loaded"), None),
        "local cache": (replace(scenario.router, policy="prfaas", colocate="never", pulls=False), None),
        "global cache": (replace(scenario.router, policy="prfaas", colocate="never"), None),
    }
    router, policy = ways[routing]
    return replace(scenario, router=router), policy


def _scenario(page_size: int, num_workers: int) -> Scenario:
    catalogue = load_catalogue()
    shape = catalogue.model("llama-3.1-8b")
    instance = Instance(shape, catalogue.device("h100"), 1)
    num_pages = int(instance.kv_capacity_bytes() / shape.kv_bytes_per_token / page_size)
    fingerprint = CacheFingerprint("llama-3.1-8b", "published", "bfloat16", page_size, "gqa")
    kind = WorkerKind(
        cost=RooflineCost(instance),
        engine=EngineConfig(page_size=page_size, num_pages=num_pages, max_batch_tokens=8192, max_batch_size=64),
        kv=KvShape(shape.kv_bytes_per_token, 0.0, shape.num_layers),
        model=ModelInfo("llama", fingerprint, _LONGEST + 8192, 1 << 62, (), int(shape.kv_bytes_per_token), 32),
        compute=ComputeProfile(device="h100"),
    )
    return Scenario(
        (ClusterSpec(ClusterId("here"), kind, num_workers, num_workers),),
        router=RouterConfig(max_inflight=1_000_000),
        admission=UNBOUNDED,
    )


def ratio(rows: Sequence[dict[str, Cell]], trace: str, routing: str) -> float:
    """Mean TTFT of another way over that of the global cache."""
    means = {str(row["routing"]): float(row["ttft_mean_s"] or 0.0) for row in rows if row["trace"] == trace}
    return means[routing] / means["global cache"]


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.cache_routing", description=(__doc__ or "").partition("\n\n")[0]
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the report there")
    parser.add_argument("--traces", type=Path, metavar="DIR", default=shared_traces(), help="the shared traces")
    parser.add_argument("--requests", type=int, default=1000, help="of each trace")
    parser.add_argument("--users", type=int, default=64, help="of the coding sessions")
    parser.add_argument("--rate", type=float, help="requests/s of the conversations; the trace's own")
    parser.add_argument("--workers", type=int, default=8, help="of each role")
    parser.add_argument("--processes", type=int, metavar="N", help="at once; as many as there are cores")
    return parser


if __name__ == "__main__":
    sys.exit(main())
