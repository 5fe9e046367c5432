"""What of a worker sends K/V, what of it receives K/V, and whose is a session?

    SendingHalf                                 ReceivingHalf
        PrefillWorker   sequences for others        DecodeWorker    announced sequences, and those prefilled here
        PageSource      cached prefixes             PagePuller      prefixes that another worker caches
        LinkProber      self-tests of links         ProbeReceiver   self-tests of links
              KvSender ────────────── a session is one of the three's ──────────────> KvReceiver

Both stand on one ``Ground``: the engine, the way to other workers, the clock. The receiving half is made first, as who
prefills may pull. Sender and receiver call back the halves, and the halves call them: ``join_halves`` makes
them last, and before that no peer is heard.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from functools import partial

import grpc

from cluster.config import WorkerConfig
from cluster.output_streams import OutputStreams
from cluster.rank_processes import RankProcesses
from cluster.worker_links import WorkerLinks
from core.clock import Clock
from core.errors import TransferError
from core.fingerprint import CacheFingerprint
from core.kv_layout import KvEnd, KvLayout
from core.request import EngineId, SequenceId, SessionId
from core.tracing import Tracer
from decode_worker.link_probe import ProbeReceiver
from decode_worker.page_client import PageClient
from decode_worker.page_pull import PagePuller
from decode_worker.probe_service import ProbeReceiverService
from decode_worker.service import DecodeService
from decode_worker.worker import DecodeWorker
from engine.engine import Engine
from engine.engine_thread import EngineThread
from engine.page_loan import PageLoans
from engine.prefix_loan import PrefixLoans
from kv_transfer.probe_pages import ProbePages, RankedPages, RankPages
from kv_transfer.rank_receiver import RankedReceiver
from kv_transfer.rank_sender import RankedSender
from kv_transfer.receiver import KvReceiver, OnCommitted, OnReleased, ReceivingEnd
from kv_transfer.sender import KvSender, OnClosed, SendingEnd
from kv_transfer.session import SendReport
from kv_transfer.transport import PeerIdentity, Transport
from prefill_worker.link_probe import LinkProber
from prefill_worker.page_service import PagesService
from prefill_worker.page_source import PageSource
from prefill_worker.probe_service import ProbeSenderService
from prefill_worker.service import GrantClient, PrefillService
from prefill_worker.worker import PrefillWorker, Pull
from protos import worker_pb2 as pb
from protos import worker_pb2_grpc as rpc
from protos.channels import InternalGrpc


@dataclass(frozen=True)
class Ground:
    """What both halves of a worker stand on."""

    config: WorkerConfig
    engine_id: EngineId
    engine: Engine  # for what any thread may ask
    thread: EngineThread  # for all the rest
    ranks: RankProcesses | None  # None: this process is all of the worker
    transport: Transport  # this rank's
    internal: InternalGrpc
    clock: Clock
    tracer: Tracer
    run_soon: Callable[[Awaitable[None]], None]  # starts a coroutine from any thread

    @property
    def identity(self) -> PeerIdentity:
        """This worker, as others know it."""
        return PeerIdentity(self.config.worker_id, self.config.cluster_id)

    @property
    def fingerprint(self) -> CacheFingerprint:
        """What another worker must share."""
        return self.engine.fingerprint

    @property
    def kv_layout(self) -> KvLayout:
        """What this rank's pages hold."""
        return self.engine.layout.kv_layout()

    def ends(self) -> tuple[KvEnd, ...]:
        """Each rank's, of a worker of several; empty: there is one."""
        if self.ranks is None:
            return ()
        return (KvEnd(self.kv_layout, self.transport.describe()), *self.ranks.ends)

    def probe_pages(self) -> ProbePages:
        """Pages for self-tests, on all ranks."""
        own = RankPages(self.transport.region, self.kv_layout)
        return own if self.ranks is None else RankedPages(own, self.ranks.lines, self.kv_layout)


class ReceivingHalf:
    """What K/V arrives for here."""

    def __init__(self, ground: Ground, outputs: OutputStreams) -> None:
        config, engine, clock, layout = ground.config, ground.engine, ground.clock, ground.kv_layout
        self._ground = ground
        self._outputs = outputs
        self._page_client = PageClient(ground.identity, ground.fingerprint, ground.internal)
        self.puller = PagePuller(
            PrefixLoans(ground.thread, engine),
            layout,
            self._page_client,
            clock,
            ground.run_soon,
            config.kv_transfer.pull_timeout_s,
            config.tensor_parallel,
        )
        self.decode = DecodeWorker(
            config.worker_id,
            ground.thread,
            page_size=layout.page_size,
            check=engine.check,
            reserve=engine.reserve,
            pull=self.puller.fetch,
            compile_grammar=engine.compile_grammar,
            publish=outputs.publish,
            read_commit=_read_commit,
            clock=clock,
            tracer=ground.tracer,
        )
        self._probed = ProbeReceiver(PageLoans(ground.thread), ground.probe_pages(), layout, ground.run_soon)

    def attach(self, end: ReceivingEnd) -> None:
        """Give the receiving end, whose callbacks are ``committed`` and ``released``."""
        for part in (self.decode, self._probed, self.puller):
            part.attach(end)

    def serve(self, server: grpc.aio.Server) -> None:
        """Add what other workers and gateways ask of it."""
        ground, has_outputs = self._ground, self._outputs.has
        decode = DecodeService(self.decode, ground.identity, ground.fingerprint, has_outputs, ground.clock)
        rpc.add_DecodeServicer_to_server(decode, server)
        rpc.add_ProbeReceiverServicer_to_server(ProbeReceiverService(self._probed, ground.fingerprint), server)

    @property
    def num_sessions(self) -> int:
        """Hand-overs and pulls under way."""
        return self.decode.num_sessions + self.puller.num_sessions

    def committed(self, session_id: SessionId, payload: bytes) -> None:
        """All of a session's K/V is here. On a transport's thread."""
        if not (self._probed.committed(session_id) or self.puller.committed(session_id)):
            self.decode.committed(session_id, payload)

    def released(self, session_id: SessionId, error: TransferError) -> None:
        """Nothing of a session can land here any more. On a transport's thread."""
        if not (self._probed.released(session_id, error) or self.puller.released(session_id, error)):
            self.decode.released(session_id, error)

    async def close(self) -> None:
        """End pulls, and the channels to where they come from."""
        await self.puller.close()
        await self._page_client.close()


class SendingHalf:
    """What sends K/V from here."""

    def __init__(self, ground: Ground, outputs: OutputStreams, links: WorkerLinks, pull: Pull) -> None:
        config, engine, layout = ground.config, ground.engine, ground.kv_layout
        self._ground = ground
        self._outputs = outputs
        self._links = links
        self._grants = GrantClient(
            ground.engine_id,
            ground.fingerprint,
            layout,
            ground.transport.describe,
            config.kv_transfer.grant_wait_s,
            ground.internal,
            ground.ends,
        )
        self.prefill = PrefillWorker(
            config.worker_id,
            ground.thread,
            page_size=layout.page_size,
            num_layers=engine.layout.num_layers,
            check=engine.check,
            publish=outputs.publish,
            ask_grant=self._grants.ask,
            pull=pull,
            compile_grammar=engine.compile_grammar,
            make_commit=_make_commit,
            run_on_loop=ground.run_soon,
            clock=ground.clock,
            tracer=ground.tracer,
        )
        self.source = PageSource(PrefixLoans(ground.thread, engine), layout)
        self._prober = LinkProber(
            PageLoans(ground.thread),
            links.stats,
            ground.probe_pages(),
            layout,
            links.monitor,
            config.kv_transfer.transport,
        )

    def attach(self, end: SendingEnd) -> None:
        """Give the sending end, whose callback is ``closed``."""
        for part in (self.prefill, self._prober, self.source):
            part.attach(end)

    def serve(self, server: grpc.aio.Server) -> None:
        """Add what other workers and gateways ask of it."""
        ground, layout, describe = self._ground, self._ground.kv_layout, self._ground.transport.describe
        prefill = PrefillService(self.prefill, self._outputs.has, ground.clock)
        probes = ProbeSenderService(self._prober, ground.fingerprint, layout, ground.internal, describe, ground.ends)
        pages = PagesService(
            self.source, ground.engine_id, ground.fingerprint, layout, describe, ground.clock, ground.ends
        )
        rpc.add_PrefillServicer_to_server(prefill, server)
        rpc.add_ProbeSenderServicer_to_server(probes, server)
        rpc.add_PagesServicer_to_server(pages, server)

    @property
    def num_sessions(self) -> int:
        """Hand-overs and pushes under way."""
        return self.prefill.num_sessions + self.source.num_sessions

    def closed(self, session_id: SessionId, report: SendReport) -> None:
        """A session is over: its pages are read no more. On a transport's thread."""
        if self._prober.closed(session_id, report):
            return
        self._links.note(report)
        if not self.source.closed(session_id, report):
            self.prefill.closed(session_id, report)

    async def close(self) -> None:
        """Close the channels to decode workers."""
        await self._grants.close()


@dataclass(frozen=True)
class Ends:
    """Both ends of hand-overs, of this rank."""

    sender: KvSender
    receiver: KvReceiver

    def expire(self, now: float) -> None:
        """Give up peers of which nothing was heard for too long."""
        self.sender.expire(now)
        self.receiver.expire(now)

    def close(self) -> None:
        """End every session. Blocks."""
        self.sender.close()
        self.receiver.close()


def join_halves(ground: Ground, links: WorkerLinks, sending: SendingHalf, receiving: ReceivingHalf) -> Ends:
    """Make this rank's ends, and give each half the whole worker's. From now on peers may be heard."""
    if ground.ranks is None:
        ends = _make_ends(ground, links, sending.closed, receiving.committed, receiving.released)
        sending.attach(ends.sender)
        receiving.attach(ends.receiver)
        return ends
    all_sending = RankedSender(ground.ranks.lines, sending.closed, links.speed)
    all_receiving = RankedReceiver(ground.ranks.lines, receiving.committed, receiving.released)
    ends = _make_ends(
        ground,
        links,
        partial(all_sending.closed, 0),
        partial(all_receiving.committed, 0),
        partial(all_receiving.released, 0),
    )
    all_sending.attach(ends.sender)
    all_receiving.attach(ends.receiver)
    sending.attach(all_sending)
    receiving.attach(all_receiving)
    return ends


def _make_ends(
    ground: Ground, links: WorkerLinks, closed: OnClosed, committed: OnCommitted, released: OnReleased
) -> Ends:
    transport, clock, layout = ground.transport, ground.clock, ground.kv_layout
    lease_s = ground.config.kv_transfer.lease_s
    return Ends(
        KvSender(transport, clock, closed, layout, links.speed, links.codec_for),
        KvReceiver(transport, clock, committed, released, lease_s, layout),
    )


def _make_commit(sequence_id: SequenceId, token_ids: Sequence[int]) -> bytes:
    return pb.CommitPayload(sequence_id=sequence_id, token_ids=token_ids).SerializeToString()


def _read_commit(payload: bytes) -> tuple[SequenceId, tuple[int, ...]]:
    message = pb.CommitPayload.FromString(payload)
    return SequenceId(message.sequence_id), tuple(message.token_ids)
