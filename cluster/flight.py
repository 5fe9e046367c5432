"""One request in flight: its n continuations, the tokens that the client has of each, and where its time went.

The router (cluster/router.py) owns flights and drives them; here is what it knows of each. An attempt is one try at a
continuation (cluster/attempt.py), an inbox what it waits for (cluster/inbox.py).
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from cluster.admission import Ticket
from cluster.attempt import Attempt
from cluster.inbox import Inbox, Wakes
from cluster.prefix_index import PrefixMatch
from cluster.routing_policy import RouteRequest
from cluster.view import Route
from core.cache_tiers import joined_reloads
from core.errors import PrfaasError
from core.latency_parts import TtftParts, TtstParts, ttst_parts
from core.prefix_hash import PageHash, extend_page_hashes
from core.request import (
    EngineId,
    FinishReason,
    GenerateRequest,
    OutputChunk,
    RequestId,
    RequestTiming,
    Role,
    SequenceSpec,
    StageStats,
    TokenChunk,
    WorkerId,
    sequence_id,
)
from core.tracing import TraceContext

SAME_WORKER_BACKOFF_S = 0.1  # before the first retry on a worker that failed the sequence; doubles with each attempt


class Flight:
    """One request in flight."""

    def __init__(
        self, request: GenerateRequest, name: RequestId, ticket: Ticket, entered_at: float, wakes: Wakes
    ) -> None:
        self.request = request
        self.entered_at = entered_at  # the router, on its Clock
        self.began_at = entered_at  # when its turn had come
        self.name = name  # unique over gateways and time
        self.ticket = ticket
        self.continuations = tuple(Continuation(request, index, ticket, wakes) for index in range(request.sampling.n))
        self.route: Route | None = None  # of continuation 0's last attempt
        self.timer: asyncio.TimerHandle | None = None

    @property
    def num_tokens(self) -> int:
        """Tokens that the client has, of all continuations."""
        return sum(continuation.num_tokens for continuation in self.continuations)

    def interrupt(self, error: PrfaasError) -> None:
        """Whatever its continuations wait for, they raise ``error``."""
        for continuation in self.continuations:
            continuation.inbox.interrupt(error)


class Continuation:
    """One of n: the tokens that the client has, and the attempt under way."""

    def __init__(self, request: GenerateRequest, index: int, ticket: Ticket, wakes: Wakes) -> None:
        self.index = index
        self.inbox = Inbox(wakes)
        self.attempt: Attempt | None = None
        self.ordinal: int | None = None  # ``RouteRequest.ordinal`` of the attempt to come; None: none was asked for
        self.excluded: set[EngineId] = set()
        self._request = request
        self._ticket = ticket
        self._finished = False
        self._sampling = request.sampling.for_index(index)
        self._token_ids: list[int] = []
        self._attempts: list[Attempt] = []
        self.asked: RouteRequest | None = None  # what the policy was asked last
        self._matches: Mapping[int, PrefixMatch] = {}  # as the last route was decided by
        self._page_hashes: dict[int, list[PageHash]] = {}  # page size |-> digests so far
        self.began_at = 0.0  # it could be routed from then on
        self._first: _EarlyToken | None = None
        self._second: _EarlyToken | None = None
        self._is_early = True  # its first two tokens are still to be noted
        self._last_token_at = 0.0

    @property
    def num_tokens(self) -> int:
        """Tokens that the client has."""
        return len(self._token_ids)

    @property
    def num_finished_tokens(self) -> int | None:
        """``num_tokens`` if those are all; None: it has not finished."""
        return self.num_tokens if self._finished else None

    @property
    def num_attempts(self) -> int:
        return len(self._attempts)

    @property
    def trace(self) -> TraceContext | None:
        """The request's span; None: it is not traced."""
        return self._request.trace

    @property
    def backoff_s(self) -> float:
        """How long to look for another worker before one that failed this continuation is taken again."""
        return SAME_WORKER_BACKOFF_S * 2 ** (self.num_attempts - 1) if self._attempts else 0.0

    def was_failed_by(self, route: Route) -> bool:
        """Does the route use an engine that failed this continuation?"""
        workers = (route.prefill, route.decode)
        return any(worker is not None and worker.engine_id in self.excluded for worker in workers)

    def deadline_s(self, now: float) -> float | None:
        """Seconds until the request's deadline; None if it has none."""
        deadline_at = self._request.deadline_at
        return None if deadline_at is None else max(0.0, deadline_at - now)

    def page_hashes(self, page_size: int) -> Sequence[PageHash]:
        """Digests of the full pages of every known token; those that were computed before are kept."""
        known = self._page_hashes.setdefault(page_size, [])
        tokens = self._request.prompt_token_ids + tuple(self._token_ids)  # the prompt itself while there is no output
        return extend_page_hashes(known, tokens, page_size, self._request.salt)

    @property
    def max_tokens(self) -> int | None:
        return self._sampling.max_tokens

    def cached_tokens(self, route: Route) -> int:
        """Tokens that the worker which prefills was thought to cache, or will have fetched, when it was chosen."""
        worker = route.prefill or route.decode
        match = self._matches.get(worker.model.fingerprint.page_size)
        cached = 0 if match is None else match.pages_on(worker.engine_id) * worker.model.fingerprint.page_size
        fetched = 0 if route.pull is None else route.pull.num_tokens
        return min(max(cached, fetched), len(self._request.prompt_token_ids) + self.num_tokens - 1)

    def route_request(self, matches: Mapping[int, PrefixMatch], num_output: int, mean_output: float) -> RouteRequest:
        assert self.ordinal is not None, "the router has given it one"
        self._matches = matches
        self.asked = RouteRequest(
            request_id=self._request.request_id,
            num_tokens=len(self._request.prompt_token_ids) + self.num_tokens,
            ordinal=self.ordinal,
            excluded=frozenset(self.excluded),
            matches=matches,
            num_output=num_output,
            mean_output=mean_output,
        )
        return self.asked

    def next_spec(self, flight: Flight) -> SequenceSpec:
        return SequenceSpec(
            sequence_id=sequence_id(flight.name, self.index, self.num_attempts),
            prompt_token_ids=self._request.prompt_token_ids,
            sampling=self._sampling,
            output_token_ids=tuple(self._token_ids),
            salt=self._request.salt,
            trace=None if self.trace is None else self.trace.child(),
        )

    def started(self, attempt: Attempt, now: float) -> None:
        attempt.began_at = now
        self._attempts.append(attempt)
        self.attempt, self.ordinal = attempt, None

    def next_chunk(self, now: float, chunk: TokenChunk) -> OutputChunk:
        """Tokens for the client, who has them from here on."""
        self._take(now, chunk)
        return OutputChunk(
            index=self.index,
            token_ids=chunk.token_ids,
            logprobs=chunk.logprobs,
            cached_tokens=self._cached_tokens(),
        )

    def _take(self, now: float, chunk: TokenChunk) -> None:
        self._token_ids += chunk.token_ids
        if chunk.token_ids:
            self._last_token_at = now
            if self._is_early:
                self._note_early(_EarlyToken(now, self._attempts[-1], chunk.stats), len(chunk.token_ids))

    def _note_early(self, token: _EarlyToken, num_tokens: int) -> None:
        """Keep where the first two tokens came from. A busy gateway may have both at once: then no time is between."""
        if self._first is None:
            self._first = token
            num_tokens -= 1
        if num_tokens:
            self._second, self._is_early = token, False

    def last_chunk(
        self, flight: Flight, now: float, reason: FinishReason | None, chunk: TokenChunk | None = None
    ) -> OutputChunk:
        """The end; ``chunk`` brings the last tokens, if there are any."""
        if chunk is not None:
            self._take(now, chunk)
        self._finished = True
        return OutputChunk(
            index=self.index,
            token_ids=() if chunk is None else chunk.token_ids,
            logprobs=() if chunk is None else chunk.logprobs,
            finish_reason=reason,
            stop_token_id=None if chunk is None else chunk.stop_token_id,
            cached_tokens=self._cached_tokens(),
            timing=self._timing(flight, now),
        )

    def _cached_tokens(self) -> int:
        """Prompt tokens found in the prefix cache of the first worker that computed the prompt."""
        for attempt in self._attempts:
            stats = attempt.stats.get(Role.DECODE if attempt.prefill is None else Role.PREFILL)
            if stats is not None:
                return stats.cached_tokens
        return 0

    def _timing(self, flight: Flight, now: float) -> RequestTiming:
        """Seconds and bytes are summed over the attempts; workers and the reason are the last one's."""
        last = self._attempts[-1]
        prefills = [stats for a in self._attempts if (stats := a.stats.get(Role.PREFILL)) is not None]
        decodes = [stats for a in self._attempts if (stats := a.stats.get(Role.DECODE)) is not None]
        pulls = [stats.pull for stats in (*prefills, *decodes) if stats.pull is not None]
        reload = joined_reloads([stats.reload for stats in (*prefills, *decodes) if stats.reload is not None])
        arrived_at = self._request.arrived_at
        first_token_at = now if self._first is None else self._first.at
        slo, admission_s = self._request.slo, self._ticket.waited_s
        prefill, decode = _summed(prefills), _summed(decodes)
        num_later, expected = self.num_tokens - 1, last.route.expected
        tpot_s = (self._last_token_at - first_token_at) / num_later if num_later > 0 else None
        return RequestTiming(
            prefill_worker=last.route.prefill.worker_id if last.route.prefill is not None else None,
            decode_worker=None if last.finished_by_prefill else last.route.decode.worker_id,
            route_reason=last.route.reason,
            admission_s=admission_s,
            route_s=self._attempts[0].began_at - arrived_at - admission_s,
            prefill_queue_s=prefill.queue_s,
            prefill_s=prefill.compute_s,
            transfer_s=prefill.transfer_s,
            exposed_transfer_s=prefill.exposed_transfer_s,
            decode_queue_s=decode.queue_s,
            decode_s=decode.compute_s,
            ttft_s=first_token_at - arrived_at,
            total_s=now - arrived_at,
            bytes_shipped=prefill.bytes_shipped,
            cached_tokens=self._cached_tokens(),
            decode_cached_tokens=decodes[-1].cached_tokens if decodes else 0,
            num_attempts=len(self._attempts),
            num_preemptions=prefill.num_preemptions + decode.num_preemptions,
            pull_outcome=pulls[-1].outcome if pulls else "",
            pulled_tokens=sum(pull.num_tokens for pull in pulls),
            bytes_pulled=sum(pull.num_bytes for pull in pulls),
            pull_s=sum(pull.seconds for pull in pulls),
            reload=reload,
            slo_ttft_met=None if slo.ttft_s is None else first_token_at - arrived_at <= slo.ttft_s,
            slo_tpot_met=None if slo.tpot_s is None else (tpot_s or 0.0) <= slo.tpot_s,
            slo_miss_expected=self._ticket.slo_miss_expected,
            tpot_s=tpot_s,
            fallback=last.route.fallback,
            expected_ttft_s=None if expected is None else expected.ttft_s,
            expected_tpot_s=None if expected is None else expected.tpot_s,
            expected_bytes_shipped=None if expected is None else expected.bytes_shipped,
            colocated_ttft_s=None if expected is None else expected.colocated_ttft_s,
            colocated_tpot_s=None if expected is None else expected.colocated_tpot_s,
            ttft_parts=self._ttft_parts(flight),
            ttst_parts=self._ttst_parts(),
        )

    def _ttft_parts(self, flight: Flight) -> TtftParts | None:
        first, request = self._first, self._request
        if first is None:
            return None
        began_at, stats = first.attempt.began_at, first.stats or _NO_STATS
        pull_s = 0.0 if stats.pull is None else stats.pull.seconds
        siblings_s = self.began_at - flight.began_at if self.index else 0.0
        return TtftParts(
            receive_s=flight.entered_at - request.arrived_at - request.tokenize_s,
            tokenize_s=request.tokenize_s,
            admission_s=flight.began_at - flight.entered_at,
            siblings_s=siblings_s,
            route_s=self._attempts[0].began_at - flight.began_at - siblings_s,
            retries_s=began_at - self._attempts[0].began_at,
            messages_s=first.at - began_at - pull_s - stats.queue_s - stats.compute_s,
            pull_s=pull_s,
            prefill_queue_s=stats.queue_s,
            prefill_s=stats.compute_s,
        )

    def _ttst_parts(self) -> TtstParts | None:
        first, second = self._first, self._second
        if first is None or second is None:
            return None
        gap_s = second.at - first.at
        if second.attempt is not first.attempt:
            return TtstParts(retries_s=gap_s)
        if first.attempt.prefill is None:
            return TtstParts(first_step_s=gap_s)
        sent, decoded = first.attempt.stats.get(Role.PREFILL) or _NO_STATS, second.stats or _NO_STATS
        return ttst_parts(
            gap_s,
            wait_s=sent.transfer_wait_s,
            exposed_s=sent.exposed_transfer_s,
            decode_queue_s=decoded.queue_s,
            first_step_s=decoded.compute_s,
        )


@dataclass(frozen=True, slots=True)
class _EarlyToken:
    """The first token of a continuation, or the second: when it came, from where, and what its worker said with it."""

    at: float
    attempt: Attempt
    stats: StageStats | None


_NO_STATS = StageStats(WorkerId(""), Role.DECODE)


def _summed(stages: Sequence[StageStats]) -> StageStats:
    """Of one stage in all attempts: seconds, bytes and preemptions added up, the rest the last one's."""
    if len(stages) == 1:  # nearly always
        return stages[0]
    last = stages[-1] if stages else StageStats(WorkerId(""), Role.DECODE)
    return last._replace(
        queue_s=sum(s.queue_s for s in stages),
        compute_s=sum(s.compute_s for s in stages),
        transfer_s=sum(s.transfer_s for s in stages),
        exposed_transfer_s=sum(s.exposed_transfer_s for s in stages),
        bytes_shipped=sum(s.bytes_shipped for s in stages),
        num_preemptions=sum(s.num_preemptions for s in stages),
    )
