"""What does a worker tell gateways of itself, and when? The gRPC service ``Worker``.

    Describe   what it is
    Watch      what it has and does: at once when it changes its role or begins to drain, else in the reader's rhythm
    Outputs    what is generated, sorted by gateway (output_streams.py)
    SetRole    the word that it advertises

Sole writer of that word, and of whether the worker drains. Each reader of ``Watch`` gets each page event and each step
once, or a snapshot. What the numbers are is measured by whoever puts the worker together (worker_host.py).
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import suppress

import grpc

from cluster.output_streams import OutputStreams
from cluster.page_events import PageEventLog
from cluster.step_log import StepLog
from core.errors import ProtocolViolation
from core.request import GatewayId, Role, WorkerId
from protos import wire
from protos import worker_pb2 as pb
from protos import worker_pb2_grpc as rpc

logger = logging.getLogger(__name__)


class WorkerService(rpc.WorkerServicer):
    """``prfaas.worker.v1.Worker``. Lives on one event loop."""

    def __init__(
        self,
        worker_id: WorkerId,
        role: Role,
        describe: Callable[[], pb.WorkerDescription],
        measure: Callable[[Role], pb.WorkerState],
        refresh: Callable[[], Awaitable[None]],
        page_events: PageEventLog,
        steps: StepLog,
        outputs: OutputStreams,
    ) -> None:
        """``measure``: what there is to say now in that role, but for what this class knows itself; ``refresh`` is
        awaited before it, and brings the logs up to date."""
        self._worker_id = worker_id
        self._role = role
        self._describe = describe
        self._measure = measure
        self._refresh = refresh
        self._page_events = page_events
        self._steps = steps
        self._outputs = outputs
        self._draining = False
        self._version = 0
        self._state_changed = asyncio.Event()  # replaced at each change
        self._num_watching = 0  # Watch streams that are open

    @property
    def is_watched(self) -> bool:
        """Does any gateway hear what is told here?"""
        return self._num_watching > 0

    def drain(self) -> None:
        """Tell from now on that nothing new is to come."""
        self._draining = True
        self._changed()

    async def Describe(  # noqa: N802
        self, request: pb.DescribeRequest, context: grpc.aio.ServicerContext[pb.DescribeRequest, pb.WorkerDescription]
    ) -> pb.WorkerDescription:
        return self._describe()

    async def Watch(  # noqa: N802
        self, request: pb.WatchRequest, context: grpc.aio.ServicerContext[pb.WatchRequest, pb.WorkerState]
    ) -> AsyncIterator[pb.WorkerState]:
        interval_s = request.interval_s if request.interval_s > 0 else 1.0
        told: int | None = None  # number of the page events that this reader has
        num_steps = self._steps.number  # that it has, or that were before its time
        self._num_watching += 1
        try:
            while True:
                await self._refresh()
                changed = self._state_changed
                state = self._state()
                events = self._page_events.since(told)
                if events is not None:
                    told = events.number
                    state.page_events.CopyFrom(wire.page_events_to_message(events))
                state.steps.extend(map(wire.step_to_message, self._steps.since(num_steps)))
                num_steps = self._steps.number
                yield state
                with suppress(TimeoutError):
                    await asyncio.wait_for(changed.wait(), interval_s)
        finally:
            self._num_watching -= 1

    async def Outputs(  # noqa: N802
        self, request: pb.OutputsRequest, context: grpc.aio.ServicerContext[pb.OutputsRequest, pb.OutputBatch]
    ) -> AsyncIterator[pb.OutputBatch]:
        if not request.gateway_id:
            await context.abort(grpc.StatusCode.INVALID_ARGUMENT, "gateway_id: must not be empty")
        async for batch in self._outputs.read(GatewayId(request.gateway_id)):
            yield batch

    async def SetRole(  # noqa: N802
        self, request: pb.SetRoleRequest, context: grpc.aio.ServicerContext[pb.SetRoleRequest, pb.SetRoleReply]
    ) -> pb.SetRoleReply:
        try:
            role = wire.role_from_text(request.role)
        except ProtocolViolation as error:
            await context.abort(grpc.StatusCode.INVALID_ARGUMENT, str(error))
        if role is not self._role:
            logger.info("worker %s turns from %s to %s", self._worker_id, self._role, role)
            self._role = role
            self._changed()
        return pb.SetRoleReply()

    def _state(self) -> pb.WorkerState:
        state = self._measure(self._role)
        state.version = self._version
        state.role = self._role.value
        state.draining = self._draining
        return state

    def _changed(self) -> None:
        self._version += 1
        self._state_changed.set()
        self._state_changed = asyncio.Event()
