"""The engine's device-neutral half on a GPU: the same tokens as on a CPU, for every family.

Skipped without a GPU. Kernels, graphs and transfers from device memory have tests of their own as they come.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from core.clock import WallClock
from engine.config import EngineConfig
from engine.engine import Engine
from tests.tiny_engine import draw_prompts, greedy_tokens, run
from tests.tiny_models import FAMILIES, save_tiny_model

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU here")


@pytest.mark.parametrize("attention", ["sdpa", "matmul"])
@pytest.mark.parametrize("family", FAMILIES)
def test_tokens_on_the_gpu_are_those_of_transformers(family: str, attention: str, tmp_path: Path) -> None:
    folder = save_tiny_model(family, tmp_path)
    prompts = draw_prompts(family)
    expected = greedy_tokens(folder, prompts)
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
        assert run(engine, prompts, "miss") == expected
        assert run(engine, prompts, "hit") == expected


def test_sampling_on_the_gpu_is_a_function_of_the_seed(tmp_path: Path) -> None:
    folder = save_tiny_model("llama", tmp_path)
    config = EngineConfig(device="cuda", dtype="float32", num_pages=64, compile="never")
    engine = Engine.load_model(config, str(folder), WallClock())
    sampling: dict[str, Any] = {
        "temperature": 0.9,
        "top_p": 0.9,
        "top_k": 40,
        "min_p": 0.01,
        "repetition_penalty": 1.1,
        "presence_penalty": 0.2,
        "frequency_penalty": 0.1,
        "logit_bias": {7: 1.5},
        "logprobs": 3,
        "seed": 5,
    }
    prompts = [[1, 2, 3, 4, 5]] * 3
    first = run(engine, prompts, "a", **sampling)
    assert first == run(engine, prompts, "b", **sampling)
    assert first[0] == first[1] == first[2]
