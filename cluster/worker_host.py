"""One worker process: one engine, both halves of the service around it, and the role it advertises.

    engine thread     Engine.step(); the PrefillWorker listens to it, chunks go to OutputStreams
    transport threads KvSender and KvReceiver move pages and call the halves back (worker_halves.py)
    other ranks       with ``tensor_parallel``: processes of their own (rank_processes.py), which this one leads
    event loop        gRPC: services Worker (worker_service.py), Prefill, Decode and Pages; registration with every
                      gateway

``WorkerHost`` is what the outside starts and stops; ``_Parts`` puts together what runs in between.

The role is a word, not a build: every worker can do either half, so ``SetRole`` reloads nothing. Sequences of the
old role go on to their end. A worker is a member of a gateway's view for as long as it registers there.

This file, worker_halves.py and rank_host.py alone of ``cluster`` reach the torch half of ``engine``. It runs inside a
Ray actor (ray_fleet.py), or as a process of its own: ``python -m cluster.worker_host CONFIG_JSON``.
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
from collections.abc import Awaitable, Callable, Coroutine, Sequence
from concurrent.futures import Future
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import grpc
from pydantic import TypeAdapter

from cluster.config import WorkerConfig
from cluster.log_format import configure_logging
from cluster.otlp import open_tracing
from cluster.output_streams import OutputStreams
from cluster.page_events import PageEventLog
from cluster.rank_host import COLLECTIVE_TIMEOUT_S, open_transport, start_process
from cluster.rank_processes import RankProcesses, StartRank
from cluster.registration import Registrations
from cluster.step_log import StepLog
from cluster.worker_halves import Ground, ReceivingHalf, SendingHalf, join_halves
from cluster.worker_links import WorkerLinks
from cluster.worker_service import WorkerService
from core.cache_tiers import Tier
from core.clock import Clock, WallClock
from core.compute import StepSample
from core.errors import PrfaasError
from core.request import EngineId, GatewayId, Role
from decode_worker.worker import Announced
from engine.engine import Engine, EngineLoad, StepOutput
from engine.engine_thread import EngineThread
from engine.model_loader import device_of
from engine.page_allocator import CacheChanges
from engine.rank_group import RankGroup
from engine.rank_steps import RankLeader
from engine.turns import make_turns
from kv_transfer.link_monitor import TICK_S
from kv_transfer.transport import LinkStats
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
            engine = self._load_on_all_ranks(self._ranks)
        except BaseException:
            if self._ranks is not None:
                self._ranks.stop()
            raise
        self._runner = _LoopThread()
        self._parts = self._runner.run(self._serve(engine))
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

    def _load_on_all_ranks(self, ranks: RankProcesses | None) -> Engine:
        if ranks is None:
            return self._engine.start()
        ranks.start()
        ranks.lines.start()
        engine = self._engine.start()
        ranks.wait_ready(RANK_SLACK_S)
        return engine

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

    async def _serve(self, engine: Engine) -> _Parts:
        parts = _Parts(self._config, self._engine_id, engine, self._engine, self._clock, self._ranks)
        await parts.start()
        return parts


class _Parts:
    """The composed worker, on its event loop: what there is, in the order in which one thing needs another."""

    def __init__(
        self,
        config: WorkerConfig,
        engine_id: EngineId,
        engine: Engine,
        thread: EngineThread,
        clock: Clock,
        ranks: RankProcesses | None,
    ) -> None:
        """``thread`` is ``engine``'s. ``ranks``, if there are any, are ready. Raises ``InvalidConfig``, or what the
        transport or the port's being taken raises."""
        self._loop = asyncio.get_running_loop()
        self._tasks = _LoopTasks()
        about = {"service.instance.id": config.worker_id, "prfaas.cluster": config.cluster_id}
        tracing, self._otlp = open_tracing(config.tracing, clock, about)
        self._ground = ground = Ground(
            config,
            engine_id,
            engine,
            thread,
            ranks,
            transport=open_transport(config, engine.fingerprint, engine.pool, clock),
            internal=InternalGrpc(config.credentials),
            clock=clock,
            tracer=tracing.tracer,
            run_soon=self._tasks.run_soon,
        )
        self._links = WorkerLinks(config, ground.transport, ranks, clock)

        # No gateway is heard, and no token made, before ``start``: what is called then is all there.
        self._outputs = OutputStreams(self._loop, self._gateway_gone)
        self.receiving = ReceivingHalf(ground, self._outputs)
        self.sending = SendingHalf(ground, self._outputs, self._links, pull=self.receiving.puller.fetch)
        self._ends = join_halves(ground, self._links, self.sending, self.receiving)
        engine.listener = self.sending.prefill

        self._reports = _EngineReports(engine, thread, self.receiving.decode.announced, clock)
        self._service = WorkerService(
            config.worker_id,
            config.role,
            self._description,
            self._state,
            self._reports.refresh,
            self._reports.page_events,
            self._reports.steps,
            self._outputs,
        )

        self._server = grpc.aio.server(options=GRPC_OPTIONS)
        rpc.add_WorkerServicer_to_server(self._service, self._server)
        self.sending.serve(self._server)
        self.receiving.serve(self._server)
        port = ground.internal.listen_on_first(self._server, config.host, config.control.ports)
        self.address = f"{config.host}:{port}"
        self._registrations = Registrations(
            config.worker_id, engine_id, self.address, config.registries, ground.internal
        )

    # ---- start and stop ----

    async def start(self) -> None:
        await self._server.start()
        self._tasks.spawn(self._expire_leases())
        self._tasks.spawn(self._watch_links())
        self._tasks.spawn(self._registrations.keep())

    async def stop(self, timeout_s: float) -> None:
        self._service.drain()
        clock = self._ground.clock
        now = clock.now()
        deadline = now + timeout_s
        # What a gateway routes here before it has heard is served, too.
        heard_at = min(deadline, now + NOTICE_S) if self._service.is_watched else now
        # Sequences end on other threads, of which nothing is awaited here.
        while (now := clock.now()) < heard_at or (self._busy() and now < deadline):  # noqa: ASYNC110
            await asyncio.sleep(IDLE_POLL_S)
        await self._tasks.cancel()
        await self._registrations.leave()
        self._outputs.close()
        await self._server.stop(grace=1.0)
        await self.sending.close()
        await self.receiving.close()
        await asyncio.to_thread(self._close_threads)

    def _close_threads(self) -> None:
        self._ends.close()
        self._ground.transport.close()
        self._ground.thread.stop()
        self._ground.engine.close()
        if self._otlp is not None:
            self._otlp.close()

    def _busy(self) -> bool:
        """Has it sequences, or pages that others are pulling?"""
        return self.receiving.decode.num_sequences > 0 or self.sending.num_sessions > 0

    async def _expire_leases(self) -> None:
        while True:
            await asyncio.sleep(EXPIRY_CHECK_S)
            self._ends.expire(self._ground.clock.now())

    async def _watch_links(self) -> None:
        while True:
            await asyncio.sleep(TICK_S)
            self._links.tick()

    # ---- what concerns both halves ----

    def on_output(self, output: StepOutput) -> None:
        """What a step brought, to the half that it belongs to. On the engine's thread."""
        prefill, decode = self.sending.prefill, self.receiving.decode
        for chunk in output.chunks:
            if not prefill.on_chunk(chunk):
                decode.on_chunk(chunk)
        for failure in output.failures:
            if not prefill.on_failure(failure):
                decode.on_failure(failure)
        self._loop.call_soon_threadsafe(decode.pages_may_be_free)

    def _gateway_gone(self, gateway_id: GatewayId) -> None:
        reason = f"gateway {gateway_id} is gone"
        if self._busy():
            logger.warning("%s: its sequences end here", reason)
        self.sending.prefill.abort_gateway(gateway_id)
        self.receiving.decode.abort_gateway(gateway_id)

    # ---- what is told ----

    def link_stats(self) -> tuple[LinkStats, ...]:
        return self._links.stats()

    def _description(self) -> pb.WorkerDescription:
        config, engine, load = self._ground.config, self._ground.engine, self._reports.latest.load
        return pb.WorkerDescription(
            worker_id=config.worker_id,
            engine_id=self._ground.engine_id,
            cluster_id=config.cluster_id,
            address=self.address,
            fingerprint=wire.fingerprint_to_message(engine.fingerprint),
            architecture=engine.model.architecture,
            max_model_len=engine.model.max_model_len,
            vocab_size=engine.model.vocab_size,
            eos_token_ids=engine.model.eos_token_ids,
            kv_bytes_per_token=engine.layout.bytes_per_token * engine.layout.num_ranks,
            transport=config.kv_transfer.transport,
            pages_total=load.pages_total,
            max_batch_size=config.engine.max_batch_size,
            pid=os.getpid(),
            compute=wire.compute_to_message(engine.model.compute),
            num_layers=engine.layout.num_layers,
            lower_tiers=[state.tier.value for state in load.tiers],
            tensor_parallel=config.tensor_parallel,
        )

    def _state(self, role: Role) -> pb.WorkerState:
        """What there is to say now, but for what ``WorkerService`` knows itself."""
        latest, ends = self._reports.latest, self._ends
        load, announced = latest.load, latest.announced
        decode, prefill, puller = self.receiving.decode, self.sending.prefill, self.receiving.puller
        others = () if self._ground.ranks is None else self._ground.ranks.counts
        return pb.WorkerState(
            engine_id=self._ground.engine_id,
            num_running=load.num_running,
            num_waiting=load.num_waiting,
            num_waiting_tokens=load.num_waiting_tokens,
            pages_free=load.pages_free,
            pages_cached=load.pages_cached,
            bytes_sent=ends.sender.bytes_sent + sum(counts.bytes_sent for counts in others),
            bytes_received=ends.receiver.bytes_received + sum(counts.bytes_received for counts in others),
            prompt_tokens=load.prompt_tokens,
            generated_tokens=load.generated_tokens,
            cached_tokens=load.cached_tokens,
            num_sessions=self.sending.num_sessions + self.receiving.num_sessions,
            pages_quarantined=max([ends.receiver.num_quarantined, *(c.pages_quarantined for c in others)]),
            num_preemptions=load.num_preemptions,
            links=map(wire.link_to_message, self._links.estimates()),
            pulls={outcome.value: count for outcome, count in puller.outcomes.items()},
            pulled_tokens=puller.num_tokens,
            pulled_bytes=puller.num_bytes,
            load_age_s=max(0.0, self._ground.clock.now() - latest.asked_at),
            num_announced=announced.num_sequences,
            num_announced_tokens=announced.num_tokens,
            num_other_role=decode.num_sequences if role is Role.PREFILL else prefill.num_sessions,
            modes=wire.modes_to_message(self._ground.engine.modes()),
            tiers=map(wire.tier_state_to_message, load.tiers),
            reloads={outcome.value: count for outcome, count in load.reloads},
            pages_lost=load.pages_lost,
        )


@dataclass(frozen=True, slots=True)
class _Reported:
    """What an engine had when it was asked, and what was announced then that it did not know of yet."""

    load: EngineLoad
    announced: Announced
    asked_at: float


class _EngineReports:
    """What the engine said last. Sole writer of the logs that gateways are told from. On the event loop."""

    def __init__(self, engine: Engine, thread: EngineThread, announced: Callable[[], Announced], clock: Clock) -> None:
        self._thread = thread
        self._announced = announced
        self._clock = clock
        self._loop = asyncio.get_running_loop()
        self._asked = False
        self._noted = asyncio.Event()  # set, and replaced, when the engine has answered
        self.latest = _Reported(engine.load(), Announced(), clock.now())
        self.page_events = PageEventLog()
        self.steps = StepLog()

    async def refresh(self) -> None:
        """The engine says between two steps what it has, most often at once; a heartbeat does not wait for a long step
        to end, and then tells what was known before."""
        noted = self._noted
        self._ask()
        with suppress(TimeoutError):
            await asyncio.wait_for(noted.wait(), REPORT_WAIT_S)

    def _ask(self) -> None:
        if self._asked:
            return
        self._asked = True
        asked_at, announced = self._clock.now(), self._announced()
        report = self._thread.submit(_report)
        report.add_done_callback(lambda done: self._loop.call_soon_threadsafe(self._note, done, announced, asked_at))

    def _note(self, done: Future[_Report], announced: Announced, asked_at: float) -> None:
        self._asked = False
        self._noted.set()
        self._noted = asyncio.Event()
        if not done.cancelled() and done.exception() is None:
            load, changes, steps = done.result()
            self.latest = _Reported(load, announced, asked_at)
            lower = {Tier.HOST: changes.host, Tier.DISK: changes.disk}
            self.page_events.record(changes.stored, changes.removed, lower)
            self.steps.record(steps)


_Report = tuple[EngineLoad, CacheChanges, tuple[StepSample, ...]]


def _report(engine: Engine) -> _Report:
    return engine.load(), engine.take_cache_changes(), engine.take_step_samples()


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


class _LoopTasks:
    """What runs on an event loop for as long as its worker does."""

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._tasks: set[asyncio.Task[None]] = set()

    def spawn(self, work: Coroutine[Any, Any, None]) -> None:
        """Start a coroutine, on the loop."""
        task = self._loop.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    def run_soon(self, work: Awaitable[None]) -> None:
        """Start a coroutine, from any thread."""

        async def run() -> None:
            await work

        self._loop.call_soon_threadsafe(self.spawn, run())

    async def cancel(self) -> None:
        """End all of them."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)


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
