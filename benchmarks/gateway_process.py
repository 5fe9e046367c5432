"""The real gateway process before a stand-in worker: what ``prfaas serve`` runs, but for the workers.

    python -m benchmarks.gateway_process MODEL

Prints one JSON line when it serves: where, and the stand-in's process id. The stand-in's own lines go to the same
standard output (benchmarks/stand_in_worker.py).
"""

from __future__ import annotations

import asyncio
import json
import signal
import subprocess
import sys

from benchmarks.orderly_exit import end_with_parent
from cluster.config import GrpcConfig, HttpConfig, PlannerConfig, PoolConfig, RouterConfig, ServiceConfig, TlsConfig
from cluster.internal_tls import IssueProof
from cluster.launch import Endpoints, serve_async
from engine.model_source import resolve


class StandInFleet:
    """One stand-in worker, as a child of this process."""

    def __init__(self, config: ServiceConfig) -> None:
        self._folder = resolve(config.model, config.model_cache_dir).folder
        self._child: subprocess.Popen[bytes] | None = None

    @property
    def process_id(self) -> int:
        assert self._child is not None, "started"
        return self._child.pid

    def join(self) -> str:
        return "127.0.0.1"

    def start(self, registry: str, issue_proof: IssueProof) -> None:
        self._child = subprocess.Popen(
            [sys.executable, "-m", "benchmarks.stand_in_worker", registry, str(self._folder)]
        )

    def check(self) -> None:
        assert self._child is None or self._child.poll() is None, "the stand-in worker ended"

    def drain(self, timeout_s: float) -> bool:
        return True

    def stop(self, timeout_s: float) -> None:
        if self._child is not None:
            self._child.kill()
            self._child.wait()


def main(model: str) -> None:
    """Serve until SIGTERM."""
    config = ServiceConfig(
        model=model,
        host="127.0.0.1",
        tls=TlsConfig(mode="off"),
        prefill=PoolConfig(count=0),
        decode=PoolConfig(count=1),
        router=RouterConfig(max_inflight=4096, costs_file=None),
        planner=PlannerConfig(mode="off"),
        http=HttpConfig(host="127.0.0.1", port=0),
        grpc=GrpcConfig(host="127.0.0.1", port=0),
        drain_timeout_s=1.0,
    )
    fleet = StandInFleet(config)

    def ready(endpoints: Endpoints) -> None:
        print(json.dumps({"http": endpoints.http, "grpc": endpoints.grpc, "worker": fleet.process_id}), flush=True)

    asyncio.run(serve_async(config, ready, lambda _: fleet))


if __name__ == "__main__":
    end_with_parent(signal.SIGKILL)
    main(sys.argv[1])
