"""The cluster as a policy sees it: frozen, complete, and the sole input of every decision.

``Membership`` is the one writer (it makes a new view at every change); routers, policies, metrics and the status
command only read. Instants are on the gateway's Clock.

Who must look at a thousand workers for every sequence looks at ``ClusterView.pools``: the workers that may be chosen,
as columns of numbers.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import InitVar, dataclass, field, replace
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from cluster.cost_model import NO_COSTS, CostView
from core.cache_tiers import TierState
from core.compute import UNKNOWN_MODES, EngineModes
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
    modes: EngineModes = UNKNOWN_MODES
    tiers: tuple[TierState, ...] = ()  # of its prefix cache, below the device
    reloads: tuple[tuple[str, int], ...] = ()  # (ReloadOutcome, prefixes in lower tiers of which that became)
    pages_lost: int = 0  # evicted from the device before they were copied to a lower tier


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
    tensor_parallel: int = 1  # ranks that compute its steps together, a device each


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


Integers = NDArray[np.int64]
Flags = NDArray[np.bool_]


class Roster:
    """What does not change while the same engines are in a pool; a position is a worker's place in it."""

    def __init__(self, workers: Iterable[WorkerView]) -> None:
        fingerprints = {w.engine_id: w.model.fingerprint for w in workers}
        self.position_of: Mapping[EngineId, int] = {engine_id: i for i, engine_id in enumerate(fingerprints)}
        self.page_sizes: Integers = np.array([f.page_size for f in fingerprints.values()], np.int64)
        self.page_size: int | None = int(self.page_sizes[0]) if len(set(self.page_sizes.tolist())) == 1 else None
        self.fingerprints = tuple(fingerprints.values())
        self._slots: tuple[Mapping[EngineId, int], Integers] | None = None

    def slots(self, slot_of: Mapping[EngineId, int]) -> Integers:
        """The slot of each worker in the prefix index; of one that has none: beyond every slot.

        The last answer is kept: the index replaces ``slot_of`` when a worker comes or goes, and never changes it.
        """
        if self._slots is None or self._slots[0] is not slot_of:
            found = (slot_of.get(engine_id, _NO_SLOT) for engine_id in self.position_of)
            self._slots = slot_of, np.fromiter(found, np.int64, len(self.position_of))
        return self._slots[1]


_NO_SLOT = 2**62


@dataclass(frozen=True, slots=True, eq=False)
class WorkerPool:
    """Ready workers of one role, in the order of their ids, and their numbers as columns: one array per question."""

    workers: tuple[WorkerView, ...]
    roster: Roster
    numbers: Integers  # [question, position]

    @classmethod
    def of(cls, workers: Iterable[WorkerView]) -> WorkerPool:
        workers = tuple(workers)
        numbers = np.array([_numbers(w) for w in workers], np.int64).reshape(len(workers), _NUM_QUESTIONS)
        return cls(workers, Roster(workers), _frozen(np.ascontiguousarray(numbers.T)))

    def with_changed(self, changed: Mapping[int, WorkerView]) -> WorkerPool:
        """The pool after those at some positions have changed; they are the same engines."""
        workers, numbers = list(self.workers), self.numbers.copy()
        for position, worker in changed.items():
            workers[position] = worker
        numbers[:, list(changed)] = np.array([*map(_numbers, changed.values())], np.int64).T
        return WorkerPool(tuple(workers), self.roster, _frozen(numbers))

    def __len__(self) -> int:
        return len(self.workers)

    @property
    def num_sequences(self) -> Integers:
        """That a worker has, as it said, and those that this gateway assigned."""
        return self._answers(0)

    @property
    def num_waiting_tokens(self) -> Integers:
        return self._answers(1)

    @property
    def num_assigned(self) -> Integers:
        return self._answers(2)

    @property
    def free_tokens(self) -> Integers:
        """For so many tokens there are pages."""
        return self._answers(3)

    def _answers(self, question: int) -> Integers:
        row: Integers = self.numbers[question]
        return row


def identities_of(workers: Sequence[WorkerView]) -> Integers:
    """``id`` of each, in order."""
    return _frozen(np.fromiter(map(id, workers), np.int64, len(workers)))


def identities_with(known: Integers, positions: Sequence[int], workers: Sequence[WorkerView]) -> Integers:
    """``known`` after the workers at some positions have become others."""
    identities = known.copy()
    identities[positions] = [id(worker) for worker in workers]
    return _frozen(identities)


def _frozen(numbers: Integers) -> Integers:
    numbers.setflags(write=False)
    return numbers


_NUM_QUESTIONS = 4


def _numbers(worker: WorkerView) -> tuple[int, ...]:
    """A worker's column of ``WorkerPool.numbers``."""
    load = worker.load
    return (
        load.num_running + load.num_waiting + worker.num_assigned,
        load.num_waiting_tokens,
        worker.num_assigned,
        load.pages_free * worker.model.fingerprint.page_size,
    )


@dataclass(frozen=True, slots=True, eq=False)
class Pools:
    """Every worker that may be chosen. ``may_ship[p, d]``: may the K/V of prefill worker p be put into the pool of
    decode worker d, and on that link? None: on every one."""

    prefill: WorkerPool
    decode: WorkerPool
    may_ship: Flags | None = None

    def of(self, role: Role) -> WorkerPool:
        return self.prefill if role is Role.PREFILL else self.decode


def alike(prefill: Roster, decode: Roster) -> Flags | None:
    """[p, d]: may pages of one be put into the other, as far as models are concerned? None: every one."""
    kinds: list[CacheFingerprint] = []
    kind_of: dict[CacheFingerprint, int] = {}
    for fingerprint in dict.fromkeys((*prefill.fingerprints, *decode.fingerprints)):
        kind = next((i for i, known in enumerate(kinds) if known.compatible(fingerprint)), len(kinds))
        kinds += [fingerprint] if kind == len(kinds) else []
        kind_of[fingerprint] = kind
    if len(kinds) <= 1:
        return None
    senders, receivers = ([kind_of[f] for f in roster.fingerprints] for roster in (prefill, decode))
    return np.equal.outer(np.array(senders, np.int64), np.array(receivers, np.int64))


@dataclass(frozen=True)
class ClusterView:
    """Every worker that this gateway holds a live lease of, ordered by worker id, and the links between them.

    ``links`` has every pair of a prefill and a decode worker, and whatever else carried bytes. ``costs`` predicts
    seconds; ``offload`` is the planner's last word. ``pools`` and ``identities`` follow from the rest; who made them
    already, as ``Membership`` does, gives them as ``made_identities``, and says with ``make_pools`` how to make those.
    """

    at: float
    workers: tuple[WorkerView, ...] = ()
    links: Links = field(default_factory=dict)
    costs: CostView = NO_COSTS
    offload: Offload = NO_OFFLOAD
    make_pools: InitVar[Callable[[], Pools] | None] = None
    made_identities: InitVar[Integers | None] = None

    def __post_init__(self, make_pools: Callable[[], Pools] | None, made_identities: Integers | None) -> None:
        self.__dict__["_make_pools"] = make_pools
        if made_identities is not None:
            self.__dict__["identities"] = made_identities

    @cached_property
    def pools(self) -> Pools:
        """The workers of each role that are ready."""
        make_pools: Callable[[], Pools] | None = self.__dict__["_make_pools"]
        if make_pools is not None:
            return make_pools()
        prefill, decode = (WorkerPool.of(w for w in self.workers if self._is_ready(w, role)) for role in Role)
        may_ship = alike(prefill.roster, decode.roster)
        senders = {w.worker_id: i for i, w in enumerate(prefill.workers)}
        receivers = {w.worker_id: i for i, w in enumerate(decode.workers)}
        for (sender, receiver), link in self.links.items():
            if not link.usable and sender in senders and receiver in receivers:
                may_ship = np.ones((len(prefill), len(decode)), np.bool_) if may_ship is None else may_ship
                may_ship[senders[sender], receivers[receiver]] = False
        return Pools(prefill, decode, may_ship)

    @cached_property
    def identities(self) -> Integers:
        """``id`` of each worker's view: where two views that both still live differ, something became of the worker."""
        return identities_of(self.workers)

    def ready(self, role: Role) -> tuple[WorkerView, ...]:
        """Workers that advertise ``role``, are not draining and whose lease has not run out."""
        return self.pools.of(role).workers

    def _is_ready(self, worker: WorkerView, role: Role) -> bool:
        return worker.role is role and not worker.draining and worker.lease_expires_at > self.at

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
