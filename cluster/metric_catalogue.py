"""Which Prometheus metrics are there, and what does each of them mean? All of them, and nothing else knows a name.

``cluster/metrics.py`` gives them their values; docs/metrics.md is made of this file (``prfaas metrics``), and the
Grafana dashboards are tested against it. The conventions are Prometheus' own: base units (seconds, bytes) in the name,
``_total`` on counters, histograms rather than gauges for latency, one fixed prefix, labels whose values are few.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from enum import StrEnum

PREFIX = "prfaas_"


class Kind(StrEnum):
    """What may become of its value: only more, anything, or observations in buckets."""

    COUNTER = "counter"
    GAUGE = "gauge"
    HISTOGRAM = "histogram"


@dataclass(frozen=True, slots=True)
class Instrument:
    """One metric. ``name`` has the prefix, and no ``_total``: the client library puts that on counters."""

    name: str
    kind: Kind
    doc: str
    labels: tuple[str, ...] = ()
    buckets: tuple[float, ...] = ()  # upper bounds, of a histogram; +Inf is understood

    @property
    def exposed(self) -> str:
        """The name that queries use; of a histogram, without ``_bucket``, ``_count`` and ``_sum``."""
        return f"{self.name}_total" if self.kind is Kind.COUNTER else self.name

    @property
    def series(self) -> tuple[str, ...]:
        """Every name that a scrape has of it."""
        if self.kind is not Kind.HISTOGRAM:
            return (self.exposed,)
        # What may be below 0 has no sum that only grows, and so none at all.
        suffixes = ("_bucket", "_count", "_sum")[: 2 if self.buckets[0] < 0 else 3]
        return tuple(f"{self.name}{suffix}" for suffix in suffixes)


def _counter(name: str, doc: str, *labels: str) -> Instrument:
    return Instrument(PREFIX + name, Kind.COUNTER, doc, labels)


def _gauge(name: str, doc: str, *labels: str) -> Instrument:
    return Instrument(PREFIX + name, Kind.GAUGE, doc, labels)


def _histogram(name: str, doc: str, buckets: tuple[float, ...], *labels: str) -> Instrument:
    return Instrument(PREFIX + name, Kind.HISTOGRAM, doc, labels, buckets)


_TTFT_BUCKETS_S = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 20.0, 40.0, 80.0, 160.0)
_TPOT_BUCKETS_S = (0.0025, 0.005, 0.01, 0.015, 0.02, 0.03, 0.04, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.5, 1.0, 2.5)
_E2E_BUCKETS_S = (0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 20.0, 40.0, 60.0, 120.0, 240.0, 480.0, 960.0)
# Parts are from a message's way to a long queue.
_PART_BUCKETS_S = (0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 40.0, 160.0)
WAIT_BUCKETS_S = (0.001, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 20.0, 40.0, 80.0, 160.0)
# Relative: -0.5 is half of what it took, 1 is twice that.
_ERROR_BUCKETS = (-0.9, -0.75, -0.5, -0.25, -0.1, -0.05, 0.0, 0.05, 0.1, 0.25, 0.5, 1.0, 2.0, 4.0, 9.0)

# ---- the service ----

BUILD_INFO = _gauge("build_info", "1, of the version that runs.", "version")

# ---- requests ----

REQUESTS = _counter("requests", "Requests by how they ended.", "door", "outcome")
REQUESTS_INFLIGHT = _gauge("requests_inflight", "Requests that run or wait for their turn.")
TTFT = _histogram(
    "time_to_first_token_seconds", "From a request's arrival at the gateway to its first token.", _TTFT_BUCKETS_S
)
TTFT_PART = _histogram(
    "time_to_first_token_part_seconds",
    "What the time to the first token went into, of continuations that ended well; the parts' sums add up to theirs.",
    _PART_BUCKETS_S,
    "part",
)
TTST = _histogram(
    "time_to_second_token_seconds",
    "From a continuation's first token to its second, which waits for the K/V to be handed over.",
    _TTFT_BUCKETS_S,
)
TTST_PART = _histogram(
    "time_to_second_token_part_seconds",
    "What the time from the first to the second token went into; the parts' sums add up to it.",
    _PART_BUCKETS_S,
    "part",
)
TPOT = _histogram(
    "time_per_output_token_seconds", "Mean time between tokens of one continuation, after its first.", _TPOT_BUCKETS_S
)
E2E = _histogram(
    "e2e_request_latency_seconds",
    "From a request's arrival at the gateway to its end, of requests that ended well.",
    _E2E_BUCKETS_S,
)
PROMPT_TOKENS = _counter("prompt_tokens", "Prompt tokens of requests.")
CACHED_TOKENS = _counter("cached_tokens", "Prompt tokens that a prefill worker found in its prefix cache.")
GENERATED_TOKENS = _counter("generated_tokens", "Tokens sent to clients.")
SHIPPED_BYTES = _counter("shipped_bytes", "K/V bytes that requests had shipped between workers, as on the wire.")
SLO_REQUESTS = _counter(
    "slo_requests", "Requests with an objective, by what became of it; goodput is met over all.", "result"
)
RETRIES = _counter("retries", "Tries repeated before their first token, by reason.", "reason")
RESUMES = _counter("resumes", "Continuations gone on elsewhere with their tokens so far, by reason.", "reason")

# ---- structured output and tools ----

GRAMMARS = _counter("grammars", "Grammars of requests, by what came of checking them.", "reason")
TOOL_CALLS = _counter("tool_calls", "Calls of tools in answers.")
MALFORMED_TOOL_CALLS = _counter(
    "malformed_tool_calls", "What looked like a call of a tool in an answer and was none: it was given back as text."
)

# ---- admission and tenants ----

REJECTIONS = _counter("rejections", "Requests refused as overload, by the bound.", "reason")
SLO_MISSES_SERVED = _counter(
    "slo_misses_served", "Requests served although a miss of that objective was predicted.", "reason"
)
QUEUED_CONTINUATIONS = _gauge(
    "queued_continuations", "Continuations that wait in the gateway for their turn.", "tenant"
)
ADMISSION_WAIT = _histogram(
    "admission_wait_seconds",
    "Waited in the gateway for a turn, of requests that got one, were refused or went away.",
    WAIT_BUCKETS_S,
)
TENANT_REQUESTS = _counter("tenant_requests", "Requests of a tenant by how they ended.", "tenant", "outcome")
TENANT_PROMPT_TOKENS = _counter("tenant_prompt_tokens", "Prompt tokens of a tenant's requests.", "tenant")
TENANT_GENERATED_TOKENS = _counter("tenant_generated_tokens", "Tokens sent to a tenant's clients.", "tenant")
TENANT_TTFT = _histogram(
    "tenant_time_to_first_token_seconds",
    "From the arrival of a tenant's request to its first token.",
    _TTFT_BUCKETS_S,
    "tenant",
)

# ---- routing ----

ROUTES = _counter(
    "routes",
    "Routes by where the prompt is prefilled: local, offloaded to another cluster, or colocated with decoding.",
    "place",
)
FALLBACKS = _counter(
    "fallbacks",
    "Routes that an intact cluster would not have taken, or that were refused for that, by reason.",
    "reason",
)
FORECAST_ERROR = _histogram(
    "forecast_relative_error",
    "How far off a route's forecast was, (expected - measured) / measured, of sequences that needed one try.",
    _ERROR_BUCKETS,
    "of",
)
COST_ERROR = _gauge(
    "cost_relative_error",
    "Of the latest predictions of single steps and transfers: p50 and p90 of |error|, and the bias.",
    "work",
    "of",
    "statistic",
)
COST_SAMPLES = _counter("cost_samples", "Measurements that were learnt from.", "work", "of")

# ---- workers and pools: sums by role and cluster are a pool's ----

_WORKER = ("worker", "role", "cluster")
WORKER_READY = _gauge("worker_ready", "1 when the worker takes sequences, 0 when it drains.", *_WORKER)
WORKER_RUNNING = _gauge("worker_running_sequences", "Sequences in the batch.", *_WORKER)
WORKER_WAITING = _gauge("worker_waiting_sequences", "Sequences in the queue.", *_WORKER)
WORKER_WAITING_TOKENS = _gauge("worker_waiting_tokens", "Tokens of known prompts that are not computed yet.", *_WORKER)
WORKER_PAGES = _gauge("worker_pages", "Pages of the KV pool.", *_WORKER)
WORKER_PAGES_FREE = _gauge("worker_pages_free", "Pages that are free, or cached and evictable.", *_WORKER)
WORKER_PAGES_CACHED = _gauge("worker_pages_cached", "Evictable pages that hold a prefix.", *_WORKER)
WORKER_PAGES_QUARANTINED = _gauge(
    "worker_pages_quarantined", "Pages of broken grants, until no write can land.", *_WORKER
)
WORKER_KV_SESSIONS = _gauge("worker_kv_sessions", "KV hand-overs under way.", *_WORKER)
WORKER_KV_SENT = _counter("worker_kv_sent_bytes", "KV bytes sent.", *_WORKER)
WORKER_KV_RECEIVED = _counter("worker_kv_received_bytes", "KV bytes received.", *_WORKER)
WORKER_PROMPT_TOKENS = _counter("worker_prompt_tokens", "Prompt tokens of the sequences it started.", *_WORKER)
WORKER_GENERATED_TOKENS = _counter("worker_generated_tokens", "Tokens it sampled.", *_WORKER)
WORKER_CACHED_TOKENS = _counter("worker_cached_tokens", "Prompt tokens found in its prefix cache.", *_WORKER)
WORKER_PULLS = _counter(
    "worker_pulls",
    "Pulls of other workers' cached pages into this one, by how they ended; see docs/life-of-a-request.md.",
    *_WORKER,
    "outcome",
)
WORKER_PULLED_TOKENS = _counter(
    "worker_pulled_tokens", "Tokens whose K/V was pulled from other workers' caches.", *_WORKER
)
WORKER_PULLED_BYTES = _counter("worker_pulled_bytes", "KV bytes pulled from other workers' caches.", *_WORKER)
_TIER = (*_WORKER, "tier")
WORKER_TIER_PAGES = _gauge("worker_tier_pages", "Pages that a lower tier of its prefix cache has room for.", *_TIER)
WORKER_TIER_PAGES_USED = _gauge("worker_tier_pages_used", "Pages of them that hold a prefix.", *_TIER)
WORKER_TIER_BANDWIDTH = _gauge(
    "worker_tier_load_bytes_per_second", "What loading from a lower tier was measured to reach.", *_TIER
)
WORKER_TIER_STORED = _counter("worker_tier_stored_pages", "Pages copied into a lower tier.", *_TIER)
WORKER_TIER_LOADED_TOKENS = _counter("worker_tier_loaded_tokens", "Tokens loaded from a lower tier.", *_TIER)
WORKER_TIER_DROPPED = _counter(
    "worker_tier_dropped_pages",
    "Pages that a lower tier dropped: evicted for want of room, damaged or foreign files; see docs/cache-tiers.md.",
    *_TIER,
    "reason",
)
WORKER_RELOADS = _counter(
    "worker_reloads",
    "Prompts whose prefix went on in a lower tier, by what became of that; see docs/cache-tiers.md.",
    *_WORKER,
    "outcome",
)
WORKER_PAGES_LOST = _counter(
    "worker_pages_lost",
    "Cached pages evicted before they were copied to a lower tier; 0 without one.",
    *_WORKER,
)
WORKER_PREEMPTIONS = _counter("worker_preemptions", "Sequences preempted because pages ran out.", *_WORKER)
WORKER_ENGINE_FALLBACKS = _counter(
    "worker_engine_fallbacks", "Times its engine left compiled code or graphs; `prfaas status` says why.", *_WORKER
)
WORKER_PROMPT_STEPS = _counter(
    "worker_prompt_steps",
    "Steps of its engine that held prompts, by what bounded these: `whole` (nothing), `tokens`, `tpot`, `least`; see "
    "docs/colocated-modes.md.",
    *_WORKER,
    "bound",
)
WORKER_DECODE_BESIDE = _counter(
    "worker_decode_beside_steps", "Decoding steps between or beside the layers of prompts' steps.", *_WORKER
)
WORKER_CASCADE_STEPS = _counter(
    "worker_cascade_steps", "Decoding steps that read pages once which several of their sequences share.", *_WORKER
)

# ---- links; docs/links.md says what each of them means ----

_LINK = ("from_cluster", "to_cluster", "path")
LINK_SELF_TESTS = _counter(
    "link_self_tests", "Self-tests of a pair of workers: passed, or the kind of the error.", "outcome"
)
LINK_PAIRS = _gauge("link_pairs", "Pairs of workers.", *_LINK)
LINK_PAIRS_USABLE = _gauge("link_pairs_usable", "Pairs of workers whose link may be used.", *_LINK)
LINK_CONNECTIONS = _gauge("link_connections", "Connections that live now.", *_LINK)
LINK_CAPACITY = _gauge("link_capacity_bytes_per_second", "What the path is configured to carry.", *_LINK)
LINK_GOODPUT = _gauge("link_goodput_bytes_per_second", "What was seen to fit on the path: a lower bound.", *_LINK)
LINK_BELIEVED = _gauge("link_believed_bytes_per_second", "What the path is believed to carry now.", *_LINK)
LINK_THROUGHPUT = _gauge("link_throughput_bytes_per_second", "What all workers send now.", *_LINK)
LINK_UTILISATION = _gauge(
    "link_utilisation_ratio", "Throughput over capacity, or over goodput if none is configured.", *_LINK
)
LINK_RTT = _gauge("link_rtt_seconds", "Mean smoothed round trip.", *_LINK)
LINK_QUEUED = _gauge("link_queued_bytes", "Bytes that wait to be sent.", *_LINK)
LINK_SENT = _counter("link_sent_bytes", "Payload bytes sent, as on the wire.", *_LINK)
LINK_RETRANSMITS = _counter("link_retransmits", "TCP segments sent again.", *_LINK)
LINK_RECONNECTS = _counter("link_reconnects", "Connections that broke and were made again.", *_LINK)
LINK_CODEC_CHANGES = _counter(
    "link_codec_changes", "Times that K/V was encoded otherwise from then on; each is logged.", *_LINK
)
LINK_FALLS = _counter("link_falls", "Times that a path meant for RDMA or shared memory was found to be TCP.", *_LINK)

# ---- the plan ----

PLANNER_MODE = _gauge("planner_mode", "1, of the mode that the planner is in.", "mode")
PLAN_CHANGES = _counter("plan_changes", "Changes of the plan: what changed, and why.", "kind", "reason")
ROLE_CONVERSIONS = _counter("role_conversions", "Workers told another role, by how it ended.", "to", "outcome")
PLANNER_FAILURES = _counter("planner_failures", "Looks of the planner that failed.")
PLAN_THRESHOLD = _gauge(
    "plan_threshold_tokens", "Prompts of which more must be computed go to PrfaaS clusters; +Inf: none."
)
PLAN_ABUNDANT = _gauge("plan_bandwidth_abundant", "1 when caches of other clusters may be fetched.")
PLAN_WORKERS = _gauge("plan_workers", "Local workers that should have a role.", "role")
PLAN_CHANGING_WORKERS = _gauge("plan_changing_workers", "Workers that change.")
PLAN_NUMBER = _gauge("plan_number", "What the plan rests on; docs/planning.md says each unit.", "name")
POOL_WORKERS = _gauge(
    "pool_workers", "Workers of a pool whose size may change: desired, and what has become of that.", "pool", "state"
)
POOL_STARTS = _counter("pool_starts", "Starts, drains and deaths of workers of such pools.", "pool", "outcome")
POOL_START_SECONDS = _gauge(
    "pool_start_seconds", "From asking for a worker to its being ready, of the last starts.", "pool"
)
POOL_HELD = _gauge("pool_held", "1 while an operator holds the pool's size, 0 while it follows the load.", "pool")
DISAGGREGATION_GAIN = _gauge(
    "disaggregation_gain_ratio",
    "The fleet over the same local workers colocated; above 1: disaggregation is better.",
    "of",
)


@dataclass(frozen=True, slots=True)
class Section:
    """Metrics that are read together."""

    title: str
    instruments: tuple[Instrument, ...]


SECTIONS = (
    Section("The service", (BUILD_INFO,)),
    Section(
        "Requests",
        (
            REQUESTS,
            REQUESTS_INFLIGHT,
            TTFT,
            TTFT_PART,
            TTST,
            TTST_PART,
            TPOT,
            E2E,
            PROMPT_TOKENS,
            CACHED_TOKENS,
            GENERATED_TOKENS,
            SHIPPED_BYTES,
            SLO_REQUESTS,
            RETRIES,
            RESUMES,
        ),
    ),
    Section(
        "Admission and tenants",
        (
            REJECTIONS,
            SLO_MISSES_SERVED,
            QUEUED_CONTINUATIONS,
            ADMISSION_WAIT,
            TENANT_REQUESTS,
            TENANT_PROMPT_TOKENS,
            TENANT_GENERATED_TOKENS,
            TENANT_TTFT,
        ),
    ),
    Section("Structured output and tools", (GRAMMARS, TOOL_CALLS, MALFORMED_TOOL_CALLS)),
    Section("Routing", (ROUTES, FALLBACKS, FORECAST_ERROR, COST_ERROR, COST_SAMPLES)),
    Section(
        "Workers; summed by role and cluster, pools",
        (
            WORKER_READY,
            WORKER_RUNNING,
            WORKER_WAITING,
            WORKER_WAITING_TOKENS,
            WORKER_PAGES,
            WORKER_PAGES_FREE,
            WORKER_PAGES_CACHED,
            WORKER_PAGES_QUARANTINED,
            WORKER_KV_SESSIONS,
            WORKER_KV_SENT,
            WORKER_KV_RECEIVED,
            WORKER_PROMPT_TOKENS,
            WORKER_GENERATED_TOKENS,
            WORKER_CACHED_TOKENS,
            WORKER_PULLS,
            WORKER_PULLED_TOKENS,
            WORKER_PULLED_BYTES,
            WORKER_TIER_PAGES,
            WORKER_TIER_PAGES_USED,
            WORKER_TIER_BANDWIDTH,
            WORKER_TIER_STORED,
            WORKER_TIER_LOADED_TOKENS,
            WORKER_TIER_DROPPED,
            WORKER_RELOADS,
            WORKER_PAGES_LOST,
            WORKER_PREEMPTIONS,
            WORKER_ENGINE_FALLBACKS,
            WORKER_PROMPT_STEPS,
            WORKER_DECODE_BESIDE,
            WORKER_CASCADE_STEPS,
        ),
    ),
    Section(
        "Links between clusters",
        (
            LINK_SELF_TESTS,
            LINK_PAIRS,
            LINK_PAIRS_USABLE,
            LINK_CONNECTIONS,
            LINK_CAPACITY,
            LINK_GOODPUT,
            LINK_BELIEVED,
            LINK_THROUGHPUT,
            LINK_UTILISATION,
            LINK_RTT,
            LINK_QUEUED,
            LINK_SENT,
            LINK_RETRANSMITS,
            LINK_RECONNECTS,
            LINK_CODEC_CHANGES,
            LINK_FALLS,
        ),
    ),
    Section(
        "The plan",
        (
            PLANNER_MODE,
            PLAN_CHANGES,
            ROLE_CONVERSIONS,
            PLANNER_FAILURES,
            PLAN_THRESHOLD,
            PLAN_ABUNDANT,
            PLAN_WORKERS,
            PLAN_CHANGING_WORKERS,
            PLAN_NUMBER,
            POOL_WORKERS,
            POOL_STARTS,
            POOL_START_SECONDS,
            POOL_HELD,
            DISAGGREGATION_GAIN,
        ),
    ),
)
INSTRUMENTS: tuple[Instrument, ...] = tuple(i for section in SECTIONS for i in section.instruments)

# label |-> what it says, and why its values are few
LABELS = {
    "bound": "what kept a step's prompt tokens from being more; see docs/colocated-modes.md",
    "cluster": "the worker's datacenter",
    "door": "`grpc` or `http`",
    "from_cluster": "the datacenter that sends",
    "kind": "what of the plan changed: `threshold`, `bandwidth`, `role`, `pools`, ...",
    "mode": "`off`, `static` or `dual`",
    "name": "a number of docs/planning.md",
    "of": "what was predicted or compared: `ttft`, `tpot`, `bytes_shipped`, `throughput`; of costs: a kind of worker "
    "or two datacenters",
    "outcome": "how it ended: requests `ok`, `invalid`, `overloaded`, `no_route`, `deadline`, `cancelled`, `failed`, "
    "`wrong_key`; of pulls see docs/life-of-a-request.md; of reloads docs/cache-tiers.md; of self-tests "
    "`passed` or the kind of the error; of starts and drains see docs/planning.md",
    "part": "see docs/observability.md",
    "path": "what was found to carry the bytes: `tcp`, `tcp+tls1.3`, `ucx:shm`, ...",
    "place": "`local`, `offloaded` or `colocated`",
    "pool": "`prefill` or `decode`: for which a worker was started, whatever its role is now",
    "reason": "a word of a closed list; the log line beside it has the sentence",
    "result": "`met`, `ttft_missed`, `tpot_missed`, `both_missed`, `refused`, `failed`, `cancelled`",
    "role": "`prefill` or `decode`, as the worker advertises it now",
    "state": "`desired`, `ready`, `pending` (asked for) or `draining`",
    "statistic": "`p50`, `p90` or `bias`",
    "tenant": "a name in `admission.tenant_weights` (`prfaas tenant SALT` prints it; `unsalted`: no cache_salt); "
    "all that it does not name together are `other`",
    "tier": "`host` or `disk`",
    "to": "the role that a worker was told",
    "to_cluster": "the datacenter that receives",
    "version": "of prfaas",
    "work": "`prefill`, `decode` or `transfer`",
    "worker": "the worker's name, which a restart keeps",
}


def document() -> str:
    """The text of docs/metrics.md."""
    return "\n".join(_lines())


def _lines() -> Iterator[str]:
    yield "# Metrics"
    yield ""
    yield "What the gateway publishes at `/metrics` for Prometheus, at its HTTP door. A histogram `x` has the series"
    yield "`x_bucket`, `x_count` and `x_sum`. [observability.md](observability.md) says how to read them; dashboards"
    yield "that use them are in [deploy/helm/prfaas/dashboards](../deploy/helm/prfaas/dashboards)."
    for section in SECTIONS:
        yield f"\n## {section.title}\n"
        yield "| name | type | labels | what it is |"
        yield "|---|---|---|---|"
        for i in section.instruments:
            labels = ", ".join(f"`{label}`" for label in i.labels)
            yield f"| `{i.exposed}` | {i.kind} | {labels} | {_in_a_cell(i.doc)} |"
    yield "\n## Labels\n"
    yield "Their values are few, however many clients there are: none is a client, a prompt or a request.\n"
    yield "| label | what it says |"
    yield "|---|---|"
    for label, meaning in LABELS.items():
        yield f"| `{label}` | {_in_a_cell(meaning)} |"
    yield "\n---\nThis page is made by `prfaas metrics > docs/metrics.md`.\n"


def _in_a_cell(text: str) -> str:
    return text.replace("|", "\\|")
