"""At which gateways is this worker registered, and what does each of them say? The worker's side of its leases.

Each ``Register`` is the lease of the next few seconds; it is repeated for as long as the process lives. Every registry
is on its own: one that cannot be reached, or that does not take the worker, is asked again every half second, for ever,
and a line is logged when what it says has changed. A registry is also told what the others say, at once when that
changes: by this a cluster without a gateway learns who took its workers (cluster/remote_cluster.py).
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass

import grpc

from core.request import EngineId, WorkerId
from protos import worker_pb2 as pb
from protos import worker_pb2_grpc as rpc
from protos.channels import InternalGrpc

logger = logging.getLogger(__name__)

RETRY_S = 0.5
_CALL_TIMEOUT_S = 8.0  # the gateway connects back meanwhile, and gives that 5 s: its reason is worth waiting for
_GOODBYE_TIMEOUT_S = 1.0
_CALLS_PER_LEASE = 3


@dataclass(frozen=True, slots=True)
class Registration:
    """What one registry last said. ``said``: why it does not take the worker; empty if it does."""

    registry: str  # host:port
    taken: bool
    said: str = ""

    def to_message(self) -> pb.Registration:
        return pb.Registration(registry=self.registry, taken=self.taken, said=self.said)

    @classmethod
    def from_message(cls, message: pb.Registration) -> Registration:
        return cls(message.registry, message.taken, message.said)


class Registrations:
    """Keeps one engine registered everywhere. Lives on one event loop."""

    def __init__(
        self,
        worker_id: WorkerId,
        engine_id: EngineId,
        address: str,
        registries: Sequence[str],
        internal: InternalGrpc,
    ) -> None:
        """``address``: host:port at which gateways reach the worker; ``registries``: host:port of each."""
        self._worker_id = worker_id
        self._engine_id = engine_id
        self._address = address
        self._registries = tuple(registries)
        self._internal = internal
        self._said: dict[str, Registration] = {}  # registry |-> its last word, once it was asked
        self._changed = asyncio.Event()  # replaced at each change

    async def keep(self) -> None:
        """Register everywhere until cancelled."""
        await asyncio.gather(*map(self._keep, self._registries))

    async def leave(self) -> None:
        """Tell every registry that the worker stops; one that is gone needs no goodbye."""
        await asyncio.gather(*map(self._leave, self._registries))

    async def _keep(self, registry: str) -> None:
        while True:
            try:
                async with self._internal.channel(registry) as channel:
                    stub = rpc.RegistryStub(channel)
                    while True:
                        others = self._others(registry)
                        reply = await stub.Register(self._request(others), timeout=_CALL_TIMEOUT_S)
                        self._note(Registration(registry, taken=True), logging.INFO)
                        await self._until_others_differ(registry, others, reply.lease_s / _CALLS_PER_LEASE)
            except grpc.aio.AioRpcError as error:
                wrong = error.code() is grpc.StatusCode.FAILED_PRECONDITION  # else it may come back, or be cut off
                said = f"{error.code().name}: {error.details()}"
                self._note(Registration(registry, taken=False, said=said), logging.ERROR if wrong else logging.WARNING)
            await asyncio.sleep(RETRY_S)

    async def _leave(self, registry: str) -> None:
        with suppress(grpc.aio.AioRpcError):
            async with self._internal.channel(registry) as channel:
                request = self._request((), leaving=True)
                await rpc.RegistryStub(channel).Register(request, timeout=_GOODBYE_TIMEOUT_S)

    def _request(self, others: Sequence[Registration], *, leaving: bool = False) -> pb.RegisterRequest:
        return pb.RegisterRequest(
            worker_id=self._worker_id,
            engine_id=self._engine_id,
            address=self._address,
            leaving=leaving,
            others=[other.to_message() for other in others],
        )

    def _others(self, registry: str) -> tuple[Registration, ...]:
        return tuple(said for name, said in self._said.items() if name != registry)

    def _note(self, said: Registration, level: int) -> None:
        if self._said.get(said.registry) == said:
            return
        self._said[said.registry] = said
        if said.taken:
            logger.log(level, "registry %s took worker %s", said.registry, self._worker_id)
        else:
            logger.log(level, "registry %s does not take worker %s: %s", said.registry, self._worker_id, said.said)
        self._changed.set()
        self._changed = asyncio.Event()

    async def _until_others_differ(self, registry: str, told: Sequence[Registration], timeout_s: float) -> None:
        with suppress(TimeoutError):
            async with asyncio.timeout(timeout_s):
                while self._others(registry) == told:
                    await self._changed.wait()
