"""Another worker caches more of a prompt than this one: its pages are fetched before the prompt is prefilled here.

    fetch()       event loop   what is missing is named to the source, which offers what it has of it; room is made for
                               that, and granted to the source under a session of its own
    committed()   transport    every page arrived: they join the prefix cache, and ``fetch`` returns
    released()    transport    the session broke and nothing can land any more: the room is given back

A pull is worth the time that it saves and no more: it is bounded by what the router gave it, by half of the time that
is left until the request's deadline, and by a bound of this worker's own. Then, and whatever else goes wrong, ``fetch``
says so and the worker computes the pages itself. No step of the engine waits for a pull, and no sequence but its own.

Sessions of pulls are this class's, others are not: ``committed`` and ``released`` say whose. Invariants: a room goes
back or is adopted exactly once, also when nobody waits for it any more; pages of one prefix are fetched once at a time,
and whoever else wants them meanwhile waits for them; a source that could not be had is left alone for 1, 2, 4 ...
``MAX_BACK_OFF_S`` seconds.
"""

from __future__ import annotations

import asyncio
import logging
import threading
import uuid
from collections import Counter
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from core.clock import Clock
from core.errors import (
    Corrupted,
    GrantRefused,
    Incompatible,
    Overloaded,
    PeerLost,
    PrfaasError,
    TransferError,
    Unauthenticated,
)
from core.kv_layout import KvEnd, KvLayout
from core.prefix_hash import PageHash, page_hashes
from core.request import EngineId, PullOutcome, PullReport, PullTask, SequenceSpec, SessionId
from core.request_log import about
from engine.prefix_loan import PrefixLoans
from engine.scheduler import PrefixRoom
from kv_transfer.receiver import ReceivingEnd
from kv_transfer.session import Grant
from kv_transfer.transport import SendOrder

logger = logging.getLogger(__name__)

MAX_BACK_OFF_S = 60.0

RunOnLoop = Callable[[Awaitable[None]], None]

_OUTCOMES: tuple[tuple[type[PrfaasError], PullOutcome], ...] = (
    (GrantRefused, PullOutcome.NOT_FOUND),
    (Overloaded, PullOutcome.NO_PAGES),
    (Incompatible, PullOutcome.INCOMPATIBLE),
    (PeerLost, PullOutcome.UNREACHABLE),
    (Unauthenticated, PullOutcome.UNREACHABLE),
    (Corrupted, PullOutcome.CORRUPTED),
)
# What tells that the source, or the way to it, is broken: it is left alone for a while.
_BROKEN = frozenset(
    {
        PullOutcome.TIMEOUT,
        PullOutcome.UNREACHABLE,
        PullOutcome.INCOMPATIBLE,
        PullOutcome.CORRUPTED,
        PullOutcome.FAILED,
    }
)


@dataclass(frozen=True, slots=True)
class PagesWanted:
    """What a source is asked for. ``page_hashes`` follow each other in one prefix; seconds count from now."""

    session_id: SessionId
    page_hashes: tuple[PageHash, ...]
    tenant: str
    deadline_s: float | None  # within which the first token is wanted; None: none promised
    timeout_s: float  # after which nobody wants the pages any more


class Offered(Protocol):
    """What a source has of it. It keeps the pages until ``push`` has ended, or ``cancel``."""

    @property
    def num_pages(self) -> int: ...
    @property
    def layout(self) -> KvLayout:
        """Of the source's pool."""
        ...

    @property
    def descriptor(self) -> bytes:
        """Of the source's transport, for links that this end dials."""
        ...

    @property
    def ranks(self) -> Sequence[KvEnd]:
        """Of a source of several ranks: each one's layout and descriptor."""
        ...

    async def push(self, grant: Grant) -> None:
        """Have all of them sent to where ``grant`` says; returns when the commit was acknowledged to the source.

        Raises the ``TransferError`` that the source ended with.
        """
        ...

    def cancel(self) -> None:
        """The pages are not wanted (any more). Ignored when all is over."""
        ...


class PageSources(Protocol):
    """The other workers."""

    async def ask(self, task: PullTask, wanted: PagesWanted) -> Offered:
        """What the source has of it. Raises ``GrantRefused``, ``Incompatible``, ``PeerLost`` or ``TransferAborted``."""
        ...


@dataclass(frozen=True, slots=True)
class _Pulling:
    """A session between ``KvReceiver.issue`` and its end. ``arrived``: None, or why it did not."""

    room: PrefixRoom
    arrived: asyncio.Future[TransferError | None]


@dataclass(frozen=True, slots=True)
class _BackOff:
    num_failures: int  # in a row
    until: float


class PagePuller:
    """Fetches pages of prefixes from other workers into this one's prefix cache. Lives on one event loop."""

    def __init__(
        self,
        loans: PrefixLoans,
        layout: KvLayout,
        sources: PageSources,
        clock: Clock,
        run_on_loop: RunOnLoop,
        timeout_s: float,
        num_ranks: int = 1,
    ) -> None:
        """``layout``: what the pages hold, on each of ``num_ranks``; ``timeout_s``: no pull takes longer."""
        self._num_ranks = num_ranks
        self._loans = loans
        self._layout = layout
        self._sources = sources
        self._clock = clock
        self._run_on_loop = run_on_loop
        self._timeout_s = timeout_s
        self._lock = threading.Lock()
        self._pulls: dict[SessionId, _Pulling] = {}
        self._under_way: dict[PageHash, asyncio.Future[None]] = {}  # first page that is fetched |-> done when it ended
        self._back_offs: dict[EngineId, _BackOff] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        self._outcomes: Counter[PullOutcome] = Counter()
        self._num_tokens = 0
        self._num_bytes = 0
        self._receiver: ReceivingEnd | None = None

    def attach(self, receiver: ReceivingEnd) -> None:
        """Give the receiver, whose callbacks ask ``committed`` and ``released`` first."""
        self._receiver = receiver

    @property
    def num_sessions(self) -> int:
        """Pulls into whose pages something may land."""
        return len(self._pulls)

    @property
    def outcomes(self) -> Mapping[PullOutcome, int]:
        """How the pulls since the start have ended."""
        return self._outcomes

    @property
    def num_tokens(self) -> int:
        """Tokens whose K/V was pulled since the start."""
        return self._num_tokens

    @property
    def num_bytes(self) -> int:
        """Bytes that were pulled since the start."""
        return self._num_bytes

    async def fetch(self, spec: SequenceSpec, task: PullTask, order: SendOrder) -> PullReport:
        """Fetch what ``task`` names of the sequence's prefix, as far as it is not here; how that went.

        ``order``: the sequence's place on the source's link. Raises nothing but ``CancelledError``.
        """
        started_at = self._clock.now()
        timeout_s = self._timeout_of(task, order, started_at)
        num_pages, reason = 0, ""
        try:
            async with asyncio.timeout(timeout_s):
                num_pages = await self._fetch(spec, task, order, started_at + timeout_s)
            outcome = PullOutcome.PULLED if num_pages else PullOutcome.CACHED
        except asyncio.CancelledError:
            task_here = asyncio.current_task()
            if task_here is None or task_here.cancelling():
                self._outcomes[PullOutcome.ABORTED] += 1
                raise
            # Not by who waits for it: the channel closed.
            outcome, reason = PullOutcome.FAILED, "the call was cancelled"
        except TimeoutError:
            outcome, reason = PullOutcome.TIMEOUT, f"not there after {timeout_s:.3g} s"
        except _BackingOff as error:
            outcome, reason = PullOutcome.BACKING_OFF, str(error)
        except PrfaasError as error:
            outcome, reason = _outcome_of(error), str(error)
        except Exception as error:  # a bug, here or in a library: the request must not suffer for it
            said = "sequence %s: a pull from %s failed"
            logger.exception(said, spec.sequence_id, task.worker_id, extra=about(spec.sequence_id))
            outcome, reason = PullOutcome.FAILED, f"{type(error).__name__}: {error}"
        num_tokens = num_pages * self._layout.page_size
        num_bytes = num_pages * self._layout.bytes_per_page * self._num_ranks
        report = PullReport(outcome, num_tokens, num_bytes, self._clock.now() - started_at)
        self._note(spec, task, report, reason, blame=outcome in _BROKEN and timeout_s > 0)
        return report

    async def close(self) -> None:
        """Wait for no source any more. Sessions end with the receiver's ``close``."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    # ---- transport threads ----

    def committed(self, session_id: SessionId) -> bool:
        """Every page arrived; False: it is no pull's session."""
        pulling = self._take(session_id)
        if pulling is None:
            return False
        self._run_on_loop(self._adopt(pulling))
        return True

    def released(self, session_id: SessionId, error: TransferError) -> bool:
        """The session broke, and nothing can land any more; False: it is no pull's."""
        pulling = self._take(session_id)
        if pulling is None:
            return False
        self._loans.give_back(pulling.room.page_ids)
        self._run_on_loop(_settle(pulling.arrived, error))
        return True

    # ---- inside ----

    @property
    def _kv(self) -> ReceivingEnd:
        assert self._receiver is not None, "attach() comes before the first pull"
        return self._receiver

    def _timeout_of(self, task: PullTask, order: SendOrder, now: float) -> float:
        bounds = [self._timeout_s]
        if task.timeout_s is not None:
            bounds.append(task.timeout_s)
        if order.deadline_at is not None:
            bounds.append((order.deadline_at - now) / 2)  # the other half is for computing, if it comes to that
        return max(0.0, min(bounds))

    async def _fetch(self, spec: SequenceSpec, task: PullTask, order: SendOrder, give_up_at: float) -> int:
        """Pages that were fetched; 0: nothing was missing."""
        page_size = self._layout.page_size
        # A whole prompt is never taken from the cache: its last token must be computed.
        num_pages = min(task.num_tokens, len(spec.token_ids) - 1) // page_size
        tokens = spec.token_ids[: num_pages * page_size]
        names = await asyncio.to_thread(page_hashes, tokens, page_size, spec.salt)
        while (num_known := await self._loans.num_known(names)) < len(names):
            if (running := self._under_way.get(names[num_known])) is not None:
                await asyncio.wait({running})
                continue
            self._require_no_back_off(task)
            ended = self._under_way[names[num_known]] = asyncio.get_running_loop().create_future()
            try:
                return await self._exchange(names, num_known, task, order, give_up_at)
            finally:
                del self._under_way[names[num_known]]
                ended.set_result(None)
        return 0

    async def _exchange(
        self, names: Sequence[PageHash], num_known: int, task: PullTask, order: SendOrder, give_up_at: float
    ) -> int:
        session_id, now = SessionId(f"pull-{uuid.uuid4().hex}"), self._clock.now()
        deadline_s = None if order.deadline_at is None else max(0.0, order.deadline_at - now)
        timeout_s = max(0.0, give_up_at - now)
        wanted = PagesWanted(session_id, tuple(names[num_known:]), order.tenant, deadline_s, timeout_s)
        offered = await self._sources.ask(task, wanted)
        handed_over = False
        try:
            room = await self._room_for(offered, names, num_known)
            if not room.missing:  # somebody computed them meanwhile
                self._loans.give_back(room.page_ids)
                return 0
            pulling, grant = self._issue(session_id, room, num_known, offered)
            pushing = self._watch(offered.push(grant))
            await _arrival(pushing, pulling.arrived)
            handed_over = True
            return len(room.missing)
        finally:
            if not handed_over:
                self._kv.abort(session_id, "the pull was given up")
                offered.cancel()

    async def _room_for(self, offered: Offered, names: Sequence[PageHash], num_known: int) -> PrefixRoom:
        here, there = self._layout, offered.layout
        if here.page_size != there.page_size:
            raise Incompatible("page_size", str(here.page_size), str(there.page_size))
        if not offered.ranks and not self._kv.waits and here.layers != there.layers:
            raise Incompatible("layout", "other heads or layers", "as many pages, of others")
        if not offered.num_pages:
            raise GrantRefused(f"page {num_known} of the prefix is not cached there")
        room = await self._loans.expect(names[: num_known + offered.num_pages], num_known)
        if room is None:
            raise Overloaded("there is no room for the pages here")
        return room

    def _issue(
        self, session_id: SessionId, room: PrefixRoom, num_known: int, offered: Offered
    ) -> tuple[_Pulling, Grant]:
        """From here on ``committed`` or ``released`` ends the room. Pages of the session count from ``num_known``."""
        pulling = _Pulling(room, asyncio.get_running_loop().create_future())
        with self._lock:
            self._pulls[session_id] = pulling
        num_pages = len(room.page_ids) - num_known
        try:
            grant = self._kv.issue(
                session_id,
                num_pages - len(room.missing),
                room.missing,
                num_pages * self._layout.page_size,
                offered.layout,
                offered.descriptor,
                offered.ranks,
            )
        except TransferError:
            self._take(session_id)
            self._loans.give_back(room.page_ids)
            raise
        return pulling, grant

    async def _adopt(self, pulling: _Pulling) -> None:
        await self._loans.adopt(pulling.room)
        await _settle(pulling.arrived, None)

    def _watch(self, push: Awaitable[None]) -> asyncio.Task[None]:
        """Run it to its end, which comes after the pages: the acknowledgement is still on its way."""

        async def run() -> None:
            await push

        def ended(task: asyncio.Task[None]) -> None:
            self._tasks.discard(task)
            if not task.cancelled():
                task.exception()  # whoever wanted to know has looked

        task = asyncio.get_running_loop().create_task(run())
        self._tasks.add(task)
        task.add_done_callback(ended)
        return task

    def _require_no_back_off(self, task: PullTask) -> None:
        back_off = self._back_offs.get(task.engine_id)
        if back_off is not None and self._clock.now() < back_off.until:
            raise _BackingOff(f"it failed {back_off.num_failures} times, and is asked again later")

    def _note(self, spec: SequenceSpec, task: PullTask, report: PullReport, reason: str, *, blame: bool) -> None:
        self._outcomes[report.outcome] += 1
        self._num_tokens += report.num_tokens
        self._num_bytes += report.num_bytes
        if report.outcome is PullOutcome.PULLED:
            self._back_offs.pop(task.engine_id, None)
        elif blame:
            self._back_off_from(task.engine_id)
        if reason:
            level = logging.WARNING if blame else logging.INFO
            said = f"{report.outcome} after {report.seconds:.3f} s: {reason}"
            logger.log(
                level,
                "sequence %s: %d tokens are computed that were to be pulled from %s: %s",
                spec.sequence_id,
                task.num_tokens,
                task.worker_id,
                said,
                extra=about(spec.sequence_id),
            )

    def _back_off_from(self, engine_id: EngineId) -> None:
        now = self._clock.now()
        # Engines that are gone are never asked again: forget them in time.
        self._back_offs = {name: known for name, known in self._back_offs.items() if now < known.until + MAX_BACK_OFF_S}
        before = self._back_offs.get(engine_id)
        num_failures = 1 if before is None else before.num_failures + 1
        self._back_offs[engine_id] = _BackOff(num_failures, now + min(MAX_BACK_OFF_S, 2.0 ** min(num_failures - 1, 16)))

    def _take(self, session_id: SessionId) -> _Pulling | None:
        with self._lock:
            return self._pulls.pop(session_id, None)


class _BackingOff(Exception):
    """The source is left alone for now."""


async def _arrival(pushing: asyncio.Task[None], arrived: asyncio.Future[TransferError | None]) -> None:
    """Return when the pages are here. Raises why they do not come, from whichever end that is heard first."""
    either: set[asyncio.Future[Any]] = {pushing, arrived}
    await asyncio.wait(either, return_when=asyncio.FIRST_COMPLETED)
    if not arrived.done():
        pushing.result()
        await asyncio.wait({arrived})
    error = arrived.result()
    if error is not None:
        raise error


async def _settle(arrived: asyncio.Future[TransferError | None], error: TransferError | None) -> None:
    if not arrived.done():
        arrived.set_result(error)


def _outcome_of(error: PrfaasError) -> PullOutcome:
    return next((outcome for kind, outcome in _OUTCOMES if isinstance(error, kind)), PullOutcome.FAILED)
