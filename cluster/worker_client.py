"""How does a gateway talk to one worker process? One channel, one long-lived Outputs stream, four kinds of call.

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
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass
from typing import Self, TypeVar

import grpc

from cluster.view import ModelInfo, WorkerLoad
from core.errors import InvalidRequest, Overloaded, PeerLost, PrfaasError, SequenceFailed
from core.link import LinkEstimate, ProbeReport
from core.prefix_hash import PageEvents
from core.request import (
    ClusterId,
    EngineId,
    GatewayId,
    Role,
    SequenceFailure,
    SequenceId,
    SequenceSpec,
    SessionId,
    TokenChunk,
    WorkerId,
)
from protos import worker_pb2 as pb
from protos import worker_pb2_grpc as rpc
from protos.channels import InternalGrpc
from protos.wire import (
    chunk_from_message,
    failure_from_message,
    fingerprint_from_message,
    link_from_message,
    page_events_from_message,
    probe_from_message,
    role_from_text,
    spec_to_message,
)

PROBE_SLACK_S = 2.0  # a worker answers for a self-test within its time; this much more and it is taken for lost
CALL_TIMEOUT_S = 5.0  # control calls do no work; one that takes so long goes to a process that hangs

_Reply = TypeVar("_Reply")
_Outputs = grpc.aio.UnaryStreamCall[pb.OutputsRequest, pb.OutputBatch]

_CHANNEL_OPTIONS = (
    ("grpc.max_receive_message_length", -1),
    ("grpc.max_send_message_length", -1),
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


@dataclass(frozen=True, slots=True)
class WorkerState:
    """What changes: one message of the Watch stream."""

    role: Role
    draining: bool
    load: WorkerLoad
    links: tuple[LinkEstimate, ...] = ()  # that it sends on
    page_events: PageEvents | None = None  # None: its prefix cache is as it was


@dataclass(frozen=True, slots=True)
class WorkerLost:
    """The worker is gone, or not heard of for too long; nothing more comes from it."""

    worker_id: WorkerId
    reason: str


SequenceEvent = TokenChunk | SequenceFailure | WorkerLost
Deliver = Callable[[SequenceEvent], None]


class WorkerClient:
    """One gateway's connection to one worker process. ``on_change`` is called when ``num_open`` changed."""

    def __init__(
        self, description: WorkerDescription, channel: grpc.aio.Channel, gateway_id: GatewayId, outputs: _Outputs
    ) -> None:
        self.description = description
        self._channel = channel
        self._gateway_id = gateway_id
        self._outputs = outputs
        self._worker = rpc.WorkerStub(channel)
        self._prefill = rpc.PrefillStub(channel)
        self._decode = rpc.DecodeStub(channel)
        self._probes = rpc.ProbeSenderStub(channel)
        self._deliver: dict[SequenceId, Deliver] = {}
        self._lost: WorkerLost | None = None
        self.on_change: Callable[[], None] = lambda: None

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

    @property
    def num_open(self) -> int:
        """Sequences that were opened here and not closed yet."""
        return len(self._deliver)

    def open_sequence(self, sequence_id: SequenceId, deliver: Deliver) -> None:
        """From now on ``deliver`` gets the sequence's events, until ``close_sequence``."""
        assert sequence_id not in self._deliver, f"{sequence_id} is open already"
        if self._lost is not None:
            deliver(self._lost)
            return
        self._deliver[sequence_id] = deliver
        self.on_change()

    def close_sequence(self, sequence_id: SequenceId) -> None:
        """No more events of it; nothing happens if it is not open."""
        if self._deliver.pop(sequence_id, None) is not None:
            self.on_change()

    async def prefill(
        self,
        spec: SequenceSpec,
        session_id: SessionId,
        decode_address: str,
        tenant: str = "",
        deadline_s: float | None = None,
    ) -> None:
        """Queue the sequence for one token, its KV to be shipped under ``session_id`` to the worker at that address.

        Tenants share links; ``deadline_s``: seconds from now in which the first token is wanted.
        Raises ``PeerLost``, ``InvalidRequest`` or ``SequenceFailed``; so do the other calls.
        """
        request = pb.PrefillRequest(
            gateway_id=self._gateway_id,
            sequence=spec_to_message(spec),
            session_id=session_id,
            decode_address=decode_address,
            tenant=tenant,
            deadline_s=deadline_s,
        )
        await self._call(self._prefill.Prefill, request)

    async def decode(self, spec: SequenceSpec, session_id: SessionId | None) -> None:
        """Announce the sequence: its KV will come under ``session_id``; None: the worker prefills it itself."""
        request = pb.DecodeRequest(
            gateway_id=self._gateway_id, sequence=spec_to_message(spec), session_id=session_id or ""
        )
        await self._call(self._decode.Decode, request)

    async def abort(self, sequence_id: SequenceId, stage: Role, reason: str) -> None:
        """Give the sequence up at the worker in that stage; a worker that does not know it says nothing."""
        stub = self._prefill if stage is Role.PREFILL else self._decode
        await self._call(stub.Abort, pb.AbortRequest(sequence_ids=[sequence_id], reason=reason))

    async def set_role(self, role: Role) -> None:
        """Ask the worker to advertise ``role`` from now on."""
        await self._call(self._worker.SetRole, pb.SetRoleRequest(role=role.value))

    async def probe_link(self, receiver: WorkerDescription, timeout_s: float) -> ProbeReport:
        """Have this worker send random pages to ``receiver``; how they arrived.

        Raises ``Overloaded`` if either has no page to spare now, ``PeerLost`` if this worker does not answer.
        """
        request = pb.ProbeRequest(
            worker_id=receiver.worker_id,
            cluster_id=receiver.cluster_id,
            address=receiver.address,
            timeout_s=timeout_s,
        )
        if self._lost is not None:
            raise PeerLost(f"{self._lost.worker_id}: {self._lost.reason}")
        try:
            return probe_from_message(await self._probes.Run(request, timeout=timeout_s + PROBE_SLACK_S))
        except grpc.aio.AioRpcError as error:
            if error.code() is grpc.StatusCode.RESOURCE_EXHAUSTED:
                raise Overloaded(f"{self.description.worker_id}: {error.details()}") from error
            raise PeerLost(f"{self.description.worker_id}: {_said(error)}") from error

    async def watch(self, interval_s: float) -> AsyncIterator[WorkerState]:
        """The worker's state at once, at every change and at least every ``interval_s``; ends with ``PeerLost``."""
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
        """Deliver what the worker sends until the stream is over; always ends with ``PeerLost``."""
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

    def fail(self, reason: str) -> None:
        """The worker is given up: every open sequence hears ``WorkerLost`` at once; later calls raise ``PeerLost``."""
        if self._lost is not None:
            return
        self._lost = WorkerLost(worker_id=self.description.worker_id, reason=reason)
        listeners, self._deliver = list(self._deliver.values()), {}
        for deliver in listeners:
            deliver(self._lost)

    async def close(self) -> None:
        """Close the channel; the worker then aborts whatever it still runs for this gateway."""
        self.fail("connection closed")
        await self._channel.close(grace=None)

    async def _call(self, method: Callable[..., Awaitable[object]], request: object) -> None:
        if self._lost is not None:
            raise PeerLost(f"{self._lost.worker_id}: {self._lost.reason}")
        await _checked(self.description.worker_id, method(request, timeout=CALL_TIMEOUT_S))


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
        ),
        transport=message.transport,
        pages_total=message.pages_total,
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
            num_other_role=message.num_other_role,
        ),
        links=tuple(map(link_from_message, message.links)),
        page_events=page_events_from_message(message.page_events) if message.HasField("page_events") else None,
    )
