"""The page pool of a GPU is what the model leaves of its share, and the largest step fits beside it.

Skipped without a GPU.
"""

from __future__ import annotations

import gc
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig

from core.clock import WallClock
from core.errors import InvalidConfig
from engine.config import EngineConfig
from engine.engine import Engine
from tests.tiny_engine import draw_prompts, run, save_in_bfloat16
from tests.tiny_models import VOCAB_SIZE

pytestmark = [pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU here"), pytest.mark.timeout(600)]

GIB = 1 << 30
SHARE = 0.25
SHAPE = LlamaConfig(
    vocab_size=VOCAB_SIZE,
    hidden_size=1024,
    intermediate_size=8192,
    num_hidden_layers=4,
    num_attention_heads=8,
    num_key_value_heads=8,
    head_dim=128,
    max_position_embeddings=32768,
    bos_token_id=None,
    eos_token_id=None,
)


def test_what_is_left_is_pages_and_the_largest_step_fits(tmp_path: Path) -> None:
    save_in_bfloat16(SHAPE, 1, tmp_path)
    total = torch.cuda.get_device_properties(0).total_memory
    config = EngineConfig(
        device="cuda",
        gpu_memory_utilization=SHARE,
        max_batch_tokens=16384,
        max_batch_size=64,
        prefix_cache=False,
        compile="never",
    )
    free_before = torch.cuda.mem_get_info()[0]
    engine = Engine.load_model(config, str(tmp_path), WallClock())
    pool_bytes = engine.load().pages_total * engine.layout.bytes_per_page
    # A process beside this one may take and give memory meanwhile.
    assert 0 < pool_bytes < SHARE * total
    assert engine.model.max_model_len == 32768

    run(engine, draw_prompts(1, (1000,) * 60), "full")
    used = free_before - torch.cuda.mem_get_info()[0]
    print(f"pool {pool_bytes / GIB:.2f} GiB, used {used / GIB:.2f} of {SHARE * total / GIB:.2f}")
    assert used < SHARE * total

    with pytest.raises(InvalidConfig, match=r"gpu_memory_utilization.*kv_cache_bytes"):
        Engine.load_model(config, str(tmp_path), WallClock())
    del engine
    gc.collect()
    torch.cuda.empty_cache()
