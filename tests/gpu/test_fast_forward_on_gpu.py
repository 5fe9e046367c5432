"""Compiled layers, captured decode graphs and steps planned ahead give transformers' tokens; FlashInfer in bfloat16 its
logits within a bound.

Skipped without a GPU. tests/unit/engine/test_fast_forward.py asks the same of the CPU, without kernels and graphs.
"""

from __future__ import annotations

import importlib.util
import statistics
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    Gemma2Config,
    LlamaConfig,
    MistralConfig,
    PreTrainedConfig,
    Qwen3MoeConfig,
)

from core.clock import WallClock
from core.request import SamplingParams, SequenceId, SequenceSpec, TokenChunk
from engine.config import EngineConfig
from engine.engine import Engine
from engine.step_plan import StepPlan
from tests.tiny_engine import (
    NUM_NEW,
    PROMPT_LENGTHS,
    chunks,
    draw_prompts,
    greedy_tokens,
    run,
    save_in_bfloat16,
)
from tests.tiny_models import VOCAB_SIZE, save_tiny_model

pytestmark = [
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU here"),
    pytest.mark.timeout(600),
]
needs_flashinfer = pytest.mark.skipif(importlib.util.find_spec("flashinfer") is None, reason="no FlashInfer here")

MIXTURES = ("mixtral", "qwen3_moe", "gpt_oss", "deepseek_v3")
# Log-probabilities of tiny models with large weights in bfloat16 against float32, relative to the logits' spread.
LOGIT_BOUND = 0.1


@pytest.fixture(autouse=True)
def forget_compiled_code() -> Any:
    yield
    torch._dynamo.reset()  # models of one family share code, and compiled code is kept per code


def load(folder: Path, **settings: Any) -> Engine:
    defaults: dict[str, Any] = {"device": "cuda", "dtype": "float32", "num_pages": 64, "max_batch_size": 6}
    return Engine.load_model(EngineConfig(**{**defaults, **settings}), str(folder), WallClock())


def example(family: str, folder: Path) -> tuple[Path, list[list[int]], list[list[int]]]:
    save_tiny_model(family, folder)
    prompts = draw_prompts(family)
    return folder, prompts, greedy_tokens(folder, prompts)


@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma2", "gemma3", "mistral", "phi3", "gpt2", *MIXTURES])
def test_tokens_of_compiled_layers_and_graphs(family: str, tmp_path: Path) -> None:
    folder, prompts, expected = example(family, tmp_path)
    engine = load(folder)
    modes = engine.modes()
    print(family, modes, engine.forward)

    assert "planned ahead" in modes.forward
    assert engine.forward.compiled, engine.forward.reason
    assert engine.forward.graph_batch_sizes == (1, 2, 4, 6), engine.forward.graph_reason
    assert ("experts by batched_mm up to 6 tokens" in modes.forward) == (family in MIXTURES)
    assert engine.forward.prompt_graph_tokens == (0 if family in MIXTURES else 2048), engine.forward.prompt_graph_reason
    for size in range(1, len(prompts) + 1):  # every graph, full and padded
        assert run(engine, prompts[:size], f"of {size}") == expected[:size]


def test_preempted_between_graphs(tmp_path: Path) -> None:
    folder, prompts, expected = example("llama", tmp_path)
    engine = load(folder, page_size=4, num_pages=17, compile="never", max_prefill_chunk=7)
    short = [i for i, length in enumerate(PROMPT_LENGTHS) if length <= 17]

    assert run(engine, [prompts[i] for i in short], "crowded") == [expected[i] for i in short]
    assert engine.load().num_preemptions > 0


@pytest.mark.parametrize(
    "sampling",
    [
        {"temperature": 0.9, "top_p": 0.8, "top_k": 50, "seed": 3, "min_p": 0.01},
        {"temperature": 0.8, "top_p": 0.9, "seed": 5, "repetition_penalty": 1.3, "frequency_penalty": 0.4},
    ],
    ids=["filters", "penalties"],
)
def test_sampling_does_not_depend_on_planning_ahead(sampling: dict[str, Any], tmp_path: Path) -> None:
    folder = save_tiny_model("llama", tmp_path)
    prompts = draw_prompts(1)
    ahead, plain = (load(folder, compile="never", plan_ahead=switch) for switch in ("auto", "never"))

    assert run(ahead, prompts, "s", **sampling) == run(plain, prompts, "s", **sampling)


class _Shipper:
    """Copies the pages of a step, layer by layer, on a stream of its own behind a mark, as a transport does."""

    def __init__(self, source: Engine, target: Engine, pages: Sequence[int]) -> None:
        self._source, self._target, self._pages = source, target, pages
        self._stream = torch.cuda.Stream()
        self.heard: list[int] = []

    def sequence_started(self, spec: SequenceSpec, num_cached_tokens: int, page_ids: Sequence[int]) -> None:
        assert num_cached_tokens == 0

    def step_planned(self, plan: StepPlan) -> Callable[[int], None]:
        def layer_stored(layer: int) -> None:
            self.heard.append(layer)
            mark = torch.cuda.Event()
            mark.record()
            self._stream.wait_event(mark)
            size = self._source.layout.page_size
            with torch.cuda.stream(self._stream), torch.inference_mode():
                for item in plan.items:
                    for i in range(item.start // size, -(-(item.start + len(item.token_ids)) // size)):
                        page = self._source.pool.pages(layer)[item.page_ids[i]]
                        self._target.pool.pages(layer)[self._pages[i]].copy_(page, non_blocking=True)

        return layer_stored


def test_layers_are_reported_while_compiled_steps_and_graphs_compute(tmp_path: Path) -> None:
    folder, prompts, expected = example("llama", tmp_path)
    prefill, decode = (load(folder, page_size=4, max_prefill_chunk=39) for _ in range(2))  # the last chunk: one token
    assert prefill.forward.compiled
    assert prefill.forward.prompt_graph_tokens, prefill.forward.prompt_graph_reason
    sampling = SamplingParams(max_tokens=NUM_NEW, temperature=0.0)
    spec = SequenceSpec(SequenceId("s"), tuple(prompts[4]), sampling)
    reservation = decode.reserve(spec)
    assert reservation is not None
    shipper = prefill.listener = _Shipper(prefill, decode, reservation.page_ids)
    prefill.add(SequenceSpec(SequenceId("s"), tuple(prompts[4]), sampling, hold_kv=True))
    first = []
    while prefill.has_work:
        first += [token for chunk in prefill.step().chunks for token in chunk.token_ids]
    torch.cuda.synchronize()

    assert shipper.heard == [0, 1] * 2
    decode.admit(reservation, first)
    rest: list[int] = []
    while decode.has_work:
        rest += [token for chunk in decode.step().chunks for token in chunk.token_ids]
    assert [*first, *rest] == expected[4]


SHAPE: dict[str, Any] = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 256,
    "intermediate_size": 384,
    "num_hidden_layers": 3,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "max_position_embeddings": 512,
    "initializer_range": 0.08,
    "bos_token_id": None,
    "eos_token_id": None,
    "tie_word_embeddings": False,
}


@needs_flashinfer
@pytest.mark.parametrize(
    "config", [LlamaConfig(**SHAPE), MistralConfig(**SHAPE, sliding_window=11)], ids=["full", "window"]
)
def test_flashinfer_in_bfloat16_is_within_the_bound(config: PreTrainedConfig, tmp_path: Path) -> None:
    reference = save_in_bfloat16(config, 3, tmp_path)
    prompts = draw_prompts(2)
    worst = {}
    for compile_ in ("never", "auto"):
        engine = load(tmp_path, dtype="bfloat16", compile=compile_, max_prefill_chunk=23)
        modes = engine.modes()
        assert modes.attention == "flashinfer", modes.attention_reason
        assert engine.forward.compiled == (compile_ == "auto"), engine.forward.reason
        assert engine.forward.graph_batch_sizes, engine.forward.graph_reason
        assert engine.forward.prompt_graph_tokens == 2048, engine.forward.prompt_graph_reason
        found = chunks(engine, prompts, "s", logprobs=5) + chunks(engine, prompts[2:], "cached", logprobs=5)
        errors = []
        for prompt, one in zip([*prompts, *prompts[2:]], found, strict=True):
            errors += _errors(reference, prompt, one)
        worst[compile_] = max(errors)
    print("largest error of a log-probability, of the spread of the logits:", worst)
    assert max(worst.values()) < LOGIT_BOUND


@needs_flashinfer
def test_a_mixture_in_bfloat16_is_captured_for_every_batch(tmp_path: Path) -> None:
    config = Qwen3MoeConfig(**SHAPE, moe_intermediate_size=128, num_experts=16, num_experts_per_tok=4)
    reference = save_in_bfloat16(config, 4, tmp_path)
    prompts = draw_prompts(3)
    engine = load(tmp_path, dtype="bfloat16")
    print(engine.modes(), engine.forward)

    assert engine.forward.compiled, engine.forward.reason
    assert engine.forward.graph_batch_sizes == (1, 2, 4, 6), engine.forward.graph_reason
    errors = []
    for size in range(1, len(prompts) + 1):
        found = chunks(engine, prompts[:size], f"of {size}", logprobs=5)
        for prompt, one in zip(prompts, found, strict=False):
            errors += _errors(reference, prompt, one)
    print("median and largest error of a log-probability:", statistics.median(errors), max(errors))
    assert statistics.median(errors) < LOGIT_BOUND, "of the largest, rounding may have turned a router"


@needs_flashinfer
@pytest.mark.parametrize(
    ("config", "mode"),
    [
        (LlamaConfig(**SHAPE), "chunked"),
        (Gemma2Config(**SHAPE, sliding_window=11), "chunked"),
        (LlamaConfig(**SHAPE), "layered"),
        (LlamaConfig(**SHAPE), "partitioned"),
    ],
    ids=["full", "mixed", "layered", "partitioned"],
)
def test_shared_prefixes_read_once_in_bfloat16_are_within_the_bound(
    config: PreTrainedConfig, mode: str, tmp_path: Path
) -> None:
    reference = save_in_bfloat16(config, 3, tmp_path)
    system, tools, *own = draw_prompts(4, (70, 40, 1, 30, 2, 17, 9, 5, 3, 11, 26, 60, 7))
    # Eleven sequences in a graph for sixteen: six and three with beginnings in common, and two without.
    prompts = [*(system + one for one in own[:6]), *(tools + one for one in own[6:9]), *own[9:]]
    worst, tokens = {}, {}
    for switch in ("never", "always"):
        engine = load(
            tmp_path,
            dtype="bfloat16",
            compile="never",
            max_batch_size=16,
            cascade_attention=switch,
            colocated_mode=mode,
            tpot_slo_s=None if mode == "chunked" else 1e-6,  # decode between or beside all layers of prompts
        )
        assert engine.modes().attention == "flashinfer", engine.modes().attention_reason
        assert engine.forward.cascade == (switch == "always"), engine.forward.cascade_reason
        chunks(engine, [system, tools], "first")
        found = chunks(engine, prompts, "s", logprobs=5)
        assert (engine.modes().num_cascade > 0) == (switch == "always")
        tokens[switch] = [[token for chunk in one for token in chunk.token_ids] for one in found]
        worst[switch] = max(max(_errors(reference, *pair)) for pair in zip(prompts, found, strict=True))
    alike = sum(one == other for one, other in zip(*tokens.values(), strict=True))
    print("largest error, of the spread of the logits:", worst, "answers alike:", alike, "of", len(prompts))
    assert max(worst.values()) < LOGIT_BOUND


@torch.no_grad()
def _errors(reference: Any, prompt: Sequence[int], found: Sequence[TokenChunk]) -> list[float]:
    """Of every reported log-probability, with the tokens that the engine chose before it."""
    tokens = [token for chunk in found for token in chunk.token_ids]
    logits = reference(torch.tensor([[*prompt, *tokens]])).logits[0].float()
    errors = []
    for index, chunk in enumerate(found):
        row = logits[len(prompt) - 1 + index]
        expected, spread = row.log_softmax(-1), float(row.std())
        (logprob,) = chunk.logprobs
        errors += [abs(value - float(expected[token])) / spread for token, value in logprob.top]
    return errors
