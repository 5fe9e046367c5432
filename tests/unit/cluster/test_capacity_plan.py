"""The paper's case study as it ships, alternatives by hand, and what a change of hardware must do."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from cluster.capacity_plan import (
    CapacityPlan,
    make_plan,
    throughput_by_link,
    throughput_by_roles,
    throughput_by_threshold,
)
from cluster.catalogue import load_catalogue
from cluster.plan_document import PlanOptions, load_plan, still_inferred
from cluster.plan_report import plan_as_dict, plan_tables
from cluster.planned_fleet import demand_of
from cluster.planning_config import read_plan_config
from core.errors import InvalidConfig

PAPER = Path(__file__).parents[3] / "deploy/examples/prfaas-paper.yaml"


def planned(*overrides: str) -> CapacityPlan:
    document = load_plan(PAPER, PlanOptions(overrides))
    return make_plan(document.config, document.catalogue, demand_of(document.config.workload))


def made(document: Mapping[str, Any]) -> CapacityPlan:
    config = read_plan_config(document)
    return make_plan(config, load_catalogue(), demand_of(config.workload))


@pytest.fixture(scope="module")
def paper() -> CapacityPlan:
    return planned()


# PrfaaS table 6 and section 4; egress is printed as "about 13", so its half unit is more than 1.5 %
TABLE_6 = {
    "threshold_tokens": 19_400,
    "num_prfaas": 4,
    "num_prefill": 3,
    "num_decode": 5,
    "offload_fraction": 0.496,
    "l_long_tokens": 44 * 1024,
    "theta_prfaas_rps": 1.61,
    "theta_prefill_rps": 1.64,
    "theta_decode_rps": 3.91,
    "throughput_rps": 3.24,
    "ratio_vs_homogeneous": 1.54,
    "ratio_naive_vs_homogeneous": 1.16,
    "ttft_mean_s": 2.22,
    "ttft_p90_s": 3.51,
}


def test_the_shipped_case_study_gives_table_6(paper: CapacityPlan) -> None:
    told = plan_as_dict(paper, {})

    assert {key: told[key] for key in TABLE_6} == pytest.approx(TABLE_6, rel=0.015)
    assert told["egress_gbps"] == pytest.approx(13, abs=0.5)


def test_what_is_inferred_is_marked_until_it_is_set() -> None:
    document = load_plan(PAPER, PlanOptions(("clusters.local.decode.max_batch_size=30",)))

    assert set(document.config.inferred) - set(still_inferred(document)) == {"clusters.local.decode.max_batch_size"}
    assert "clusters.local.prefill" in still_inferred(document)


def test_a_narrow_link_is_planned_anew(paper: CapacityPlan) -> None:
    narrow = planned("links.wan.gbps=4")

    assert narrow.point.threshold_tokens > 2 * paper.point.threshold_tokens
    assert narrow.point.num_prefill > paper.point.num_prefill
    assert narrow.point.bottleneck == "link"
    assert narrow.links[0].utilisation == pytest.approx(1)
    wider = next(change for change in narrow.changes if "wan" in change.what)
    assert wider.throughput_rps == pytest.approx(paper.point.throughput_rps)
    assert any("would do more as serving GPUs" in note for note in plan_as_dict(narrow, {})["notes"])


def test_colocated_by_hand() -> None:
    """One instance, prefill 1 s, 10 tokens of 0.1 s each in batches up to 5: 1 / (1 + 10 * 0.1 / 5) = 0.833 req/s, when
    prefill has 0.833 of the time and a token takes 0.6 s. Within 0.2 s: prefill has half of it, 0.5 req/s."""
    document = {
        "kv_cache": [{"tokens": 100, "mib": 1}],
        "clusters": {
            "a": {
                "num_gpus": 2,
                "gpus_per_instance": 1,
                "prefill": [{"tokens": 100, "seconds": 1}],
                "decode": {"max_batch_size": 5, "step_s": 0.1},
            }
        },
        "workload": {"fixed_tokens": 100, "output_tokens": 10},
        "slo": {"tpot_s": 0.2},
    }

    colocated = made(document).colocated

    assert colocated.throughput_rps == pytest.approx(2 / 1.2)
    assert colocated.tpot_s == pytest.approx(0.6)
    assert colocated.goodput_rps == pytest.approx(2 * 0.5, rel=0.03)


def test_cost_by_hand(paper: CapacityPlan) -> None:
    priced = planned("clusters.prfaas.price_per_gpu_hour=4", "clusters.local.price_per_gpu_hour=2")

    assert paper.cost is None
    assert priced.cost is not None
    assert priced.cost.per_hour == 32 * 4 + 64 * 2
    per_output = 256 / (priced.point.throughput_rps * 3600 * 1024) * 1e6
    assert priced.cost.per_million_output_tokens == pytest.approx(per_output)


def test_an_slo_that_bounds_ttft_lowers_the_goodput_and_tells_latencies_there() -> None:
    bounded = planned("slo.ttft_s=8")

    assert bounded.goodput_rps < bounded.point.throughput_rps
    assert bounded.rate_rps == bounded.goodput_rps
    assert bounded.attainment == pytest.approx(0.9, abs=0.001)


CATALOGUED = {
    "model": "llama-3.1-8b",
    "clusters": {"a": {"device": "h100", "num_gpus": 8}},
    "workload": {"log_normal": {"mu": 7.0, "sigma": 1.0}, "output_tokens": 200},
    "slo": {"ttft_s": 1.0, "tpot_s": 0.03},
}


def test_devices_and_models_from_the_catalogue_need_no_profile() -> None:
    plan = made(CATALOGUED)
    told = plan_as_dict(plan, {})

    assert told["threshold_tokens"] is None
    assert told["naive"] is None
    assert told["ratio_vs_homogeneous"] == pytest.approx(1)
    assert plan.latency.step_s <= 0.03
    assert plan.point.num_prefill >= 1
    assert plan.point.num_decode >= 1


def test_parallelism_grows_where_one_gpu_does_not_hold_the_model() -> None:
    plan = made({**CATALOGUED, "model": "llama-3.1-70b"})

    assert plan.planned.serving.gpus_per_decode > 1


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"model": "llama-3.1-70b", "clusters": {"a": {"device": "h100", "num_gpus": 1}}}, "must hold the weights"),
        ({"clusters": {"a": {"device": "h100", "num_gpus": 1}}}, "must be at least 2"),
        ({"slo": {"tpot_s": 1e-5}}, "slo.tpot_s: is met by no batch"),
        ({"clusters": {"a": {"device": "x", "num_gpus": 8}}}, "clusters.a.device: must be in the catalogue"),
        ({"workload": {"fixed_tokens": 5}}, "workload.output_tokens: is required"),
        ({"workload": {"output_tokens": 5}}, "must give one of"),
        ({"workload": {"fixed_tokens": 5, "trace": "x", "output_tokens": 5}}, "must give one of"),
        (
            {"workload": {"log_normal": {"mu": 1, "sigma": 0}, "output_tokens": 5}},
            "workload.log_normal.sigma: must be above 0",
        ),
    ],
)
def test_what_cannot_be_planned_says_which_key(changes: dict[str, Any], complaint: str) -> None:
    with pytest.raises(InvalidConfig, match=complaint):
        made({**CATALOGUED, **changes})


def test_curves_peak_at_the_plan(paper: CapacityPlan) -> None:
    most = paper.point.throughput_rps
    by_threshold, by_roles, by_link = (
        throughput_by_threshold(paper),
        throughput_by_roles(paper),
        throughput_by_link(paper),
    )

    assert max(rate for _, rate in by_threshold) == pytest.approx(most, rel=0.02)
    assert max(by_roles, key=lambda pair: pair[1]) == (3, pytest.approx(most))
    rates = [point.throughput_rps for _, point in by_link]
    assert rates == pytest.approx(sorted(rates))
    assert rates[-1] == pytest.approx(most)


def test_tables_hold_the_answer(paper: CapacityPlan) -> None:
    titles = [table.title for table in plan_tables(paper, {"a.b": "why"})]

    assert titles == ["Plan", "Against the same GPUs used otherwise", "What more would buy", "To know"]
