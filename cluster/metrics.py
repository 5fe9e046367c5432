"""Which numbers does the gateway publish at /metrics, and from where does each of them come?

Requests are observed when they end (``observe``); everything that somebody else counts already, the router's
retries and the workers' loads, is read when Prometheus scrapes, so no number is kept twice. Base units are seconds
and bytes. Labels are bounded: doors, outcomes, reasons and workers, never clients, prompts or model names.
The registry is the gateway's own, so two gateways in one process (tests) do not meet.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from enum import StrEnum

from prometheus_client import CollectorRegistry, Counter, Histogram
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily
from prometheus_client.exposition import generate_latest
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector
from prometheus_client.utils import floatToGoString

from cluster.admission import WAIT_BUCKETS_S, AdmissionCounters
from cluster.cluster_links import Capacity, ClusterPair, by_cluster_pair
from cluster.cost_model import CostView, cost_lines
from cluster.front_door import ClusterMembership, Door, FleetPlanner, RequestRouter
from cluster.planner import PlannerStatus
from cluster.view import WorkerView
from core.errors import Cancelled, DeadlineExceeded, InvalidRequest, NoRoute, Overloaded
from core.request import RequestTiming

_TTFT_BUCKETS_S = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 20.0, 40.0, 80.0, 160.0)
_TPOT_BUCKETS_S = (0.0025, 0.005, 0.01, 0.015, 0.02, 0.03, 0.04, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.5, 1.0, 2.5)
_E2E_BUCKETS_S = (0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 20.0, 40.0, 60.0, 120.0, 240.0, 480.0, 960.0)


# Relative: -0.5 is half of what it took, 1 is twice that.
_ERROR_BUCKETS = (-0.9, -0.75, -0.5, -0.25, -0.1, -0.05, 0.0, 0.05, 0.1, 0.25, 0.5, 1.0, 2.0, 4.0, 9.0)


class Outcome(StrEnum):
    """How a request ended, as the ``outcome`` label."""

    OK = "ok"
    INVALID = "invalid"
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
    """The gateway's Prometheus registry; ``observe`` and ``refuse`` are its only writers."""

    def __init__(
        self, membership: ClusterMembership, router: RequestRouter, capacity: Capacity, planner: FleetPlanner
    ) -> None:
        """``capacity``: configured bytes/s between two clusters (``KvTransferConfig.capacity``)."""
        self.registry = CollectorRegistry()
        self._requests = Counter(
            "prfaas_requests", "Requests by how they ended.", ("door", "outcome"), registry=self.registry
        )
        self._ttft = Histogram(
            "prfaas_time_to_first_token_seconds",
            "From a request's arrival at the gateway to its first token.",
            buckets=_TTFT_BUCKETS_S,
            registry=self.registry,
        )
        self._tpot = Histogram(
            "prfaas_time_per_output_token_seconds",
            "Mean time between tokens of one continuation, after its first.",
            buckets=_TPOT_BUCKETS_S,
            registry=self.registry,
        )
        self._e2e = Histogram(
            "prfaas_e2e_request_latency_seconds",
            "From a request's arrival at the gateway to its end, of requests that ended well.",
            buckets=_E2E_BUCKETS_S,
            registry=self.registry,
        )
        self._prompt_tokens = Counter("prfaas_prompt_tokens", "Prompt tokens of requests.", registry=self.registry)
        self._cached_tokens = Counter(
            "prfaas_cached_tokens",
            "Prompt tokens that a prefill worker found in its prefix cache.",
            registry=self.registry,
        )
        self._slo = Counter(
            "prfaas_slo_requests",
            "Requests with an objective, by what became of it; goodput is met over all.",
            ("result",),
            registry=self.registry,
        )
        self._generated_tokens = Counter("prfaas_generated_tokens", "Tokens sent to clients.", registry=self.registry)
        self._forecast_error = Histogram(
            "prfaas_forecast_relative_error",
            "How far off a route's forecast was, (expected - measured) / measured, of sequences that needed one try.",
            ("of",),
            buckets=_ERROR_BUCKETS,
            registry=self.registry,
        )
        self.registry.register(_AtScrape(membership, router, capacity))
        self.registry.register(_PlanAtScrape(planner))

    def refuse(self, door: Door, error: BaseException) -> None:
        """Count a request that ended with ``error`` before anything was generated."""
        self._requests.labels(door, Outcome.of(error)).inc()

    def observe(self, record: RequestRecord) -> None:
        """Count a request that has ended."""
        self._requests.labels(record.door, record.outcome).inc()
        self._prompt_tokens.inc(record.prompt_tokens)
        self._cached_tokens.inc(record.cached_tokens)
        self._generated_tokens.inc(record.generated_tokens)
        if record.ttft_s is not None:
            self._ttft.observe(record.ttft_s)
        for tpot_s in record.tpot_s:
            self._tpot.observe(tpot_s)
        if record.slo_result is not None:
            self._slo.labels(record.slo_result).inc()
        if record.outcome is Outcome.OK:
            self._e2e.observe(record.e2e_s)
        for timing in record.timings:
            for of, error in forecast_errors(timing).items():
                self._forecast_error.labels(of).observe(error)

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
        yield GaugeMetricFamily(
            "prfaas_requests_inflight", "Requests that run or wait for their turn.", value=self._router.num_inflight
        )
        counters = self._router.counters
        yield _by_reason(
            "prfaas_retries", "Tries repeated before their first token, by reason.", counters.retries_by_reason.items()
        )
        yield _by_reason(
            "prfaas_resumes",
            "Continuations gone on elsewhere with their tokens so far, by reason.",
            counters.resumes_by_reason.items(),
        )
        yield from _of_admission(counters.admission)
        yield _by_reason(
            "prfaas_fallbacks",
            "Routes that an intact cluster would not have taken, or that were refused for that, by reason.",
            counters.fallbacks_by_reason.items(),
        )
        yield _by_reason(
            "prfaas_routes",
            "Routes by where the prompt is prefilled: local, offloaded to another cluster, or colocated with decoding.",
            counters.routes_by_place.items(),
            label="place",
        )
        yield _by_reason(
            "prfaas_link_self_tests",
            "Self-tests of a pair of workers: passed, or the kind of the error.",
            self._membership.probes_by_outcome.items(),
            label="outcome",
        )
        view = self._membership.view()
        yield from _of_workers(view.workers)
        yield from _of_links(by_cluster_pair(view, self._capacity))
        yield from _of_costs(view.costs)


def _of_admission(admission: AdmissionCounters) -> Iterator[Metric]:
    yield _by_reason(
        "prfaas_rejections", "Requests refused as overload, by the bound.", admission.refusals_by_reason.items()
    )
    yield _by_reason(
        "prfaas_slo_misses_served",
        "Requests served although a miss of that objective was predicted.",
        admission.misses_served_by_reason.items(),
    )
    queued = GaugeMetricFamily(
        "prfaas_queued_continuations", "Continuations that wait in the gateway for their turn.", labels=("tenant",)
    )
    for tenant, size in admission.queued_by_tenant.items():
        queued.add_metric((tenant,), size)
    yield queued
    bounds = (*map(floatToGoString, WAIT_BUCKETS_S), "+Inf")
    yield HistogramMetricFamily(
        "prfaas_admission_wait_seconds",
        "Waited in the gateway for a turn, of requests that got one, were refused or went away.",
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
        changes = CounterMetricFamily(
            "prfaas_plan_changes", "Changes of the plan: what changed, and why.", labels=("kind", "reason")
        )
        for (kind, reason), count in status.changes.items():
            changes.add_metric((kind, reason), count)
        yield changes
        conversions = CounterMetricFamily(
            "prfaas_role_conversions", "Workers told another role, by how it ended.", labels=("to", "outcome")
        )
        for (role, outcome), count in status.conversions.items():
            conversions.add_metric((role, outcome), count)
        yield conversions
        yield CounterMetricFamily(
            "prfaas_planner_failures", "Looks of the planner that failed.", value=status.num_failures
        )
        yield from _of_plan(status)


def _of_plan(status: PlannerStatus) -> Iterator[Metric]:
    """Gauges of the last target; none before there is one."""
    target = status.target
    if target is None:
        return
    yield GaugeMetricFamily(
        "prfaas_plan_threshold_tokens",
        "Prompts of which more must be computed go to PrfaaS clusters; +Inf: none.",
        value=target.threshold_tokens,
    )
    yield GaugeMetricFamily(
        "prfaas_plan_bandwidth_abundant", "1 when caches of other clusters may be fetched.", value=target.abundant
    )
    workers = GaugeMetricFamily("prfaas_plan_workers", "Local workers that should have a role.", labels=("role",))
    workers.add_metric(("prefill",), target.roles.num_prefill)
    workers.add_metric(("decode",), target.roles.num_decode)
    yield workers
    yield GaugeMetricFamily("prfaas_plan_changing_workers", "Workers that change.", value=len(status.changing))
    numbers = GaugeMetricFamily(
        "prfaas_plan_number", "What the plan rests on; docs/planning.md says each unit.", labels=("name",)
    )
    for name, value in target.numbers.items():
        numbers.add_metric((name,), value)
    yield numbers
    gain = GaugeMetricFamily(
        "prfaas_disaggregation_gain_ratio",
        "The fleet over the same local workers colocated; above 1: disaggregation is better.",
        labels=("of",),
    )
    if target.gain is not None:
        gain.add_metric(("throughput",), target.gain.throughput_ratio)
        gain.add_metric(("ttft",), target.gain.ttft_ratio)
        gain.add_metric(("tpot",), target.gain.tpot_ratio)
    yield gain


def _by_reason(name: str, doc: str, counts: Iterable[tuple[str, int]], label: str = "reason") -> Metric:
    family = CounterMetricFamily(name, doc, labels=(label,))
    for reason, count in counts:
        family.add_metric((reason,), count)
    return family


def _of_links(pairs: tuple[ClusterPair, ...]) -> Iterator[Metric]:
    """One sample for each ordered pair of clusters; what is not known has none."""
    for kind, families in ((GaugeMetricFamily, _LINK_GAUGES), (CounterMetricFamily, _LINK_COUNTERS)):
        for name, doc, value_of in families:
            family = kind(f"prfaas_link_{name}", doc, labels=("from_cluster", "to_cluster", "path"))
            for pair in pairs:
                if (value := value_of(pair)) is not None:
                    family.add_metric((pair.from_cluster, pair.to_cluster, ",".join(pair.paths)), value)
            yield family


def _of_costs(costs: CostView) -> Iterator[Metric]:
    """How good the cost model is: one sample for each kind of work of each kind of worker, or pair of clusters."""
    errors = GaugeMetricFamily(
        "prfaas_cost_relative_error",
        "Of the latest predictions of single steps and transfers: p50 and p90 of |error|, and the bias.",
        labels=("work", "of", "statistic"),
    )
    samples = CounterMetricFamily("prfaas_cost_samples", "Measurements that were learnt from.", labels=("work", "of"))
    for line in cost_lines(costs):
        samples.add_metric((line.work, line.of), line.cost.samples)
        for statistic in ("p50", "p90", "bias"):
            errors.add_metric((line.work, line.of, statistic), getattr(line.cost.error, statistic))
    yield errors
    yield samples


def _of_workers(workers: tuple[WorkerView, ...]) -> Iterator[Metric]:
    pulls = CounterMetricFamily(
        "prfaas_worker_pulls",
        "Pulls of other workers' cached pages into this one, by how they ended; see docs/life-of-a-request.md.",
        labels=("worker", "role", "cluster", "outcome"),
    )
    for worker in workers:
        for outcome, count in worker.load.pulls:
            pulls.add_metric((worker.worker_id, worker.role, worker.cluster_id, outcome), count)
    yield pulls
    for kind, families in ((GaugeMetricFamily, _WORKER_GAUGES), (CounterMetricFamily, _WORKER_COUNTERS)):
        for name, doc, value_of in families:
            family = kind(f"prfaas_worker_{name}", doc, labels=("worker", "role", "cluster"))
            for worker in workers:
                family.add_metric((worker.worker_id, worker.role, worker.cluster_id), value_of(worker))
            yield family


_WorkerFamilies = tuple[tuple[str, str, Callable[[WorkerView], float]], ...]

_WORKER_GAUGES: _WorkerFamilies = (
    ("ready", "1 when the worker takes sequences, 0 when it drains.", lambda w: not w.draining),
    ("running_sequences", "Sequences in the batch.", lambda w: w.load.num_running),
    ("waiting_sequences", "Sequences in the queue.", lambda w: w.load.num_waiting),
    ("waiting_tokens", "Tokens of known prompts that are not computed yet.", lambda w: w.load.num_waiting_tokens),
    ("pages", "Pages of the KV pool.", lambda w: w.pages_total),
    ("pages_free", "Pages that are free, or cached and evictable.", lambda w: w.load.pages_free),
    ("pages_cached", "Evictable pages that hold a prefix.", lambda w: w.load.pages_cached),
    ("pages_quarantined", "Pages of broken grants, until no write can land.", lambda w: w.load.pages_quarantined),
    ("kv_sessions", "KV hand-overs under way.", lambda w: w.load.num_sessions),
)
_WORKER_COUNTERS: _WorkerFamilies = (
    ("kv_sent_bytes", "KV bytes sent.", lambda w: w.load.bytes_sent),
    ("kv_received_bytes", "KV bytes received.", lambda w: w.load.bytes_received),
    ("prompt_tokens", "Prompt tokens of the sequences it started.", lambda w: w.load.prompt_tokens),
    ("generated_tokens", "Tokens it sampled.", lambda w: w.load.generated_tokens),
    ("cached_tokens", "Prompt tokens found in its prefix cache.", lambda w: w.load.cached_tokens),
    ("pulled_tokens", "Tokens whose K/V was pulled from other workers' caches.", lambda w: w.load.pulled_tokens),
    ("pulled_bytes", "KV bytes pulled from other workers' caches.", lambda w: w.load.pulled_bytes),
    ("preemptions", "Sequences preempted because pages ran out.", lambda w: w.load.num_preemptions),
)

_LinkFamilies = tuple[tuple[str, str, Callable[[ClusterPair], float | None]], ...]

# docs/links.md says what each of them means.
_LINK_GAUGES: _LinkFamilies = (
    ("pairs", "Pairs of workers.", lambda p: p.num_links),
    ("pairs_usable", "Pairs of workers whose link may be used.", lambda p: p.num_usable),
    ("connections", "Connections that live now.", lambda p: p.connections),
    ("capacity_bytes_per_second", "What the path is configured to carry.", lambda p: p.capacity),
    ("goodput_bytes_per_second", "What was seen to fit on the path: a lower bound.", lambda p: p.measured),
    ("believed_bytes_per_second", "What the path is believed to carry now.", lambda p: p.carries),
    ("throughput_bytes_per_second", "What all workers send now.", lambda p: p.throughput),
    ("utilisation_ratio", "Throughput over capacity, or over goodput if none is configured.", lambda p: p.utilisation),
    ("rtt_seconds", "Mean smoothed round trip.", lambda p: p.rtt_s),
    ("queued_bytes", "Bytes that wait to be sent.", lambda p: p.bytes_queued),
)
_LINK_COUNTERS: _LinkFamilies = (
    ("sent_bytes", "Payload bytes sent, as on the wire.", lambda p: p.bytes_sent),
    ("retransmits", "TCP segments sent again.", lambda p: p.retransmits),
    ("reconnects", "Connections that broke and were made again.", lambda p: p.reconnects),
    ("codec_changes", "Times that K/V was encoded otherwise from then on; each is logged.", lambda p: p.codec_changes),
    ("falls", "Times that a path meant for RDMA or shared memory was found to be TCP.", lambda p: p.falls),
)
