"""Layers whose C++ torch has generated give transformers' tokens, in float32, for every family.

Generating takes half a minute a family and a core, so only ``pytest -m generates_code`` does it for all;
test_fast_forward.py traces the same code in every run. What is generated is kept where the engine keeps it.
"""

from __future__ import annotations

import logging
import os
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch._inductor.runtime.cache_dir_utils import default_cache_dir
from transformers import AutoModelForCausalLM

from core.clock import VirtualClock
from core.request import SamplingParams, SequenceId, SequenceSpec
from engine import compiled_layers, cpu_kernel
from engine.config import EngineConfig
from engine.engine import Engine
from tests.tiny_models import FAMILIES, VOCAB_SIZE, generate_with, save_tiny_model

NUM_TOKENS = 8


@pytest.fixture(autouse=True)
def forget_compiled_code(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(logging.getLogger("torch.__trace"), "propagate", False)  # pytest would keep megabytes of it
    yield
    torch._dynamo.reset()  # models of one family share code, and compiled code is kept per code


def load(folder: Path) -> Engine:
    config = EngineConfig(device="cpu", threads=1, dtype="float32", page_size=4, num_pages=64, compile="always")
    return Engine.load_model(config, str(folder), VirtualClock())


@pytest.mark.generates_code
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of torch about itself
@pytest.mark.timeout(900)
@pytest.mark.skipif(cpu_kernel.compiler() is None, reason="no C++ compiler here")
@pytest.mark.parametrize("family", FAMILIES)
def test_generated_code_gives_transformers_tokens(family: str, tmp_path: Path) -> None:
    folder = save_tiny_model(family, tmp_path / family)
    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager")
    draw = random.Random(family)
    prompts = [[draw.randrange(1, VOCAB_SIZE) for _ in range(length)] for length in (1, 5, 16, 17, 40)]
    engine = load(folder)
    for number, prompt in enumerate(prompts):
        sampling = SamplingParams(max_tokens=NUM_TOKENS, temperature=0.0)
        engine.add(SequenceSpec(SequenceId(str(number)), tuple(prompt), sampling))
    tokens: list[list[int]] = [[] for _ in prompts]
    while engine.has_work:
        output = engine.step()
        assert not output.failures
        for chunk in output.chunks:
            tokens[int(chunk.sequence_id)].extend(chunk.token_ids)

    assert tokens == [list(generate_with(model, prompt, NUM_TOKENS)) for prompt in prompts]
    assert engine.forward.compiled, engine.forward.reason


def test_without_a_compiler_a_cpu_runs_eagerly_and_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = save_tiny_model("llama", tmp_path / "llama")
    monkeypatch.setattr(compiled_layers, "compiler", lambda: None)

    modes = load(folder).modes()

    assert modes.forward == "eager"
    assert "no C++ compiler" not in modes.attention_reason
    assert "torch needs a C++ compiler to generate code for a CPU" in modes.forward_reason
    assert modes.num_fallbacks == 1


@pytest.mark.parametrize(
    ("before", "after"),
    [(None, "inductor"), (default_cache_dir(), "inductor"), ("/somewhere/else", "/somewhere/else")],
    ids=["unset", "torch's default", "set"],
)
def test_compiled_code_is_kept_where_the_configuration_says(
    before: str | None, after: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FLASHINFER_WORKSPACE_BASE", "elsewhere")  # written too
    monkeypatch.delenv("TORCHINDUCTOR_CACHE_DIR", raising=False)
    if before is not None:
        monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", before)

    compiled_layers.keep_compiled_code(str(tmp_path))

    assert os.environ["TORCHINDUCTOR_CACHE_DIR"] == str(tmp_path / after)  # an absolute ``after`` stays what it is
