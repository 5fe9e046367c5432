"""Which workers are there, right now? Leases and Watch streams go in, one frozen ``ClusterView`` comes out.

The life of a worker here:
1. It calls ``Registry.Register`` with its name, the id of this start of its process, and its address.
2. The gateway connects back (a ``WorkerClient``), checks that it serves the same model, opens its Outputs stream, and
   puts it into the view when the first message of its Watch stream has told its role.
3. Every Watch message and every repeated Register renews its lease.
4. It is out of the view at the first of: its Outputs or Watch stream breaks, its lease runs out, it says that it
   leaves, or a new engine id registers under its name. Its open sequences hear ``WorkerLost`` in that same moment.

Invariants:
- this class is the one writer of ``ClusterView``; the state is soft and rebuilt from the workers after a restart;
- one worker id has at most one engine id in the view, the one that registered last; a replaced engine never returns;
- a link from a prefill to a decode worker is usable from the self-test that it passed to the end of either engine, or
  to a test that it fails; every other link is, as all are where self-tests are off;
- every worker of the gateway's own cluster has a plain name, every other one its cluster's name in front
  (``west/prefill-0``): names of two clusters cannot meet. A worker that is named otherwise is refused, like one of
  another model;
- every worker in the view serves the model of the first worker that ever registered, which is one of the gateway's
  own cluster: a worker with another model, revision or vocabulary is refused with FAILED_PRECONDITION (a client's
  tokens must not depend on the route).
"""

from __future__ import annotations

import asyncio
import logging
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Collection, Coroutine, Mapping, Sequence
from dataclasses import replace
from typing import Protocol

import grpc

from cluster.config import CLUSTER_SEPARATOR, RouterConfig, qualified
from cluster.cost_model import NO_COSTS, CostView
from cluster.live_view import LiveView
from cluster.prefix_index import PrefixIndex, PrefixMatch
from cluster.view import NO_OFFLOAD, ClusterView, ModelInfo, Offload, WorkerView
from cluster.worker_client import (
    CALL_TIMEOUT_S,
    GrpcWorkerClient,
    WorkerClient,
    WorkerDescription,
    WorkerState,
)
from core.clock import Clock
from core.compute import StepSample
from core.errors import Incompatible, InvalidConfig, PeerLost, PrfaasError, ProtocolViolation
from core.link import ProbeReport
from core.prefix_hash import PageHash
from core.request import ClusterId, EngineId, GatewayId, WorkerId
from protos import worker_pb2 as pb
from protos import worker_pb2_grpc as rpc
from protos.channels import InternalGrpc

logger = logging.getLogger(__name__)

Connect = Callable[[str], Awaitable[WorkerClient]]  # by the worker's address; raises PeerLost

_Context = grpc.aio.ServicerContext[pb.RegisterRequest, pb.RegisterReply]

_SERVER_OPTIONS = (("grpc.so_reuseport", 0),)  # a port in use is an error, not a second gateway that shares it
_TICKS_PER_LEASE = 10  # how often leases are looked at: a dead worker is noticed at most a tenth of a lease too late
_SWEEPS_PER_TICK = 8  # shards of the prefix index that are cleared of lost workers; 256 make a round
_WATCHES_PER_LEASE = 4  # heartbeats asked of a worker per lease, so that one or two may be late
_MAX_WATCH_INTERVAL_S = 0.25  # routing by load wants it fresh, whatever the lease


class NotYet(PrfaasError):
    """The worker comes too early; it is to ask again."""


class WorkerListener(Protocol):
    """Hears of workers and of what they measure, on the event loop; is quick and does not raise."""

    def worker_joined(self, worker: WorkerDescription) -> None:
        """It is in the view from now on."""
        ...

    def steps_measured(self, worker: WorkerDescription, steps: Sequence[StepSample]) -> None:
        """It has computed these steps, among others."""
        ...

    def link_tested(self, sender: WorkerDescription, receiver: WorkerDescription, report: ProbeReport) -> None:
        """A self-test has ended."""
        ...


class Membership:
    """The workers that this gateway holds a lease of. Everything happens on one event loop."""

    def __init__(
        self,
        config: RouterConfig,
        gateway_id: GatewayId,
        clock: Clock,
        internal: InternalGrpc,
        *,
        self_test: bool = False,
        listener: WorkerListener | None = None,
        connect: Connect | None = None,
        cluster_id: ClusterId | None = None,
    ) -> None:
        """``self_test``: links are used only after their self-test has passed (``note_probe``). ``connect``: how
        workers are reached; None: over gRPC. ``cluster_id``: the gateway's own cluster; None: names of workers are not
        looked at.
        """
        self._listener = listener
        self._cluster_id = cluster_id
        self._lease_s = config.lease_s
        self._gateway_id = gateway_id
        self._clock = clock
        self._internal = internal
        self._connect = connect or self._connect_over_grpc
        self._members: dict[WorkerId, _Member] = {}
        self._engines: dict[EngineId, _Member] = {}  # the same
        self._prefixes = PrefixIndex()
        self._latest: dict[WorkerId, EngineId] = {}  # the engine that registered last under that name
        self._replaced: set[EngineId] = set()
        self._refused: set[EngineId] = set()  # logged once each
        self._joins: dict[EngineId, asyncio.Task[None]] = {}
        self._num_by_page_size: Counter[int] = Counter()  # workers
        self._model: ModelInfo | None = None
        self._live_view = LiveView(self_test=self_test)
        self._view: ClusterView | None = None  # None: something changed since
        self._changed_members: dict[_Member, None] = {}  # that changed since it was made, in that order
        self._costs: CostView = NO_COSTS
        self._offload: Offload = NO_OFFLOAD
        self._probes_by_outcome: Counter[str] = Counter()
        self._waiters: dict[asyncio.Future[None], None] = {}  # in the order in which they began to wait
        self._tasks: set[asyncio.Task[None]] = set()
        self._ticker: asyncio.Task[None] | None = None
        self._server: grpc.aio.Server | None = None

    # ---- what others read ----

    def view(self) -> ClusterView:
        """The cluster now. The same object until something changes."""
        now = self._clock.now()
        if self._view is None or now >= self._live_view.next_expiry_at:
            self._tell_live_view()
            self._view = self._live_view.view(now, self._costs, self._offload)
        return self._view

    @property
    def page_sizes(self) -> Collection[int]:
        """Tokens of a page, of every worker in the view: mostly one number."""
        return self._num_by_page_size.keys()

    @property
    def probes_by_outcome(self) -> Mapping[str, int]:
        """Self-tests so far: ``passed``, or the class of the error."""
        return self._probes_by_outcome

    def model(self) -> ModelInfo | None:
        """The served model; None until a worker registered. ``max_model_len`` is what every live worker can take."""
        if self._model is None or not self._members:
            return self._model
        return replace(
            self._model,
            max_model_len=min(member.client.description.model.max_model_len for member in self._members.values()),
        )

    def match_prefix(self, hashes: Sequence[PageHash]) -> PrefixMatch:
        """How many of a prompt's leading pages each worker's prefix cache holds, as of its last report."""
        return self._prefixes.match(hashes)

    @property
    def num_indexed_pages(self) -> int:
        """Distinct pages that some worker's prefix cache holds."""
        return self._prefixes.num_keys

    def client(self, engine_id: EngineId) -> WorkerClient | None:
        """The connection to that engine; None if it is not in the view any more."""
        member = self._engines.get(engine_id)
        return None if member is None else member.client

    async def wait_until(self, predicate: Callable[[ClusterView], bool], timeout_s: float) -> bool:
        """Wait for a view that satisfies ``predicate``; False if none came within ``timeout_s``."""
        try:
            async with asyncio.timeout(timeout_s):
                while not predicate(self.view()):
                    await self._changed()
        except TimeoutError:
            return predicate(self.view())
        return True

    # ---- what changes it ----

    async def start(self, host: str, port: int = 0) -> str:
        """Serve the Registry on ``host`` (port 0: any free one); returns the host:port that workers are to be given.

        Raises ``InvalidConfig`` if the port cannot be had.
        """
        assert self._server is None, "membership was started already"
        self.watch_leases()
        self._server = grpc.aio.server(options=_SERVER_OPTIONS)
        rpc.add_RegistryServicer_to_server(_RegistryService(self), self._server)
        try:
            bound = self._internal.listen(self._server, f"{host}:{port}")
        except RuntimeError as error:
            raise InvalidConfig("registry.port", f"{host}:{port} cannot be listened on: {error}") from error
        await self._server.start()
        return f"{host}:{bound}"

    def watch_leases(self) -> None:
        """Drop workers whose lease runs out, from now on; ``start`` does this too."""
        assert self._ticker is None, "leases are watched already"
        self._ticker = self._spawn(self._expire_leases())

    async def close(self) -> None:
        """Stop the Registry and drop every worker; their open sequences hear ``WorkerLost``."""
        if self._server is not None:
            await self._server.stop(grace=None)
            self._server = None  # grpc.aio's finaliser needs the event loop, which must not close first
        for member in list(self._members.values()):
            self._drop(member, "the gateway stops", logging.INFO)
        for task in (self._ticker, *self._joins.values()):
            if task is not None:
                task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def register(self, worker_id: WorkerId, engine_id: EngineId, address: str) -> None:
        """Take the worker in, or renew its lease.

        Raises ``PeerLost`` if it cannot be reached at ``address``, ``Incompatible`` if it serves another model,
        ``NotYet`` if it is of another cluster and no worker of this one has told yet what is served, ``InvalidConfig``
        if it is not named after its cluster, ``ProtocolViolation`` if a newer engine has registered under its name.
        """
        member = self._members.get(worker_id)
        if member is not None and member.engine_id == engine_id:
            self._renew(member)
            return
        self._supersede(worker_id, engine_id)
        join = self._joins.get(engine_id)
        if join is None:
            join = self._joins[engine_id] = self._spawn(self._join(worker_id, engine_id, address))
            join.add_done_callback(lambda _: self._joins.pop(engine_id, None))
        await asyncio.shield(join)  # a Register that its worker gave up on must not end the join for the next one

    def leave(self, worker_id: WorkerId, engine_id: EngineId) -> None:
        """The worker says that it stops; nothing happens if that engine is not in the view."""
        member = self._members.get(worker_id)
        if member is not None and member.engine_id == engine_id:
            self._drop(member, "it left", logging.INFO)

    def note_probe(self, sender: EngineId, receiver: EngineId, report: ProbeReport) -> None:
        """A self-test has ended; nothing happens if either engine is not in the view any more."""
        members = self._engines.get(sender), self._engines.get(receiver)
        if members[0] is None or members[1] is None:
            return
        self._tell_live_view()
        self._live_view.note_probe(members[0].worker_id, members[1].worker_id, report, self._clock.now())
        self._probes_by_outcome["passed" if report.passed else report.error] += 1
        if self._listener is not None:
            self._listener.link_tested(members[0].client.description, members[1].client.description, report)
        self._notify()

    def note_costs(self, costs: CostView) -> None:
        """What is known of costs from now on."""
        if costs is not self._costs:
            self._costs = costs
            self._forget_view()

    def note_offload(self, offload: Offload) -> None:
        """What the planner says from now on."""
        if offload != self._offload:
            self._offload = offload
            self._forget_view()

    def expire(self) -> None:
        """Drop every worker whose lease has run out."""
        now = self._clock.now()
        for member in list(self._members.values()):
            if member.lease_expires_at <= now:
                self._drop(member, f"not heard of for {self._lease_s:g} s")

    @property
    def lease_s(self) -> float:
        """Seconds that a worker may be silent."""
        return self._lease_s

    def log_refusal(self, worker_id: WorkerId, engine_id: EngineId, error: PrfaasError) -> None:
        """Say it once for each engine: workers ask again every few seconds."""
        if engine_id not in self._refused:
            self._refused.add(engine_id)
            logger.error("worker %s (engine %s) refused: %s", worker_id, engine_id, error)

    # ---- inside ----

    async def _connect_over_grpc(self, address: str) -> WorkerClient:
        return await GrpcWorkerClient.connect(address, self._gateway_id, self._internal)

    def _supersede(self, worker_id: WorkerId, engine_id: EngineId) -> None:
        """``engine_id`` is from now on the engine of that name; the one before it is over."""
        before = self._latest.get(worker_id)
        if engine_id in self._replaced:
            said = f"{worker_id}: engine {engine_id} was replaced by engine {before}"
            hint = "" if CLUSTER_SEPARATOR not in worker_id else "; do two clusters that joined have one cluster_id?"
            raise ProtocolViolation(said + hint)
        if before is not None and before != engine_id:
            self._replaced.add(before)
            member = self._members.get(worker_id)
            if member is not None:
                self._drop(member, f"restarted as engine {engine_id}")
        self._latest[worker_id] = engine_id

    async def _join(self, worker_id: WorkerId, engine_id: EngineId, address: str) -> None:
        """Connect to the worker and follow it; returns when it is in the view."""
        client = await self._connect(address)
        member: _Member | None = None
        try:
            description = client.description
            if (description.worker_id, description.engine_id) != (worker_id, engine_id):
                raise PeerLost(f"at {address} answers {description.worker_id}, engine {description.engine_id}")
            self._require_own_name(description)
            self._require_same_model(description)
            states = client.watch(min(self._lease_s / _WATCHES_PER_LEASE, _MAX_WATCH_INTERVAL_S))
            async with asyncio.timeout(CALL_TIMEOUT_S):
                first = await anext(states)
            if self._latest.get(worker_id) != engine_id:
                raise ProtocolViolation(f"{worker_id}: engine {engine_id} was replaced while it joined")
            member = _Member(client, first, self._clock.now(), self._lease_s)
        except TimeoutError:
            raise PeerLost(f"{worker_id} at {address} did not tell its state in {CALL_TIMEOUT_S:g} s") from None
        finally:
            if member is None:
                await client.close()
        self._add(member, states)

    def _add(self, member: _Member, states: AsyncIterator[WorkerState]) -> None:
        description = member.client.description
        self._model = self._model or description.model
        self._members[description.worker_id] = self._engines[member.engine_id] = member
        self._num_by_page_size[description.model.fingerprint.page_size] += 1
        self._prefixes.add_worker(member.engine_id, description.lower_tiers)
        self._note_pages(member)
        self._forget_member(member)
        member.client.on_change = lambda: self._forget_member(member)
        if self._listener is not None:
            self._listener.worker_joined(description)
        member.task = self._spawn(self._follow(member, states))
        logger.info(
            "worker %s joined as %s at %s (engine %s, %d pages)",
            description.worker_id,
            member.state.role,
            description.address,
            description.engine_id,
            description.pages_total,
        )
        self._notify()

    async def _follow(self, member: _Member, states: AsyncIterator[WorkerState]) -> None:
        """Keep the member current until one of its streams breaks."""
        streams = {
            asyncio.create_task(member.client.pump_outputs()),
            asyncio.create_task(self._watch(member, states)),
        }
        try:
            done, _ = await asyncio.wait(streams, return_when=asyncio.FIRST_COMPLETED)
            self._drop(member, "; ".join(map(_why_it_ended, done)))
        finally:
            for stream in streams:
                stream.cancel()
            await asyncio.gather(*streams, return_exceptions=True)

    async def _watch(self, member: _Member, states: AsyncIterator[WorkerState]) -> None:
        async for state in states:
            before, member.state = member.state, state
            member.heard_at = self._clock.now()
            member.client.note_report(state.load_age_s)
            self._note_pages(member)
            self._renew(member)
            if state.steps and self._listener is not None:
                self._listener.steps_measured(member.client.description, state.steps)
            if (before.role, before.draining) != (state.role, state.draining):
                logger.info(
                    "worker %s is now %s%s",
                    member.client.description.worker_id,
                    state.role,
                    ", draining" if state.draining else "",
                )
            self._notify()

    def _note_pages(self, member: _Member) -> None:
        """Take in what the member's prefix cache gained and lost. Raises ``PeerLost`` if a report is missing: the
        worker is dropped and joins again, with a snapshot."""
        events = member.state.page_events
        if events is None:
            return
        if not events.snapshot and events.after != member.page_events_number:
            had = member.page_events_number
            raise PeerLost(f"page events {had} to {events.after} never came: what it caches is not known")
        member.page_events_number = events.number
        self._prefixes.apply(member.engine_id, events)

    def _renew(self, member: _Member) -> None:
        member.lease_expires_at = self._clock.now() + self._lease_s
        self._forget_member(member)

    def _drop(self, member: _Member, reason: str, level: int = logging.WARNING) -> None:
        """Out of the view and told to its sequences, in one step; nothing happens the second time."""
        worker_id = member.client.description.worker_id
        if self._members.get(worker_id) is not member:
            return
        del self._members[worker_id], self._engines[member.engine_id]
        page_size = member.client.description.model.fingerprint.page_size
        self._num_by_page_size[page_size] -= 1
        if not self._num_by_page_size[page_size]:
            del self._num_by_page_size[page_size]
        self._prefixes.remove_worker(member.engine_id)
        self._live_view.remove(worker_id)
        self._changed_members.pop(member, None)
        self._forget_view()
        num_open = member.client.num_open
        logger.log(level, "worker %s (%s) is out: %s; %d open sequences", worker_id, member.engine_id, reason, num_open)
        member.client.fail(reason)
        self._spawn(member.client.close())
        if member.task is not None and member.task is not asyncio.current_task():
            member.task.cancel()
        self._notify()

    def _require_own_name(self, theirs: WorkerDescription) -> None:
        """The name says of which cluster the worker is, or is of this gateway's own."""
        own, cluster, worker_id = self._cluster_id, theirs.cluster_id, theirs.worker_id
        if own is None:
            return
        joined = CLUSTER_SEPARATOR in worker_id
        if joined and cluster == own:
            raise InvalidConfig("cluster_id", f"{own} is this gateway's own cluster; one that joins needs another name")
        if cluster != own and not worker_id.startswith(qualified(cluster, "")):
            raise InvalidConfig(
                "worker_id", f"must be {qualified(cluster, 'NAME')} in cluster {cluster}, got {worker_id}"
            )

    def _require_same_model(self, description: WorkerDescription) -> None:
        ours, theirs = self._model, description.model
        if ours is None:
            if self._cluster_id not in (None, description.cluster_id):
                raise NotYet(f"no worker of {self._cluster_id} has registered yet: they say which model is served")
            return
        for name, mine, other in (
            ("model", ours.fingerprint.model, theirs.fingerprint.model),
            ("revision", ours.fingerprint.revision, theirs.fingerprint.revision),
            ("vocab_size", ours.vocab_size, theirs.vocab_size),
            ("eos_token_ids", ours.eos_token_ids, theirs.eos_token_ids),
        ):
            if mine != other:
                raise Incompatible(name, str(mine), str(other))

    async def _expire_leases(self) -> None:
        while True:
            await asyncio.sleep(self._lease_s / _TICKS_PER_LEASE)
            self.expire()
            for _ in range(_SWEEPS_PER_TICK):
                self._prefixes.sweep()

    async def _changed(self) -> None:
        """Wait for the next change."""
        waiter: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._waiters[waiter] = None
        try:
            await waiter
        finally:
            self._waiters.pop(waiter, None)

    def _notify(self) -> None:
        self._forget_view()
        for waiter in self._waiters:
            if not waiter.done():
                waiter.set_result(None)

    def _forget_view(self) -> None:
        self._view = None

    def _tell_live_view(self) -> None:
        for member in self._changed_members:
            self._live_view.put(member.view(), member.state.links, member.heard_at)
        self._changed_members.clear()

    def _forget_member(self, member: _Member) -> None:
        """What is known of one worker has changed; nothing happens if it is not in the view any more."""
        if self._engines.get(member.engine_id) is member:
            self._changed_members[member] = None
            self._view = None

    def _spawn(self, work: Coroutine[None, None, None]) -> asyncio.Task[None]:
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task


def _why_it_ended(stream: asyncio.Task[None]) -> str:
    # grpc.aio cancels who reads from a channel that is being closed.
    return "connection closed" if stream.cancelled() else str(stream.exception())


class _Member:
    """One worker that is in the view. Only ``Membership`` writes it."""

    def __init__(self, client: WorkerClient, state: WorkerState, now: float, lease_s: float) -> None:
        self.client = client
        self.worker_id = client.description.worker_id
        self.engine_id = client.description.engine_id
        self.profile = client.description.profile
        self.state = state
        self.heard_at = now  # when ``state`` came
        self.lease_expires_at = now + lease_s
        self.task: asyncio.Task[None] | None = None
        self.page_events_number: int | None = None  # of the last report that the prefix index knows

    def view(self) -> WorkerView:
        client, description = self.client, self.client.description
        return WorkerView(
            worker_id=description.worker_id,
            engine_id=description.engine_id,
            cluster_id=description.cluster_id,
            address=description.address,
            role=self.state.role,
            draining=self.state.draining,
            lease_expires_at=self.lease_expires_at,
            model=description.model,
            transport=description.transport,
            pages_total=description.pages_total,
            load=self.state.load,
            num_assigned=client.num_open,
            max_batch_size=description.max_batch_size,
            profile=self.profile,
            num_unreported=client.num_unreported,
            unreported_tokens=client.unreported_tokens,
            unreported_kv_tokens=client.unreported_kv_tokens,
            tensor_parallel=description.tensor_parallel,
        )


class _RegistryService(rpc.RegistryServicer):
    """The gRPC edge of ``Membership.register``: errors become status codes here."""

    def __init__(self, membership: Membership) -> None:
        self._membership = membership

    async def Register(self, request: pb.RegisterRequest, context: _Context) -> pb.RegisterReply:  # noqa: N802
        worker_id, engine_id = WorkerId(request.worker_id), EngineId(request.engine_id)
        if request.leaving:
            self._membership.leave(worker_id, engine_id)
            return pb.RegisterReply()
        try:
            await self._membership.register(worker_id, engine_id, request.address)
        except (PeerLost, NotYet) as error:
            await context.abort(grpc.StatusCode.UNAVAILABLE, str(error))
        except PrfaasError as error:
            self._membership.log_refusal(worker_id, engine_id, error)
            await context.abort(grpc.StatusCode.FAILED_PRECONDITION, str(error))
        return pb.RegisterReply(lease_s=self._membership.lease_s)
