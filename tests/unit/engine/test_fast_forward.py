"""Compiled layers, merged projections, decode graphs and planning ahead compute the tokens of the plain engine.

What a GPU adds, kernels and captured graphs, is left to tests/gpu; the code is the same. ``aot_eager`` traces and
functionalises as on a GPU and generates no code.
"""

from __future__ import annotations

import logging
import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from core.clock import VirtualClock
from core.request import SamplingParams, SequenceId, SequenceSpec, TokenChunk
from engine import engine_parts
from engine.compiled_layers import CompiledLayers
from engine.config import EngineConfig
from engine.decode_graphs import DecodeGraphs
from engine.engine import Engine
from engine.experts import ExpertsChoice
from engine.merged_linear import LinearSlice, merge_projections
from engine.model_runner import ModelRunner
from engine.prompt_graphs import PromptGraphs, _Recorder
from tests.tiny_engine import NUM_NEW, draw_prompts, greedy_tokens, run
from tests.tiny_models import FAMILIES, VOCAB_SIZE, save_tiny_model

PROMPT_LENGTHS = (1, 5, 16, 17, 40)
COMPILED = ("llama",)  # the others, with code generation: tests/gpu
# What CUDA computes only after it copied something to the host, by the part of the name before the overload.
ASKS_THE_HOST = frozenset(
    {
        "aten::_local_scalar_dense",
        "aten::nonzero",
        "aten::masked_select",
        "aten::_unique2",
        "aten::bincount",
        "aten::equal",
        "transformers::grouped_mm_fallback",
        "aten::_grouped_mm",  # in float32, which these tests are in
    }
)


@pytest.fixture(autouse=True)
def without_code_generation(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    plain = ModelRunner.speed_up
    monkeypatch.setattr(ModelRunner, "speed_up", lambda self, wishes: plain(self, wishes, "aot_eager"))
    monkeypatch.setattr(logging.getLogger("torch.__trace"), "propagate", False)  # pytest would keep megabytes of it
    yield
    torch._dynamo.reset()  # models of one family share code, and compiled code is kept per code


class NothingOfTheHost(TorchDispatchMode):
    """Within, what a CUDA graph could not hold is refused, on any device."""

    def __torch_dispatch__(self, op: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        masks = [x for x in args[1] if x is not None and x.dtype == torch.bool] if op.name() == "aten::index" else []
        if masks or op.name().split(".")[0] in ASKS_THE_HOST:
            raise RuntimeError(f"{op} asks the host")
        return op(*args, **(kwargs or {}))


@pytest.fixture
def static_steps_ask_nothing_of_the_host(monkeypatch: pytest.MonkeyPatch) -> None:
    plain = DecodeGraphs._compute

    def compute(self: DecodeGraphs, graph: Any) -> None:
        with NothingOfTheHost():
            plain(self, graph)

    monkeypatch.setattr(DecodeGraphs, "_compute", compute)
    between = PromptGraphs._compute

    def compute_between(self: PromptGraphs, step: Any, attention: Any, *others: Any) -> None:
        own = not isinstance(attention, _Recorder)  # the step's own attention may ask: it is in no graph
        with nullcontext() if own else NothingOfTheHost():
            between(self, step, attention, *others)

    monkeypatch.setattr(PromptGraphs, "_compute", compute_between)


@pytest.fixture(scope="module")
def example(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], tuple[Path, list[list[int]], list[list[int]]]]:
    @cache
    def make(family: str) -> tuple[Path, list[list[int]], list[list[int]]]:
        folder = save_tiny_model(family, tmp_path_factory.mktemp("models") / family)
        prompts = draw_prompts(family, PROMPT_LENGTHS)
        return folder, prompts, greedy_tokens(folder, prompts)

    return make


def load(folder: Path, **settings: Any) -> Engine:
    defaults: dict[str, Any] = {
        "device": "cpu",
        "threads": 1,
        "dtype": "float32",
        "page_size": 4,
        "num_pages": 64,
        "max_batch_size": 5,
        "plan_ahead": "always",
    }
    return Engine.load_model(EngineConfig(**{**defaults, **settings}), str(folder), VirtualClock())


Examples = Callable[[str], tuple[Path, list[list[int]], list[list[int]]]]


@pytest.mark.usefixtures("static_steps_ask_nothing_of_the_host")
@pytest.mark.parametrize("family", FAMILIES)
def test_static_steps_planned_ahead(family: str, example: Examples) -> None:
    folder, prompts, expected = example(family)
    engine = load(folder, max_prefill_chunk=7, decode_graphs="always")

    assert engine.forward.graph_batch_sizes == (1, 2, 4, 5), engine.forward.graph_reason
    mode = engine.forward  # mixtures of these types ask the host for more than a few tokens
    assert bool(mode.prompt_graph_tokens) != bool(mode.experts), mode
    assert run(engine, prompts) == expected
    assert run(engine, prompts, "from the prefix cache") == expected


@pytest.mark.usefixtures("static_steps_ask_nothing_of_the_host")
def test_experts_that_ask_the_host_are_noticed_and_not_captured(
    example: Examples, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, prompts, expected = example("mixtral")
    always_grouped = ExpertsChoice(0, 5, "for this test")
    monkeypatch.setattr("engine.runner_setup.choose_experts", lambda case: always_grouped)
    engine = load(folder, decode_graphs="always")

    modes = engine.modes()
    assert engine.forward.graph_batch_sizes == ()
    assert "asks the host" in modes.forward_reason
    assert modes.num_fallbacks == 1
    assert run(engine, prompts) == expected


def test_experts_that_are_too_large_to_be_copied_are_captured_for_fewer_sequences(
    example: Examples, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    folder, prompts, expected = example("qwen3_moe")
    monkeypatch.setattr("engine.experts._MOST_COPIED_BYTES", 2 * 2 * 3 * 32 * 16 * 4)  # two tokens' two experts
    engine = load(folder, decode_graphs="always")

    assert engine.forward.graph_batch_sizes == (1, 2)
    assert "experts by batched_mm up to 2 tokens" in engine.modes().forward
    assert "of more than 2 sequences" in engine.modes().forward_reason
    assert "decode steps are not captured: of more than 2 sequences" in caplog.text
    assert run(engine, prompts) == expected


@pytest.mark.parametrize("family", COMPILED)
def test_compiled(family: str, example: Examples) -> None:
    folder, prompts, expected = example(family)
    engine = load(folder, compile="always", decode_graphs="always")

    forward = engine.forward
    assert forward.compiled, forward.reason
    assert run(engine, prompts) == expected


@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_shared_prefixes_read_once_change_no_token(family: str, example: Examples) -> None:
    folder, prompts, _ = example(family)
    system, tools, draw = prompts[4][:20], prompts[4][20:33], random.Random(3)
    own = [[draw.randrange(1, VOCAB_SIZE) for _ in range(n)] for n in (1, 5, 2, 9, 3)]
    asked = [*(system + one for one in own[:3]), *(tools + one for one in own[3:]), prompts[1], prompts[2]]
    found, contexts = [], []
    for switch in ("never", "always"):
        # Seven sequences in a step for eight: one is computed twice.
        engine = load(folder, max_batch_size=8, decode_graphs="always", cascade_attention=switch)
        run(engine, [system, tools], "first")
        found.append(run(engine, asked))
        assert engine.forward.cascade == (switch == "always"), engine.forward.cascade_reason
        # All layers of gemma2 that see everything, and none of its others.
        assert (engine.modes().num_cascade > 0) == (switch == "always")
        contexts.append(max(step.decode_context for step in engine.take_step_samples()))

    assert found[0] == found[1]
    assert contexts[0] - contexts[1] == 2 * 20 + 12, "three pages of 4 once for two sequences, five once for three"


def test_graphs_for_shared_prefixes_that_cannot_be_captured_leave_the_others(
    example: Examples, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, prompts, expected = example("llama")

    def broken(self: object, num_sequences: int, max_tokens: int) -> None:
        raise RuntimeError("no kernel for this")

    monkeypatch.setattr("engine.attention.TiledBackend.allocate_cascade", broken)
    engine = load(folder, decode_graphs="always", cascade_attention="always")

    assert engine.forward.graph_batch_sizes == (1, 2, 4, 5)
    assert not engine.forward.cascade
    assert "no kernel for this" in engine.modes().forward_reason
    assert engine.modes().num_fallbacks == 1
    assert run(engine, [*prompts, prompts[4]])[:5] == expected


def test_preempted_while_planning_ahead(example: Examples) -> None:
    folder, prompts, expected = example("llama")
    engine = load(folder, num_pages=15, decode_graphs="always", max_prefill_chunk=7)

    assert run(engine, prompts[:4]) == expected[:4]
    assert engine.load().num_preemptions > 0


@pytest.mark.parametrize(
    "sampling",
    [
        {"temperature": 0.9, "top_p": 0.8, "top_k": 50, "seed": 3},
        {"temperature": 0.0, "repetition_penalty": 1.5, "frequency_penalty": 0.4, "presence_penalty": 0.3},
        {"temperature": 1.2, "frequency_penalty": 1.0, "seed": 4, "min_p": 0.01, "logit_bias": {5: 2.0}},
    ],
    ids=["drawn", "penalties", "drawn with penalties"],
)
def test_a_token_that_is_still_being_sampled_counts_as_a_known_one(sampling: dict[str, Any], example: Examples) -> None:
    folder, prompts, _ = example("llama")

    assert run(load(folder), prompts, **sampling) == run(load(folder, plan_ahead="never"), prompts, **sampling)


def test_stop_tokens_end_a_sequence_that_was_computed_further(example: Examples) -> None:
    folder, prompts, expected = example("llama")
    stop = expected[2][3]
    engine = load(folder)

    (tokens,) = run(engine, [prompts[2]], stop_token_ids=(stop,))

    assert tokens == expected[2][: expected[2].index(stop) + 1]
    assert engine.load().num_running == 0


def test_logprobs_are_those_of_the_step_that_sampled(example: Examples) -> None:
    folder, prompts, _ = example("llama")
    ahead, plain = (_chunks(load(folder, plan_ahead=switch), prompts[:3]) for switch in ("always", "never"))

    assert [chunk.logprobs[0].token_id for chunk in ahead] == [chunk.token_ids[0] for chunk in ahead]
    for one, other in zip(ahead, plain, strict=True):
        assert one.token_ids == other.token_ids
        assert one.logprobs[0].logprob == pytest.approx(other.logprobs[0].logprob, abs=1e-5)
        assert [t for t, _ in one.logprobs[0].top] == [t for t, _ in other.logprobs[0].top]


def _chunks(engine: Engine, prompts: Sequence[Sequence[int]]) -> list[TokenChunk]:
    params = SamplingParams(max_tokens=4, temperature=0.0, logprobs=2)
    for number, prompt in enumerate(prompts):
        engine.add(SequenceSpec(SequenceId(str(number)), tuple(prompt), params))
    found = []
    while engine.has_work:
        found.extend(engine.step().chunks)
    return sorted(found, key=lambda chunk: (chunk.sequence_id, chunk.position))


def test_an_abort_frees_no_page_that_the_step_under_way_writes(example: Examples) -> None:
    folder, prompts, _ = example("llama")
    engine = load(folder, prefix_cache=False)
    sampling = SamplingParams(max_tokens=NUM_NEW, temperature=0.0)
    engine.add(SequenceSpec(SequenceId("a"), tuple(prompts[3]), sampling))
    engine.step()
    free = engine.load().pages_free

    assert engine.abort(SequenceId("a"))
    assert engine.has_work, "a step is under way"
    assert engine.load().pages_free == free
    assert engine.step().chunks == ()
    assert engine.load().pages_free == 64
    assert not engine.has_work


def test_a_step_launched_ahead_that_fails_takes_no_token_from_the_one_before(
    example: Examples, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, prompts, _ = example("llama")
    engine = load(folder)
    engine.add(SequenceSpec(SequenceId("a"), tuple(prompts[1]), SamplingParams(max_tokens=1, temperature=0.0)))
    engine.add(SequenceSpec(SequenceId("b"), tuple(prompts[2]), SamplingParams(max_tokens=4, temperature=0.0)))
    plain, calls = ModelRunner.run, []

    def run_once(self: ModelRunner, *arguments: Any, **keywords: Any) -> torch.Tensor:
        calls.append(arguments)
        if len(calls) == 2:
            raise RuntimeError("out of memory")
        return plain(self, *arguments, **keywords)

    monkeypatch.setattr(ModelRunner, "run", run_once)
    output = engine.step()

    assert [chunk.sequence_id for chunk in output.chunks] == ["a"]
    assert [failure.sequence_id for failure in output.failures] == ["b"]
    engine.check_integrity()
    assert engine.load().pages_free == 64


def test_a_model_that_cannot_be_compiled_runs_eagerly_and_says_so(
    example: Examples, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    folder, prompts, expected = example("llama")

    def broken(gm: object, inputs: object) -> object:
        raise RuntimeError("no kernel for this")

    plain = CompiledLayers.__init__
    monkeypatch.setattr(CompiledLayers, "__init__", lambda self, model, backend: plain(self, model, broken))
    engine = load(folder, compile="always")

    modes = engine.modes()
    assert not engine.forward.compiled
    assert "no kernel for this" in engine.forward.reason
    assert modes.num_fallbacks == 1
    assert "runs eagerly from now on" in caplog.text
    assert run(engine, prompts) == expected


def test_a_model_whose_layers_are_not_found_runs_eagerly(example: Examples, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, prompts, expected = example("llama")
    monkeypatch.setattr("engine.compiled_layers.decoder_layers", lambda model: ())
    engine = load(folder, compile="always")

    assert engine.forward.reason == "the model's layers were not found"
    assert run(engine, prompts) == expected


@pytest.mark.parametrize("family", ["llama", "qwen2", "deepseek_v3", "phi3"])
def test_merged_projections_change_no_token(family: str, example: Examples, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, prompts, expected = example(family)
    saved = []
    load_model = engine_parts.load_model

    def load_merged(*arguments: Any) -> Any:
        monkeypatch.setattr("engine.model_loader.pack_linears", lambda model: saved.append(merge_projections(model)))
        return load_model(*arguments)

    monkeypatch.setattr(engine_parts, "load_model", load_merged)
    engine = load(folder)

    assert saved == [{"llama": 6, "qwen2": 6, "deepseek_v3": 2, "phi3": 0}[family]]
    assert run(engine, prompts) == expected


def test_a_slice_shows_its_own_weight_and_computes_alone_too() -> None:
    parent = torch.nn.Module()
    plain = [torch.nn.Linear(6, n) for n in (4, 3)]
    parent.gate_proj, parent.up_proj = plain
    x, y = torch.randn(2, 6), torch.randn(2, 6)
    expected = plain[1](y), plain[0](x)

    assert merge_projections(parent) == 1
    gate, up = parent.gate_proj, parent.up_proj

    assert isinstance(gate, LinearSlice)
    assert torch.equal(up.weight, plain[1].weight)
    assert torch.equal(up.bias, plain[1].bias)
    torch.testing.assert_close(up(y), expected[0])
    torch.testing.assert_close(gate(x), expected[1])
