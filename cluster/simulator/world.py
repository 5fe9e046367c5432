"""A whole simulation: clusters of workers, links and a gateway on one virtual loop, and a workload through it.

    1  every worker starts and registers with the gateway's Membership, as worker processes do
    2  when all are in the view, and a little later, the workload begins: that is second 0 of all results
    3  conversations arrive; links change and workers die as the scenario says; a sampler looks every ``sample_s``
    4  when every conversation has ended the world stops, and what was seen is the result

Everything that decides is production code. Equal scenarios and workloads give equal results, to the last bit.
"""

from __future__ import annotations

import asyncio
import gc
from collections.abc import Callable, Coroutine, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from cluster.cost_model import CostView, LinearCost
from cluster.routing_policy import RoutingPolicy, make_policy
from cluster.simulator.answers import AnswerBook
from cluster.simulator.client import SimulatedClient
from cluster.simulator.conversation import Conversation
from cluster.simulator.gateway import SimulatedGateway
from cluster.simulator.network import LinkSpec, Network
from cluster.simulator.pools import SimulatedPools
from cluster.simulator.pulling import PullingHalf
from cluster.simulator.receiving import ReceivingHalf
from cluster.simulator.records import RequestRecord
from cluster.simulator.scenario import ClusterSpec, Scenario, WorkerDeath
from cluster.simulator.shared_device import SharedDevice
from cluster.simulator.timeline import Sample, Timeline
from cluster.simulator.virtual_loop import VirtualTimeLoop, run, running_loop
from cluster.simulator.worker import SimulatedWorker
from cluster.simulator.workload import Workload
from cluster.worker_client import WorkerClient, WorkerDescription
from core.errors import PeerLost, PrfaasError
from core.request import ClusterId, EngineId, Role, WorkerId

_REGISTER_RETRY_S = 0.5  # cluster/registration.py
_JOIN_TIMEOUT_S = 60.0
_REGISTRATIONS_PER_LEASE = 3
_GOLDEN = 0.6180339887498949  # spreads the starts of workers evenly, whatever their number
_START_SPREAD_S = 0.25

_COLLECTION_THRESHOLDS = (200_000, 10, 20)  # objects made and not freed, then collections of the younger generation

OnProgress = Callable[[int], None]  # hears how many requests have ended


@dataclass(frozen=True)
class SimulationResult:
    """What was seen. ``seconds``: from the workload's beginning to its last answer."""

    records: tuple[RequestRecord, ...]  # in the order in which they ended
    samples: tuple[Sample, ...]
    seconds: float
    num_retries: int
    num_resumes: int


def simulate(
    scenario: Scenario,
    workload: Workload,
    on_progress: OnProgress | None = None,
    policy: RoutingPolicy | None = None,
) -> SimulationResult:
    """Run the workload through the scenario. ``policy`` None: the one that the scenario's router names."""

    async def main() -> SimulationResult:
        return await World(running_loop(), scenario, policy).run(workload, on_progress)

    with _rare_collection():
        return run(main())


@contextmanager
def _rare_collection() -> Iterator[None]:
    """Look for garbage in cycles seldom, and not among what was there before.

    A request leaves some fifty objects in cycles and a thousand that are freed at once; Python would look through all
    of them every few requests, and through the whole workload now and then: an eighth of a simulation's time.
    """
    thresholds = gc.get_threshold()
    gc.freeze()
    gc.set_threshold(*_COLLECTION_THRESHOLDS)
    try:
        yield
    finally:
        gc.set_threshold(*thresholds)
        gc.unfreeze()


class World:
    """Everything in one simulation."""

    def __init__(self, loop: VirtualTimeLoop, scenario: Scenario, policy: RoutingPolicy | None = None) -> None:
        self._loop = loop
        self._scenario = scenario
        self._answers = AnswerBook()
        latencies = {cluster.cluster_id: cluster.latency_s for cluster in scenario.clusters}
        self.network = Network(loop, latencies, scenario.links)
        self._kinds: dict[WorkerId, ClusterSpec] = {}
        self._workers: dict[WorkerId, SimulatedWorker] = {}  # the living one of each name
        self._at: dict[str, SimulatedWorker] = {}  # by address
        self._devices: dict[ClusterId, SharedDevice] = {}
        self._num_starts = 0
        self._absent: set[WorkerId] = set()  # of those that the workload waits for: not in the view yet
        self._all_joined = asyncio.Event()
        self._tasks: set[asyncio.Task[None]] = set()
        chosen = policy or make_policy(scenario.router.policy, scenario.router.routing)
        pools: SimulatedPools | None = None
        if scenario.pools:
            first = {role: pool.count for role, pool in scenario.pools.items()}
            pools = SimulatedPools(self, scenario.home, first, scenario.start_s, self._spawn)
        self.gateway = SimulatedGateway(loop, scenario, chosen, self._connect, self._num_untold, self._retest, pools)

    @property
    def workers(self) -> Iterable[SimulatedWorker]:
        """The living ones."""
        return self._workers.values()

    async def run(self, workload: Workload, on_progress: OnProgress | None = None) -> SimulationResult:
        """Everything, from the workers' start to the last answer."""
        await self._start()
        gateway = self.gateway
        await gateway.begin()
        timeline = Timeline(self._scenario, self.network, gateway)
        self._spawn(timeline.watch(lambda: self._workers.values()))
        for link in self._scenario.links:
            self._spawn(self._change(link))
        for death in self._scenario.deaths:
            self._spawn(self._kill(death))
        await self._arrivals(workload, on_progress)
        seconds = self._loop.time() - gateway.began_at
        counters = gateway.router.counters
        await self._stop()
        return SimulationResult(
            records=tuple(gateway.records),
            samples=tuple(timeline.samples),
            seconds=seconds,
            num_retries=counters.num_retries,
            num_resumes=counters.num_resumes,
        )

    # ---- workers ----

    async def _start(self) -> None:
        self.gateway.start(_costs_of(self._scenario))
        for cluster in self._scenario.clusters:
            for role, count in ((Role.PREFILL, cluster.num_prefill), (Role.DECODE, cluster.num_decode)):
                for index in range(count):
                    worker_id = WorkerId(f"{cluster.cluster_id}/{role}-{index}")
                    self._kinds[worker_id] = cluster
                    self._absent.add(worker_id)
                    self._start_worker(worker_id, role, _START_SPREAD_S * (self._num_starts * _GOLDEN % 1))
        try:
            async with asyncio.timeout(_JOIN_TIMEOUT_S):
                await self._all_joined.wait()
        except TimeoutError:
            num_workers = len(self._kinds)
            raise AssertionError(f"{num_workers} workers did not join in {_JOIN_TIMEOUT_S:g} virtual seconds") from None
        await asyncio.sleep(self._scenario.settle_s)

    def _start_worker(self, worker_id: WorkerId, role: Role, delay_s: float) -> None:
        self._num_starts += 1
        cluster = self._kinds[worker_id]
        engine_id = EngineId(f"{worker_id}#{self._num_starts}")
        description = _describe(cluster, worker_id, engine_id)
        worker = SimulatedWorker(
            self._loop,
            cluster.kind,
            description,
            role,
            self.network,
            self._answers,
            self._source_at,
            self._device_of(cluster),
        )
        self._workers[worker_id] = worker
        self._at[description.address] = worker
        self._spawn(self._keep_registered(worker, delay_s))

    def start_worker(self, worker_id: WorkerId, role: Role) -> None:
        """A further worker of the home cluster begins and registers."""
        self._kinds[worker_id] = self._scenario.home_cluster
        self._start_worker(worker_id, role, 0.0)

    def end_worker(self, worker_id: WorkerId) -> None:
        """It says goodbye and is gone, if it is there."""
        worker = self._workers.pop(worker_id, None)
        if worker is not None:
            self.gateway.membership.leave(worker_id, worker.description.engine_id)
            worker.die()
            del self._at[worker.description.address]

    def living(self, worker_id: WorkerId) -> SimulatedWorker | None:
        """Its process; None: it has none."""
        return self._workers.get(worker_id)

    def _device_of(self, cluster: ClusterSpec) -> SharedDevice | None:
        if not cluster.shares_device:
            return None
        return self._devices.setdefault(cluster.cluster_id, SharedDevice())

    async def _keep_registered(self, worker: SimulatedWorker, delay_s: float) -> None:
        """As long as the process lives: each call is the lease of the next few seconds."""
        await asyncio.sleep(delay_s)
        membership, description = self.gateway.membership, worker.description
        there = self.network.path(description.cluster_id, self._scenario.home)
        while worker.alive:
            try:
                await there.cross(membership.lease_s)
                await membership.register(description.worker_id, description.engine_id, description.address)
            except PrfaasError:
                await asyncio.sleep(_REGISTER_RETRY_S)
            else:
                self._joined(worker)
                await asyncio.sleep(membership.lease_s / _REGISTRATIONS_PER_LEASE)

    def _joined(self, worker: SimulatedWorker) -> None:
        """It is in the view. Counted here: a view for each of a thousand that join has a million workers in all."""
        if not self._all_joined.is_set():
            self._absent.discard(worker.description.worker_id)
            if not self._absent:
                self._all_joined.set()

    async def _connect(self, address: str) -> WorkerClient:
        worker = self._at.get(address)
        if worker is None:
            raise PeerLost(f"nobody is at {address}")
        there = self.network.path(self._scenario.home, worker.description.cluster_id)
        back = self.network.path(worker.description.cluster_id, self._scenario.home)
        return SimulatedClient(self._loop, worker, there, back, self._receiver_at)

    def _receiver_at(self, address: str) -> ReceivingHalf | None:
        worker = self._at.get(address)
        return None if worker is None else worker.receiving

    def _source_at(self, address: str) -> PullingHalf | None:
        worker = self._at.get(address)
        return None if worker is None else worker.pulling

    def _num_untold(self) -> int:
        return sum(worker.receiving.num_untold() for worker in self._workers.values())

    def _retest(self, sender: EngineId, receiver: EngineId) -> None:
        source, target = self._at.get(sender), self._at.get(receiver)
        if source is not None and target is not None:
            source.sending.probe(target.description)

    async def _kill(self, death: WorkerDeath) -> None:
        await asyncio.sleep(death.at_s)
        worker = self._workers.pop(death.worker_id)
        worker.die()
        del self._at[worker.description.address]
        if death.restart_s is not None:
            await asyncio.sleep(death.restart_s)
            self._start_worker(death.worker_id, worker.role, 0.0)

    async def _change(self, link: LinkSpec) -> None:
        for change in link.changes:
            await asyncio.sleep(self.gateway.began_at + change.at_s - self._loop.time())
            self.network.set_share((link.from_cluster, link.to_cluster), change.share)

    # ---- the workload ----

    async def _arrivals(self, workload: Workload, on_progress: OnProgress | None) -> None:
        began_at, loop = self.gateway.began_at, self._loop
        talking: set[asyncio.Task[None]] = set()
        free = None if workload.num_users is None else asyncio.Semaphore(workload.num_users)
        for conversation in workload.conversations:
            if free is not None:
                await free.acquire()
            wait_s = began_at + conversation.starts_at - loop.time()
            if wait_s > 0:
                await asyncio.sleep(wait_s)
            task = loop.create_task(self._talk(conversation, on_progress))
            talking.add(task)
            task.add_done_callback(talking.discard)
            if free is not None:
                task.add_done_callback(lambda _: free.release())
        while talking:
            await asyncio.wait(talking)

    async def _talk(self, conversation: Conversation, on_progress: OnProgress | None) -> None:
        gateway = self.gateway
        for index, turn in enumerate(conversation.turns):
            if index and turn.think_s > 0:
                await asyncio.sleep(turn.think_s)
            self._answers.add(turn.number, turn.answer)
            await gateway.send(turn)
            self._answers.forget(turn.number)
            if on_progress is not None:
                on_progress(len(gateway.records))

    async def _stop(self) -> None:
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await self.gateway.close()
        for worker in self._workers.values():
            worker.die()

    def _spawn(self, work: Coroutine[Any, Any, None]) -> None:
        task = self._loop.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)


def _describe(cluster: ClusterSpec, worker_id: WorkerId, engine_id: EngineId) -> WorkerDescription:
    kind = cluster.kind
    return WorkerDescription(
        worker_id=worker_id,
        engine_id=engine_id,
        cluster_id=cluster.cluster_id,
        address=engine_id,
        model=kind.model,
        transport="simulated",
        pages_total=kind.engine.num_pages or 0,
        max_batch_size=kind.engine.max_batch_size,
        compute=kind.compute,
    )


def _costs_of(scenario: Scenario) -> CostView:
    """What a gateway that knows everything predicts with."""
    profiles = {
        _describe(cluster, WorkerId(""), EngineId("")).profile: cluster.kind.seen() for cluster in scenario.clusters
    }
    transfers = {
        (cluster.cluster_id, cluster.cluster_id): LinearCost((cluster.latency_s, 1 / cluster.kind.send_bytes_per_s))
        for cluster in scenario.clusters
    }
    for link in scenario.links:
        transfers[link.from_cluster, link.to_cluster] = LinearCost((link.latency_s, 1 / link.bytes_per_s))
    return CostView(profiles, transfers)
