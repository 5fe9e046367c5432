"""Short steps with prompts give the tokens of the plain engine when they are filled up to the size of a graph.

Graphs are captured on a GPU only (tests/gpu); rows, attention and reports are the same here.
"""

from __future__ import annotations

import logging
from array import array
from collections.abc import Callable, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from core.clock import VirtualClock
from core.request import SamplingParams, SequenceId, SequenceSpec
from engine import prompt_graphs
from engine.config import EngineConfig
from engine.engine import Engine
from engine.experts import ExpertsChoice
from engine.model_runner import ModelRunner
from engine.prompt_graphs import PromptGraphs, token_buckets
from engine.step_plan import StepItem, StepPlan
from tests.tiny_engine import NUM_NEW, draw_prompts, greedy_tokens, run
from tests.tiny_models import save_tiny_model

PROMPT_LENGTHS = (1, 5, 16, 17, 40)


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_model("llama", tmp_path_factory.mktemp("models") / "llama")


@pytest.fixture(scope="module")
def prompts() -> list[list[int]]:
    return draw_prompts(7, PROMPT_LENGTHS)


@pytest.fixture(scope="module")
def expected(llama: Path, prompts: list[list[int]]) -> list[list[int]]:
    return greedy_tokens(llama, prompts)


def load(folder: Path, **settings: Any) -> Engine:
    defaults: dict[str, Any] = {
        "device": "cpu",
        "threads": 1,
        "dtype": "float32",
        "page_size": 4,
        "num_pages": 64,
        "max_batch_size": 5,
        "max_batch_tokens": 24,
        "decode_graphs": "always",
    }
    return Engine.load_model(EngineConfig(**{**defaults, **settings}), str(folder), VirtualClock())


@pytest.fixture
def sizes_run(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, bool]]:
    """(tokens, whether a size held them) of each step that came to a ``PromptGraphs``."""
    heard: list[tuple[int, bool]] = []
    plain = PromptGraphs.run

    def run(self: PromptGraphs, packed: Any, *others: Any) -> torch.Tensor | None:
        logits = plain(self, packed, *others)
        heard.append((len(packed.token_ids), logits is not None))
        return logits

    monkeypatch.setattr(PromptGraphs, "run", run)
    return heard


@given(st.integers(1, 10_000))
def test_sizes_ascend_to_the_largest_and_waste_little(max_tokens: int) -> None:
    sizes = token_buckets(max_tokens)

    assert sizes[-1] == max_tokens
    assert list(sizes) == sorted(set(sizes))
    for smaller, larger in pairwise(sizes):
        assert larger - smaller <= max(32, larger // 8)


def test_steps_within_the_largest_size_run_in_graphs_and_others_do_not(
    llama: Path, prompts: list[list[int]], expected: list[list[int]], sizes_run: list[tuple[int, bool]]
) -> None:
    engine = load(llama, prompt_graph_tokens=20)

    assert "prompt graphs up to 20 tokens" in engine.modes().forward
    sizes_run.clear()
    assert run(engine, prompts) == expected
    assert run(engine, prompts, "from the prefix cache") == expected
    assert {held for tokens, held in sizes_run if tokens <= 20} == {True}
    assert {held for tokens, held in sizes_run if tokens > 20} == {False}


def test_none_are_asked_for(llama: Path, prompts: list[list[int]], expected: list[list[int]]) -> None:
    engine = load(llama, prompt_graph_tokens=0)

    assert engine.forward.prompt_graph_tokens == 0
    assert "prompt graphs" not in engine.modes().forward + engine.modes().forward_reason
    assert run(engine, prompts) == expected


def test_what_rows_behind_the_last_hold_reaches_nobody(
    llama: Path, prompts: list[list[int]], expected: list[list[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = prompt_graphs._Rows.output

    def poisoned(self: Any, query: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        return plain(self, query, value).fill_(float("nan"))

    engine = load(llama)
    assert engine.forward.prompt_graph_tokens == 24
    monkeypatch.setattr(prompt_graphs._Rows, "output", poisoned)

    assert run(engine, prompts) == expected


class _Listener:
    """Hears which layers of each step are stored."""

    def __init__(self) -> None:
        self.heard: list[int] = []

    def sequence_started(self, spec: SequenceSpec, num_cached_tokens: int, page_ids: Sequence[int]) -> None:
        pass

    def step_planned(self, plan: StepPlan) -> Callable[[int], None]:
        return self.heard.append


def test_layers_are_reported_one_by_one_when_their_pages_are_written(llama: Path, prompts: list[list[int]]) -> None:
    engine = load(llama)
    engine.listener = listener = _Listener()
    run(engine, [prompts[1]])

    assert listener.heard == [0, 1] * NUM_NEW


@pytest.mark.parametrize("num_outer", [10, 40], ids=["short", "long"])
def test_of_two_steps_of_which_one_runs_between_layers_of_the_other_one_runs_in_graphs(
    num_outer: int, llama: Path, sizes_run: list[tuple[int, bool]]
) -> None:
    engine = load(llama, prefill_order="slack")
    runner: ModelRunner = engine._runner
    outer, inner = _plan(num_outer, tuple(range(1, 11))), _plan(6, (12, 13))
    alone = [runner.run(plan).clone() for plan in (outer, inner)]
    inside: list[torch.Tensor] = []
    sizes_run.clear()

    def between(layer: int) -> None:
        if layer == 0:
            inside.append(runner.run(inner, beside=True).clone())

    logits = runner.run(outer, between).clone()

    torch.testing.assert_close(logits, alone[0])
    torch.testing.assert_close(inside[0], alone[1])
    assert dict(sizes_run) == {num_outer: num_outer == 10, 6: num_outer == 40}


def _plan(num_tokens: int, page_ids: tuple[int, ...]) -> StepPlan:
    tokens = tuple(range(3, 3 + num_tokens))
    item = StepItem(SequenceId("s"), tokens, 0, page_ids, True, SamplingParams(), array("q", tokens), num_tokens)
    return StepPlan((item,))


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"colocated_mode": "partitioned"}, "multiprocessors for which it was captured"),
        ({"decode_graphs": "never", "compile": "never"}, "speed_up was not asked for"),
    ],
    ids=["partitioned", "without decode graphs"],
)
def test_where_there_are_none_the_reason_is_shown(
    settings: dict[str, Any], reason: str, llama: Path, prompts: list[list[int]], expected: list[list[int]]
) -> None:
    engine = load(llama, **settings)

    assert engine.forward.prompt_graph_tokens == 0
    assert reason in engine.modes().forward_reason
    assert run(engine, prompts) == expected


def test_experts_that_ask_the_host_for_more_tokens_bound_the_sizes(
    tmp_path: Path, prompts: list[list[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = save_tiny_model("qwen3_moe", tmp_path)
    monkeypatch.setattr("engine.runner_setup.choose_experts", lambda case: ExpertsChoice(64, 5, "for this test"))
    few = load(folder, max_batch_tokens=100)
    monkeypatch.setattr("engine.runner_setup.choose_experts", lambda case: ExpertsChoice(5, 5, "for this test"))
    none = load(folder, max_batch_tokens=100)

    assert few.forward.prompt_graph_tokens == 64
    assert "no prompt graphs of more than 64 tokens: for this test" in few.modes().forward_reason
    assert none.forward.prompt_graph_tokens == 0
    assert run(few, prompts) == run(none, prompts)


def test_what_cannot_be_captured_is_launched_and_counted(
    llama: Path,
    prompts: list[list[int]],
    expected: list[list[int]],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    def broken(self: object, *_: object) -> None:
        raise RuntimeError("no graph for this")

    monkeypatch.setattr(prompt_graphs._Recorder, "attend", broken)
    with caplog.at_level(logging.WARNING):
        engine = load(llama)

    assert engine.forward.graph_batch_sizes == (1, 2, 4, 5)
    assert engine.forward.prompt_graph_tokens == 0
    assert "no graph for this" in engine.modes().forward_reason
    assert "engine.prompt_graph_tokens: steps with prompts are not captured" in caplog.text
    assert engine.modes().num_fallbacks == 1
    assert run(engine, prompts) == expected
