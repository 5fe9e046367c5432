"""How does a gateway talk to one worker? Over gRPC: one channel, one long-lived Outputs stream, four kinds of call.

``WorkerClient`` is what router and membership know; the simulator has another (cluster/simulator/).

Invariants:
- A client belongs to one engine id, one start of one process. It never reconnects: when its stream breaks the worker
  has already aborted this gateway's sequences, so the client is over, and every open sequence hears ``WorkerLost``.
- A sequence hears nothing after ``close_sequence``. Chunks of unknown sequences are dropped in silence, by design: they
  are the tail of a sequence that was stopped, aborted or retried, and its name is never used again.
- Events of one sequence are delivered in the order in which the worker sent them, on the event loop, and ``deliver``
  must not block: one engine step brings the chunks of 64 sequences in one message.
"""

from __future__ import annotations

import asyncio
import math
from abc import ABC, abstractmethod
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass
from typing import Self, TypeVar

import grpc

from cluster.view import ModelInfo, WorkerLoad
from core.cache_tiers import Tier
from core.compute import UNKNOWN_PROFILE, ComputeProfile, StepSample
from core.errors import InvalidRequest, Overloaded, PeerLost, PrfaasError, SequenceFailed
from core.link import LinkEstimate, ProbeReport
from core.prefix_hash import PageEvents
from core.request import (
    ClusterId,
    EngineId,
    GatewayId,
    PullTask,
    Role,
    SequenceFailure,
    SequenceId,
    SequenceSpec,
    SessionId,
    TokenChunk,
    WorkerId,
)
from core.tracing import TraceContext
from protos import worker_pb2 as pb
from protos import worker_pb2_grpc as rpc
from protos.channels import InternalGrpc
from protos.trace_metadata import trace_metadata
from protos.wire import (
    chunk_from_message,
    compute_from_message,
    failure_from_message,
    fingerprint_from_message,
    link_from_message,
    modes_from_message,
    page_events_from_message,
    probe_from_message,
    pull_task_to_message,
    role_from_text,
    spec_to_message,
    step_from_message,
    tier_from_text,
    tier_state_from_message,
)

PROBE_SLACK_S = 2.0  # a worker answers for a self-test within its time; this much more and it is taken for lost
CALL_TIMEOUT_S = 5.0  # control calls do no work; one that takes so long goes to a process that hangs

_Reply = TypeVar("_Reply")
_Outputs = grpc.aio.UnaryStreamCall[pb.OutputsRequest, pb.OutputBatch]

_CHANNEL_OPTIONS = (
    ("grpc.max_receive_message_length", -1),
    ("grpc.max_send_message_length", -1),
    # A gateway that is busy reads late. With the windows that gRPC finds by itself megabytes of tokens would wait
    # unread, each step a message; with a small one the worker hears of it and sends together what has come meanwhile.
    ("grpc.http2.bdp_probe", 0),
    ("grpc.http2.lookahead_bytes", 16384),
)


@dataclass(frozen=True, slots=True)
class WorkerDescription:
    """What never changes while a worker process lives."""

    worker_id: WorkerId
    engine_id: EngineId
    cluster_id: ClusterId
    address: str
    model: ModelInfo
    transport: str
    pages_total: int
    max_batch_size: int | None = None  # None: it did not say
    compute: ComputeProfile = UNKNOWN_PROFILE
    lower_tiers: tuple[Tier, ...] = ()  # of its prefix cache
    tensor_parallel: int = 1  # ranks that compute one step together

    @property
    def profile(self) -> str:
        """Workers alike in model, device and step share one, and its costs; empty if the device is not known."""
        compute, fingerprint = self.compute, self.model.fingerprint
        if not compute.device:
            return ""
        return (
            f"{fingerprint.model} {fingerprint.dtype} on {compute.num_devices} x {compute.device}, "
            f"{compute.step_tokens} tokens a step"
        )


@dataclass(frozen=True, slots=True)
class WorkerState:
    """What changes: one message of the Watch stream."""

    role: Role
    draining: bool
    load: WorkerLoad
    links: tuple[LinkEstimate, ...] = ()  # that it sends on
    page_events: PageEvents | None = None  # None: its prefix cache is as it was
    load_age_s: float = 0.0  # since the engine was asked for ``load``
    steps: tuple[StepSample, ...] = ()  # that it computed since the last message


@dataclass(frozen=True, slots=True)
class WorkerLost:
    """The worker is gone, or not heard of for too long; nothing more comes from it."""

    worker_id: WorkerId
    reason: str


SequenceEvent = TokenChunk | SequenceFailure | WorkerLost
Deliver = Callable[[SequenceEvent], None]


@dataclass(frozen=True, slots=True)
class Assignment:
    """What a sequence asks of a worker: tokens to compute before its first one, and tokens to hold in pages."""

    tokens: int = 0
    kv_tokens: int = 0


@dataclass(slots=True)
class _Sent:
    """An assignment that is in no report yet, and when the worker had it in its queue, on the event loop's clock."""

    assignment: Assignment
    accepted_at: float = math.inf  # the worker has not said so yet


class WorkerClient(ABC):
    """One gateway's connection to one worker; whoever carries it. ``on_change`` is called when ``num_open`` changed.

    Who hears what of which sequence is here; the calls are the subclass's.
    """

    def __init__(self, description: WorkerDescription) -> None:
        self.description = description
        self._deliver: dict[SequenceId, Deliver] = {}
        self._unreported: dict[SequenceId, _Sent] = {}  # of open sequences that are in no report of its load yet
        # What those ask of the worker in all, kept because every view of the cluster asks for it:
        self.unreported_tokens = 0
        self.unreported_kv_tokens = 0
        self._now = asyncio.get_running_loop().time
        self._lost: WorkerLost | None = None
        self.on_change: Callable[[], None] = lambda: None

    @property
    def num_open(self) -> int:
        """Sequences that were opened here and not closed yet."""
        return len(self._deliver)

    @property
    def num_unreported(self) -> int:
        """Sequences that were sent there and are in no report of its load yet."""
        return len(self._unreported)

    def note_report(self, load_age_s: float) -> None:
        """A report of its load has come, for which the engine was asked ``load_age_s`` ago: what it had in its queue
        by then is in it. The message's own way is not known and taken for nothing."""
        if not self._unreported:
            return
        asked_at = self._now() - load_age_s
        for sequence_id in [name for name, sent in self._unreported.items() if sent.accepted_at <= asked_at]:
            self._count_no_more(sequence_id)

    def open_sequence(self, sequence_id: SequenceId, deliver: Deliver, assignment: Assignment = Assignment()) -> None:
        """From now on ``deliver`` gets the sequence's events, until ``close_sequence``. ``assignment``: what it asks of
        the worker, counted until a report of the worker's load counts it."""
        assert sequence_id not in self._deliver, f"{sequence_id} is open already"
        if self._lost is not None:
            deliver(self._lost)
            return
        self._deliver[sequence_id] = deliver
        self._unreported[sequence_id] = _Sent(assignment)
        self.unreported_tokens += assignment.tokens
        self.unreported_kv_tokens += assignment.kv_tokens
        self.on_change()

    def close_sequence(self, sequence_id: SequenceId) -> None:
        """No more events of it; nothing happens if it is not open."""
        if self._deliver.pop(sequence_id, None) is not None:
            self._count_no_more(sequence_id)
            self.on_change()

    def fail(self, reason: str) -> None:
        """The worker is given up: every open sequence hears ``WorkerLost`` at once; later calls raise ``PeerLost``."""
        if self._lost is not None:
            return
        self._lost = WorkerLost(worker_id=self.description.worker_id, reason=reason)
        listeners, self._deliver = list(self._deliver.values()), {}
        self._unreported.clear()
        self.unreported_tokens = self.unreported_kv_tokens = 0
        for deliver in listeners:
            deliver(self._lost)

    def _accepted(self, sequence_id: SequenceId) -> None:
        """The worker has it in its queue."""
        sent = self._unreported.get(sequence_id)
        if sent is not None:
            sent.accepted_at = self._now()

    def _count_no_more(self, sequence_id: SequenceId) -> None:
        """It is in a report, or over; nothing happens the second time."""
        sent = self._unreported.pop(sequence_id, None)
        if sent is not None:
            self.unreported_tokens -= sent.assignment.tokens
            self.unreported_kv_tokens -= sent.assignment.kv_tokens

    def _require_alive(self) -> None:
        if self._lost is not None:
            raise PeerLost(f"{self._lost.worker_id}: {self._lost.reason}")

    @abstractmethod
    async def prefill(
        self,
        spec: SequenceSpec,
        session_id: SessionId,
        decode_address: str,
        tenant: str = "",
        deadline_s: float | None = None,
        pull: PullTask | None = None,
    ) -> None:
        """Queue the sequence for one token, its KV to be shipped under ``session_id`` to the worker at that address.

        Tenants share links; ``deadline_s``: seconds from now in which the first token is wanted; ``pull``: cached pages
        that the worker is to fetch first.
        Raises ``PeerLost``, ``InvalidRequest`` or ``SequenceFailed``; so do the other calls.
        """

    @abstractmethod
    async def decode(
        self,
        spec: SequenceSpec,
        session_id: SessionId | None,
        tenant: str = "",
        deadline_s: float | None = None,
        pull: PullTask | None = None,
    ) -> None:
        """Announce the sequence: its KV will come under ``session_id``; None: the worker prefills it itself, once it
        has fetched what ``pull`` says."""

    @abstractmethod
    async def abort(self, sequence_id: SequenceId, stage: Role, reason: str) -> None:
        """Give the sequence up at the worker in that stage; a worker that does not know it says nothing."""

    @abstractmethod
    async def set_role(self, role: Role) -> None:
        """Ask the worker to advertise ``role`` from now on."""

    @abstractmethod
    async def probe_link(self, receiver: WorkerDescription, timeout_s: float) -> ProbeReport:
        """Have this worker send random pages to ``receiver``; how they arrived.

        Raises ``Overloaded`` if either has no page to spare now, ``PeerLost`` if this worker does not answer.
        """

    @abstractmethod
    def watch(self, interval_s: float) -> AsyncIterator[WorkerState]:
        """The worker's state at once, at every change and at least every ``interval_s``; ends with ``PeerLost``."""

    @abstractmethod
    async def pump_outputs(self) -> None:
        """Deliver what the worker sends until the stream is over; always ends with ``PeerLost``."""

    @abstractmethod
    async def close(self) -> None:
        """End the connection; the worker then aborts whatever it still runs for this gateway."""


class GrpcWorkerClient(WorkerClient):
    """The connection to a worker process."""

    def __init__(
        self, description: WorkerDescription, channel: grpc.aio.Channel, gateway_id: GatewayId, outputs: _Outputs
    ) -> None:
        super().__init__(description)
        self._channel = channel
        self._gateway_id = gateway_id
        self._outputs = outputs
        self._worker = rpc.WorkerStub(channel)
        self._prefill = rpc.PrefillStub(channel)
        self._decode = rpc.DecodeStub(channel)
        self._probes = rpc.ProbeSenderStub(channel)

    @classmethod
    async def connect(
        cls, address: str, gateway_id: GatewayId, internal: InternalGrpc, timeout_s: float = CALL_TIMEOUT_S
    ) -> Self:
        """Ask the worker who it is and open its Outputs stream; ``PeerLost`` if either does not work in time."""
        channel = internal.channel(address, _CHANNEL_OPTIONS)
        try:
            async with asyncio.timeout(timeout_s):
                stub = rpc.WorkerStub(channel)
                description = await _checked(address, stub.Describe(pb.DescribeRequest(), wait_for_ready=True))
                outputs: _Outputs = stub.Outputs(pb.OutputsRequest(gateway_id=gateway_id))
                # Headers come once the worker knows this gateway: a sequence sent earlier would have no stream.
                await _checked(address, outputs.initial_metadata())
        except BaseException as error:
            await channel.close(grace=None)
            if isinstance(error, TimeoutError):
                raise PeerLost(f"{address} did not answer in {timeout_s:g} s") from error
            raise
        return cls(_description_from_message(description), channel, gateway_id, outputs)

    async def prefill(
        self,
        spec: SequenceSpec,
        session_id: SessionId,
        decode_address: str,
        tenant: str = "",
        deadline_s: float | None = None,
        pull: PullTask | None = None,
    ) -> None:
        request = pb.PrefillRequest(
            gateway_id=self._gateway_id,
            sequence=spec_to_message(spec),
            session_id=session_id,
            decode_address=decode_address,
            tenant=tenant,
            deadline_s=deadline_s,
            pull=None if pull is None else pull_task_to_message(pull),
        )
        await self._call(self._prefill.Prefill, request, spec.trace)
        self._accepted(spec.sequence_id)

    async def decode(
        self,
        spec: SequenceSpec,
        session_id: SessionId | None,
        tenant: str = "",
        deadline_s: float | None = None,
        pull: PullTask | None = None,
    ) -> None:
        request = pb.DecodeRequest(
            gateway_id=self._gateway_id,
            sequence=spec_to_message(spec),
            session_id=session_id or "",
            tenant=tenant,
            deadline_s=deadline_s,
            pull=None if pull is None else pull_task_to_message(pull),
        )
        await self._call(self._decode.Decode, request, spec.trace)
        self._accepted(spec.sequence_id)

    async def abort(self, sequence_id: SequenceId, stage: Role, reason: str) -> None:
        stub = self._prefill if stage is Role.PREFILL else self._decode
        await self._call(stub.Abort, pb.AbortRequest(sequence_ids=[sequence_id], reason=reason))

    async def set_role(self, role: Role) -> None:
        await self._call(self._worker.SetRole, pb.SetRoleRequest(role=role.value))

    async def probe_link(self, receiver: WorkerDescription, timeout_s: float) -> ProbeReport:
        request = pb.ProbeRequest(
            worker_id=receiver.worker_id,
            cluster_id=receiver.cluster_id,
            address=receiver.address,
            timeout_s=timeout_s,
        )
        self._require_alive()
        try:
            return probe_from_message(await self._probes.Run(request, timeout=timeout_s + PROBE_SLACK_S))
        except grpc.aio.AioRpcError as error:
            if error.code() is grpc.StatusCode.RESOURCE_EXHAUSTED:
                raise Overloaded(f"{self.description.worker_id}: {error.details()}") from error
            raise PeerLost(f"{self.description.worker_id}: {_said(error)}") from error

    async def watch(self, interval_s: float) -> AsyncIterator[WorkerState]:
        stream = self._worker.Watch(pb.WatchRequest(interval_s=interval_s))
        try:
            async for message in stream:
                yield _state_from_message(message)
        except grpc.aio.AioRpcError as error:
            raise PeerLost(f"Watch stream broke: {_said(error)}") from error
        finally:
            stream.cancel()
        raise PeerLost("Watch stream ended")

    async def pump_outputs(self) -> None:
        try:
            async for batch in self._outputs:
                self._dispatch(batch)
        except grpc.aio.AioRpcError as error:
            raise PeerLost(f"Outputs stream broke: {_said(error)}") from error
        raise PeerLost("Outputs stream ended")

    def _dispatch(self, batch: pb.OutputBatch) -> None:
        for chunk in batch.chunks:
            deliver = self._deliver.get(SequenceId(chunk.sequence_id))
            if deliver is not None:
                deliver(chunk_from_message(chunk))
        for failure in batch.failures:
            deliver = self._deliver.get(SequenceId(failure.sequence_id))
            if deliver is not None:
                deliver(failure_from_message(failure))

    async def close(self) -> None:
        self.fail("connection closed")
        await self._channel.close(grace=None)

    async def _call(
        self, method: Callable[..., Awaitable[object]], request: object, trace: TraceContext | None = None
    ) -> None:
        self._require_alive()
        call = method(request, timeout=CALL_TIMEOUT_S, metadata=trace_metadata(trace))
        await _checked(self.description.worker_id, call)


async def _checked(peer: str, call: Awaitable[_Reply]) -> _Reply:
    """Await a call; a status becomes the error of ours that says what to do about it."""
    try:
        return await call
    except grpc.aio.AioRpcError as error:
        raise _error_from_status(peer, error) from error


def _error_from_status(peer: str, error: grpc.aio.AioRpcError) -> PrfaasError:
    match error.code():
        case grpc.StatusCode.UNAVAILABLE | grpc.StatusCode.DEADLINE_EXCEEDED | grpc.StatusCode.CANCELLED:
            return PeerLost(f"{peer}: {_said(error)}")
        case grpc.StatusCode.INVALID_ARGUMENT:
            field, _, message = (error.details() or "").partition(": ")
            return InvalidRequest(field, message) if message else InvalidRequest("request", field)
        case _:  # full, draining, in another role, broken: each may be different on another worker
            return SequenceFailed(f"{peer}: {_said(error)}", retryable=True)


def _said(error: grpc.aio.AioRpcError) -> str:
    return f"{error.code().name}: {error.details()}"


def _description_from_message(message: pb.WorkerDescription) -> WorkerDescription:
    return WorkerDescription(
        worker_id=WorkerId(message.worker_id),
        engine_id=EngineId(message.engine_id),
        cluster_id=ClusterId(message.cluster_id),
        address=message.address,
        model=ModelInfo(
            architecture=message.architecture,
            fingerprint=fingerprint_from_message(message.fingerprint),
            max_model_len=message.max_model_len,
            vocab_size=message.vocab_size,
            eos_token_ids=tuple(message.eos_token_ids),
            kv_bytes_per_token=message.kv_bytes_per_token,
            num_layers=message.num_layers or 1,
        ),
        transport=message.transport,
        pages_total=message.pages_total,
        max_batch_size=message.max_batch_size or None,
        compute=compute_from_message(message.compute),
        lower_tiers=tuple(map(tier_from_text, message.lower_tiers)),
        tensor_parallel=message.tensor_parallel or 1,
    )


def _state_from_message(message: pb.WorkerState) -> WorkerState:
    return WorkerState(
        role=role_from_text(message.role),
        draining=message.draining,
        load=WorkerLoad(
            num_running=message.num_running,
            num_waiting=message.num_waiting,
            num_waiting_tokens=message.num_waiting_tokens,
            pages_free=message.pages_free,
            pages_cached=message.pages_cached,
            num_sessions=message.num_sessions,
            pages_quarantined=message.pages_quarantined,
            bytes_sent=message.bytes_sent,
            bytes_received=message.bytes_received,
            prompt_tokens=message.prompt_tokens,
            generated_tokens=message.generated_tokens,
            cached_tokens=message.cached_tokens,
            num_preemptions=message.num_preemptions,
            pulls=tuple(sorted(message.pulls.items())),
            pulled_tokens=message.pulled_tokens,
            pulled_bytes=message.pulled_bytes,
            num_announced=message.num_announced,
            num_announced_tokens=message.num_announced_tokens,
            num_other_role=message.num_other_role,
            modes=modes_from_message(message.modes),
            tiers=tuple(map(tier_state_from_message, message.tiers)),
            reloads=tuple(sorted(message.reloads.items())),
            pages_lost=message.pages_lost,
        ),
        links=tuple(map(link_from_message, message.links)),
        page_events=page_events_from_message(message.page_events) if message.HasField("page_events") else None,
        load_age_s=message.load_age_s,
        steps=tuple(map(step_from_message, message.steps)),
    )
