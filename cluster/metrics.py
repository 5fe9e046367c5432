"""From where does each number at /metrics come? What they are called and mean is in metric_catalogue.py.

Requests are observed when they end (``observe``); everything that somebody else counts already, the router's
retries and the workers' loads, is read when Prometheus scrapes, so no number is kept twice. Base units are seconds
and bytes. Labels are bounded: doors, outcomes, reasons, workers and configured tenants, never clients, prompts or model
names. The registry is the gateway's own, so two gateways in one process (tests) do not meet.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, fields
from enum import StrEnum
from typing import Protocol

from prometheus_client import CollectorRegistry, Counter, Histogram
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily
from prometheus_client.exposition import generate_latest
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector
from prometheus_client.utils import floatToGoString

from cluster import metric_catalogue as catalogue
from cluster.admission import AdmissionCounters
from cluster.cluster_links import Capacity, ClusterPair, by_cluster_pair
from cluster.config import OTHER_TENANTS
from cluster.cost_model import CostView, cost_lines
from cluster.front_door import ClusterMembership, Door, FleetPlanner, RequestRouter
from cluster.metric_catalogue import WAIT_BUCKETS_S, Instrument, Kind
from cluster.planner import PlannerStatus
from cluster.version import version
from cluster.view import WorkerView
from core.cache_tiers import TierState
from core.errors import Cancelled, DeadlineExceeded, InvalidRequest, NoRoute, Overloaded, WrongKey
from core.latency_parts import TtftParts, TtstParts
from core.request import RequestId, RequestTiming
from core.tracing import TraceContext


class Outcome(StrEnum):
    """How a request ended, as the ``outcome`` label."""

    OK = "ok"
    INVALID = "invalid"
    WRONG_KEY = "wrong_key"
    OVERLOADED = "overloaded"
    NO_ROUTE = "no_route"
    DEADLINE = "deadline"
    CANCELLED = "cancelled"
    FAILED = "failed"

    @classmethod
    def of(cls, error: BaseException) -> Outcome:
        """The outcome of a request that ended with ``error``."""
        for kind, outcome in _OUTCOMES:
            if isinstance(error, kind):
                return outcome
        # CancelledError and GeneratorExit: the client went away. Every other Exception is a failure of ours.
        return cls.FAILED if isinstance(error, Exception) else cls.CANCELLED


_OUTCOMES: tuple[tuple[type[BaseException], Outcome], ...] = (
    (InvalidRequest, Outcome.INVALID),
    (WrongKey, Outcome.WRONG_KEY),
    (Overloaded, Outcome.OVERLOADED),
    (NoRoute, Outcome.NO_ROUTE),
    (DeadlineExceeded, Outcome.DEADLINE),
    (Cancelled, Outcome.CANCELLED),
)


class SloResult(StrEnum):
    """What became of a request that had an objective, as the ``result`` label.

    Goodput is ``met`` over all: jointly for each request, and what was refused or failed is a miss (DistServe, vLLM).
    """

    MET = "met"
    TTFT_MISSED = "ttft_missed"
    TPOT_MISSED = "tpot_missed"
    BOTH_MISSED = "both_missed"
    REFUSED = "refused"
    FAILED = "failed"
    CANCELLED = "cancelled"

    @classmethod
    def of(cls, outcome: Outcome, ttft_missed: bool = False, tpot_missed: bool = False) -> SloResult:
        """The result of a request that ended so; one without a second token has no TPOT to miss."""
        if outcome is Outcome.OVERLOADED:
            return cls.REFUSED
        if outcome is Outcome.CANCELLED:
            return cls.CANCELLED
        if outcome is not Outcome.OK:
            return cls.FAILED
        if ttft_missed:
            return cls.BOTH_MISSED if tpot_missed else cls.TTFT_MISSED
        return cls.TPOT_MISSED if tpot_missed else cls.MET


_NO_REQUEST = RequestId("")


@dataclass(frozen=True, slots=True)
class RequestRecord:
    """One request when it has ended; ``tpot_s`` has an entry for each continuation of two tokens or more."""

    door: Door
    outcome: Outcome
    e2e_s: float
    prompt_tokens: int
    cached_tokens: int
    generated_tokens: int
    ttft_s: float | None
    tpot_s: tuple[float, ...]
    slo_result: SloResult | None = None  # None: it had no objective
    timings: tuple[RequestTiming, ...] = ()  # of continuations that ended well
    tenant: str = OTHER_TENANTS  # as AdmissionConfig.label_of names it
    request_id: RequestId = _NO_REQUEST
    ended_at: float = 0.0  # on the gateway's Clock
    trace: TraceContext | None = None
    tokenize_s: float = 0.0
    num_tool_calls: int = 0
    num_malformed_tool_calls: int = 0


class RequestWatcher(Protocol):
    """Hears of every request that has ended, once it was prepared."""

    def observe(self, record: RequestRecord) -> None:
        """It has ended. Must be quick and must not raise."""
        ...


def forecast_errors(timing: RequestTiming) -> dict[str, float]:
    """What a route's forecast was off by, relative to what was measured; of what was measured and expected. A sequence
    that was tried again tells nothing: its seconds are those of all tries."""
    if timing.num_attempts != 1:
        return {}
    shipped = None if timing.prefill_worker is None else timing.bytes_shipped
    both = {
        "ttft": (timing.expected_ttft_s, timing.ttft_s - timing.admission_s - timing.route_s),
        "tpot": (timing.expected_tpot_s, timing.tpot_s),
        "bytes_shipped": (timing.expected_bytes_shipped, shipped),
    }
    return {
        of: (expected - measured) / measured
        for of, (expected, measured) in both.items()
        if expected is not None and measured is not None and measured > 0
    }


class Metrics:
    """The gateway's Prometheus registry; ``observe``, ``refuse`` and ``grammar`` are its only writers."""

    def __init__(
        self, membership: ClusterMembership, router: RequestRouter, capacity: Capacity, planner: FleetPlanner
    ) -> None:
        """``capacity``: configured bytes/s between two clusters (``KvTransferConfig.capacity``)."""
        self.registry = CollectorRegistry()
        self._requests = _counter(catalogue.REQUESTS, self.registry)
        self._ttft = _histogram(catalogue.TTFT, self.registry)
        self._ttft_parts = _by_part(_histogram(catalogue.TTFT_PART, self.registry), TtftParts)
        self._ttst = _histogram(catalogue.TTST, self.registry)
        self._ttst_parts = _by_part(_histogram(catalogue.TTST_PART, self.registry), TtstParts)
        self._tpot = _histogram(catalogue.TPOT, self.registry)
        self._e2e = _histogram(catalogue.E2E, self.registry)
        self._prompt_tokens = _counter(catalogue.PROMPT_TOKENS, self.registry)
        self._cached_tokens = _counter(catalogue.CACHED_TOKENS, self.registry)
        self._generated_tokens = _counter(catalogue.GENERATED_TOKENS, self.registry)
        self._shipped_bytes = _counter(catalogue.SHIPPED_BYTES, self.registry)
        self._slo = _counter(catalogue.SLO_REQUESTS, self.registry)
        self._grammars = _counter(catalogue.GRAMMARS, self.registry)
        self._tool_calls = _counter(catalogue.TOOL_CALLS, self.registry)
        self._malformed_tool_calls = _counter(catalogue.MALFORMED_TOOL_CALLS, self.registry)
        self._forecast_error = _histogram(catalogue.FORECAST_ERROR, self.registry)
        self._tenant_requests = _counter(catalogue.TENANT_REQUESTS, self.registry)
        self._tenant_prompt_tokens = _counter(catalogue.TENANT_PROMPT_TOKENS, self.registry)
        self._tenant_generated_tokens = _counter(catalogue.TENANT_GENERATED_TOKENS, self.registry)
        self._tenant_ttft = _histogram(catalogue.TENANT_TTFT, self.registry)
        self.registry.register(_AtScrape(membership, router, capacity))
        self.registry.register(_PlanAtScrape(planner))

    def refuse(self, door: Door, error: BaseException) -> None:
        """Count a request that ended with ``error`` before anything was generated."""
        self._requests.labels(door, Outcome.of(error)).inc()

    def grammar(self, finding: StrEnum) -> None:
        """Count a grammar that was asked about (grammar_check.py)."""
        self._grammars.labels(finding).inc()

    def observe(self, record: RequestRecord) -> None:
        """Count a request that has ended."""
        self._tool_calls.inc(record.num_tool_calls)
        self._malformed_tool_calls.inc(record.num_malformed_tool_calls)
        self._requests.labels(record.door, record.outcome).inc()
        self._prompt_tokens.inc(record.prompt_tokens)
        self._cached_tokens.inc(record.cached_tokens)
        self._generated_tokens.inc(record.generated_tokens)
        if record.ttft_s is not None:
            self._ttft.observe(record.ttft_s)
            self._tenant_ttft.labels(record.tenant).observe(record.ttft_s)
        for tpot_s in record.tpot_s:
            self._tpot.observe(tpot_s)
        if record.slo_result is not None:
            self._slo.labels(record.slo_result).inc()
        if record.outcome is Outcome.OK:
            self._e2e.observe(record.e2e_s)
        self._tenant_requests.labels(record.tenant, record.outcome).inc()
        self._tenant_prompt_tokens.labels(record.tenant).inc(record.prompt_tokens)
        self._tenant_generated_tokens.labels(record.tenant).inc(record.generated_tokens)
        for timing in record.timings:
            self._observe_timing(timing)

    def _observe_timing(self, timing: RequestTiming) -> None:
        self._shipped_bytes.inc(timing.bytes_shipped + timing.bytes_pulled)
        for of, error in forecast_errors(timing).items():
            self._forecast_error.labels(of).observe(error)
        if timing.ttft_parts is not None:
            for part, series in self._ttft_parts:
                series.observe(getattr(timing.ttft_parts, part))
        if timing.ttst_parts is not None:
            self._ttst.observe(timing.ttst_parts.total_s)
            for part, series in self._ttst_parts:
                series.observe(getattr(timing.ttst_parts, part))

    def render(self) -> bytes:
        """Everything in Prometheus' text format."""
        return generate_latest(self.registry)


class _AtScrape(Collector):
    """What the router and the workers count, read at the moment of the scrape."""

    def __init__(self, membership: ClusterMembership, router: RequestRouter, capacity: Capacity) -> None:
        self._membership = membership
        self._router = router
        self._capacity = capacity

    def describe(self) -> Iterable[Metric]:
        return ()  # not asked at registration: there may be no worker yet

    def collect(self) -> Iterator[Metric]:
        yield _single(catalogue.REQUESTS_INFLIGHT, self._router.num_inflight)
        yield _labelled(catalogue.BUILD_INFO, [(version(), 1)])
        counters = self._router.counters
        yield _labelled(catalogue.RETRIES, counters.retries_by_reason.items())
        yield _labelled(catalogue.RESUMES, counters.resumes_by_reason.items())
        yield from _of_admission(counters.admission)
        yield _labelled(catalogue.FALLBACKS, counters.fallbacks_by_reason.items())
        yield _labelled(catalogue.ROUTES, counters.routes_by_place.items())
        yield _labelled(catalogue.LINK_SELF_TESTS, self._membership.probes_by_outcome.items())
        view = self._membership.view()
        yield from _of_workers(view.workers)
        yield from _of_links(by_cluster_pair(view, self._capacity))
        yield from _of_costs(view.costs)


def _of_admission(admission: AdmissionCounters) -> Iterator[Metric]:
    yield _labelled(catalogue.REJECTIONS, admission.refusals_by_reason.items())
    yield _labelled(catalogue.SLO_MISSES_SERVED, admission.misses_served_by_reason.items())
    yield _labelled(catalogue.QUEUED_CONTINUATIONS, admission.queued_by_tenant.items())
    bounds = (*map(floatToGoString, WAIT_BUCKETS_S), "+Inf")
    yield HistogramMetricFamily(
        catalogue.ADMISSION_WAIT.name,
        catalogue.ADMISSION_WAIT.doc,
        buckets=list(zip(bounds, admission.wait_counts, strict=True)),
        sum_value=admission.wait_sum_s,
    )


class _PlanAtScrape(Collector):
    """What the planner aims at, by what, and how often it changed its mind."""

    def __init__(self, planner: FleetPlanner) -> None:
        self._planner = planner

    def describe(self) -> Iterable[Metric]:
        return ()

    def collect(self) -> Iterator[Metric]:
        status = self._planner.status
        yield _labelled(catalogue.PLANNER_MODE, [(status.mode, 1)])
        changes = _family(catalogue.PLAN_CHANGES)
        for (kind, reason), count in status.changes.items():
            changes.add_metric((kind, reason), count)
        yield changes
        conversions = _family(catalogue.ROLE_CONVERSIONS)
        for (role, outcome), count in status.conversions.items():
            conversions.add_metric((role, outcome), count)
        yield conversions
        yield _single(catalogue.PLANNER_FAILURES, status.num_failures)
        yield from _of_plan(status)
        yield from _of_pools(status)


def _of_plan(status: PlannerStatus) -> Iterator[Metric]:
    """Gauges of the last target; none before there is one."""
    target = status.target
    if target is None:
        return
    yield _single(catalogue.PLAN_THRESHOLD, target.threshold_tokens)
    yield _single(catalogue.PLAN_ABUNDANT, target.abundant)
    roles = (("prefill", target.roles.num_prefill), ("decode", target.roles.num_decode))
    yield _labelled(catalogue.PLAN_WORKERS, roles)
    yield _single(catalogue.PLAN_CHANGING_WORKERS, len(status.changing))
    yield _labelled(catalogue.PLAN_NUMBER, target.numbers.items())
    gain = target.gain
    ratios = () if gain is None else zip(_GAINS, (gain.throughput_ratio, gain.ttft_ratio, gain.tpot_ratio), strict=True)
    yield _labelled(catalogue.DISAGGREGATION_GAIN, ratios)


_GAINS = ("throughput", "ttft", "tpot")


def _of_pools(status: PlannerStatus) -> Iterator[Metric]:
    """Of pools whose size may change; nothing without one."""
    workers, starts = _family(catalogue.POOL_WORKERS), _family(catalogue.POOL_STARTS)
    for role, pool in status.pools.items():
        counts = (pool.wanted, sum(pool.ready.values()), len(pool.pending), len(pool.draining))
        for state, count in zip(_POOL_STATES, counts, strict=True):
            workers.add_metric((role, state), count)
    for (role, ended), count in status.starts.items():
        starts.add_metric((role, ended), count)
    yield workers
    yield starts
    known = [(role, pool.start_s) for role, pool in status.pools.items() if pool.start_s is not None]
    yield _labelled(catalogue.POOL_START_SECONDS, known)
    yield _labelled(catalogue.POOL_HELD, [(role, pool.held is not None) for role, pool in status.pools.items()])


_POOL_STATES = ("desired", "ready", "pending", "draining")


# ---- instruments of the catalogue, as the client library has them ----


def _counter(instrument: Instrument, registry: CollectorRegistry) -> Counter:
    return Counter(instrument.name, instrument.doc, instrument.labels, registry=registry)


def _histogram(instrument: Instrument, registry: CollectorRegistry) -> Histogram:
    return Histogram(instrument.name, instrument.doc, instrument.labels, buckets=instrument.buckets, registry=registry)


def _by_part(histogram: Histogram, parts: type[TtftParts | TtstParts]) -> list[tuple[str, Histogram]]:
    """The series of each part, by the field that has its seconds."""
    return [(part.name, histogram.labels(part.name.removesuffix("_s"))) for part in fields(parts)]


def _family(instrument: Instrument) -> CounterMetricFamily | GaugeMetricFamily:
    """Without a sample yet."""
    kind = CounterMetricFamily if instrument.kind is Kind.COUNTER else GaugeMetricFamily
    return kind(instrument.name, instrument.doc, labels=instrument.labels)


def _single(instrument: Instrument, value: float) -> Metric:
    family = _family(instrument)
    family.add_metric((), value)
    return family


def _labelled(instrument: Instrument, values: Iterable[tuple[str, float]]) -> Metric:
    """Of an instrument with one label."""
    family = _family(instrument)
    for label, value in values:
        family.add_metric((label,), value)
    return family


def _of_links(pairs: tuple[ClusterPair, ...]) -> Iterator[Metric]:
    """One sample for each ordered pair of clusters; what is not known has none."""
    for instrument, value_of in _LINKS:
        family = _family(instrument)
        for pair in pairs:
            if (value := value_of(pair)) is not None:
                family.add_metric((pair.from_cluster, pair.to_cluster, ",".join(pair.paths)), value)
        yield family


def _of_costs(costs: CostView) -> Iterator[Metric]:
    """How good the cost model is: one sample for each kind of work of each kind of worker, or pair of clusters."""
    errors, samples = _family(catalogue.COST_ERROR), _family(catalogue.COST_SAMPLES)
    for line in cost_lines(costs):
        samples.add_metric((line.work, line.of), line.cost.samples)
        for statistic in ("p50", "p90", "bias"):
            errors.add_metric((line.work, line.of, statistic), getattr(line.cost.error, statistic))
    yield errors
    yield samples


def _of_workers(workers: tuple[WorkerView, ...]) -> Iterator[Metric]:
    pulls = _family(catalogue.WORKER_PULLS)
    for worker in workers:
        for outcome, count in worker.load.pulls:
            pulls.add_metric((worker.worker_id, worker.role, worker.cluster_id, outcome), count)
    yield pulls
    prompt_steps = _family(catalogue.WORKER_PROMPT_STEPS)
    for worker in workers:
        for bound, count in worker.load.modes.prompt_steps:
            prompt_steps.add_metric((worker.worker_id, worker.role, worker.cluster_id, bound), count)
    yield prompt_steps
    yield from _of_tiers(workers)
    for instrument, value_of in _WORKERS:
        family = _family(instrument)
        for worker in workers:
            family.add_metric((worker.worker_id, worker.role, worker.cluster_id), value_of(worker))
        yield family


def _of_tiers(workers: tuple[WorkerView, ...]) -> Iterator[Metric]:
    """Of the lower tiers of prefix caches."""
    reloads, dropped = _family(catalogue.WORKER_RELOADS), _family(catalogue.WORKER_TIER_DROPPED)
    families = [(_family(instrument), value_of) for instrument, value_of in _TIERS]
    for worker in workers:
        labels = (worker.worker_id, worker.role, worker.cluster_id)
        for outcome, count in worker.load.reloads:
            reloads.add_metric((*labels, outcome), count)
        for state in worker.load.tiers:
            for family, value_of in families:
                family.add_metric((*labels, state.tier), value_of(state))
            reasons = (("evicted", state.evicted_pages), ("damaged", state.damaged_pages))
            for reason, count in (*reasons, ("foreign", state.foreign_pages)):
                dropped.add_metric((*labels, state.tier, reason), count)
    yield reloads
    yield dropped
    yield from (family for family, _ in families)


_TIERS: tuple[tuple[Instrument, Callable[[TierState], float]], ...] = (
    (catalogue.WORKER_TIER_PAGES, lambda t: t.pages_total),
    (catalogue.WORKER_TIER_PAGES_USED, lambda t: t.pages_used),
    (catalogue.WORKER_TIER_BANDWIDTH, lambda t: t.load_bytes_per_s),
    (catalogue.WORKER_TIER_STORED, lambda t: t.stored_pages),
    (catalogue.WORKER_TIER_LOADED_TOKENS, lambda t: t.loaded_tokens),
)
_WORKERS: tuple[tuple[Instrument, Callable[[WorkerView], float]], ...] = (
    (catalogue.WORKER_READY, lambda w: not w.draining),
    (catalogue.WORKER_RUNNING, lambda w: w.load.num_running),
    (catalogue.WORKER_WAITING, lambda w: w.load.num_waiting),
    (catalogue.WORKER_WAITING_TOKENS, lambda w: w.load.num_waiting_tokens),
    (catalogue.WORKER_PAGES, lambda w: w.pages_total),
    (catalogue.WORKER_PAGES_FREE, lambda w: w.load.pages_free),
    (catalogue.WORKER_PAGES_CACHED, lambda w: w.load.pages_cached),
    (catalogue.WORKER_PAGES_QUARANTINED, lambda w: w.load.pages_quarantined),
    (catalogue.WORKER_KV_SESSIONS, lambda w: w.load.num_sessions),
    (catalogue.WORKER_KV_SENT, lambda w: w.load.bytes_sent),
    (catalogue.WORKER_KV_RECEIVED, lambda w: w.load.bytes_received),
    (catalogue.WORKER_PROMPT_TOKENS, lambda w: w.load.prompt_tokens),
    (catalogue.WORKER_GENERATED_TOKENS, lambda w: w.load.generated_tokens),
    (catalogue.WORKER_CACHED_TOKENS, lambda w: w.load.cached_tokens),
    (catalogue.WORKER_PULLED_TOKENS, lambda w: w.load.pulled_tokens),
    (catalogue.WORKER_PULLED_BYTES, lambda w: w.load.pulled_bytes),
    (catalogue.WORKER_PAGES_LOST, lambda w: w.load.pages_lost),
    (catalogue.WORKER_PREEMPTIONS, lambda w: w.load.num_preemptions),
    (catalogue.WORKER_ENGINE_FALLBACKS, lambda w: w.load.modes.num_fallbacks),
    (catalogue.WORKER_DECODE_BESIDE, lambda w: w.load.modes.num_decode_beside),
    (catalogue.WORKER_CASCADE_STEPS, lambda w: w.load.modes.num_cascade),
)
_LINKS: tuple[tuple[Instrument, Callable[[ClusterPair], float | None]], ...] = (
    (catalogue.LINK_PAIRS, lambda p: p.num_links),
    (catalogue.LINK_PAIRS_USABLE, lambda p: p.num_usable),
    (catalogue.LINK_CONNECTIONS, lambda p: p.connections),
    (catalogue.LINK_CAPACITY, lambda p: p.capacity),
    (catalogue.LINK_GOODPUT, lambda p: p.measured),
    (catalogue.LINK_BELIEVED, lambda p: p.carries),
    (catalogue.LINK_THROUGHPUT, lambda p: p.throughput),
    (catalogue.LINK_UTILISATION, lambda p: p.utilisation),
    (catalogue.LINK_RTT, lambda p: p.rtt_s),
    (catalogue.LINK_QUEUED, lambda p: p.bytes_queued),
    (catalogue.LINK_SENT, lambda p: p.bytes_sent),
    (catalogue.LINK_RETRANSMITS, lambda p: p.retransmits),
    (catalogue.LINK_RECONNECTS, lambda p: p.reconnects),
    (catalogue.LINK_CODEC_CHANGES, lambda p: p.codec_changes),
    (catalogue.LINK_FALLS, lambda p: p.falls),
)
