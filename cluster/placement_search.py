"""Which parallelism serves most requests per GPU under both SLOs? DistServe's placement algorithms (section 4).

    Algorithm 1, fast network between nodes: the best prefill and the best decode instance are found apart
    Algorithm 2, NVLink inside a node only: both are cut into the same pipeline segments, and the prefill and decode
    segment of the same layers share a node, so that K/V never leaves it

Goodput is the highest Poisson rate at which enough requests meet TTFT and TPOT; it is found by bisection over
simulated runs, as in the paper. The simulation is a queueing model over a ``StageCosts``: first come first served
prefill batches, continuous decode batches, no memory limit but ``max_batch_size``. It is no copy of our scheduler.
Equal inputs and seeds give equal answers.
"""

from __future__ import annotations

import heapq
import itertools
import math
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol


@dataclass(frozen=True, slots=True, order=True)
class Parallelism:
    """``tensor`` GPUs share each layer (intra-operator), ``pipeline`` stages share the layers (inter-operator)."""

    tensor: int
    pipeline: int = 1

    @property
    def num_gpus(self) -> int:
        """GPUs of one instance."""
        return self.tensor * self.pipeline


class StageCosts(Protocol):
    """Seconds of a model on given hardware."""

    def fits(self, parallelism: Parallelism) -> bool:
        """Do the weights fit?"""
        ...

    def prefill_s(self, parallelism: Parallelism, prompts: Sequence[int]) -> float:
        """From the start of a batch of prompts (tokens each) to its first tokens, through all pipeline stages."""
        ...

    def decode_step_s(self, parallelism: Parallelism, batch_size: int, context_tokens: int) -> float:
        """One step of one batch of that many sequences and tokens in all, through all pipeline stages."""
        ...


@dataclass(frozen=True, slots=True)
class Request:
    """A prompt and its answer, tokens."""

    prompt_tokens: int
    output_tokens: int


@dataclass(frozen=True, slots=True)
class Objective:
    """What goodput means. ``joint``: the same request must meet both (DistServe's text); otherwise each percentile
    is judged by itself (its simulator)."""

    ttft_s: float
    tpot_s: float
    attainment: float = 0.9
    joint: bool = True

    def met(self, ttfts_s: Sequence[float], tpots_s: Sequence[float]) -> bool:
        """Did enough requests meet the SLOs? The two lists speak of the same requests in the same order."""
        enough = self.attainment * len(ttfts_s) - 1e-9
        if self.joint:
            good = sum(a <= self.ttft_s and b <= self.tpot_s for a, b in zip(ttfts_s, tpots_s, strict=True))
            return good >= enough
        return min(sum(a <= self.ttft_s for a in ttfts_s), sum(b <= self.tpot_s for b in tpots_s)) >= enough


@dataclass(frozen=True, slots=True)
class Workload:
    """What comes: requests in their order, at random times of any rate; and how instances batch.

    ``prefill_batch_tokens`` is DistServe's L_m, the prompt length that saturates the GPU; a longer prompt goes alone.
    """

    requests: tuple[Request, ...]
    prefill_batch_tokens: int
    max_batch_size: int
    seed: int = 0

    def arrivals_s(self, rate_rps: float) -> list[float]:
        """A Poisson process; another rate stretches the same one."""
        draw = random.Random(self.seed)
        return list(itertools.accumulate(draw.expovariate(1.0) / rate_rps for _ in self.requests))


@dataclass(frozen=True, slots=True)
class Placement:
    """One unit of deployment: its instances and what it sustains."""

    prefill: Parallelism
    decode: Parallelism
    num_prefill: int
    num_decode: int
    goodput_rps: float  # of all instances together

    @property
    def num_gpus(self) -> int:
        """GPUs of all instances."""
        return self.num_prefill * self.prefill.num_gpus + self.num_decode * self.decode.num_gpus

    @property
    def goodput_per_gpu_rps(self) -> float:
        """The number that both algorithms maximise."""
        return self.goodput_rps / self.num_gpus


@dataclass(frozen=True, slots=True)
class Search:
    """Bounds of the bisection: rates are tried in [0, ``most_rps_per_gpu``] until the bounds are ``step`` apart."""

    most_rps_per_gpu: float = 10.0
    step_rps_per_gpu: float = 0.05


def simulate_prefill(
    costs: StageCosts, parallelism: Parallelism, workload: Workload, arrivals_s: Sequence[float]
) -> list[float]:
    """When each request has its first token. One instance, first come first served.

    A batch leaves the first pipeline stage after 1/pipeline of its time, and then the next one may begin.
    """
    done: list[float] = []
    free_at = 0.0
    while len(done) < len(arrivals_s):
        start = max(free_at, arrivals_s[len(done)])
        batch: list[int] = []
        for index in range(len(done), len(arrivals_s)):
            prompt_tokens = workload.requests[index].prompt_tokens
            too_many = sum(batch) + prompt_tokens > workload.prefill_batch_tokens
            if arrivals_s[index] > start or (batch and too_many):
                break
            batch.append(prompt_tokens)
        seconds = costs.prefill_s(parallelism, batch)
        done += [start + seconds] * len(batch)
        free_at = start + seconds / parallelism.pipeline
    return done


def simulate_decode(
    costs: StageCosts, parallelism: Parallelism, workload: Workload, first_token_at_s: Sequence[float]
) -> list[float]:
    """Each request's TPOT, its wait for a place in the batch included: (last - first token) / (tokens - 1).

    One instance. ``pipeline`` batches follow each other through the stages; request i is in batch i mod pipeline.
    """
    tpots = [0.0] * len(first_token_at_s)
    for lane in range(parallelism.pipeline):
        members = list(range(lane, len(first_token_at_s), parallelism.pipeline))
        for index, finished_at in _decode_lane(costs, parallelism, workload, first_token_at_s, members):
            gaps = max(1, workload.requests[index].output_tokens - 1)
            tpots[index] = (finished_at - first_token_at_s[index]) / gaps
    return tpots


def _decode_lane(
    costs: StageCosts,
    parallelism: Parallelism,
    workload: Workload,
    ready_at_s: Sequence[float],
    members: Sequence[int],
) -> Iterator[tuple[int, float]]:
    """(request, when its last token came) for one batch that sequences join and leave between steps."""
    waiting = sorted(members, key=lambda index: ready_at_s[index])
    running: list[tuple[int, int]] = []  # heap of (step after which it is done, request)
    now, step, context, begun = 0.0, 0, 0, 0
    while begun < len(waiting) or running:
        if not running:
            now = max(now, ready_at_s[waiting[begun]])
        while begun < len(waiting) and ready_at_s[waiting[begun]] <= now and len(running) < workload.max_batch_size:
            request = workload.requests[waiting[begun]]
            if request.output_tokens <= 1:  # its only token is the first, which prefill made
                yield waiting[begun], ready_at_s[waiting[begun]]
            else:
                heapq.heappush(running, (step + request.output_tokens - 1, waiting[begun]))
                context += request.prompt_tokens + 1
            begun += 1
        if not running:
            continue
        now += costs.decode_step_s(parallelism, len(running), context)
        step, context = step + 1, context + len(running)
        while running and running[0][0] == step:
            _, index = heapq.heappop(running)
            request = workload.requests[index]
            context -= request.prompt_tokens + request.output_tokens
            yield index, now


def max_rate_rps(attains: Callable[[float], bool], most_rps: float, step_rps: float) -> float:
    """The highest rate of the bisection grid on [0, most_rps] that attains; 0 if none does."""
    low, high = 0.0, most_rps
    while high - low >= step_rps:
        middle = (low + high) / 2
        low, high = (middle, high) if attains(middle) else (low, middle)
    return low


def prefill_goodput_rps(
    costs: StageCosts, parallelism: Parallelism, workload: Workload, objective: Objective, search: Search = Search()
) -> float:
    """simu_prefill of algorithm 1: the rate of one instance at which enough requests meet TTFT."""

    def attains(rate_rps: float) -> bool:
        arrivals = workload.arrivals_s(rate_rps)
        done = simulate_prefill(costs, parallelism, workload, arrivals)
        ttfts = [b - a for a, b in zip(arrivals, done, strict=True)]
        return objective.met(ttfts, [0.0] * len(ttfts))

    return _instance_rate(attains, parallelism.num_gpus, search)


def decode_goodput_rps(
    costs: StageCosts, parallelism: Parallelism, workload: Workload, objective: Objective, search: Search = Search()
) -> float:
    """simu_decode of algorithm 1: the rate of one instance at which enough requests meet TPOT."""

    def attains(rate_rps: float) -> bool:
        tpots = simulate_decode(costs, parallelism, workload, workload.arrivals_s(rate_rps))
        return objective.met([0.0] * len(tpots), tpots)

    return _instance_rate(attains, parallelism.num_gpus, search)


def joint_goodput_rps(
    costs: StageCosts,
    prefill: Parallelism,
    decode: Parallelism,
    workload: Workload,
    objective: Objective,
    search: Search = Search(),
) -> float:
    """The rate of one prefill and one decode instance together at which enough requests meet both SLOs."""

    def attains(rate_rps: float) -> bool:
        arrivals = workload.arrivals_s(rate_rps)
        done = simulate_prefill(costs, prefill, workload, arrivals)
        ttfts = [b - a for a, b in zip(arrivals, done, strict=True)]
        return objective.met(ttfts, simulate_decode(costs, decode, workload, done))

    return _instance_rate(attains, prefill.num_gpus + decode.num_gpus, search)


def _instance_rate(attains: Callable[[float], bool], num_gpus: int, search: Search) -> float:
    return max_rate_rps(attains, search.most_rps_per_gpu * num_gpus, search.step_rps_per_gpu * num_gpus)


def place_high_affinity(
    costs: StageCosts,
    workload: Workload,
    objective: Objective,
    rate_rps: float,
    *,
    num_nodes: int,
    gpus_per_node: int,
    search: Search = Search(),
) -> Placement | None:
    """Algorithm 1; None if no configuration meets the SLOs at any rate."""
    best: dict[str, tuple[float, Parallelism]] = {}
    for tensor in range(1, gpus_per_node + 1):
        for pipeline in range(1, num_nodes * gpus_per_node // tensor + 1):
            parallelism = Parallelism(tensor, pipeline)
            if not costs.fits(parallelism):
                continue
            goodputs = {
                "prefill": prefill_goodput_rps(costs, parallelism, workload, objective, search),
                "decode": decode_goodput_rps(costs, parallelism, workload, objective, search),
            }
            for phase, goodput in goodputs.items():
                known = best.get(phase)
                if goodput and (known is None or goodput / parallelism.num_gpus > known[0] / known[1].num_gpus):
                    best[phase] = goodput, parallelism
    if len(best) < 2:
        return None
    (prefill_rps, prefill), (decode_rps, decode) = best["prefill"], best["decode"]
    num_prefill, num_decode = math.ceil(rate_rps / prefill_rps), math.ceil(rate_rps / decode_rps)
    return Placement(prefill, decode, num_prefill, num_decode, min(num_prefill * prefill_rps, num_decode * decode_rps))


def place_low_affinity(
    costs: StageCosts,
    workload: Workload,
    objective: Objective,
    rate_rps: float,
    *,
    num_nodes: int,
    gpus_per_node: int,
    search: Search = Search(),
) -> Placement | None:
    """Algorithm 2; None if no configuration meets the SLOs at any rate."""
    best: Placement | None = None
    for num_segments in range(1, num_nodes + 1):
        parts = [p for p in _intra_node(gpus_per_node) if costs.fits(_over_segments(p, num_segments))]
        for prefill_part, decode_part in itertools.product(parts, parts):
            if prefill_part.num_gpus + decode_part.num_gpus > gpus_per_node:
                continue
            prefill, decode = _over_segments(prefill_part, num_segments), _over_segments(decode_part, num_segments)
            goodput = joint_goodput_rps(costs, prefill, decode, workload, objective, search)
            found = Placement(prefill, decode, 1, 1, goodput)
            if goodput and (best is None or found.goodput_per_gpu_rps > best.goodput_per_gpu_rps):
                best = found
    if best is None:
        return None
    count = math.ceil(rate_rps / best.goodput_rps)
    return Placement(best.prefill, best.decode, count, count, count * best.goodput_rps)


def _intra_node(gpus_per_node: int) -> list[Parallelism]:
    """What a segment may be inside one node."""
    return [
        Parallelism(tensor, pipeline)
        for tensor in range(1, gpus_per_node + 1)
        for pipeline in range(1, gpus_per_node // tensor + 1)
    ]


def _over_segments(part: Parallelism, num_segments: int) -> Parallelism:
    """The whole instance whose every segment is ``part``."""
    return Parallelism(part.tensor, part.pipeline * num_segments)
