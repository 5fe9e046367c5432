"""The split of workers that a service starts with, where its configuration asks for a search."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from cluster.config import PlannerConfig, PoolConfig, ServiceConfig
from cluster.initial_roles import with_initial_roles
from cluster.planning_policy import PlannerSettings
from core.errors import InvalidConfig

# A prompt of 1,000 tokens takes 1 s; a decode worker makes 10 answers of 100 tokens in 100 steps of 20 ms: 5 req/s.
HARDWARE = {
    "prefill": [{"tokens": 1000, "seconds": 1.0}, {"tokens": 2000, "seconds": 2.0}],
    "decode": {"max_batch_size": 10, "step_s": 0.02},
}
KV = [{"tokens": 1000, "mib": 10}, {"tokens": 2000, "mib": 20}]
HERE = Path()


def service(count: tuple[int, int] = (3, 3), **plan: Any) -> ServiceConfig:
    return ServiceConfig(
        model="m",
        prefill=PoolConfig(count=count[0]),
        decode=PoolConfig(count=count[1]),
        planner=PlannerConfig(initial="search"),
        plan={
            "kv_cache": KV,
            "clusters": {"local": HARDWARE},
            "workload": {"fixed_tokens": 1000, "output_tokens": 100},
            **plan,
        },
    )


def counts(config: ServiceConfig) -> tuple[int, int]:
    return config.prefill.count, config.decode.count


def test_configured_roles_are_left_alone() -> None:
    config = ServiceConfig(model="m", prefill=PoolConfig(count=4), decode=PoolConfig(count=1))

    assert with_initial_roles(config, HERE) == (config, "")


def test_without_an_slo_the_split_of_highest_throughput_is_taken() -> None:
    started, said = with_initial_roles(service(), HERE)

    assert counts(started) == (5, 1)  # 5 prompts/s, 5 answers/s
    assert said == "starting with 5 prefill and 1 decode workers: 5 req/s is the best throughput of any split"


def test_with_an_slo_it_is_distserves_goodput_of_each_instance() -> None:
    # Prompts have 1.5 s for 1 s of work, so a prefill worker takes far fewer than one a second: more of them would be
    # needed than there are. Steps have twice what they take: decode is not what limits.
    started, said = with_initial_roles(service(slo={"ttft_s": 1.5, "tpot_s": 0.04}), HERE)
    assert counts(started) == (5, 1)
    assert "DistServe" in said

    # No prompt waits when it may take a minute, but answers must be alone in their batch.
    lone = {**HARDWARE, "decode": {"max_batch_size": 1, "step_s": 0.02}}
    config = service(slo={"ttft_s": 60.0, "tpot_s": 0.03}, clusters={"local": lone})
    started, _ = with_initial_roles(config, HERE)
    assert started.decode.count > started.prefill.count


def test_a_prfaas_cluster_that_takes_the_long_prompts_frees_local_workers_for_decoding() -> None:
    profile = [{"tokens": 1000, "seconds": 0.1}, {"tokens": 2000, "seconds": 0.2}]
    fast = {"role": "prefill", "num_gpus": 4, "gpus_per_instance": 1, "prefill": profile}
    links = {"wan": {"from_cluster": "east", "to_cluster": "local", "gbps": 100}}
    histogram = {"histogram": {"edges": [100, 300, 1900, 2100], "counts": [50, 1, 50]}, "output_tokens": 100}
    alone, _ = with_initial_roles(service(workload=histogram), HERE)
    helped, said = with_initial_roles(
        service(workload=histogram, clusters={"local": HARDWARE, "east": fast}, links=links), HERE
    )

    assert helped.prefill.count < alone.prefill.count
    assert "throughput" in said


def test_bounds_of_the_planner_hold_at_the_start_too() -> None:
    config = service()
    bounded = ServiceConfig(
        model="m",
        prefill=config.prefill,
        decode=config.decode,
        plan=config.plan,
        planner=PlannerConfig(initial="search", dual=PlannerSettings(max_prefill=4)),
    )

    assert counts(with_initial_roles(bounded, HERE)[0]) == (4, 2)


@pytest.mark.parametrize(
    ("config", "key"),
    [
        (lambda: service((1, 1), workload={"fixed_tokens": 1000}), "plan.workload.output_tokens"),
        (lambda: service((0, 1)), "prefill.count"),
        (lambda: service(clusters={"local": {**HARDWARE, "prefill": []}}), "plan.clusters.local.device"),
    ],
)
def test_what_is_missing_is_named(config: Any, key: str) -> None:
    with pytest.raises(InvalidConfig) as caught:
        with_initial_roles(config(), HERE)
    assert caught.value.key == key


def test_pools_that_differ_cannot_change_places() -> None:
    config = ServiceConfig(
        model="m",
        prefill=PoolConfig(num_gpus=2),
        decode=PoolConfig(num_gpus=1),
        planner=PlannerConfig(initial="search"),
    )
    with pytest.raises(InvalidConfig, match=r"must be that of prefill \(2\)") as caught:
        with_initial_roles(config, HERE)
    assert caught.value.key == "decode.num_gpus"
