"""How do worker processes come to be, stay, and end? As Ray actors. Every Ray call of the project is in this file.

Ray starts, places and restarts processes, and is asked for nothing else: requests, tokens and KV never pass through it.

    actor        one for each worker, in plain scheduling or in its pool's placement group, never in a group of the
                 driver's (nested groups deadlock); it ends with this process (not detached)
    ranks        a worker of several devices has a placement group of its own, on one node, with a bundle for each rank;
                 its actor is in the first, and starts an actor in each of the others, which ends when it does
    start        the model is loaded in the actor's constructor, so a restarted actor serves again by itself; it takes
                 any free port and draws a new engine id at each start, so no two starts can be mistaken for each other
    pools        a worker of a pool that grows and shrinks (elastic) has a placement group of its own: while it is
                 pending an autoscaler sees it (and no actor, which would seem to ask for something that no machine
                 has), and when it is removed nothing of the machine is reserved any more
    restart      for ever after a crash (``max_restarts=-1``), never after an exception: one at the first start is
                 kept for ``check``, which raises it; one at a restart ends the actor and is in its log
    threads      Ray sets OMP_NUM_THREADS to the CPUs that it reserves; reserving is not limiting, so it is taken back
                 before torch is loaded, and ``engine.threads`` decides
    stop         actors are asked to stop, then killed; a Ray of our own is shut down
"""

from __future__ import annotations

import gc
import itertools
import logging
import os
import socket
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any
from uuid import uuid4

import ray
from ray.util.placement_group import (
    PlacementGroup,
    placement_group,
    placement_group_table,
    remove_placement_group,
)
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from cluster.certificates import private_files
from cluster.config import PoolConfig, ServiceConfig, WorkerConfig
from cluster.internal_tls import IssueProof, Proof
from cluster.log_format import configure_logging
from cluster.pool_scaler import Phase, WorkerPhase
from core.credentials import Credentials, Pem
from core.errors import InvalidConfig, PrfaasError, UnsupportedModel
from core.request import ClusterId, Role, WorkerId

if TYPE_CHECKING:
    from cluster.rank_processes import RankTask
    from cluster.worker_host import WorkerHost

logger = logging.getLogger(__name__)

_IN_RAY_JOB = "RAY_JOB_CONFIG_JSON_ENV_VAR"  # set by Ray for the entrypoint of a submitted job
_CONNECT_TIMEOUT_S = 5.0
# Ray has its workers step back behind every other process (nice 15); ours are what everybody waits for.
_OWN_RAY = {"worker_niceness": 0}
_PLACED = "CREATED"  # the state of a placement group whose bundles are reserved
_HEAD = "node:__internal_head__"  # the resource that Ray gives its head alone
_STOP_SLACK_S = 1.0  # an actor answers so long after the time that it was given to stop in


class WorkerNotStarted(PrfaasError):
    """A worker process could not start; the message says which and why."""


@dataclass(frozen=True, slots=True)
class StartFailure:
    """Why a worker did not start, as it travels from its actor."""

    kind: str  # name of the exception's class
    message: str


class RayFleet:
    """The worker processes of one service. Methods block; they are called from one thread at a time."""

    def __init__(self, config: ServiceConfig) -> None:
        self._config = config
        self._workers: dict[WorkerId, Any] = {}  # worker id |-> actor handle
        self._starting: dict[Any, WorkerId] = {}  # reference to the actor's start |-> worker id
        self._groups: list[PlacementGroup] = []
        self._own_groups: dict[WorkerId, PlacementGroup] = {}  # of workers of elastic pools
        self._pool_of: dict[WorkerId, Role] = {}  # likewise
        self._unplaced: set[WorkerId] = set()  # likewise, that have no actor yet: their groups have no place
        self._retiring: dict[WorkerId, Any] = {}  # likewise, told to stop |-> reference to their answer
        self._failed: dict[WorkerId, str] = {}  # likewise |-> why their start failed
        self._service = uuid4().hex[:8]  # two services of one namespace may have workers of one name
        self._num_named = 0
        self._head = ""  # Ray's name of the node that is never given back
        self._registry = ""  # what ``start`` was given
        self._issue_proof: IssueProof | None = None
        self._stopping: list[Any] | None = None  # references to the workers' answers that they stopped

    def join(self) -> str:
        """Start or join Ray; returns this node's address, as workers reach it. ``InvalidConfig`` if that fails."""
        options: dict[str, Any] = {
            "namespace": self._config.ray.namespace,
            "logging_level": logging.ERROR,
            "log_to_driver": True,
        }
        address = "auto" if _IN_RAY_JOB in os.environ else self._config.ray.address
        try:
            if address is None:
                own = _own_resources(self._config)
                ray.init(address="local", include_dashboard=False, _system_config=_OWN_RAY, **options, **own)
            else:
                _require_listener(address)
                ray.init(address=address, **options)
        except (OSError, ValueError, RuntimeError, ray.exceptions.RayError) as error:
            raise InvalidConfig("ray.address", f"no Ray at {address or 'this machine'}: {error}") from error
        if address is None:
            _require_gpus(self._config)
        nodes = ray.nodes()  # type: ignore[no-untyped-call]
        self._head = next((node["NodeID"] for node in nodes if _HEAD in node["Resources"]), "")
        return self._config.host or _node_address()

    def start(self, registry: str, issue_proof: IssueProof) -> None:
        """Start every worker. Returns before any of them is ready.

        They register at ``registry`` (host:port) and, in a cluster that joins, at the gateways elsewhere.
        What ``issue_proof`` gives for a worker travels in its actor's arguments, which Ray keeps for restarts.
        """
        self._registry, self._issue_proof = registry, issue_proof
        for role in Role:
            pool = self._config.pool(role)
            if pool.is_elastic:
                for _ in range(pool.count):
                    self.add(role)
                continue
            for index, placing in enumerate(self._places(role, pool)):
                self._start_actor(role, self._config.worker_id(role, index), placing)

    def _start_actor(self, role: Role, worker_id: WorkerId, placing: str | PlacementGroupSchedulingStrategy) -> None:
        assert self._issue_proof is not None, "start() comes first"
        pool = self._config.pool(role)
        actor: Any = ray.remote(WorkerActor).options(
            name=self._ray_name(worker_id),
            scheduling_strategy=placing,
            max_restarts=-1,
            **_rank_resources(pool),
        )
        self._workers[worker_id] = handle = actor.remote(
            self._config, role, worker_id, self._registry, self._issue_proof(worker_id)
        )
        self._starting[handle.start_failure.remote()] = worker_id

    def _ray_name(self, worker_id: WorkerId) -> str:
        """A name for Ray that was not used before: it may still bury the one that had a worker's name."""
        self._num_named += 1
        return f"{worker_id}@{self._service}-{self._num_named}"

    # ---- single workers of elastic pools (pool_scaler.py) ----

    def members(self) -> Mapping[WorkerId, Role]:
        """Workers of elastic pools, and the pool of each."""
        return dict(self._pool_of)

    def add(self, role: Role) -> WorkerId:
        """Ask Ray for one more worker; returns at once. Its name is the first that is free."""
        names = (self._config.worker_id(role, index) for index in itertools.count())
        worker_id = next(name for name in names if name not in self._workers and name not in self._pool_of)
        group = _group_of_worker(role, self._config.pool(role), self._ray_name(worker_id))
        self._own_groups[worker_id] = group
        self._pool_of[worker_id] = role
        self._unplaced.add(worker_id)
        return worker_id

    def _start_placed(self) -> None:
        """Start the actors of workers whose placement groups have got their place."""
        for worker_id in [name for name in self._unplaced if self._node_of(name) is not None]:
            self._unplaced.discard(worker_id)
            group = self._own_groups[worker_id]
            placing = PlacementGroupSchedulingStrategy(group, 0, placement_group_capture_child_tasks=False)
            self._start_actor(self._pool_of[worker_id], worker_id, placing)

    def phases(self) -> Mapping[WorkerId, WorkerPhase]:
        """How far each worker of an elastic pool is."""
        self._start_placed()
        self._collect_failures()
        loading, stopped = self._loading(), self._retired()
        found = {}
        for worker_id in self._pool_of:
            if worker_id in stopped:
                found[worker_id] = WorkerPhase(Phase.STOPPED, stopped[worker_id])
            elif worker_id in self._failed:
                found[worker_id] = WorkerPhase(Phase.FAILED, self._failed[worker_id])
            elif worker_id in self._unplaced or (node := self._node_of(worker_id)) is None:
                found[worker_id] = WorkerPhase(Phase.PLACING)
            else:
                phase = Phase.STARTING if worker_id in loading else Phase.UP
                found[worker_id] = WorkerPhase(phase, machine="" if node == self._head else node)
        return found

    def retire(self, worker_id: WorkerId, timeout_s: float) -> None:
        """Tell it to finish what it runs, for up to ``timeout_s``, and leave its gateways; does not wait."""
        self._retiring[worker_id] = self._workers[worker_id].stop.remote(timeout_s)

    def remove(self, worker_id: WorkerId) -> None:
        """End it now, and give back what was reserved for it; nothing happens if it is not there."""
        group = self._own_groups.pop(worker_id, None)
        if group is None:
            return
        if worker_id in self._workers:
            ray.kill(self._workers.pop(worker_id), no_restart=True)
        remove_placement_group(group)
        self._starting = {reference: name for reference, name in self._starting.items() if name != worker_id}
        del self._pool_of[worker_id]
        self._unplaced.discard(worker_id)
        self._retiring.pop(worker_id, None)
        self._failed.pop(worker_id, None)

    def _node_of(self, worker_id: WorkerId) -> str | None:
        """Ray's name of the node where its first rank has its place; None: it has none yet."""
        table = placement_group_table(self._own_groups[worker_id])
        return str(table["bundles_to_node_id"][0]) if table["state"] == _PLACED else None

    def _collect_failures(self) -> None:
        """What has become of the starts of workers in elastic pools since the last call."""
        mine = [reference for reference, name in self._starting.items() if name in self._pool_of]
        done, _ = ray.wait(mine, num_returns=len(mine), timeout=0) if mine else ([], [])
        for reference in done:
            worker_id = self._starting.pop(reference)
            try:
                failure: StartFailure | None = ray.get(reference)
            except ray.exceptions.RayActorError as error:
                self._failed[worker_id] = str(error)
            else:
                if failure is not None:
                    self._failed[worker_id] = f"{failure.kind}: {failure.message}"

    def _retired(self) -> Mapping[WorkerId, str]:
        """Those that were told to stop and have, or died meanwhile; and what is to be said of it."""
        references = {reference: name for name, reference in self._retiring.items()}
        done, _ = ray.wait(list(references), num_returns=len(references), timeout=0) if references else ([], [])
        stopped = {}
        for reference in done:
            try:
                ray.get(reference)
                stopped[references[reference]] = ""
            except ray.exceptions.RayError as error:
                stopped[references[reference]] = str(error)
        return stopped

    def check(self) -> None:
        """Raise ``UnsupportedModel`` or ``WorkerNotStarted`` if a worker has failed to start since the last call."""
        self._start_placed()
        if not self._starting:
            return
        done, _ = ray.wait(list(self._starting), num_returns=len(self._starting), timeout=0)
        for reference in done:
            worker_id = self._starting.pop(reference)
            try:
                failure: StartFailure | None = ray.get(reference)
            except ray.exceptions.RayActorError as error:
                raise WorkerNotStarted(f"{worker_id}: {error}") from error
            if failure is not None:
                _raise_here(worker_id, failure)

    def drain(self, timeout_s: float) -> bool:
        """Have the workers finish what they run, for up to ``timeout_s``, and leave their gateways; does not wait.

        True once all have. One that still loads is not asked: it would answer only after that.
        """
        if self._stopping is None:
            loading = self._loading()
            self._stopping = [a.stop.remote(timeout_s) for name, a in self._workers.items() if name not in loading]
        return self._all_stopped(0.0)

    def stop(self, timeout_s: float) -> None:
        """Ask the workers to stop within ``timeout_s``, kill what is left, leave Ray. Harmless if nothing runs."""
        if not ray.is_initialized():
            return
        if not self.drain(timeout_s) and timeout_s > 0:
            self._all_stopped(timeout_s + _STOP_SLACK_S)
        for actor in self._workers.values():
            ray.kill(actor, no_restart=True)
        for group in (*self._groups, *self._own_groups.values()):
            remove_placement_group(group)
        for kept in (self._workers, self._starting, self._own_groups, self._pool_of, self._retiring, self._failed):
            kept.clear()
        self._unplaced.clear()
        self._groups.clear()
        self._stopping = None
        ray.shutdown()

    def _loading(self) -> set[WorkerId]:
        """Workers whose actors are not made yet."""
        references = list(self._starting)
        _, pending = ray.wait(references, num_returns=len(references), timeout=0) if references else ([], [])
        return {self._starting[reference] for reference in pending}

    def _all_stopped(self, timeout_s: float) -> bool:
        """Did every worker that was asked answer, or die? Waits up to ``timeout_s`` for it."""
        asked = self._stopping or []
        done, _ = ray.wait(asked, num_returns=len(asked), timeout=timeout_s) if asked else ([], [])
        return len(done) == len(asked)

    def _places(self, role: Role, pool: PoolConfig) -> Iterator[str | PlacementGroupSchedulingStrategy]:
        """Where each worker of a pool goes."""
        if pool.tensor_parallel > 1:
            for _ in range(pool.count):
                group = _group_of_worker(role, pool)
                self._groups.append(group)
                yield PlacementGroupSchedulingStrategy(group, 0, placement_group_capture_child_tasks=False)
            return
        if pool.placement is None or pool.count == 0:
            yield from ["DEFAULT"] * pool.count
            return
        bundle = _bundle(pool)
        if not bundle:
            raise InvalidConfig(f"{role}.placement", "needs num_cpus, num_gpus or resources above 0 to place by")
        group = placement_group([bundle] * pool.count, strategy=pool.placement)
        self._groups.append(group)
        for index in range(pool.count):
            yield PlacementGroupSchedulingStrategy(group, index, placement_group_capture_child_tasks=False)


class WorkerActor:
    """One worker process, as Ray sees it. Made by Ray, again after each crash."""

    def __init__(self, config: ServiceConfig, role: Role, worker_id: WorkerId, registry: str, proof: Proof) -> None:
        os.environ.pop("OMP_NUM_THREADS", None)
        configure_logging(config.log_level, config.log_format, config.log_requests, worker_id)
        self._host: WorkerHost | None = None
        self._failure: StartFailure | None = None
        self._files = ExitStack()
        try:
            credentials = self._files.enter_context(private_files(proof)) if isinstance(proof, Pem) else proof
            self._host = _start_host(config, role, worker_id, registry, credentials, proof)
        except Exception as error:
            logger.exception("worker %s did not start", worker_id)
            if _is_restart():
                raise  # nobody asks any more; Ray does not repeat a constructor that raises
            self._failure = StartFailure(type(error).__name__, str(error))

    def start_failure(self) -> StartFailure | None:
        """Why the worker did not start; None: it serves."""
        return self._failure

    def stop(self, timeout_s: float) -> None:
        """Take nothing new, finish what runs for up to ``timeout_s``, leave the gateways."""
        if self._host is not None:
            self._host.stop(timeout_s)
        self._files.close()


class RankActor:
    """Another rank of a worker, as Ray sees it; made by the worker's actor, and not made again."""

    def serve(self, task: RankTask, proof: Proof) -> None:
        """Be that rank until the worker ends. Files of ``proof`` are this process's own, as rank 0's are its own."""
        os.environ.pop("OMP_NUM_THREADS", None)
        with _nothing_collected():
            from cluster.rank_host import serve_rank  # torch

        with private_files(proof) if isinstance(proof, Pem) else nullcontext(proof) as credentials:
            serve_rank(replace(task, config=replace(task.config, credentials=credentials)))


class _RayRank:
    """A rank's process: an actor in its bundle of the worker's placement group."""

    def __init__(self, task: RankTask, pool: PoolConfig, proof: Proof) -> None:
        group = ray.util.get_current_placement_group()
        assert group is not None, "a worker of several ranks is placed in a group of its own"
        placing = PlacementGroupSchedulingStrategy(group, task.rank, placement_group_capture_child_tasks=False)
        actor: Any = ray.remote(RankActor).options(scheduling_strategy=placing, max_restarts=0, **_rank_resources(pool))
        self._actor = actor.remote()
        self._end = self._actor.serve.remote(task, proof)

    def is_alive(self) -> bool:
        ended, _ = ray.wait([self._end], timeout=0)
        return not ended

    def kill(self) -> None:
        ray.kill(self._actor)


def worker_config(
    config: ServiceConfig,
    role: Role,
    worker_id: WorkerId,
    host: str,
    registry: str,
    credentials: Credentials | None,
) -> WorkerConfig:
    """What one worker is told, of what the service was told."""
    return WorkerConfig(
        worker_id=worker_id,
        cluster_id=ClusterId(config.cluster_id),
        role=role,
        model=config.model,
        model_cache_dir=config.model_cache_dir,
        engine=config.engine_for(role),
        kv_transfer=config.kv_transfer,
        host=host,
        registries=(registry, *config.join),
        control=config.control,
        credentials=credentials,
        log_level=config.log_level,
        log_format=config.log_format,
        log_requests=config.log_requests,
        tracing=config.tracing,
        tensor_parallel=config.pool(role).tensor_parallel,
    )


def _start_host(
    config: ServiceConfig,
    role: Role,
    worker_id: WorkerId,
    registry: str,
    credentials: Credentials | None,
    proof: Proof,
) -> WorkerHost:
    with _nothing_collected():
        from cluster.worker_host import EXIT_ENGINE_DIED, WorkerHost  # torch, which only a worker's process may load

    told = worker_config(config, role, worker_id, config.host or _node_address(), registry, credentials)
    # A process whose engine died of a bug ends at once: Ray starts it anew, the router moves its requests.
    pool = config.pool(role)
    worker = WorkerHost(
        told, on_death=lambda: os._exit(EXIT_ENGINE_DIED), start_rank=lambda task: _RayRank(task, pool, proof)
    )
    worker.start()
    return worker


@contextmanager
def _nothing_collected() -> Iterator[None]:
    """What torch and transformers make when they are imported stays: looking for garbage among it takes a seventh of
    the processor time of the import, which is most of what a small model's worker takes to start.
    """
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


def _is_restart() -> bool:
    return bool(ray.get_runtime_context().was_current_actor_reconstructed)


def _node_address() -> str:
    return str(ray.util.get_node_ip_address())  # type: ignore[no-untyped-call]


def _raise_here(worker_id: WorkerId, failure: StartFailure) -> None:
    if failure.kind == UnsupportedModel.__name__:
        raise UnsupportedModel(failure.message)
    raise WorkerNotStarted(f"{worker_id}: {failure.kind}: {failure.message}")


def _bundle(pool: PoolConfig) -> dict[str, float]:
    """The Ray resources of one worker."""
    wanted = {"CPU": pool.num_cpus, "GPU": pool.num_gpus, **pool.resources}
    return {name: amount for name, amount in wanted.items() if amount > 0}


def _group_of_worker(role: Role, pool: PoolConfig, name: str = "") -> PlacementGroup:
    """A placement group for one worker, with a bundle for each of its ranks, on one node."""
    bundle = {name: amount / pool.tensor_parallel for name, amount in _bundle(pool).items()}
    if pool.tensor_parallel > 1 and not bundle:
        key = f"{role}.tensor_parallel"
        raise InvalidConfig(key, "needs num_cpus, num_gpus or resources above 0: ranks are placed by them")
    group: PlacementGroup = placement_group([bundle] * pool.tensor_parallel, strategy="STRICT_PACK", name=name)
    return group


def _rank_resources(pool: PoolConfig) -> dict[str, Any]:
    """What the actor of one rank reserves, of what its worker does."""
    share = pool.tensor_parallel
    return {
        "num_cpus": pool.num_cpus / share,
        "num_gpus": pool.num_gpus / share,
        "resources": {name: amount / share for name, amount in pool.resources.items()} or None,
    }


def _needed(config: ServiceConfig) -> Mapping[str, float]:
    """The Ray resources of all workers together, when elastic pools have all that they may have."""
    needed: dict[str, float] = {}
    for role in Role:
        pool = config.pool(role)
        for name, amount in _bundle(pool).items():
            needed[name] = needed.get(name, 0.0) + amount * pool.most
    return needed


def _own_resources(config: ServiceConfig) -> dict[str, Any]:
    """Resources of a Ray of our own: what the machine has, and no worker waits for ever for CPUs that it has not."""
    needed = dict(_needed(config))
    num_cpus, wanted = os.cpu_count() or 1, needed.pop("CPU", 0.0)
    needed.pop("GPU", None)
    if wanted > num_cpus:
        logger.warning("the workers reserve %g CPUs, this machine has %d: they will share", wanted, num_cpus)
    return {"num_cpus": max(num_cpus, int(-(-wanted // 1))), "resources": needed or None}


def _require_listener(address: str) -> None:
    """``OSError`` if nobody listens there: Ray itself would try for minutes."""
    host, colon, port = address.rpartition(":")
    if colon and port.isdigit():
        socket.create_connection((host, int(port)), timeout=_CONNECT_TIMEOUT_S).close()


def _require_gpus(config: ServiceConfig) -> None:
    wanted, has = _needed(config).get("GPU", 0.0), _gpus_here()
    if wanted > has:
        raise InvalidConfig("num_gpus", f"the workers need {wanted:g} GPUs in all, this machine has {has:g}")


def _gpus_here() -> float:
    return float(ray.cluster_resources().get("GPU", 0.0))  # type: ignore[no-untyped-call]
