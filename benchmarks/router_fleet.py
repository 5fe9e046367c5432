"""A fleet as a gateway sees it, and one decision after another on it: a view, a match, a route, and what it changes.

Worker i of benchmarks/fleet_history.py is ``worker-i``, even ones prefill. Every decision is made on a new view, as in
life: the workers of the decision before have one more sequence, and some have reported since.
"""

from __future__ import annotations

import random
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field

from benchmarks.fleet_history import PAGE_TOKENS, Prompt
from benchmarks.router_peers import PlainIndex, choose
from cluster.cost_model import CostModel, Roofline
from cluster.live_view import LiveView
from cluster.prefix_index import PrefixIndex
from cluster.routing_policy import RouteRequest, RoutingPolicy
from cluster.view import NO_OFFLOAD, ClusterView, ModelInfo, WorkerLoad, WorkerView
from core.fingerprint import CacheFingerprint
from core.link import ProbeReport
from core.request import ClusterId, EngineId, RequestId, Role, WorkerId

REPORTS_PER_DECISION = 8  # 1,000 workers that report 4 times a second, 500 decisions a second
_ASSIGNED_FOR = 200  # decisions later a sequence has ended
_LEASE_S = 1e6

MODEL = ModelInfo(
    architecture="LlamaForCausalLM",
    fingerprint=CacheFingerprint("8b", "r", "bfloat16", PAGE_TOKENS, "l"),
    max_model_len=131_072,
    vocab_size=128_256,
    eos_token_ids=(0,),
    kv_bytes_per_token=131_072,
)
PROFILE = "8b on a GPU"
# An 8B model on a device of 400 TFLOP/s and 3 TB/s.
ROOFLINE = Roofline(16e9, 0.5e6, 16e9, 131_072, 400e12, 3e12)


def engine_id(worker: int) -> EngineId:
    return EngineId(f"worker-{worker:04}-engine")


@dataclass
class Timings:
    """Seconds of each decision, in order."""

    view_s: list[float] = field(default_factory=list)
    match_s: list[float] = field(default_factory=list)
    route_s: list[float] = field(default_factory=list)

    @property
    def decision_s(self) -> list[float]:
        """Who caches it, and where does it go."""
        return [match + route for match, route in zip(self.match_s, self.route_s, strict=True)]


class Fleet:
    """The workers and their loads."""

    def __init__(self, num_workers: int, seed: int = 0) -> None:
        self._draw = random.Random(seed)
        costs = CostModel()
        costs.add_profile(PROFILE, ROOFLINE)
        self._costs = costs.view()
        self._live = LiveView(self_test=True)
        self._loads = [self._load() for _ in range(num_workers)]
        self._num_assigned = [0] * num_workers
        self._names = [
            (WorkerId(f"worker-{i:04}"), engine_id(i), f"10.0.{i // 256}.{i % 256}:5000") for i in range(num_workers)
        ]
        self._assigned: deque[tuple[int, ...]] = deque()
        self._index_of = {engine: index for index, (_, engine, _) in enumerate(self._names)}
        self._now = 0.0
        self._changed = set(range(num_workers))  # since the last view
        self.view()
        tested = ProbeReport("tcp", num_bytes=1, exact=True)
        for prefill, _, _ in self._names[0::2]:
            for decode, _, _ in self._names[1::2]:
                self._live.note_probe(prefill, decode, tested, 0.0)

    def view(self) -> ClusterView:
        """A new one, as cluster/membership.py makes it: of what it keeps of each worker."""
        self._now += 0.002
        for index in self._changed:
            self._live.put(self._worker(index), (), self._now)
        self._changed.clear()
        return self._live.view(self._now, self._costs, NO_OFFLOAD)

    def assign(self, *engines: EngineId | None) -> None:
        """They have a sequence more; an old one ends; some other workers report."""
        chosen = tuple(self._index_of[engine] for engine in engines if engine is not None)
        self._assigned.append(chosen)
        ended = self._assigned.popleft() if len(self._assigned) > _ASSIGNED_FOR else ()
        for indices, change in ((chosen, 1), (ended, -1)):
            for index in indices:
                self._num_assigned[index] += change
                self._changed.add(index)
        for _ in range(REPORTS_PER_DECISION):
            self.report()

    def report(self) -> None:
        """One worker tells its load."""
        index = self._draw.randrange(len(self._names))
        self._loads[index] = self._load()
        self._changed.add(index)

    def _worker(self, index: int) -> WorkerView:
        worker_id, engine, address = self._names[index]
        return WorkerView(
            worker_id=worker_id,
            engine_id=engine,
            cluster_id=ClusterId("here"),
            address=address,
            role=Role.DECODE if index % 2 else Role.PREFILL,
            draining=False,
            lease_expires_at=_LEASE_S,
            model=MODEL,
            transport="tcp",
            pages_total=40_000,
            load=self._loads[index],
            num_assigned=self._num_assigned[index],
            profile=PROFILE,
        )

    def _load(self) -> WorkerLoad:
        draw = self._draw
        return WorkerLoad(
            num_running=draw.randrange(32),
            num_waiting=draw.randrange(4),
            num_waiting_tokens=draw.randrange(20_000),
            pages_free=draw.randrange(1000, 20_000),
        )


def decide(fleet: Fleet, index: PrefixIndex, policy: RoutingPolicy, prompts: Sequence[Prompt]) -> Timings:
    """Place every prompt."""
    timings = Timings()
    for ordinal, prompt in enumerate(prompts):
        hashes = prompt.hashes()
        began_at = time.perf_counter()
        view = fleet.view()
        viewed_at = time.perf_counter()
        matches = {PAGE_TOKENS: index.match(hashes)} if policy.uses_prefixes else {}
        matched_at = time.perf_counter()
        request = RouteRequest(RequestId("r"), len(hashes) * PAGE_TOKENS, ordinal, matches=matches)
        route = policy.route(request, view)
        routed_at = time.perf_counter()
        _note(timings, began_at, viewed_at, matched_at, routed_at)
        fleet.assign(route.prefill.engine_id if route.prefill is not None else None, route.decode.engine_id)
    return timings


def decide_plainly(fleet: Fleet, index: PlainIndex, prompts: Sequence[Prompt]) -> Timings:
    """The same with a plain index and a look at every worker."""
    timings = Timings()
    for prompt in prompts:
        hashes = prompt.hashes()
        began_at = time.perf_counter()
        view = fleet.view()
        prefill, decode = view.ready(Role.PREFILL), view.ready(Role.DECODE)
        viewed_at = time.perf_counter()
        depths = index.depths(hashes)
        matched_at = time.perf_counter()
        chosen = choose(prefill, decode, depths, len(hashes) * PAGE_TOKENS, PAGE_TOKENS)
        routed_at = time.perf_counter()
        _note(timings, began_at, viewed_at, matched_at, routed_at)
        fleet.assign(*(worker.engine_id for worker in chosen))
    return timings


def _note(timings: Timings, began_at: float, viewed_at: float, matched_at: float, routed_at: float) -> None:
    timings.view_s.append(viewed_at - began_at)
    timings.match_s.append(matched_at - viewed_at)
    timings.route_s.append(routed_at - matched_at)
