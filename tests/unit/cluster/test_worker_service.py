"""What a worker tells gateways of itself: each reader hears of every change at once, and of every step once."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any, cast

import pytest

from cluster.output_streams import OutputStreams
from cluster.page_events import PageEventLog
from cluster.step_log import StepLog
from cluster.worker_service import WorkerService
from core.compute import StepSample
from core.prefix_hash import PageHash
from core.request import Role, WorkerId
from protos import worker_pb2 as pb

NEVER_S = 3600.0  # between two states, unless something changes
STEP = StepSample(8, 36, 1, 0, 0.5)


class Lab:
    """A service, and what is measured behind it."""

    def __init__(self) -> None:
        self.page_events = PageEventLog()
        self.steps = StepLog()
        self.num_refreshed = 0
        outputs = OutputStreams(asyncio.get_running_loop(), lambda gateway_id: None)
        self.service = WorkerService(
            WorkerId("w0"),
            Role.PREFILL,
            self.describe,
            self.measure,
            self.refresh,
            self.page_events,
            self.steps,
            outputs,
        )

    def describe(self) -> pb.WorkerDescription:
        return pb.WorkerDescription(worker_id="w0")

    def measure(self, role: Role) -> pb.WorkerState:
        return pb.WorkerState(num_running=self.num_refreshed, num_other_role=1 if role is Role.PREFILL else 2)

    async def refresh(self) -> None:
        self.num_refreshed += 1

    def watch(self, interval_s: float = NEVER_S) -> AsyncIterator[pb.WorkerState]:
        return self.service.Watch(pb.WatchRequest(interval_s=interval_s), cast(Any, None))

    async def set_role(self, role: str) -> None:
        await self.service.SetRole(pb.SetRoleRequest(role=role), cast(Any, None))


@pytest.fixture
async def lab() -> Lab:
    return Lab()


async def test_a_change_of_role_is_told_at_once(lab: Lab) -> None:
    states = lab.watch()
    before = await anext(states)

    await lab.set_role("decode")

    after = await anext(states)
    assert (before.role, before.version, before.num_other_role) == ("prefill", 0, 1)
    assert (after.role, after.version, after.num_other_role) == ("decode", 1, 2)


async def test_the_role_that_it_has_already_is_no_change(lab: Lab) -> None:
    await lab.set_role("prefill")

    assert (await anext(lab.watch())).version == 0


async def test_draining_is_told_at_once(lab: Lab) -> None:
    states = lab.watch()
    assert not (await anext(states)).draining

    lab.service.drain()

    assert (await anext(states)).draining


async def test_every_state_is_measured_after_a_refresh(lab: Lab) -> None:
    states = lab.watch(interval_s=0.001)

    assert [(await anext(states)).num_running for _ in range(3)] == [1, 2, 3]


async def test_each_reader_gets_each_step_and_each_page_event_once(lab: Lab) -> None:
    early = lab.watch(interval_s=0.001)
    assert not (await anext(early)).steps
    lab.steps.record([STEP])
    lab.page_events.record([PageHash(b"p" * 32)], [])
    late = lab.watch(interval_s=0.001)

    told = [await anext(early), await anext(early), await anext(late)]

    assert [len(state.steps) for state in told] == [1, 0, 0], "what was before a reader's time is not its own"
    assert [len(state.page_events.stored) for state in told] == [1, 0, 1], "but the cache is as it is"


async def test_it_is_watched_while_somebody_reads(lab: Lab) -> None:
    states = lab.watch()
    assert not lab.service.is_watched

    await anext(states)
    assert lab.service.is_watched

    await cast(Any, states).aclose()
    assert not lab.service.is_watched
