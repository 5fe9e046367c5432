"""The decode half of a simulated worker: announced, granted, admitted, decoded, as in decode_worker/worker.py.

    decode()      announced by the gateway: no page is held; without a session it is queued to be prefilled here
    ask_grant()   the sender has started it: pages are reserved in the order of asking, or waited for
    committed()   everything has arrived: admitted between two steps
    step_ended()  its first token at once; those between the first and the last with the last one

Tokens in between are told earlier if the worker dies: nobody acts on them else, and each would cost an event.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable, Coroutine
from dataclasses import dataclass

from cluster.simulator.host import Host, Publish, num_known_tokens
from core.errors import InvalidRequest
from core.request import PullReport, Role, SequenceFailure, SequenceId, SequenceSpec, SessionId, TokenChunk
from engine.scheduler import Reservation


@dataclass(slots=True)
class GrantQuery:
    """What a sender asks, and how it hears of what becomes of it; each is called at the receiver."""

    session_id: SessionId
    granted: Callable[[int], None]  # with the leading tokens that are cached here
    refused: Callable[[str], None]
    lost: Callable[[], None]  # this worker is gone
    timer: asyncio.TimerHandle | None = None


@dataclass(slots=True, eq=False)
class _Arrival:
    """One sequence that is announced here, arrives or decodes."""

    spec: SequenceSpec
    publish: Publish
    session_id: SessionId | None
    query: GrantQuery | None = None  # None: not asked for yet
    reservation: Reservation | None = None
    pulling: asyncio.Task[None] | None = None
    pull: PullReport | None = None
    admitted: bool = False
    num_told: int = 0  # output tokens that the gateway has


class ReceivingHalf:
    """What of a worker receives and decodes."""

    def __init__(self, host: Host) -> None:
        self.description = host.description
        self._host = host
        self._engine = host.engine
        self._arrivals: dict[SequenceId, _Arrival] = {}
        self._by_session: dict[SessionId, SequenceId] = {}  # of those that did not arrive yet
        self._waiting: deque[_Arrival] = deque()  # for pages
        self._serving = False
        self._alive = True
        self.bytes_received = 0.0

    @property
    def num_sequences(self) -> int:
        """Sequences announced, arriving or decoding."""
        return len(self._arrivals)

    @property
    def num_sessions(self) -> int:
        """Hand-overs announced or under way."""
        return len(self._by_session)

    def announced(self) -> tuple[int, int]:
        """Sequences whose K/V is to come, and the tokens of those that hold no page yet."""
        coming = [arrival for arrival in self._arrivals.values() if not arrival.admitted]
        without = (num_known_tokens(arrival.spec) for arrival in coming if arrival.reservation is None)
        return len(coming), sum(without)

    def num_untold(self) -> int:
        """Tokens that exist by now, and that a real worker would have told the gateway."""
        positions = self._engine.positions()
        told = ((a.num_told, positions.get(sequence_id)) for sequence_id, a in self._arrivals.items())
        return sum(max(0, position - known) for known, position in told if position is not None)

    # ---- the gateway ----

    def decode(
        self,
        spec: SequenceSpec,
        publish: Publish,
        session_id: SessionId | None,
        pull: Coroutine[None, None, PullReport] | None = None,
    ) -> None:
        """Announce the sequence; without a session it is prefilled here, after ``pull``."""
        arrival = _Arrival(spec, publish, session_id, num_told=len(spec.output_token_ids))
        self._arrivals[spec.sequence_id] = arrival
        if session_id is not None:
            self._by_session[session_id] = spec.sequence_id
            return
        arrival.admitted = True
        if pull is None:
            self._join(arrival)
        else:
            arrival.pulling = self._host.loop.create_task(self._pull_and_queue(arrival, pull))

    def abort(self, sequence_id: SequenceId) -> None:
        """Give a sequence up in any state, quietly; unknown ones are ignored."""
        arrival = self._arrivals.get(sequence_id)
        if arrival is None:
            return
        self._forget(arrival)
        if arrival.pulling is not None:
            arrival.pulling.cancel()
        if arrival in self._waiting:
            self._waiting.remove(arrival)
            self._stop_waiting(arrival)
        self._engine.submit(lambda: self._give_back(arrival))

    def abort_all(self, publish: Publish) -> None:
        """Give up whatever a gateway sent, which is gone."""
        for arrival in [a for a in self._arrivals.values() if a.publish == publish]:
            self.abort(arrival.spec.sequence_id)

    # ---- senders ----

    def ask_grant(self, query: GrantQuery) -> None:
        """A sender has started a session's sequence and wants pages for it."""
        arrival = self._arrival_of(query.session_id)
        if not self._alive:
            query.lost()
        elif arrival is None or arrival.query is not None:
            query.refused(f"session {query.session_id} was not announced here, or has its grant")
        else:
            arrival.query = query
            self._waiting.append(arrival)
            self.serve_grants()
            if arrival.reservation is None:
                query.timer = self._host.loop.call_later(self._host.kind.grant_wait_s, self._refuse, arrival)

    def committed(self, session_id: SessionId, num_bytes: float) -> bool:
        """Everything of a session has arrived; False: it is not waited for any more."""
        arrival = self._arrival_of(session_id)
        if not self._alive or arrival is None or arrival.reservation is None:
            return False
        self.bytes_received += num_bytes
        arrival.admitted = True
        del self._by_session[session_id]
        arrived_at = self._host.loop.time()
        self._engine.submit(lambda: self._admit(arrival, arrived_at))
        return True

    def sender_lost(self, session_id: SessionId) -> None:
        """The worker that sent this session's K/V is gone."""
        arrival = self._arrival_of(session_id)
        if not self._alive or arrival is None or arrival.query is None:
            return
        self.abort(arrival.spec.sequence_id)
        sequence_id = arrival.spec.sequence_id
        arrival.publish(SequenceFailure(sequence_id, "KV did not arrive: the sender is gone", True, Role.PREFILL))

    def serve_grants(self) -> None:
        """Reserve pages in the order of asking; one that must wait holds up those behind it, and never starves."""
        if self._serving:
            return
        self._serving = True
        while self._waiting:
            arrival = self._waiting[0]
            reservation = self._engine.reserve(arrival.spec)
            if reservation is None:
                break
            self._waiting.popleft()
            self._stop_waiting(arrival)
            arrival.reservation = reservation
            assert arrival.query is not None, "who waits for pages has asked for them"
            arrival.query.granted(reservation.num_cached_pages * self._host.kind.engine.page_size)
        self._serving = False

    # ---- the engine, between two steps ----

    def token_made(self, chunk: TokenChunk) -> bool:
        """A first or a last token of one of ours; False: the sequence is not ours."""
        arrival = self._arrivals.get(chunk.sequence_id)
        if arrival is None:
            return False
        assert chunk.stats is not None, "first and last tokens bring their stats"
        start, end = arrival.num_told, chunk.position + 1
        stats = chunk.stats._replace(
            worker_id=self.description.worker_id,
            role=Role.DECODE,
            received_tokens=self._num_received(arrival),
            pull=arrival.pull,
        )
        arrival.num_told = end
        if chunk.finish_reason is not None:
            self._forget(arrival)
        tokens = self._host.answers.of(arrival.spec).tokens(start, end)
        arrival.publish(chunk._replace(position=start, token_ids=tokens, stats=stats))
        return True

    # ---- the end ----

    def die(self) -> None:
        """Tell what the gateway could have had by now; then there is nothing any more."""
        for arrival in self._arrivals.values():
            end = self._engine.position(arrival.spec.sequence_id)
            if end is not None and end > arrival.num_told:
                tokens = self._host.answers.of(arrival.spec).tokens(arrival.num_told, end)
                arrival.publish(TokenChunk(arrival.spec.sequence_id, arrival.num_told, tokens))
        self._alive = False
        for arrival in self._arrivals.values():
            self._stop_waiting(arrival)
            if arrival.pulling is not None:
                arrival.pulling.cancel()
            if arrival.query is not None and not arrival.admitted:
                arrival.query.lost()

    # ---- inside ----

    def _arrival_of(self, session_id: SessionId) -> _Arrival | None:
        sequence_id = self._by_session.get(session_id)
        return None if sequence_id is None else self._arrivals.get(sequence_id)

    async def _pull_and_queue(self, arrival: _Arrival, pull: Coroutine[None, None, PullReport]) -> None:
        arrival.pull = await pull
        arrival.pulling = None
        self._join(arrival)

    def _join(self, arrival: _Arrival) -> None:
        arrived_at = self._host.loop.time()
        self._engine.submit(lambda: self._queue(arrival, arrived_at))

    def _queue(self, arrival: _Arrival, arrived_at: float) -> None:
        if arrival.spec.sequence_id not in self._arrivals:
            return
        try:
            self._engine.add(arrival.spec, arrived_at)
        except InvalidRequest as error:
            self._forget(arrival)
            arrival.publish(SequenceFailure(arrival.spec.sequence_id, str(error), True, Role.DECODE))

    def _admit(self, arrival: _Arrival, arrived_at: float) -> None:
        if arrival.spec.sequence_id not in self._arrivals or arrival.reservation is None:
            return
        known = len(arrival.spec.output_token_ids)
        arrival.num_told = known + 1  # the first token came from the sender
        tokens = self._host.answers.of(arrival.spec).tokens(known, known + 1)
        self._engine.admit(arrival.reservation, tokens, arrived_at)

    def _give_back(self, arrival: _Arrival) -> None:
        """Nothing can land in its pages any more: links forget the flows of what was aborted."""
        if arrival.reservation is not None:
            self._engine.scheduler.cancel(arrival.reservation)
        self._engine.abort(arrival.spec.sequence_id)
        self.serve_grants()

    def _refuse(self, arrival: _Arrival) -> None:
        assert arrival.query is not None, "who waits for pages has asked for them"
        arrival.query.timer = None
        self._waiting.remove(arrival)
        arrival.query.refused(f"no pages came free within {self._host.kind.grant_wait_s:g} s")
        self.serve_grants()

    def _num_received(self, arrival: _Arrival) -> int:
        if arrival.reservation is None:
            return 0
        return num_known_tokens(arrival.spec) - arrival.reservation.num_cached_pages * self._host.kind.engine.page_size

    def _forget(self, arrival: _Arrival) -> None:
        self._arrivals.pop(arrival.spec.sequence_id, None)
        if arrival.session_id is not None:
            self._by_session.pop(arrival.session_id, None)

    @staticmethod
    def _stop_waiting(arrival: _Arrival) -> None:
        if arrival.query is not None and arrival.query.timer is not None:
            arrival.query.timer.cancel()
            arrival.query.timer = None
