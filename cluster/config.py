"""The one YAML of a service, as frozen dataclasses: every key, its default and what it means.

``load_config`` is the only reader of configuration files; environment variables are not a second configuration.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from core.errors import InvalidConfig
from core.request import ClusterId, Role, WorkerId
from engine.config import EngineConfig
from kv_transfer.config import KvTransferConfig


@dataclass(frozen=True)
class PoolConfig:
    """The workers that start in one role, and what Ray gives each of them.

    count: workers. num_cpus, num_gpus, resources: Ray resources of each (0 CPUs: not counted).
    placement: ``PACK`` or ``SPREAD`` over Ray nodes; None leaves it to Ray.
    engine: keys of ``engine`` that differ for this pool.
    """

    count: int = 1
    num_cpus: float = 1.0
    num_gpus: float = 0.0
    resources: dict[str, float] = field(default_factory=dict)
    placement: str | None = None
    engine: dict[str, object] = field(default_factory=dict)


@dataclass(frozen=True)
class RouterConfig:
    """policy: ``round_robin`` or ``least_loaded``. max_inflight: requests beyond it are refused with 429.
    max_attempts: tries of one continuation before its failure is given to the client.
    lease_s: a worker not heard of for so long is out of the view.
    """

    policy: str = "least_loaded"
    max_inflight: int = 512
    max_attempts: int = 4
    lease_s: float = 5.0
    no_route_wait_s: float = 10.0  # how long a request waits for a worker to appear (one may be restarting)


@dataclass(frozen=True)
class HttpConfig:
    """The OpenAI-compatible door. max_body_bytes: larger request bodies get 413."""

    host: str = "127.0.0.1"
    port: int = 8000
    max_body_bytes: int = 8 << 20


@dataclass(frozen=True)
class GrpcConfig:
    """The prfaas.v1.Generation door."""

    host: str = "127.0.0.1"
    port: int = 9000
    max_message_bytes: int = 8 << 20


@dataclass(frozen=True)
class RayConfig:
    """address: None starts a Ray of its own on this machine; ``auto`` or host:port joins one (inside a Ray job, the
    job's cluster is joined whatever this says)."""

    address: str | None = None
    namespace: str = "prfaas"


@dataclass(frozen=True)
class ServiceConfig:
    """A whole service.

    model: a local folder, a hub id, a .gguf file, ``package:NAME`` (a GGUF inside an installed Python package) or
    ``dummy:PATH`` (random weights for a config.json).
    host: address on which workers listen and are reached; None: Ray's address of their node.
    """

    model: str
    served_model_name: str | None = None
    cluster_id: str = "local"
    host: str | None = None
    model_cache_dir: str = "~/.cache/prfaas/models"
    engine: EngineConfig = field(default_factory=EngineConfig)
    prefill: PoolConfig = field(default_factory=PoolConfig)
    decode: PoolConfig = field(default_factory=PoolConfig)
    kv_transfer: KvTransferConfig = field(default_factory=KvTransferConfig)
    router: RouterConfig = field(default_factory=RouterConfig)
    http: HttpConfig = field(default_factory=HttpConfig)
    grpc: GrpcConfig = field(default_factory=GrpcConfig)
    ray: RayConfig = field(default_factory=RayConfig)
    drain_timeout_s: float = 6.0
    start_timeout_s: float = 600.0
    log_level: str = "info"


@dataclass(frozen=True)
class WorkerConfig:
    """What one worker process is told; made by ``launch`` from the service's configuration.

    registries: host:port of every gateway's Registry service, to which the worker registers.
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
    log_level: str = "info"


__all__ = [
    "GrpcConfig",
    "HttpConfig",
    "InvalidConfig",
    "PoolConfig",
    "RayConfig",
    "RouterConfig",
    "ServiceConfig",
    "WorkerConfig",
]
