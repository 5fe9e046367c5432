"""How does a gateway talk to a simulated worker? By the calls of a ``WorkerClient``, each crossing the path twice.

Errors are those that the gRPC client raises: a worker that is gone, or does not answer in time, is ``PeerLost``.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable

from cluster.simulator.control_path import ControlPath
from cluster.simulator.receiving import ReceivingHalf
from cluster.simulator.virtual_loop import VirtualTimeLoop
from cluster.simulator.worker import SimulatedWorker
from cluster.worker_client import CALL_TIMEOUT_S, WorkerClient, WorkerDescription, WorkerState
from core.errors import PeerLost
from core.link import ProbeReport
from core.request import PullTask, Role, SequenceFailure, SequenceId, SequenceSpec, SessionId, TokenChunk


class SimulatedClient(WorkerClient):
    """One gateway's connection to one simulated worker. ``there`` and ``back`` are the paths of its messages;
    ``receiver_at`` finds the receiving half of the worker at an address."""

    def __init__(
        self,
        loop: VirtualTimeLoop,
        worker: SimulatedWorker,
        there: ControlPath,
        back: ControlPath,
        receiver_at: Callable[[str], ReceivingHalf | None],
    ) -> None:
        super().__init__(worker.description)
        self._loop = loop
        self._worker = worker
        self._there = there
        self._back = back
        self._receiver_at = receiver_at
        self._ended: asyncio.Future[None] = loop.create_future()

    async def prefill(
        self,
        spec: SequenceSpec,
        session_id: SessionId,
        decode_address: str,
        tenant: str = "",
        deadline_s: float | None = None,
        pull: PullTask | None = None,
    ) -> None:
        await self._reach()
        receiver = self._receiver_at(decode_address)
        deadline_at = None if deadline_s is None else self._loop.time() + deadline_s
        held = SequenceSpec(
            spec.sequence_id, spec.prompt_token_ids, spec.sampling, spec.output_token_ids, spec.salt, hold_kv=True
        )
        self._worker.prefill(held, self._publish, session_id, receiver, deadline_at, pull)
        await self._back.cross(CALL_TIMEOUT_S)
        self._accepted(spec.sequence_id)

    async def decode(
        self,
        spec: SequenceSpec,
        session_id: SessionId | None,
        tenant: str = "",
        deadline_s: float | None = None,
        pull: PullTask | None = None,
    ) -> None:
        await self._reach()
        deadline_at = None if deadline_s is None else self._loop.time() + deadline_s
        self._worker.decode(spec, self._publish, session_id, deadline_at, pull)
        await self._back.cross(CALL_TIMEOUT_S)
        self._accepted(spec.sequence_id)

    async def abort(self, sequence_id: SequenceId, stage: Role, reason: str) -> None:
        await self._reach()
        self._worker.abort(sequence_id, stage)
        await self._back.cross(CALL_TIMEOUT_S)

    async def set_role(self, role: Role) -> None:
        await self._reach()
        self._worker.set_role(role)
        await self._back.cross(CALL_TIMEOUT_S)

    async def probe_link(self, receiver: WorkerDescription, timeout_s: float) -> ProbeReport:
        """Simulated links have no bytes that could arrive damaged."""
        await self._reach()
        await self._back.cross(timeout_s)
        return ProbeReport(path="simulated", exact=True)

    async def watch(self, interval_s: float) -> AsyncIterator[WorkerState]:
        told: int | None = None  # number of the page events that this reader has
        while self._worker.alive:
            said_at = self._loop.time()
            state = self._worker.state(told)
            told = state.page_events.number if state.page_events is not None else told
            if self._back.latency_s > 0 or not self._back.up:
                await self._arrive()
            yield state
            wait_s = said_at + interval_s - self._loop.time()
            if wait_s > 0 and self._worker.alive and state.role is self._worker.role:
                await self._worker.changed(wait_s)
        raise PeerLost("Watch stream broke: the connection is closed")

    async def pump_outputs(self) -> None:
        self._worker.when_dead(self._end)
        await self._ended
        raise PeerLost("Outputs stream broke: the connection is closed")

    async def close(self) -> None:
        self.fail("connection closed")
        self._there.send(lambda: self._worker.gateway_gone(self._publish))

    async def _reach(self) -> None:
        """A call arrives at the worker."""
        self._require_alive()
        await self._there.cross(CALL_TIMEOUT_S)
        if not self._worker.alive:
            await self._back.cross(CALL_TIMEOUT_S)
            raise PeerLost(f"{self.description.worker_id}: connection refused")

    async def _arrive(self) -> None:
        arrived = self._loop.create_future()
        self._back.send(lambda: None if arrived.done() else arrived.set_result(None))
        await arrived

    def _publish(self, event: TokenChunk | SequenceFailure) -> None:
        """At the worker: the event is on its way."""
        self._back.send(self._deliver_one, event)

    def _deliver_one(self, event: TokenChunk | SequenceFailure) -> None:
        deliver = self._deliver.get(event.sequence_id)
        if deliver is not None:
            deliver(event)

    def _end(self) -> None:
        """At the worker: the connection closes."""
        self._back.send(lambda: None if self._ended.done() else self._ended.set_result(None))
