"""A gateway's metrics of which none is without a sample."""

from cluster.admission import AdmissionCounters
from cluster.colocation import Gain, Served
from cluster.front_door import Door
from cluster.grammar_check import Finding
from cluster.metric_catalogue import WAIT_BUCKETS_S
from cluster.metrics import Metrics, Outcome, RequestRecord, SloResult
from cluster.planner import PlannerStatus
from cluster.planning_policy import FleetTarget, Roles
from cluster.pool_scaler import Ended, PoolStatus
from cluster.role_conversion import Outcome as ConversionOutcome
from cluster.view import LinkView, WorkerLoad
from core.cache_tiers import Tier, TierState
from core.compute import EngineModes
from core.link import LinkEstimate
from core.request import ClusterId, Role, WorkerId
from tests.unit.cluster.scripted_router import (
    TIMING,
    Counters,
    FixedMembership,
    ScriptedPlanner,
    ScriptedRouter,
    worker,
)


def full_metrics() -> Metrics:
    """After one request, beside two workers with a link, a plan and one of everything that is counted."""
    membership, router = FixedMembership(), ScriptedRouter(())
    east, west, sender, receiver = ClusterId("east"), ClusterId("west"), WorkerId("p"), WorkerId("d")
    estimate = LinkEstimate(receiver, west, "tcp", 4, goodput=2e9, delivery_rate=1e9, rtt_s=0.01, throughput=1e9)
    membership.workers = (
        worker(
            "decode-0",
            Role.DECODE,
            load=WorkerLoad(
                pulls=(("pulled", 1),),
                modes=EngineModes(prompt_steps=(("tpot", 2),)),
                tiers=(TierState(Tier.HOST, 10),),
                reloads=(("loaded", 1),),
            ),
        ),
        worker("prefill-0", Role.PREFILL),
    )
    membership.links = {(sender, receiver): LinkView(sender, east, receiver, west, 0.0, estimate)}
    membership.probes_by_outcome = {"passed": 2}
    router.counters = Counters(
        admission=AdmissionCounters(
            1, {"unsalted": 1}, {"slo_ttft": 1}, {"slo_tpot": 1}, (1,) * (len(WAIT_BUCKETS_S) + 1), 0.001
        )
    )
    status = PlannerStatus(
        "dual",
        FleetTarget(
            Roles(1, 1),
            4096.0,
            "why",
            {"rate_rps": 2.0},
            True,
            "disaggregate",
            Gain(2.0, Served(5.0, 0.2, 0.01), Served(4.0, 0.3, 0.02)),
        ),
        changes={("threshold", "link_busy"): 1},
        conversions={(Role.DECODE, ConversionOutcome.DONE): 1},
        pools={Role.DECODE: PoolStatus(1, 2, 2, {Role.DECODE: 1}, (), (), None, 20.0, None, "")},
        starts={(Role.DECODE, Ended.STARTED): 1},
    )
    metrics = Metrics(membership, router, lambda *_: 4e9, ScriptedPlanner(status))
    metrics.grammar(Finding.COMPILED)
    metrics.observe(
        RequestRecord(
            door=Door.HTTP,
            outcome=Outcome.OK,
            e2e_s=0.5,
            prompt_tokens=10,
            cached_tokens=4,
            generated_tokens=6,
            ttft_s=0.25,
            tpot_s=(0.02,),
            slo_result=SloResult.MET,
            timings=(TIMING,),
            tenant="unsalted",
        )
    )
    return metrics
