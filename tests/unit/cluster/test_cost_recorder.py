"""Measurements become predictions: what workers report is in the costs a second later, and after a restart."""

from __future__ import annotations

import asyncio
import logging
from pathlib import Path

import pytest

from cluster import cost_recorder
from cluster.catalogue import load_catalogue
from cluster.cost_model import UNKNOWN_COMPUTE, CostView
from cluster.cost_recorder import CostRecorder
from cluster.worker_client import WorkerDescription
from core.compute import UNKNOWN_PROFILE, ComputeProfile, StepSample
from core.link import ProbeReport
from core.request import ClusterId, EngineId, WorkerId
from tests.unit.cluster.gateway_and_fakes import until
from tests.unit.cluster.routing_views import MODEL

CPU = ComputeProfile("cpu Xeon", 2, weight_bytes=10**8, weight_flops=1e8, attention_flops=1e4, step_tokens=512)
CATALOGUE = load_catalogue()


def described(name: str = "p0", cluster: str = "home", compute: ComputeProfile = CPU) -> WorkerDescription:
    return WorkerDescription(
        WorkerId(name), EngineId(name), ClusterId(cluster), f"{name}:1", MODEL, "tcp", 100, compute=compute
    )


def recorder(path: Path | None = None) -> CostRecorder:
    return CostRecorder(CATALOGUE, lambda a, b: 1e6 if (a, b) == ("far", "home") else None, path)


class Reader:
    """Keeps what it is told."""

    def __init__(self) -> None:
        self.told: list[CostView] = []

    def note_costs(self, costs: CostView) -> None:
        self.told.append(costs)


def teach(one: CostRecorder, worker: WorkerDescription) -> None:
    for tokens in (64, 128, 256, 512) * 4:
        one.steps_measured(worker, [StepSample(tokens, tokens * tokens / 2, 0, 0, 0.05 + tokens * 1e-3)])
        one.steps_measured(worker, [StepSample(0, 0.0, tokens // 64, tokens, 0.02 + tokens // 64 * 1e-3)])


def test_a_worker_has_costs_as_soon_as_it_joins() -> None:
    one = recorder()
    one.worker_joined(described())
    cost = one.costs().compute(described().profile)
    assert cost.prefill_cost.samples == 0
    assert cost.step_tokens == 512
    assert cost.prefill(512) == pytest.approx(1e8 / 1e10 + 512 * 1e8 / (2 * 1e11) + 512 * 256 * 1e4 / (2 * 1e11))


def test_of_a_worker_that_says_nothing_of_itself_nothing_is_learnt() -> None:
    one, silent = recorder(), described(compute=UNKNOWN_PROFILE)
    one.worker_joined(silent)
    teach(one, silent)
    assert one.costs().compute(silent.profile) is UNKNOWN_COMPUTE


def test_steps_of_one_kind_are_learnt_from_and_mixed_ones_are_not() -> None:
    one, worker = recorder(), described()
    one.worker_joined(worker)
    teach(one, worker)
    one.steps_measured(worker, [StepSample(512, 1e5, 3, 900, 99.0)])
    cost = one.costs().compute(worker.profile)
    assert (cost.prefill_cost.samples, cost.decode_cost.samples) == (16, 16)
    assert cost.prefill(200) == pytest.approx(0.25, rel=0.02)
    assert cost.prefill(1024) == pytest.approx(2 * 0.562, rel=0.05), "two steps"
    assert cost.decode_step(4, 256) == pytest.approx(0.024, rel=0.05)


def test_every_two_clusters_get_a_link_with_its_configured_capacity() -> None:
    one = recorder()
    one.worker_joined(described("p0", "home"))
    one.worker_joined(described("p1", "far"))
    transfers = one.costs().transfers
    assert set(transfers) == {(a, b) for a in ("home", "far") for b in ("home", "far")}
    assert one.costs().transfer((ClusterId("far"), ClusterId("home")), 1e6) == pytest.approx(1.0, rel=0.01)


def test_a_self_test_that_passed_tells_how_fast_a_link_is() -> None:
    one, sender, receiver = recorder(), described("p1", "far"), described("d0", "home")
    one.worker_joined(sender)
    one.worker_joined(receiver)
    for _ in range(3):
        one.link_tested(sender, receiver, ProbeReport("tcp", 2_000_000, True, 2_000_000, 4.0))
    one.link_tested(sender, receiver, ProbeReport("tcp", error="PeerLost"))
    pair = (ClusterId("far"), ClusterId("home"))
    assert one.costs().transfers[pair].samples == 3
    assert one.costs().transfer(pair, 2e6) == pytest.approx(4.0, rel=0.05)


async def test_a_reader_is_told_at_once_and_again_when_something_was_learnt(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cost_recorder, "TELL_EVERY_S", 0.01)
    one, reader, worker = recorder(), Reader(), described()
    one.start(reader)
    assert len(reader.told) == 1
    one.worker_joined(worker)
    assert worker.profile in reader.told[-1].profiles, "a route may be asked for in this moment"
    teach(one, worker)
    await until(lambda: reader.told[-1].profiles[worker.profile].prefill_cost.samples == 16)
    await one.close()
    num_told = len(reader.told)
    await asyncio.sleep(0.03)
    assert len(reader.told) == num_told


async def test_a_restart_does_not_forget(tmp_path: Path) -> None:
    path, worker = tmp_path / "made" / "costs.json", described()
    one = recorder(path)
    one.worker_joined(worker)
    teach(one, worker)
    await one.close()

    again = recorder(path)
    again.worker_joined(worker)

    assert again.costs().compute(worker.profile) == one.costs().compute(worker.profile)


async def test_costs_are_saved_now_and_then_and_only_if_something_was_learnt(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cost_recorder, "TELL_EVERY_S", 0.01)
    monkeypatch.setattr(cost_recorder, "SAVE_EVERY_S", 0.02)
    path, worker = tmp_path / "costs.json", described()
    one = recorder(path)
    one.start(Reader())
    one.worker_joined(worker)
    await until(path.exists)
    before = path.stat().st_mtime_ns
    await one.close()
    assert path.stat().st_mtime_ns == before


async def test_a_file_that_cannot_be_written_costs_a_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "file").write_text("")
    one = recorder(tmp_path / "file" / "costs.json")
    one.worker_joined(described())
    with caplog.at_level(logging.WARNING):
        await one.close()
    assert "costs are not kept" in caplog.text
