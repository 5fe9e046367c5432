"""A router and a membership that play what a test wrote, so that the doors are tested without workers."""

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Mapping
from dataclasses import dataclass, field, replace

from cluster.admission import AdmissionCounters
from cluster.config import ServiceConfig
from cluster.cost_model import ComputeCost, CostError, CostView, LinearCost
from cluster.finished_requests import RecentRequests
from cluster.generation import Generation
from cluster.link_tester import Pair, PairResult
from cluster.metrics import Metrics
from cluster.planner import PlannerStatus
from cluster.tokenizer import Tokenizer
from cluster.view import ClusterView, Links, ModelInfo, Offload, WorkerLoad, WorkerView
from core.cache_tiers import ReloadOutcome, ReloadReport
from core.clock import WallClock
from core.errors import Cancelled, InvalidRequest, PrfaasError
from core.fingerprint import CacheFingerprint
from core.latency_parts import TtftParts, TtstParts
from core.link import ProbeReport
from core.request import (
    ClusterId,
    EngineId,
    FinishReason,
    GenerateRequest,
    OutputChunk,
    RequestId,
    RequestTiming,
    Role,
    TokenLogprob,
    WorkerId,
)
from core.tracing import SpanLog, Tracing

MODEL = ModelInfo(
    architecture="TinyForCausalLM",
    fingerprint=CacheFingerprint("tiny", "rev", "float32", 16, "layout"),
    max_model_len=64,
    vocab_size=350,
    eos_token_ids=(0,),
    kv_bytes_per_token=128,
)
TIMING = RequestTiming(
    prefill_worker=WorkerId("prefill-0"),
    decode_worker=WorkerId("decode-0"),
    route_reason="least loaded",
    ttft_s=0.25,
    total_s=0.5,
    bytes_shipped=4096,
    cached_tokens=3,
    pull_outcome="pulled",
    pulled_tokens=2,
    bytes_pulled=256,
    pull_s=0.125,
    reload=ReloadReport(ReloadOutcome.PARTLY, 2, 1, 0.0625, "a file is damaged"),
    admission_s=0.125,
    slo_ttft_met=True,
    slo_miss_expected="slo_ttft: late",
    tpot_s=0.02,
    fallback="link_down",
    expected_ttft_s=0.2,
    expected_tpot_s=0.025,
    expected_bytes_shipped=2048,
    colocated_ttft_s=0.3,
    colocated_tpot_s=0.03,
    ttft_parts=TtftParts(
        receive_s=0.001,
        tokenize_s=0.004,
        admission_s=0.125,
        route_s=0.002,
        messages_s=0.008,
        pull_s=0.03,
        prefill_queue_s=0.02,
        prefill_s=0.06,
    ),
    ttst_parts=TtstParts(
        transfer_wait_s=0.01, transfer_s=0.02, decode_queue_s=0.003, first_step_s=0.016, messages_s=0.001
    ),
)
COSTS = CostView(
    {
        "tiny on a cpu": ComputeCost(
            LinearCost((0.03, 2e-4, 5e-9), 7, CostError(7, 0.1, 0.2, -0.05)), LinearCost((0.02, 1e-3, 1e-7))
        )
    },
    {(ClusterId("local"), ClusterId("local")): LinearCost((1e-3, 1e-9))},
)


def worker(name: str, role: Role, *, draining: bool = False, load: WorkerLoad | None = None) -> WorkerView:
    return WorkerView(
        worker_id=WorkerId(name),
        engine_id=EngineId(f"{name}-e"),
        cluster_id=ClusterId("local"),
        address="127.0.0.1:1",
        role=role,
        draining=draining,
        lease_expires_at=10.0,
        model=MODEL,
        transport="tcp",
        pages_total=100,
        load=load or WorkerLoad(pages_free=90, pages_cached=4, bytes_sent=1024, bytes_received=2048),
    )


class FixedMembership:
    """Always the same cluster, until a test sets another."""

    def __init__(self) -> None:
        self.workers = (worker("decode-0", Role.DECODE), worker("prefill-0", Role.PREFILL))
        self.served: ModelInfo | None = MODEL
        self.links: Links = {}
        self.probes_by_outcome: Mapping[str, int] = {}
        self.offload = Offload(2048, reason="balances both prefill stages")

    def view(self) -> ClusterView:
        return ClusterView(0.0, self.workers, self.links, COSTS, self.offload)

    def model(self) -> ModelInfo | None:
        return self.served


@dataclass
class ScriptedPlanner:
    """A planner that has done what a test says."""

    status: PlannerStatus = field(default_factory=lambda: PlannerStatus("dual"))
    scaled: list[tuple[Role, int | None]] = field(default_factory=list)

    def scale(self, role: Role, size: int | None) -> str:
        if size is not None and size > 3:
            raise InvalidRequest("replicas", "must be from min_replicas 1 to max_replicas 3 of the decode pool, got 4")
        self.scaled.append((role, size))
        return f"{role}: held at {size}"


class ScriptedLinks:
    """Links whose tests end as a test has set them: ``reports`` by receiving worker, all of prefill-0."""

    def __init__(self) -> None:
        self.reports = {"decode-0": ProbeReport("tcp", 4096, True, 4096, 1e-6, 0.002)}

    async def test_all(self) -> AsyncIterator[PairResult]:
        sender = WorkerId("prefill-0")
        for receiver, report in self.reports.items():
            pair = Pair(EngineId("e0"), EngineId(receiver), sender, WorkerId(receiver))
            yield PairResult(pair, report, len(self.reports))


@dataclass(frozen=True)
class Counters:
    num_requests: int = 5
    num_retries: int = 2
    num_resumes: int = 1
    retries_by_reason: Mapping[str, int] = field(default_factory=lambda: {"prefill worker lost": 2})
    resumes_by_reason: Mapping[str, int] = field(default_factory=lambda: {"decode worker lost": 1})
    admission: AdmissionCounters = field(default_factory=AdmissionCounters)
    fallbacks_by_reason: Mapping[str, int] = field(default_factory=lambda: {"link_down": 3})
    routes_by_place: Mapping[str, int] = field(default_factory=lambda: {"local": 4, "colocated": 1})


class ScriptedRouter:
    """Answers every request with the tokens of ``answer``, in ``chunk_size`` pieces, all n continuations in turn.

    error: raised instead of (or, after ``error_after`` chunks, during) an answer.
    gate: when cleared, answers wait before their last token; ``started`` tells that they do.
    """

    def __init__(self, answer: tuple[int, ...]) -> None:
        self.answer = answer
        self.chunk_size = 1
        self.error: PrfaasError | None = None
        self.error_after = 0
        self.stop_token_id: int | None = None
        self.gate = asyncio.Event()
        self.gate.set()
        self.started = asyncio.Event()
        self.closed = asyncio.Event()  # a generator ended before its answer did
        self.requests: list[GenerateRequest] = []
        self.stopped: list[tuple[RequestId, int]] = []
        self.counters = Counters()
        self._inflight: dict[RequestId, asyncio.Event] = {}

    @property
    def num_inflight(self) -> int:
        return len(self._inflight)

    async def stop(self, request_id: RequestId, index: int) -> None:
        self.stopped.append((request_id, index))

    def abort(self, request_id: RequestId) -> bool:
        event = self._inflight.get(request_id)
        if event is not None:
            event.set()
        return event is not None

    async def generate(self, request: GenerateRequest) -> AsyncGenerator[OutputChunk, None]:
        self.requests.append(request)
        aborted = self._inflight[request.request_id] = asyncio.Event()
        finished = False
        try:
            for num_chunks, chunk in enumerate(self._play(request)):
                if self.error is not None and num_chunks >= self.error_after:
                    raise self.error
                if (request.request_id, chunk.index) in self.stopped and chunk.finish_reason is None:
                    continue
                if not self.gate.is_set() and chunk.finish_reason is not None:
                    await self._wait(aborted)
                yield chunk
            finished = True
        finally:
            del self._inflight[request.request_id]
            if not finished:
                self.closed.set()

    async def _wait(self, aborted: asyncio.Event) -> None:
        self.started.set()
        waits = [asyncio.ensure_future(event.wait()) for event in (self.gate, aborted)]
        try:
            await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for wait in waits:
                wait.cancel()
        if aborted.is_set():
            raise Cancelled("aborted by the client")

    def _play(self, request: GenerateRequest) -> list[OutputChunk]:
        sampling = request.sampling
        assert sampling.max_tokens is not None
        tokens = self.answer[: sampling.max_tokens]
        ended = len(tokens) == len(self.answer)
        chunks = []
        for start in range(0, len(tokens), self.chunk_size):
            piece = tokens[start : start + self.chunk_size]
            logprobs: tuple[TokenLogprob, ...] = ()
            if sampling.logprobs is not None:
                top = tuple((3 + k, -1.0 - k) for k in range(sampling.logprobs))
                logprobs = tuple(TokenLogprob(t, -0.5, top) for t in piece)
            for index in range(sampling.n):
                chunk = OutputChunk(index=index, token_ids=piece, logprobs=logprobs, cached_tokens=3)
                if start + self.chunk_size >= len(tokens):
                    reason = FinishReason.STOP if ended else FinishReason.LENGTH
                    stop_token = self.stop_token_id if ended else None
                    chunk = replace(chunk, finish_reason=reason, stop_token_id=stop_token, timing=TIMING)
                chunks.append(chunk)
        return chunks


@dataclass
class Gateway:
    """What launch composes, around a scripted router."""

    tokenizer: Tokenizer
    router: ScriptedRouter
    membership: FixedMembership
    links: ScriptedLinks
    planner: ScriptedPlanner
    metrics: Metrics
    config: ServiceConfig
    clock: WallClock
    generation: Generation
    requests: RecentRequests
    spans: SpanLog  # of every request


def gateway(tokenizer: Tokenizer, answer: str, config: ServiceConfig) -> Gateway:
    router = ScriptedRouter(tokenizer.encode(answer, field="answer"))
    membership = FixedMembership()
    planner = ScriptedPlanner()
    metrics = Metrics(membership, router, lambda *_: None, planner)
    clock = WallClock()
    requests, spans = RecentRequests(), SpanLog()
    generation = Generation(
        router,
        membership,
        tokenizer,
        metrics,
        config,
        clock,
        seeds=lambda: 7,
        tracing=Tracing(spans, 1.0),
        watchers=(requests,),
    )
    return Gateway(
        tokenizer, router, membership, ScriptedLinks(), planner, metrics, config, clock, generation, requests, spans
    )
