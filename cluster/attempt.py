"""One try at one continuation on one route: what its two workers said so far, and what they may still hold of it."""

from __future__ import annotations

import asyncio

from cluster.view import Route, WorkerView
from cluster.worker_client import WorkerClient
from core.request import Role, SequenceSpec, SessionId, StageStats, TokenChunk
from core.tracing import AttributeValue, Span, SpanKind, TraceContext


class Attempt:
    """One try at one continuation on one route: what its two workers said so far."""

    def __init__(self, spec: SequenceSpec, route: Route, prefill: WorkerClient | None, decode: WorkerClient) -> None:
        self.spec = spec
        self.route = route
        self.prefill = prefill  # None: the decode worker prefills
        self.decode = decode
        self.session_id = SessionId(spec.sequence_id)  # one hand-over per attempt, so one name does
        self.announcing: asyncio.Task[None] | None = None
        self.began_at = 0.0  # on the router's Clock
        self.stats: dict[Role, StageStats] = {}  # each stage's latest report, which includes its earlier ones
        self.handed_over = prefill is None  # P has nothing more to say
        self.finished = False
        self.finished_by_prefill = False
        self.ended = False
        self._committed = prefill is None  # D has the K/V
        self._next_position = len(spec.output_token_ids)
        self._early: dict[int, tuple[Role, TokenChunk]] = {}  # position |-> chunk that came before its predecessor

    def take(self, stage: Role, chunk: TokenChunk) -> list[tuple[Role, TokenChunk]]:
        """Note a chunk; those whose turn it is, in order of position, each with the stage that sent it."""
        if chunk.stats is not None:
            self.stats[stage] = chunk.stats
        is_report = not chunk.token_ids and chunk.finish_reason is None
        self._committed = self._committed or stage is Role.DECODE or is_report
        if is_report:
            if stage is Role.PREFILL:
                self.leave_prefill()
            return []
        self._early[chunk.position] = (stage, chunk)
        due: list[tuple[Role, TokenChunk]] = []
        while (following := self._early.pop(self._next_position, None)) is not None:
            self._next_position += len(following[1].token_ids)
            due.append(following)
        return due

    def is_decodes_alone(self, num_tokens: int) -> bool:
        """D has the K/V and the client has P's token: P may go, nothing is lost."""
        return self._committed and num_tokens > len(self.spec.output_token_ids)

    def leave_prefill(self) -> None:
        """P has done its part."""
        self.handed_over = True
        if self.prefill is not None:
            self.prefill.close_sequence(self.spec.sequence_id)

    def worker(self, stage: Role) -> WorkerView:
        """The worker of that stage; D's, if it prefills itself."""
        if stage is Role.PREFILL and self.route.prefill is not None:
            return self.route.prefill
        return self.route.decode

    def client(self, stage: Role) -> WorkerClient:
        """The connection to ``worker(stage)``."""
        return self.prefill if stage is Role.PREFILL and self.prefill is not None else self.decode

    def span(self, context: TraceContext, request: TraceContext | None, now: float, error: str) -> Span:
        """This attempt as a span of its request's trace."""
        attributes: dict[str, AttributeValue] = {
            "prfaas.sequence_id": self.spec.sequence_id,
            "prfaas.decode_worker": self.route.decode.worker_id,
            "prfaas.place": self.route.place,
            "prfaas.route_reason": self.route.reason,
        }
        if self.route.prefill is not None:
            attributes["prfaas.prefill_worker"] = self.route.prefill.worker_id
        if self.route.fallback:
            attributes["prfaas.fallback"] = self.route.fallback
        return Span("attempt", context, request, self.began_at, now, SpanKind.CLIENT, attributes, error)

    def close(self) -> None:
        """Hear nothing more of it."""
        self.ended = True
        self.decode.close_sequence(self.spec.sequence_id)
        if self.prefill is not None:
            self.prefill.close_sequence(self.spec.sequence_id)

    def stages_to_abort(self) -> tuple[Role, ...]:
        """Stages whose worker may still hold something of it."""
        stages: list[Role] = []
        if not self.finished or self.finished_by_prefill:
            stages.append(Role.DECODE)
        if not self.finished and not self.handed_over:
            stages.append(Role.PREFILL)
        return tuple(stages)
