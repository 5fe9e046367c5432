"""``prfaas plan`` as a user runs it: tables, JSON, pictures, and one line for what is wrong."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from cluster.cli import app

EXAMPLES = Path(__file__).parents[3] / "deploy/examples"
PAPER = str(EXAMPLES / "prfaas-paper.yaml")


def test_json_is_one_object_with_what_was_inferred() -> None:
    result = CliRunner().invoke(app, ["plan", PAPER, "--json"])

    told = json.loads(result.stdout)
    assert result.exit_code == 0
    assert told["num_prefill"] == 3
    assert {entry["key"] for entry in told["inferred"]} >= {"clusters.local.prefill"}


def test_tables_are_for_people() -> None:
    result = CliRunner().invoke(app, ["plan", PAPER, "--set", "links.wan.gbps=4"])

    assert result.exit_code == 0
    assert "the bottleneck is link" in result.stdout
    assert "10 Gbit/s more on wan" in result.stdout


def test_the_shipped_trace_can_be_planned() -> None:
    trace = str(EXAMPLES / "trace.jsonl")
    result = CliRunner().invoke(app, ["plan", PAPER, "--trace", trace, "--slo", "ttft=10,tpot=0.025", "--json"])

    told = json.loads(result.stdout)
    assert told["workload"]["rate_rps"] == told["at_rate"]["rate_rps"]
    assert told["at_rate"]["attainment"] > 0.9


def test_pictures_are_drawn(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    result = CliRunner().invoke(app, ["plan", PAPER, "--json", "--plot", str(tmp_path / "plots")])

    assert result.exit_code == 0
    names = {path.name for path in (tmp_path / "plots").iterdir()}
    assert names == {"throughput-by-roles.png", "throughput-by-threshold.png", "throughput-by-link.png"}


def test_without_matplotlib_the_extra_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    result = CliRunner().invoke(app, ["plan", PAPER, "--plot", str(tmp_path)])

    assert result.exit_code == 2
    assert "pip install 'prfaas[plot]'" in result.stderr


def test_a_wrong_trace_is_named_with_its_line(tmp_path: Path) -> None:
    trace = tmp_path / "t.csv"
    trace.write_text("input_length,output_length\n5,x\n")
    result = CliRunner().invoke(app, ["plan", PAPER, "--trace", str(trace)])

    assert result.exit_code == 2
    assert result.stderr.startswith(f"prfaas: {trace}:2: output_length: must be a number")


def test_help_teaches() -> None:
    result = CliRunner().invoke(app, ["plan", "--help"], env={"COLUMNS": "200"})

    assert "links.wan.gbps=4" in result.stdout
    assert "docs/planning.md" in result.stdout
