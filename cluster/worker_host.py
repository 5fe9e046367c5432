"""One worker process: one engine, both halves of the service around it, and the role it advertises.

    engine thread     Engine.step(); the PrefillWorker listens to it, chunks go to OutputStreams
    transport threads KvSender and KvReceiver move pages and call the workers back
    other ranks       with ``tensor_parallel``: processes of their own (rank_processes.py), which this one leads
    event loop        gRPC: services Worker, Prefill, Decode and Pages; registration with every gateway

The role is a word, not a build: every worker can do either half, so ``SetRole`` reloads nothing. Sequences of the
old role go on to their end. A worker is a member of a gateway's view for as long as it registers there.

This is the one file of ``cluster`` that reaches the torch half of ``engine``; it runs inside a Ray actor
(ray_fleet.py), or as a process of its own: ``python -m cluster.worker_host CONFIG_JSON``.
"""

from __future__ import annotations

import asyncio
import gc
import logging
import os
import signal
import sys
import threading
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Iterator, Sequence
from concurrent.futures import Future
from contextlib import suppress
from dataclasses import replace
from functools import partial
from typing import Any, TypeVar

import grpc
from pydantic import TypeAdapter

from cluster.config import WorkerConfig
from cluster.log_format import configure_logging
from cluster.otlp import open_tracing
from cluster.output_streams import OutputStreams
from cluster.page_events import PageEventLog
from cluster.rank_host import COLLECTIVE_TIMEOUT_S, RankCounts, region_of, start_process
from cluster.rank_processes import RankProcesses, StartRank
from cluster.registration import Registrations
from cluster.step_log import StepLog
from core.cache_tiers import Tier
from core.clock import Clock, WallClock
from core.compute import StepSample
from core.errors import PrfaasError, ProtocolViolation, TransferError
from core.kv_layout import KvEnd
from core.link import LinkEstimate
from core.rank_channel import RankLines
from core.request import EngineId, GatewayId, Role, SequenceId, SessionId
from decode_worker.link_probe import ProbeReceiver
from decode_worker.page_client import PageClient
from decode_worker.page_pull import PagePuller
from decode_worker.probe_service import ProbeReceiverService
from decode_worker.service import DecodeService
from decode_worker.worker import Announced, DecodeWorker
from engine.engine import Engine, EngineLoad, StepOutput
from engine.engine_thread import EngineThread
from engine.model_loader import device_of
from engine.page_allocator import CacheChanges
from engine.page_loan import PageLoans
from engine.prefix_loan import PrefixLoans
from engine.rank_group import RankGroup
from engine.rank_steps import RankLeader
from engine.turns import make_turns
from kv_transfer.codec import Codec
from kv_transfer.codec_policy import LinkCodecs
from kv_transfer.link_monitor import TICK_S, LinkMonitor, timed_part
from kv_transfer.probe_pages import RankedPages, RankPages
from kv_transfer.rank_receiver import RankedReceiver
from kv_transfer.rank_sender import RankedSender
from kv_transfer.receiver import KvReceiver, ReceivingEnd
from kv_transfer.sender import KvSender, SendingEnd
from kv_transfer.session import SendReport
from kv_transfer.transport import ANONYMOUS, LayerPages, LinkStats, PeerIdentity, Write, create_transport
from prefill_worker.link_probe import LinkProber
from prefill_worker.page_service import PagesService
from prefill_worker.page_source import PageSource
from prefill_worker.probe_service import ProbeSenderService
from prefill_worker.service import GrantClient, PrefillService
from prefill_worker.worker import PrefillWorker
from protos import wire
from protos import worker_pb2 as pb
from protos import worker_pb2_grpc as rpc
from protos.channels import InternalGrpc

logger = logging.getLogger(__name__)

T = TypeVar("T")

EXPIRY_CHECK_S = 0.5
IDLE_POLL_S = 0.05
REPORT_WAIT_S = 0.05  # for the engine's load: an older one keeps prompts waiting for pages that are free again
NOTICE_S = 0.3  # for gateways to hear that a worker drains, before having nothing to do means that it may go
EXIT_ENGINE_DIED = 70
RANK_SLACK_S = 120.0  # another rank has loaded its part so long after the first, at most
MAX_MESSAGE_BYTES = 64 << 20
GRPC_OPTIONS = (
    ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES),
    ("grpc.max_send_message_length", MAX_MESSAGE_BYTES),
    ("grpc.so_reuseport", 0),  # a port in use is an error, not a silent second server
)


class WorkerHost:
    """Owns everything in one worker process. ``start`` and ``stop`` block and are called from outside its loop."""

    def __init__(
        self,
        config: WorkerConfig,
        clock: Clock | None = None,
        on_death: Callable[[], None] = lambda: None,
        start_rank: StartRank = start_process,
    ) -> None:
        """``on_death`` is called if the engine's thread dies of a bug, or another rank is gone: the process should end
        then. ``start_rank``: where the ranks of a worker of several run."""
        self._config = config
        self._start_rank = start_rank
        self._ranks: RankProcesses | None = None  # None: this process is all of the worker
        self._group: RankGroup | None = None
        self._clock = clock or WallClock()
        self._engine = EngineThread(
            self._load_engine,
            self._on_output,
            lambda _: on_death(),
            make_turns(config.engine.turns_file, self._clock),
        )
        self._engine_id = EngineId(uuid.uuid4().hex)
        self._runner: _LoopThread | None = None  # None: not started, or stopped
        self._parts: _Parts | None = None

    @property
    def address(self) -> str:
        """host:port of the gRPC server, once started."""
        return self._started.address

    @property
    def engine(self) -> EngineThread:
        """The engine's thread, for those who ask whether its pool is whole."""
        return self._engine

    def link_stats(self) -> tuple[LinkStats, ...]:
        """What the transport counts of the links that it sends on, once started."""
        return self._started.link_stats()

    def start(self) -> str:
        """Load the model, serve, register; return the address. Raise ``UnsupportedModel``, ``InvalidConfig`` for
        certificates that cannot be used, ``RankLost``, or what loading raised.
        """
        config = self._config
        configure_logging(config.log_level, config.log_format, config.log_requests, config.worker_id)
        if self._config.credentials is not None:
            self._config.credentials.check()  # before the model is loaded, which takes minutes
        if config.tensor_parallel > 1:
            self._ranks = RankProcesses(config, self._start_rank, self._rank_lost)
        try:
            engine, ranks = self._load_on_all_ranks(self._ranks)
        except BaseException:
            if self._ranks is not None:
                self._ranks.stop()
            raise
        self._runner = _LoopThread()
        self._parts = self._runner.run(self._serve(engine, ranks))
        logger.info("worker %s serves as %s at %s", self._config.worker_id, self._config.role, self.address)
        return self.address

    def stop(self, timeout_s: float) -> None:
        """Take no new sequences, let running ones finish for up to ``timeout_s``, then end everything."""
        runner, self._runner = self._runner, None
        if runner is None:
            return
        if self._parts is not None:
            with suppress(Exception):  # whatever fails, the process ends; it was logged where it happened
                runner.run(self._parts.stop(timeout_s))
        runner.close()
        if self._ranks is not None:
            self._ranks.stop()
        if self._group is not None:
            self._group.leave()

    @property
    def _started(self) -> _Parts:
        assert self._parts is not None, "start() comes first"
        return self._parts

    def _load_on_all_ranks(self, ranks: RankProcesses | None) -> tuple[Engine, _OtherRanks | None]:
        if ranks is None:
            return self._engine.start(), None
        ranks.start()
        others = _OtherRanks(ranks.lines)
        ranks.lines.start()
        engine = self._engine.start()
        others.ends = ranks.ready(RANK_SLACK_S)
        return engine, others

    def _rank_lost(self, error: PrfaasError) -> None:
        logger.critical("worker %s ends, as one of its ranks has: %s", self._config.worker_id, error)
        self._engine.abandon(error)

    def _load_engine(self) -> Engine:
        config, leader = self._config, None
        settings = replace(config.engine, disk_cache_dir=f"{config.engine.disk_cache_dir}/{config.worker_id}")
        if self._ranks is not None:
            device = device_of(config.engine)
            group = RankGroup.join(0, config.tensor_parallel, self._ranks.meeting, device, COLLECTIVE_TIMEOUT_S)
            self._group = group
            leader = RankLeader(group, self._ranks.lines.send_all)
        engine = Engine.load_model(settings, config.model, self._clock, cache_dir=config.model_cache_dir, leader=leader)
        # What is there now stays: a collection that goes through a model's objects holds up several decode steps.
        gc.collect()
        gc.freeze()
        return engine

    def _on_output(self, output: StepOutput) -> None:
        self._started.on_output(output)

    async def _serve(self, engine: Engine, ranks: _OtherRanks | None) -> _Parts:
        parts = _Parts(self._config, self._engine_id, engine, self._engine, self._clock, ranks)
        await parts.start()
        return parts


class _OtherRanks:
    """What rank 0 knows of the others."""

    def __init__(self, lines: RankLines) -> None:
        self.lines = lines
        self.ends: tuple[KvEnd, ...] = ()  # by rank, from the second on; once they are ready
        self._counts: dict[int, RankCounts] = {}
        lines.hear(RankCounts, self._note)

    @property
    def counts(self) -> tuple[RankCounts, ...]:
        """The last that each has told."""
        return tuple(self._counts.values())

    def _note(self, rank: int, counts: RankCounts) -> None:
        self._counts[rank] = counts


class _LoopThread:
    """An event loop on a thread of its own."""

    def __init__(self) -> None:
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._run, name="worker-host", daemon=True)
        self._thread.start()

    def run(self, coroutine: Coroutine[Any, Any, T]) -> T:
        """Run it there and wait for what it returns or raises."""
        return asyncio.run_coroutine_threadsafe(coroutine, self._loop).result()

    def close(self) -> None:
        """End the thread; what still runs on the loop is dropped."""
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()

    def _run(self) -> None:
        asyncio.set_event_loop(self._loop)
        try:
            self._loop.run_forever()
        finally:
            self._loop.close()


class _Parts(rpc.WorkerServicer):
    """The composed worker, on its event loop; also the ``Worker`` service."""

    def __init__(
        self,
        config: WorkerConfig,
        engine_id: EngineId,
        engine: Engine,
        thread: EngineThread,
        clock: Clock,
        ranks: _OtherRanks | None,
    ) -> None:
        self._config = config
        self._other_ranks = ranks
        self._engine_id = engine_id
        self._clock = clock
        self._loop = asyncio.get_running_loop()
        self._role = config.role
        self._draining = False
        self._version = 0
        self._state_changed = asyncio.Event()
        self._tasks: set[asyncio.Task[None]] = set()
        self._num_watching = 0  # Watch streams that are open
        self._model = engine.model
        self._fingerprint = engine.fingerprint
        self._layout = engine.layout
        self._load: EngineLoad = engine.load()
        self._close_tiers = engine.close
        self._modes = engine.modes
        self._load_at = clock.now()  # when the engine was asked for it; ``_announced`` is of that moment too
        self._announced = Announced()
        self._load_asked = False
        self._load_noted = asyncio.Event()  # set when the engine has answered
        self._page_events = PageEventLog()
        self._steps = StepLog()

        self._tracing, self._otlp = open_tracing(
            config.tracing, clock, {"service.instance.id": config.worker_id, "prfaas.cluster": config.cluster_id}
        )
        self._outputs = OutputStreams(self._loop, self._gateway_gone)
        self._engine = thread
        kv_transfer = replace(config.kv_transfer, host=config.kv_transfer.host or config.host)
        identity = PeerIdentity(config.worker_id, config.cluster_id)
        self._transport = create_transport(kv_transfer, self._fingerprint, clock, identity, config.credentials)
        self._transport.register(region_of(engine.pool))
        self._internal = InternalGrpc(config.credentials)
        kv_layout = self._layout.kv_layout()
        self._grants = GrantClient(
            engine_id,
            self._fingerprint,
            kv_layout,
            self._transport.describe,
            config.kv_transfer.grant_wait_s,
            self._internal,
            self._ends,
        )
        self._page_client = PageClient(identity, self._fingerprint, self._internal)
        prefixes = PrefixLoans(thread, engine)
        self._source = PageSource(prefixes, kv_layout)
        self._puller = PagePuller(
            prefixes,
            kv_layout,
            self._page_client,
            clock,
            self._run_soon,
            config.kv_transfer.pull_timeout_s,
            config.tensor_parallel,
        )
        self._prefill = PrefillWorker(
            config.worker_id,
            thread,
            page_size=self._layout.page_size,
            num_layers=self._layout.num_layers,
            check=engine.check,
            publish=self._outputs.publish,
            ask_grant=self._grants.ask,
            pull=self._puller.fetch,
            compile_grammar=engine.compile_grammar,
            make_commit=_make_commit,
            run_on_loop=self._run_soon,
            clock=clock,
            tracer=self._tracing.tracer,
        )
        self._decode = DecodeWorker(
            config.worker_id,
            thread,
            page_size=self._layout.page_size,
            check=engine.check,
            reserve=engine.reserve,
            pull=self._puller.fetch,
            compile_grammar=engine.compile_grammar,
            publish=self._outputs.publish,
            read_commit=_read_commit,
            clock=clock,
            tracer=self._tracing.tracer,
        )
        self._links = LinkMonitor(clock)
        loans = PageLoans(thread)
        own_pages = RankPages(self._transport.region, kv_layout)
        pages = own_pages if ranks is None else RankedPages(own_pages, ranks.lines, kv_layout)
        self._prober = LinkProber(
            loans, self._transport_stats, pages, kv_layout, self._links, config.kv_transfer.transport
        )
        self._probed = ProbeReceiver(loans, pages, kv_layout, self._run_soon)
        self._codecs = LinkCodecs(
            clock, lambda to_cluster: config.kv_transfer.link(config.cluster_id, to_cluster).codecs
        )
        self._make_ends(ranks)
        engine.listener = self._prefill
        self._server = grpc.aio.server(options=GRPC_OPTIONS)
        self._registrations: Registrations | None = None  # None: not started
        self.address = ""

    def _make_ends(self, ranks: _OtherRanks | None) -> None:
        """Both ends of hand-overs, of this rank and of the whole worker, and whom they serve."""
        clock, kv_layout, lease_s = self._clock, self._layout.kv_layout(), self._config.kv_transfer.lease_s
        closed, committed, released = self._closed, self._committed, self._released
        ranked_sender: RankedSender | None = None
        ranked_receiver: RankedReceiver | None = None
        if ranks is not None:
            ranked_sender = RankedSender(ranks.lines, self._closed, self._link_speed)
            ranked_receiver = RankedReceiver(ranks.lines, self._committed, self._released)
            closed = partial(ranked_sender.closed, 0)
            committed, released = partial(ranked_receiver.committed, 0), partial(ranked_receiver.released, 0)
        encodes = any(link.codecs != ("raw",) for link in self._config.kv_transfer.links)
        codec_for = self._codec_for if encodes else None
        self._sender = KvSender(self._transport, clock, closed, kv_layout, self._link_speed, codec_for)
        self._receiver = KvReceiver(self._transport, clock, committed, released, lease_s, kv_layout)
        sending: SendingEnd = self._sender
        receiving: ReceivingEnd = self._receiver
        if ranked_sender is not None and ranked_receiver is not None:
            ranked_sender.attach(self._sender)
            ranked_receiver.attach(self._receiver)
            sending, receiving = ranked_sender, ranked_receiver
        for sends in (self._prefill, self._prober, self._source):
            sends.attach(sending)
        for receives in (self._decode, self._probed, self._puller):
            receives.attach(receiving)

    def _link_speed(self, peer: PeerIdentity) -> float | None:
        return self._links.rate(peer.worker_id)

    def _ends(self) -> tuple[KvEnd, ...]:
        """Each rank's, of a worker of several; empty: there is one."""
        if self._other_ranks is None:
            return ()
        return (KvEnd(self._layout.kv_layout(), self._transport.describe()), *self._other_ranks.ends)

    # ---- start and stop ----

    async def start(self) -> None:
        rpc.add_WorkerServicer_to_server(self, self._server)
        rpc.add_PrefillServicer_to_server(PrefillService(self._prefill, self._outputs.has, self._clock), self._server)
        identity = PeerIdentity(self._config.worker_id, self._config.cluster_id)
        rpc.add_DecodeServicer_to_server(
            DecodeService(self._decode, identity, self._fingerprint, self._outputs.has, self._clock), self._server
        )
        rpc.add_ProbeSenderServicer_to_server(
            ProbeSenderService(
                self._prober,
                self._fingerprint,
                self._layout.kv_layout(),
                self._internal,
                self._transport.describe,
                self._ends,
            ),
            self._server,
        )
        rpc.add_ProbeReceiverServicer_to_server(ProbeReceiverService(self._probed, self._fingerprint), self._server)
        rpc.add_PagesServicer_to_server(
            PagesService(
                self._source,
                self._engine_id,
                self._fingerprint,
                self._layout.kv_layout(),
                self._transport.describe,
                self._clock,
                self._ends,
            ),
            self._server,
        )
        port = self._internal.listen_on_first(self._server, self._config.host, self._config.control.ports)
        self.address = f"{self._config.host}:{port}"
        await self._server.start()
        self._spawn(self._expire_leases())
        self._spawn(self._watch_links())
        config = self._config
        self._registrations = Registrations(
            config.worker_id, self._engine_id, self.address, config.registries, self._internal
        )
        self._spawn(self._registrations.keep())

    async def stop(self, timeout_s: float) -> None:
        self._draining = True
        self._changed()
        now = self._clock.now()
        deadline = now + timeout_s
        # What a gateway routes here before it has heard is served, too.
        heard_at = min(deadline, now + NOTICE_S) if self._num_watching else now
        # Sequences end on other threads, of which nothing is awaited here.
        while (now := self._clock.now()) < heard_at or (self._busy() and now < deadline):  # noqa: ASYNC110
            await asyncio.sleep(IDLE_POLL_S)
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        if self._registrations is not None:
            await self._registrations.leave()
        self._outputs.close()
        await self._server.stop(grace=1.0)
        await self._grants.close()
        await self._puller.close()
        await self._page_client.close()
        await asyncio.to_thread(self._close_threads)

    def _close_threads(self) -> None:
        self._sender.close()
        self._receiver.close()
        self._transport.close()
        self._engine.stop()
        self._close_tiers()
        if self._otlp is not None:
            self._otlp.close()

    def _busy(self) -> bool:
        """Has it sequences, or pages that others are pulling?"""
        return self._decode.num_sequences > 0 or self._prefill.num_sessions > 0 or self._source.num_sessions > 0

    def _spawn(self, work: Coroutine[Any, Any, None]) -> None:
        task = self._loop.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    def _run_soon(self, work: Awaitable[None]) -> None:
        """Start a coroutine from any thread."""

        async def run() -> None:
            await work

        self._loop.call_soon_threadsafe(self._spawn, run())

    def link_stats(self) -> tuple[LinkStats, ...]:
        return self._transport_stats()

    def _transport_stats(self) -> tuple[LinkStats, ...]:
        """Of this rank's links now, and of the others' as they were last told."""
        others = () if self._other_ranks is None else self._other_ranks.counts
        return self._transport.stats() + tuple(link for counts in others for link in counts.links)

    # ---- transport threads: a session is a self-test's, a pull's or a sequence's ----

    def _closed(self, session_id: SessionId, report: SendReport) -> None:
        if self._prober.closed(session_id, report):
            return
        part = timed_part(report)
        if part is not None and report.receiver != ANONYMOUS:
            self._links.transferred(report.receiver, *part)
        if not self._source.closed(session_id, report):
            self._prefill.closed(session_id, report)

    def _codec_for(self, peer: PeerIdentity, layers: Sequence[LayerPages], write: Write) -> Codec:
        return self._codecs.codec_for(peer.worker_id, layers, write.table.rows[:, 2].tolist())

    def _committed(self, session_id: SessionId, payload: bytes) -> None:
        if not (self._probed.committed(session_id) or self._puller.committed(session_id)):
            self._decode.committed(session_id, payload)

    def _released(self, session_id: SessionId, error: TransferError) -> None:
        if not (self._probed.released(session_id, error) or self._puller.released(session_id, error)):
            self._decode.released(session_id, error)

    # ---- engine thread ----

    def on_output(self, output: StepOutput) -> None:
        """What a step brought, to the half that it belongs to."""
        for chunk in output.chunks:
            if not self._prefill.on_chunk(chunk):
                self._decode.on_chunk(chunk)
        for failure in output.failures:
            if not self._prefill.on_failure(failure):
                self._decode.on_failure(failure)
        self._loop.call_soon_threadsafe(self._decode.pages_may_be_free)

    # ---- gateways ----

    def _gateway_gone(self, gateway_id: GatewayId) -> None:
        reason = f"gateway {gateway_id} is gone"
        if self._busy():
            logger.warning("%s: its sequences end here", reason)
        self._prefill.abort_gateway(gateway_id)
        self._decode.abort_gateway(gateway_id)

    async def _expire_leases(self) -> None:
        while True:
            await asyncio.sleep(EXPIRY_CHECK_S)
            self._sender.expire(self._clock.now())
            self._receiver.expire(self._clock.now())

    async def _watch_links(self) -> None:
        while True:
            await asyncio.sleep(TICK_S)
            stats = self._transport.stats()
            self._codecs.tick(stats)
            self._links.tick(self._transport_stats())

    # ---- the Worker service ----

    async def Describe(  # noqa: N802
        self, request: pb.DescribeRequest, context: grpc.aio.ServicerContext[pb.DescribeRequest, pb.WorkerDescription]
    ) -> pb.WorkerDescription:
        return pb.WorkerDescription(
            worker_id=self._config.worker_id,
            engine_id=self._engine_id,
            cluster_id=self._config.cluster_id,
            address=self.address,
            fingerprint=wire.fingerprint_to_message(self._fingerprint),
            architecture=self._model.architecture,
            max_model_len=self._model.max_model_len,
            vocab_size=self._model.vocab_size,
            eos_token_ids=self._model.eos_token_ids,
            kv_bytes_per_token=self._layout.bytes_per_token * self._layout.num_ranks,
            transport=self._config.kv_transfer.transport,
            pages_total=self._load.pages_total,
            max_batch_size=self._config.engine.max_batch_size,
            pid=os.getpid(),
            compute=wire.compute_to_message(self._model.compute),
            num_layers=self._layout.num_layers,
            lower_tiers=[state.tier.value for state in self._load.tiers],
            tensor_parallel=self._config.tensor_parallel,
        )

    async def Watch(  # noqa: N802
        self, request: pb.WatchRequest, context: grpc.aio.ServicerContext[pb.WatchRequest, pb.WorkerState]
    ) -> AsyncIterator[pb.WorkerState]:
        interval_s = request.interval_s if request.interval_s > 0 else 1.0
        told: int | None = None  # number of the page events that this reader has
        num_steps = self._steps.number  # that it has, or that were before its time
        self._num_watching += 1
        try:
            while True:
                await self._refresh_load()
                changed = self._state_changed
                state = self._state()
                events = self._page_events.since(told)
                if events is not None:
                    told = events.number
                    state.page_events.CopyFrom(wire.page_events_to_message(events))
                state.steps.extend(map(wire.step_to_message, self._steps.since(num_steps)))
                num_steps = self._steps.number
                yield state
                with suppress(TimeoutError):
                    await asyncio.wait_for(changed.wait(), interval_s)
        finally:
            self._num_watching -= 1

    async def Outputs(  # noqa: N802
        self, request: pb.OutputsRequest, context: grpc.aio.ServicerContext[pb.OutputsRequest, pb.OutputBatch]
    ) -> AsyncIterator[pb.OutputBatch]:
        if not request.gateway_id:
            await context.abort(grpc.StatusCode.INVALID_ARGUMENT, "gateway_id: must not be empty")
        async for batch in self._outputs.read(GatewayId(request.gateway_id)):
            yield batch

    async def SetRole(  # noqa: N802
        self, request: pb.SetRoleRequest, context: grpc.aio.ServicerContext[pb.SetRoleRequest, pb.SetRoleReply]
    ) -> pb.SetRoleReply:
        try:
            role = wire.role_from_text(request.role)
        except ProtocolViolation as error:
            await context.abort(grpc.StatusCode.INVALID_ARGUMENT, str(error))
        if role is not self._role:
            logger.info("worker %s turns from %s to %s", self._config.worker_id, self._role, role)
            self._role = role
            self._changed()
        return pb.SetRoleReply()

    def _changed(self) -> None:
        self._version += 1
        self._state_changed.set()
        self._state_changed = asyncio.Event()

    async def _refresh_load(self) -> None:
        """The engine says between two steps what it has, most often at once; a heartbeat does not wait for a long step
        to end, and then tells what was known before."""
        noted = self._load_noted
        self._ask_load()
        with suppress(TimeoutError):
            await asyncio.wait_for(noted.wait(), REPORT_WAIT_S)

    def _ask_load(self) -> None:
        if self._load_asked:
            return
        self._load_asked = True
        asked_at, announced = self._clock.now(), self._decode.announced()
        report = self._engine.submit(_report)
        report.add_done_callback(
            lambda done: self._loop.call_soon_threadsafe(self._note_report, done, asked_at, announced)
        )

    def _note_report(self, done: Future[_Report], asked_at: float, announced: Announced) -> None:
        self._load_asked = False
        self._load_noted.set()
        self._load_noted = asyncio.Event()
        if not done.cancelled() and done.exception() is None:
            self._load, changes, steps = done.result()
            self._load_at, self._announced = asked_at, announced
            lower = {Tier.HOST: changes.host, Tier.DISK: changes.disk}
            self._page_events.record(changes.stored, changes.removed, lower)
            self._steps.record(steps)

    def _link_estimates(self) -> Iterator[LinkEstimate]:
        codecs = {state.worker_id: state for state in self._codecs.states()}
        for estimate in self._links.estimates():
            state = codecs.get(estimate.worker_id)
            if state is None:
                yield estimate
            else:
                name, num_changes = state.choice.codec.name.lower(), sum(state.changes.values())
                yield replace(estimate, codec=name, codec_changes=num_changes)

    def _state(self) -> pb.WorkerState:
        load = self._load
        others = () if self._other_ranks is None else self._other_ranks.counts
        return pb.WorkerState(
            version=self._version,
            engine_id=self._engine_id,
            role=self._role.value,
            draining=self._draining,
            num_running=load.num_running,
            num_waiting=load.num_waiting,
            num_waiting_tokens=load.num_waiting_tokens,
            pages_free=load.pages_free,
            pages_cached=load.pages_cached,
            bytes_sent=self._sender.bytes_sent + sum(counts.bytes_sent for counts in others),
            bytes_received=self._receiver.bytes_received + sum(counts.bytes_received for counts in others),
            prompt_tokens=load.prompt_tokens,
            generated_tokens=load.generated_tokens,
            cached_tokens=load.cached_tokens,
            num_sessions=self._num_sessions(),
            pages_quarantined=max([self._receiver.num_quarantined, *(c.pages_quarantined for c in others)]),
            num_preemptions=load.num_preemptions,
            links=map(wire.link_to_message, self._link_estimates()),
            pulls={outcome.value: count for outcome, count in self._puller.outcomes.items()},
            pulled_tokens=self._puller.num_tokens,
            pulled_bytes=self._puller.num_bytes,
            load_age_s=max(0.0, self._clock.now() - self._load_at),
            num_announced=self._announced.num_sequences,
            num_announced_tokens=self._announced.num_tokens,
            num_other_role=self._decode.num_sequences if self._role is Role.PREFILL else self._prefill.num_sessions,
            modes=wire.modes_to_message(self._modes()),
            tiers=map(wire.tier_state_to_message, load.tiers),
            reloads={outcome.value: count for outcome, count in load.reloads},
            pages_lost=load.pages_lost,
        )

    def _num_sessions(self) -> int:
        handovers = self._prefill.num_sessions + self._decode.num_sessions
        return handovers + self._source.num_sessions + self._puller.num_sessions


_Report = tuple[EngineLoad, CacheChanges, tuple[StepSample, ...]]


def _report(engine: Engine) -> _Report:
    return engine.load(), engine.take_cache_changes(), engine.take_step_samples()


def _make_commit(sequence_id: SequenceId, token_ids: Sequence[int]) -> bytes:
    return pb.CommitPayload(sequence_id=sequence_id, token_ids=token_ids).SerializeToString()


def _read_commit(payload: bytes) -> tuple[SequenceId, tuple[int, ...]]:
    message = pb.CommitPayload.FromString(payload)
    return SequenceId(message.sequence_id), tuple(message.token_ids)


def main(arguments: Sequence[str]) -> int:
    """Serve one worker until SIGTERM or SIGINT; ``arguments`` is one JSON document: a WorkerConfig."""
    host = WorkerHost(
        TypeAdapter(WorkerConfig).validate_json(arguments[0]), on_death=lambda: os._exit(EXIT_ENGINE_DIED)
    )
    asked = threading.Event()
    for signum in (signal.SIGTERM, signal.SIGINT):
        signal.signal(signum, lambda *_: asked.set())
    print(host.start(), flush=True)
    asked.wait()
    host.stop(timeout_s=5.0)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
