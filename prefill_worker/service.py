"""The gRPC edge of a prefill worker: messages in, calls of PrefillWorker out, errors to status codes.

Also the client side of ``Decode.Grant``, the one call that a prefill worker makes to a decode worker.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from typing import cast

import grpc

from core.clock import Clock
from core.errors import GrantRefused, Incompatible, InvalidRequest, PeerLost, ProtocolViolation
from core.fingerprint import CacheFingerprint
from core.kv_layout import KvEnd, KvLayout
from core.request import ClusterId, EngineId, GatewayId, SequenceId, SessionId, WorkerId
from kv_transfer.session import Grant, GrantPart
from kv_transfer.transport import PeerIdentity, SendOrder
from prefill_worker.worker import GrantQuery, PrefillWorker
from protos import wire
from protos import worker_pb2 as pb
from protos import worker_pb2_grpc as rpc
from protos.channels import InternalGrpc
from protos.trace_metadata import trace_metadata, trace_of

OutputsCheck = Callable[[GatewayId], bool]

GRANT_SLACK_S = 5.0  # a decode worker answers within wait_s; this much more and it is taken for lost


class PrefillService(rpc.PrefillServicer):
    """``prfaas.worker.v1.Prefill``. ``has_outputs`` tells whether a gateway reads its Outputs stream; ``clock`` is the
    transport's."""

    def __init__(self, worker: PrefillWorker, has_outputs: OutputsCheck, clock: Clock) -> None:
        self._worker = worker
        self._has_outputs = has_outputs
        self._clock = clock

    async def Prefill(  # noqa: N802
        self, request: pb.PrefillRequest, context: grpc.aio.ServicerContext[pb.PrefillRequest, pb.PrefillReply]
    ) -> pb.PrefillReply:
        gateway_id = GatewayId(request.gateway_id)
        if not self._has_outputs(gateway_id):
            await context.abort(grpc.StatusCode.FAILED_PRECONDITION, f"gateway {gateway_id} reads no Outputs stream")
        query = GrantQuery(SessionId(request.session_id), request.decode_address) if request.session_id else None
        try:
            order = self._order(request)
            spec = wire.spec_from_message(request.sequence, hold_kv=True)
            trace = trace_of(context.invocation_metadata())
            spec = replace(spec, first_token_by=order.deadline_at, trace=trace)
            pull = wire.pull_task_from_message(request.pull) if request.HasField("pull") else None
            self._worker.prefill(spec, gateway_id, query, order, pull)
        except (ProtocolViolation, InvalidRequest) as error:
            await context.abort(grpc.StatusCode.INVALID_ARGUMENT, str(error))
        except ValueError as error:
            await context.abort(grpc.StatusCode.ALREADY_EXISTS, str(error))
        return pb.PrefillReply()

    def _order(self, request: pb.PrefillRequest) -> SendOrder:
        """Hosts' clocks differ, so a deadline travels as the seconds that are left."""
        deadline_at = self._clock.now() + request.deadline_s if request.HasField("deadline_s") else None
        return SendOrder(request.tenant, deadline_at=deadline_at)

    async def Abort(  # noqa: N802
        self, request: pb.AbortRequest, context: grpc.aio.ServicerContext[pb.AbortRequest, pb.AbortReply]
    ) -> pb.AbortReply:
        for sequence_id in request.sequence_ids:
            self._worker.abort(SequenceId(sequence_id), request.reason or "aborted by the gateway")
        return pb.AbortReply()


class GrantClient:
    """Asks decode workers for grants; keeps one channel to each."""

    def __init__(
        self,
        engine_id: EngineId,
        fingerprint: CacheFingerprint,
        layout: KvLayout,
        describe: Callable[[], bytes],
        wait_s: float,
        internal: InternalGrpc,
        ranks: Callable[[], Sequence[KvEnd]] = tuple,
    ) -> None:
        """``layout``: of this worker's pool; ``describe``: its transport's descriptor, once that serves. ``ranks``: of
        a worker of several, each one's."""
        self._ranks = ranks
        self._engine_id = engine_id
        self._layout = wire.kv_layout_to_message(layout)
        self._describe = describe
        self._internal = internal
        self._fingerprint = wire.fingerprint_to_message(fingerprint)
        self._wait_s = wait_s
        self._channels: dict[str, grpc.aio.Channel] = {}

    async def ask(self, query: GrantQuery) -> Grant:
        """Raise ``GrantRefused``, ``Incompatible``, ``PeerLost`` or ``ProtocolViolation``."""
        channel = self._channels.get(query.address)
        if channel is None:
            channel = self._channels[query.address] = self._internal.channel(query.address)
        request = pb.GrantRequest(
            session_id=query.session_id,
            fingerprint=self._fingerprint,
            wait_s=self._wait_s,
            sender_engine_id=self._engine_id,
            layout=self._layout,
            sender_descriptor=self._describe(),
            sender_ranks=wire.kv_ends_to_messages(self._ranks()),
        )
        try:
            timeout_s, metadata = self._wait_s + GRANT_SLACK_S, trace_metadata(query.trace)
            reply = await rpc.DecodeStub(channel).Grant(request, timeout=timeout_s, metadata=metadata)
        except grpc.aio.AioRpcError as error:
            raise await self._typed(query, error) from error
        return grant_from_message(query.session_id, reply)

    async def close(self) -> None:
        """Close every channel."""
        for channel in self._channels.values():
            await channel.close(grace=None)
        self._channels.clear()

    async def _typed(self, query: GrantQuery, error: grpc.aio.AioRpcError) -> GrantRefused | Incompatible | PeerLost:
        details = error.details() or ""
        if error.code() is grpc.StatusCode.FAILED_PRECONDITION:
            # grpc-stubs call the metadata's pairs opaque.
            said = dict(cast(Iterable[tuple[str, str]], error.trailing_metadata() or ()))
            return Incompatible(*(said.get(f"incompatible-{part}", "?") for part in ("field", "theirs", "ours")))
        if error.code() in (grpc.StatusCode.NOT_FOUND, grpc.StatusCode.RESOURCE_EXHAUSTED):
            return GrantRefused(details)
        channel = self._channels.get(query.address)
        if channel is not None and error.code() is grpc.StatusCode.UNAVAILABLE:
            # A worker that restarts at the same address must not wait out the broken channel's back-off.
            del self._channels[query.address]
            await channel.close(grace=None)
        return PeerLost(f"{query.address}: {error.code().name} {details}")


def grant_from_message(session_id: SessionId, message: pb.GrantReply) -> Grant:
    """Raise ``ProtocolViolation`` for a layout that no pool has."""
    return Grant(
        session_id=session_id,
        token=message.token,
        first_page=message.first_page,
        pages=tuple(message.pages),
        descriptor=message.transport_descriptor,
        lease_s=message.lease_s,
        layout=wire.kv_layout_from_message(message.layout),
        receiver=PeerIdentity(WorkerId(message.worker_id), ClusterId(message.cluster_id)),
        parts=tuple(
            GrantPart(
                part.sender_rank,
                SessionId(part.session_id),
                part.token,
                part.transport_descriptor,
                wire.kv_layout_from_message(part.layout),
            )
            for part in message.parts
        ),
    )
