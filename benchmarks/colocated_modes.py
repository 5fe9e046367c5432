"""Two GPUs: a replica on each, in which of three modes, or one that prefills and one that decodes?

    python -m benchmarks.colocated_modes [--json FILE] [--plot FILE] [--models dense moe] [--tiny]

    chunked       two workers; prompts in chunks beside decoding, as large as the promised time between tokens allows
    layered       two workers; whole prompts, a decoding step after each group of their layers
    partitioned   two workers; prompts on a part of a GPU's multiprocessors, decoding at the same time on the rest
    1P+1D         one worker prefills, one decodes; K/V goes over NIXL

Real workers (cluster/worker_host.py) on a GPU each and the gateway's router in this process, which gives requests to
replicas in turn. Requests come at random (Poisson, the same for all arms) at some rates for a while, and then all at
once (``burst``: 8,192 tokens in, 128 out; vLLM 0.24 reached 56,000 tokens a second in all with two replicas there, and
32,000 to 34,000 as 1P+1D). Goodput are requests a second whose first token and whose mean time between tokens both
are in time. ``worst gap`` is the longest time between two tokens of a request: what a prompt does to others.

``dense`` is a Llama of 8B parameters, ``moe`` a mixture of 128 experts in Qwen3-30B-A3B's shape with a quarter of its
layers, in bfloat16 with random weights. Of ``moe`` one worker is measured for each of two modes, at the same time, on a
GPU each; with one ``--devices`` also of ``dense``, one after the other. Then it is given half of the requests, and what
it does in a second is told twice. ``--tiny``: a tiny model on CPU cores, everywhere; TCP instead of NIXL, and numbers
that say nothing about GPUs.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import random
import subprocess
import sys
import tempfile
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from statistics import fmean

from pydantic import TypeAdapter
from rich.console import Console

from benchmarks import report
from benchmarks.hand_over import LLAMA_8B, TINY
from benchmarks.mixture import QWEN3_MOE, TINY_QWEN3_MOE
from benchmarks.orderly_exit import exit_on_sigterm
from benchmarks.report import Cell, percentile
from cluster.config import RouterConfig, WorkerConfig
from cluster.membership import Membership
from cluster.router import Router
from cluster.routing_policy import RouteRequest
from cluster.view import ClusterView, Route
from core.clock import WallClock
from core.request import ClusterId, GatewayId, GenerateRequest, RequestId, Role, SamplingParams, WorkerId
from engine.config import EngineConfig
from kv_transfer.config import KvTransferConfig, LinkConfig
from protos.channels import InternalGrpc

_START_TIMEOUT_S = 240.0
_ROOT = Path(__file__).resolve().parent.parent
_PAGE = 16
COLUMNS = {
    "arm": "arm",
    "load": "load",
    "goodput_rps": "goodput/s",
    "in_time": "in time",
    "ttft_p50_s": "TTFT P50 s",
    "ttft_p90_s": "P90",
    "tpot_p50_ms": "TPOT P50 ms",
    "tpot_p90_ms": "P90",
    "gap_p90_ms": "worst gap P90",
    "tokens_per_s": "tokens/s",
    "took_s": "s",
    "lost": "lost",
}


@dataclass(frozen=True)
class Scale:
    """What is asked, of which model."""

    name: str
    model: Mapping[str, object]
    prompt_tokens: int
    output_tokens: int
    rates_rps: tuple[float, ...]  # of both GPUs together
    window_s: float  # in which requests come at each rate
    burst: int  # requests that come at once
    burst_prompt_tokens: int
    burst_output_tokens: int
    ttft_slo_s: float
    tpot_slo_s: float
    kv_tokens: int  # of a worker's pool
    step_tokens: int
    max_batch_size: int


DENSE = Scale("dense", LLAMA_8B, 4096, 128, (4.0, 8.0, 12.0), 7.0, 32, 8192, 128, 1.0, 0.04, 320_000, 8192, 64)
MOE = Scale("moe", QWEN3_MOE, 4096, 128, (4.0, 10.0), 6.0, 24, 8192, 128, 1.0, 0.03, 400_000, 8192, 64)
TINY_DENSE = Scale("dense", TINY, 96, 8, (4.0,), 2.0, 6, 160, 8, 2.0, 0.5, 4096, 192, 8)
TINY_MOE = Scale(
    "moe",
    TINY_QWEN3_MOE,
    96,
    8,
    (4.0,),
    2.0,
    6,
    160,
    8,
    2.0,
    0.5,
    4096,
    192,
    8,
)


@dataclass(frozen=True)
class Place:
    """One worker: what it is for, on which device."""

    role: Role
    device: str  # a GPU's number, or cpu


@dataclass(frozen=True)
class Arm:
    """One way to use the devices."""

    name: str
    mode: str  # engine.colocated_mode
    places: tuple[Place, ...]
    share: float = 1.0  # of the rates and of the burst that it is given


@dataclass(frozen=True)
class Served:
    """One request, as the router's caller saw it. Seconds."""

    ttft_s: float
    tpot_s: float  # mean of those after the first
    worst_gap_s: float
    num_tokens: int  # prompt and output


class InTurn:
    """The only prefill worker, if there is one, and decode workers one after the other."""

    uses_prefixes = False

    def __init__(self) -> None:
        self._next = 0

    def route(self, request: RouteRequest, view: ClusterView) -> Route:
        decode = sorted(view.ready(Role.DECODE), key=lambda worker: worker.worker_id)
        prefill = view.ready(Role.PREFILL)
        self._next += 1
        return Route(prefill[0] if prefill else None, decode[self._next % len(decode)], "in turn")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run every arm, print the tables, write what is asked for."""
    options = _parser().parse_args(arguments)
    exit_on_sigterm()
    rows: list[dict[str, Cell]] = []
    notes: dict[str, str | int | float] = {}
    for group in _groups(options):
        for found, said in asyncio.run(_run_group(group)):
            rows += found
            notes |= said
        # After every group: a run may be cut short.
        finished = report.Report("colocated_modes", report.commit(), report.machine() | notes, rows, figures(rows))
        if options.json is not None:
            finished.write_json(options.json)
    for model in options.models:
        own = [row for row in rows if row["model"] == model]
        scale = _scale(model, options.tiny)
        title = (
            f"{model}: {scale.prompt_tokens} in, {scale.output_tokens} out; in time: first token within "
            f"{scale.ttft_slo_s:g} s, {scale.tpot_slo_s * 1e3:g} ms between tokens"
        )
        replace(finished, rows=own, figures={}).print_table(COLUMNS, title)
    for name, note in notes.items():
        print(f"{name}: {note}")
    if options.plot is not None:
        draw(rows, options.plot)
    return 0


def _groups(options: argparse.Namespace) -> list[list[tuple[Arm, Scale]]]:
    """Arms that run at the same time, one group after the other."""
    devices = ["cpu", "cpu"] if options.tiny else options.devices
    pair = (Place(Role.DECODE, devices[0]), Place(Role.DECODE, devices[-1]))
    dense, moe = _scale("dense", options.tiny), _scale("moe", options.tiny)
    groups: list[list[tuple[Arm, Scale]]] = []
    if "dense" in options.models:
        replicas, share = (pair, 1.0) if len(devices) == 2 else (pair[:1], 0.5)
        groups += [[(Arm(mode, mode, replicas, share), dense)] for mode in ("chunked", "layered", "partitioned")]
        if len(devices) == 2:
            apart = (Place(Role.PREFILL, devices[0]), Place(Role.DECODE, devices[1]))
            groups.append([(Arm("1P+1D", "chunked", apart), dense)])
    if "moe" in options.models:
        chosen = [
            (Arm(mode, mode, (place,), 0.5), moe) for mode, place in zip(("chunked", "layered"), pair, strict=True)
        ]
        groups += [chosen] if len(devices) == 2 else [[one] for one in chosen]
    return [group for group in groups if any(arm.name in options.arms for arm, _ in group)]


def _scale(model: str, tiny: bool) -> Scale:
    return {("dense", False): DENSE, ("moe", False): MOE, ("dense", True): TINY_DENSE, ("moe", True): TINY_MOE}[
        model, tiny
    ]


async def _run_group(
    group: Sequence[tuple[Arm, Scale]],
) -> list[tuple[list[dict[str, Cell]], dict[str, str]]]:
    return list(await asyncio.gather(*(_run(arm, scale) for arm, scale in group)))


async def _run(arm: Arm, scale: Scale) -> tuple[list[dict[str, Cell]], dict[str, str]]:
    """(a row for each load, what the workers say of their steps)."""
    console, clock = Console(stderr=True), WallClock()
    rows: list[dict[str, Cell]] = []
    began_at = clock.now()
    async with _service(arm, scale) as (membership, router):
        console.print(f"{scale.name} {arm.name}: ready after {clock.now() - began_at:.1f} s")
        client = _Client(router, scale, arm.name)
        for _ in range(2 * len(arm.places)):  # the first requests of a worker warm it up
            await client.ask(scale.prompt_tokens, scale.output_tokens)
        for rate in scale.rates_rps:
            came_at = arrivals(rate * arm.share, scale.window_s)
            rows.append(
                await _load(client, arm, scale, f"{rate:g}/s", came_at, (scale.prompt_tokens, scale.output_tokens))
            )
            console.print(f"{scale.name} {arm.name} at {rate:g}/s: {rows[-1]['goodput_rps']:.2f}/s in time")
        burst = [0.0] * round(scale.burst * arm.share)
        sizes = (scale.burst_prompt_tokens, scale.burst_output_tokens)
        rows.append(await _load(client, arm, scale, "burst", burst, sizes))
        console.print(f"{scale.name} {arm.name}, burst: {rows[-1]['tokens_per_s']:.0f} tokens/s")
        notes = {}
        for worker in membership.view().workers:
            modes = worker.load.modes
            notes[f"{scale.name} {arm.name} {worker.worker_id}"] = (
                f"{modes.attention}, {modes.forward} {modes.forward_reason}; {modes.colocated_reason}; "
                f"prompts' steps {dict(modes.prompt_steps)}, decoding beside them {modes.num_decode_beside}"
            )
    return rows, notes


async def _load(
    client: _Client, arm: Arm, scale: Scale, load: str, came_at: Sequence[float], sizes: tuple[int, int]
) -> dict[str, Cell]:
    clock = WallClock()
    began_at = clock.now()

    async def one(at_s: float) -> Served | None:
        await asyncio.sleep(max(0.0, began_at + at_s - clock.now()))
        return await client.ask(*sizes)

    seen = await asyncio.gather(*(one(at_s) for at_s in came_at))
    return row(scale, arm, load, [one for one in seen if one is not None], len(came_at), clock.now() - began_at)


def arrivals(rate_rps: float, window_s: float, seed: int = 1) -> list[float]:
    """Seconds at which requests come: a Poisson process; the same instants, stretched, at every rate."""
    dice, at_s, made = random.Random(seed), 0.0, []
    while (at_s := at_s + dice.expovariate(rate_rps)) < window_s:
        made.append(at_s)
    return made


def row(scale: Scale, arm: Arm, load: str, seen: Sequence[Served], asked: int, took_s: float) -> dict[str, Cell]:
    """What one arm made of one load in ``took_s`` seconds; of an arm with half the load twice as much counts."""
    in_time = [one.ttft_s <= scale.ttft_slo_s and one.tpot_s <= scale.tpot_slo_s for one in seen]

    def part(values: Sequence[float], percent: float, factor: float = 1.0) -> float | None:
        found = percentile(values, percent)
        return None if found is None else found * factor

    tpots, gaps = [one.tpot_s for one in seen], [one.worst_gap_s for one in seen]
    return {
        "model": scale.name,
        "arm": arm.name,
        "load": load,
        "goodput_rps": sum(in_time) / took_s / arm.share,
        "in_time": fmean(in_time) if seen else 0.0,
        "ttft_p50_s": part([one.ttft_s for one in seen], 50),
        "ttft_p90_s": part([one.ttft_s for one in seen], 90),
        "tpot_p50_ms": part(tpots, 50, 1e3),
        "tpot_p90_ms": part(tpots, 90, 1e3),
        "gap_p90_ms": part(gaps, 90, 1e3),
        "tokens_per_s": sum(one.num_tokens for one in seen) / took_s / arm.share,
        "took_s": took_s,
        "lost": asked - len(seen),
    }


def figures(rows: Sequence[Mapping[str, Cell]]) -> dict[str, float]:
    """The most goodput of each arm, and tokens a second of its burst."""
    found: dict[str, float] = {}
    for one in rows:
        name = f"{one['model']}_{one['arm']}"
        if one["load"] == "burst":
            found[f"burst_tokens_per_s_{name}"] = float(one["tokens_per_s"] or 0.0)
        else:
            key = f"goodput_{name}"
            found[key] = max(found.get(key, 0.0), float(one["goodput_rps"] or 0.0))
    return found


def draw(rows: Sequence[Mapping[str, Cell]], path: Path) -> None:
    """Goodput, time to the first token and times between tokens over the rate, of the dense model."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(1, 4, figsize=(15, 3.4), layout="constrained")
    panels = {
        "goodput_rps": "in time, 1/s",
        "ttft_p90_s": "TTFT P90, s",
        "tpot_p90_ms": "TPOT P90, ms",
        "gap_p90_ms": "worst gap P90, ms",
    }
    own = [r for r in rows if r["model"] == "dense" and r["load"] != "burst"]
    for axis, (key, title) in zip(axes, panels.items(), strict=True):
        for arm in dict.fromkeys(str(r["arm"]) for r in own):
            points = [(float(str(r["load"]).removesuffix("/s")), r[key]) for r in own if r["arm"] == arm]
            axis.plot([x for x, _ in points], [y for _, y in points], marker="o", label=arm)
        axis.set_xlabel("requests/s")
        axis.set_title(title)
        axis.set_ylim(bottom=0)
    axes[0].legend()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)


class _Client:
    """Asks the router, one request after the other or many at once."""

    def __init__(self, router: Router, scale: Scale, name: str) -> None:
        self._router = router
        self._vocabulary = int(str(scale.model["vocab_size"]))
        self._name = name
        self._number = 0

    async def ask(self, num_tokens: int, num_new: int) -> Served | None:
        """One request of random tokens; None: it was lost."""
        clock = WallClock()
        self._number += 1
        dice = random.Random(self._number)
        prompt = tuple(dice.choices(range(self._vocabulary), k=num_tokens))
        sampling = SamplingParams(temperature=0.0, max_tokens=num_new, ignore_eos=True, seed=0)
        began_at = clock.now()
        request = GenerateRequest(RequestId(f"{self._name}-{self._number}"), prompt, sampling, arrived_at=began_at)
        times: list[float] = []
        try:
            async for chunk in self._router.generate(request):
                times += [clock.now()] * len(chunk.token_ids)
        except Exception as error:
            Console(stderr=True).print(f"{self._name}: lost a request: {error}")
            return None
        gaps = [later - earlier for earlier, later in pairwise(times)]
        return Served(times[0] - began_at, fmean(gaps), max(gaps), num_tokens + len(times))


@asynccontextmanager
async def _service(arm: Arm, scale: Scale) -> AsyncIterator[tuple[Membership, Router]]:
    """The arm's workers, registered, and a router."""
    clock, gateway_id, config = WallClock(), GatewayId("benchmark"), RouterConfig(lease_s=30.0)
    membership = Membership(config, gateway_id, clock, InternalGrpc(None))
    registry = await membership.start("127.0.0.1")
    router = Router(membership, InTurn(), config, clock, gateway_id)
    with tempfile.TemporaryDirectory(prefix="prfaas-bench-") as folder:
        workers = _start_all(arm, scale, folder, registry)
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


def _start_all(arm: Arm, scale: Scale, folder: str, registry: str) -> list[subprocess.Popen[bytes]]:
    Path(folder, "config.json").write_text(json.dumps(scale.model), encoding="utf-8")
    return [_start(number, place, arm, scale, folder, registry) for number, place in enumerate(arm.places)]


def _start(number: int, place: Place, arm: Arm, scale: Scale, folder: str, registry: str) -> subprocess.Popen[bytes]:
    """A worker process that sees one device, as Ray would give it."""
    on_cpu = place.device == "cpu"
    engine = EngineConfig(
        device="cpu" if on_cpu else "cuda",
        page_size=_PAGE,
        num_pages=scale.kv_tokens // _PAGE,
        max_model_len=max(scale.prompt_tokens, scale.burst_prompt_tokens) + 2 * scale.burst_output_tokens,
        max_batch_tokens=scale.step_tokens,
        max_batch_size=scale.max_batch_size,
        prefix_cache=False,
        colocated_mode=arm.mode,
        tpot_slo_s=scale.tpot_slo_s,
        threads=1 if on_cpu else None,
    )
    transport = "tcp" if on_cpu else "nixl"
    config = WorkerConfig(
        worker_id=WorkerId(f"{place.role.value}-{number}"),
        cluster_id=ClusterId("local"),
        role=place.role,
        model=f"dummy:{folder}",
        model_cache_dir="~/.cache/prfaas/models",
        engine=engine,
        kv_transfer=KvTransferConfig(transport=transport, links=(LinkConfig(),)),
        host="127.0.0.1",
        registries=(registry,),
        log_level="warning",
    )
    visible = {} if on_cpu else {"CUDA_VISIBLE_DEVICES": place.device}
    return subprocess.Popen(
        [sys.executable, "-m", "cluster.worker_host", TypeAdapter(WorkerConfig).dump_json(config).decode()],
        stdout=subprocess.DEVNULL,
        cwd=_ROOT,
        env={**os.environ, **visible},
    )


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.colocated_modes", description=(__doc__ or "").partition("\n\n")[0]
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the report there")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="draw the dense model's curves there (.png, .svg)")
    parser.add_argument("--devices", nargs="+", default=["0", "1"], metavar="GPU", help="two, or one (default: 0 1)")
    arms = ("chunked", "layered", "partitioned", "1P+1D")
    parser.add_argument("--arms", nargs="+", choices=arms, default=list(arms), help="(default: all)")
    parser.add_argument("--models", nargs="+", choices=("dense", "moe"), default=["dense", "moe"])
    parser.add_argument("--tiny", action="store_true", help="tiny models on the CPU")
    return parser


if __name__ == "__main__":
    sys.exit(main())
