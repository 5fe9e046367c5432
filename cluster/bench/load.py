"""Who sends the requests? Open and closed loops over one endpoint, each request at its instant, each seen to its end.

The life of a request here:
1. Its prompt is written on a thread, ahead of its instant (``_AHEAD`` conversations); a later turn's when the answer
   before it is there. What is slow must not stand between an instant and a sending.
2. At its instant it is sent. Both are noted: a generator that is late is seen in ``late_s``, never in a latency.
3. Its output is timed as it comes. Whatever goes wrong is in its record, and the conversation goes on.

Open loop: conversations begin at their instants, however many are under way (``max_concurrency`` holds requests back,
which is noted too). Closed loop: each of ``num_users`` has one conversation at a time.
Besides, the event loop is asked every ``_LAG_EVERY_S`` how late it is: a generator out of CPU stamps chunks too late.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Sequence
from contextlib import aclosing, nullcontext
from dataclasses import dataclass, field
from typing import Any

from cluster.bench.client_record import MEASURED, WARM_UP, ClientRecord
from cluster.bench.prompts import Answered, Wording, place_of_answer
from cluster.bench.schedule import Schedule
from cluster.bench.target import Ask, Reply, Stopwatch, Target
from cluster.simulator.conversation import Conversation, Turn
from core.clock import Clock

_AHEAD = 32
_LAG_EVERY_S = 0.05
TIMEOUT = "timeout"

OnRecord = Callable[[ClientRecord], None]
Offload = Callable[[Callable[[], Any]], Awaitable[Any]]  # runs something slow elsewhere


@dataclass(frozen=True)
class LoadLimits:
    """What bounds a run. Seconds; None: nothing does.

    duration_s: nothing is sent later than that; what is under way ends.
    """

    timeout_s: float = 600.0
    duration_s: float | None = None
    max_concurrency: int | None = None


@dataclass(frozen=True)
class RunResult:
    """What a run left: the measured requests by their number, and how late the event loop was."""

    records: tuple[ClientRecord, ...]
    loop_lag_s: tuple[float, ...]


@dataclass(frozen=True, slots=True)
class _Prepared:
    """A request that is ready to be sent."""

    turn: Turn
    message: Any
    num_tokens: int


async def run_load(
    schedule: Schedule,
    target: Target,
    wording: Wording,
    warm_wording: Wording,
    clock: Clock,
    limits: LoadLimits = LoadLimits(),
    on_record: OnRecord = lambda record: None,
    offload: Offload = asyncio.to_thread,
) -> RunResult:
    """Warm up, then send ``schedule``. ``on_record`` hears of every request when it has ended, warm-up included.

    ``offload``: how prompts are written beside the event loop; a virtual clock needs one that does not leave it.
    """
    generator = _Generator(target, wording, clock, limits, on_record, offload)
    await generator.warm_up(schedule.warm_up, warm_wording)
    return await generator.run(schedule)


@dataclass
class _Generator:
    """One run's state. The event loop is its only writer."""

    target: Target
    wording: Wording
    clock: Clock
    limits: LoadLimits
    on_record: OnRecord
    offload: Offload
    began_at: float = 0.0
    records: list[ClientRecord] = field(default_factory=list)

    def __post_init__(self) -> None:
        limit = self.limits.max_concurrency
        self._slots = None if limit is None else asyncio.Semaphore(limit)

    async def warm_up(self, turns: Sequence[Turn], wording: Wording) -> None:
        """One after the other; each turn by itself, without what stood before it."""
        self.began_at = self.clock.now()
        for number, turn in enumerate(turns):
            prepared = await self._prepare(turn, wording)
            record, _ = await self._send(prepared, number, 0, self._now, WARM_UP)
            self.on_record(record)

    async def run(self, schedule: Schedule) -> RunResult:
        conversations = list(enumerate(schedule.workload.conversations))
        users = schedule.workload.num_users
        lag: list[float] = []
        ready = self._written(conversations)
        # The first prompts are there before the clock starts: an instant 0 would come too early for them.
        first = await anext(ready, None)
        self.began_at = self.clock.now()
        watching = asyncio.create_task(self._watch_loop(lag))
        try:
            async with aclosing(ready):
                if first is None:
                    pass
                elif users is None:
                    await self._open_loop(first, ready)
                else:
                    await self._closed_loop(users, first, ready)
        finally:
            watching.cancel()
            await asyncio.gather(watching, return_exceptions=True)
        return RunResult(tuple(sorted(self.records, key=lambda record: record.number)), tuple(lag))

    async def _open_loop(self, first: _Begun, rest: AsyncIterator[_Begun]) -> None:
        async with asyncio.TaskGroup() as running:
            async for begun in _chain(first, rest):
                due = begun.conversation.starts_at
                if self._is_over(due):
                    return
                await self._sleep_until(due)
                running.create_task(self._converse(begun, due))

    async def _closed_loop(self, users: int, first: _Begun, rest: AsyncIterator[_Begun]) -> None:
        begun = _chain(first, rest)
        taking = asyncio.Lock()  # an async generator has one reader at a time

        async def user() -> None:
            while True:
                free_at = self._now
                async with taking:
                    mine = await anext(begun, None)
                if mine is None or self._is_over(self._now):
                    return
                await self._converse(mine, free_at)

        async with asyncio.TaskGroup() as running:
            for _ in range(users):
                running.create_task(user())

    async def _converse(self, begun: _Begun, due: float) -> None:
        """The turns of one conversation, the first of which is due then."""
        answers: tuple[Answered, ...] = ()
        turns = begun.conversation.turns
        prepared, reply = begun.first, Reply()
        for index, turn in enumerate(turns):
            if index > 0:
                due = self._now + turn.think_s
                answers, prepared = await self._go_on(turns[index - 1], reply, turn, answers)
                if self._is_over(due):
                    return
                await self._sleep_until(due)
            record, reply = await self._send(prepared, begun.number, index, due, MEASURED)
            self.records.append(record)
            self.on_record(record)

    async def _go_on(
        self, last: Turn, reply: Reply, turn: Turn, answers: tuple[Answered, ...]
    ) -> tuple[tuple[Answered, ...], _Prepared]:
        """The next turn's prompt, and the answers in it; one that failed is made up like the rest."""

        def prepare() -> tuple[tuple[Answered, ...], _Prepared]:
            place = place_of_answer(last, turn)
            kept = answers if place is not None else ()
            if place is not None and (reply.text or reply.token_ids):
                kept = (*kept, Answered(*place, reply.text, reply.token_ids))
            return kept, self._written_turn(turn, self.wording, kept)

        gone_on: tuple[tuple[Answered, ...], _Prepared] = await self.offload(prepare)
        return gone_on

    async def _send(
        self, prepared: _Prepared, conversation: int, index: int, due: float, phase: str
    ) -> tuple[ClientRecord, Reply]:
        watch = Stopwatch(self.clock)
        reached_at = self._now
        async with self._slots or nullcontext():
            held_s = self._now - max(due, reached_at) if self._slots is not None else 0.0
            watch.send()
            try:
                async with asyncio.timeout(self.limits.timeout_s):
                    reply = await self.target.send(prepared.message, watch)
            except TimeoutError:
                reply = Reply(error=TIMEOUT, error_message=f"not over after {self.limits.timeout_s:g} s")
                watch.end()
        record = ClientRecord(
            number=prepared.turn.number,
            conversation=conversation,
            turn=index,
            due_at=due,
            sent_at=watch.sent_at - self.began_at,
            held_s=held_s,
            asked_input_tokens=prepared.num_tokens,
            asked_output_tokens=prepared.turn.output_tokens,
            chunk_s=tuple(at - watch.sent_at for at in watch.chunk_at),
            ended_s=watch.ended_at - watch.sent_at,
            output_tokens=reply.output_tokens,
            counted_by=reply.counted_by,
            prompt_tokens=reply.prompt_tokens,
            cached_tokens=reply.cached_tokens,
            finish_reason=reply.finish_reason,
            error=reply.error,
            error_message=reply.error_message,
            phase=phase,
            timing=reply.timing,
        )
        return record, reply

    async def _written(self, conversations: Sequence[tuple[int, Conversation]]) -> AsyncGenerator[_Begun, None]:
        """Conversations in order, the first prompt of each written; a few are always ahead of whoever takes them."""
        waiting: asyncio.Queue[_Begun | None] = asyncio.Queue(_AHEAD)

        async def write() -> None:
            for number, conversation in conversations:
                first = await self._prepare(conversation.turns[0], self.wording)
                await waiting.put(_Begun(number, conversation, first))
            await waiting.put(None)

        writing = asyncio.create_task(write())
        try:
            while (begun := await _first_of(waiting, writing)) is not None:
                yield begun
        finally:
            writing.cancel()
            await asyncio.gather(writing, return_exceptions=True)

    async def _prepare(self, turn: Turn, wording: Wording) -> _Prepared:
        """A prompt by itself."""
        prepared: _Prepared = await self.offload(lambda: self._written_turn(turn, wording, ()))
        return prepared

    def _written_turn(self, turn: Turn, wording: Wording, answers: tuple[Answered, ...]) -> _Prepared:
        """Slow; on any thread."""
        written = wording.write(turn.prompt, answers)
        return _Prepared(turn, self.target.prepare(Ask(written.prompt, turn.output_tokens)), written.num_tokens)

    @property
    def _now(self) -> float:
        """Seconds since the run began."""
        return self.clock.now() - self.began_at

    def _is_over(self, instant: float) -> bool:
        return self.limits.duration_s is not None and instant > self.limits.duration_s

    async def _sleep_until(self, instant: float) -> None:
        await asyncio.sleep(max(0.0, instant - self._now))

    async def _watch_loop(self, lag: list[float]) -> None:
        while True:
            wanted = self.clock.now() + _LAG_EVERY_S
            await asyncio.sleep(_LAG_EVERY_S)
            lag.append(max(0.0, self.clock.now() - wanted))


@dataclass(frozen=True, slots=True)
class _Begun:
    """A conversation that may begin."""

    number: int
    conversation: Conversation
    first: _Prepared


async def _chain(first: _Begun, rest: AsyncIterator[_Begun]) -> AsyncIterator[_Begun]:
    yield first
    async for begun in rest:
        yield begun


async def _first_of(waiting: asyncio.Queue[_Begun | None], writing: asyncio.Task[None]) -> _Begun | None:
    """The next that was written; the writer's error, if it has ended with one."""
    taking = asyncio.ensure_future(waiting.get())
    await asyncio.wait((taking, writing), return_when=asyncio.FIRST_COMPLETED)
    if not taking.done() and writing.done() and waiting.empty():
        taking.cancel()
        writing.result()
    return await taking
