"""How does a simulated pool get a worker, and lose one? As Ray and an autoscaler would: after a while, and in order."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

from cluster.pool_scaler import Phase, WorkerPhase
from cluster.simulator.worker import SimulatedWorker
from core.request import ClusterId, Role, WorkerId

_POLL_S = 0.05  # cluster/worker_host.py
_NOTICE_S = 0.3  # likewise


class WorkerWorld(Protocol):
    """What pools need of the world: its workers, and ways to make and end them."""

    def start_worker(self, worker_id: WorkerId, role: Role) -> None:
        """A process begins and registers."""
        ...

    def end_worker(self, worker_id: WorkerId) -> None:
        """It says goodbye and is gone, if it is there."""
        ...

    def living(self, worker_id: WorkerId) -> SimulatedWorker | None:
        """Its process; None: it has none."""
        ...


@dataclass
class _Member:
    """One worker of an elastic pool."""

    role: Role
    phase: Phase


class SimulatedPools:
    """Implements ``PoolFleet``: there is always a machine, and a worker on it ``start_s`` after it was asked for."""

    def __init__(
        self,
        world: WorkerWorld,
        cluster_id: ClusterId,
        first: Mapping[Role, int],
        start_s: float,
        spawn: Callable[[Coroutine[Any, Any, None]], None],
    ) -> None:
        """``first``: how many workers the elastic pools have when the world begins."""
        self._world = world
        self._cluster_id = cluster_id
        self._start_s = start_s
        self._spawn = spawn
        self._members = {
            self._name(role, index): _Member(role, Phase.UP) for role, count in first.items() for index in range(count)
        }

    async def members(self) -> Mapping[WorkerId, Role]:
        return {name: member.role for name, member in self._members.items()}

    async def add(self, role: Role) -> WorkerId:
        index = 0
        while self._name(role, index) in self._members:
            index += 1
        name = self._name(role, index)
        self._members[name] = member = _Member(role, Phase.STARTING)
        self._spawn(self._start(name, member))
        return name

    async def phases(self) -> Mapping[WorkerId, WorkerPhase]:
        return {name: WorkerPhase(member.phase) for name, member in self._members.items()}

    async def retire(self, worker_id: WorkerId, timeout_s: float) -> None:
        self._spawn(self._drain(worker_id, self._members[worker_id], timeout_s))

    async def remove(self, worker_id: WorkerId) -> None:
        del self._members[worker_id]
        self._world.end_worker(worker_id)

    async def _start(self, name: WorkerId, member: _Member) -> None:
        await asyncio.sleep(self._start_s)
        if self._members.get(name) is member:
            self._world.start_worker(name, member.role)
            member.phase = Phase.UP

    async def _drain(self, name: WorkerId, member: _Member, timeout_s: float) -> None:
        worker = self._world.living(name)
        if worker is not None:
            worker.drain()
            waited_s = _NOTICE_S
            await asyncio.sleep(_NOTICE_S)
            while worker.is_busy and waited_s < timeout_s:
                await asyncio.sleep(_POLL_S)
                waited_s += _POLL_S
        member.phase = Phase.STOPPED

    def _name(self, role: Role, index: int) -> WorkerId:
        return WorkerId(f"{self._cluster_id}/{role}-{index}")
