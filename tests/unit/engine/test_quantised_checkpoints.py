"""A checkpoint with quantised weights gives the tokens that transformers' generate gives with it, or is refused."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from core.clock import VirtualClock
from core.errors import UnsupportedQuantisation
from core.request import SamplingParams, SequenceId, SequenceSpec
from engine import quantisation
from engine.config import EngineConfig
from engine.engine import Engine
from engine.packed_linear import PackedLinear
from tests.tiny_models import VOCAB_SIZE, generate_with, save_tiny_model

NUM_TOKENS = 8
BLOCK = 16  # rows and columns that share a scale


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_model("llama", tmp_path_factory.mktemp("models") / "llama")


def save_fp8(plain: Path, folder: Path) -> None:
    """As DeepSeek's checkpoints: float8 weights, a float32 scale for each block of them."""
    tensors: dict[str, torch.Tensor] = {}
    for name, tensor in load_file(plain / "model.safetensors").items():
        if not name.endswith("_proj.weight"):
            tensors[name] = tensor
            continue
        rows, columns = tensor.shape
        blocks = tensor.view(rows // BLOCK, BLOCK, columns // BLOCK, BLOCK)
        scale = blocks.abs().amax((1, 3)) / 448.0
        tensors[name] = (blocks / scale[:, None, :, None]).view(rows, columns).to(torch.float8_e4m3fn)
        tensors[f"{name}_scale_inv"] = scale
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    write_config(plain, folder, {"quant_method": "fp8", "weight_block_size": [BLOCK, BLOCK]})


def save_bitsandbytes(plain: Path, folder: Path) -> None:
    pytest.importorskip("bitsandbytes")
    from transformers import BitsAndBytesConfig

    settings = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32)
    model: Any = AutoModelForCausalLM.from_pretrained(plain, quantization_config=settings, device_map="cpu")
    model.save_pretrained(folder)


def write_config(plain: Path, folder: Path, settings: dict[str, Any]) -> None:
    config = json.loads((plain / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "quantization_config": settings}))


def load(folder: Path, **settings: Any) -> Engine:
    config = EngineConfig(device="cpu", threads=1, dtype="float32", page_size=4, num_pages=64, **settings)
    return Engine.load_model(config, str(folder), VirtualClock())


def run(engine: Engine, prompts: list[list[int]]) -> list[list[int]]:
    for number, prompt in enumerate(prompts):
        sampling = SamplingParams(max_tokens=NUM_TOKENS, temperature=0.0)
        engine.add(SequenceSpec(SequenceId(str(number)), tuple(prompt), sampling))
    tokens: list[list[int]] = [[] for _ in prompts]
    while engine.has_work:
        output = engine.step()
        assert not output.failures
        for chunk in output.chunks:
            tokens[int(chunk.sequence_id)].extend(chunk.token_ids)
    return tokens


@pytest.mark.parametrize(
    ("save", "weights"),
    [(save_fp8, "fp8 weights, dequantised"), (save_bitsandbytes, "bitsandbytes weights")],
    ids=["fp8", "bitsandbytes"],
)
def test_tokens_are_those_of_generate_with_the_same_checkpoint(
    plain: Path, save: Callable[[Path, Path], None], weights: str, tmp_path: Path
) -> None:
    save(plain, tmp_path)
    model: Any = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32, attn_implementation="eager")
    draw = random.Random(1)
    prompts = [[draw.randrange(1, VOCAB_SIZE) for _ in range(length)] for length in (1, 5, 17, 40)]
    expected = [list(generate_with(model, prompt, NUM_TOKENS)) for prompt in prompts]

    engine = load(tmp_path)

    assert run(engine, prompts) == expected
    assert weights in engine.modes().forward


def test_layers_of_another_library_are_not_packed_and_not_compiled(plain: Path, tmp_path: Path) -> None:
    save_bitsandbytes(plain, tmp_path)

    engine = load(tmp_path)

    packed = [n for n, m in engine._runner._model.named_modules() if isinstance(m, PackedLinear)]
    assert packed == ["lm_head"]
    assert not engine.forward.compiled


def test_a_method_that_cannot_be_had_is_refused_before_anything_is_loaded(
    plain: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_config(plain, tmp_path, {"quant_method": "gptq", "bits": 4, "group_size": 128})
    monkeypatch.setattr(quantisation.importlib.util, "find_spec", lambda name: None)

    with pytest.raises(UnsupportedQuantisation, match="gptq needs pip install gptqmodel optimum; allowed here: fp8"):
        load(tmp_path)
