"""A fleet that needs no process: workers, a link and requests on a virtual clock, in numbers that one can check.

Prompts take no time of their own; an answer takes ``TPOT_S`` a token. The K/V of what is offloaded goes over one link
of ``link_bytes_per_s``, watched by a real ``LinkMonitor`` as in a worker process, and heard of when the worker's Watch
stream would tell: each ``WATCH_S``.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

from cluster.config import PlannerConfig
from cluster.cost_model import ComputeCost, CostView, LinearCost
from cluster.demand import DemandMeter
from cluster.planner import Planner
from cluster.routing_policy import RouteRequest
from cluster.view import ClusterView, LinkView, ModelInfo, Offload, Route, WorkerLoad, WorkerView
from core.clock import VirtualClock
from core.errors import PeerLost
from core.fingerprint import CacheFingerprint
from core.link import LinkEstimate, ProbeReport
from core.request import ClusterId, EngineId, RequestId, Role, WorkerId
from kv_transfer.link_monitor import TICK_S, LinkMonitor
from kv_transfer.transport import LinkStats, PeerIdentity

STEP_S = 0.05
WATCH_S = TICK_S
TPOT_S = 0.02
KV_BYTES_PER_TOKEN = 10_000
HOME, AWAY = ClusterId("local"), ClusterId("east")
MODEL = ModelInfo("Fake", CacheFingerprint("fake", "r1", "float32", 16, "l1"), 100_000, 1000, (0,), KV_BYTES_PER_TOKEN)
COSTS = CostView(
    {
        # 0.1 ms a token: 2 local workers prefill 10 prompts of 2,000 tokens a second. A step of 20 sequences: 25 ms.
        "local": ComputeCost(LinearCost((0.0, 1e-4, 0.0)), LinearCost((0.005, 0.001, 0.0))),
        "fast": ComputeCost(LinearCost((0.0, 2e-5, 0.0)), LinearCost((0.005, 0.001, 0.0))),
    },
    {},
)


@dataclass
class Worker:
    """One worker; ``stuck`` ones never end what they had, ``refusing`` ones do not answer SetRole."""

    worker_id: str
    role: Role
    cluster_id: ClusterId = HOME
    load: WorkerLoad = field(default_factory=WorkerLoad)
    drain_s: float = 1.0
    stuck: bool = False
    refusing: bool = False
    alive: bool = True
    other_role_until: float = -math.inf
    told: list[Role] = field(default_factory=list)

    async def set_role(self, role: Role) -> None:
        self.told.append(role)
        if self.refusing:
            raise PeerLost(f"{self.worker_id}: no answer")
        self.role = role
        self.other_role_until = self.now() + (math.inf if self.stuck else self.drain_s)

    now: Callable[[], float] = lambda: 0.0

    def view(self, now: float) -> WorkerView:
        left = 3 if self.other_role_until > now else 0
        return WorkerView(
            worker_id=WorkerId(self.worker_id),
            engine_id=EngineId(f"{self.worker_id}-e"),
            cluster_id=self.cluster_id,
            address="nowhere",
            role=self.role,
            draining=False,
            lease_expires_at=math.inf,
            model=MODEL,
            transport="fake",
            pages_total=100_000,
            max_batch_size=20,
            load=WorkerLoad(**{name: getattr(self.load, name) for name in _LOADS}, num_other_role=left),
            profile="local" if self.cluster_id == HOME else "fast",
        )


_LOADS = ("num_running", "num_waiting", "num_waiting_tokens", "pages_free", "pages_cached", "num_sessions")


@dataclass
class Stream:
    """Requests that come evenly: ``rate_rps`` of them, lengths in turn, answers of ``output_tokens``."""

    rate_rps: float
    prompts: tuple[int, ...]
    output_tokens: int


class Fleet:
    """Implements what a planner needs of ``Membership``, and moves time."""

    def __init__(
        self,
        num_prefill: int,
        num_decode: int,
        *,
        num_away: int = 0,
        config: PlannerConfig | None = None,
        watch_s: float = WATCH_S,
    ) -> None:
        self.watch_s = watch_s
        self.clock = VirtualClock(100.0)
        self.workers = {
            name: Worker(name, role, cluster)
            for role, cluster, count, prefix in (
                (Role.PREFILL, HOME, num_prefill, "prefill"),
                (Role.DECODE, HOME, num_decode, "decode"),
                (Role.PREFILL, AWAY, num_away, "east/prefill"),
            )
            for index in range(count)
            for name in [f"{prefix}-{index}"]
        }
        for worker in self.workers.values():
            worker.now = self.clock.now
        self.costs = COSTS
        self.num_queued = 0
        self.num_missed: dict[Role, int] = {}
        self.retested: list[tuple[float, EngineId, EngineId]] = []
        self.offloads: list[tuple[float, Offload]] = []
        self.link_bytes_per_s = 1e9
        self.sent_bytes = 0.0
        self.queued_bytes = 0.0
        self.busy_s = 0.0
        self.demand = DemandMeter(self.clock, (config or PlannerConfig()).demand_window_s)
        self.planner = Planner(
            self,
            self.demand,
            self,
            config or PlannerConfig(),
            self.clock,
            cluster_id=HOME,
            capacity=lambda *_: 1e9,
            retest=self.retest,
        )
        self._running: list[tuple[float, int]] = []  # heap: (when it will have been answered, tokens)
        self._monitor = LinkMonitor(self.clock)
        self._watched: tuple[float, LinkEstimate | None] = (self.clock.now(), None)
        self._probe_due = False
        self._probe: tuple[ProbeReport | None, float] = (None, -math.inf)
        self._due = 0.0
        self._count = 0

    # ---- what the planner asks ----

    def view(self) -> ClusterView:
        now = self.clock.now()
        workers = tuple(w.view(now) for _, w in sorted(self.workers.items()) if w.alive)
        heard_at, estimate = self._watched
        links = {}
        for sender in workers:
            for receiver in workers:
                if sender.role is Role.PREFILL and receiver.role is Role.DECODE:
                    pair = sender.worker_id, receiver.worker_id
                    first = sender.worker_id == "east/prefill-0" and not any(key[0] == pair[0] for key in links)
                    probe, probed_at = self._probe if first else (None, -math.inf)
                    links[pair] = LinkView(
                        sender.worker_id,
                        sender.cluster_id,
                        receiver.worker_id,
                        receiver.cluster_id,
                        heard_at,
                        estimate if first else None,
                        probe,
                        probed_at=probed_at,
                    )
        return ClusterView(now, workers, links, self.costs)

    def client(self, engine_id: EngineId) -> Worker | None:
        return self.workers.get(engine_id.removesuffix("-e"))

    def note_offload(self, offload: Offload) -> None:
        self.offloads.append((self.clock.now(), offload))

    def retest(self, sender: EngineId, receiver: EngineId) -> None:
        """A self-test: 0.1 s of the link."""
        self.retested.append((self.clock.now(), sender, receiver))
        self.queued_bytes += 0.1 * self.link_bytes_per_s
        self._probe_due = True

    # ---- what happens ----

    @property
    def num_open_tokens(self) -> int:
        now = self.clock.now()
        return sum(int(tokens - (end - now) / TPOT_S) for end, tokens in self._running)

    @property
    def num_answering(self) -> int:
        return len(self._running)

    @property
    def threshold(self) -> float:
        return self.offloads[-1][1].threshold_tokens if self.offloads else math.inf

    @property
    def roles(self) -> tuple[int, int]:
        home = [w.role for w in self.workers.values() if w.cluster_id == HOME and w.alive]
        return home.count(Role.PREFILL), home.count(Role.DECODE)

    def run(self, seconds: float, stream: Stream | None = None) -> Iterator[float]:
        """Let so many seconds pass; yields after each look of the planner, when what it spawned may run."""
        end = self.clock.now() + seconds
        while self.clock.now() < end - 1e-9:
            for _ in range(round(self.watch_s / STEP_S)):
                self.clock.advance(STEP_S)
                self._arrive(stream)
                self._send()
                self._finish()
            self._monitor.tick([self._stats()] if self.workers.get("east/prefill-0") else [])
            (estimate, *_) = self._monitor.estimates() or (None,)
            self._watched = self.clock.now(), estimate
            if self._probe_due and not self.queued_bytes:
                num_bytes = int(0.1 * self.link_bytes_per_s)
                self._probe = ProbeReport("tcp", num_bytes, True, num_bytes, 0.1), self.clock.now()
                self._probe_due = False
            self.planner.look()
            yield self.clock.now()

    def _arrive(self, stream: Stream | None) -> None:
        if stream is None:
            return
        self._due += stream.rate_rps * STEP_S
        while self._due >= 1:
            self._due -= 1
            self._count += 1
            tokens = stream.prompts[self._count % len(stream.prompts)]
            worker = next(w for w in self.workers.values() if w.role is Role.DECODE).view(self.clock.now())
            request = RouteRequest(RequestId(f"r{self._count}"), tokens, self._count)
            self.demand.routed(request, Route(None, worker, "a test's"))
            heapq.heappush(self._running, (self.clock.now() + stream.output_tokens * TPOT_S, stream.output_tokens))
            if tokens > self.threshold:
                self.queued_bytes += tokens * KV_BYTES_PER_TOKEN

    def _send(self) -> None:
        sent = min(self.queued_bytes, self.link_bytes_per_s * STEP_S)
        self.queued_bytes -= sent
        self.sent_bytes += sent
        self.busy_s += sent / self.link_bytes_per_s

    def _finish(self) -> None:
        now = self.clock.now()
        while self._running and self._running[0][0] <= now:
            self.demand.ended(heapq.heappop(self._running)[1])

    def _stats(self) -> LinkStats:
        return LinkStats(
            PeerIdentity(WorkerId("decode-0"), HOME),
            "tcp",
            connections=4,
            bytes_sent=int(self.sent_bytes),
            busy_s=self.busy_s,
            bytes_queued=int(self.queued_bytes),
        )
