"""Sizes of published models against published bytes, and what a wrong entry is told."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from cluster.catalogue import AttentionLayers, Catalogue, ModelShape, load_catalogue
from core.errors import InvalidConfig

MIB = 2**20


@pytest.fixture(scope="module")
def catalogue() -> Catalogue:
    return load_catalogue()


def test_every_entry_has_a_source(catalogue: Catalogue) -> None:
    entries = {**catalogue.models, **catalogue.devices}

    assert [name for name, entry in entries.items() if not entry.source] == []
    assert {"a100", "h20", "h100", "h200", "b200"} <= set(catalogue.devices)


@pytest.mark.parametrize(
    ("model", "bytes_per_token"),
    [
        ("minimax-m2.5", 253_952),  # PAPERS.md A.2
        ("qwen3-235b-a22b", 192_512),  # PAPERS.md A.2
        ("kimi-linear-48b", 8_064),  # PAPERS.md A.14
        ("llama-3.1-70b", 320 * 1024),  # Mooncake FAST'25 table 1
        ("llama-3.1-8b", 2 * 32 * 8 * 128 * 2),
    ],
)
def test_bytes_per_token_are_the_published_ones(catalogue: Catalogue, model: str, bytes_per_token: int) -> None:
    shape = catalogue.model(model)

    assert shape.kv_bytes_per_token == bytes_per_token
    assert float(shape.kv_bytes(2000) - shape.kv_bytes(1000)) == pytest.approx(1000 * bytes_per_token)


def test_opt_66b_keeps_1_13_gb_of_512_tokens(catalogue: Catalogue) -> None:
    assert float(catalogue.model("opt-66b").kv_bytes(512)) == pytest.approx(1.13 * 2**30, rel=0.01)  # DistServe 3.3


def test_a_state_does_not_grow(catalogue: Catalogue) -> None:
    """20 KDA layers of 32 heads x 128 x 128 float32, and 36,864 bfloat16 values of convolution each: 41.4 MiB."""
    shape = catalogue.model("kimi-linear-48b")

    assert shape.state_bytes == 20 * (32 * 128 * 128 * 4 + 36_864 * 2)
    assert float(shape.kv_bytes(0)) == shape.state_bytes


def test_a_window_stops_growing() -> None:
    layers = AttentionLayers("window", num_layers=2, num_heads=4, key_dim=8, value_dim=8, num_kv_heads=1, window=100)
    shape = ModelShape(hidden_size=32, num_parameters=1e6, attention=(layers,))

    assert shape.kv_bytes(np.array([50.0, 100.0, 5000.0])).tolist() == [50 * 64, 100 * 64, 100 * 64]
    assert shape.kv_bytes_per_token == 0


def test_prefill_operations_by_hand() -> None:
    """One layer of 2 heads of 8 + 8: 2 P n for the weights, and 2 * 2 * 16 for each pair of tokens that attend."""
    layers = AttentionLayers("full", num_layers=1, num_heads=2, key_dim=8, value_dim=8, num_kv_heads=1)
    shape = ModelShape(hidden_size=16, num_parameters=1000, attention=(layers,))

    assert float(shape.prefill_flops(3)) == 2 * 1000 * 3 + 64 * (1 + 2 + 3)
    assert float(shape.prefill_flops(3, cached_tokens=10)) == 2 * 1000 * 3 + 64 * (11 + 12 + 13)
    assert float(shape.decode_flops(10)) == 2 * 1000 + 64 * 10


def test_a_batch_touches_more_experts() -> None:
    """100 parameters, 28 active of which 8 of 80 expert ones: 20 + 80 * (1 - 0.9^n) touched."""
    layers = AttentionLayers("full", num_layers=1, num_heads=1, key_dim=1, value_dim=1, num_kv_heads=1)
    shape = ModelShape(
        hidden_size=1,
        num_parameters=100,
        num_active_parameters=28,
        num_experts=10,
        num_experts_per_token=1,
        attention=(layers,),
    )

    assert shape.touched_weight_bytes(1) == pytest.approx(28 * 2)
    assert shape.touched_weight_bytes(2) == pytest.approx((20 + 80 * 0.19) * 2)
    assert shape.touched_weight_bytes(1000) == pytest.approx(200)


def test_user_entries_are_added_and_replace(tmp_path: Path, catalogue: Catalogue) -> None:
    mine = tmp_path / "mine.yaml"
    mine.write_text(
        "devices:\n  h20: {tflops: {bfloat16: 100}, memory_gb: 1, memory_bandwidth_gb_s: 2, interconnect_gb_s: 3,"
        " price_per_hour: 2.5}\n"
    )

    merged = load_catalogue(mine)

    assert merged.device("h20").price_per_hour == 2.5
    assert merged.models == catalogue.models
    assert merged.device("h200") == catalogue.device("h200")


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("devices:\n  x:\n    tflops: {bfloat16: -1}\n", "mine.yaml:2: devices.x.memory_gb: is required"),
        (
            "models:\n  m:\n    hiden_size: 3\n",
            "mine.yaml:3: models.m.hiden_size: is not a key, did you mean hidden_size",
        ),
        (
            "models:\n  m:\n    hidden_size: 3\n    num_parameters: 5\n    attention:\n"
            "      - {kind: full, num_layers: 1, num_heads: 1, key_dim: 1, value_dim: 1}\n",
            r"mine.yaml:6: models.m.attention\[0\].num_kv_heads: must be at least 1 for kind full",
        ),
    ],
)
def test_a_wrong_entry_names_file_line_and_key(tmp_path: Path, text: str, complaint: str) -> None:
    mine = tmp_path / "mine.yaml"
    mine.write_text(text)

    with pytest.raises(InvalidConfig, match=complaint):
        load_catalogue(mine)


def test_an_unknown_name_lists_the_known_ones(catalogue: Catalogue) -> None:
    with pytest.raises(InvalidConfig, match=r"must be in the catalogue \(a100, .*h200\), got 'h300'"):
        catalogue.device("h300")


def test_a_dtype_without_a_stated_rate_computes_in_the_slowest(catalogue: Catalogue) -> None:
    assert catalogue.device("a100").flops_per_s("fp8") == 312e12
    assert catalogue.device("h20").flops_per_s("fp8") == 296e12
