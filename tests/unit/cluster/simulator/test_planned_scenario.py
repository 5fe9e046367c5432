"""The paper's document as a scenario: instances as workers, the best roles, K/V with its recurrent state."""

from __future__ import annotations

from pathlib import Path

import pytest

from cluster.plan_document import PlanOptions, load_plan
from cluster.planned_fleet import demand_of, plan_fleet
from cluster.simulator.planned_scenario import scenario_of
from cluster.simulator.scenario import Scenario

_PAPER = Path(__file__).resolve().parents[4] / "deploy/examples/prfaas-paper.yaml"


@pytest.fixture(scope="module")
def scenario() -> Scenario:
    document = load_plan(_PAPER, PlanOptions(("links.wan.gbps=4",)))
    return scenario_of(document.config, document.catalogue, demand_of(document.config.workload))


def test_instances_become_workers_in_the_best_roles_for_the_link(scenario: Scenario) -> None:
    roles = {str(cluster.cluster_id): (cluster.num_prefill, cluster.num_decode) for cluster in scenario.clusters}

    assert roles == {"prfaas": (4, 0), "local": (5, 3)}
    assert [link.bytes_per_s for link in scenario.links] == [0.5e9]
    assert scenario.home == "local"


def test_policies_count_the_recurrent_state_as_a_part_of_every_token(scenario: Scenario) -> None:
    document = load_plan(_PAPER, PlanOptions())
    fleet = plan_fleet(document.config, document.catalogue, demand_of(document.config.workload)).fleet
    mean = fleet.lengths.mean_tokens
    kind = scenario.home_cluster.kind

    assert kind.kv.state_bytes == pytest.approx(172 * 2**20, rel=0.01)
    assert kind.model.kv_bytes_per_token * mean == pytest.approx(float(fleet.kv_bytes(mean)), rel=1e-3)  # type: ignore[arg-type]
    assert kind.kv.bytes_per_token < kind.model.kv_bytes_per_token
