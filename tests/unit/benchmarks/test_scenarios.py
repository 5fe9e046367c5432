"""The story of two datacenters: what can be asked of its parts without telling it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from matplotlib.image import imread

from benchmarks import scenarios
from benchmarks.datacenters import EAST, WEST, TwoDatacenters
from benchmarks.fleet_recorder import FleetRecorder, Mark, _sample, draw, received_bytes, write_json
from benchmarks.network_lab import NetworkLab, NetworkPath
from benchmarks.steady_load import Mix, Request, SteadyLoad
from cluster.config import load_config
from core.request import Role
from protos import serving_pb2 as pb


def test_where_there_can_be_no_namespaces_it_says_so_and_passes(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.setattr(scenarios, "why_unavailable", lambda path: "network namespaces need root")

    assert scenarios.main(["--json", str(tmp_path / "j"), "--plot", str(tmp_path / "p")]) == 0

    assert "skipped: no two datacenters can be had here: network namespaces need root" in capsys.readouterr().out
    assert list(tmp_path.iterdir()) == []


def test_both_configurations_are_valid_and_one_joins_the_other(tmp_path: Path) -> None:
    lab = NetworkLab(NetworkPath(rate_gbps=1.0, switched=True))
    fleet = TwoDatacenters(lab, tmp_path, 1.0, {"planner": scenarios.PLANNER})

    east, west = (load_config(path) for path in fleet.write_configurations())

    assert (east.cluster_id, east.prefill.count, east.decode.count) == (EAST, 2, 1)
    assert (west.cluster_id, west.join) == (WEST, (f"{lab.left.address}:{east.registry.port}",))
    assert west.worker_id(Role.PREFILL, 0) == "west/prefill-0"
    assert east.kv_transfer.links == west.kv_transfer.links


def test_a_failed_check_is_counted_and_said(capsys: pytest.CaptureFixture[str]) -> None:
    checks = scenarios.Checks(lambda: 3.0)

    checks(True, "one holds")
    checks(False, "another does not", "seen otherwise")

    assert (len(checks.results), checks.num_failed) == (2, 1)
    assert "FAILED another does not (seen otherwise)" in capsys.readouterr().out


def test_lengths_cover_the_range_evenly_over_their_logarithm() -> None:
    load = SteadyLoad("nowhere", Mix(1.0, (10, 1000), 8), vocab_size=100)

    lengths = [load.next_length(number) for number in range(1, 41)]

    assert all(10 <= length <= 1000 for length in lengths)
    assert abs(sum(length < 100 for length in lengths) - 20) <= 1
    assert max(lengths) > 900
    assert min(lengths) < 12


def info(threshold: float | None) -> pb.GetClusterInfoResponse:
    """East with two workers that prefill and one that decodes, west with one whose link works."""
    plan = pb.PlanInfo(threshold_tokens=threshold, history=[pb.PlanSample(link_rate=6e7, link_utilisation=0.5)])
    workers = [
        pb.WorkerInfo(cluster_id=EAST, role="prefill", num_running=1),
        pb.WorkerInfo(cluster_id=EAST, role="prefill"),
        pb.WorkerInfo(cluster_id=EAST, role="decode", num_running=3),
        pb.WorkerInfo(cluster_id=WEST, role="prefill"),
    ]
    links = [pb.LinkInfo(from_cluster=WEST, state="usable"), pb.LinkInfo(from_cluster=EAST, state="usable")]
    return pb.GetClusterInfoResponse(workers=workers, links=links, plan=plan)


def test_a_sample_says_what_the_service_and_what_the_kernel_saw() -> None:
    sample = _sample(info(300.0), at=2.0, received=1e7, shaped=6.25e7, num_under_way=4)

    assert (sample.num_prefill, sample.num_decode, sample.num_west, sample.num_west_usable) == (2, 1, 1, 1)
    assert (sample.threshold_tokens, sample.link_believed, sample.link_utilisation) == (300.0, 6e7, 0.5)
    assert (sample.num_running, sample.num_under_way) == (4, 4)
    assert _sample(info(None), 2.0, 0.0, 0.0, 0).threshold_tokens is None


def test_received_bytes_are_those_of_the_interface() -> None:
    assert received_bytes("lo") >= 0
    with pytest.raises(ValueError, match="nosuch"):
        received_bytes("nosuch")


def test_the_series_and_the_picture_are_written(tmp_path: Path) -> None:
    recorder = FleetRecorder("nowhere", "lo", lambda: 0.0, lambda: 0, lambda: 6e7)
    recorder.samples += [_sample(info(t), at, 1e7, 6e7, 2) for at, t in ((0.2, None), (0.4, 300.0), (0.6, 400.0))]
    recorder.marks.append(Mark(0.3, "cut"))
    asked = [Request(0, 0.1, (1,) * 50, 8, 0.5, (1,) * 8, prefill_worker="prefill-0", num_attempts=1)]
    asked.append(Request(1, 0.2, (1,) * 900, 8, 0.6, (1,) * 8, prefill_worker="west/prefill-0", num_attempts=2))
    asked.append(Request(2, 0.3, (1,) * 90, 8, 0.6, error="UNAVAILABLE: gone"))

    write_json(tmp_path / "a/series.json", recorder, asked, {"commit": "c"})
    draw(tmp_path / "b/series.png", recorder, asked, 1024)

    written = json.loads((tmp_path / "a/series.json").read_text())
    assert [request["prompt_tokens"] for request in written["requests"]] == [50, 900, 90]
    assert written["samples"][0]["threshold_tokens"] is None
    assert written["marks"] == [{"at": 0.3, "label": "cut"}]
    assert imread(tmp_path / "b/series.png").shape[0] > 500
