"""How does a cluster without a gateway start, come to be used by gateways elsewhere, and stop? (``join`` in the YAML.)

Such a cluster is a Ray cluster of prefill workers, and this process, which starts them and serves nobody:

    1  resolve the model, join Ray       as a service does (cluster/launch.py)
    2  open a registry of our own        the workers register here, too, and tell what the gateways say to them
    3  start the workers                 each registers with every gateway of ``join`` by itself, for ever
    4  wait until it is used             every worker runs, and each is taken by a gateway; one line for each change of
                                         what a gateway says, from here to the end; ``on_ready``
    5  wait for SIGINT or SIGTERM        a second one cuts the next step short
    6  drain                             the workers tell the gateways that they take nothing new, finish what runs for
                                         up to ``drain_timeout_s``, say goodbye and end
    7  close the registry, stop the fleet and Ray

Invariants: this process is on no request's path, and a gateway that is not there, or no longer there, ends nothing
here: workers of a cluster that nobody uses wait for ever.
"""

from __future__ import annotations

import asyncio
import logging
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from contextlib import AsyncExitStack, suppress
from dataclasses import dataclass
from uuid import uuid4

import grpc

from cluster.config import ServiceConfig
from cluster.internal_tls import InternalTls
from cluster.launch import Fleet, NotReadyInTime, Signals, ray_fleet, resolve_model, run, say, to_the_end
from cluster.registration import Registration
from core.clock import Clock, WallClock
from core.errors import InvalidConfig
from core.request import ClusterId, EngineId, GatewayId, Role, WorkerId
from protos import worker_pb2 as pb
from protos import worker_pb2_grpc as rpc
from protos.channels import InternalGrpc

logger = logging.getLogger(__name__)

LEASE_S = 5.0  # of a worker at this process: how soon its silence is noticed
_LOOK_S = 0.25  # how often start failures, leases and the drain are looked at
_DRAIN_SLACK_S = 2.0  # for workers to say goodbye and to close, once nothing runs

_Context = grpc.aio.ServicerContext[pb.RegisterRequest, pb.RegisterReply]


@dataclass(frozen=True, slots=True)
class Worker:
    """A worker of this cluster that lives, and what each gateway last said to it."""

    worker_id: WorkerId
    engine_id: EngineId
    heard_at: float
    gateways: tuple[Registration, ...]

    @property
    def is_used(self) -> bool:
        """Does a gateway hold a lease of it?"""
        return any(gateway.taken for gateway in self.gateways)


def gateway_line(gateway: str, workers: Iterable[Worker], num_workers: int) -> str | None:
    """What a gateway says of all workers together; ``num_workers``: so many there should be. None: it was not asked."""
    said = [registration for w in workers for registration in w.gateways if registration.registry == gateway]
    if not said:
        return None
    num_taken = sum(registration.taken for registration in said)
    reasons = Counter(registration.said for registration in said if not registration.taken)
    line = f"gateway {gateway} has taken {num_taken} of {num_workers} workers"
    return line if not reasons else f"{line}; it says: {reasons.most_common(1)[0][0]}"


class HomeRegistry(rpc.RegistryServicer):
    """Which workers of this cluster live, and who took them. Everything happens on one event loop."""

    def __init__(self, clock: Clock, internal: InternalGrpc) -> None:
        self._clock = clock
        self._internal = internal
        self._workers: dict[WorkerId, Worker] = {}
        self._server: grpc.aio.Server | None = None
        self.changed = asyncio.Event()  # set whenever a worker came, left, or told something new

    @property
    def workers(self) -> tuple[Worker, ...]:
        """Those heard of within ``LEASE_S``, by name."""
        now = self._clock.now()
        alive = (worker for worker in self._workers.values() if worker.heard_at + LEASE_S > now)
        return tuple(sorted(alive, key=lambda worker: worker.worker_id))

    async def start(self, host: str) -> str:
        """Listen; returns the host:port that the workers are to be given."""
        assert self._server is None, "started already"
        self._server = grpc.aio.server()
        rpc.add_RegistryServicer_to_server(self, self._server)
        port = self._internal.listen(self._server, f"{host}:0")
        await self._server.start()
        return f"{host}:{port}"

    async def close(self) -> None:
        """Stop listening."""
        if self._server is not None:
            await self._server.stop(grace=None)
            self._server = None  # grpc.aio's finaliser needs the event loop, which must not close first

    async def Register(self, request: pb.RegisterRequest, context: _Context) -> pb.RegisterReply:  # noqa: N802
        worker_id, engine_id = WorkerId(request.worker_id), EngineId(request.engine_id)
        before = self._workers.get(worker_id)
        if request.leaving:
            if before is not None and before.engine_id == engine_id:
                del self._workers[worker_id]
                self.changed.set()
            return pb.RegisterReply()
        gateways = tuple(map(Registration.from_message, request.others))
        self._workers[worker_id] = Worker(worker_id, engine_id, self._clock.now(), gateways)
        if before is None or (before.engine_id, before.gateways) != (engine_id, gateways):
            self.changed.set()
        return pb.RegisterReply(lease_s=LEASE_S)


def serve(config: ServiceConfig) -> int:
    """Run the cluster until SIGINT or SIGTERM; returns the process's exit code, after printing why if it is not 0.

    2: the configuration is wrong or the model cannot be served. 1: something else kept the workers from starting.
    """
    return run(config, serve_async(config))


async def serve_async(
    config: ServiceConfig,
    on_ready: Callable[[], None] = lambda: None,
    make_fleet: Callable[[ServiceConfig], Fleet] | None = None,
    clock: Clock | None = None,
) -> None:
    """Run until SIGINT or SIGTERM. Raises what kept the workers from starting; everything is closed by then."""
    assert config.join, "a cluster with a gateway is launch's"
    with Signals() as signals:
        cluster = _RemoteCluster(config, (make_fleet or ray_fleet)(config), clock or WallClock(), signals)
        try:
            await signals.unless_stopped(cluster.run(on_ready))
            say(f"stopping: what runs gets {config.drain_timeout_s:g} s; a second signal stops at once")
            await signals.unless_repeated(cluster.drain())
        finally:
            await cluster.stop()


class _RemoteCluster:
    """What was started so far, and how each part is closed."""

    def __init__(self, config: ServiceConfig, fleet: Fleet, clock: Clock, signals: Signals) -> None:
        self._config = config
        self._fleet = fleet
        self._clock = clock
        self._signals = signals
        self._opened = AsyncExitStack()
        self._lines: dict[str, str] = {}  # subject |-> what was last said of it

    async def run(self, on_ready: Callable[[], None]) -> None:
        """Steps 1 to 5; ends only by being cancelled, or with what kept the workers from starting."""
        began_at = self._clock.now()
        home = await self._start()
        await self._wait_for_workers(home, began_at)
        ready = False
        while True:
            home.changed.clear()
            workers = home.workers
            self._tell(workers)
            if not ready and len(workers) == self._num_workers and all(worker.is_used for worker in workers):
                ready = True
                say(f"ready: all {self._num_workers} workers of {self._config.cluster_id} are used")
                on_ready()
            await _set_within(home.changed, _LOOK_S)

    async def drain(self) -> None:
        """Step 6, as far as it gets in ``drain_timeout_s``."""
        timeout_s = self._config.drain_timeout_s
        give_up_at = self._clock.now() + timeout_s + _DRAIN_SLACK_S
        while not await to_the_end(asyncio.to_thread(self._fleet.drain, timeout_s)):
            if self._clock.now() > give_up_at:
                logger.warning("not every worker has stopped %g s after it was asked to", timeout_s + _DRAIN_SLACK_S)
                return
            await asyncio.sleep(_LOOK_S)

    async def stop(self) -> None:
        """Close what was opened, the last first."""
        await self._opened.aclose()

    @property
    def _num_workers(self) -> int:
        return self._config.pool(Role.PREFILL).count

    async def _start(self) -> HomeRegistry:
        config = self._config
        await resolve_model(config.model, config.model_cache_dir)
        self._opened.push_async_callback(asyncio.to_thread, self._fleet.stop, 0.0)
        host = await to_the_end(asyncio.to_thread(self._fleet.join))
        self._signals.listen()
        tls = InternalTls(config.tls, (host, config.kv_transfer.host or host), ClusterId(config.cluster_id))
        self._opened.callback(tls.close)
        say(f"internal TLS {tls.decision}")
        if tls.decision.on and not config.tls.has_files:
            raise InvalidConfig(
                "tls.ca_file",
                "is needed with join, and so are cert_file and key_file: a gateway takes no certificates that another "
                "cluster makes for its own run (docs/two-datacenters.md; tls.mode off does without any)",
            )
        home = HomeRegistry(self._clock, InternalGrpc(tls.open(GatewayId(f"{config.cluster_id}-{uuid4().hex[:8]}"))))
        self._opened.push_async_callback(home.close)
        registry = await home.start(host)
        await to_the_end(asyncio.to_thread(self._fleet.start, registry, tls.proof_of))
        return home

    async def _wait_for_workers(self, home: HomeRegistry, began_at: float) -> None:
        """Every configured worker runs, or ``NotReadyInTime``; what failed to start is raised as it is."""
        while len(home.workers) < self._num_workers:
            home.changed.clear()
            await to_the_end(asyncio.to_thread(self._fleet.check))
            self._tell(home.workers)
            if self._clock.now() - began_at > self._config.start_timeout_s:
                raise NotReadyInTime(
                    f"after {self._config.start_timeout_s:g} s {len(home.workers)} of {self._num_workers} workers run"
                )
            await _set_within(home.changed, _LOOK_S)

    def _tell(self, workers: Sequence[Worker]) -> None:
        """A line for whatever has changed."""
        self._say_once("workers", f"{len(workers)} of {self._num_workers} workers run")
        for gateway in self._config.join:
            self._say_once(gateway, gateway_line(gateway, workers, self._num_workers))

    def _say_once(self, subject: str, line: str | None) -> None:
        if line is not None and self._lines.get(subject) != line:
            self._lines[subject] = line
            say(line)


async def _set_within(event: asyncio.Event, timeout_s: float) -> None:
    with suppress(TimeoutError):
        async with asyncio.timeout(timeout_s):
            await event.wait()
