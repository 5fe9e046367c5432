"""The engine's device-neutral half on a GPU: the same tokens as on a CPU, for every family.

Skipped without a GPU. Kernels, graphs and transfers from device memory have tests of their own as they come.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from core.clock import WallClock
from core.request import SamplingParams, SequenceId, SequenceSpec
from engine.config import EngineConfig
from engine.engine import Engine
from tests.tiny_models import FAMILIES, VOCAB_SIZE, generate_with, save_tiny_model

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU here")

NUM_NEW = 10
PROMPT_LENGTHS = (1, 5, 16, 17, 40, 64)


def run(engine: Engine, prompts: Sequence[Sequence[int]], tag: str, sampling: SamplingParams) -> list[list[int]]:
    for number, prompt in enumerate(prompts):
        engine.add(SequenceSpec(SequenceId(f"{tag}/{number}"), tuple(prompt), sampling))
    tokens: list[list[int]] = [[] for _ in prompts]
    while engine.has_work:
        output = engine.step()
        assert not output.failures
        for chunk in output.chunks:
            tokens[int(chunk.sequence_id.split("/")[1])].extend(chunk.token_ids)
    return tokens


@pytest.mark.parametrize("attention", ["sdpa", "matmul"])
@pytest.mark.parametrize("family", FAMILIES)
def test_tokens_on_the_gpu_are_those_of_transformers(family: str, attention: str, tmp_path: Path) -> None:
    folder = save_tiny_model(family, tmp_path)
    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager")
    draw = random.Random(family)
    prompts = [[draw.randrange(1, VOCAB_SIZE) for _ in range(length)] for length in PROMPT_LENGTHS]
    expected = [list(generate_with(model, prompt, NUM_NEW)) for prompt in prompts]
    greedy = SamplingParams(max_tokens=NUM_NEW, temperature=0.0)
    for page_size, chunk in ((1, 7), (16, 5), (64, None)):
        config = EngineConfig(
            device="cuda",
            dtype="float32",
            page_size=page_size,
            num_pages=-(-1024 // page_size),
            max_prefill_chunk=chunk,
            attention=attention,
            compile="never",  # test_fast_forward_on_gpu.py
            max_batch_size=6,
        )
        engine = Engine.load_model(config, str(folder), WallClock())
        assert run(engine, prompts, "miss", greedy) == expected
        assert run(engine, prompts, "hit", greedy) == expected
        engine.check_integrity()


def test_sampling_on_the_gpu_is_a_function_of_the_seed(tmp_path: Path) -> None:
    folder = save_tiny_model("llama", tmp_path)
    config = EngineConfig(device="cuda", dtype="float32", num_pages=64, compile="never")
    engine = Engine.load_model(config, str(folder), WallClock())
    sampling = SamplingParams(
        max_tokens=NUM_NEW,
        temperature=0.9,
        top_p=0.9,
        top_k=40,
        min_p=0.01,
        repetition_penalty=1.1,
        presence_penalty=0.2,
        frequency_penalty=0.1,
        logit_bias={7: 1.5},
        logprobs=3,
        seed=5,
    )
    prompts = [[1, 2, 3, 4, 5]] * 3
    first = run(engine, prompts, "a", sampling)
    assert first == run(engine, prompts, "b", sampling)
    assert first[0] == first[1] == first[2]
