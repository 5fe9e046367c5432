"""What is left of a GPU's memory for pages, as arithmetic; tests/gpu asks a GPU."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from core.errors import InvalidConfig
from engine.config import EngineConfig
from engine.device_memory import ALLOWANCE_BYTES, DeviceMemory, largest_step, run_largest_step
from engine.model_loader import load_model
from engine.model_source import resolve
from engine.runner_setup import make_pool
from tests.tiny_models import FAMILIES, save_tiny_model

GIB = 1 << 30


def test_pages_get_what_is_ours_less_what_others_take() -> None:
    memory = DeviceMemory(total=80 * GIB, taken=16 * GIB, step=3 * GIB)

    assert memory.room(0.75) == 41 * GIB - ALLOWANCE_BYTES
    assert memory.room(0.25) == GIB - ALLOWANCE_BYTES


def test_what_others_take_is_not_given_twice() -> None:
    assert DeviceMemory(total=80 * GIB, taken=75 * GIB, step=GIB).room(0.9) < 0


@given(
    st.integers(1, 64),
    st.integers(0, 4096),
    st.integers(1, 64),
    st.none() | st.integers(1, 4096),
    st.none() | st.integers(1, 4096),
)
def test_the_largest_step_is_full_and_one_that_may_be(
    batch: int, more: int, page_size: int, limit: int | None, chunk: int | None
) -> None:
    config = EngineConfig(max_batch_size=batch, max_batch_tokens=batch + more, max_prefill_chunk=chunk)
    longest = min(config.step_tokens, limit or config.step_tokens)
    plan = largest_step(config, page_size, limit)
    lengths = [len(item.token_ids) for item in plan.items]

    assert len(lengths) == batch
    assert sum(lengths) == min(config.max_batch_tokens, batch * longest)
    assert lengths == sorted(lengths)
    assert max(lengths) <= longest
    assert all(len(item.token_ids) <= len(item.page_ids) * page_size for item in plan.items)
    assert len(plan.sampling_items) == batch


@pytest.mark.parametrize("family", FAMILIES)
def test_the_largest_step_can_be_computed(family: str, tmp_path: Path) -> None:
    """Here on a CPU, where nobody asks what it took."""
    folder = save_tiny_model(family, tmp_path)
    config = EngineConfig(device="cpu", max_batch_tokens=400, max_batch_size=8, num_pages=16)
    loaded = load_model(resolve(str(folder), tmp_path), config)

    run = run_largest_step(loaded.model, loaded.layout, loaded.attention, config, loaded.description.max_model_len)

    assert run == 16 * loaded.layout.bytes_per_page  # 256 tokens, the longest sequence


@pytest.mark.parametrize(("key", "value"), [("num_pages", 1 << 44), ("kv_cache_bytes", 1 << 60)])
def test_a_pool_that_does_not_fit_is_refused_by_the_key_that_asked_for_it(key: str, value: int, tmp_path: Path) -> None:
    config = EngineConfig(device="cpu", **{key: value})  # type: ignore[arg-type]
    loaded = load_model(resolve(str(save_tiny_model("llama", tmp_path)), tmp_path), config)

    with pytest.raises(InvalidConfig, match=rf"engine\.{key}: must leave room for .* GiB, more than cpu"):
        make_pool(config, loaded)


def test_a_pool_that_does_not_fit_since_others_took_memory_meanwhile_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    config = EngineConfig(device="cpu")
    loaded = load_model(resolve(str(save_tiny_model("llama", tmp_path)), tmp_path), config)
    monkeypatch.setattr("engine.runner_setup.PagePool", full)

    with pytest.raises(InvalidConfig, match=r"engine\.gpu_memory_utilization: must .* its engine\.kv_cache_bytes"):
        make_pool(config, loaded)
