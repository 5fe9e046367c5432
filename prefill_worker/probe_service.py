"""The gRPC edge of a self-test's sending end, and the client of its receiving end."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from dataclasses import replace
from typing import TypeVar

import grpc

from core.errors import Overloaded
from core.fingerprint import CacheFingerprint
from core.kv_layout import KvEnd, KvLayout
from core.request import ClusterId, SessionId, WorkerId
from kv_transfer.session import Grant
from kv_transfer.transport import PeerIdentity
from prefill_worker.link_probe import LinkProber
from prefill_worker.service import grant_from_message
from protos import transfer_status, wire
from protos import worker_pb2 as pb
from protos import worker_pb2_grpc as rpc
from protos.channels import InternalGrpc

MAX_TIMEOUT_S = 120.0
CALL_TIMEOUT_S = 5.0

_Reply = TypeVar("_Reply")


class ProbeSenderService(rpc.ProbeSenderServicer):
    """``prfaas.worker.v1.ProbeSender``. ``describe`` is the transport's: where the receiving end may dial to."""

    def __init__(
        self,
        prober: LinkProber,
        fingerprint: CacheFingerprint,
        layout: KvLayout,
        internal: InternalGrpc,
        describe: Callable[[], bytes],
        ranks: Callable[[], Sequence[KvEnd]] = tuple,
    ) -> None:
        """``ranks``: of a worker of several, each one's."""
        self._ranks = ranks
        self._prober = prober
        self._fingerprint = wire.fingerprint_to_message(fingerprint)
        self._layout = wire.kv_layout_to_message(layout)
        self._internal = internal
        self._describe = describe

    async def Run(  # noqa: N802
        self, request: pb.ProbeRequest, context: grpc.aio.ServicerContext[pb.ProbeRequest, pb.ProbeReport]
    ) -> pb.ProbeReport:
        peer = PeerIdentity(WorkerId(request.worker_id), ClusterId(request.cluster_id))
        timeout_s = min(max(request.timeout_s, 0.0), MAX_TIMEOUT_S)
        async with self._internal.channel(request.address) as channel:
            stub = rpc.ProbeReceiverStub(channel)
            ranks = wire.kv_ends_to_messages(self._ranks())
            target = _Target(peer, request.address, stub, self._fingerprint, self._layout, self._describe(), ranks)
            try:
                report = await self._prober.run(peer, target, timeout_s)
            except Overloaded as error:
                await transfer_status.abort(context, error)
        return wire.probe_to_message(report)


class _Target:
    """One receiving worker, over gRPC."""

    def __init__(
        self,
        peer: PeerIdentity,
        address: str,
        stub: rpc.ProbeReceiverStub,
        fingerprint: pb.Fingerprint,
        layout: pb.KvLayout,
        descriptor: bytes,
        ranks: Sequence[pb.KvEnd],
    ) -> None:
        self._ranks = ranks
        self._peer = peer
        self._address = address
        self._stub = stub
        self._fingerprint = fingerprint
        self._layout = layout
        self._descriptor = descriptor

    async def grant(self, session_id: SessionId, max_tokens: int) -> Grant:
        request = pb.ProbeGrantRequest(
            session_id=session_id,
            fingerprint=self._fingerprint,
            max_tokens=max_tokens,
            layout=self._layout,
            sender_descriptor=self._descriptor,
            sender_ranks=self._ranks,
        )
        reply = await self._typed(self._stub.Grant(request, timeout=CALL_TIMEOUT_S))
        return replace(grant_from_message(session_id, reply), receiver=self._peer)

    async def digest(self, session_id: SessionId, wait_s: float) -> tuple[bytes, int]:
        request = pb.ProbeDigestRequest(session_id=session_id, wait_s=wait_s)
        reply = await self._typed(self._stub.Digest(request, timeout=wait_s + CALL_TIMEOUT_S))
        return reply.digest, reply.num_bytes

    async def give_up(self, session_id: SessionId, reason: str) -> None:
        request = pb.ProbeGiveUpRequest(session_id=session_id, reason=reason)
        await self._typed(self._stub.GiveUp(request, timeout=CALL_TIMEOUT_S))

    async def _typed(self, call: Awaitable[_Reply]) -> _Reply:
        try:
            return await call
        except grpc.aio.AioRpcError as error:
            raise transfer_status.error_of(self._address, error) from error
