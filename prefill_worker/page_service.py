"""The gRPC edge of a page pull's sending end: ``Pages.Pull``, one call from the question to the end of the session.

As every internal service it is reached by processes of this service only (protos/channels.py). A caller names pages by
their full hashes, keyed by the tenant's salt: it can ask for what it has the tokens of, and for nothing else. What page
events tell gateways, the first half of a hash, is no such name.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Sequence

import grpc

from core.clock import Clock
from core.errors import GrantRefused, PrfaasError, ProtocolViolation
from core.fingerprint import CacheFingerprint
from core.kv_layout import KvEnd, KvLayout
from core.prefix_hash import DIGEST_BYTES, PageHash
from core.request import EngineId, SessionId
from kv_transfer.session import SendReport
from kv_transfer.transport import SendOrder
from prefill_worker.page_source import PageSource
from prefill_worker.service import grant_from_message
from protos import transfer_status, wire
from protos import worker_pb2 as pb
from protos import worker_pb2_grpc as rpc

_Context = grpc.aio.ServicerContext[pb.PullRequest, pb.PullReply]


class PagesService(rpc.PagesServicer):
    """``prfaas.worker.v1.Pages``. ``describe`` and ``clock`` are the transport's; ``ranks``: of a worker of several."""

    def __init__(
        self,
        source: PageSource,
        engine_id: EngineId,
        fingerprint: CacheFingerprint,
        layout: KvLayout,
        describe: Callable[[], bytes],
        clock: Clock,
        ranks: Callable[[], Sequence[KvEnd]] = tuple,
    ) -> None:
        self._ranks = ranks
        self._source = source
        self._engine_id = engine_id
        self._fingerprint = fingerprint
        self._layout = wire.kv_layout_to_message(layout)
        self._describe = describe
        self._clock = clock

    async def Pull(self, requests: AsyncIterator[pb.PullRequest], context: _Context) -> None:  # noqa: N802
        try:
            await self._pull(context)
        except PrfaasError as error:
            await transfer_status.abort(context, error)

    async def _pull(self, context: _Context) -> None:
        wanted = (await _read(context, "wanted")).wanted
        page_hashes = self._hashes(wanted)
        session_id = SessionId(wanted.session_id)
        # Hosts' clocks differ, so a deadline travels as the seconds that are left.
        deadline_at = self._clock.now() + wanted.deadline_s if wanted.HasField("deadline_s") else None
        order = SendOrder(wanted.tenant, deadline_at=deadline_at)
        async with self._source.offer(page_hashes) as offer:
            offered = pb.PagesOffered(
                num_pages=len(offer.pages),
                layout=self._layout,
                transport_descriptor=self._describe(),
                ranks=wire.kv_ends_to_messages(self._ranks()),
            )
            await context.write(pb.PullReply(offered=offered))
            if not offer.pages:
                return
            grant = grant_from_message(session_id, (await _read(context, "grant")).grant)
            report = await self._source.push(offer, session_id, grant, order)
        await context.write(pb.PullReply(pushed=_pushed(report)))

    def _hashes(self, wanted: pb.PagesWanted) -> list[PageHash]:
        self._fingerprint.require_compatible(wire.fingerprint_from_message(wanted.fingerprint))
        if wanted.engine_id != self._engine_id:
            raise GrantRefused(f"engine {wanted.engine_id} is gone, {self._engine_id} is here and has other pages")
        if not wanted.session_id or any(len(page_hash) != DIGEST_BYTES for page_hash in wanted.page_hashes):
            raise ProtocolViolation(f"a pull names its session, and pages by hashes of {DIGEST_BYTES} bytes")
        return [PageHash(page_hash) for page_hash in wanted.page_hashes]


async def _read(context: _Context, step: str) -> pb.PullRequest:
    """The caller's next message, which must be that step; a caller that has nothing more to say has gone away."""
    message = await context.read()
    if not isinstance(message, pb.PullRequest) or message.WhichOneof("step") != step:
        raise ProtocolViolation(f"a pull goes on with {step}")
    return message


def _pushed(report: SendReport) -> pb.PagesPushed:
    if report.error is None:
        return pb.PagesPushed()
    return pb.PagesPushed(error=type(report.error).__name__, reason=str(report.error))
