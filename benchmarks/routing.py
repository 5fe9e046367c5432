"""What does it matter where prompts go? Every routing policy on the same prompts, on the real default service.

    python -m benchmarks.routing [--json FILE] [--traces DIR] [--requests N] [--load SHARE | --rate R] [--quick]

The default model behind two prefill and two decode workers of `prfaas serve CONFIG`, started anew for each policy, so
that all begin with empty caches. Prompts share beginnings as those of a trace of conversations do, and come at the same
instants, whatever became of those before (benchmarks/shared_prefixes.py). Their tokens are a share of what this machine
prefills without any cache, which is measured first, on the first policy's service.

    TTFT      from sending to the first token at the client; of what was served. What was refused is counted
    hit rate  cached prompt tokens, as the service says, of all; beside it what one endless cache would give
    shipped   K/V bytes from prefill to decode workers
"""

from __future__ import annotations

import argparse
import asyncio
import sys
import tempfile
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean
from typing import Any

import httpx
from rich.console import Console

from benchmarks import report
from benchmarks.orderly_exit import exit_on_sigterm
from benchmarks.report import Cell, percentile
from benchmarks.shared_prefixes import SharedPrompt, ideal_hit_rate, shared_prompts
from benchmarks.streaming_client import UNLIMITED, Refused, stream
from cluster.config import load_config
from cluster.routing_policy import POLICIES
from cluster.service_process import prfaas_service

_ROOT = Path(__file__).resolve().parent.parent
# Ray's bookkeeping only: four workers share the machine's cores (engine.turns_file).
FLEET = ("prefill.count=2", "decode.count=2", "prefill.num_cpus=0.1", "decode.num_cpus=0.1")
MAX_PROMPT_TOKENS = 1536
BASELINE = "round_robin"
COLUMNS = {
    "policy": "policy",
    "ttft_mean_s": "TTFT mean s",
    "ttft_p50_s": "p50 s",
    "ttft_p90_s": "p90 s",
    "tpot_mean_s": "TPOT mean s",
    "hit_rate": "hit rate",
    "hit_of_ideal": "of the ideal",
    "mib_shipped": "MiB shipped",
    "num_colocated": "not shipped at all",
    "num_refused": "refused",
    "wall_s": "all s",
}


@dataclass(frozen=True, slots=True)
class Served:
    """One request, from both sides."""

    ttft_s: float
    tpot_s: float
    num_prompt_tokens: int
    cached_tokens: int
    bytes_shipped: int
    colocated: bool  # prefilled where it was decoded


def main(arguments: Sequence[str] | None = None) -> int:
    """Run every policy, print the table, write the JSON."""
    options = _parser().parse_args(arguments)
    exit_on_sigterm()
    count = 8 if options.quick else options.requests
    rate: float | None = options.rate
    prompts = shared_prompts(options.traces, count, rate or 1.0, MAX_PROMPT_TOKENS)
    config = load_config(options.config, options.set)
    ideal, tokens = ideal_hit_rate(prompts), mean(len(prompt.token_ids) for prompt in prompts)
    console = Console(stderr=True)
    rows: list[dict[str, Cell]] = []
    with tempfile.TemporaryDirectory(prefix="prfaas-bench-") as folder:
        for policy in options.policies or POLICIES:
            settings = [*FLEET, *options.set, f"router.policy={policy}"]
            with (
                console.status(f"{policy}: starting"),
                prfaas_service(options.config, settings, Path(folder) / "prfaas.log") as doors,
            ):
                speed = asyncio.run(warm_up(doors.http_url, config.model_name))
                if rate is None:
                    rate = options.load * speed / tokens
                    console.print(f"{speed:.0f} tokens/s alone, {tokens:.0f} tokens a prompt: {rate:.3f} prompts/s")
                    prompts = shared_prompts(options.traces, count, rate, MAX_PROMPT_TOKENS)
                console.print(f"{policy}: about {count / rate:.0f} s")
                began_at = time.perf_counter()
                served = asyncio.run(serve_all(doors.http_url, config.model_name, prompts))
                rows.append(row(policy, served, time.perf_counter() - began_at, ideal))
            console.print(f"{policy}: {rows[-1]['wall_s']:.0f} s")
    finished = report.Report("routing", report.commit(), report.machine(), rows, figures(rows, ideal))
    title = f"{len(prompts)} prompts of {tokens:.0f} tokens on average at {rate or 0:.3g}/s, {finished.commit[:12]}"
    finished.print_table(COLUMNS, title)
    if options.json:
        finished.write_json(options.json)
    return 0


async def warm_up(base_url: str, model: str) -> float:
    """Let every worker take its first, slow steps; then tokens/s of a prompt that no cache knows, alone."""
    async with httpx.AsyncClient(base_url=base_url, timeout=_TIMEOUT_S, limits=UNLIMITED) as client:
        prompts = [[first, *range(500, 531)] for first in range(600, 600 + _WARM_UPS)]
        await asyncio.gather(*(stream(client, model, prompt, 4) for prompt in prompts))
        times, _ = await stream(client, model, range(300, 300 + _TIMED_TOKENS), 2)
        return _TIMED_TOKENS / times.ttft_s


async def serve_all(base_url: str, model: str, prompts: Sequence[SharedPrompt]) -> list[Served | None]:
    """Send each prompt at its time; wait for all. None: it was refused."""
    async with httpx.AsyncClient(base_url=base_url, timeout=_TIMEOUT_S, limits=UNLIMITED) as client:
        began_at = time.perf_counter()
        return list(await asyncio.gather(*(_serve(client, model, prompt, began_at) for prompt in prompts)))


_TIMEOUT_S = 600.0
_WARM_UPS = 4
_TIMED_TOKENS = 512


async def _serve(client: httpx.AsyncClient, model: str, prompt: SharedPrompt, began_at: float) -> Served | None:
    await asyncio.sleep(max(0.0, began_at + prompt.at_s - time.perf_counter()))
    try:
        times, last = await stream(client, model, prompt.token_ids, prompt.num_new_tokens)
    except Refused:
        return None
    (timing,) = last["prfaas"]["timing"]
    return served_of(len(prompt.token_ids), times.ttft_s, times.tpot_s, timing)


def served_of(num_prompt_tokens: int, ttft_s: float, tpot_s: float, timing: Mapping[str, Any]) -> Served:
    """From what the client saw and what the service says of itself in the answer."""
    return Served(
        ttft_s,
        tpot_s,
        num_prompt_tokens,
        cached_tokens=int(timing["cached_tokens"]),
        bytes_shipped=int(timing["bytes_shipped"]),
        colocated=timing["prefill_worker"] is None,
    )


def row(policy: str, answers: Sequence[Served | None], wall_s: float, ideal: float) -> dict[str, Cell]:
    """The report's row for one policy; one answer at least was no refusal."""
    served = [answer for answer in answers if answer is not None]
    ttfts = [one.ttft_s for one in served]
    hit_rate = sum(one.cached_tokens for one in served) / sum(one.num_prompt_tokens for one in served)
    return {
        "policy": policy,
        "num_requests": len(answers),
        "num_refused": len(answers) - len(served),
        "ttft_mean_s": mean(ttfts),
        "ttft_p50_s": percentile(ttfts, 50),
        "ttft_p90_s": percentile(ttfts, 90),
        "tpot_mean_s": mean(one.tpot_s for one in served),
        "hit_rate": hit_rate,
        "hit_of_ideal": hit_rate / ideal if ideal else None,
        "mib_shipped": sum(one.bytes_shipped for one in served) / 2**20,
        "num_colocated": sum(one.colocated for one in served),
        "wall_s": wall_s,
    }


def figures(rows: Iterable[Mapping[str, Cell]], ideal: float) -> dict[str, float]:
    """Of each policy: its hit rate, and its TTFT and bytes over those of taking turns."""
    by_policy = {str(cells["policy"]): cells for cells in rows}
    found = {"hit_rate_ideal": ideal}
    for policy, cells in by_policy.items():
        found[f"hit_rate_{policy}"] = float(cells["hit_rate"] or 0.0)
        baseline = by_policy.get(BASELINE)
        if baseline is None or policy == BASELINE:
            continue
        for key in ("ttft_mean", "ttft_p90", "shipped"):
            column = "mib_shipped" if key == "shipped" else f"{key}_s"
            ours, theirs = float(cells[column] or 0.0), float(baseline[column] or 0.0)
            if theirs:
                found[f"{key}_over_{BASELINE}_{policy}"] = ours / theirs
    return found


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.routing", description=(__doc__ or "").partition("\n")[0]
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the report there")
    parser.add_argument("--config", type=Path, default=Path("deploy/examples/laptop.yaml"), help="the service's YAML")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="override one of its keys")
    near = (folder for folder in (_ROOT / "shared/traces", _ROOT.parent / "shared/traces") if folder.is_dir())
    parser.add_argument("--traces", type=Path, metavar="DIR", default=next(near, None), help="the shared traces")
    parser.add_argument("--requests", type=int, default=36, metavar="N", help="prompts for each policy")
    parser.add_argument(
        "--load",
        type=float,
        default=0.6,
        metavar="SHARE",
        help="the prompts' tokens a second, of those that the machine prefills without a cache (default %(default)s)",
    )
    parser.add_argument("--rate", type=float, metavar="R", help="prompts a second, instead")
    parser.add_argument("--policies", nargs="+", choices=POLICIES, metavar="NAME", help="not all, but these")
    parser.add_argument("--quick", action="store_true", help="eight prompts")
    return parser


if __name__ == "__main__":
    sys.exit(main())
