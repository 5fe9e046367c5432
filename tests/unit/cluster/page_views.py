"""A fleet of two datacenters under load, as the page is told of it, and after the link between them has degraded."""

from __future__ import annotations

import random
from dataclasses import replace

from cluster.admission import AdmissionCounters
from cluster.finished_requests import RecentRequests
from cluster.front_door import Door
from cluster.metrics import Outcome, RequestRecord, SloResult
from cluster.planner import PlannerStatus, PlanSample
from cluster.planning_policy import FleetTarget, Roles
from cluster.pool_scaler import PoolStatus
from cluster.view import LinkView, Offload, WorkerLoad, WorkerView
from core.latency_parts import TtftParts, TtstParts
from core.link import LinkEstimate, ProbeReport
from core.request import ClusterId, RequestId, Role, WorkerId
from tests.unit.cluster.scripted_router import TIMING, Counters, Gateway, worker

HOME, FAR = ClusterId("amsterdam"), ClusterId("oslo")
CAPACITY = 1.25e9  # bytes/s between the two
FAILURE = "no byte came in 5 s"


def fleet(gateway: Gateway, *, degraded: bool) -> None:
    """Put a fleet under load behind the gateway's doors. ``degraded``: the link carries an eighth, one pair nothing."""
    draw = random.Random(3)
    workers = [
        *(_worker(f"oslo/prefill-{i}", Role.PREFILL, FAR, draw, busy=0.3 if degraded else 0.8) for i in range(3)),
        *(_worker(f"prefill-{i}", Role.PREFILL, HOME, draw, busy=0.9 if degraded else 0.5) for i in range(2)),
        *(_worker(f"decode-{i}", Role.DECODE, HOME, draw, busy=0.6) for i in range(4)),
    ]
    gateway.membership.workers = tuple(workers)
    gateway.membership.links = {(li.from_worker, li.to_worker): li for li in _links(workers, degraded)}
    threshold = 7168.0 if degraded else 2048.0
    reason = "the link from oslo is full: prompts must be longer to be worth it" if degraded else "both stages balance"
    gateway.membership.offload = Offload(threshold, reason=reason)
    gateway.router.counters = Counters(
        num_requests=4831,
        admission=AdmissionCounters(3 if degraded else 0, {"other": 3}, {"slo_ttft": 17 if degraded else 2}),
        fallbacks_by_reason={"link_down": 6} if degraded else {},
        routes_by_place={"local": 2210, "offloaded": 1904, "colocated": 717},
    )
    gateway.planner.status = _plan(gateway.clock.now(), threshold, reason, degraded)


def requests(recent: RecentRequests, now: float, num: int = 24, *, degraded: bool = False) -> None:
    """That many requests have ended, one every 0.4 s."""
    draw = random.Random(5)
    for i in range(num):
        recent.observe(_request(i, now - 0.4 * (num - i), draw, degraded))


def _worker(name: str, role: Role, cluster: ClusterId, draw: random.Random, busy: float) -> WorkerView:
    free = round(2048 * (1 - busy * draw.uniform(0.7, 1.0)))
    prompt = draw.randrange(200_000, 400_000)
    load = WorkerLoad(
        num_running=round(24 * busy) if role is Role.DECODE else round(4 * busy),
        num_waiting=round(draw.uniform(0, 6) * busy),
        num_sessions=draw.randrange(4),
        pages_free=free,
        pages_cached=round(free * draw.uniform(0.3, 0.7)),
        bytes_sent=draw.randrange(10**10, 10**11) if role is Role.PREFILL else 0,
        bytes_received=draw.randrange(10**10, 10**11) if role is Role.DECODE else 0,
        prompt_tokens=prompt,
        cached_tokens=round(prompt * draw.uniform(0.3, 0.6)),
    )
    return replace(worker(name, role, load=load), cluster_id=cluster, pages_total=2048)


def _links(workers: list[WorkerView], degraded: bool) -> list[LinkView]:
    found = []
    for sender in (w for w in workers if w.role is Role.PREFILL):
        for receiver in (w for w in workers if w.role is Role.DECODE):
            far = sender.cluster_id != receiver.cluster_id
            rate, used = (
                (4e9, 2e8) if not far else (CAPACITY / 96, CAPACITY / 98) if degraded else (1.1e9, CAPACITY / 23)
            )
            estimate = LinkEstimate(
                receiver.worker_id,
                receiver.cluster_id,
                "tcp+tls1.3" if far else "ucx:shm",
                connections=4,
                goodput=rate,
                delivery_rate=rate,
                rtt_s=0.031 if far else 2e-5,
                throughput=used,
                bytes_sent=3 * 10**9,
                bytes_queued=40_000_000 if far and degraded else 0,
                age_s=0.1,
            )
            broken = degraded and sender.worker_id == "prefill-0" and receiver.worker_id == "decode-3"
            probe = ProbeReport(estimate.path, 4096, True, 4096, 0.001, estimate.rtt_s)
            found.append(
                LinkView(
                    sender.worker_id,
                    sender.cluster_id,
                    receiver.worker_id,
                    receiver.cluster_id,
                    0.0,
                    estimate,
                    probe,
                    usable=not broken,
                    reason=FAILURE if broken else "",
                )
            )
    return found


def _plan(now: float, threshold: float, reason: str, degraded: bool) -> PlannerStatus:
    samples = []
    for i in range(120):
        late = degraded and i > 70
        level = min(7168.0, 2048.0 * 2 ** ((i - 70) / 12)) if late else 2048.0 + 256 * (i // 40)
        samples.append(
            PlanSample(
                at=now - (120 - i) * 2,
                threshold_tokens=level,
                abundant=False,
                num_prefill=3 if late and i > 95 else 2,
                num_decode=3 if late and i > 95 else 4,
                num_changing=0,
                num_prfaas=3,
                link_bytes_per_s=CAPACITY / (8 if late else 1),
                link_utilisation=0.98 if late else 0.5,
                link_queue_s=1.2 if late else 0.0,
                prfaas_queue_s=0.1,
                local_queue_s=0.3,
                decode_queue=2,
                gateway_queue=3 if late else 0,
                rate_rps=9.5,
                change="decode-3 becomes a prefill worker" if i == 96 and degraded else "",
            )
        )
    roles = Roles(3, 3) if degraded else Roles(2, 4)
    target = FleetTarget(roles, threshold, reason, {"rate_rps": 9.5}, False)
    pending = ((WorkerId("decode-4"), "placing", now - 12.0),) if degraded else ()
    pool = PoolStatus(2, 6, 5 if degraded else 4, {Role.DECODE: 4}, pending, (), None, 30.0, None, "")
    pools = {Role.DECODE: pool}
    return PlannerStatus("dual", target, num_prefill=2, num_decode=4, pools=pools, history=tuple(samples))


def _request(i: int, ended_at: float, draw: random.Random, degraded: bool) -> RequestRecord:
    slow = 3.0 if degraded and i > 10 else 1.0
    parts = TtftParts(
        receive_s=0.001,
        tokenize_s=draw.uniform(0.002, 0.01),
        admission_s=draw.uniform(0, 0.25) * slow,
        route_s=0.001,
        retries_s=0.18 if i == 17 else 0.0,
        messages_s=0.004,
        pull_s=draw.choice((0.0, 0.0, 0.05)),
        prefill_queue_s=draw.uniform(0.01, 0.12) * slow,
        prefill_s=draw.uniform(0.15, 0.6),
    )
    later = TtstParts(
        transfer_wait_s=0.02 if i % 5 == 0 else 0.0,
        transfer_s=draw.uniform(0.01, 0.04) * slow**2,
        decode_queue_s=0.008,
        first_step_s=0.018,
        messages_s=0.001,
    )
    decode_s = draw.uniform(0.3, 1.2)
    offloaded = i % 3 == 0
    timing = replace(
        TIMING,
        prefill_worker=WorkerId("oslo/prefill-1" if offloaded else "prefill-0"),
        decode_worker=WorkerId(f"decode-{i % 4}"),
        route_reason="beyond the threshold: oslo prefills it, its K/V needs 0.09 s" if offloaded else "it is short",
        ttft_s=parts.total_s,
        tpot_s=decode_s / 40,
        slo_ttft_met=parts.total_s < 0.9,
        slo_tpot_met=True,
        fallback="",
        num_attempts=2 if i == 17 else 1,
        bytes_shipped=draw.randrange(10**7, 10**8),
        ttft_parts=parts,
        ttst_parts=later,
    )
    refused = degraded and i in (15, 21)
    return RequestRecord(
        door=Door.HTTP,
        outcome=Outcome.OVERLOADED if refused else Outcome.OK,
        e2e_s=0.3 if refused else parts.total_s + later.total_s + decode_s,
        prompt_tokens=draw.randrange(300, 9000),
        cached_tokens=draw.randrange(300),
        generated_tokens=0 if refused else 41,
        ttft_s=None if refused else parts.total_s,
        tpot_s=(),
        slo_result=SloResult.MET,
        timings=() if refused else (timing,),
        tenant="unsalted",
        request_id=RequestId(f"request-{i}"),
        ended_at=ended_at,
    )
