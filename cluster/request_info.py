"""What does the service tell people of a request? Its timing, and what it was, as messages of its public API."""

from __future__ import annotations

from dataclasses import asdict

from cluster.metrics import RequestRecord
from core.request import RequestTiming
from protos import serving_pb2 as pb


def recent_request(record: RequestRecord, now: float) -> pb.RecentRequest:
    """One that has ended; ``now`` on the gateway's Clock."""
    return pb.RecentRequest(
        request_id=record.request_id,
        trace_id="" if record.trace is None else record.trace.trace_id,
        age_s=max(0.0, now - record.ended_at),
        door=record.door.value,
        outcome=record.outcome.value,
        tenant=record.tenant,
        prompt_tokens=record.prompt_tokens,
        cached_tokens=record.cached_tokens,
        completion_tokens=record.generated_tokens,
        total_s=record.e2e_s,
        ttft_s=record.ttft_s,
        timings=[timing_breakdown(timing, record.tokenize_s) for timing in record.timings],
    )


def timing_breakdown(timing: RequestTiming | None, tokenize_s: float) -> pb.TimingBreakdown:
    """Where the seconds of one continuation went; None: the router gave no timing."""
    if timing is None:
        return pb.TimingBreakdown(tokenize_s=tokenize_s)
    reload = timing.reload
    return pb.TimingBreakdown(
        prefill_worker=timing.prefill_worker or "",
        decode_worker=timing.decode_worker or "",
        tokenize_s=tokenize_s,
        route_s=timing.route_s,
        prefill_queue_s=timing.prefill_queue_s,
        prefill_s=timing.prefill_s,
        transfer_s=timing.transfer_s,
        exposed_transfer_s=timing.exposed_transfer_s,
        decode_queue_s=timing.decode_queue_s,
        decode_s=timing.decode_s,
        ttft_s=timing.ttft_s,
        total_s=timing.total_s,
        bytes_shipped=timing.bytes_shipped,
        num_attempts=timing.num_attempts,
        route_reason=timing.route_reason,
        decode_cached_tokens=timing.decode_cached_tokens,
        num_preemptions=timing.num_preemptions,
        pull_outcome=timing.pull_outcome,
        pulled_tokens=timing.pulled_tokens,
        bytes_pulled=timing.bytes_pulled,
        pull_s=timing.pull_s,
        reload_outcome=reload.outcome.value if reload is not None else "",
        host_tokens=reload.host_tokens if reload is not None else 0,
        disk_tokens=reload.disk_tokens if reload is not None else 0,
        reload_s=reload.seconds if reload is not None else 0.0,
        reload_reason=reload.reason if reload is not None else "",
        admission_s=timing.admission_s,
        slo_ttft_met=timing.slo_ttft_met,
        slo_tpot_met=timing.slo_tpot_met,
        slo_miss_expected=timing.slo_miss_expected,
        tpot_s=timing.tpot_s,
        fallback=timing.fallback,
        expected_ttft_s=timing.expected_ttft_s,
        expected_tpot_s=timing.expected_tpot_s,
        expected_bytes_shipped=timing.expected_bytes_shipped,
        colocated_ttft_s=timing.colocated_ttft_s,
        colocated_tpot_s=timing.colocated_tpot_s,
        ttft_parts=None if timing.ttft_parts is None else pb.TtftParts(**asdict(timing.ttft_parts)),
        ttst_parts=None if timing.ttst_parts is None else pb.TtstParts(**asdict(timing.ttst_parts)),
    )
