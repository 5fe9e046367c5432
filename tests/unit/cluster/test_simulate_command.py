"""``prfaas simulate`` from the outside: tables, JSON, plots, comparisons, and errors that name the place."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from cluster.cli import app

DOCUMENT = """\
model: llama-3.1-8b
clusters:
  here: {device: h100, num_gpus: 3, gpus_per_instance: 1}
  away: {role: prefill, device: h200, num_gpus: 1, gpus_per_instance: 1}
links:
  wan: {from_cluster: away, to_cluster: here, gbps: 10}
workload: {fixed_tokens: 2000, output_tokens: 4, rate_rps: 4}
slo: {ttft_s: 2, tpot_s: 0.05}
"""
TRACE = "".join(
    f'{{"timestamp": {500 * n}, "input_length": 1200, "output_length": 3, "hash_ids": [0, 1, {10 + n}]}}\n'
    for n in range(8)
)


@pytest.fixture
def document(tmp_path: Path) -> Path:
    path = tmp_path / "fleet.yaml"
    path.write_text(DOCUMENT)
    return path


def run(*arguments: object) -> tuple[int, str, str]:
    result = CliRunner().invoke(app, ["simulate", *map(str, arguments)])
    return result.exit_code, result.stdout, result.stderr


def test_drawn_lengths_end_as_json(document: Path) -> None:
    code, out, _ = run(document, "--requests", 12, "--json")

    found = json.loads(out)
    assert (code, found["num_finished"], found["slo_attainment"]) == (0, 12, 1.0)
    assert 0 < found["ttft_s"]["mean"] < 2
    assert {"here", "away"} == set(found["timeline"][0]["clusters"])


def test_a_trace_shares_prefixes(document: Path, tmp_path: Path) -> None:
    trace = tmp_path / "trace.jsonl"
    trace.write_text(TRACE)

    _, out, _ = run(document, "--trace", trace, "--json")

    assert json.loads(out)["hit_rate"] > 0.3  # blocks 0 and 1 of every prompt but the first


def test_policies_are_compared_and_drawn(document: Path, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")

    code, out, err = run(document, "--requests", 3, "--compare", "dual,round_robin", "--plot", tmp_path / "plots")

    assert code == 0
    assert all(name in out for name in ("dual", "round_robin", "goodput"))
    assert {path.name for path in (tmp_path / "plots").iterdir()} == {
        "ttft.png",
        "tpot.png",
        "goodput.png",
        "utilisation.png",
        "threshold-and-roles.png",
    }
    assert err.count("drawn:") == 5


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("--compare", "fastest"), "--compare: must list some of"),
        (("--set", "links.wan.gbps=-1"), "links.wan.gbps"),
        (("--burstiness", "0"), "burstiness: must be above 0"),
        (("--costs", "nowhere.json"), "nowhere.json: holds no costs"),
    ],
)
def test_what_is_wrong_is_named(document: Path, arguments: tuple[str, str], said: str) -> None:
    code, _, err = run(document, "--requests", 3, *arguments)

    assert (code, said in err) == (2, True), err


def test_a_wrong_line_of_a_trace_is_named(document: Path, tmp_path: Path) -> None:
    trace = tmp_path / "trace.jsonl"
    trace.write_text(TRACE + '{"timestamp": 1, "input_length": "many", "output_length": 1}\n')

    code, _, err = run(document, "--trace", trace)

    assert code == 2
    assert f"{trace}:9: input_length" in err


def test_a_service_is_simulated_as_it_is_configured(tmp_path: Path) -> None:
    path = tmp_path / "service.yaml"
    path.write_text(
        "model: some/model\ncluster_id: here\nprefill: {count: 2}\ndecode: {count: 1}\n"
        "engine: {page_size: 32, num_pages: 2000}\nrouter: {policy: least_loaded}\n"
        "plan:\n  model: llama-3.1-8b\n  clusters: {here: {device: h100, gpus_per_instance: 1}}\n"
        "  workload: {fixed_tokens: 500, output_tokens: 3, rate_rps: 2}\n"
    )

    code, out, err = run(path, "--requests", 5, "--json")

    assert code == 0, err
    sample = json.loads(out)["timeline"][0]["clusters"]["here"]
    assert (sample["num_prefill"], sample["num_decode"]) == (2, 1)
