"""How does the command show what a service told it? Messages of the public API as tables for a terminal."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

from rich.table import Table

from protos import serving_pb2 as pb


def timing_table(complete: pb.GenerateComplete) -> Table:
    """Where one continuation was computed, and where its time went."""
    timing, usage = complete.timing, complete.usage
    table = Table(show_header=False, box=None, pad_edge=False)
    rows = (
        ("prefilled on", timing.prefill_worker or timing.decode_worker),
        ("decoded on", timing.decode_worker or timing.prefill_worker),
        ("because", timing.route_reason),
        ("prompt tokens", f"{usage.prompt_tokens} ({usage.cached_tokens} cached)"),
        ("generated tokens", str(usage.completion_tokens)),
        *_pull_rows(timing),
        ("shipped", _bytes(timing.bytes_shipped)),
        ("tokenise, turn, route", f"{timing.tokenize_s:.3f} s, {timing.admission_s:.3f} s, {timing.route_s:.3f} s"),
        ("prefill", f"{timing.prefill_s:.3f} s after {timing.prefill_queue_s:.3f} s in the queue"),
        ("transfer", f"{timing.transfer_s:.3f} s, of which {timing.exposed_transfer_s:.3f} s after the first token"),
        ("decode", f"{timing.decode_s:.3f} s after {timing.decode_queue_s:.3f} s in the queue"),
        ("first token, all", f"{timing.ttft_s:.3f} s, {timing.total_s:.3f} s"),
        *_part_rows(timing),
        ("expected", _expected(timing)),
        ("one worker alone", _alone(timing)),
        ("fallback", timing.fallback or "-"),
        ("tries", str(timing.num_attempts)),
        *_objectives(timing),
    )
    for name, value in rows:
        table.add_row(name, value)
    return table


def _part_rows(timing: pb.TimingBreakdown) -> Iterator[tuple[str, str]]:
    """What the time to the first token went into, and the time from there to the second; nothing of what took none."""
    for name, field in (("to the first token", "ttft_parts"), ("then to the second", "ttst_parts")):
        if timing.HasField(field):
            parts = getattr(timing, field).ListFields()
            yield name, ", ".join(f"{part.name.removesuffix('_s')} {seconds:.3f} s" for part, seconds in parts)


def _pull_rows(timing: pb.TimingBreakdown) -> Iterator[tuple[str, str]]:
    if timing.pull_outcome:
        pulled = f"{timing.pulled_tokens} tokens, {_bytes(timing.bytes_pulled)} in {timing.pull_s:.3f} s"
        yield "pulled", f"{pulled} ({timing.pull_outcome})"
    if timing.reload_outcome:
        loaded = f"{timing.host_tokens} tokens from host memory, {timing.disk_tokens} from disk"
        yield "lower tiers", f"{loaded} in {timing.reload_s:.3f} s ({timing.reload_outcome})"


def _objectives(timing: pb.TimingBreakdown) -> Iterable[tuple[str, str]]:
    """Rows of the objectives that the request had."""
    for name, field in (("TTFT objective", "slo_ttft_met"), ("TPOT objective", "slo_tpot_met")):
        if timing.HasField(field):
            yield name, "met" if getattr(timing, field) else "missed"
    if timing.slo_miss_expected:
        yield "a miss was expected", timing.slo_miss_expected


def _expected(timing: pb.TimingBreakdown) -> str:
    """What was forecast, beside what came of it."""
    if not timing.HasField("expected_ttft_s"):
        return "-"
    measured_s = timing.ttft_s - timing.admission_s - timing.route_s
    said = [f"first token {timing.expected_ttft_s:.3f} s (was {measured_s:.3f})"]
    if timing.HasField("tpot_s"):
        said.append(f"{timing.expected_tpot_s * 1e3:.1f} ms a token (was {timing.tpot_s * 1e3:.1f})")
    said.append(f"{_bytes(timing.expected_bytes_shipped)} shipped (was {_bytes(timing.bytes_shipped)})")
    return ", ".join(said)


def _alone(timing: pb.TimingBreakdown) -> str:
    """The best route on which nothing is shipped."""
    if not timing.HasField("colocated_ttft_s"):
        return "-"
    return f"first token {timing.colocated_ttft_s:.3f} s, {timing.colocated_tpot_s * 1e3:.1f} ms a token"


def cost_table(costs: Iterable[pb.CostInfo]) -> Table:
    """What steps and transfers are predicted to take, and how far off predictions are."""
    table = _table(("work", "of"), ("a", "b", "c", "samples", "error p50", "p90", "bias"))
    for cost in costs:
        units = [_seconds(seconds) for seconds in cost.coefficients] + ["-"] * (3 - len(cost.coefficients))
        known = [f"{cost.error_p50:.0%}", f"{cost.error_p90:.0%}", f"{cost.bias:+.0%}"] if cost.samples else ["-"] * 3
        table.add_row(cost.work, cost.of, *units, str(cost.samples), *known)
    return table


def worker_table(workers: Iterable[pb.WorkerInfo]) -> Table:
    """Every worker, with its load."""
    numbers = ("run", "wait", "pages", "cached", "sessions", "sent", "received", "prompt", "generated")
    table = _table(("worker", "role", "state"), numbers)
    for worker in workers:
        table.add_row(
            worker.worker_id,
            role_and_ranks(worker),
            worker.state,
            str(worker.num_running),
            str(worker.num_waiting),
            f"{worker.pages_total - worker.pages_free}/{worker.pages_total}",
            str(worker.pages_cached),
            str(worker.num_sessions),
            _bytes(worker.bytes_sent),
            _bytes(worker.bytes_received),
            str(worker.prompt_tokens),
            str(worker.generated_tokens),
        )
    return table


def role_and_ranks(worker: pb.WorkerInfo) -> str:
    """Its role, and of how many ranks it is, if of several."""
    return worker.role if worker.tensor_parallel <= 1 else f"{worker.role} x{worker.tensor_parallel}"


def engine_table(workers: Iterable[pb.WorkerInfo]) -> Table:
    """What computes each worker's steps, and why not something faster."""
    table = _table(("worker", "attention", "model", "phases", "why"), ("fallbacks",))
    for worker in workers:
        reasons = (worker.attention_reason, worker.forward_reason, worker.colocated_reason)
        table.add_row(
            worker.worker_id,
            worker.attention or "-",
            worker.forward or "-",
            worker.colocated or "-",
            "; ".join(reason for reason in reasons if reason),
            str(worker.engine_fallbacks),
        )
    return table


def tier_table(workers: Iterable[pb.WorkerInfo]) -> Table:
    """The lower tiers of each worker's prefix cache: a row for each, none of a worker that has none."""
    table = _table(("worker", "tier"), ("pages", "stored", "evicted", "bad files", "loads at", "loaded tokens"))
    for worker in workers:
        for tier in worker.tiers:
            table.add_row(
                worker.worker_id,
                tier.tier,
                f"{tier.pages_used}/{tier.pages_total}",
                str(tier.stored_pages),
                str(tier.evicted_pages),
                str(tier.damaged_pages + tier.foreign_pages),
                _rate(tier.load_bytes_per_s),
                str(tier.loaded_tokens),
            )
    return table


def link_table(links: Iterable[pb.LinkInfo]) -> Table:
    """Every ordered pair of workers, with what is known of the path between them."""
    table = _table(
        ("from", "to", "path", "state"), ("codec", "rate", "RTT", "connections", "queued", "sent", "resent", "age")
    )
    for link in links:
        table.add_row(
            link.from_worker,
            link.to_worker,
            link.path or "-",
            f"{link.state}: {link.reason}" if link.reason else link.state,
            link.codec or "raw",
            _rate(link.rate if link.HasField("rate") else None),
            _milliseconds(link.rtt_s if link.HasField("rtt_s") else None),
            str(link.connections),
            _bytes(link.bytes_queued),
            _bytes(link.bytes_sent),
            str(link.retransmits),
            f"{link.age_s:.0f} s" if link.HasField("age_s") else "-",
        )
    return table


def check_table(links: Iterable[pb.LinkCheck]) -> Table:
    """The verdict of each self-test."""
    table = _table(("from", "to", "path"), ("bytes", "exact", "GB/s", "RTT ms"))
    table.add_column("verdict", overflow="fold")
    for link in links:
        table.add_row(
            link.from_worker,
            link.to_worker,
            link.path or "-",
            str(link.num_bytes),
            "yes" if link.exact else "no",
            f"{link.rate / 1e9:.3g}" if link.HasField("rate") else "-",
            f"{link.rtt_s * 1e3:.2f}" if link.HasField("rtt_s") else "-",
            "works" if link.passed else f"{link.error}: {link.reason}",
        )
    return table


def cluster_link_table(pairs: Iterable[pb.ClusterLinkInfo]) -> Table:
    """Every ordered pair of clusters."""
    numbers = ("usable", "now", "carries", "capacity", "in use", "RTT", "queued")
    table = _table(("from cluster", "to cluster", "path"), numbers)
    for pair in pairs:
        table.add_row(
            pair.from_cluster,
            pair.to_cluster,
            ", ".join(pair.paths) or "-",
            f"{pair.num_usable} of {pair.num_links}",
            _rate(pair.throughput),
            _rate(pair.carries if pair.HasField("carries") else None),
            _rate(pair.capacity if pair.HasField("capacity") else None),
            f"{pair.utilisation:.0%}" if pair.HasField("utilisation") else "-",
            _milliseconds(pair.rtt_s if pair.HasField("rtt_s") else None),
            _bytes(pair.bytes_queued),
        )
    return table


def plan_table(plan: pb.PlanInfo) -> Table:
    """What the planner aims at, why, and what disaggregation gains."""
    table = Table(show_header=False, box=None, pad_edge=False)
    table.add_column()
    table.add_column(overflow="fold")
    roles = f"{plan.num_prefill} prefill + {plan.num_decode} decode"
    if (plan.target_prefill, plan.target_decode) not in ((plan.num_prefill, plan.num_decode), (0, 0)):
        roles += f", aims at {plan.target_prefill} + {plan.target_decode}"
    rows = [
        ("planner", plan.mode),
        ("threshold", _threshold(plan)),
        ("bandwidth", "abundant" if plan.abundant else "scarce"),
        ("local roles", roles),
        *((f"{c.worker_id}", f"turns to {c.to_role} since {c.age_s:.0f} s") for c in plan.changing),
        ("because", plan.reason or "-"),
        ("disaggregation", plan.gain.reason if plan.HasField("gain") else "not compared yet"),
        ("advice", plan.advice or "-"),
        ("numbers", ", ".join(f"{name} {plan.numbers[name]:.4g}" for name in sorted(plan.numbers)) or "-"),
    ]
    for name, value in rows:
        table.add_row(name, value)
    return table


def pool_table(pools: Iterable[pb.PoolInfo]) -> Table:
    """Elastic pools: how many workers they should have and have, and what is under way."""
    table = _table(("pool",), ("desired", "ready", "pending", "draining", "bounds"))
    table.add_column("", overflow="fold")
    for pool in pools:
        table.add_row(
            pool.pool,
            f"{pool.desired}{' (held)' if pool.held else ''}",
            str(pool.ready_prefill + pool.ready_decode),
            str(len(pool.pending)),
            str(len(pool.draining)),
            f"{pool.min_replicas} to {pool.max_replicas}",
            "; ".join(_pool_lines(pool)),
        )
    return table


def _pool_lines(pool: pb.PoolInfo) -> Iterator[str]:
    for change in (*pool.pending, *pool.draining):
        yield f"{change.worker_id} {change.state} since {change.age_s:.0f} s"
    other = pool.ready_decode if pool.pool == "prefill" else pool.ready_prefill
    if other:
        yield f"{other} of them {'decode' if pool.pool == 'prefill' else 'prefill'} now"
    if pool.problem:
        again = f", again in {pool.retry_in_s:.0f} s" if pool.HasField("retry_in_s") else ""
        yield f"{pool.problem}{again}"


def plan_history_table(history: Iterable[pb.PlanSample], last: int = 10) -> Table:
    """The last changes of the plan."""
    table = _table(
        ("ago", "change"), ("threshold", "roles", "link in use", "link queue", "PrfaaS queue", "decode queue")
    )
    for sample in [sample for sample in history if sample.change][-last:]:
        table.add_row(
            f"{sample.age_s:.0f} s",
            sample.change,
            _threshold(sample),
            f"{sample.num_prefill} + {sample.num_decode}",
            f"{sample.link_utilisation:.0%}",
            f"{sample.link_queue_s:.1f} s",
            f"{sample.prfaas_queue_s:.1f} s",
            str(sample.decode_queue),
        )
    return table


def _threshold(plan: pb.PlanInfo | pb.PlanSample) -> str:
    return f"{plan.threshold_tokens:,.0f} tokens" if plan.HasField("threshold_tokens") else "none: nothing is offloaded"


def _table(words: Sequence[str], numbers: Sequence[str]) -> Table:
    table = Table(box=None, pad_edge=False)
    for name in words:
        table.add_column(name, overflow="fold")
    for name in numbers:
        table.add_column(name, justify="right", overflow="fold")
    return table


def _rate(bytes_per_s: float | None) -> str:
    return "-" if bytes_per_s is None else f"{bytes_per_s / 1e9:.3g} GB/s"


def _seconds(seconds: float) -> str:
    for unit, factor in (("s", 1.0), ("ms", 1e3), ("us", 1e6), ("ns", 1e9)):
        if seconds * factor >= 1:
            return f"{seconds * factor:.3g} {unit}"
    return f"{seconds * 1e12:.3g} ps"


def _milliseconds(seconds: float | None) -> str:
    return "-" if seconds is None else f"{seconds * 1e3:.2f} ms"


def _bytes(count: float) -> str:
    for unit in ("B", "KiB", "MiB", "GiB"):
        if count < 1024:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1024
    return f"{count:.1f} TiB"
