"""What did the fleet do, moment by moment? Samples of ``GetClusterInfo`` and of the link's own counter, and a picture.

The service says what it believes (threshold, utilisation, queues, roles); the kernel's byte counter of east's interface
says what really came over the link. Both are on the load's clock.
"""

from __future__ import annotations

import asyncio
import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import grpc

from benchmarks.datacenters import EAST, WEST
from benchmarks.steady_load import Request
from protos import serving_pb2 as pb
from protos import serving_pb2_grpc as rpc

if TYPE_CHECKING:
    from matplotlib.axes import Axes

INTERVAL_S = 0.2
_TIMEOUT_S = 5.0
_GBIT = 1e9 / 8


@dataclass(frozen=True)
class Sample:
    """One moment. Bytes/s, seconds, tokens."""

    at: float
    threshold_tokens: float | None  # None: nothing is offloaded
    abundant: bool
    link_believed: float  # bytes/s that the planner takes the link to carry
    link_utilisation: float  # share of it that the planner sees in use
    link_received: float  # bytes/s that came, since the sample before
    link_shaped: float  # bytes/s that are let through; 0: it is cut
    link_queue_s: float
    prfaas_queue_s: float
    local_queue_s: float
    decode_queue: int
    num_prefill: int  # east's workers by role, as they say themselves
    num_decode: int
    num_west: int  # west's workers that the gateway has
    num_west_usable: int  # links from west that may be used
    num_running: int
    num_under_way: int  # requests of the load
    reason: str  # of the plan


@dataclass
class Mark:
    """Something that the story did."""

    at: float
    label: str


@dataclass
class FleetRecorder:
    """Samples every ``INTERVAL_S`` while it is entered."""

    address: str
    device: str  # of east's end of the link
    now: Callable[[], float]
    num_under_way: Callable[[], int]
    shaped: Callable[[], float]  # bytes/s that the link lets through now
    samples: list[Sample] = field(default_factory=list)
    marks: list[Mark] = field(default_factory=list)

    async def __aenter__(self) -> FleetRecorder:
        self._channel = grpc.aio.insecure_channel(self.address, options=(("grpc.enable_http_proxy", 0),))
        self._stub = rpc.GenerationStub(self._channel)
        self._came = asyncio.Event()
        self._sampling = asyncio.create_task(self._keep_sampling())
        return self

    async def __aexit__(self, *_: object) -> None:
        self._sampling.cancel()
        await asyncio.gather(self._sampling, return_exceptions=True)
        await self._channel.close(None)

    def mark(self, label: str) -> float:
        """Note that something is done now; returns the instant."""
        self.marks.append(Mark(self.now(), label))
        return self.marks[-1].at

    @property
    def last(self) -> Sample:
        return self.samples[-1]

    async def wait_for(self, condition: Callable[[Sample], bool], timeout_s: float) -> Sample | None:
        """The first sample from now on that meets ``condition``; None if none does in time."""
        seen = len(self.samples)
        give_up_at = self.now() + timeout_s
        while self.now() < give_up_at:
            for sample in self.samples[seen:]:
                if condition(sample):
                    return sample
            seen = len(self.samples)
            self._came.clear()
            try:
                await asyncio.wait_for(self._came.wait(), max(0.0, give_up_at - self.now()))
            except TimeoutError:
                break
        return None

    async def info(self) -> pb.GetClusterInfoResponse:
        """What the service says of itself."""
        reply: pb.GetClusterInfoResponse = await self._stub.GetClusterInfo(
            pb.GetClusterInfoRequest(), timeout=_TIMEOUT_S
        )
        return reply

    async def _keep_sampling(self) -> None:
        before_at, before = self.now(), received_bytes(self.device)
        while True:
            await asyncio.sleep(INTERVAL_S)
            try:
                info = await self.info()
            except grpc.aio.AioRpcError:  # the gateway is busy, or gone: a gap in the picture
                continue
            at, received = self.now(), received_bytes(self.device)
            rate = (received - before) / max(at - before_at, 1e-3)
            before_at, before = at, received
            self.samples.append(_sample(info, at, rate, self.shaped(), self.num_under_way()))
            self._came.set()


def received_bytes(device: str) -> int:
    """What came in at an interface of this thread's namespace so far."""
    for line in Path("/proc/thread-self/net/dev").read_text(encoding="ascii").splitlines():
        name, _, numbers = line.partition(":")
        if name.strip() == device:
            return int(numbers.split()[0])
    raise ValueError(f"there is no interface {device} here")


def _sample(info: pb.GetClusterInfoResponse, at: float, received: float, shaped: float, num_under_way: int) -> Sample:
    plan = info.plan
    last = plan.history[-1] if plan.history else pb.PlanSample()
    roles = [worker.role for worker in info.workers if worker.cluster_id == EAST]
    return Sample(
        at=at,
        threshold_tokens=plan.threshold_tokens if plan.HasField("threshold_tokens") else None,
        abundant=plan.abundant,
        link_believed=last.link_rate,
        link_utilisation=last.link_utilisation,
        link_received=received,
        link_shaped=shaped,
        link_queue_s=last.link_queue_s,
        prfaas_queue_s=last.prfaas_queue_s,
        local_queue_s=last.local_queue_s,
        decode_queue=last.decode_queue,
        num_prefill=roles.count("prefill"),
        num_decode=roles.count("decode"),
        num_west=sum(worker.cluster_id == WEST for worker in info.workers),
        num_west_usable=sum(link.from_cluster == WEST and link.state == "usable" for link in info.links),
        num_running=sum(worker.num_running for worker in info.workers),
        num_under_way=num_under_way,
        reason=plan.reason,
    )


def write_json(path: Path, recorder: FleetRecorder, requests: Sequence[Request], more: Mapping[str, object]) -> None:
    """The time series, for whoever compares runs."""
    path.parent.mkdir(parents=True, exist_ok=True)
    document = {
        **more,
        "marks": [asdict(mark) for mark in recorder.marks],
        "samples": [asdict(sample) for sample in recorder.samples],
        "requests": [request.as_dict() for request in requests],
    }
    path.write_text(json.dumps(document) + "\n", encoding="utf-8")


def draw(path: Path, recorder: FleetRecorder, requests: Sequence[Request], longest: int) -> None:
    """The threshold among the prompts, the link, the queues and the roles over time. ``longest``: prompt, in tokens."""
    from matplotlib.figure import Figure  # no pyplot: it keeps global state and looks for a display

    path.parent.mkdir(parents=True, exist_ok=True)
    figure = Figure(figsize=(11, 11), layout="constrained")
    lengths, link, queues, roles = figure.subplots(4, 1, sharex=True, height_ratios=(3, 2, 2, 2))
    samples = recorder.samples
    at = [sample.at for sample in samples]

    def line(axes: Axes, values: Sequence[float], label: str, **style: Any) -> None:
        axes.plot(at, values, label=label, linewidth=1.3, drawstyle="steps-post", **style)

    def dots(found: Sequence[Request], label: str, **style: Any) -> None:
        shown = [(request.sent_at, len(request.prompt_ids)) for request in found]
        if shown:
            lengths.scatter(*zip(*shown, strict=True), s=12, label=label, **style)

    answered = [request for request in requests if request.ended_at is not None and not request.error]
    dots([r for r in answered if r.prefill_worker.startswith(WEST)], "prompts prefilled in west", color="C1")
    dots([r for r in answered if not r.prefill_worker.startswith(WEST)], "in east", color="C0")
    dots([r for r in answered if r.num_attempts > 1], "after another attempt", facecolors="none", edgecolors="C3")
    dots([r for r in requests if r.error], "failed", marker="x", color="C3")
    threshold = [min(s.threshold_tokens or math.inf, 2 * longest) for s in samples]
    line(lengths, threshold, "threshold t (at the top: nothing is offloaded)", color="black")
    lengths.set_yscale("log")
    lengths.set_ylabel("prompt, tokens")

    line(link, [s.link_shaped / _GBIT for s in samples], "link lets through", color="grey")
    line(link, [s.link_believed / _GBIT for s in samples], "planner believes", color="C4", linestyle="--")
    line(link, [s.link_received / _GBIT for s in samples], "came", color="C1")
    link.set_ylabel("link, Gbit/s")
    link.set_ylim(bottom=0, top=1.3 * max((s.link_shaped for s in samples), default=_GBIT) / _GBIT)
    share = link.twinx()
    line(share, [s.link_utilisation for s in samples], "utilisation, as planned with", color="C2", alpha=0.6)
    share.set_ylim(0, 1.3)
    share.set_ylabel("utilisation")

    line(queues, [s.local_queue_s for s in samples], "prefill queue, east", color="C0")
    line(queues, [s.prfaas_queue_s for s in samples], "prefill queue, west", color="C1")
    line(queues, [s.link_queue_s for s in samples], "link queue", color="C2")
    queues.set_ylabel("seconds")
    queues.set_ylim(bottom=0)
    waiting = queues.twinx()
    line(waiting, [s.num_under_way for s in samples], "requests under way", color="grey", alpha=0.6)
    waiting.set_ylim(bottom=0)

    apart = 0.06  # of a worker: equal numbers would hide each other
    line(roles, [s.num_prefill + apart for s in samples], "prefill, east", color="C0")
    line(roles, [s.num_decode for s in samples], "decode, east", color="C3")
    line(roles, [s.num_west - apart for s in samples], "prefill, west", color="C1")
    roles.set_ylabel("workers")
    roles.set_xlabel("seconds")
    roles.set_ylim(-0.1, 3.3)

    for mark in recorder.marks:
        for axes in (lengths, link, queues, roles):
            axes.axvline(mark.at, color="black", linewidth=0.7, linestyle=":")
        lengths.text(mark.at, 1.02, mark.label, transform=lengths.get_xaxis_transform(), fontsize=8, rotation=20)
    for axes in (lengths, link, share, queues, waiting, roles):
        side = "upper right" if axes in (share, waiting) else "upper left"
        axes.legend(loc=side, fontsize=7)
    for axes in (lengths, link, queues, roles):
        axes.grid(alpha=0.3)
    figure.savefig(path, dpi=110)
