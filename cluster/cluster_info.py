"""What does the service tell people of its workers, links, costs and plan? Views as messages of its public API."""

from __future__ import annotations

import math
from dataclasses import asdict

from cluster.cluster_links import ClusterPair
from cluster.colocation import Gain
from cluster.cost_model import CostLine
from cluster.link_tester import PairResult
from cluster.planner import PlannerStatus, PlanSample
from cluster.view import LinkView, Offload, WorkerView
from core.link import LinkEstimate
from core.request import Role
from protos import serving_pb2 as pb


def worker_info(worker: WorkerView, now: float) -> pb.WorkerInfo:
    """One worker; ``now`` on the gateway's Clock."""
    load = worker.load
    return pb.WorkerInfo(
        worker_id=worker.worker_id,
        engine_id=worker.engine_id,
        cluster_id=worker.cluster_id,
        role=worker.role,
        state="draining" if worker.draining else "ready",
        address=worker.address,
        transport=worker.transport,
        num_running=load.num_running,
        num_waiting=load.num_waiting,
        pages_total=worker.pages_total,
        pages_free=load.pages_free,
        pages_cached=load.pages_cached,
        bytes_sent=load.bytes_sent,
        bytes_received=load.bytes_received,
        prompt_tokens=load.prompt_tokens,
        generated_tokens=load.generated_tokens,
        cached_tokens=load.cached_tokens,
        lease_left_s=max(0.0, worker.lease_expires_at - now),
        num_sessions=load.num_sessions,
        pages_quarantined=load.pages_quarantined,
        num_preemptions=load.num_preemptions,
        attention=load.modes.attention,
        attention_reason=load.modes.attention_reason,
        forward=load.modes.forward,
        forward_reason=load.modes.forward_reason,
        engine_fallbacks=load.modes.num_fallbacks,
        colocated=load.modes.colocated,
        colocated_reason=load.modes.colocated_reason,
        tiers=[pb.TierInfo(**asdict(state)) for state in load.tiers],
        reloads=dict(load.reloads),
        pages_lost=load.pages_lost,
        tensor_parallel=worker.tensor_parallel,
    )


def link_info(link: LinkView, now: float) -> pb.LinkInfo:
    """One ordered pair of workers; ``now`` on the gateway's Clock."""
    estimate = link.estimate or LinkEstimate(link.to_worker, link.to_cluster)
    return pb.LinkInfo(
        from_worker=link.from_worker,
        to_worker=link.to_worker,
        from_cluster=link.from_cluster,
        to_cluster=link.to_cluster,
        state="usable" if link.usable else "untested" if link.probe is None else "failed",
        reason=link.reason,
        path=estimate.path or ("" if link.probe is None else link.probe.path),
        connections=estimate.connections,
        rate=estimate.rate,
        goodput=estimate.goodput,
        delivery_rate=estimate.delivery_rate,
        rtt_s=estimate.rtt_s,
        min_rtt_s=estimate.min_rtt_s,
        fit_t0_s=estimate.fit_t0_s,
        fit_beta=estimate.fit_beta,
        fit_variance=estimate.fit_variance,
        samples=estimate.samples,
        throughput=estimate.throughput,
        bytes_sent=estimate.bytes_sent,
        bytes_queued=estimate.bytes_queued,
        retransmits=estimate.retransmits,
        retransmits_per_mib=estimate.retransmits_per_mib,
        reconnects=estimate.reconnects,
        falls=estimate.falls,
        codec=estimate.codec,
        codec_changes=estimate.codec_changes,
        age_s=link.age_s(now),
        tested_rate=None if link.probe is None else link.probe.rate,
    )


def link_check(result: PairResult) -> pb.LinkCheck:
    """One self-test."""
    report = result.report
    return pb.LinkCheck(
        from_worker=result.pair.from_worker,
        to_worker=result.pair.to_worker,
        path=report.path,
        num_bytes=report.num_bytes,
        exact=report.exact,
        rate=report.rate,
        rtt_s=report.rtt_s,
        passed=report.passed,
        error=report.error,
        reason=report.reason,
        num_pairs=result.num_pairs,
    )


def cluster_link_info(pair: ClusterPair) -> pb.ClusterLinkInfo:
    """One ordered pair of clusters."""
    return pb.ClusterLinkInfo(
        from_cluster=pair.from_cluster,
        to_cluster=pair.to_cluster,
        num_links=pair.num_links,
        num_usable=pair.num_usable,
        paths=pair.paths,
        connections=pair.connections,
        capacity=pair.capacity,
        measured=pair.measured,
        throughput=pair.throughput,
        utilisation=pair.utilisation,
        rtt_s=pair.rtt_s,
        bytes_sent=pair.bytes_sent,
        bytes_queued=pair.bytes_queued,
        retransmits=pair.retransmits,
        reconnects=pair.reconnects,
        falls=pair.falls,
        codec_changes=pair.codec_changes,
        carries=pair.carries,
    )


def cost_info(line: CostLine) -> pb.CostInfo:
    """One kind of work."""
    cost = line.cost
    return pb.CostInfo(
        work=line.work,
        of=line.of,
        coefficients=cost.coefficients,
        samples=cost.samples,
        error_p50=cost.error.p50,
        error_p90=cost.error.p90,
        bias=cost.error.bias,
    )


def offload_info(offload: Offload) -> pb.OffloadInfo:
    """The planner's word."""
    threshold = offload.threshold_tokens
    return pb.OffloadInfo(
        threshold_tokens=threshold if threshold < math.inf else None,
        mode="abundant" if offload.abundant else "scarce",
        reason=offload.reason,
    )


def plan_info(status: PlannerStatus, now: float) -> pb.PlanInfo:
    """What the planner aims at; ``now`` on the gateway's Clock."""
    info = pb.PlanInfo(
        mode=status.mode,
        num_prefill=status.num_prefill,
        num_decode=status.num_decode,
        changing=[
            pb.RoleChange(worker_id=c.worker_id, to_role=c.role, age_s=max(0.0, now - c.began_at))
            for c in status.changing
        ],
        history=[_plan_sample(sample, now) for sample in status.history],
        pools=[pool_info(status, role, now) for role in status.pools],
    )
    target = status.target
    if target is None:
        return info
    info.MergeFrom(
        pb.PlanInfo(
            threshold_tokens=_finite(target.threshold_tokens),
            abundant=target.abundant,
            reason=target.reason,
            numbers={name: value for name, value in target.numbers.items() if math.isfinite(value)},
            target_prefill=target.roles.num_prefill,
            target_decode=target.roles.num_decode,
            advice=target.advice,
            gain=None if target.gain is None else _gain(target.gain),
        )
    )
    return info


def pool_info(status: PlannerStatus, role: Role, now: float) -> pb.PoolInfo:
    """One elastic pool; ``now`` on the gateway's Clock."""
    pool = status.pools[role]
    return pb.PoolInfo(
        pool=role,
        min_replicas=pool.least,
        max_replicas=pool.most,
        desired=pool.wanted,
        ready_prefill=pool.ready.get(Role.PREFILL, 0),
        ready_decode=pool.ready.get(Role.DECODE, 0),
        pending=[
            pb.PoolChange(worker_id=name, state=state, age_s=max(0.0, now - since))
            for name, state, since in pool.pending
        ],
        draining=[
            pb.PoolChange(worker_id=name, state="draining", age_s=max(0.0, now - since))
            for name, since in pool.draining
        ],
        held=pool.held is not None,
        start_s=pool.start_s,
        retry_in_s=None if pool.retry_at is None or pool.retry_at <= now else pool.retry_at - now,
        problem=pool.problem,
        ended={ended: count for (each, ended), count in status.starts.items() if each is role},
    )


def _gain(gain: Gain) -> pb.DisaggregationGain:
    apart, together = gain.disaggregated, gain.colocated
    return pb.DisaggregationGain(
        rate=gain.rate_rps,
        throughput=apart.throughput_rps,
        ttft_s=apart.ttft_s,
        tpot_s=apart.tpot_s,
        colocated_throughput=together.throughput_rps,
        colocated_ttft_s=together.ttft_s,
        colocated_tpot_s=together.tpot_s,
        throughput_ratio=gain.throughput_ratio,
        ttft_ratio=gain.ttft_ratio,
        tpot_ratio=gain.tpot_ratio,
        reason=gain.reason,
    )


def _plan_sample(sample: PlanSample, now: float) -> pb.PlanSample:
    return pb.PlanSample(
        age_s=max(0.0, now - sample.at),
        threshold_tokens=_finite(sample.threshold_tokens),
        abundant=sample.abundant,
        num_prefill=sample.num_prefill,
        num_decode=sample.num_decode,
        num_changing=sample.num_changing,
        num_prfaas=sample.num_prfaas,
        link_rate=sample.link_bytes_per_s,
        link_utilisation=sample.link_utilisation,
        link_queue_s=sample.link_queue_s,
        prfaas_queue_s=sample.prfaas_queue_s,
        local_queue_s=sample.local_queue_s,
        decode_queue=sample.decode_queue,
        gateway_queue=sample.gateway_queue,
        rate=sample.rate_rps,
        change=sample.change,
    )


def _finite(threshold: float) -> float | None:
    """A threshold beyond every prompt is none: JSON knows no infinity."""
    return threshold if math.isfinite(threshold) else None
