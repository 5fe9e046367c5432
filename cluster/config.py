"""The one YAML of a service, as frozen dataclasses: every key, its default and what it means.

``load_config`` is the only reader of configuration files; environment variables are not a second configuration. The
class docstrings are the reference: docs/configuration.md is made of them (``prfaas config docs``). What a value may be
is checked here and in engine/config.py and kv_transfer/config.py, once, when the object is made.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path

from cluster import config_schema
from cluster.log_format import LOG_FORMATS, TEXT
from cluster.planning_policy import PlannerSettings
from cluster.routing_policy import COLOCATE, POLICIES, RoutingSettings
from cluster.scaling_policy import ScalingSettings
from cluster.tools import AUTO, TOOL_CALL_PARSERS
from cluster.yaml_source import overridden, read_yaml
from core.credentials import Credentials
from core.errors import InvalidConfig, InvalidRequest
from core.grammar import MAX_GRAMMAR_BYTES
from core.request import ClusterId, Role, SamplingParams, Slo, WorkerId
from engine.config import DEVICES, DTYPES, EngineConfig
from kv_transfer.config import CHECKSUMS, CODECS, DIALS, KvTransferConfig, LinkConfig, require_ports

PLACEMENTS = ("PACK", "SPREAD")
WITHOUT_PREFILL = ("local", "wait", "fail")
TLS_MODES = ("auto", "on", "off")
PLANNER_MODES = PLANNER_OFF, PLANNER_STATIC, PLANNER_DUAL = ("off", "static", "dual")
INITIAL_ROLES = INITIAL_CONFIGURED, INITIAL_SEARCH = ("configured", "search")
LOG_LEVELS = ("debug", "info", "warning", "error")
ON_MISS = ("reject", "serve")
OTHER_TENANTS = "other"  # what metrics call those that ``admission.tenant_weights`` does not name
UNSALTED = "unsalted"  # what ``admission.tenant_weights`` calls requests without a cache_salt
CLUSTER_SEPARATOR = "/"  # in names of workers, between the cluster's and the worker's
_DEFAULT_CLUSTER = "local"
_OTLP_ENDPOINT = re.compile(r"https?://[^\s/:]+(?::[0-9]{1,5})?/?|https?://\[[0-9A-Fa-f:.]+\](?::[0-9]{1,5})?/?")
_HOST_AND_PORT = re.compile(r"(?:\[[0-9A-Fa-f:.%]+\]|[^\s:/\[\]]+):([0-9]{1,5})")


@dataclass(frozen=True)
class PoolConfig:
    """The workers that start in one role, and what Ray gives each of them.

    count: number of workers at the start.
    min_replicas: workers that the pool keeps at least while the service runs; null: ``count``. 0 is for prefill alone:
        an idle pool may go, and decode workers then prefill.
    max_replicas: workers that it may grow to; null: ``count``. If it is not ``min_replicas``, the pool follows the load
        (docs/planning.md): each of its workers then has a placement group of its own, which an autoscaler sees.
    tensor_parallel: devices among which each worker divides the model, a process (rank) for each, all on one node. It
        must divide the model's key/value heads. ``engine.kv_cache_bytes`` and ``engine.threads`` are of each rank.
    num_cpus: Ray CPUs of each worker, all its ranks together; 0: not counted.
    num_gpus: Ray GPUs of each worker, all its ranks together.
    resources: custom Ray resources of each worker, by name.
    placement: whether Ray puts the pool on few nodes (``PACK``) or on many (``SPREAD``); null leaves it to Ray.
    engine: keys of ``engine`` that differ for this pool.
    """

    count: int = 1
    min_replicas: int | None = None
    max_replicas: int | None = None
    tensor_parallel: int = 1
    num_cpus: float = 1.0
    num_gpus: float = 0.0
    resources: dict[str, float] = field(default_factory=dict)
    placement: str | None = None
    engine: dict[str, object] = field(default_factory=dict)

    def __post_init__(self) -> None:
        _require(self.count >= 0, "count", "must be at least 0", self.count)
        _require(self.num_cpus >= 0, "num_cpus", "must be at least 0", self.num_cpus)
        _require(self.num_gpus >= 0, "num_gpus", "must be at least 0", self.num_gpus)
        _require(self.tensor_parallel >= 1, "tensor_parallel", "must be at least 1", self.tensor_parallel)
        if self.tensor_parallel > 1:
            ok = self.num_gpus % self.tensor_parallel == 0
            allowed = f"must be 0 or a multiple of tensor_parallel ({self.tensor_parallel})"
            _require(ok, "num_gpus", allowed, self.num_gpus)
            allowed = "must be null with tensor_parallel above 1: each worker has a placement group of its own"
            _require(self.placement is None, "placement", allowed, self.placement)
        for name, amount in self.resources.items():
            _require(amount >= 0, f"resources.{name}", "must be at least 0", amount)
        _require_word(self.placement is None or self.placement in PLACEMENTS, "placement", PLACEMENTS, self.placement)
        _require(self.least >= 0, "min_replicas", "must be null or at least 0", self.min_replicas)
        _require(self.least <= self.count, "min_replicas", f"must be at most count ({self.count})", self.min_replicas)
        _require(self.most >= self.count, "max_replicas", f"must be at least count ({self.count})", self.max_replicas)
        if self.is_elastic:
            _require(
                self.placement is None,
                "placement",
                "must be null in a pool that grows: each of its workers has a placement group of its own",
                self.placement,
            )
            _require(
                self.num_cpus + self.num_gpus + sum(self.resources.values()) > 0,
                "num_cpus",
                "must be above 0 in a pool that grows, or num_gpus or resources: Ray places workers by what they need",
                self.num_cpus,
            )

    @property
    def least(self) -> int:
        """Workers that it keeps."""
        return self.count if self.min_replicas is None else self.min_replicas

    @property
    def most(self) -> int:
        """Workers that it may have."""
        return self.count if self.max_replicas is None else self.max_replicas

    @property
    def is_elastic(self) -> bool:
        """May the number of its workers change while the service runs?"""
        return self.least < self.most


@dataclass(frozen=True)
class RouterConfig:
    """How requests find workers.

    policy: how a prefill and a decode worker are chosen; all but ``prfaas`` know nothing of PrfaaS clusters and costs.
    colocate: whether the decode worker may prefill a prompt itself although a prefill worker could: ``auto``, when that
        is predicted to be better for all; ``never``; ``always``. Of ``prfaas`` alone.
    without_prefill: what to do when no prefill worker is there or none can be reached: ``local``, the decode worker
        prefills; ``wait`` for one, up to ``no_route_wait_s``; ``fail`` at once. Counted, and named in the response.
    pulls: whether cached pages may be fetched from other workers instead of being computed. Of ``prfaas`` alone.
    fetch_ratio: pages are fetched only if the other worker caches more than so many times the tokens.
    costs_file: where measured costs are kept, so that a restart does not forget; null: nowhere.
    max_inflight: requests beyond it, those that wait for their turn included, are refused with 429 /
        RESOURCE_EXHAUSTED.
    max_attempts: tries of one continuation before its failure is given to the client.
    lease_s: a worker not heard of for so many seconds is out of the view.
    no_route_wait_s: how many seconds a request waits for a worker to appear (one may be restarting).
    """

    policy: str = "prfaas"
    colocate: str = "auto"
    without_prefill: str = "local"
    pulls: bool = True
    fetch_ratio: float = 1.5
    costs_file: str | None = "~/.cache/prfaas/costs.json"
    max_inflight: int = 512
    max_attempts: int = 4
    lease_s: float = 5.0
    no_route_wait_s: float = 10.0

    def __post_init__(self) -> None:
        _require_word(self.policy in POLICIES, "router.policy", tuple(POLICIES), self.policy)
        _require_word(self.colocate in COLOCATE, "router.colocate", COLOCATE, self.colocate)
        known = self.without_prefill in WITHOUT_PREFILL
        _require_word(known, "router.without_prefill", WITHOUT_PREFILL, self.without_prefill)
        _require(self.fetch_ratio >= 1, "router.fetch_ratio", "must be at least 1", self.fetch_ratio)
        _require(self.costs_file != "", "router.costs_file", "must be null or a path", self.costs_file)
        _require(self.max_inflight >= 1, "router.max_inflight", "must be at least 1", self.max_inflight)
        _require(self.max_attempts >= 1, "router.max_attempts", "must be at least 1", self.max_attempts)
        _require(self.lease_s > 0, "router.lease_s", "must be above 0 s", self.lease_s)
        _require(self.no_route_wait_s >= 0, "router.no_route_wait_s", "must be at least 0 s", self.no_route_wait_s)

    @property
    def routing(self) -> RoutingSettings:
        """What the policy is told."""
        return RoutingSettings(self.colocate, self.pulls, self.fetch_ratio)

    @property
    def costs_path(self) -> Path | None:
        """``costs_file`` with the user's home in it."""
        return None if self.costs_file is None else Path(self.costs_file).expanduser()


@dataclass(frozen=True)
class AdmissionConfig:
    """Which requests start at once, which wait in the gateway for their turn, and which are refused with 429 /
    RESOURCE_EXHAUSTED and a Retry-After (docs/admission.md).

    ttft_slo_s: seconds to the first token that a request is promised if it asks for nothing else (``x-slo-ttft-ms``);
        null: none.
    tpot_slo_s: seconds between later tokens, likewise (``x-slo-tpot-ms``).
    on_miss: what becomes of a request whose SLO is predicted to be missed: ``reject``, or ``serve`` it all the same,
        which its answer says and a counter counts.
    max_queued: continuations that may wait for their turn, of all tenants together; 0: none waits. One too many: the
        last of the tenant that waits for most gives way.
    max_queued_per_tenant: likewise of each tenant (``cache_salt``); null: only ``max_queued`` bounds it.
    max_wait_s: seconds after which a request that still waits is refused.
    ageing_s: a request that came so many seconds earlier counts as one priority class higher.
    tenant_weights: shares of tenants when they compete, by name (``prfaas tenant SALT`` prints it; ``unsalted`` is
        those without a cache_salt); 1 for whoever is not named.
    prefill_queue_s: predicted seconds of prompts that a prefill worker should hold; more wait in the gateway.
    prefill_queue_tokens: the same in uncomputed prompt tokens, while nothing is known of its speed.
    decode_slots: sequences that a decode worker should hold when the prompt's prefill ends; null: as many as its batch.
    """

    ttft_slo_s: float | None = None
    tpot_slo_s: float | None = None
    on_miss: str = "reject"
    max_queued: int = 512
    max_queued_per_tenant: int | None = None
    max_wait_s: float = 60.0
    ageing_s: float = 5.0
    tenant_weights: dict[str, float] = field(default_factory=dict)
    prefill_queue_s: float = 2.0
    prefill_queue_tokens: int = 32768
    decode_slots: int | None = None

    def __post_init__(self) -> None:
        for name in ("ttft_slo_s", "tpot_slo_s"):
            value = getattr(self, name)
            _require(value is None or value > 0, f"admission.{name}", "must be null or above 0 s", value)
        _require_word(self.on_miss in ON_MISS, "admission.on_miss", ON_MISS, self.on_miss)
        _require(self.max_queued >= 0, "admission.max_queued", "must be at least 0", self.max_queued)
        for name in ("max_queued_per_tenant", "decode_slots"):
            value = getattr(self, name)
            _require(value is None or value >= 1, f"admission.{name}", "must be null or at least 1", value)
        for name in ("max_wait_s", "ageing_s"):
            _require(getattr(self, name) > 0, f"admission.{name}", "must be above 0 s", getattr(self, name))
        _require(self.prefill_queue_s >= 0, "admission.prefill_queue_s", "must be at least 0 s", self.prefill_queue_s)
        _require(
            self.prefill_queue_tokens >= 0,
            "admission.prefill_queue_tokens",
            "must be at least 0",
            self.prefill_queue_tokens,
        )
        for tenant, weight in self.tenant_weights.items():
            _require(weight > 0, f"admission.tenant_weights.{tenant}", "must be above 0", weight)

    def slo_for(self, asked: Slo) -> Slo:
        """The objectives of a request that asked for ``asked``: what it left open is promised by default."""
        return Slo(
            ttft_s=self.ttft_slo_s if asked.ttft_s is None else asked.ttft_s,
            tpot_s=self.tpot_slo_s if asked.tpot_s is None else asked.tpot_s,
        )

    def weight_of(self, tenant: str) -> float:
        """The share of a tenant, by the name that ``tenant_of`` gives it."""
        return self.tenant_weights.get(tenant or UNSALTED, 1.0)

    def label_of(self, tenant: str) -> str:
        """What metrics call a tenant: those that the configuration names, so that their values stay few."""
        name = tenant or UNSALTED
        return name if name in self.tenant_weights else OTHER_TENANTS


@dataclass(frozen=True)
class PlannerConfig:
    """Which prompts go to PrfaaS clusters, and which workers prefill and decode, while the service runs.

    mode: ``dual`` plans for the measured demand, links and costs (docs/planning.md); ``static`` keeps one threshold and
        the roles; ``off`` offloads nothing and keeps the roles.
    threshold_tokens: of ``static``: prompts of which more must be computed go to PrfaaS clusters.
    initial: who prefills and who decodes at the start: ``configured``, or ``search``: the best split of the workers of
        both pools for the section ``plan``.
    interval_s: between two looks at the fleet.
    demand_window_s: what came so long ago counts e times less than what comes now.
    retest_s: a path from a PrfaaS cluster on which nothing went for so long is tested, to know what it carries.
    convert_timeout_s: a worker that has not changed its role by then is no longer waited for; it goes on changing.
    """

    mode: str = PLANNER_DUAL
    threshold_tokens: int = 4096
    initial: str = INITIAL_CONFIGURED
    interval_s: float = 0.25
    demand_window_s: float = 30.0
    retest_s: float = 5.0
    convert_timeout_s: float = 60.0
    dual: PlannerSettings = field(default_factory=PlannerSettings)
    scaling: ScalingSettings = field(default_factory=ScalingSettings)

    def __post_init__(self) -> None:
        _require_word(self.mode in PLANNER_MODES, "planner.mode", PLANNER_MODES, self.mode)
        _require_word(self.initial in INITIAL_ROLES, "planner.initial", INITIAL_ROLES, self.initial)
        _require(self.threshold_tokens >= 0, "planner.threshold_tokens", "must be at least 0", self.threshold_tokens)
        for name in ("interval_s", "demand_window_s", "retest_s", "convert_timeout_s"):
            _require(getattr(self, name) > 0, f"planner.{name}", "must be above 0 s", getattr(self, name))


@dataclass(frozen=True)
class TlsConfig:
    """Who may talk inside the service: mutual TLS on every KV link and every internal gRPC call.

    mode: ``auto`` is on unless workers listen on loopback addresses only and no files are given; ``on``; ``off``.
    ca_file: PEM certificates of the authority that signs every worker's and gateway's; null, with the other two: one is
        made for each run of the service.
    cert_file: PEM certificate of the process, on each node; it must have the DNS name ``prfaas.internal``.
    key_file: PEM private key of ``cert_file``, not encrypted. All three are read again when they change.
    """

    mode: str = "auto"
    ca_file: str | None = None
    cert_file: str | None = None
    key_file: str | None = None

    def __post_init__(self) -> None:
        _require_word(self.mode in TLS_MODES, "tls.mode", TLS_MODES, self.mode)
        files = {name: getattr(self, name) for name in ("ca_file", "cert_file", "key_file")}
        for name, path in files.items():
            _require(path != "", f"tls.{name}", "must be null or a path", path)
            if path is None and self.has_files:
                raise InvalidConfig(f"tls.{name}", "is needed too: ca_file, cert_file and key_file come together")

    @property
    def has_files(self) -> bool:
        """Are the certificates given, rather than made for each run?"""
        return any((self.ca_file, self.cert_file, self.key_file))

    @property
    def credentials(self) -> Credentials | None:
        """The files that are given, as they lie on this node."""
        if self.ca_file is None or self.cert_file is None or self.key_file is None:
            return None
        return Credentials(*(Path(file).expanduser() for file in (self.ca_file, self.cert_file, self.key_file)))


@dataclass(frozen=True)
class HttpConfig:
    """The OpenAI-compatible door.

    host: address to listen on; ``0.0.0.0``: every interface. Whoever reaches it may ask, unless ``api_keys_file``
        is set.
    port: TCP port; 0: any free one.
    max_body_bytes: larger request bodies get 413.
    page: whether the page at ``/`` is served, and the list of recent requests that it shows (``/requests``: ids, counts
        and seconds, no text).
    """

    host: str = "127.0.0.1"
    port: int = 8000
    max_body_bytes: int = 8 << 20
    page: bool = True

    def __post_init__(self) -> None:
        _require_address("http", self.host, self.port)
        _require(self.max_body_bytes >= 1, "http.max_body_bytes", "must be at least 1", self.max_body_bytes)


@dataclass(frozen=True)
class GrpcConfig:
    """The prfaas.v1.Generation door.

    host: address to listen on; ``0.0.0.0``: every interface. Whoever reaches it may ask, unless ``api_keys_file``
        is set.
    port: TCP port; 0: any free one.
    max_message_bytes: larger requests get INVALID_ARGUMENT (from 4 times this size on, RESOURCE_EXHAUSTED).
    """

    host: str = "127.0.0.1"
    port: int = 9000
    max_message_bytes: int = 8 << 20

    def __post_init__(self) -> None:
        _require_address("grpc", self.host, self.port)
        _require(self.max_message_bytes >= 1, "grpc.max_message_bytes", "must be at least 1", self.max_message_bytes)


@dataclass(frozen=True)
class StructuredOutputConfig:
    """Answers that obey a schema or grammar, and calls of tools (docs/structured-output.md). Grammars need the extra
    ``structured``, here and at the workers.

    max_bytes: of a grammar's text; with ``tool_choice`` required, of the schemas of all tools together.
    compile_timeout_s: a grammar that takes longer to compile is refused with 400 / INVALID_ARGUMENT.
    max_memory_bytes: likewise one that takes more memory, in the process that tries it.
    tool_call_parser: in which words the model calls tools: ``hermes``, ``llama3_json``, ``mistral``; ``auto``: as its
        chat template says; ``none``: requests with tools are refused.
    """

    max_bytes: int = 64 << 10
    compile_timeout_s: float = 2.0
    max_memory_bytes: int = 2 << 30
    tool_call_parser: str = AUTO

    def __post_init__(self) -> None:
        most = f"must be between 1 and {MAX_GRAMMAR_BYTES}"
        _require(1 <= self.max_bytes <= MAX_GRAMMAR_BYTES, "structured_output.max_bytes", most, self.max_bytes)
        _require(
            self.compile_timeout_s > 0,
            "structured_output.compile_timeout_s",
            "must be above 0 s",
            self.compile_timeout_s,
        )
        least = 256 << 20
        _require(
            self.max_memory_bytes >= least,
            "structured_output.max_memory_bytes",
            f"must be at least {least}",
            self.max_memory_bytes,
        )
        known = self.tool_call_parser in TOOL_CALL_PARSERS
        _require_word(known, "structured_output.tool_call_parser", TOOL_CALL_PARSERS, self.tool_call_parser)


@dataclass(frozen=True)
class SamplingDefaultsConfig:
    """What a request gets for what its client leaves open (docs/http-api.md). A key that is null: what the model says,
    else the value in brackets.

    from_model: take what the model's ``generation_config.json`` says for keys that are null here, as vLLM does.
    max_tokens: most tokens of an output (up to the model's context).
    temperature: 0 (greedy) to 2 (1).
    top_p: the most likely tokens whose probabilities make up so much (1: all).
    top_k: so many most likely tokens (0: all).
    min_p: tokens with at least this share of the most likely one's probability (0: all).
    repetition_penalty: above 1: tokens that were there already become less likely (1).
    """

    from_model: bool = True
    max_tokens: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None

    def __post_init__(self) -> None:
        names = [field.name for field in fields(self) if field.name != "from_model"]
        given = {name: value for name in names if (value := getattr(self, name)) is not None}
        try:
            SamplingParams(**given)
        except InvalidRequest as error:
            raise InvalidConfig(f"sampling_defaults.{error.field}", error.message) from error


@dataclass(frozen=True)
class TracingConfig:
    """Traces of requests over every process, for an OpenTelemetry collector (docs/observability.md). Needs the extra
    ``otel``.

    endpoint: URL of the collector's OTLP/gRPC receiver, ``http://127.0.0.1:4317``, or https; null: nothing is traced.
    sample_ratio: share of requests that are traced, of those whose client does not say so itself (``traceparent``).
    service_name: what the collector calls this service.
    """

    endpoint: str | None = None
    sample_ratio: float = 0.01
    service_name: str = "prfaas"

    def __post_init__(self) -> None:
        ok = self.endpoint is None or _OTLP_ENDPOINT.fullmatch(self.endpoint) is not None
        _require(ok, "tracing.endpoint", "must be null or http://host:port or https://host:port", self.endpoint)
        _require(0 <= self.sample_ratio <= 1, "tracing.sample_ratio", "must be from 0 to 1", self.sample_ratio)
        _require(bool(self.service_name), "tracing.service_name", "must not be empty", self.service_name)


@dataclass(frozen=True)
class RayConfig:
    """Where the workers are started.

    address: null starts a Ray of its own on this machine; ``auto`` or host:port joins one (inside a Ray job, the job's
        cluster is joined whatever this says).
    namespace: Ray namespace of the worker actors.
    """

    address: str | None = None
    namespace: str = "prfaas"

    def __post_init__(self) -> None:
        _require(self.address != "", "ray.address", "must be null, auto or host:port", self.address)
        _require(bool(self.namespace), "ray.namespace", "must not be empty", self.namespace)


@dataclass(frozen=True)
class RegistryConfig:
    """Where workers register with this gateway. Those of other clusters must know it (``join``).

    host: address to listen on; ``0.0.0.0``: every interface; null: the address at which workers reach this process.
    port: TCP port; 0: any free one, which nobody but the service's own workers gets to know.
    """

    host: str | None = None
    port: int = 0

    def __post_init__(self) -> None:
        _require(self.host != "", "registry.host", "must be null or an address", self.host)
        _require(0 <= self.port < 65536, "registry.port", "must be between 0 and 65535", self.port)


@dataclass(frozen=True)
class ControlConfig:
    """Where each worker takes the gRPC calls of gateways and of other workers.

    port: TCP port; 0: any free one.
    last_port: workers that share a host take the first free one from ``port`` to this; null: only ``port``.
    """

    port: int = 0
    last_port: int | None = None

    def __post_init__(self) -> None:
        require_ports("control", self.port, self.last_port)

    @property
    def ports(self) -> range:
        """What is tried, in this order."""
        return range(self.port, (self.last_port or self.port) + 1)


@dataclass(frozen=True)
class ServiceConfig:
    """A whole service, or with ``join`` a cluster of prefill workers for services elsewhere.

    model: a local folder, a hub id, a .gguf file, ``package:NAME`` (a GGUF inside an installed Python package) or
        ``dummy:PATH`` (random weights for a config.json).
    served_model_name: what clients call the model; null: ``model`` itself.
    cluster_id: name of this datacenter's Ray cluster; no two that meet at one gateway have the same.
    host: address on which workers listen and are reached; null: Ray's address of their node.
    join: host:port of the ``registry`` of gateways elsewhere. The workers register with each of them, and nothing is
        served here: there is no door, no router and no decode worker (docs/two-datacenters.md).
    model_cache_dir: where converted checkpoints are kept.
    plan: what ``prfaas plan`` is told besides: a planning document, less what is known from here (docs/planning.md).
    drain_timeout_s: seconds that running requests get to finish when the service is told to stop.
    start_timeout_s: seconds that the workers get to load the model.
    api_keys_file: file of the keys that clients of the doors must show, one a line; null: they need none. Read again
        when it changes. What operators ask for needs none (docs/security.md).
    log_level: the least severe messages that are logged.
    log_format: ``text``, or ``json``: one object a line, with the request's id where a line is about one.
    log_requests: whether each process logs a line for each sequence that it is done with.
    """

    model: str
    served_model_name: str | None = None
    cluster_id: str = _DEFAULT_CLUSTER
    host: str | None = None
    join: tuple[str, ...] = ()
    model_cache_dir: str = "~/.cache/prfaas/models"
    engine: EngineConfig = field(default_factory=EngineConfig)
    prefill: PoolConfig = field(default_factory=PoolConfig)
    decode: PoolConfig = field(default_factory=PoolConfig)
    kv_transfer: KvTransferConfig = field(default_factory=KvTransferConfig)
    control: ControlConfig = field(default_factory=ControlConfig)
    tls: TlsConfig = field(default_factory=TlsConfig)
    registry: RegistryConfig = field(default_factory=RegistryConfig)
    router: RouterConfig = field(default_factory=RouterConfig)
    admission: AdmissionConfig = field(default_factory=AdmissionConfig)
    planner: PlannerConfig = field(default_factory=PlannerConfig)
    http: HttpConfig = field(default_factory=HttpConfig)
    grpc: GrpcConfig = field(default_factory=GrpcConfig)
    structured_output: StructuredOutputConfig = field(default_factory=StructuredOutputConfig)
    sampling_defaults: SamplingDefaultsConfig = field(default_factory=SamplingDefaultsConfig)
    ray: RayConfig = field(default_factory=RayConfig)
    tracing: TracingConfig = field(default_factory=TracingConfig)
    plan: dict[str, object] = field(default_factory=dict)
    drain_timeout_s: float = 6.0
    start_timeout_s: float = 600.0
    api_keys_file: str | None = None
    log_level: str = "info"
    log_format: str = TEXT
    log_requests: bool = False

    def __post_init__(self) -> None:
        _require(bool(self.model), "model", "must not be empty", self.model)
        _require(self.served_model_name != "", "served_model_name", "must not be empty", self.served_model_name)
        ok = bool(self.cluster_id) and CLUSTER_SEPARATOR not in self.cluster_id
        _require(ok, "cluster_id", f"must not be empty and hold no {CLUSTER_SEPARATOR}", self.cluster_id)
        _require(self.api_keys_file != "", "api_keys_file", "must be null or a path", self.api_keys_file)
        _require(self.drain_timeout_s >= 0, "drain_timeout_s", "must be at least 0 s", self.drain_timeout_s)
        _require(self.start_timeout_s > 0, "start_timeout_s", "must be above 0 s", self.start_timeout_s)
        _require_word(self.log_level in LOG_LEVELS, "log_level", LOG_LEVELS, self.log_level)
        _require_word(self.log_format in LOG_FORMATS, "log_format", LOG_FORMATS, self.log_format)
        if self.join:
            self._check_join()
        else:
            _require(self.decode.count >= 1, "decode.count", "must be at least 1", self.decode.count)
            self._check_pools()
        _require_distinct_ports(http=self.http.port, grpc=self.grpc.port, registry=self.registry.port)
        for role in Role:
            engine = self.engine_for(role)  # raises for what a pool's own engine section has wrong
            degree = self.pool(role).tensor_parallel
            tiered, allowed = degree > 1 and engine.host_cache_bytes > 0, "must be 0 with tensor_parallel above 1"
            why = f"{allowed}: pages of the other ranks would not be kept"
            _require(not tiered, f"{role}.engine.host_cache_bytes", why, engine.host_cache_bytes)
            reachable = degree == 1 or self.kv_transfer.transport != "local"
            allowed = "must be 1 with kv_transfer.transport local, both ends of which are in one process"
            _require(reachable, f"{role}.tensor_parallel", allowed, degree)

    def _check_pools(self) -> None:
        """What the sizes of the pools mean for the rest."""
        least = self.decode.min_replicas
        _require(least != 0, "decode.min_replicas", "must be null or at least 1: nothing else decodes", least)
        mode = self.router.without_prefill
        if self.prefill.is_elastic and self.prefill.least == 0 and mode != "local":
            raise InvalidConfig(
                "prefill.min_replicas",
                f"must be at least 1 with router.without_prefill {mode}: without prefill workers nothing is served",
            )

    def _check_join(self) -> None:
        for index, address in enumerate(self.join):
            found = _HOST_AND_PORT.fullmatch(address)
            ok = found is not None and 0 < int(found[1]) < 65536
            _require(ok, f"join[{index}]", "must be host:port, the port from 1 to 65535", address)
            _require(address not in self.join[:index], f"join[{index}]", "must not be named twice", address)
        if self.cluster_id == _DEFAULT_CLUSTER:
            raise InvalidConfig("cluster_id", "is needed with join: gateways know the workers of clusters by its name")
        _require(self.prefill.count >= 1, "prefill.count", "must be at least 1 with join", self.prefill.count)
        _require(
            self.decode.count == 0,
            "decode.count",
            "must be 0 with join, as K/V of a joined cluster goes to the decode workers of the gateway's",
            self.decode.count,
        )
        for name in ("min_replicas", "max_replicas"):
            if getattr(self.prefill, name) is not None:
                raise InvalidConfig(f"prefill.{name}", "means nothing with join: nobody plans there; leave it out")
        for name in ("http", "grpc", "structured_output", "registry", "router", "admission", "planner"):
            section = getattr(self, name)
            if section != type(section)():
                raise InvalidConfig(name, "means nothing with join: a joined cluster has no gateway; leave it out")
        if self.api_keys_file is not None:
            raise InvalidConfig("api_keys_file", "means nothing with join: a joined cluster has no door; leave it out")

    def worker_id(self, role: Role, index: int) -> WorkerId:
        """The name of the worker that starts as number ``index`` of a pool, unlike any of another cluster."""
        name = f"{role}-{index}"
        return WorkerId(qualified(ClusterId(self.cluster_id), name) if self.join else name)

    @property
    def model_name(self) -> str:
        """What clients call the model."""
        return self.served_model_name or self.model

    def pool(self, role: Role) -> PoolConfig:
        """The workers that start in ``role``."""
        return self.prefill if role is Role.PREFILL else self.decode

    @property
    def elastic_roles(self) -> tuple[Role, ...]:
        """Pools whose size may change."""
        return tuple(role for role in Role if self.pool(role).is_elastic)

    def engine_for(self, role: Role) -> EngineConfig:
        """``engine`` with what the pool of ``role`` sets differently."""
        overrides = config_schema.read_values(EngineConfig, self.pool(role).engine, CHOICES, f"{role}.engine")
        try:
            return replace(self.engine, **overrides)
        except InvalidConfig as error:
            raise InvalidConfig(f"{role}.{error.key}", error.message) from error


@dataclass(frozen=True)
class WorkerConfig:
    """What one worker process is told; made by ``launch`` from the service's configuration.

    registries: host:port of every gateway's Registry service, to which the worker registers.
    credentials: files, on the worker's node, by which it and its peers know each other; null: anyone may talk to it.
    tensor_parallel: ranks of the worker, this process being the first.
    """

    worker_id: WorkerId
    cluster_id: ClusterId
    role: Role
    model: str
    model_cache_dir: str
    engine: EngineConfig
    kv_transfer: KvTransferConfig
    host: str
    registries: tuple[str, ...]
    control: ControlConfig = field(default_factory=ControlConfig)
    credentials: Credentials | None = None
    log_level: str = "info"
    log_format: str = TEXT
    log_requests: bool = False
    tracing: TracingConfig = field(default_factory=TracingConfig)
    tensor_parallel: int = 1


CHOICES: config_schema.Choices = {
    (AdmissionConfig, "on_miss"): ON_MISS,
    (TlsConfig, "mode"): TLS_MODES,
    (LinkConfig, "dial"): DIALS,
    (LinkConfig, "checksum"): CHECKSUMS,
    (LinkConfig, "codecs"): CODECS,
    (EngineConfig, "device"): DEVICES,
    (EngineConfig, "dtype"): DTYPES,
    (PoolConfig, "placement"): PLACEMENTS,
    (RouterConfig, "policy"): tuple(POLICIES),
    (RouterConfig, "colocate"): COLOCATE,
    (RouterConfig, "without_prefill"): WITHOUT_PREFILL,
    (PlannerConfig, "mode"): PLANNER_MODES,
    (PlannerConfig, "initial"): INITIAL_ROLES,
    (ServiceConfig, "log_level"): LOG_LEVELS,
    (ServiceConfig, "log_format"): LOG_FORMATS,
}


def qualified(cluster_id: ClusterId, name: str) -> str:
    """What a gateway of another cluster calls the worker that its own cluster calls ``name``."""
    return f"{cluster_id}{CLUSTER_SEPARATOR}{name}"


def load_config(path: str | Path, overrides: Sequence[str] = ()) -> ServiceConfig:
    """The service that a YAML file describes, after ``overrides`` such as ``engine.page_size=32`` (the value is YAML).

    Raises ``InvalidConfig`` naming the key, or the file if it cannot be read.
    """
    values = read_yaml(path).values
    for override in overrides:
        values = overridden(values, override)
    return config_schema.read(ServiceConfig, values, CHOICES)


def service_schema() -> dict[str, object]:
    """The JSON schema of a service's YAML, for editors."""
    schema = {"$schema": "https://json-schema.org/draft/2020-12/schema", "title": "prfaas service"}
    return schema | config_schema.json_schema(ServiceConfig, CHOICES)


def service_document() -> str:
    """The text of docs/configuration.md."""
    return config_schema.document(ServiceConfig, CHOICES, "Configuration") + _DOCUMENT_END


_DOCUMENT_END = """
---
`prfaas serve FILE --set KEY=VALUE` sets one key over the file; `prfaas config check FILE` checks a file;
`prfaas config schema` prints this as JSON schema. This page is made by `prfaas config docs > docs/configuration.md`.
"""


def _require(ok: bool, key: str, allowed: str, value: object) -> None:
    if not ok:
        raise InvalidConfig(key, f"{allowed}, got {value!r}")


def _require_word(ok: bool, key: str, words: Sequence[str], value: object) -> None:
    _require(ok, key, f"must be one of {', '.join(words)}", value)


def _require_distinct_ports(**ports: int) -> None:
    """Fixed ports of one process are not the same."""
    seen: dict[int, str] = {}
    for section, port in ports.items():
        if port and port in seen:
            raise InvalidConfig(f"{section}.port", f"must not be {seen[port]}.port, got {port!r}")
        seen[port] = section


def _require_address(section: str, host: str, port: int) -> None:
    _require(bool(host), f"{section}.host", "must not be empty", host)
    _require(0 <= port < 65536, f"{section}.port", "must be between 0 and 65535", port)
