"""The tiny service whose workers tests/cluster/test_ray_fleet.py runs under Ray. Its child processes import this alone:
what the tests themselves import takes a child seconds.
"""

from __future__ import annotations

from dataclasses import replace

from cluster.config import GrpcConfig, HttpConfig, PoolConfig, RouterConfig, ServiceConfig
from engine.config import EngineConfig

START_S = 120.0


def service(model: str, **changes: object) -> ServiceConfig:
    """One prefill and one decode worker of ``model``; any port; costs are not kept."""
    config = ServiceConfig(
        model=model,
        host="127.0.0.1",
        engine=EngineConfig(device="cpu", dtype="float32", num_pages=64, max_batch_tokens=64, max_batch_size=8),
        prefill=PoolConfig(count=1, num_cpus=0.5),
        decode=PoolConfig(count=1, num_cpus=0.5, placement="PACK"),
        router=RouterConfig(lease_s=3.0, costs_file=None),
        http=HttpConfig(port=0),
        grpc=GrpcConfig(port=0),
        drain_timeout_s=2.0,
        start_timeout_s=START_S,
    )
    return replace(config, **changes)  # type: ignore[arg-type]
