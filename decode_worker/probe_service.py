"""The gRPC edge of a self-test's receiving end: messages in, calls of ProbeReceiver out, errors to status codes."""

from __future__ import annotations

import grpc

from core.errors import PrfaasError
from core.fingerprint import CacheFingerprint
from core.request import SessionId
from decode_worker.link_probe import ProbeReceiver
from decode_worker.service import grant_to_message
from kv_transfer.transport import ANONYMOUS
from protos import transfer_status, wire
from protos import worker_pb2 as pb
from protos import worker_pb2_grpc as rpc

MAX_WAIT_S = 60.0


class ProbeReceiverService(rpc.ProbeReceiverServicer):
    """``prfaas.worker.v1.ProbeReceiver``."""

    def __init__(self, receiver: ProbeReceiver, fingerprint: CacheFingerprint) -> None:
        self._receiver = receiver
        self._fingerprint = fingerprint

    async def Grant(  # noqa: N802
        self, request: pb.ProbeGrantRequest, context: grpc.aio.ServicerContext[pb.ProbeGrantRequest, pb.GrantReply]
    ) -> pb.GrantReply:
        try:
            self._fingerprint.require_compatible(wire.fingerprint_from_message(request.fingerprint))
            session_id = SessionId(request.session_id)
            layout = wire.kv_layout_from_message(request.layout)
            max_tokens = max(1, request.max_tokens)
            ranks = wire.kv_ends_from_messages(request.sender_ranks)
            grant = await self._receiver.grant(session_id, max_tokens, layout, request.sender_descriptor, ranks)
        except PrfaasError as error:
            await transfer_status.abort(context, error)
        return grant_to_message(grant, ANONYMOUS)  # the sending end knows whom it tests

    async def Digest(  # noqa: N802
        self,
        request: pb.ProbeDigestRequest,
        context: grpc.aio.ServicerContext[pb.ProbeDigestRequest, pb.ProbeDigestReply],
    ) -> pb.ProbeDigestReply:
        wait_s = min(max(request.wait_s, 0.0), MAX_WAIT_S)
        try:
            arrived = await self._receiver.digest(SessionId(request.session_id), wait_s)
        except PrfaasError as error:
            await transfer_status.abort(context, error)
        return pb.ProbeDigestReply(digest=arrived.digest, num_bytes=arrived.num_bytes)

    async def GiveUp(  # noqa: N802
        self,
        request: pb.ProbeGiveUpRequest,
        context: grpc.aio.ServicerContext[pb.ProbeGiveUpRequest, pb.ProbeGiveUpReply],
    ) -> pb.ProbeGiveUpReply:
        self._receiver.give_up(SessionId(request.session_id), request.reason)
        return pb.ProbeGiveUpReply()
