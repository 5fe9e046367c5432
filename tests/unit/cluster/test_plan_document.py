"""A file of its own and a service's section, options over both, and errors with file and line."""

from __future__ import annotations

import re
from dataclasses import fields
from pathlib import Path

import pytest

from cluster.config import load_config
from cluster.plan_document import PlanDocument, PlanOptions, check_section, load_plan
from cluster.planning_config import (
    ClusterPlan,
    Histogram,
    LinkPlan,
    LogNormal,
    PlanConfig,
    PrefillPoint,
    SloPlan,
    WorkloadPlan,
)
from cluster.roofline import Efficiency
from core.errors import InvalidConfig

DOCUMENT = """\
model: llama-3.1-8b
clusters:
  here: {device: h100, num_gpus: 8}
workload:
  fixed_tokens: 1000
  output_tokens: 100
"""
SERVICE = """\
model: some/model
cluster_id: here
prefill: {count: 2, num_gpus: 2}
decode: {count: 3, num_gpus: 1}
kv_transfer:
  links:
    - {from_cluster: there, to_cluster: here, capacity_gbps: 40}
    - {from_cluster: "*", to_cluster: here, capacity_gbps: 10}
plan:
  model: llama-3.1-8b
  clusters:
    here: {device: h100}
    there: {role: prefill, device: h200, num_gpus: 4}
  workload: {fixed_tokens: 1000, output_tokens: 100}
"""


def load(tmp_path: Path, text: str, *overrides: str, **options: object) -> PlanDocument:
    path = tmp_path / "plan.yaml"
    path.write_text(text)
    return load_plan(path, PlanOptions(overrides, **options))  # type: ignore[arg-type]


def test_the_manual_names_every_key() -> None:
    manual = (Path(__file__).parents[3] / "docs/planning.md").read_text(encoding="utf-8")
    classes = (PlanConfig, ClusterPlan, LinkPlan, WorkloadPlan, SloPlan, LogNormal, Histogram, Efficiency, PrefillPoint)

    names = {field.name for cls in classes for field in fields(cls)}
    assert {name for name in names if not re.search(rf"[`.]{name}[`.]", manual)} == set()


def test_a_service_says_what_its_section_leaves_out(tmp_path: Path) -> None:
    config = load(tmp_path, SERVICE).config

    assert config.clusters["here"].num_gpus == 2 * 2 + 3
    assert {name: link.gbps for name, link in config.links.items()} == {"there-here": 40}


def test_ranks_of_a_service_are_the_gpus_of_an_instance_if_its_pools_agree(tmp_path: Path) -> None:
    divided = SERVICE.replace("num_gpus: 2}", "tensor_parallel: 2}").replace("num_gpus: 1}", "tensor_parallel: 2}")
    cluster = load(tmp_path, divided).config.clusters["here"]

    assert (cluster.num_gpus, cluster.gpus_per_instance) == (2 * 2 + 3 * 2, 2)
    unequal = SERVICE.replace("num_gpus: 2}", "tensor_parallel: 2}")
    assert load(tmp_path, unequal).config.clusters["here"].gpus_per_instance is None


def test_the_section_has_the_last_word_and_options_have_the_very_last(tmp_path: Path) -> None:
    text = SERVICE.replace("here: {device: h100}", "here: {device: h100, num_gpus: 16}")

    assert load(tmp_path, text).config.clusters["here"].num_gpus == 16
    assert load(tmp_path, text, "clusters.here.num_gpus=32").config.clusters["here"].num_gpus == 32


def test_a_service_with_a_section_is_still_a_service(tmp_path: Path) -> None:
    path = tmp_path / "service.yaml"
    path.write_text(SERVICE)

    check_section(load_config(path))
    path.write_text(SERVICE.replace("device: h200", "devise: h200"))
    with pytest.raises(InvalidConfig, match=r"plan\.clusters\.there\.devise: is not a key, did you mean device"):
        check_section(load_config(path))


def test_lengths_and_slo_by_option(tmp_path: Path) -> None:
    drawn = load(
        tmp_path, DOCUMENT, lengths="log_normal:9.9,1,128,131072", slo="ttft=2,tpot=0.025,attainment=0.99"
    ).config

    assert drawn.workload.length_sources == ("log_normal",)
    assert (drawn.slo.ttft_s, drawn.slo.tpot_s, drawn.slo.attainment) == (2, 0.025, 0.99)
    assert load(tmp_path, DOCUMENT, lengths="fixed:77").config.workload.fixed_tokens == 77


def test_a_trace_by_option_replaces_the_lengths_and_gives_the_output(tmp_path: Path) -> None:
    workload = load(tmp_path, DOCUMENT, trace=tmp_path / "t.csv").config.workload

    assert workload.length_sources == ("trace",)
    assert workload.trace == str(tmp_path / "t.csv")
    assert workload.output_tokens is None


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        (("num_gpus: 8", "num_gpus: 0"), r"plan\.yaml:3: clusters\.here\.num_gpus: must be above 0"),
        (("fixed_tokens: 1000", "fixed_tokens: many"), r"plan\.yaml:5: workload\.fixed_tokens: must be a number"),
        (("device: h100, ", ""), r"plan\.yaml:3: clusters\.here\.device: is needed, or a profile"),
        (("model: llama-3.1-8b\n", ""), r"plan\.yaml: model: is needed"),
        (("workload:", "inferred: {workload.rate_rps: x}\nworkload:"), r"plan\.yaml:4: .*names no key"),
        (
            ("here:", "here: {role: prefill, device: h100, num_gpus: 8}\n  x:"),
            r"plan\.yaml: links: must hold exactly one",
        ),
        (("clusters", "cluster"), "has neither clusters"),
    ],
)
def test_an_error_names_file_line_and_key(tmp_path: Path, change: tuple[str, str], complaint: str) -> None:
    with pytest.raises(InvalidConfig, match=complaint):
        load(tmp_path, DOCUMENT.replace(*change))


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        ({"slo": "tfft=2"}, "--slo: must be like"),
        ({"lengths": "fixed:x"}, "--lengths: must be fixed"),
        ({"lengths": "log_normal:1,2"}, "--lengths: must be fixed"),
        ({"lengths": "fixed:3", "trace": Path("x")}, "must not be given with --trace"),
    ],
)
def test_a_wrong_option_is_named(tmp_path: Path, options: dict[str, object], complaint: str) -> None:
    with pytest.raises(InvalidConfig, match=complaint):
        load(tmp_path, DOCUMENT, **options)


def test_a_wrong_override_is_named_without_a_line(tmp_path: Path) -> None:
    with pytest.raises(InvalidConfig, match=r"^--set clusters\.here\.num_gpus: must be above 0"):
        load(tmp_path, DOCUMENT, "clusters.here.num_gpus=0")


def test_a_catalogue_beside_the_document_is_read(tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_text(
        "devices:\n  h100: {tflops: {bfloat16: 1}, memory_gb: 1, memory_bandwidth_gb_s: 1, interconnect_gb_s: 1}\n"
    )

    document = load(tmp_path, "catalogue: mine.yaml\n" + DOCUMENT)

    assert document.catalogue.device("h100").memory_gb == 1
