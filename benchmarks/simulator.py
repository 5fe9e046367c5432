"""How large a fleet can be simulated, how fast, and does it come out the same twice?

    python -m benchmarks.simulator [--json FILE] [--workers N] [--requests N] [--prompt N] [--output N]

One gateway, workers of a made-up kind, Poisson arrivals at 70% of what the workers sustain, messages within the
cluster without latency. Every request passes the real router, policy, membership, schedulers and page allocators; every
token is planned and booked by a real scheduler. Both sizes run twice from the same seed, each run a process of its own,
with another hash seed; ``same``: every byte of their results agrees. ``simulated_requests_per_s`` is of the slower run
of the large fleet, from its workers' start to its last answer.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import resource
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

from benchmarks.report import Cell, Report, commit, machine
from cluster.config import RouterConfig
from cluster.simulator.hand_over import KvShape
from cluster.simulator.host import WorkerKind
from cluster.simulator.planned_scenario import UNBOUNDED
from cluster.simulator.result_report import result_as_json
from cluster.simulator.scenario import ClusterSpec, Scenario
from cluster.simulator.step_cost import ProfiledCost
from cluster.simulator.workload import POISSON, ArrivalPlan, empirical, from_lengths
from cluster.simulator.world import simulate
from cluster.throughput_model import Polynomial
from cluster.view import ModelInfo
from core.compute import ComputeProfile
from core.fingerprint import CacheFingerprint
from core.request import ClusterId
from engine.config import EngineConfig

_COLUMNS = {
    "policy": "policy",
    "workers": "workers",
    "requests": "requests",
    "prompt_tokens": "prompt",
    "output_tokens": "output",
    "seconds": "s",
    "requests_per_s": "simulated req/s",
    "virtual_s": "virtual s",
    "peak_mib": "peak MiB",
    "ttft_p90_s": "TTFT P90 s",
    "digest": "result",
}
_PAGE = 128
_PREFILL_S = (0.004, 2e-5)  # of a prompt, and of a token of it
_DECODE_S = 0.02
_LOAD = 0.7


@dataclass(frozen=True)
class Size:
    """What is simulated."""

    workers: int
    requests: int
    prompt_tokens: int
    output_tokens: int
    policy: str

    @property
    def num_decode(self) -> int:
        """Of the workers: decode batches of about 16."""
        return max(1, round(self.workers * self._decode_s / (self._decode_s + self._prefill_s)))

    @property
    def rate_rps(self) -> float:
        """At which prefill workers are ``_LOAD`` busy."""
        return _LOAD * (self.workers - self.num_decode) / self._prefill_s

    @property
    def _prefill_s(self) -> float:
        return _PREFILL_S[0] + _PREFILL_S[1] * self.prompt_tokens

    @property
    def _decode_s(self) -> float:
        return _DECODE_S * self.output_tokens / 16


def run(size: Size) -> dict[str, Cell]:
    """Simulate once, in this process."""
    model = ModelInfo("made up", CacheFingerprint("made up", "1", "int8", _PAGE, "one"), 65536, 1 << 62, (), 100_000)
    kind = WorkerKind(
        cost=ProfiledCost(Polynomial(_PREFILL_S), _DECODE_S),
        engine=EngineConfig(page_size=_PAGE, num_pages=2048, max_batch_tokens=4096, max_batch_size=64),
        kv=KvShape(100_000.0),
        model=model,
        compute=ComputeProfile(device="made up"),
    )
    here = ClusterSpec(ClusterId("here"), kind, size.workers - size.num_decode, size.num_decode, latency_s=0.0)
    router = RouterConfig(policy=size.policy, max_inflight=10_000_000)
    scenario = Scenario((here,), router=router, admission=UNBOUNDED, sample_s=5.0)
    lengths = empirical([(size.prompt_tokens, size.output_tokens)])
    workload = from_lengths(lengths, size.requests, ArrivalPlan(POISSON, size.rate_rps))
    began_at = time.perf_counter()
    result = simulate(scenario, workload)
    seconds = time.perf_counter() - began_at
    text = result_as_json(result, None, None) + repr([(r.number, r.ttft_s, r.total_s) for r in result.records])
    ttfts = sorted(record.ttft_s for record in result.records if record.ttft_s is not None)
    return {
        "policy": size.policy,
        "workers": size.workers,
        "requests": len(ttfts),
        "prompt_tokens": size.prompt_tokens,
        "output_tokens": size.output_tokens,
        "seconds": seconds,
        "requests_per_s": size.requests / seconds,
        "virtual_s": result.seconds,
        "peak_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
        "ttft_p90_s": ttfts[len(ttfts) * 9 // 10],
        "digest": hashlib.blake2b(text.encode(), digest_size=16).hexdigest(),
    }


def main() -> int:
    """Run, print, and write the JSON if asked."""
    options = _parser().parse_args()
    if options.once is not None:
        print(json.dumps(run(Size(**json.loads(options.once)))))
        return 0
    large = Size(options.workers, options.requests, options.prompt, options.output, options.policy)
    small = Size(50, 2000, options.prompt, options.output, options.policy)
    rows = [_in_a_process(size, hash_seed) for size in (small, large) for hash_seed in (1, 2)]
    same = all(one["digest"] == again["digest"] for one, again in (rows[:2], rows[2:]))
    report = Report(
        benchmark="simulator",
        commit=commit(),
        machine=machine(),
        rows=rows,
        figures={
            "simulated_requests_per_s": min(float(row["requests_per_s"] or 0.0) for row in rows[2:]),
            "peak_mib": max(float(row["peak_mib"] or 0.0) for row in rows[2:]),
            "same": float(same),
        },
    )
    report.print_table(_COLUMNS, "Simulated fleets")
    if options.json is not None:
        report.write_json(options.json)
    return 0 if same else 1


def _in_a_process(size: Size, hash_seed: int) -> dict[str, Cell]:
    asked = json.dumps({name: getattr(size, name) for name in size.__dataclass_fields__})
    command = [sys.executable, "-m", "benchmarks.simulator", "--once", asked]
    environment = os.environ | {"PYTHONHASHSEED": str(hash_seed)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(done.stderr)
    found: dict[str, Cell] = json.loads(done.stdout)
    return found


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.simulator", description=(__doc__ or "").partition("\n")[0]
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the report there")
    parser.add_argument("--workers", type=int, default=1000)
    parser.add_argument("--requests", type=int, default=100_000)
    parser.add_argument("--prompt", type=int, default=512, help="tokens of each prompt")
    parser.add_argument("--output", type=int, default=16, help="tokens of each answer")
    parser.add_argument("--policy", default="prfaas")
    parser.add_argument("--once", help=argparse.SUPPRESS)
    return parser


if __name__ == "__main__":
    sys.exit(main())
