"""Predictions begin at the roofline, follow what is measured, admit their error, and survive a restart."""

from __future__ import annotations

import json
import logging
import math
from dataclasses import FrozenInstanceError, replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cluster.cost_model import (
    ASSUMED_LINK_BYTES_PER_S,
    UNKNOWN_COMPUTE,
    ComputeCost,
    CostModel,
    CostView,
    LinearCost,
    Roofline,
    cost_lines,
)
from core.compute import StepSample
from core.link import LinkEstimate
from core.request import ClusterId, WorkerId

# 8e9 weights in bfloat16, 32 layers of 4,096, on a device of 500 TFLOP/s and 3 TB/s
ROOFLINE = Roofline(
    weight_flops=16e9,
    attention_flops=4 * 32 * 4096,
    weight_bytes=16e9,
    kv_bytes_per_token=131072,
    flops_per_s=500e12,
    bytes_per_s=3e12,
)
PAIR = (ClusterId("far"), ClusterId("near"))
TRUE_PREFILL = (0.03, 5e-5, 2e-9)
TRUE_DECODE = (0.007, 3e-5, 6e-8)


def new(path: Path | None = None) -> CostModel:
    model = CostModel(path)
    model.add_profile("8b h100", ROOFLINE)
    model.add_link(PAIR, 1e8)
    return model


def teach(model: CostModel, seed: int = 0, count: int = 200, noise: float = 0.05) -> None:
    rng = np.random.default_rng(seed)

    def off() -> float:
        return float(np.exp(rng.normal(0, noise)) * (20 if rng.random() < 0.05 else 1))

    for _ in range(count):
        n, cached = int(2 ** rng.uniform(4, 15)), int(rng.uniform(0, 20000))
        a, b, c = TRUE_PREFILL
        model.observe_prefill("8b h100", n, cached, (a + b * n + c * n * (cached + n / 2)) * off())
        batch, context = int(2 ** rng.uniform(0, 8)), int(2 ** rng.uniform(4, 18))
        a, b, c = TRUE_DECODE
        model.observe_decode_step("8b h100", batch, context, (a + b * batch + c * context) * off())
        num_bytes = int(2 ** rng.uniform(16, 30))
        model.observe_transfer(PAIR, num_bytes, (0.02 + num_bytes / 5e7) * off())


@pytest.fixture(scope="module")
def taught() -> CostView:
    model = new()
    teach(model)
    return model.view()


def test_costs_begin_at_the_roofline() -> None:
    cost = new().view().profiles["8b h100"]

    weights_s = 16e9 / 3e12
    assert cost.prefill(1000) == pytest.approx(weights_s + 1000 * 16e9 / 500e12 + 500e3 * 4 * 32 * 4096 / 500e12)
    assert cost.decode_step(8, 8000) == pytest.approx(weights_s + 8 * 16e9 / 500e12 + 8000 * 131072 / 3e12)
    assert new().view().transfer(PAIR, 1e8) == pytest.approx(1.001)
    assert cost.prefill_cost.samples == cost.prefill_cost.error.samples == 0


def test_costs_follow_what_is_measured(taught: CostView) -> None:
    cost = taught.profiles["8b h100"]

    assert cost.prefill(8192, 1000) == pytest.approx(0.03 + 5e-5 * 8192 + 2e-9 * 8192 * 5096, rel=0.05)
    assert cost.decode_step(32, 40000) == pytest.approx(0.007 + 3e-5 * 32 + 6e-8 * 40000, rel=0.05)
    assert taught.transfer(PAIR, 5e8) == pytest.approx(10.02, rel=0.05)
    assert cost.prefill_cost.samples == 200


@given(st.integers(0, 10**6), st.integers(0, 10**6), st.integers(0, 10**6), st.integers(0, 10**6))
def test_more_is_never_faster_and_nothing_is_negative(taught: CostView, a: int, b: int, more: int, queue: int) -> None:
    cost = taught.profiles["8b h100"]

    assert 0 <= cost.prefill(a, b) <= cost.prefill(a + more, b)
    assert cost.prefill(a, b) <= cost.prefill(a, b + more)
    assert 0 <= cost.decode_step(a, b) <= cost.decode_step(a + more, b)
    assert cost.decode_step(a, b) <= cost.decode_step(a, b + more)
    assert 0 <= taught.transfer(PAIR, a, queue) <= taught.transfer(PAIR, a + more, queue)
    assert taught.transfer(PAIR, a, queue) <= taught.transfer(PAIR, a, queue + more)


def test_nothing_to_do_takes_no_time(taught: CostView) -> None:
    cost = taught.profiles["8b h100"]

    assert cost.prefill(0, 5000) == cost.decode_step(0, 0) == taught.transfer(PAIR, 0, 10**9) == 0


def test_cached_tokens_cost_less_than_computed_ones(taught: CostView) -> None:
    cost = taught.profiles["8b h100"]

    assert cost.prefill(1000, 7000) < cost.prefill(8000) / 2


# ---- the stated error ----


def test_error_is_of_predictions_made_before() -> None:
    model = new()
    told = model.view().profiles["8b h100"].prefill(1000)

    model.observe_prefill("8b h100", 1000, 0, told / 3)

    error = model.view().profiles["8b h100"].prefill_cost.error
    assert (error.samples, error.p50, error.p90, error.bias) == (1, *(pytest.approx(2.0),) * 3)


def test_error_falls_as_the_model_learns() -> None:
    model = new()
    for seed in range(40):
        teach(model, seed, count=10, noise=0.02)
        model.view()

    error = model.view().profiles["8b h100"].prefill_cost.error
    assert error.samples == 256
    assert error.p50 < 0.05
    assert abs(error.bias) < 0.03


def test_bias_says_which_way() -> None:
    model = new()
    told = model.view().profiles["8b h100"].decode_step(4, 4000)
    for share in (2.0, 2.0, 4.0):
        model.observe_decode_step("8b h100", 4, 4000, told * share)

    assert model.view().profiles["8b h100"].decode_cost.error.bias == pytest.approx(-0.5)


@pytest.mark.parametrize("seconds", [0.0, -1.0, float("inf"), float("nan")])
def test_what_nobody_can_measure_tells_nothing(seconds: float) -> None:
    model = new()
    before = model.view()

    model.observe_prefill("8b h100", 100, 0, seconds)
    model.observe_prefill("8b h100", 0, 100, 1.0)
    model.observe_decode_step("8b h100", 0, 100, 1.0)
    model.observe_transfer(PAIR, 0, 1.0)

    assert model.view() is before


# ---- views ----


def test_view_is_frozen_and_stays_what_it_was() -> None:
    model = new()
    view = model.view()
    before = view.profiles["8b h100"].prefill(1000)

    teach(model, count=20)

    assert view.profiles["8b h100"].prefill(1000) == before != model.view().profiles["8b h100"].prefill(1000)
    with pytest.raises(TypeError):
        view.profiles["other"] = view.profiles["8b h100"]  # type: ignore[index]
    with pytest.raises(FrozenInstanceError):
        view.profiles["8b h100"].prefill_cost.samples = 5  # type: ignore[misc]


@settings(deadline=None, max_examples=5)
@given(st.integers(0, 1000))
def test_equal_measurements_give_equal_views(seed: int) -> None:
    one, other = new(), new()
    teach(one, seed, count=30)
    teach(other, seed, count=30)

    assert one.view() == other.view()


def test_profiles_do_not_mix() -> None:
    model = new()
    model.add_profile("8b h20", ROOFLINE)
    before = model.view().profiles["8b h20"]

    teach(model, count=20)

    assert model.view().profiles["8b h20"] == before


def test_profile_named_again_keeps_its_samples(taught: CostView) -> None:
    model = new()
    teach(model)

    model.add_profile("8b h100", ROOFLINE)
    model.add_link(PAIR, 1e8)

    assert model.view() == taught


# ---- transfers ----


def test_link_that_is_known_is_believed_before_the_pair(taught: CostView) -> None:
    link = LinkEstimate(WorkerId("d0"), PAIR[1], goodput=1e6, rtt_s=0.5, bytes_queued=10**6)

    assert taught.transfer(PAIR, 10**6, 10**6, link) == pytest.approx(3.5)


def test_link_that_nothing_has_told_of_leaves_it_to_the_pair(taught: CostView) -> None:
    assert taught.transfer(PAIR, 1e6, 0, LinkEstimate(WorkerId("d0"), PAIR[1])) == taught.transfer(PAIR, 1e6)


def test_pair_that_was_never_named_is_assumed(taught: CostView) -> None:
    pair = (ClusterId("x"), ClusterId("y"))

    assert taught.transfer(pair, ASSUMED_LINK_BYTES_PER_S) == pytest.approx(1.001)


# ---- the file ----


def test_restart_forgets_nothing(tmp_path: Path) -> None:
    path = tmp_path / "state" / "costs.json"
    model = new(path)
    teach(model)
    view = model.view()
    model.save()

    again = new(path)

    assert again.view().transfers == view.transfers
    assert again.view() == view
    for each in (model, again):
        teach(each, seed=1, count=20)
    assert model.view() == again.view()
    assert [p.name for p in path.parent.iterdir()] == ["costs.json"]


def test_what_is_not_named_this_time_is_kept_for_the_next(tmp_path: Path) -> None:
    path = tmp_path / "costs.json"
    model = new(path)
    teach(model, count=20)
    view = model.view()
    model.save()
    CostModel(path).save()

    assert new(path).view() == view


def test_no_file_is_no_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    assert new(tmp_path / "none.json").view() == new().view()
    assert caplog.records == []


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{",
        "[]",
        "\x00",
        "[" * 100000,
        json.dumps({"format": "prfaas cost model", "version": 99, "lines": {}}),
        json.dumps({"format": "another", "version": 1, "lines": {}}),
        json.dumps({"format": "prfaas cost model", "version": 1, "lines": []}),
    ],
)
def test_corrupt_file_is_a_warning_and_the_roofline(
    text: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "costs.json"
    path.write_text(text)

    with caplog.at_level(logging.WARNING):
        view = new(path).view()

    assert view == new().view()
    assert str(path) in caplog.text


@pytest.mark.parametrize(
    "line",
    [
        None,
        5,
        {},
        {"samples": [[0]], "errors": []},
        {"samples": [[0, 1.0, 1.0]], "errors": []},
        {"samples": [[0, -1.0, 1.0, 1.0, 1.0]], "errors": []},
        {"samples": [[0, float("nan"), 1.0, 1.0, 1.0]], "errors": []},
        {"samples": [[float("inf"), 1.0, 1.0, 1.0, 1.0]], "errors": []},
        {"samples": [[0, 1.0, 1.0, -1.0, 1.0]], "errors": []},
        {"samples": [[0, 1.0, 1.0, "x", 1.0]], "errors": []},
        {"samples": [], "errors": [float("inf")]},
    ],
)
def test_corrupt_line_costs_that_line_only(line: object, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = tmp_path / "costs.json"
    model = new(path)
    teach(model, count=20)
    taught = model.view()
    model.save()
    data = json.loads(path.read_text())
    data["lines"]["prefill 8b h100"] = line
    path.write_text(json.dumps(data))

    view = new(path).view()

    assert view.profiles["8b h100"].prefill_cost == new().view().profiles["8b h100"].prefill_cost
    assert view.profiles["8b h100"].decode_cost == taught.profiles["8b h100"].decode_cost
    assert ("prefill 8b h100" in caplog.text) == (line is not None)


def test_failed_save_leaves_the_old_file_and_no_litter(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "costs.json"
    model = new(path)
    model.save()
    before = path.read_text()
    teach(model, count=5)
    monkeypatch.setattr("os.replace", lambda *_: (_ for _ in ()).throw(OSError("disk full")))

    with pytest.raises(OSError, match="disk full"):
        model.save()

    assert path.read_text() == before
    assert [p.name for p in tmp_path.iterdir()] == ["costs.json"]


def test_a_prompt_of_several_steps_pays_the_constant_of_each() -> None:
    cost = ComputeCost(LinearCost((0.03, 1e-3, 0.0)), LinearCost((0.0, 0.0, 0.0)), step_tokens=100)
    assert [cost.prefill(tokens) for tokens in (1, 100, 101, 250)] == pytest.approx([0.031, 0.13, 0.161, 0.34])
    assert replace(cost, step_tokens=math.inf).prefill(250) == pytest.approx(0.28)
    assert cost.prefill(0) == 0


def test_steps_are_learnt_from_by_what_they_held() -> None:
    model = new()
    for tokens in (100, 200, 400, 800) * 4:
        pairs = 3 * tokens * tokens / 6  # of three prompts: no single one of as many tokens has so few
        model.observe_step("8b h100", StepSample(tokens, pairs, 0, 0, 0.03 + 5e-5 * tokens + 2e-9 * pairs))
        model.observe_step("8b h100", StepSample(0, 0.0, tokens // 100, tokens, 0.007 + 3e-5 * tokens // 100))
    model.observe_step("8b h100", StepSample(100, 5e3, 1, 10, 99.0))
    model.observe_step("8b h100", StepSample(0, 0.0, 0, 0, 99.0))
    cost = model.view().profiles["8b h100"]
    assert (cost.prefill_cost.samples, cost.decode_cost.samples) == (16, 16)
    assert cost.prefill(600) == pytest.approx(0.03 + 5e-5 * 600, rel=0.02)


def test_of_a_profile_that_was_never_named_something_is_assumed() -> None:
    assert new().view().compute("8b h100").prefill_cost.samples == 0
    assert new().view().compute("another") is UNKNOWN_COMPUTE
    assert UNKNOWN_COMPUTE.prefill(8192) == pytest.approx(0.28, rel=0.05), "about what an 8B model takes on an H100"


def test_what_is_to_be_saved_is_of_the_moment_in_which_it_was_asked_for(tmp_path: Path) -> None:
    model = new(tmp_path / "costs.json")
    saving = model.saving()
    teach(model)
    saving()
    assert new(tmp_path / "costs.json").view().profiles["8b h100"].prefill_cost.samples == 0


def test_every_line_of_a_view_has_a_name() -> None:
    lines = list(cost_lines(new().view()))
    assert [(line.work, line.of) for line in lines] == [
        ("prefill", "8b h100"),
        ("decode", "8b h100"),
        ("transfer", "far to near"),
    ]
