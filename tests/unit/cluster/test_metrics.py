"""What Prometheus reads."""

import asyncio
from dataclasses import replace

import pytest

from cluster.admission import WAIT_BUCKETS_S, AdmissionCounters
from cluster.colocation import Gain, Served
from cluster.front_door import Door
from cluster.metrics import Metrics, RequestRecord, SloResult, forecast_errors
from cluster.metrics import Outcome as RequestOutcome
from cluster.planner import PlannerStatus
from cluster.planning_policy import FleetTarget, Roles
from cluster.role_conversion import Outcome
from cluster.view import LinkView, WorkerLoad
from core.cache_tiers import Tier, TierState
from core.errors import (
    Cancelled,
    DeadlineExceeded,
    Incompatible,
    InvalidRequest,
    NoRoute,
    Overloaded,
    SequenceFailed,
    UnknownModel,
)
from core.link import LinkEstimate
from core.request import ClusterId, Role, WorkerId
from tests.unit.cluster.scripted_router import TIMING, FixedMembership, ScriptedPlanner, ScriptedRouter, worker


@pytest.fixture
def membership() -> FixedMembership:
    return FixedMembership()


@pytest.fixture
def metrics(membership: FixedMembership) -> Metrics:
    return Metrics(membership, ScriptedRouter(()), lambda *_: None, ScriptedPlanner())


def record(**changes: object) -> RequestRecord:
    values = {
        "door": Door.GRPC,
        "outcome": RequestOutcome.OK,
        "e2e_s": 2.0,
        "prompt_tokens": 10,
        "cached_tokens": 4,
        "generated_tokens": 6,
        "ttft_s": 0.5,
        "tpot_s": (0.02, 0.03),
    }
    return RequestRecord(**(values | changes))


@pytest.mark.parametrize(
    ("error", "outcome"),
    [
        (InvalidRequest("n", "no"), "invalid"),
        (UnknownModel("a", "b"), "invalid"),
        (Overloaded("full"), "overloaded"),
        (NoRoute("empty"), "no_route"),
        (DeadlineExceeded("late"), "deadline"),
        (Cancelled("gone"), "cancelled"),
        (asyncio.CancelledError(), "cancelled"),
        (GeneratorExit(), "cancelled"),
        (SequenceFailed("lost", retryable=False), "failed"),
        (Incompatible("dtype", "a", "b"), "failed"),
        (ZeroDivisionError(), "failed"),
    ],
)
def test_every_error_has_an_outcome(error, outcome):
    assert RequestOutcome.of(error) == outcome


def test_an_observed_request_is_in_every_series(metrics):
    metrics.observe(record())
    value = metrics.registry.get_sample_value
    assert value("prfaas_requests_total", {"door": "grpc", "outcome": "ok"}) == 1
    assert value("prfaas_prompt_tokens_total") == 10
    assert value("prfaas_cached_tokens_total") == 4
    assert value("prfaas_generated_tokens_total") == 6
    assert value("prfaas_time_to_first_token_seconds_sum") == 0.5
    assert value("prfaas_time_per_output_token_seconds_count") == 2
    assert value("prfaas_e2e_request_latency_seconds_sum") == 2.0


def test_latency_to_the_end_is_of_requests_that_ended_well_only(metrics):
    metrics.observe(record(outcome=RequestOutcome.CANCELLED, ttft_s=None, tpot_s=()))
    value = metrics.registry.get_sample_value
    assert value("prfaas_requests_total", {"door": "grpc", "outcome": "cancelled"}) == 1
    assert value("prfaas_e2e_request_latency_seconds_count") == 0
    assert value("prfaas_time_to_first_token_seconds_count") == 0


def test_retries_and_resumes_come_from_the_router(metrics):
    value = metrics.registry.get_sample_value
    assert value("prfaas_retries_total", {"reason": "prefill worker lost"}) == 2
    assert value("prfaas_resumes_total", {"reason": "decode worker lost"}) == 1
    assert value("prfaas_requests_inflight") == 0


def test_admission_is_read_when_prometheus_asks(membership):
    router = ScriptedRouter(())
    waits = tuple(range(1, len(WAIT_BUCKETS_S) + 2))
    admission = AdmissionCounters(3, {"other": 2, "unsalted": 1}, {"slo_ttft": 4}, {"slo_tpot": 5}, waits, 6.5)
    router.counters = replace(router.counters, admission=admission)

    value = Metrics(membership, router, lambda *_: None, ScriptedPlanner()).registry.get_sample_value

    assert value("prfaas_rejections_total", {"reason": "slo_ttft"}) == 4
    assert value("prfaas_slo_misses_served_total", {"reason": "slo_tpot"}) == 5
    assert value("prfaas_queued_continuations", {"tenant": "other"}) == 2
    assert value("prfaas_admission_wait_seconds_bucket", {"le": "0.001"}) == 1
    assert value("prfaas_admission_wait_seconds_bucket", {"le": "+Inf"}) == waits[-1]
    assert value("prfaas_admission_wait_seconds_count") == waits[-1]
    assert value("prfaas_admission_wait_seconds_sum") == 6.5


@pytest.mark.parametrize(
    ("outcome", "missed", "result"),
    [
        (RequestOutcome.OK, (False, False), "met"),
        (RequestOutcome.OK, (True, False), "ttft_missed"),
        (RequestOutcome.OK, (False, True), "tpot_missed"),
        (RequestOutcome.OK, (True, True), "both_missed"),
        (RequestOutcome.OVERLOADED, (False, False), "refused"),
        (RequestOutcome.DEADLINE, (False, False), "failed"),
        (RequestOutcome.CANCELLED, (False, False), "cancelled"),
    ],
)
def test_requests_with_objectives_are_counted_by_what_became_of_them(metrics, outcome, missed, result):
    metrics.observe(record(outcome=outcome, slo_result=SloResult.of(outcome, *missed)))
    metrics.observe(record())

    samples = [s for m in metrics.registry.collect() if m.name == "prfaas_slo_requests" for s in m.samples]
    assert {s.labels["result"]: s.value for s in samples if s.name.endswith("_total")} == {result: 1}


def test_workers_are_read_when_prometheus_asks(metrics, membership):
    load = WorkerLoad(num_running=3, pages_free=7, bytes_sent=4096)
    membership.workers = (worker("prefill-1", Role.PREFILL, load=load, draining=True),)
    value = metrics.registry.get_sample_value
    labels = {"worker": "prefill-1", "role": "prefill", "cluster": "local"}
    assert value("prfaas_worker_running_sequences", labels) == 3
    assert value("prfaas_worker_pages_free", labels) == 7
    assert value("prfaas_worker_ready", labels) == 0
    assert value("prfaas_worker_kv_sent_bytes_total", labels) == 4096
    membership.workers = ()
    assert value("prfaas_worker_running_sequences", labels) is None


def test_pulls_are_counted_by_how_they_ended(metrics, membership):
    load = WorkerLoad(pulls=(("pulled", 5), ("timeout", 2)), pulled_tokens=640, pulled_bytes=81920)
    membership.workers = (worker("decode-0", Role.DECODE, load=load),)
    value = metrics.registry.get_sample_value
    labels = {"worker": "decode-0", "role": "decode", "cluster": "local"}
    assert value("prfaas_worker_pulls_total", {**labels, "outcome": "pulled"}) == 5
    assert value("prfaas_worker_pulls_total", {**labels, "outcome": "timeout"}) == 2
    assert value("prfaas_worker_pulled_tokens_total", labels) == 640
    assert value("prfaas_worker_pulled_bytes_total", labels) == 81920


def test_lower_cache_tiers_are_counted_each_and_reloads_by_what_became_of_them(metrics, membership):
    disk = TierState(Tier.DISK, 100, 40, 2e9, 0.001, 0, 50, 640, evicted_pages=7, damaged_pages=2, foreign_pages=1)
    load = WorkerLoad(tiers=(TierState(Tier.HOST, 10), disk), reloads=(("loaded", 3), ("computed", 1)), pages_lost=4)
    membership.workers = (worker("prefill-0", Role.PREFILL, load=load),)
    value = metrics.registry.get_sample_value
    labels = {"worker": "prefill-0", "role": "prefill", "cluster": "local"}
    assert value("prfaas_worker_reloads_total", {**labels, "outcome": "loaded"}) == 3
    assert value("prfaas_worker_pages_lost_total", labels) == 4
    of_disk = {**labels, "tier": "disk"}
    assert value("prfaas_worker_tier_pages_used", of_disk) == 40
    assert value("prfaas_worker_tier_load_bytes_per_second", of_disk) == 2e9
    assert value("prfaas_worker_tier_loaded_tokens_total", of_disk) == 640
    for reason, count in (("evicted", 7), ("damaged", 2), ("foreign", 1)):
        assert value("prfaas_worker_tier_dropped_pages_total", {**of_disk, "reason": reason}) == count
    assert value("prfaas_worker_tier_pages", {**labels, "tier": "host"}) == 10


def test_routes_and_fallbacks_come_from_the_router(metrics):
    value = metrics.registry.get_sample_value
    assert value("prfaas_fallbacks_total", {"reason": "link_down"}) == 3
    assert value("prfaas_routes_total", {"place": "local"}) == 4


def test_costs_are_published_with_their_errors(metrics):
    value, labels = metrics.registry.get_sample_value, {"work": "prefill", "of": "tiny on a cpu"}
    assert value("prfaas_cost_samples_total", labels) == 7
    errors = [value("prfaas_cost_relative_error", labels | {"statistic": name}) for name in ("p50", "p90", "bias")]
    assert errors == [0.1, 0.2, -0.05]
    assert value("prfaas_cost_samples_total", {"work": "transfer", "of": "local to local"}) == 0


def test_a_forecast_is_held_against_what_came_of_it(metrics):
    timing = replace(TIMING, route_s=0.05, admission_s=0.0)
    assert forecast_errors(timing) == pytest.approx({"ttft": 0.0, "tpot": 0.25, "bytes_shipped": -0.5})
    assert forecast_errors(replace(timing, num_attempts=2)) == {}
    assert forecast_errors(replace(timing, expected_ttft_s=None, tpot_s=None, prefill_worker=None)) == {}
    metrics.observe(record(timings=(timing, timing)))
    value = metrics.registry.get_sample_value
    assert value("prfaas_forecast_relative_error_count", {"of": "tpot"}) == 2
    assert value("prfaas_forecast_relative_error_bucket", {"of": "bytes_shipped", "le": "-0.5"}) == 2


def test_two_gateways_in_one_process_do_not_share_a_registry(metrics, membership):
    other = Metrics(membership, ScriptedRouter(()), lambda *_: None, ScriptedPlanner())
    metrics.refuse(Door.HTTP, Overloaded("full"))
    labels = {"door": "http", "outcome": "overloaded"}
    assert metrics.registry.get_sample_value("prfaas_requests_total", labels) == 1
    assert other.registry.get_sample_value("prfaas_requests_total", labels) is None


def test_render_is_prometheus_text(metrics):
    text = metrics.render().decode()
    assert "# TYPE prfaas_requests_total counter" in text
    assert 'prfaas_worker_pages{cluster="local",role="decode",worker="decode-0"} 100.0' in text


def test_links_are_published_per_pair_of_clusters(membership):
    east, west, sender, receiver = ClusterId("east"), ClusterId("west"), WorkerId("p"), WorkerId("d")
    estimate = LinkEstimate(receiver, west, "tcp", 4, goodput=2e9, rtt_s=0.01, throughput=1e9, retransmits=3, falls=1)
    membership.links = {(sender, receiver): LinkView(sender, east, receiver, west, 0.0, estimate)}
    membership.probes_by_outcome = {"passed": 2, "PeerLost": 1}

    value = Metrics(membership, ScriptedRouter(()), lambda *_: 4e9, ScriptedPlanner()).registry.get_sample_value

    labels = {"from_cluster": "east", "to_cluster": "west", "path": "tcp"}
    assert value("prfaas_link_goodput_bytes_per_second", labels) == 2e9
    assert value("prfaas_link_capacity_bytes_per_second", labels) == 4e9
    assert value("prfaas_link_utilisation_ratio", labels) == 0.25
    assert value("prfaas_link_rtt_seconds", labels) == 0.01
    assert value("prfaas_link_connections", labels) == 4
    assert value("prfaas_link_retransmits_total", labels) == 3
    assert value("prfaas_link_falls_total", labels) == 1
    assert value("prfaas_link_pairs_usable", labels) == 1
    assert value("prfaas_link_self_tests_total", {"outcome": "passed"}) == 2
    assert value("prfaas_link_self_tests_total", {"outcome": "PeerLost"}) == 1


def test_what_is_not_known_of_a_link_has_no_sample(membership):
    east, sender, receiver = ClusterId("east"), WorkerId("p"), WorkerId("d")
    membership.links = {(sender, receiver): LinkView(sender, east, receiver, east, 0.0, usable=False)}

    value = Metrics(membership, ScriptedRouter(()), lambda *_: None, ScriptedPlanner()).registry.get_sample_value

    labels = {"from_cluster": "east", "to_cluster": "east", "path": ""}
    assert value("prfaas_link_pairs_usable", labels) == 0
    assert value("prfaas_link_goodput_bytes_per_second", labels) is None
    assert value("prfaas_link_utilisation_ratio", labels) is None


def test_the_plan_is_published_with_its_reasons_and_numbers(membership):
    gain = Gain(2.0, Served(5.0, 0.2, 0.01), Served(4.0, 0.3, 0.02))
    target = FleetTarget(Roles(1, 3), 4321.0, "why", {"theta_decode_rps": 7.5}, True, "disaggregate", gain)
    status = PlannerStatus(
        "dual",
        target,
        changes={("threshold", "link_busy"): 3},
        conversions={(Role.DECODE, Outcome.DONE): 2},
        num_failures=1,
    )

    value = Metrics(membership, ScriptedRouter(()), lambda *_: None, ScriptedPlanner(status)).registry.get_sample_value

    assert value("prfaas_plan_threshold_tokens") == 4321
    assert value("prfaas_plan_bandwidth_abundant") == 1
    assert value("prfaas_plan_workers", {"role": "decode"}) == 3
    assert value("prfaas_plan_number", {"name": "theta_decode_rps"}) == 7.5
    assert value("prfaas_plan_changes_total", {"kind": "threshold", "reason": "link_busy"}) == 3
    assert value("prfaas_role_conversions_total", {"to": "decode", "outcome": "done"}) == 2
    assert value("prfaas_planner_failures_total") == 1
    assert value("prfaas_disaggregation_gain_ratio", {"of": "throughput"}) == 1.25
    assert value("prfaas_disaggregation_gain_ratio", {"of": "tpot"}) == 2.0


def test_before_the_first_look_there_is_no_plan_to_publish(metrics):
    value = metrics.registry.get_sample_value
    assert value("prfaas_plan_threshold_tokens") is None
    assert value("prfaas_planner_failures_total") == 0
