"""What does the service tell people of its workers, links and costs? Views as messages of its public API."""

from __future__ import annotations

import math

from cluster.cluster_links import ClusterPair
from cluster.cost_model import CostLine
from cluster.link_tester import PairResult
from cluster.view import LinkView, Offload, WorkerView
from core.link import LinkEstimate
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
