"""What does ``prfaas top`` show? One frame of a service for a terminal: workers, links, plan, last requests. Pure.

The same as the page at ``/`` shows (cluster/static), from the same two messages. Bars of requests are as long as what
they took, and cut by what each second went into; the letters of the legend stand in them where there is no colour.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby

from rich import box
from rich.console import Group, RenderableType
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from cluster.tables import role_and_ranks
from protos import serving_pb2 as pb

_SPARKS = "▁▂▃▄▅▆▇█"
_BAR_COLUMNS = 46
_METER_COLUMNS = 10
_MAX_WORKERS = 16
_MAX_LINKS = 8
_DEGRADED = 0.6  # as the page has it: a path that is believed to carry less than this of its configured capacity


@dataclass(frozen=True)
class _Part:
    """One kind of second: its letter, colour and name."""

    letter: str
    style: str
    name: str


_FIRST = {
    "receive": _Part("i", "bright_black", "receive"),
    "tokenize": _Part("t", "bright_black", "tokenise"),
    "admission": _Part("w", "red", "wait for a turn"),
    "siblings": _Part("s", "magenta", "first sibling"),
    "route": _Part("r", "blue", "route"),
    "retries": _Part("!", "bright_red", "retries"),
    "messages": _Part("m", "bright_black", "messages"),
    "pull": _Part("u", "green", "page pull"),
    "prefill_queue": _Part("q", "yellow", "prefill queue"),
    "prefill": _Part("P", "dark_orange", "prefill"),
}
_SECOND = {
    "transfer_wait": _Part("g", "purple", "wait for pages"),
    "transfer": _Part("T", "medium_purple1", "transfer"),
    "decode_queue": _Part("d", "dark_cyan", "decode queue"),
    "first_step": _Part("2", "bright_cyan", "second token"),
    "retries": _Part("!", "bright_red", "retries"),
    "messages": _Part("m", "bright_black", "messages"),
}
_LATER = _Part("D", "cyan", "later tokens")
_LEGEND = (*_FIRST.values(), *(part for name, part in _SECOND.items() if name not in _FIRST), _LATER)


def frame(info: pb.GetClusterInfoResponse, requests: Sequence[pb.RecentRequest], max_requests: int = 12) -> Group:
    """Everything at one moment; ``requests`` newest first."""
    return Group(
        _head(info, requests),
        Panel(_workers(info.workers), title="workers", title_align="left", box=box.ROUNDED),
        Panel(_links(info.cluster_links), title="links between clusters", title_align="left", box=box.ROUNDED),
        Panel(_plan(info), title="threshold and roles", title_align="left", box=box.ROUNDED),
        Panel(
            _requests(requests[:max_requests]), title="last requests, newest first", title_align="left", box=box.ROUNDED
        ),
    )


def _head(info: pb.GetClusterInfoResponse, requests: Sequence[pb.RecentRequest]) -> Text:
    ttft = [request.ttft_s for request in requests if request.HasField("ttft_s")]
    tpot = [timing.tpot_s for request in requests for timing in request.timings if timing.HasField("tpot_s")]
    prompt, cached = _prefilled(info.workers)
    text = Text()
    text.append(f"{info.model}", style="bold")
    text.append(f"  prfaas {info.version}, up {info.uptime_s:.0f} s, policy {info.policy}\n", style="dim")
    text.append(f"{info.num_inflight} in flight, {info.num_queued} queued, {info.num_requests} so far, ")
    text.append(f"{sum(info.refusals.values())} refused", style="red" if info.refusals else "")
    text.append(f"  TTFT p50 {_seconds(_percentile(ttft, 0.5))} p95 {_seconds(_percentile(ttft, 0.95))}")
    text.append(f"  TPOT p50 {_seconds(_percentile(tpot, 0.5))}")
    text.append(f"  cache hits {_share(cached / prompt if prompt else None)}")
    routes = info.routes_by_place
    text.append(f"  offloaded {_share(routes['offloaded'] / sum(routes.values()) if sum(routes.values()) else None)}")
    return text


def _workers(workers: Sequence[pb.WorkerInfo]) -> RenderableType:
    if not workers:
        return Text("none has registered yet", style="dim")
    table = _grid(("cluster", "worker", "role", "state"), ("run", "wait", "kv"))
    table.add_column("pages: in use, cached")
    for name in ("hits", "sent", "received"):
        table.add_column(name, justify="right")
    for worker in sorted(workers, key=lambda w: (w.cluster_id, w.role != "prefill", w.worker_id))[:_MAX_WORKERS]:
        role = "dark_orange" if worker.role == "prefill" else "cyan"
        hits = worker.cached_tokens / worker.prompt_tokens if worker.prompt_tokens else None
        table.add_row(
            worker.cluster_id,
            worker.worker_id,
            Text(role_and_ranks(worker), style=role),
            Text(worker.state, style="" if worker.state == "ready" else "yellow"),
            str(worker.num_running),
            str(worker.num_waiting),
            str(worker.num_sessions),
            _pages(worker, role),
            _share(hits),
            _bytes(worker.bytes_sent),
            _bytes(worker.bytes_received),
        )
    return _with_rest(table, len(workers) - _MAX_WORKERS, "workers")


def _pages(worker: pb.WorkerInfo, style: str) -> Text:
    total = worker.pages_total or 1
    used = round(_METER_COLUMNS * (worker.pages_total - worker.pages_free) / total)
    cached = min(_METER_COLUMNS - used, round(_METER_COLUMNS * worker.pages_cached / total))
    text = Text("█" * used, style=style)
    text.append("▒" * cached + "·" * (_METER_COLUMNS - used - cached), style="dim")
    return text.append(f" {(worker.pages_total - worker.pages_free) / total:4.0%}", style="")


def _links(links: Sequence[pb.ClusterLinkInfo]) -> RenderableType:
    if not links:
        return Text("none yet", style="dim")
    table = _grid(("from", "to", "path"), ("usable", "now", "believed", "capacity"))
    table.add_column("utilisation")
    for name in ("RTT", "queued"):
        table.add_column(name, justify="right")
    for link in links[:_MAX_LINKS]:
        used = link.utilisation if link.HasField("utilisation") else None
        table.add_row(
            link.from_cluster,
            link.to_cluster,
            ", ".join(link.paths) or "-",
            f"{link.num_usable}/{link.num_links}",
            f"{_bytes(link.throughput)}/s",
            f"{_bytes(link.carries)}/s" if link.HasField("carries") else "-",
            f"{_bytes(link.capacity)}/s" if link.HasField("capacity") else "-",
            _utilisation(link, used),
            _seconds(link.rtt_s if link.HasField("rtt_s") else None),
            _bytes(link.bytes_queued),
        )
    return _with_rest(table, len(links) - _MAX_LINKS, "links")


def _utilisation(link: pb.ClusterLinkInfo, used: float | None) -> Text:
    if not link.num_usable:
        return Text("not used", style="bold red")
    if link.HasField("capacity") and link.HasField("carries") and link.carries < _DEGRADED * link.capacity:
        return Text(f"degraded to {link.carries / link.capacity:.0%}", style="bold red")
    if used is None:
        return Text("-", style="dim")
    filled = min(_METER_COLUMNS, round(_METER_COLUMNS * used))
    style = "red" if used >= 0.9 else "yellow" if used >= 0.7 else "green"
    return Text("█" * filled, style=style).append("·" * (_METER_COLUMNS - filled) + f" {used:4.0%}", style="dim")


def _plan(info: pb.GetClusterInfoResponse) -> RenderableType:
    plan, offload = info.plan, info.offload
    now = f"{offload.threshold_tokens:,.0f} tokens" if offload.HasField("threshold_tokens") else "none is offloaded"
    text = Text(f"{plan.mode or 'off'}: threshold {now}, {plan.num_prefill} prefill, {plan.num_decode} decode")
    if plan.changing:
        text.append(f", {len(plan.changing)} changing", style="yellow")
    for pool in plan.pools:
        text.append(f"\n{pool.pool} pool: {pool.ready_prefill + pool.ready_decode} ready of {pool.desired} desired")
        text.append(f" ({pool.min_replicas} to {pool.max_replicas}{', held' if pool.held else ''})", style="dim")
        if pool.pending or pool.draining:
            text.append(f", {len(pool.pending)} pending, {len(pool.draining)} draining", style="yellow")
        if pool.problem:
            text.append(f", {pool.problem}", style="red")
    known = [s.threshold_tokens for s in plan.history if s.HasField("threshold_tokens")]
    if len(known) > 1:
        text.append(f"\nthreshold {_spark(known)} {plan.history[0].age_s:.0f} s", style="bold")
        text.append(f"\nprefill   {_spark([s.num_prefill for s in plan.history])}", style="dark_orange")
        text.append(f"\ndecode    {_spark([s.num_decode for s in plan.history])}", style="cyan")
    changes = [sample for sample in plan.history if sample.change]
    if changes:
        text.append(f"\n{changes[-1].age_s:.0f} s ago: {changes[-1].change}", style="yellow")
    if offload.reason:
        text.append(f"\n{offload.reason}", style="dim")
    return text


def _requests(requests: Sequence[pb.RecentRequest]) -> RenderableType:
    if not requests:
        return Text("none has ended yet", style="dim")
    longest = max(request.total_s for request in requests) or 1.0
    table = _grid(("ended", "request", "outcome"), ("in", "out"))
    table.add_column(f"where each second went (to {_seconds(longest)})", no_wrap=True)
    for name in ("first", "all"):
        table.add_column(name, justify="right")
    for request in requests:
        ok = request.outcome == "ok"
        table.add_row(
            f"{request.age_s:.0f} s ago",
            Text(request.request_id, overflow="ellipsis", no_wrap=True),
            Text(request.outcome, style="green" if ok else "bold red"),
            str(request.prompt_tokens),
            str(request.completion_tokens),
            _bar(request, longest),
            _seconds(request.ttft_s if request.HasField("ttft_s") else None),
            _seconds(request.total_s),
        )
    legend = Text()
    for part in _LEGEND:
        legend.append(part.letter, style=f"{part.style} reverse").append(f" {part.name}  ", style="dim")
    return Group(table, legend)


def _bar(request: pb.RecentRequest, longest: float) -> Text:
    """Each column goes to the part that its middle lies in, so that a bar is as long as its request."""
    num_columns = max(1, round(_BAR_COLUMNS * request.total_s / longest))
    parts = list(_parts_of(request))
    if not parts:
        return Text("/" * num_columns, style="red")
    ends, total = [], 0.0
    for part, seconds in parts:
        total += seconds
        ends.append((total, part))
    middles = ((column + 0.5) * request.total_s / num_columns for column in range(num_columns))
    text = Text()
    found = [next((part for end, part in ends if middle <= end), ends[-1][1]) for middle in middles]
    for part, columns in groupby(found):
        text.append(part.letter * len(list(columns)), style=f"{part.style} reverse")
    return text


def _parts_of(request: pb.RecentRequest) -> Iterator[tuple[_Part, float]]:
    if not request.timings or not request.timings[0].HasField("ttft_parts"):
        return
    timing, known = request.timings[0], 0.0
    for parts, message in ((_FIRST, timing.ttft_parts), (_SECOND, timing.ttst_parts)):
        for name, part in parts.items():
            seconds = getattr(message, f"{name}_s")
            known += seconds
            yield part, seconds
    yield _LATER, max(0.0, request.total_s - known)


def _prefilled(workers: Iterable[pb.WorkerInfo]) -> tuple[int, int]:
    """Prompt tokens of the workers that prefill, and those of them that were cached."""
    all_of_them = list(workers)
    pool = [w for w in all_of_them if w.role == "prefill"] or all_of_them
    return sum(w.prompt_tokens for w in pool), sum(w.cached_tokens for w in pool)


def _grid(words: Sequence[str], numbers: Sequence[str]) -> Table:
    table = Table(box=None, pad_edge=False, header_style="dim", expand=False)
    for name in words:
        table.add_column(name, no_wrap=True)
    for name in numbers:
        table.add_column(name, justify="right")
    return table


def _with_rest(table: Table, num_more: int, what: str) -> RenderableType:
    return table if num_more <= 0 else Group(table, Text(f"and {num_more} more {what}: prfaas status", style="dim"))


def _spark(values: Sequence[float], columns: int = 60) -> str:
    """The values as a line of blocks; of many, the last of each stretch."""
    step = max(1, math.ceil(len(values) / columns))
    shown = [values[min(len(values), start + step) - 1] for start in range(0, len(values), step)]
    top = max(shown) or 1
    return "".join(_SPARKS[min(len(_SPARKS) - 1, int(value / top * (len(_SPARKS) - 1) + 0.5))] for value in shown)


def _percentile(values: Sequence[float], share: float) -> float | None:
    if not values:
        return None
    return sorted(values)[max(0, math.ceil(share * len(values)) - 1)]


def _seconds(value: float | None) -> str:
    if value is None:
        return "-"
    return f"{value:.2f} s" if value >= 1 else f"{value * 1000:.0f} ms" if value >= 0.01 else f"{value * 1000:.1f} ms"


def _share(value: float | None) -> str:
    return "-" if value is None else f"{value:.0%}"


def _bytes(value: float) -> str:
    for unit in ("B", "kB", "MB", "GB"):
        if value < 1000:
            return f"{value:.0f} {unit}" if unit == "B" or value >= 100 else f"{value:.1f} {unit}"
        value /= 1000
    return f"{value:.1f} TB"
