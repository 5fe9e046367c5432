"""Does the simulator say what the real service does? The same requests to both, side by side.

    python -m benchmarks.calibration [--json FILE] [--requests N] [--share S]

The default service of this machine (deploy/examples/laptop.yaml, two workers that share the cores in turns) gets the
requests over gRPC, open loop, and keeps what its workers measured (``router.costs_file``). Then the same service is
simulated with those seconds, spread as they were, and the same requests. A warm-up goes before, for both: what is
measured of the first steps of a fresh service is not what they take later. It sends one request after the other, which
tells how fast this machine and its messages are; then they come at a share of that rate, so that a slow machine is as
busy as a fast one.

Beside the measures stand the parts of the mean TTFT (core/latency_parts.py) that are not nothing: where the two differ.

What is left of an error: the gateway's and the workers' Python competes with the model for two cores, which a simulated
device does not know; steps that hold prompts and tokens alike are taken for the sum of both.
"""

from __future__ import annotations

import argparse
import asyncio
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from random import Random

import grpc
import numpy as np

from benchmarks.orderly_exit import exit_on_sigterm
from benchmarks.report import Cell, Report, commit, machine
from cluster.config import PLANNER_OFF, PlannerConfig, ServiceConfig, load_config
from cluster.cost_model import saved_costs
from cluster.service_process import ServiceProcess, free_ports
from cluster.simulator.answers import Answer
from cluster.simulator.conversation import Conversation, Prompt, Turn
from cluster.simulator.hand_over import KvShape
from cluster.simulator.host import WorkerKind
from cluster.simulator.scenario import ClusterSpec, Scenario
from cluster.simulator.step_cost import MeasuredCost
from cluster.simulator.workload import Workload
from cluster.simulator.world import simulate
from cluster.view import ModelInfo
from core.compute import ComputeProfile
from core.fingerprint import CacheFingerprint
from core.latency_parts import TtftParts
from core.request import ClusterId
from protos import serving_pb2 as pb
from protos import serving_pb2_grpc as rpc

_ROOT = Path(__file__).resolve().parent.parent
_CONFIG = _ROOT / "deploy/examples/laptop.yaml"
_COLUMNS = {"measure": "measure", "real": "real", "simulated": "simulated", "relative_error": "error"}
_BLOCK = 32  # tokens of a shared prefix
_NUM_PREFIXES = 8
_NUM_LAYERS = 30  # of SmolLM2-135M
_LONGEST = 160  # tokens of a prompt
_MOST_OUTPUT = 16
_NUM_WARM_UP = 24
_PAUSE_S = 10.0  # between warm-up and measurement: nothing of it is under way then
_SEND_BYTES_PER_S = 1e9  # loopback
_NO_PROXY = (("grpc.enable_http_proxy", 0),)
_MESSAGES = 4  # before a first token: the announcement to the decode worker and its answer, the prompt, the token


@dataclass(frozen=True)
class Seen:
    """One request as its gateway timed it."""

    ttft_s: float
    tpot_s: float
    input_tokens: int
    cached_tokens: int
    bytes_shipped: int
    parts: TtftParts


@dataclass(frozen=True)
class Service:
    """What the running service says of itself."""

    kv_bytes_per_token: int
    max_model_len: int
    pages_total: int  # of each worker


@dataclass(frozen=True)
class Served:
    """What the service was asked, at which instants since the first request, and what was seen of the last ones."""

    service: Service
    warm_up: Workload
    workload: Workload
    seen: list[Seen]
    rate_rps: float
    latency_s: float  # of a gRPC message while the service has one request


def main() -> int:
    """Serve, simulate, print, and write the JSON if asked."""
    options = _parser().parse_args()
    exit_on_sigterm()
    config = load_config(_CONFIG)
    with tempfile.TemporaryDirectory(prefix="prfaas-calibration-") as folder:
        costs_file = Path(folder) / "costs.json"
        real = _serve(Path(folder), costs_file, options.requests, options.share)
        simulated = _simulate(config, costs_file, real)
    rows = [row(name, measures(real.seen)[name], measures(simulated)[name]) for name in measures(real.seen)]
    rows += part_rows(real.seen, simulated)
    by_name = {str(row["measure"]): row for row in rows}
    report = Report(
        benchmark="calibration",
        commit=commit(),
        machine=machine(),
        rows=rows,
        figures={
            "ttft_mean_error": abs(float(by_name["TTFT mean s"]["relative_error"] or 0.0)),
            "tpot_mean_error": abs(float(by_name["TPOT mean s"]["relative_error"] or 0.0)),
            "rate_rps": real.rate_rps,
        },
    )
    report.print_table(_COLUMNS, f"{options.requests} requests at {real.rate_rps:.3g}/s to the default service")
    if options.json is not None:
        report.write_json(options.json)
    return 0


def workload_of(count: int, rate: float, seed: int, first: int) -> Workload:
    """Prompts of up to 160 tokens, of which one or two blocks are one of a few prefixes; answers of 4 to 16 tokens."""
    random = Random(seed)
    at = 0.0
    conversations = []
    for number in range(first, first + count):
        at += random.expovariate(rate)
        prefix = random.randrange(_NUM_PREFIXES)
        blocks = (100 + 2 * prefix, 101 + 2 * prefix)[: random.choice((1, 2))]
        num_tokens = random.randint(len(blocks) * _BLOCK + 1, _LONGEST)
        prompt = Prompt(num_tokens, 1000 + random.randrange(40_000), blocks, _BLOCK)
        turn = Turn(number, prompt, random.randint(4, _MOST_OUTPUT), Answer(100_000 + number))
        conversations.append(Conversation(at, (turn,)))
    return Workload(conversations)


# ---- the real one ----


def _serve(folder: Path, costs_file: Path, count: int, share: float) -> Served:
    http_port, grpc_port = free_ports(2)
    settings = (
        f"http.port={http_port}",
        f"grpc.port={grpc_port}",
        f"router.costs_file={costs_file}",
        f"engine.turns_file={folder / 'turns'}",
        "planner.mode=off",
    )
    command = [sys.executable, "-m", "cluster", "serve", str(_CONFIG)]
    for setting in settings:
        command += ["--set", setting]
    address = f"127.0.0.1:{grpc_port}"
    with ServiceProcess(command, f"http://127.0.0.1:{http_port}/health", folder / "service.log") as service:
        service.wait_until_healthy(300.0)
        began_at = time.perf_counter()
        warm_up, alone = asyncio.run(_one_by_one(address, workload_of(_NUM_WARM_UP, 1.0, seed=1, first=1_000_000)))
        latency_s = float(np.median([one.parts.messages_s for one in alone])) / _MESSAGES
        rate = share * _NUM_WARM_UP / (time.perf_counter() - began_at)
        time.sleep(_PAUSE_S)
        starts_at = time.perf_counter() - began_at
        workload = workload_of(count, rate, seed=2, first=0)
        seen = asyncio.run(_send_all(address, workload))
        later = [replace(c, starts_at=starts_at + c.starts_at) for c in workload.conversations]
        return Served(_ask(address), warm_up, Workload(later), seen, rate, latency_s)


async def _one_by_one(address: str, workload: Workload) -> tuple[Workload, list[Seen]]:
    """The requests at the instants at which each was sent: when the last one had ended; and how they were served."""
    sent, seen = [], []
    async with grpc.aio.insecure_channel(address, options=_NO_PROXY) as channel:
        stub = rpc.GenerationStub(channel)
        began_at = time.perf_counter()
        for conversation in workload.conversations:
            sent.append(replace(conversation, starts_at=time.perf_counter() - began_at))
            seen.append(await _send(stub, conversation.turns[0]))
    return Workload(sent), seen


def _ask(address: str) -> Service:
    with grpc.insecure_channel(address, options=_NO_PROXY) as channel:
        stub = rpc.GenerationStub(channel)
        model = stub.GetModelInfo(pb.GetModelInfoRequest(), timeout=10.0)
        workers = stub.GetClusterInfo(pb.GetClusterInfoRequest(), timeout=10.0).workers
    return Service(model.kv_bytes_per_token, model.max_model_len, min(worker.pages_total for worker in workers))


async def _send_all(address: str, workload: Workload) -> list[Seen]:
    async with grpc.aio.insecure_channel(address, options=_NO_PROXY) as channel:
        stub = rpc.GenerationStub(channel)
        began_at = time.perf_counter()
        tasks = []
        for conversation in workload.conversations:
            await asyncio.sleep(max(0.0, began_at + conversation.starts_at - time.perf_counter()))
            tasks.append(asyncio.create_task(_send(stub, conversation.turns[0])))
        return list(await asyncio.gather(*tasks))


async def _send(stub: rpc.GenerationStub, turn: Turn) -> Seen:
    request = pb.GenerateRequest(
        tokenized=pb.TokenizedInput(input_ids=turn.prompt.tokens()),
        sampling_params=pb.SamplingParams(max_tokens=turn.output_tokens, temperature=0.0, ignore_eos=True),
    )
    complete: pb.GenerateComplete | None = None
    async for response in stub.Generate(request):
        if response.HasField("complete"):
            complete = response.complete
    assert complete is not None, "a stream ends with its completion"
    timing = complete.timing
    return Seen(
        timing.ttft_s,
        (timing.total_s - timing.ttft_s) / max(1, turn.output_tokens - 1),
        turn.input_tokens,
        complete.usage.cached_tokens,
        timing.bytes_shipped,
        TtftParts(**{field.name: getattr(timing.ttft_parts, field.name) for field in fields(TtftParts)}),
    )


# ---- the simulated one ----


def _simulate(config: ServiceConfig, costs_file: Path, real: Served) -> list[Seen]:
    service = real.service
    engine = replace(config.engine, num_pages=service.pages_total)
    fingerprint = CacheFingerprint("smollm2", "1", "float32", engine.page_size, "smollm2")
    kv_bytes = service.kv_bytes_per_token
    kind = WorkerKind(
        cost=MeasuredCost(saved_costs(costs_file)),
        engine=engine,
        kv=KvShape(kv_bytes, 0.0, _NUM_LAYERS),
        model=ModelInfo("smollm2", fingerprint, service.max_model_len, 1 << 62, (), kv_bytes, _NUM_LAYERS),
        compute=ComputeProfile(device="cpu"),
        send_bytes_per_s=_SEND_BYTES_PER_S,
    )
    here = ClusterSpec(
        ClusterId(config.cluster_id),
        kind,
        config.prefill.count,
        config.decode.count,
        real.latency_s,
        shares_device=True,
    )
    scenario = Scenario(
        (here,), router=config.router, admission=config.admission, planner=PlannerConfig(mode=PLANNER_OFF)
    )
    conversations = [*real.warm_up.conversations, *real.workload.conversations]
    result = simulate(scenario, Workload(conversations))
    measured = {conversation.turns[0].number for conversation in real.workload.conversations}
    return [
        Seen(r.ttft_s, r.tpot_s, r.input_tokens, r.timing.cached_tokens, r.timing.bytes_shipped, r.timing.ttft_parts)
        for r in result.records
        if r.number in measured
        and r.ttft_s is not None
        and r.tpot_s is not None
        and r.timing is not None
        and r.timing.ttft_parts is not None
    ]


# ---- side by side ----


def measures(seen: Sequence[Seen]) -> dict[str, float]:
    return {
        "requests": float(len(seen)),
        "TTFT mean s": float(np.mean([one.ttft_s for one in seen])),
        "TTFT P90 s": float(np.percentile([one.ttft_s for one in seen], 90)),
        "TPOT mean s": float(np.mean([one.tpot_s for one in seen])),
        "TPOT P90 s": float(np.percentile([one.tpot_s for one in seen], 90)),
        "hit rate": sum(one.cached_tokens for one in seen) / sum(one.input_tokens for one in seen),
        "shipped MB": sum(one.bytes_shipped for one in seen) / 1e6,
    }


def part_rows(real: Sequence[Seen], simulated: Sequence[Seen]) -> list[dict[str, Cell]]:
    """The means of the TTFT's parts that take a millisecond or more on either side."""
    means = [
        {name: float(np.mean([asdict(one.parts)[name] for one in seen])) for name in asdict(TtftParts())}
        for seen in (real, simulated)
    ]
    return [
        row(f"of it {name.removesuffix('_s')} s", means[0][name], means[1][name])
        for name in means[0]
        if max(means[0][name], means[1][name]) >= 1e-3
    ]


def row(name: str, real: float, simulated: float) -> dict[str, Cell]:
    return {
        "measure": name,
        "real": real,
        "simulated": simulated,
        "relative_error": simulated / real - 1 if real else None,
    }


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.calibration", description=(__doc__ or "").partition("\n")[0]
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the report there")
    parser.add_argument("--requests", type=int, default=200)
    parser.add_argument("--share", type=float, default=0.6, help="of the rate at which they come one after the other")
    return parser


if __name__ == "__main__":
    sys.exit(main())
