"""What does disaggregation cost the second token? Two whole workers beside one of them alone, in the same run.

    python -m benchmarks.hand_over [--json FILE] [--tokens 8192 32768] [--devices 0 1] [--rounds 5]
        [--transport nixl]

Two worker processes (engine, K/V transfer, gRPC; a model of random weights, by default of Llama 3.1 8B's shape) on a
GPU each, and the gateway's router in this process, over each transport. The same prompts go, one at a time and in
turns, from the prefill to the decode worker, and to the decode worker alone, which then prefills them itself:

    gap        first to second token at the router
    wait       of TTFT what was not prefill: messages, and queues for pages and for the engine
    added      gap beyond the one of the decode worker alone: what the hand-over costs
    share      added, over the seconds of prefill

Tokens of both ways are compared (greedy; ``same``). Prefix caches are off, so that every prompt is computed.
``--devices cpu cpu --model tiny --tokens 256`` rehearses it.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

from pydantic import TypeAdapter
from rich.console import Console

from benchmarks import report
from benchmarks.report import Cell
from cluster.config import RouterConfig, WorkerConfig
from cluster.membership import Membership
from cluster.router import Router
from cluster.routing_policy import RouteRequest
from cluster.view import ClusterView, Route
from core.clock import WallClock
from core.request import (
    ClusterId,
    GatewayId,
    GenerateRequest,
    RequestId,
    RequestTiming,
    Role,
    SamplingParams,
    WorkerId,
)
from engine.config import EngineConfig
from kv_transfer.config import KvTransferConfig, LinkConfig
from protos.channels import InternalGrpc

_NUM_NEW = 16
_START_TIMEOUT_S = 240.0
_ROOT = Path(__file__).resolve().parent.parent
# meta-llama/Llama-3.1-8B's published shape; weights are random.
LLAMA_8B = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "vocab_size": 128256,
    "max_position_embeddings": 131072,
    "rope_theta": 500000.0,
    "torch_dtype": "bfloat16",
}
TINY = {
    **LLAMA_8B,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "vocab_size": 256,
}
MODELS = {"llama-8b": LLAMA_8B, "tiny": TINY}
COLUMNS = {
    "tokens": "tokens",
    "arm": "arm",
    "path": "path",
    "ttft_ms": "TTFT",
    "wait_ms": "wait",
    "prefill_ms": "prefill",
    "transfer_ms": "transfer",
    "tail_ms": "tail",
    "gap_ms": "gap",
    "tpot_ms": "TPOT",
    "added_ms": "added",
    "share": "share",
    "same": "same",
}


@dataclass(frozen=True)
class Arm:
    """One way to serve a prompt."""

    name: str
    transport: str
    connections: int = 1


ARMS = (Arm("nixl", "nixl"), Arm("tcp x4", "tcp", 4))


@dataclass(frozen=True)
class Served:
    """One request, as the router's caller saw it. Seconds."""

    tokens: tuple[int, ...]
    ttft_s: float
    gap_s: float  # first to second token
    tpot_s: float  # of those after the second
    timing: RequestTiming


class Chosen:
    """Both workers, or the decode worker alone: whichever ``alone`` says at the moment."""

    uses_prefixes = False

    def __init__(self) -> None:
        self.alone = False

    def route(self, request: RouteRequest, view: ClusterView) -> Route:
        (decode,) = view.ready(Role.DECODE)
        (prefill,) = view.ready(Role.PREFILL)
        return Route(None if self.alone else prefill, decode, "chosen by the benchmark")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run every arm, print the table, write the JSON."""
    options = _parser().parse_args(arguments)
    with tempfile.TemporaryDirectory(prefix="prfaas-bench-") as folder:
        Path(folder, "config.json").write_text(json.dumps(MODELS[options.model]), encoding="utf-8")
        rows = [
            row for arm in ARMS if arm.transport in options.transport for row in asyncio.run(_run(arm, folder, options))
        ]
    finished = report.Report("hand_over", report.commit(), report.machine(), rows, figures(rows))
    finished.print_table(
        COLUMNS, f"{options.model}, devices {' and '.join(options.devices)}, {finished.commit[:12]}; ms"
    )
    if options.json:
        finished.write_json(options.json)
    return 0


def figures(rows: Sequence[Mapping[str, Cell]]) -> dict[str, float]:
    """The shares of prefill that the second token waits longer, by transport and prompt."""
    return {
        f"added_over_prefill_{str(row['arm']).split()[0]}_{row['tokens']}": row["share"]
        for row in rows
        if isinstance(row["share"], float)
    }


async def _run(arm: Arm, folder: str, options: argparse.Namespace) -> list[dict[str, Cell]]:
    policy = Chosen()
    rows = []
    async with _service(arm, folder, policy, options) as (membership, router):
        for num_tokens in options.tokens:
            together: list[Served] = []
            alone: list[Served] = []
            for number in range(options.rounds + 1):
                for policy.alone, taken in ((False, together), (True, alone)):
                    name = f"{num_tokens}-{number}-{policy.alone}"
                    prompt = _prompt(num_tokens, number, MODELS[options.model]["vocab_size"])
                    taken.append(await _serve(router, RequestId(name), prompt))
            path = next(iter(membership.view().links.values())).estimate
            rows += _rows(num_tokens, arm, path.path if path else "", together, alone)
            Console(stderr=True).print(f"{arm.name}, {num_tokens} tokens: done")
    return rows


def _rows(
    num_tokens: int, arm: Arm, path: str, together: Sequence[Served], alone: Sequence[Served]
) -> list[dict[str, Cell]]:
    """A row for each way; the first round of each warmed up."""
    same = sum(a.tokens == b.tokens for a, b in zip(together, alone, strict=True))
    both, one = together[1:], alone[1:]
    added = [a.gap_s - b.gap_s for a, b in zip(both, one, strict=True)]
    prefill_s = statistics.median(served.timing.prefill_s for served in both)
    paired: dict[str, Cell] = {
        "added_ms": statistics.median(added) * 1e3,
        "share": statistics.median(added) / prefill_s,
        "same": f"{same} of {len(together)}",
    }
    return [
        _row(num_tokens, arm.name, path, both) | paired,
        _row(num_tokens, "one worker alone", "", one),
    ]


def _row(num_tokens: int, name: str, path: str, served: Sequence[Served]) -> dict[str, Cell]:
    def middle(values: list[float]) -> float:
        return statistics.median(values) * 1e3

    return {
        "tokens": num_tokens,
        "arm": name,
        "path": path,
        "ttft_ms": middle([one.ttft_s for one in served]),
        "wait_ms": middle([_wait_s(one) for one in served]),
        "prefill_ms": middle([one.timing.prefill_s for one in served]),
        "transfer_ms": middle([one.timing.transfer_s for one in served]),
        "tail_ms": middle([one.timing.exposed_transfer_s for one in served]),
        "gap_ms": middle([one.gap_s for one in served]),
        "tpot_ms": middle([one.tpot_s for one in served]),
        "added_ms": None,
        "share": None,
        "same": None,
    }


def _wait_s(served: Served) -> float:
    parts = served.timing.ttft_parts
    assert parts is not None, "it has a token"
    return served.ttft_s - parts.prefill_s


async def _serve(router: Router, request_id: RequestId, prompt: tuple[int, ...]) -> Served:
    clock = WallClock()
    sampling = SamplingParams(temperature=0.0, max_tokens=_NUM_NEW, ignore_eos=True, seed=0)
    began = clock.now()
    tokens: list[int] = []
    times: list[float] = []
    timing: RequestTiming | None = None
    async for chunk in router.generate(GenerateRequest(request_id, prompt, sampling, arrived_at=began)):
        tokens += chunk.token_ids
        times += [clock.now()] * len(chunk.token_ids)
        timing = chunk.timing or timing
    assert timing is not None, "the last chunk has it"
    later = (times[-1] - times[1]) / (len(times) - 2)
    return Served(tuple(tokens), times[0] - began, times[1] - times[0], later, timing)


def _prompt(num_tokens: int, number: int, vocab_size: object) -> tuple[int, ...]:
    assert isinstance(vocab_size, int), "as the config says"
    dice = random.Random(f"{num_tokens} {number}")
    return tuple(dice.randrange(vocab_size) for _ in range(num_tokens))


@asynccontextmanager
async def _service(
    arm: Arm, folder: str, policy: Chosen, options: argparse.Namespace
) -> AsyncIterator[tuple[Membership, Router]]:
    """The workers, registered, and a router that follows ``policy``."""
    clock, gateway_id, config = WallClock(), GatewayId("benchmark"), RouterConfig(lease_s=30.0)
    membership = Membership(config, gateway_id, clock, InternalGrpc(None))
    registry = await membership.start("127.0.0.1")
    router = Router(membership, policy, config, clock, gateway_id)
    workers = [
        _start(role, device, arm, folder, registry, max(options.tokens))
        for role, device in zip(Role, options.devices, strict=True)
    ]
    try:
        if not await membership.wait_until(lambda view: len(view.workers) == len(workers), _START_TIMEOUT_S):
            raise TimeoutError(f"{len(membership.view().workers)} of {len(workers)} workers came")
        yield membership, router
    finally:
        await router.drain(1.0)
        await membership.close()
        for worker in workers:
            worker.kill()
            worker.wait()


def _start(role: Role, device: str, arm: Arm, folder: str, registry: str, num_tokens: int) -> subprocess.Popen[bytes]:
    """A worker process that sees one device, as Ray would give it."""
    most = num_tokens + 2 * _NUM_NEW
    engine = EngineConfig(
        device="cpu" if device == "cpu" else "cuda",
        num_pages=2 * most // 16 + 8,  # with one prompt's the gateway would wait for a report that they are free again
        max_model_len=most,
        max_batch_tokens=most,
        prefix_cache=False,
    )
    config = WorkerConfig(
        worker_id=WorkerId(f"{role.value}-0"),
        cluster_id=ClusterId("local"),
        role=role,
        model=f"dummy:{folder}",
        model_cache_dir="~/.cache/prfaas/models",
        engine=engine,
        kv_transfer=KvTransferConfig(transport=arm.transport, links=(LinkConfig(connections=arm.connections),)),
        host="127.0.0.1",
        registries=(registry,),
        log_level="warning",
    )
    visible = {} if device == "cpu" else {"CUDA_VISIBLE_DEVICES": device}
    return subprocess.Popen(
        [sys.executable, "-m", "cluster.worker_host", TypeAdapter(WorkerConfig).dump_json(config).decode()],
        stdout=subprocess.DEVNULL,
        cwd=_ROOT,
        env={**os.environ, **visible},
    )


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.hand_over", description=(__doc__ or "").partition("\n")[0]
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the report there")
    parser.add_argument("--tokens", type=int, nargs="+", default=[8192, 32768], help="of the prompts")
    parser.add_argument("--devices", nargs=2, default=["0", "1"], metavar=("PREFILL", "DECODE"))
    parser.add_argument("--transport", nargs="+", choices=[arm.transport for arm in ARMS], default=["nixl", "tcp"])
    parser.add_argument("--model", choices=MODELS, default="llama-8b", help="shape of the random weights")
    parser.add_argument("--rounds", type=int, default=5, help="after one warm-up (default 5)")
    return parser


if __name__ == "__main__":
    sys.exit(main())
