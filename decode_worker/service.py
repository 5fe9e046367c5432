"""The gRPC edge of a decode worker: messages in, calls of DecodeWorker out, errors to status codes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import grpc

from core.clock import Clock
from core.errors import GrantRefused, Incompatible, InvalidRequest, ProtocolViolation
from core.fingerprint import CacheFingerprint
from core.request import GatewayId, SequenceId, SessionId
from decode_worker.worker import DecodeWorker
from kv_transfer.session import Grant
from kv_transfer.transport import PeerIdentity, SendOrder
from protos import wire
from protos import worker_pb2 as pb
from protos import worker_pb2_grpc as rpc
from protos.trace_metadata import trace_of

OutputsCheck = Callable[[GatewayId], bool]

MAX_GRANT_WAIT_S = 600.0


class DecodeService(rpc.DecodeServicer):
    """``prfaas.worker.v1.Decode``. ``has_outputs`` tells whether a gateway reads its Outputs stream; ``clock`` is the
    transport's."""

    def __init__(
        self,
        worker: DecodeWorker,
        identity: PeerIdentity,
        fingerprint: CacheFingerprint,
        has_outputs: OutputsCheck,
        clock: Clock,
    ) -> None:
        self._worker = worker
        self._identity = identity
        self._fingerprint = fingerprint
        self._has_outputs = has_outputs
        self._clock = clock

    async def Decode(  # noqa: N802
        self, request: pb.DecodeRequest, context: grpc.aio.ServicerContext[pb.DecodeRequest, pb.DecodeReply]
    ) -> pb.DecodeReply:
        gateway_id = GatewayId(request.gateway_id)
        if not self._has_outputs(gateway_id):
            await context.abort(grpc.StatusCode.FAILED_PRECONDITION, f"gateway {gateway_id} reads no Outputs stream")
        session_id = SessionId(request.session_id) if request.session_id else None
        try:
            order = self._order(request)
            spec = wire.spec_from_message(request.sequence, hold_kv=False)
            trace = trace_of(context.invocation_metadata())
            spec = replace(spec, first_token_by=order.deadline_at, trace=trace)
            pull = wire.pull_task_from_message(request.pull) if request.HasField("pull") else None
            if pull is not None and session_id is not None:
                raise ProtocolViolation("pull: only a sequence without a session is prefilled here")
            self._worker.decode(spec, gateway_id, session_id, order, pull)
        except (ProtocolViolation, InvalidRequest) as error:
            await context.abort(grpc.StatusCode.INVALID_ARGUMENT, str(error))
        except ValueError as error:
            await context.abort(grpc.StatusCode.ALREADY_EXISTS, str(error))
        return pb.DecodeReply()

    def _order(self, request: pb.DecodeRequest) -> SendOrder:
        """Hosts' clocks differ, so a deadline travels as the seconds that are left."""
        deadline_at = self._clock.now() + request.deadline_s if request.HasField("deadline_s") else None
        return SendOrder(request.tenant, deadline_at=deadline_at)

    async def Abort(  # noqa: N802
        self, request: pb.AbortRequest, context: grpc.aio.ServicerContext[pb.AbortRequest, pb.AbortReply]
    ) -> pb.AbortReply:
        for sequence_id in request.sequence_ids:
            self._worker.abort(SequenceId(sequence_id), request.reason or "aborted by the gateway")
        return pb.AbortReply()

    async def Grant(  # noqa: N802
        self, request: pb.GrantRequest, context: grpc.aio.ServicerContext[pb.GrantRequest, pb.GrantReply]
    ) -> pb.GrantReply:
        wait_s = min(max(request.wait_s, 0.0), MAX_GRANT_WAIT_S)
        try:
            self._fingerprint.require_compatible(wire.fingerprint_from_message(request.fingerprint))
            layout = wire.kv_layout_from_message(request.layout)
            trace = trace_of(context.invocation_metadata())
            ranks = wire.kv_ends_from_messages(request.sender_ranks)
            session_id, descriptor = SessionId(request.session_id), request.sender_descriptor
            grant = await self._worker.grant(session_id, wait_s, layout, descriptor, trace, ranks)
        except Incompatible as error:
            said = (("field", error.field), ("ours", error.ours), ("theirs", error.theirs))
            context.set_trailing_metadata(tuple((f"incompatible-{part}", text) for part, text in said))
            await context.abort(grpc.StatusCode.FAILED_PRECONDITION, str(error))
        except GrantRefused as error:
            await context.abort(grpc.StatusCode.NOT_FOUND, str(error))
        except ProtocolViolation as error:
            await context.abort(grpc.StatusCode.INVALID_ARGUMENT, str(error))
        return grant_to_message(grant, self._identity)


def grant_to_message(grant: Grant, receiver: PeerIdentity) -> pb.GrantReply:
    """``receiver``: this worker, whose pages are granted."""
    assert grant.layout is not None, "a receiver knows its own pool"
    return pb.GrantReply(
        token=grant.token,
        first_page=grant.first_page,
        pages=grant.pages,
        transport_descriptor=grant.descriptor,
        lease_s=grant.lease_s,
        layout=wire.kv_layout_to_message(grant.layout),
        worker_id=receiver.worker_id,
        cluster_id=receiver.cluster_id,
        parts=(
            pb.GrantPart(
                sender_rank=part.sender,
                session_id=part.session_id,
                token=part.token,
                transport_descriptor=part.descriptor,
                layout=wire.kv_layout_to_message(part.layout),
            )
            for part in grant.parts
        ),
    )
