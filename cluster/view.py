"""The cluster as a policy sees it: frozen, complete, and the sole input of every decision.

``Membership`` is the one writer (it makes a new view at every change); routers, policies, metrics and the status
command only read. Instants are on the gateway's Clock.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from cluster.cost_model import NO_COSTS, CostView
from core.fingerprint import CacheFingerprint
from core.link import LinkEstimate, ProbeReport
from core.request import ClusterId, EngineId, PullTask, Role, WorkerId


@dataclass(frozen=True, slots=True)
class ModelInfo:
    """The served model, as the workers describe it."""

    architecture: str
    fingerprint: CacheFingerprint
    max_model_len: int
    vocab_size: int
    eos_token_ids: tuple[int, ...]
    kv_bytes_per_token: int
    num_layers: int = 1  # that store K/V


@dataclass(frozen=True, slots=True)
class WorkerLoad:
    """What a worker last said of itself on its Watch stream. Counters run from the start of its process."""

    num_running: int = 0
    num_waiting: int = 0
    num_waiting_tokens: int = 0  # tokens of known prompts that must be computed yet
    pages_free: int = 0  # free, or cached and evictable
    pages_cached: int = 0
    num_sessions: int = 0  # KV hand-overs under way
    pages_quarantined: int = 0
    bytes_sent: int = 0
    bytes_received: int = 0
    prompt_tokens: int = 0
    generated_tokens: int = 0
    cached_tokens: int = 0
    num_preemptions: int = 0
    pulls: tuple[tuple[str, int], ...] = ()  # (PullOutcome, pulls of other workers' pages that ended so)
    pulled_tokens: int = 0
    pulled_bytes: int = 0
    num_announced: int = 0  # sequences whose K/V is to come; they are in no batch yet
    num_announced_tokens: int = 0  # of those of them that hold no page yet
    num_other_role: int = 0  # sequences of the role that it does not advertise: it had it, and they go on to their end


@dataclass(frozen=True, slots=True)
class WorkerView:
    """One live worker.

    ``load`` is as old as its last report. What this gateway has sent there since, hence is in no report yet, is
    ``num_unreported`` and the two numbers of tokens; ``num_assigned`` counts all that it has there.
    """

    worker_id: WorkerId
    engine_id: EngineId
    cluster_id: ClusterId
    address: str  # host:port of its gRPC server
    role: Role
    draining: bool
    lease_expires_at: float
    model: ModelInfo
    transport: str
    pages_total: int
    load: WorkerLoad
    max_batch_size: int | None = None  # sequences of one step; None: it did not say
    num_assigned: int = 0  # sequences this gateway has sent there and not seen end, reported or not
    profile: str = ""  # of its costs, a key of ``CostView.profiles``: workers alike in model and device share one
    num_unreported: int = 0  # sequences
    unreported_tokens: int = 0  # that must be computed before their first token
    unreported_kv_tokens: int = 0  # that must find room in its pages


@dataclass(frozen=True, slots=True)
class LinkView:
    """The path from one worker's pages into another's. Ordered: the way back is another link.

    ``usable`` False: nothing is to be shipped on it; ``reason`` says why.
    """

    from_worker: WorkerId
    from_cluster: ClusterId
    to_worker: WorkerId
    to_cluster: ClusterId
    heard_at: float  # when the sending worker last reported
    estimate: LinkEstimate | None = None  # None: nothing was sent there yet
    probe: ProbeReport | None = None  # the last self-test; None: not tested
    usable: bool = True
    reason: str = ""
    probed_at: float = -math.inf  # when the last self-test ended

    def age_s(self, now: float) -> float | None:
        """Seconds since bytes last moved on it, as far as is known; None if none ever did."""
        return None if self.estimate is None else max(0.0, now - self.heard_at) + self.estimate.age_s


Links = Mapping[tuple[WorkerId, WorkerId], LinkView]  # (from, to)


@dataclass(frozen=True, slots=True)
class Offload:
    """What the planner says of prompts for PrfaaS clusters (clusters that only prefill), now.

    A prompt goes there if more than ``threshold_tokens`` of it must be computed (PrfaaS section 3.3). ``abundant``:
    bandwidth is not what limits, so the best cache of any cluster counts and may be fetched; else caches are judged
    cluster by cluster.
    """

    threshold_tokens: float = math.inf  # inf: none goes
    abundant: bool = False
    reason: str = "nothing was planned yet"


NO_OFFLOAD = Offload()


@dataclass(frozen=True, slots=True)
class ClusterView:
    """Every worker that this gateway holds a live lease of, ordered by worker id, and the links between them.

    ``links`` has every pair of a prefill and a decode worker, and whatever else carried bytes. ``costs`` predicts
    seconds; ``offload`` is the planner's last word.
    """

    at: float
    workers: tuple[WorkerView, ...] = ()
    links: Links = field(default_factory=dict)
    costs: CostView = NO_COSTS
    offload: Offload = NO_OFFLOAD

    def ready(self, role: Role) -> tuple[WorkerView, ...]:
        """Workers that advertise ``role``, are not draining and whose lease has not run out."""
        return tuple(w for w in self.workers if w.role is role and not w.draining and w.lease_expires_at > self.at)

    def within(self, cluster_id: ClusterId) -> ClusterView:
        """The workers of one cluster and the links among them; the rest as it is."""
        return replace(
            self,
            workers=tuple(worker for worker in self.workers if worker.cluster_id == cluster_id),
            links={
                pair: link
                for pair, link in self.links.items()
                if link.from_cluster == cluster_id and link.to_cluster == cluster_id
            },
        )

    def link(self, from_worker: WorkerId, to_worker: WorkerId) -> LinkView | None:
        """What is known of the path from one worker to another; None: nothing, good or bad."""
        return self.links.get((from_worker, to_worker))

    def can_ship(self, prefill: WorkerView, decode: WorkerView) -> bool:
        """May K/V go from ``prefill`` to ``decode``? Not on a link that is known not to work, or is not tested yet."""
        link = self.link(prefill.worker_id, decode.worker_id)
        return link is None or link.usable


@dataclass(frozen=True, slots=True)
class Forecast:
    """What a route is expected to cost. Seconds; bytes of K/V over links."""

    ttft_s: float
    tpot_s: float
    bytes_shipped: int  # from the prefill to the decode worker
    bytes_pulled: int = 0  # of cached pages, to the worker that prefills
    colocated_ttft_s: float | None = None  # of the best route on which one worker does both; None: there is none
    colocated_tpot_s: float | None = None


@dataclass(frozen=True, slots=True)
class PagePull:
    """Cached pages to be fetched from ``source``, for the worker that prefills, before it does."""

    source: WorkerView
    num_tokens: int  # leading ones, whole pages
    timeout_s: float | None = None  # after so long computing them would have been faster; None: the worker's own bound

    @property
    def task(self) -> PullTask:
        """What the worker is told."""
        source = self.source
        return PullTask(
            source.worker_id, source.cluster_id, source.engine_id, source.address, self.num_tokens, self.timeout_s
        )


@dataclass(frozen=True, slots=True)
class Route:
    """A placement and the reason for it; the reason is what gets logged and shown to the client.

    ``prefill`` None: the decode worker prefills the prompt itself. ``fallback``: a word for why this is not what an
    intact cluster would do (``no_prefill_worker``, ``link_down``, ...), counted and shown; empty: it is.
    """

    prefill: WorkerView | None
    decode: WorkerView
    reason: str
    pull: PagePull | None = None
    expected: Forecast | None = None  # None: the policy predicts nothing
    fallback: str = ""

    @property
    def place(self) -> str:
        """Where the prompt is prefilled: ``colocated``, on the decode worker; ``local``, in its cluster; or
        ``offloaded``, in another cluster."""
        if self.prefill is None:
            return "colocated"
        return "local" if self.prefill.cluster_id == self.decode.cluster_id else "offloaded"
