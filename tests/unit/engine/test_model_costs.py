"""What a model costs is counted on the model itself: the numbers here are worked out from the tiny shapes by hand."""

from __future__ import annotations

from pathlib import Path

import pytest

from core.clock import VirtualClock
from core.compute import ComputeProfile
from engine.config import EngineConfig
from engine.engine import Engine
from tests.tiny_models import VOCAB_SIZE, WINDOW, save_tiny_model

HIDDEN, INNER, HEADS, KV_HEADS, HEAD = 32, 48, 4, 2, 8
HEAD_WEIGHTS = VOCAB_SIZE * HIDDEN
ATTENTION = HIDDEN * HEAD * (2 * HEADS + 2 * KV_HEADS)  # q, k, v and o of one layer
PAIR = 2 * HEADS * (HEAD + HEAD)  # one token that sees one token in one layer


def profile(tmp_path: Path, family: str, **settings: object) -> ComputeProfile:
    folder = save_tiny_model(family, tmp_path / family)
    config = EngineConfig(
        **{"device": "cpu", "threads": 1, "dtype": "float32", "page_size": 4, "num_pages": 32, **settings}  # type: ignore[arg-type]
    )
    return Engine.load_model(config, str(folder), VirtualClock()).model.compute


def test_a_dense_models_weights_and_attention_are_counted(tmp_path: Path) -> None:
    compute = profile(tmp_path, "llama", max_batch_tokens=64, max_prefill_chunk=48)
    layer = ATTENTION + 3 * HIDDEN * INNER
    norms = 5 * HIDDEN
    assert compute.weight_flops == 2 * 2 * layer, "neither the embedding nor the head"
    assert compute.weight_bytes == 4 * (2 * layer + norms + HEAD_WEIGHTS), "the head too, the embedding not"
    assert compute.attention_flops == 2 * PAIR
    assert (compute.step_tokens, compute.num_devices) == (48, 1)
    assert compute.device.startswith("cpu ")


def test_packed_weights_count_like_plain_ones(tmp_path: Path) -> None:
    packed, plain = profile(tmp_path, "llama", dtype="bfloat16"), profile(tmp_path, "llama", dtype="float16")
    assert packed.weight_flops == plain.weight_flops
    assert packed.weight_bytes == plain.weight_bytes


def test_a_window_bounds_what_a_token_costs(tmp_path: Path) -> None:
    compute = profile(tmp_path, "gemma3")
    assert compute.attention_flops == PAIR, "one of four layers sees everything"
    assert compute.weight_flops == 2 * 4 * (ATTENTION + 3 * HIDDEN * INNER) + 3 * WINDOW * PAIR


@pytest.mark.parametrize("family", ["mixtral", "gpt_oss"])
def test_a_token_meets_its_share_of_the_experts(tmp_path: Path, family: str) -> None:
    compute = profile(tmp_path, family)
    experts = 4 * 3 * HIDDEN * INNER
    whole = compute.weight_bytes / 4 * 2
    assert compute.weight_flops < whole - 2 * 2 * (experts / 2) + PAIR * WINDOW, "half of the experts of both layers"
    assert compute.weight_flops > 2 * 2 * (ATTENTION + experts / 2)
