"""A worker without a device: two halves around a simulated engine, the role it advertises, and its reports.

What is simulated is what would take time or a process: steps (engine.py), bytes (hand_over.py, shaped_link.py) and
messages (control_path.py). Pages, batches and queues are the real scheduler's and allocator's. What is reported of them
goes through the real page log, in the rhythm of the real Watch stream: a report has the load of the one before.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence

from cluster.page_events import PageEventLog
from cluster.simulator.answers import AnswerBook
from cluster.simulator.engine import SimulatedEngine
from cluster.simulator.host import Host, Publish, WorkerKind, num_known_tokens
from cluster.simulator.link_reports import LinkReports
from cluster.simulator.network import Network
from cluster.simulator.pulling import PullingHalf
from cluster.simulator.receiving import ReceivingHalf
from cluster.simulator.sending import SendingHalf
from cluster.simulator.shared_device import SharedDevice
from cluster.simulator.virtual_loop import VirtualTimeLoop
from cluster.view import WorkerLoad
from cluster.worker_client import WorkerDescription, WorkerState
from core.errors import InvalidRequest
from core.request import PullTask, Role, SequenceId, SequenceSpec, SessionId, TokenChunk
from engine.step_plan import StepPlan


class SimulatedWorker:
    """One worker process, from its start to ``die``. A restart is another one of the same ``worker_id``."""

    def __init__(
        self,
        loop: VirtualTimeLoop,
        kind: WorkerKind,
        description: WorkerDescription,
        role: Role,
        network: Network,
        answers: AnswerBook,
        source_at: Callable[[str], PullingHalf | None],
        device: SharedDevice | None = None,
    ) -> None:
        """``source_at`` finds the worker at an address that pages are to be pulled from; ``device``: that it shares."""
        self.kind = kind
        self.description = description
        self.role = role
        self.alive = True
        self.draining = False
        self._loop = loop
        self.engine = SimulatedEngine(loop, kind.engine, kind.cost, kind.model.max_model_len, answers, self, device)
        self._links = LinkReports(loop)
        host = Host(loop, kind, description, self.engine, network, self._links, answers)
        self.receiving = ReceivingHalf(host)
        self.sending = SendingHalf(host, self.receiving.serve_grants)
        self.pulling = PullingHalf(host, source_at)
        self._page_events = PageEventLog()
        self._load, self._load_at = self._measure(), loop.now()
        self._watchers: dict[asyncio.Future[None], None] = {}
        self._mourners: list[Callable[[], None]] = []

    # ---- a gateway's calls ----

    def prefill(
        self,
        spec: SequenceSpec,
        publish: Publish,
        session_id: SessionId,
        receiver: ReceivingHalf | None,
        deadline_at: float | None = None,
        pull: PullTask | None = None,
    ) -> None:
        """Queue the sequence for one token, its K/V to be sent to ``receiver``; first fetch what ``pull`` says.

        Raises ``InvalidRequest``.
        """
        self._check(spec)
        fetching = None if pull is None else self.pulling.fetch(spec, pull, deadline_at)
        self.sending.prefill(spec, publish, session_id, receiver, fetching)

    def decode(
        self,
        spec: SequenceSpec,
        publish: Publish,
        session_id: SessionId | None,
        deadline_at: float | None = None,
        pull: PullTask | None = None,
    ) -> None:
        """Announce the sequence; without a session it is prefilled here, after fetching what ``pull`` says.

        Raises ``InvalidRequest``.
        """
        self._check(spec)
        fetching = None if pull is None else self.pulling.fetch(spec, pull, deadline_at)
        self.receiving.decode(spec, publish, session_id, fetching)

    def abort(self, sequence_id: SequenceId, stage: Role) -> None:
        """Give a sequence up in any state, quietly; unknown ones are ignored."""
        if stage is Role.PREFILL:
            self.sending.abort(sequence_id)
        else:
            self.receiving.abort(sequence_id)

    def gateway_gone(self, publish: Publish) -> None:
        """A gateway's connection is closed: its sequences end."""
        self.sending.abort_all(publish)
        self.receiving.abort_all(publish)

    def when_dead(self, callback: Callable[[], None]) -> None:
        """``callback`` is called when the worker dies, or now if it is dead."""
        if self.alive:
            self._mourners.append(callback)
        else:
            callback()

    def set_role(self, role: Role) -> None:
        """Advertise ``role`` from now on; sequences of the old role go on to their end."""
        if role is self.role:
            return
        self.role = role
        if self.kind.conversion_s > 0:
            self.engine.pause(self.kind.conversion_s)
        self._notify()

    def drain(self) -> None:
        """Advertise from now on that nothing new is to come; what is here goes on to its end."""
        self.draining = True
        self._notify()

    @property
    def is_busy(self) -> bool:
        """Has it sequences, or pages to send?"""
        return self.receiving.num_sequences > 0 or self.sending.num_sessions > 0

    # ---- reports ----

    def state(self, told: int | None) -> WorkerState:
        """One message of the Watch stream, for a reader that has the page events up to number ``told``."""
        state = WorkerState(
            role=self.role,
            draining=self.draining,
            load=self._load,
            links=self._links.estimates(),
            page_events=self._page_events.since(told),
            load_age_s=self._loop.now() - self._load_at,
            steps=self.engine.take_samples(),
        )
        self._load, self._load_at = self._measure(), self._loop.now()
        changes = self.engine.allocator.take_changes()
        self._page_events.record(changes.stored, changes.removed)
        return state

    async def changed(self, timeout_s: float) -> None:
        """Wait until the role changes, it begins to drain, the worker dies, or the time is over."""
        waiter: asyncio.Future[None] = self._loop.create_future()
        self._watchers[waiter] = None
        timer = self._loop.call_later(timeout_s, _wake, waiter)
        try:
            await waiter
        finally:
            timer.cancel()
            self._watchers.pop(waiter, None)

    def die(self) -> None:
        """The process is gone, and every page with it; peers and gateways hear of it as of a closed connection."""
        if not self.alive:
            return
        self.alive = False
        self.engine.settle()
        self.receiving.die()
        self.sending.die()
        self.pulling.die()
        self.engine.stop()
        for callback in self._mourners:
            callback()
        self._notify()

    # ---- StepListener ----

    def step_begun(self, plan: StepPlan, begins_at: float, ends_at: float) -> None:
        self.sending.step_begun(plan, begins_at, ends_at)

    def step_ended(self, chunks: Sequence[TokenChunk]) -> None:
        self.sending.step_ended()
        pages_may_be_free = False
        for chunk in chunks:
            if chunk.stats is not None and not self.sending.token_made(chunk):
                self.receiving.token_made(chunk)
                pages_may_be_free = pages_may_be_free or chunk.finish_reason is not None
        if pages_may_be_free:
            self.receiving.serve_grants()

    # ---- inside ----

    def _check(self, spec: SequenceSpec) -> None:
        num_tokens, most = num_known_tokens(spec), self.kind.model.max_model_len
        if num_tokens >= most:
            message = f"has {num_tokens} tokens, which leaves no room for output: a sequence holds at most {most} here"
            raise InvalidRequest("prompt", message)

    def _measure(self) -> WorkerLoad:
        self.engine.settle()
        load, allocator = self.engine.scheduler.load(), self.engine.allocator
        num_announced, num_announced_tokens = self.receiving.announced()
        return WorkerLoad(
            num_running=load.num_running,
            num_waiting=load.num_waiting,
            num_waiting_tokens=load.num_waiting_tokens,
            pages_free=allocator.num_free,
            pages_cached=allocator.num_cached,
            num_sessions=self.sending.num_sessions + self.receiving.num_sessions,
            bytes_sent=round(self.sending.bytes_sent),
            bytes_received=round(self.receiving.bytes_received),
            prompt_tokens=load.prompt_tokens,
            generated_tokens=load.generated_tokens,
            cached_tokens=load.cached_tokens,
            num_preemptions=load.num_preemptions,
            pulls=tuple(sorted((outcome.value, count) for outcome, count in self.pulling.outcomes.items())),
            pulled_tokens=self.pulling.num_tokens,
            pulled_bytes=self.pulling.num_bytes,
            num_announced=num_announced,
            num_announced_tokens=num_announced_tokens,
            num_other_role=self.receiving.num_sequences if self.role is Role.PREFILL else self.sending.num_sessions,
        )

    def _notify(self) -> None:
        for waiter in self._watchers:
            _wake(waiter)


def _wake(waiter: asyncio.Future[None]) -> None:
    if not waiter.done():
        waiter.set_result(None)
