"""How does a worker ask another one for cached pages? The caller's side of ``Pages.Pull``."""

from __future__ import annotations

import asyncio
from typing import NoReturn

import grpc

from core.errors import (
    Corrupted,
    GrantRefused,
    PeerLost,
    ProtocolViolation,
    TransferAborted,
    TransferError,
    Unauthenticated,
)
from core.fingerprint import CacheFingerprint
from core.kv_layout import KvLayout
from core.request import PullTask
from decode_worker.page_pull import PagesWanted
from decode_worker.service import grant_to_message
from kv_transfer.session import Grant
from kv_transfer.transport import PeerIdentity
from protos import transfer_status, wire
from protos import worker_pb2 as pb
from protos import worker_pb2_grpc as rpc
from protos.channels import InternalGrpc

CALL_SLACK_S = 1.0  # the caller gives up in its own time; this much later the call does
CLOSE_GRACE_S = 60.0  # a broken channel is let go when the last call on it has ended

# What a session can end with there; other names stand for a source of another version.
_ERRORS: dict[str, type[TransferError]] = {
    kind.__name__: kind
    for kind in (Corrupted, GrantRefused, PeerLost, ProtocolViolation, TransferAborted, Unauthenticated)
}

_Call = grpc.aio.StreamStreamCall[pb.PullRequest, pb.PullReply]


class PageClient:
    """Asks other workers for pages; keeps one channel to each."""

    def __init__(self, identity: PeerIdentity, fingerprint: CacheFingerprint, internal: InternalGrpc) -> None:
        """``identity``: this worker, into whose pages they come."""
        self._identity = identity
        self._fingerprint = wire.fingerprint_to_message(fingerprint)
        self._internal = internal
        self._channels: dict[str, grpc.aio.Channel] = {}
        self._closing: set[asyncio.Task[None]] = set()

    async def ask(self, task: PullTask, wanted: PagesWanted) -> OfferedPages:
        """What the source has of it. Raises ``GrantRefused``, ``Incompatible``, ``PeerLost`` or ``TransferAborted``."""
        channel = self._channels.get(task.address)
        if channel is None:
            channel = self._channels[task.address] = self._internal.channel(task.address)
        request = pb.PagesWanted(
            session_id=wanted.session_id,
            engine_id=task.engine_id,
            fingerprint=self._fingerprint,
            page_hashes=wanted.page_hashes,
            tenant=wanted.tenant,
            deadline_s=wanted.deadline_s,
        )
        call: _Call = rpc.PagesStub(channel).Pull(timeout=wanted.timeout_s + CALL_SLACK_S)
        try:
            offered = (await _ask(call, task.address, pb.PullRequest(wanted=request), "offered")).offered
            return OfferedPages(call, task.address, self._identity, offered)
        except BaseException as error:
            call.cancel()
            if isinstance(error, PeerLost):
                self._forget(task.address, channel)
            raise

    async def close(self) -> None:
        """Close every channel."""
        for task in self._closing:
            task.cancel()
        await asyncio.gather(*self._closing, return_exceptions=True)
        for channel in self._channels.values():
            await channel.close(grace=None)
        self._channels.clear()

    def _forget(self, address: str, channel: grpc.aio.Channel) -> None:
        """A worker that restarts at the same address must not wait out the broken channel's back-off."""
        if self._channels.get(address) is channel:
            del self._channels[address]
            task = asyncio.get_running_loop().create_task(channel.close(grace=CLOSE_GRACE_S))
            self._closing.add(task)
            task.add_done_callback(self._closing.discard)


class OfferedPages:
    """What a source offered: its ``Pages.Pull`` call, half-way."""

    def __init__(self, call: _Call, address: str, identity: PeerIdentity, offered: pb.PagesOffered) -> None:
        """Raises ``ProtocolViolation`` for a layout that no pool has."""
        self._call = call
        self._address = address
        self._identity = identity
        self.num_pages = offered.num_pages
        self.layout: KvLayout = wire.kv_layout_from_message(offered.layout)
        self.descriptor = offered.transport_descriptor
        self.ranks = wire.kv_ends_from_messages(offered.ranks)

    async def push(self, grant: Grant) -> None:
        """Have all of them sent to where ``grant`` says; returns when the commit was acknowledged to the source.

        Raises the ``TransferError`` that the source ended with.
        """
        granted = pb.PullRequest(grant=grant_to_message(grant, self._identity))
        pushed = (await _ask(self._call, self._address, granted, "pushed")).pushed
        if pushed.error:
            _raise_told(pushed)

    def cancel(self) -> None:
        """The pages are not wanted (any more). Ignored when all is over."""
        self._call.cancel()


async def _ask(call: _Call, address: str, request: pb.PullRequest, step: str) -> pb.PullReply:
    """Say ``request``; the answer, which must be that step."""
    try:
        await call.write(request)
        reply = await call.read()
    except grpc.aio.AioRpcError as error:
        raise transfer_status.error_of(address, error) from error
    except asyncio.InvalidStateError as error:  # the call had ended before it was written to
        raise PeerLost(f"{address}: the call has ended") from error
    if not isinstance(reply, pb.PullReply) or reply.WhichOneof("step") != step:
        raise ProtocolViolation(f"{address} answers a pull with something else than what is {step}")
    return reply


def _raise_told(pushed: pb.PagesPushed) -> NoReturn:
    kind = _ERRORS.get(pushed.error)
    raise TransferAborted(f"{pushed.error}: {pushed.reason}") if kind is None else kind(pushed.reason)
