"""A worker without a model, over real gRPC: tokens that can be computed by hand, and a death at any stage.

``token_at`` is the whole model. A prefill worker sends the first token, hands over by calling the decode worker's
``commit`` in the same process (``FakeWorker.at`` finds it by address), and reports the hand-over. At each stage the
worker runs the hook that a test has put into ``hooks``; a hook may kill the worker, wait, or fail the sequence.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Sequence
from dataclasses import dataclass, field
from typing import Any

import grpc

from core.compute import UNKNOWN_PROFILE, ComputeProfile, StepSample
from core.fingerprint import CacheFingerprint
from core.link import LinkEstimate, ProbeReport
from core.prefix_hash import PageEvents
from core.request import (
    FinishReason,
    PullReport,
    Role,
    SequenceFailure,
    SequenceSpec,
    StageStats,
    TokenChunk,
    WorkerId,
)
from protos import wire
from protos import worker_pb2 as pb
from protos import worker_pb2_grpc as rpc
from protos.channels import InternalGrpc

FINGERPRINT = CacheFingerprint(model="fake", revision="r1", dtype="float32", page_size=4, layout="l1")
VOCAB_SIZE = 1000

# Stages, in the order in which a sequence meets them; hooks are named after them.
ANNOUNCED = "announced"  # D: the Decode call has come
QUEUED = "queued"  # P: the Prefill call has come
FIRST_TOKEN = "first_token"  # P: about to send the first token
BEFORE_COMMIT = "before_commit"  # P: the first token was sent, D knows nothing of it
COMMITTED = "committed"  # P: D has the sequence, the report of the hand-over was not sent
DECODED = "decoded"  # D: each time a token was sent


class Interrupted(Exception):
    """A hook ends the sequence here."""


@dataclass
class Visit:
    """One sequence at one stage of one worker."""

    worker: FakeWorker
    stage: str
    spec: SequenceSpec
    num_sent: int = 0  # tokens that this worker sent of it


Hook = Callable[[Visit], Awaitable[None]]


Probe = Callable[[pb.ProbeRequest], Awaitable[ProbeReport]]


async def passing_probe(request: pb.ProbeRequest) -> ProbeReport:
    return ProbeReport("fake", num_bytes=4096, exact=True, timed_bytes=4096, seconds=0.001, rtt_s=0.0001)


def token_at(prompt: Sequence[int], seed: int, position: int) -> int:
    """The model: a pure function, as sampling is."""
    return (sum(prompt) + 31 * position + 7 * seed) % VOCAB_SIZE


def expected_tokens(prompt: Sequence[int], seed: int, num_tokens: int) -> list[int]:
    return [token_at(prompt, seed, position) for position in range(num_tokens)]


@dataclass
class FakeWorker(rpc.WorkerServicer):
    """One worker process, in this one."""

    worker_id: str
    role: Role
    engine_id: str = ""
    cluster_id: str = "local"
    fingerprint: CacheFingerprint = FINGERPRINT
    draining: bool = False
    pages_free: int = 1000
    step_s: float = 0.0
    compute: ComputeProfile = UNKNOWN_PROFILE
    hooks: dict[str, Hook] = field(default_factory=dict)
    internal: InternalGrpc = field(default_factory=lambda: InternalGrpc(None))

    def __post_init__(self) -> None:
        self.engine_id = self.engine_id or f"{self.worker_id}-engine-1"
        self.address = ""
        self.silent = asyncio.Event()  # set: Watch sends no heartbeats any more
        self.prefills: list[SequenceSpec] = []
        self.prefill_requests: list[pb.PrefillRequest] = []
        self.decodes: list[SequenceSpec] = []
        self.decode_requests: list[pb.DecodeRequest] = []
        self.pull: PullReport | None = None  # what it says of pulls
        self.aborts: list[tuple[str, Role]] = []
        self.links: tuple[LinkEstimate, ...] = ()  # what Watch says of them
        self._page_events: PageEvents | None = None  # said once
        self._steps: tuple[StepSample, ...] = ()  # said once
        self.load_age_s = 0.0  # what Watch says of its load
        self.probe: Probe = passing_probe
        self.probed: list[str] = []  # workers to which a self-test was asked for
        self.watchers: list[float] = []  # interval asked for by each Watch stream
        self.running: dict[str, asyncio.Task[None]] = {}
        self.stages: dict[str, Role] = {}  # of what runs
        self.announced: dict[str, SequenceSpec] = {}
        self.waiting: dict[str, int] = {}  # prompts without a first token |-> their tokens
        self._outputs: asyncio.Queue[pb.OutputBatch] = asyncio.Queue()
        self._changed = asyncio.Event()
        self._server: grpc.aio.Server | None = None
        self._fabric: dict[str, FakeWorker] = {}
        self._dead = False

    async def start(self, fabric: dict[str, FakeWorker]) -> str:
        self._fabric = fabric
        server = self._server = grpc.aio.server()
        rpc.add_WorkerServicer_to_server(self, server)
        rpc.add_PrefillServicer_to_server(_PrefillEdge(self), server)
        rpc.add_DecodeServicer_to_server(_DecodeEdge(self), server)
        rpc.add_ProbeSenderServicer_to_server(_ProbeEdge(self), server)
        port = self.internal.listen(server, "127.0.0.1:0")
        self.address = f"127.0.0.1:{port}"
        fabric[self.address] = self
        await server.start()
        return self.address

    async def kill(self) -> None:
        """As kill -9: connections break, nothing more is sent."""
        self._dead = True
        self._fabric.pop(self.address, None)
        current = asyncio.current_task()
        for task in self.running.values():
            if task is not current:
                task.cancel()
        server, self._server = self._server, None  # its finaliser needs the event loop
        if server is not None:
            await server.stop(grace=None)

    async def change(
        self,
        *,
        role: Role | None = None,
        draining: bool | None = None,
        links: tuple[LinkEstimate, ...] | None = None,
        page_events: PageEvents | None = None,
        steps: tuple[StepSample, ...] = (),
    ) -> None:
        """Advertise something else."""
        self._page_events, self._steps = page_events, steps
        self.links = self.links if links is None else links
        self.role = role or self.role
        self.draining = self.draining if draining is None else draining
        self._changed.set()

    @property
    def num_other_role(self) -> int:
        """Sequences of the role that it does not advertise."""
        announced = len(self.announced) if self.role is Role.PREFILL else 0
        return announced + sum(stage is not self.role for stage in self.stages.values())

    # ---- Worker ----

    async def Describe(self, request: pb.DescribeRequest, context: Any) -> pb.WorkerDescription:  # noqa: N802
        return pb.WorkerDescription(
            worker_id=self.worker_id,
            engine_id=self.engine_id,
            cluster_id=self.cluster_id,
            address=self.address,
            fingerprint=wire.fingerprint_to_message(self.fingerprint),
            architecture="Fake",
            max_model_len=4096,
            vocab_size=VOCAB_SIZE,
            eos_token_ids=[0],
            kv_bytes_per_token=64,
            transport="fake",
            pages_total=1000,
            compute=wire.compute_to_message(self.compute),
        )

    async def Watch(self, request: pb.WatchRequest, context: Any) -> AsyncIterator[pb.WorkerState]:  # noqa: N802
        self.watchers.append(request.interval_s)
        while True:
            events, self._page_events = self._page_events, None
            steps, self._steps = self._steps, ()
            yield pb.WorkerState(
                engine_id=self.engine_id,
                role=self.role.value,
                draining=self.draining,
                num_running=len(self.running),
                num_waiting_tokens=sum(self.waiting.values()),
                pages_free=self.pages_free,
                num_other_role=self.num_other_role,
                links=map(wire.link_to_message, self.links),
                page_events=None if events is None else wire.page_events_to_message(events),
                steps=map(wire.step_to_message, steps),
                load_age_s=self.load_age_s,
            )
            if self.silent.is_set():
                await asyncio.Event().wait()
            try:
                await asyncio.wait_for(self._changed.wait(), request.interval_s)
            except TimeoutError:
                continue
            self._changed.clear()

    async def Outputs(self, request: pb.OutputsRequest, context: Any) -> AsyncIterator[pb.OutputBatch]:  # noqa: N802
        yield pb.OutputBatch()
        while True:
            yield await self._outputs.get()

    async def SetRole(self, request: pb.SetRoleRequest, context: Any) -> pb.SetRoleReply:  # noqa: N802
        await self.change(role=Role(request.role))
        return pb.SetRoleReply()

    # ---- Prefill and Decode ----

    async def queue(self, request: pb.PrefillRequest, context: Any) -> None:
        spec = wire.spec_from_message(request.sequence, hold_kv=True)
        self.prefills.append(spec)
        self.prefill_requests.append(request)
        await self._refuse_if_asked(QUEUED, spec, context)
        self.waiting[spec.sequence_id] = len(spec.token_ids)
        self._run(spec, self._prefill(spec, request.decode_address))

    async def announce(self, request: pb.DecodeRequest, context: Any) -> None:
        spec = wire.spec_from_message(request.sequence, hold_kv=False)
        self.decodes.append(spec)
        self.decode_requests.append(request)
        await self._refuse_if_asked(ANNOUNCED, spec, context)
        if request.session_id:
            self.announced[spec.sequence_id] = spec
        else:
            self._run(spec, self._decode(spec, first=len(spec.output_token_ids)))

    def abort(self, sequence_ids: Sequence[str], stage: Role) -> None:
        for sequence_id in sequence_ids:
            self.aborts.append((sequence_id, stage))
            self.announced.pop(sequence_id, None)
            self.waiting.pop(sequence_id, None)
            task = self.running.pop(sequence_id, None)
            self.stages.pop(sequence_id, None)
            if task is not None:
                task.cancel()
        return pb.AbortReply()

    # ---- the two halves ----

    def commit(self, sequence_id: str) -> bool:
        """D: the K/V is here. False if nobody announced it."""
        spec = self.announced.pop(sequence_id, None)
        if spec is None:
            return False
        self._run(spec, self._decode(spec, first=len(spec.output_token_ids) + 1))
        return True

    def send(self, *items: TokenChunk | SequenceFailure) -> None:
        """One batch on the Outputs stream."""
        if self._dead:
            return
        batch = pb.OutputBatch()
        for item in items:
            if isinstance(item, TokenChunk):
                batch.chunks.append(wire.chunk_to_message(item))
            else:
                batch.failures.append(wire.failure_to_message(item))
        self._outputs.put_nowait(batch)

    def fail(self, spec: SequenceSpec, message: str = "scripted", *, retryable: bool = True) -> None:
        stage = Role.PREFILL if spec.hold_kv else Role.DECODE
        self.send(SequenceFailure(spec.sequence_id, message, retryable, stage))

    def chunk(self, spec: SequenceSpec, position: int, stats: StageStats | None = None) -> TokenChunk:
        assert spec.sampling.seed is not None
        last = position + 1 == (spec.sampling.max_tokens or 16)
        return TokenChunk(
            spec.sequence_id,
            position,
            (token_at(spec.prompt_token_ids, spec.sampling.seed, position),),
            finish_reason=FinishReason.LENGTH if last else None,
            stats=stats,
        )

    async def _prefill(self, spec: SequenceSpec, decode_address: str) -> None:
        await self._visit(FIRST_TOKEN, spec)
        self.waiting.pop(spec.sequence_id, None)
        position = len(spec.output_token_ids)
        stats = StageStats(
            WorkerId(self.worker_id), Role.PREFILL, queue_s=0.5, compute_s=1.0, cached_tokens=2, pull=self.pull
        )
        first = self.chunk(spec, position, stats)
        self.send(first)
        if first.finish_reason is not None:
            return
        await self._visit(BEFORE_COMMIT, spec, 1)
        peer = self._fabric.get(decode_address)
        if peer is None or not peer.commit(spec.sequence_id):
            self.send(SequenceFailure(spec.sequence_id, "no peer", True, Role.DECODE))
            return
        await self._visit(COMMITTED, spec, 1)
        report = StageStats(
            WorkerId(self.worker_id),
            Role.PREFILL,
            0.5,
            1.0,
            2.0,
            0.25,
            cached_tokens=2,
            bytes_shipped=128,
            pull=self.pull,
        )
        self.send(TokenChunk(spec.sequence_id, position + 1, stats=report))

    async def _decode(self, spec: SequenceSpec, first: int) -> None:
        last = spec.sampling.max_tokens or 16
        for position in range(first, last):
            await asyncio.sleep(self.step_s)
            stats = None
            if position in (first, last - 1):
                stats = StageStats(WorkerId(self.worker_id), Role.DECODE, 0.125, 4.0, cached_tokens=1, pull=self.pull)
            self.send(self.chunk(spec, position, stats))
            await self._visit(DECODED, spec, position - first + 1)

    async def _visit(self, stage: str, spec: SequenceSpec, num_sent: int = 0) -> None:
        await asyncio.sleep(0)
        hook = self.hooks.get(stage)
        if hook is not None:
            await hook(Visit(self, stage, spec, num_sent))
        if self._dead:
            raise Interrupted

    async def _refuse_if_asked(self, stage: str, spec: SequenceSpec, context: Any) -> None:
        try:
            await self._visit(stage, spec)
        except Refusal as refusal:
            await context.abort(refusal.code, refusal.details)
        except Interrupted:
            await context.abort(grpc.StatusCode.UNAVAILABLE, "dead")

    def _run(self, spec: SequenceSpec, work: Coroutine[Any, Any, None]) -> None:
        def ended(task: asyncio.Task[None]) -> None:
            if self.running.get(spec.sequence_id) is task:
                del self.running[spec.sequence_id], self.stages[spec.sequence_id]
            error = None if task.cancelled() else task.exception()
            assert error is None or isinstance(error, Interrupted), error

        task = self.running[spec.sequence_id] = asyncio.create_task(work)
        self.stages[spec.sequence_id] = Role.PREFILL if spec.hold_kv else Role.DECODE
        task.add_done_callback(ended)


@dataclass
class Refusal(Exception):
    """A hook of ``announced`` or ``queued`` raises it: the call ends with that status."""

    code: grpc.StatusCode
    details: str


class _ProbeEdge(rpc.ProbeSenderServicer):
    """The ProbeSender service of a fake worker: its ``probe`` is the link."""

    def __init__(self, worker: FakeWorker) -> None:
        self._worker = worker

    async def Run(self, request: pb.ProbeRequest, context: Any) -> pb.ProbeReport:  # noqa: N802
        self._worker.probed.append(request.worker_id)
        try:
            report = await self._worker.probe(request)
        except Refusal as refusal:
            await context.abort(refusal.code, refusal.details)
        return wire.probe_to_message(report)


class _PrefillEdge(rpc.PrefillServicer):
    """The Prefill service of a fake worker; apart, because Abort is named alike in both services."""

    def __init__(self, worker: FakeWorker) -> None:
        self._worker = worker

    async def Prefill(self, request: pb.PrefillRequest, context: Any) -> pb.PrefillReply:  # noqa: N802
        await self._worker.queue(request, context)
        return pb.PrefillReply()

    async def Abort(self, request: pb.AbortRequest, context: Any) -> pb.AbortReply:  # noqa: N802
        self._worker.abort(request.sequence_ids, Role.PREFILL)
        return pb.AbortReply()


class _DecodeEdge(rpc.DecodeServicer):
    """The Decode service of a fake worker."""

    def __init__(self, worker: FakeWorker) -> None:
        self._worker = worker

    async def Decode(self, request: pb.DecodeRequest, context: Any) -> pb.DecodeReply:  # noqa: N802
        await self._worker.announce(request, context)
        return pb.DecodeReply()

    async def Abort(self, request: pb.AbortRequest, context: Any) -> pb.AbortReply:  # noqa: N802
        self._worker.abort(request.sequence_ids, Role.DECODE)
        return pb.AbortReply()
