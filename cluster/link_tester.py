"""Which links have shown that they work? Every pair of a prefill and a decode worker is tested before it is used.

The gateway decides when, the prefill worker does it (``ProbeSender.Run``), Membership keeps the result and so decides
what may be used. ``due`` is the whole decision, pure:

    - a pair never tested is due at once, one that failed after a back-off of 1, 2, 4 ... ``MAX_BACK_OFF_S`` seconds,
      one that passed not again, until one of its engines is another one, ``test_all`` is called, or the planner asks
      what a link carries on which nothing has gone for a while (``retest``);
    - a worker takes part in one test at a time, so that pairs do not measure each other: N x M pairs take about
      max(N, M) rounds.

A worker without a page to spare says nothing of its links: its pairs stay what they are and are asked again soon.
Where self-tests are off (``kv_transfer.self_test``) nothing is tested unless ``test_all`` is called.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Iterable, Mapping
from dataclasses import dataclass, replace

from cluster.membership import Membership
from cluster.view import ClusterView
from core.clock import Clock
from core.errors import Overloaded, PeerLost
from core.link import ProbeReport
from core.request import EngineId, Role, WorkerId

logger = logging.getLogger(__name__)

MAX_BACK_OFF_S = 60.0
PAGE_WAIT_S = 0.5  # until a worker that had no page to spare is asked again
PROBE_TIMEOUT_S = 15.0  # of one pair, however slow its link
PAGE_TRIES = 20  # then whoever called ``test_all`` hears that there was no page
_LOOK_S = 0.25  # how often back-offs are looked at when nothing changes


@dataclass(frozen=True, slots=True)
class Pair:
    """An ordered pair of engines, with the names of their workers."""

    sender: EngineId
    receiver: EngineId
    from_worker: WorkerId
    to_worker: WorkerId


@dataclass(frozen=True, slots=True)
class PairState:
    """What the tester remembers of a pair. ``due_at`` None: it is not to be tested (again)."""

    due_at: float | None
    num_failures: int = 0  # in a row
    num_page_waits: int = 0  # in a row


@dataclass(frozen=True, slots=True)
class PairResult:
    """One pair when its test has ended."""

    pair: Pair
    report: ProbeReport
    num_pairs: int = 1  # that were asked for together


NEVER, AT_ONCE = PairState(due_at=None), PairState(due_at=0.0)


def pairs_of(view: ClusterView) -> tuple[Pair, ...]:
    """Every prefill worker to every decode worker that takes sequences."""
    return tuple(
        Pair(prefill.engine_id, decode.engine_id, prefill.worker_id, decode.worker_id)
        for prefill in view.ready(Role.PREFILL)
        for decode in view.ready(Role.DECODE)
    )


def due(states: Mapping[Pair, PairState], running: Iterable[Pair], now: float) -> tuple[Pair, ...]:
    """Those to be tested now, beside ``running``; no engine is in two tests, and who waited longest goes first."""
    running = frozenset(running)
    busy = {engine for pair in running for engine in (pair.sender, pair.receiver)}
    waiting = [(s.due_at, pair) for pair, s in states.items() if s.due_at is not None and pair not in running]
    chosen: list[Pair] = []
    for due_at, pair in sorted(waiting, key=lambda item: item[0]):  # stable: else in order of the view
        if due_at <= now and not busy & {pair.sender, pair.receiver}:
            chosen.append(pair)
            busy |= {pair.sender, pair.receiver}
    return tuple(chosen)


def after(state: PairState, report: ProbeReport, now: float) -> PairState:
    """The pair's state once its test has ended."""
    if report.passed:
        return NEVER
    back_off_s = min(MAX_BACK_OFF_S, 2.0 ** min(state.num_failures, 16))
    return PairState(due_at=now + back_off_s, num_failures=state.num_failures + 1)


class LinkTester:
    """Has links tested and tells Membership how they did. Lives on the gateway's event loop."""

    def __init__(self, membership: Membership, clock: Clock, *, unasked: bool) -> None:
        """``unasked``: test every pair that comes into the view; else only what ``test_all`` asks for."""
        self._membership = membership
        self._clock = clock
        self._default = AT_ONCE if unasked else NEVER
        self._states: dict[Pair, PairState] = {}  # of every pair of the view, in its order
        self._running: dict[Pair, asyncio.Task[None]] = {}
        self._waiting: dict[Pair, list[asyncio.Future[PairResult]]] = {}
        self._changed = asyncio.Event()
        self._keeper: asyncio.Task[None] | None = None

    def start(self) -> None:
        """Begin; ``close`` ends it."""
        assert self._keeper is None, "started already"
        self._keeper = asyncio.create_task(self._keep_testing())

    async def close(self) -> None:
        """End; tests under way are dropped."""
        tasks = [*self._running.values(), *([self._keeper] if self._keeper is not None else [])]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        for pair in list(self._waiting):
            self._settle(pair, _lost("the gateway stops"))

    async def test_all(self) -> AsyncIterator[PairResult]:
        """Test every pair of the view once more, and yield each when it has ended; one that leaves is ``PeerLost``."""
        loop = asyncio.get_running_loop()
        results: list[asyncio.Future[PairResult]] = []
        for pair in pairs_of(self._membership.view()):
            result: asyncio.Future[PairResult] = loop.create_future()
            self._states[pair] = AT_ONCE
            self._waiting.setdefault(pair, []).append(result)
            results.append(result)
        self._changed.set()
        for ended in asyncio.as_completed(results):
            yield replace(await ended, num_pairs=len(results))

    def retest(self, sender: EngineId, receiver: EngineId) -> None:
        """Test that pair soon, to know what its link carries now; nothing happens if it is no pair of the view."""
        for pair, state in self._states.items():
            if (pair.sender, pair.receiver) == (sender, receiver) and pair not in self._running:
                self._states[pair] = replace(state, due_at=self._clock.now() if state.due_at is None else state.due_at)
                self._changed.set()
                return

    async def _keep_testing(self) -> None:
        while True:
            self._changed.clear()
            view = self._membership.view()
            self._follow(pairs_of(view))
            for pair in due(self._states, self._running, self._clock.now()):
                self._running[pair] = asyncio.create_task(self._test(pair))
            await self._change_of(view)

    def _follow(self, pairs: tuple[Pair, ...]) -> None:
        """Know exactly these pairs; whoever waits for another one hears that it is gone."""
        self._states = {pair: self._states.get(pair, self._default) for pair in pairs}
        for pair in [pair for pair in self._waiting if pair not in self._states]:
            self._settle(pair, _lost("a worker of the pair left, or changed its role"))

    async def _change_of(self, view: ClusterView) -> None:
        """Return when a test has ended, one was asked for, workers came or went, or ``_LOOK_S`` have passed."""
        census = _census(view)
        waits = {
            asyncio.create_task(self._changed.wait()),
            asyncio.create_task(self._membership.wait_until(lambda now: _census(now) != census, _LOOK_S)),
        }
        try:
            await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for wait in waits:
                wait.cancel()
            await asyncio.gather(*waits, return_exceptions=True)

    async def _test(self, pair: Pair) -> None:
        try:
            report = await self._probe(pair)
        except Overloaded as error:
            self._postpone(pair, error)
        else:
            self._conclude(pair, report)
        finally:
            del self._running[pair]
            self._changed.set()

    async def _probe(self, pair: Pair) -> ProbeReport:
        sender, receiver = self._membership.client(pair.sender), self._membership.client(pair.receiver)
        if sender is None or receiver is None:
            return _lost("a worker of the pair left")
        try:
            return await sender.probe_link(receiver.description, PROBE_TIMEOUT_S)
        except PeerLost as error:
            return _lost(str(error))

    def _conclude(self, pair: Pair, report: ProbeReport) -> None:
        state = self._states.get(pair)
        if state is not None:
            self._states[pair] = after(state, report, self._clock.now())
            _log(pair, report)
        self._membership.note_probe(pair.sender, pair.receiver, report)
        self._settle(pair, report)

    def _postpone(self, pair: Pair, error: Overloaded) -> None:
        state = self._states.get(pair)
        if state is None:
            return
        num_page_waits = state.num_page_waits + 1
        self._states[pair] = PairState(self._clock.now() + PAGE_WAIT_S, state.num_failures, num_page_waits)
        if num_page_waits == 1:
            logger.info("link %s to %s: test postponed: %s", pair.from_worker, pair.to_worker, error)
        if num_page_waits >= PAGE_TRIES:
            self._settle(pair, ProbeReport("", error=Overloaded.__name__, reason=str(error)))

    def _settle(self, pair: Pair, report: ProbeReport) -> None:
        for result in self._waiting.pop(pair, ()):
            if not result.done():
                result.set_result(PairResult(pair, report))


def _census(view: ClusterView) -> tuple[tuple[EngineId, Role, bool], ...]:
    return tuple((worker.engine_id, worker.role, worker.draining) for worker in view.workers)


def _lost(reason: str) -> ProbeReport:
    return ProbeReport("", error=PeerLost.__name__, reason=reason)


def _log(pair: Pair, report: ProbeReport) -> None:
    if report.passed:
        rate = (report.rate or 0.0) / 1e9
        said = f"{report.path}, {report.num_bytes} bytes exact, {rate:.3g} GB/s"
        logger.info("link %s to %s works: %s", pair.from_worker, pair.to_worker, said)
    else:
        said = f"{report.error}: {report.reason}"
        logger.warning("link %s to %s failed its self-test: %s", pair.from_worker, pair.to_worker, said)
