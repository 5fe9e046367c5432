"""What runs in the two processes of the overlap benchmark? A prefill worker with a real engine, and who takes its K/V.

    python -m benchmarks.overlap_peer CONTROL_FD HOST MODEL_FOLDER

Each process holds a ``Peer``, of which one end uses ``load`` and ``prefill``, the other ``serve`` and ``grant``.
"""

from __future__ import annotations

import asyncio
import logging
import os
import random
import sys
import time
from collections.abc import Awaitable, Callable, Sequence
from threading import Event, Thread

from benchmarks.child_process import answer_calls
from benchmarks.overlap_results import Handover
from core.clock import WallClock
from core.errors import TransferError
from core.fingerprint import CacheFingerprint
from core.kv_layout import KvLayout
from core.request import (
    GatewayId,
    SamplingParams,
    SequenceFailure,
    SequenceId,
    SequenceSpec,
    SessionId,
    TokenChunk,
    WorkerId,
)
from engine.config import EngineConfig
from engine.engine import Engine, StepListener, StepOutput
from engine.engine_thread import EngineThread
from engine.step_plan import StepPlan
from kv_transfer.config import KvTransferConfig
from kv_transfer.receiver import KvReceiver
from kv_transfer.sender import KvSender
from kv_transfer.session import Grant, SendReport
from kv_transfer.transport import LayerPages, PageGeometry, Region, create_transport
from prefill_worker.worker import GrantQuery, PrefillWorker

PREFILL_TIMEOUT_S = 120.0
_GATEWAY = GatewayId("benchmark")


class HoldBack:
    """A listener that tells another of stored layers in groups of ``num_layers_per_group``; the last may be smaller."""

    def __init__(self, listener: StepListener, num_layers: int) -> None:
        self._listener = listener
        self._num_layers = num_layers
        self.num_layers_per_group = 1
        self._held: list[int] = []

    def sequence_started(self, spec: SequenceSpec, num_cached_tokens: int, page_ids: Sequence[int]) -> None:
        self._listener.sequence_started(spec, num_cached_tokens, page_ids)

    def step_planned(self, plan: StepPlan) -> Callable[[int], None]:
        tell = self._listener.step_planned(plan)

        def layer_stored(layer: int) -> None:
            self._held.append(layer)
            if len(self._held) == self.num_layers_per_group or layer == self._num_layers - 1:
                for held in self._held:
                    tell(held)
                self._held.clear()

        return layer_stored


class Peer:
    """One of the two processes."""

    def __init__(self, host: str, model_folder: str) -> None:
        self._host = host
        self._model = f"dummy:{model_folder}"
        self._prefiller: _Prefiller | None = None
        self._receiver: KvReceiver | None = None

    def load(self, num_tokens: int, chunk: int) -> tuple[CacheFingerprint, KvLayout, tuple[LayerPages, ...]]:
        """Make the engine that computes prompts of ``num_tokens`` tokens, ``chunk`` of them in a step; its pages."""
        self._prefiller = _Prefiller(self._model, self._host, num_tokens, chunk)
        return self._prefiller.fingerprint, self._prefiller.layout, self._prefiller.layers

    def prefill(self, name: str, grant: Grant | None, layers_per_group: int, after: bool) -> Handover:
        """Compute one prompt; with ``grant`` its K/V is shipped meanwhile, or ``after`` the first token."""
        assert self._prefiller is not None, "load comes first"
        return self._prefiller.run(name, grant, layers_per_group, after)

    def serve(
        self, fingerprint: CacheFingerprint, layout: KvLayout, layers: tuple[LayerPages, ...], num_pages: int
    ) -> None:
        """Make a pool of ``num_pages`` such pages, and take writes into it."""
        geometry = PageGeometry(layers, num_pages)
        transport = create_transport(KvTransferConfig(host=self._host), fingerprint, WallClock())
        views = (memoryview(bytearray(num_pages * layer.page_bytes)) for layer in layers)
        transport.register(Region(geometry, tuple(views)))
        self._receiver = KvReceiver(transport, WallClock(), _committed, _released, 600.0, layout)

    def grant(self, name: str, num_pages: int) -> Grant:
        assert self._receiver is not None, "serve comes first"
        return self._receiver.issue(SessionId(name), 0, tuple(range(num_pages))[::-1])


def _committed(session_id: SessionId, payload: bytes) -> None: ...


def _released(session_id: SessionId, error: TransferError) -> None:
    logging.getLogger(__name__).warning("session %s was given up: %s", session_id, error)


class _Prefiller:
    """A prefill worker with its engine; one prompt at a time."""

    def __init__(self, model: str, host: str, num_tokens: int, chunk: int) -> None:
        settings = EngineConfig(
            device="cpu",
            max_model_len=num_tokens + 16,
            num_pages=num_tokens // 16 + 8,
            max_batch_tokens=chunk,
            max_batch_size=1,
            prefix_cache=False,
        )
        self._num_tokens = num_tokens
        self._thread = EngineThread(lambda: Engine.load_model(settings, model, WallClock()), self._on_output)
        engine = self._thread.start()
        layout = engine.layout
        self.layout = layout.kv_layout()
        numbers = range(layout.num_layers)
        self.fingerprint = engine.fingerprint
        self.layers = tuple(
            LayerPages(layout.page_bytes(i), layout.layers[i].dtype, layout.block_bytes(i)) for i in numbers
        )
        transport = create_transport(KvTransferConfig(host=host), engine.fingerprint, WallClock())
        geometry = PageGeometry(self.layers, engine.pool.num_pages)
        transport.register(Region(geometry, tuple(engine.pool.layer_bytes(i) for i in numbers)))
        self._worker = PrefillWorker(
            WorkerId("left"),
            self._thread,
            page_size=layout.page_size,
            num_layers=layout.num_layers,
            check=engine.check,
            publish=self._publish,
            ask_grant=self._ask_grant,
            make_commit=lambda sequence_id, token_ids: b"",
            run_on_loop=_run_aside,
            clock=WallClock(),
        )
        self._sender = KvSender(transport, WallClock(), self._closed, self.layout)
        self._worker.attach(self._sender)
        self._held = HoldBack(self._worker, layout.num_layers)
        engine.listener = self._held
        self._vocab_size = engine.model.vocab_size
        self._begin_run(None)

    def run(self, name: str, grant: Grant | None, layers_per_group: int, after: bool) -> Handover:
        self._begin_run(grant)
        self._held.num_layers_per_group = layers_per_group
        if not after:
            self._may_ship.set()
        query = None if grant is None else GrantQuery(grant.session_id, "the other process")
        tokens = tuple(random.Random(name).randrange(self._vocab_size) for _ in range(self._num_tokens))
        spec = SequenceSpec(SequenceId(name), tokens, SamplingParams(temperature=0.0, seed=0), hold_kv=True)
        sent_before = self._sender.bytes_sent
        began = time.perf_counter()
        self._worker.prefill(spec, _GATEWAY, query)
        self._wait(self._first_token)
        prefill_s, overlapped = self._token_at - began, self._sent_at_token - sent_before
        if grant is None:
            return Handover(prefill_s)
        self._may_ship.set()
        self._wait(self._shipped)
        report = self._report
        assert report is not None, "it was shipped"
        if report.error is not None:
            raise report.error
        return Handover(
            prefill_s, report.bytes_sent, overlapped, report.num_groups, max(0.0, self._shipped_at - self._token_at)
        )

    def _begin_run(self, grant: Grant | None) -> None:
        self._grant = grant
        self._may_ship, self._first_token, self._shipped = Event(), Event(), Event()
        self._token_at = self._shipped_at = 0.0
        self._sent_at_token = 0
        self._report: SendReport | None = None
        self._failure = ""

    def _wait(self, event: Event) -> None:
        if not event.wait(PREFILL_TIMEOUT_S):
            raise TimeoutError(f"nothing came of it in {PREFILL_TIMEOUT_S:.0f} s")
        if self._failure:
            raise RuntimeError(self._failure)

    async def _ask_grant(self, query: GrantQuery) -> Grant:
        await asyncio.to_thread(self._may_ship.wait, PREFILL_TIMEOUT_S)
        assert self._grant is not None, "only asked for when there is one"
        return self._grant

    def _on_output(self, output: StepOutput) -> None:
        for chunk in output.chunks:
            self._worker.on_chunk(chunk)
        for failure in output.failures:
            self._worker.on_failure(failure)

    def _publish(self, gateway_id: GatewayId, news: TokenChunk | SequenceFailure) -> None:
        if isinstance(news, SequenceFailure):
            self._failure = news.message
            self._first_token.set()
            self._shipped.set()
        elif news.token_ids:
            self._token_at, self._sent_at_token = time.perf_counter(), self._sender.bytes_sent
            self._first_token.set()

    def _closed(self, session_id: SessionId, report: SendReport) -> None:
        self._shipped_at, self._report = time.perf_counter(), report
        self._worker.closed(session_id, report)
        self._shipped.set()


def _run_aside(awaitable: Awaitable[None]) -> None:
    """Run a coroutine to its end on a thread of its own."""

    async def run() -> None:
        await awaitable

    Thread(target=lambda: asyncio.run(run()), daemon=True).start()


def main(arguments: Sequence[str]) -> int:
    logging.basicConfig(level=logging.WARNING)
    control_fd, host, model_folder = arguments
    answer_calls(int(control_fd), Peer(host, model_folder))
    os._exit(0)  # engine and transport threads are daemons, and nothing is owed to anyone


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
