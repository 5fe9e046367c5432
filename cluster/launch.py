"""How does one command become a running service, and then nothing again? The gateway process is put together here.

    1  resolve the model to a folder     a subprocess: it may download or convert, and that loads torch
    2  join Ray, open the Registry       the fleet says at which address workers reach this process; whether what they
                                         say to each other is encrypted is decided with it
    3  start the workers                 they load the model and register; meanwhile the tokenizer is loaded here
    4  wait until every worker is ready  with a line whenever something changed; and until every link between a
                                         prefill and a decode worker was tested, and one of them works. Workers of other
                                         clusters may register meanwhile, and are not waited for
    5  open both doors, say where        ``on_ready``; from here on the planner plans
    6  wait for SIGINT or SIGTERM        a second one cuts every step below short
    7  drain                             no new requests; running ones get ``drain_timeout_s``, then are cancelled
    8  close the doors, drop the workers' connections, stop the fleet and Ray

Whatever happens in 1 to 6, step 8 is done for everything that was opened, in reverse order.
"""

from __future__ import annotations

import asyncio
import gc
import logging
import signal
import sys
from collections.abc import Callable, Coroutine, Mapping
from contextlib import AsyncExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol, TypeVar, runtime_checkable
from uuid import uuid4

from cluster.api_keys import ApiKeys
from cluster.catalogue import load_catalogue
from cluster.config import ServiceConfig
from cluster.cost_recorder import CostRecorder
from cluster.demand import DemandMeter
from cluster.finished_requests import RecentRequests, RequestLog
from cluster.front_door import no_usable_link_reason
from cluster.generation import Generation
from cluster.grammar_check import GrammarChecker
from cluster.grpc_gateway import GrpcGateway
from cluster.http_gateway import HttpGateway
from cluster.internal_tls import InternalTls, IssueProof, TlsDecision
from cluster.link_tester import LinkTester, PairResult
from cluster.log_format import configure_logging
from cluster.membership import Membership
from cluster.message_json import as_dict
from cluster.metrics import Metrics
from cluster.otlp import open_tracing
from cluster.planner import Planner
from cluster.pool_scaler import PoolScaler, WorkerPhase
from cluster.router import Router
from cluster.routing_policy import make_policy
from cluster.sampling_defaults import sampling_defaults
from cluster.tokenizer import Tokenizer, leave_torch_out
from cluster.view import ClusterView
from core.clock import Clock, WallClock
from core.errors import InvalidConfig, PrfaasError, UnsupportedModel
from core.request import ClusterId, GatewayId, Role, SamplingParams, WorkerId
from core.tracing import TRACING_OFF
from protos.channels import InternalGrpc

logger = logging.getLogger(__name__)

EXIT_OK, EXIT_FAILED, EXIT_WRONG_INPUT = 0, 1, 2

_CHECK_INTERVAL_S = 0.25  # how often the start looks for workers that failed
_DOOR_GRACE_S = 0.5  # for answers that are written already; requests were drained before
_EVERY_INTERFACE = ("0.0.0.0", "::", "[::]")
_FLEET_GRACE_S = 1.0  # for workers to say goodbye; they run nothing any more

_T = TypeVar("_T")


class NotReadyInTime(PrfaasError):
    """The workers were not ready within ``start_timeout_s``; the message says which are missing."""


class Fleet(Protocol):
    """Starts and ends worker processes; methods block. ``cluster.ray_fleet.RayFleet`` is the real one."""

    def join(self) -> str:
        """Make ready to start workers; returns the address at which workers reach this process."""
        ...

    def start(self, registry: str, issue_proof: IssueProof) -> None:
        """Start every worker of the configuration; each registers at ``registry``, with what it was issued."""
        ...

    def check(self) -> None:
        """Raise the reason if a worker has failed to start."""
        ...

    def drain(self, timeout_s: float) -> bool:
        """Have the workers finish what they run, for up to ``timeout_s``, and leave; does not wait for it.

        Later calls only ask whether all of them have. Workers that still load are not waited for.
        """
        ...

    def stop(self, timeout_s: float) -> None:
        """End every worker, within about ``timeout_s``; 0: at once. Harmless if nothing runs."""
        ...


@runtime_checkable
class ElasticFleet(Fleet, Protocol):
    """One that also starts and ends single workers, of pools whose size may change: ``PoolFleet``, but blocking."""

    def members(self) -> Mapping[WorkerId, Role]: ...
    def add(self, role: Role) -> WorkerId: ...
    def phases(self) -> Mapping[WorkerId, WorkerPhase]: ...
    def retire(self, worker_id: WorkerId, timeout_s: float) -> None: ...
    def remove(self, worker_id: WorkerId) -> None: ...


class _PoolsInThreads:
    """A fleet's single workers for the scaler, which waits on the event loop: each call is made in a thread."""

    def __init__(self, fleet: ElasticFleet) -> None:
        self._fleet = fleet

    async def members(self) -> Mapping[WorkerId, Role]:
        return await to_the_end(asyncio.to_thread(self._fleet.members))

    async def add(self, role: Role) -> WorkerId:
        return await to_the_end(asyncio.to_thread(self._fleet.add, role))

    async def phases(self) -> Mapping[WorkerId, WorkerPhase]:
        return await to_the_end(asyncio.to_thread(self._fleet.phases))

    async def retire(self, worker_id: WorkerId, timeout_s: float) -> None:
        await to_the_end(asyncio.to_thread(self._fleet.retire, worker_id, timeout_s))

    async def remove(self, worker_id: WorkerId) -> None:
        await to_the_end(asyncio.to_thread(self._fleet.remove, worker_id))


@dataclass(frozen=True, slots=True)
class Endpoints:
    """Where the service listens."""

    http: str  # URL
    grpc: str  # host:port


OnReady = Callable[[Endpoints], None]


def serve(config: ServiceConfig, on_ready: OnReady | None = None) -> int:
    """Serve until SIGINT or SIGTERM; returns the process's exit code, after printing why if it is not 0.

    2: the configuration is wrong or the model cannot be served. 1: something else kept the service from starting.
    """
    return run(config, serve_async(config, on_ready))


def run(config: ServiceConfig, serving: Coroutine[Any, Any, None]) -> int:
    """Run to its end what ``config`` describes; the process's exit code, as ``serve`` says."""
    process = f"cluster {config.cluster_id}" if config.join else "gateway"
    configure_logging(config.log_level, config.log_format, config.log_requests, process)
    try:
        asyncio.run(serving)
    except (InvalidConfig, UnsupportedModel) as error:
        print(f"prfaas: {error}", file=sys.stderr, flush=True)
        return EXIT_WRONG_INPUT
    except PrfaasError as error:
        print(f"prfaas: {error}", file=sys.stderr, flush=True)
        return EXIT_FAILED
    return EXIT_OK


async def serve_async(
    config: ServiceConfig,
    on_ready: OnReady | None = None,
    make_fleet: Callable[[ServiceConfig], Fleet] | None = None,
    clock: Clock | None = None,
) -> None:
    """Serve until SIGINT or SIGTERM. Raises what kept the service from starting; everything is closed by then."""
    with Signals() as signals:
        service = _Service(config, (make_fleet or ray_fleet)(config), clock or WallClock(), signals)
        try:
            if await signals.unless_stopped(service.start()):
                say(f"ready: {config.model_name} at {service.endpoints.http} and grpc://{service.endpoints.grpc}")
                (on_ready or _ignore)(service.endpoints)
                await signals.first.wait()
                say(f"stopping: running requests get {config.drain_timeout_s:g} s; a second signal stops at once")
                await signals.unless_repeated(service.drain())
        finally:
            await service.stop()


async def check_links(
    config: ServiceConfig,
    on_result: Callable[[PairResult], None],
    make_fleet: Callable[[ServiceConfig], Fleet] | None = None,
    clock: Clock | None = None,
) -> bool:
    """Start the workers, test every link between a prefill and a decode worker once, stop everything.

    ``on_result`` hears each result as it comes. Opens no door. False: SIGINT or SIGTERM came before it was done.
    Raises what kept the workers from starting.
    """
    asked = replace(config, kv_transfer=replace(config.kv_transfer, self_test=False))  # each once, not also unasked
    with Signals() as signals:
        service = _Service(asked, (make_fleet or ray_fleet)(asked), clock or WallClock(), signals)

        async def check() -> None:
            cluster = await service.start_workers()
            async for result in cluster.tester.test_all():
                on_result(result)

        try:
            return await signals.unless_stopped(check())
        finally:
            await service.stop()


@dataclass(frozen=True, slots=True)
class _Cluster:
    """The workers, ready, and what the doors need of them."""

    gateway_id: GatewayId
    began_at: float
    membership: Membership
    tester: LinkTester
    folder: str  # the model's
    tokenizer: Tokenizer
    defaults: SamplingParams  # of requests
    tls: TlsDecision


class _Service:
    """What was started so far, and how each part is closed."""

    def __init__(self, config: ServiceConfig, fleet: Fleet, clock: Clock, signals: Signals) -> None:
        self._config = config
        self._fleet = fleet
        self._clock = clock
        self._signals = signals
        self._opened = AsyncExitStack()
        self._gateway_id = GatewayId(f"gateway-{uuid4().hex[:8]}")
        self._tracing = TRACING_OFF
        self._router: Router | None = None
        self._endpoints: Endpoints | None = None

    @property
    def endpoints(self) -> Endpoints:
        assert self._endpoints is not None, "started first"
        return self._endpoints

    async def start(self) -> None:
        ApiKeys(self._config.api_keys_file)  # a file that cannot be used is an error now, not when the model is loaded
        self._open_tracing()
        cluster = await self.start_workers()
        await self._wait_for_links(cluster)
        await self._open_doors(cluster)
        # What was loaded until here stays: looking at it again would stop every stream for a tenth of a second.
        gc.collect()
        gc.freeze()

    async def start_workers(self) -> _Cluster:
        """Steps 1 to 4, without the links."""
        config, gateway_id = self._config, self._gateway_id
        began_at = self._clock.now()
        folder = await resolve_model(config.model, config.model_cache_dir)
        defaults, origin = sampling_defaults(config.sampling_defaults, Path(folder))
        if origin:
            logger.info("defaults of requests: %s", origin)
        self._opened.push_async_callback(self._stop_fleet)
        host = await to_the_end(asyncio.to_thread(self._fleet.join))
        self._signals.listen()
        own_cluster = ClusterId(config.cluster_id)
        listening = config.registry.host or host
        tls = InternalTls(config.tls, (host, config.kv_transfer.host or host, listening), own_cluster)
        self._opened.callback(tls.close)
        say(f"internal TLS {tls.decision}")
        internal = InternalGrpc(tls.open(gateway_id))
        self_test = config.kv_transfer.self_test
        costs = CostRecorder(load_catalogue(), config.kv_transfer.capacity, config.router.costs_path)
        self._opened.push_async_callback(costs.close)
        membership = Membership(
            config.router,
            gateway_id,
            self._clock,
            internal,
            self_test=self_test,
            listener=costs,
            cluster_id=own_cluster,
        )
        self._opened.push_async_callback(membership.close)
        costs.start(membership)
        tester = LinkTester(membership, self._clock, unasked=self_test)
        self._opened.push_async_callback(tester.close)
        tester.start()
        registry = await self._open_registry(membership, tls.decision, listening, host)
        await to_the_end(asyncio.to_thread(self._fleet.start, registry, tls.proof_of))
        tokenizer = await asyncio.to_thread(_load_tokenizer, folder)
        await self._wait_for_workers(membership, began_at)
        return _Cluster(gateway_id, began_at, membership, tester, folder, tokenizer, defaults, tls.decision)

    async def _open_registry(self, membership: Membership, tls: TlsDecision, listening: str, host: str) -> str:
        """Let workers register; returns where those of this service do. Says where those of other clusters may."""
        port = self._config.registry.port
        registry = await membership.start(listening, port)
        if port and tls.on and not self._config.tls.has_files:
            logger.warning(
                "registry.port is set, but no other cluster can join: certificates are made for this run and nobody "
                "else has one; give tls.ca_file, tls.cert_file and tls.key_file (docs/two-datacenters.md)"
            )
        elif port:
            say(f"other clusters may join at {registry}")
        return f"{host}:{registry.rpartition(':')[2]}" if listening in _EVERY_INTERFACE else registry

    async def _open_doors(self, cluster: _Cluster) -> None:
        config, membership = self._config, cluster.membership
        demand = DemandMeter(self._clock, config.planner.demand_window_s)
        policy = make_policy(config.router.policy, config.router.routing)
        gateway_id, admission = cluster.gateway_id, config.admission
        router = Router(membership, policy, config.router, self._clock, gateway_id, admission, demand, self._tracing)
        self._router = router
        self._opened.push_async_callback(router.drain, 0.0)
        planner = await self._plan(cluster, router, demand)
        metrics = Metrics(membership, router, config.kv_transfer.capacity, planner)
        requests = RecentRequests()
        grammars = GrammarChecker(cluster.folder, config.structured_output, metrics.grammar)
        self._opened.push_async_callback(grammars.close)
        generation = Generation(
            router,
            membership,
            cluster.tokenizer,
            metrics,
            config,
            self._clock,
            tracing=self._tracing,
            watchers=(requests, RequestLog()),
            grammars=grammars,
            sampling_defaults=cluster.defaults,
        )
        grpc = GrpcGateway(
            generation, router, membership, cluster.tester, planner, config, self._clock, cluster.tls, requests
        )
        self._opened.push_async_callback(grpc.stop, _DOOR_GRACE_S)
        await grpc.start()
        http = HttpGateway(
            generation,
            membership,
            metrics,
            config,
            self._clock,
            lambda: as_dict(grpc.cluster_info()),
            lambda limit: as_dict(grpc.recent_requests(limit)),
        )
        self._opened.push_async_callback(http.stop, _DOOR_GRACE_S)
        await http.start()
        self._endpoints = Endpoints(
            http=f"http://{_authority(config.http.host, http.port)}", grpc=_authority(config.grpc.host, grpc.port)
        )

    def _open_tracing(self) -> None:
        """First, because what is wrong with it should be said before a model is loaded; hence it is closed last."""
        self._tracing, otlp = open_tracing(
            self._config.tracing,
            self._clock,
            {"service.instance.id": self._gateway_id, "prfaas.cluster": self._config.cluster_id},
        )
        if otlp is not None:
            self._opened.push_async_callback(asyncio.to_thread, otlp.close)

    async def _plan(self, cluster: _Cluster, router: Router, demand: DemandMeter) -> Planner:
        """A planner at work, and a scaler if pools may grow; they end before the workers do."""
        config = self._config
        scaler: PoolScaler | None = None
        if config.elastic_roles:
            assert isinstance(self._fleet, ElasticFleet), "pools of this fleet have a fixed size"
            scaler = PoolScaler(
                _PoolsInThreads(self._fleet),
                cluster.membership,
                {role: config.pool(role) for role in config.elastic_roles},
                config.planner.scaling,
                config.start_timeout_s,
                self._clock,
            )
            self._opened.push_async_callback(scaler.close)
            await scaler.start()
        planner = Planner(
            cluster.membership,
            demand,
            router,
            config.planner,
            self._clock,
            cluster_id=ClusterId(config.cluster_id),
            capacity=config.kv_transfer.capacity,
            retest=cluster.tester.retest,
            tpot_s=config.admission.tpot_slo_s,
            ttft_s=config.admission.ttft_slo_s,
            scaler=scaler,
        )
        self._opened.push_async_callback(planner.close)
        planner.start()
        return planner

    async def drain(self) -> None:
        assert self._router is not None, "started first"
        await self._router.drain(self._config.drain_timeout_s)

    async def stop(self) -> None:
        """Close what was opened, the last first."""
        await self._opened.aclose()

    async def _stop_fleet(self) -> None:
        await asyncio.to_thread(self._fleet.stop, 0.0 if self._signals.second.is_set() else _FLEET_GRACE_S)

    async def _wait_for_workers(self, membership: Membership, began_at: float) -> None:
        """Every configured worker is ready, or ``NotReadyInTime``; what failed to start is raised as it is."""
        own_cluster = ClusterId(self._config.cluster_id)
        wanted = {role: self._config.pool(role).count for role in Role}
        said = ""
        while True:
            await to_the_end(asyncio.to_thread(self._fleet.check))
            line = _progress(membership.view().within(own_cluster), wanted)
            if line != said:
                said = line
                say(f"workers ready: {line}")
            if await membership.wait_until(
                lambda view: _all_ready(view.within(own_cluster), wanted), _CHECK_INTERVAL_S
            ):
                say(f"workers ready: all, {self._clock.now() - began_at:.1f} s after the start")
                return
            if self._clock.now() - began_at > self._config.start_timeout_s:
                raise NotReadyInTime(f"after {self._config.start_timeout_s:g} s the workers ready are {line}")

    async def _wait_for_links(self, cluster: _Cluster) -> None:
        """Every link was tested and one of them works, or ``NotReadyInTime`` with the reason."""
        if not self._config.kv_transfer.self_test:
            return
        said, own_cluster = "", ClusterId(self._config.cluster_id)
        while not await cluster.membership.wait_until(
            lambda view: _links_tested(view.within(own_cluster)), _CHECK_INTERVAL_S
        ):
            reason = no_usable_link_reason(cluster.membership.view())
            if reason is not None and reason != said:
                said = reason
                say(reason)
            if self._clock.now() - cluster.began_at > self._config.start_timeout_s:
                raise NotReadyInTime(f"after {self._config.start_timeout_s:g} s {said or 'not every link was tested'}")
        links = cluster.membership.view().within(own_cluster).links.values()
        for link in links:
            if not link.usable:
                say(f"link {link.from_worker} to {link.to_worker} is not used: {link.reason}")
        say(f"links tested: {sum(link.usable for link in links)} of {len(links)} work")


async def resolve_model(model: str, cache_dir: str) -> str:
    """The folder that holds ``model``; its progress goes to stderr. Raises ``UnsupportedModel`` with the reason."""
    child = await asyncio.create_subprocess_exec(
        sys.executable,
        "-m",
        "engine.model_source",
        model,
        "--cache-dir",
        cache_dir,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
        start_new_session=True,  # a Ctrl-C in the terminal is for this process, which then ends the child
    )
    assert child.stdout is not None, "asked for as a pipe"
    assert child.stderr is not None, "asked for as a pipe"
    last_line = ""
    try:
        async for line in child.stderr:
            last_line = line.decode(errors="replace").rstrip()
            say(last_line)
        lines = (await child.stdout.read()).decode().split("\n")
        exit_code = await child.wait()
    finally:
        if child.returncode is None:
            child.kill()
            await child.wait()
    if exit_code != 0:
        raise UnsupportedModel(last_line or f"{model}: resolving it ended with exit code {exit_code}")
    return lines[-2]


class Signals:
    """SIGINT and SIGTERM, counted: the first asks for an orderly stop, the second for one at once."""

    def __init__(self) -> None:
        self.first = asyncio.Event()
        self.second = asyncio.Event()

    def __enter__(self) -> Signals:
        self.listen()
        return self

    def __exit__(self, *_: object) -> None:
        loop = asyncio.get_running_loop()
        for number in (signal.SIGINT, signal.SIGTERM):
            loop.remove_signal_handler(number)

    def listen(self) -> None:
        """Take the signals; again, if a library has taken them (Ray's prints a stack and goes on)."""
        loop = asyncio.get_running_loop()
        for number in (signal.SIGINT, signal.SIGTERM):
            loop.add_signal_handler(number, self._came)

    async def unless_stopped(self, work: Coroutine[Any, Any, None]) -> bool:
        """Do ``work``; cancelled, and False, if the first signal comes before it is done."""
        return await _unless(self.first, work)

    async def unless_repeated(self, work: Coroutine[Any, Any, None]) -> bool:
        """Do ``work``; cancelled, and False, if the second signal comes before it is done."""
        return await _unless(self.second, work)

    def _came(self) -> None:
        (self.second if self.first.is_set() else self.first).set()


async def _unless(event: asyncio.Event, work: Coroutine[Any, Any, None]) -> bool:
    """Do ``work`` to its end, or until ``event``; whichever way this ends, ``work`` has ended too."""
    doing, waiting = asyncio.create_task(work), asyncio.create_task(event.wait())
    try:
        await asyncio.wait({doing, waiting}, return_when=asyncio.FIRST_COMPLETED)
        if not doing.done():
            return False
        await doing
        return True
    finally:
        doing.cancel()
        waiting.cancel()
        await asyncio.wait({doing, waiting})


async def to_the_end(work: Coroutine[Any, Any, _T]) -> _T:
    """Await it; cancelling waits: a thread in Ray cannot be interrupted, and Ray cannot be stopped beside it."""
    task = asyncio.create_task(work)
    try:
        return await asyncio.shield(task)
    except asyncio.CancelledError:
        await asyncio.wait({task})
        raise


def ray_fleet(config: ServiceConfig) -> Fleet:
    """The workers as Ray actors, in processes of their own: this one computes nothing, and needs no torch."""
    leave_torch_out()
    from cluster.ray_fleet import RayFleet  # here, because importing ray takes half a second

    return RayFleet(config)


def _load_tokenizer(folder: str) -> Tokenizer:
    try:
        return Tokenizer.load(folder)
    except (OSError, ValueError) as error:
        raise UnsupportedModel(f"{folder}: no tokenizer that transformers can load: {error}") from error


def _all_ready(view: ClusterView, wanted: dict[Role, int]) -> bool:
    return all(len(view.ready(role)) >= count for role, count in wanted.items())


def _links_tested(view: ClusterView) -> bool:
    """Was every link tested, and does one work, if there are any?"""
    return all(link.probe is not None for link in view.links.values()) and no_usable_link_reason(view) is None


def _progress(view: ClusterView, wanted: dict[Role, int]) -> str:
    return ", ".join(f"{len(view.ready(role))} of {count} {role}" for role, count in wanted.items() if count)


def _authority(host: str, port: int) -> str:
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def _ignore(endpoints: Endpoints) -> None:
    """Nobody waits for the service to be ready."""


def say(line: str) -> None:
    """Tell the person or the job log that started the service."""
    print(f"prfaas: {line}", flush=True)
