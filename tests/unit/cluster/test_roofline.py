"""Seconds by hand on a device of round numbers, and against what was measured on an H100."""

from __future__ import annotations

from dataclasses import replace

import pytest

from cluster.catalogue import AttentionLayers, DeviceSpec, ModelShape, load_catalogue
from cluster.roofline import Efficiency, Instance, of_engine
from core.compute import ComputeProfile
from core.errors import InvalidConfig

# 1e9 parameters; 1 TFLOPS: 2 GB of weights over 100 GB/s are 20 ms.
SHAPE = ModelShape(
    hidden_size=1000,
    num_parameters=1e9,
    attention=(AttentionLayers("full", num_layers=1, num_heads=1, key_dim=500, value_dim=500, num_kv_heads=1),),
)
DEVICE = DeviceSpec(tflops={"bfloat16": 1}, memory_gb=4, memory_bandwidth_gb_s=100, interconnect_gb_s=1)
ONE = Instance(SHAPE, DEVICE, 1, Efficiency(1, 1, 1))


def test_a_short_prefill_reads_the_weights_and_a_long_one_computes() -> None:
    assert float(ONE.prefill_s(1)) == pytest.approx(0.02)
    assert float(ONE.prefill_s(1000)) == pytest.approx((2e12 + 2000 * 1000 * 1001 / 2) / 1e12)


def test_a_decode_step_reads_weights_and_cache() -> None:
    """Batch 10 of 1,000 tokens: 2 GB + 10 * 1,000 * 2,000 B over 100 GB/s."""
    assert ONE.decode_step_s(10, 1000) == pytest.approx((2e9 + 2e7) / 100e9)


def test_tensor_parallel_divides_the_work_and_pays_for_all_reduces() -> None:
    """Two all-reduces of 1,000 tokens x 1,000 x 2 B, of which each of two devices sends all, at 1 GB/s: 4 ms."""
    two = replace(ONE, num_gpus=2)

    assert float(two.prefill_s(1000)) == pytest.approx(float(ONE.prefill_s(1000)) / 2 + 4e-3)


def test_the_batch_is_bounded_by_memory_and_by_tpot() -> None:
    """4 GB - 10 % - 2 GB of weights hold 800 sequences of 2 MB; 21 ms are enough to compute 10 of them."""
    assert ONE.max_batch_size(1000, tpot_s=10) == 800
    assert ONE.max_batch_size(1000, tpot_s=0.02101) == 10
    assert ONE.max_batch_size(1000, tpot_s=0.019) == 0
    assert replace(ONE, device=replace(DEVICE, memory_gb=2)).max_batch_size(1, tpot_s=10) == 0


def test_the_default_efficiency_is_within_a_fifth_of_the_measured_h100() -> None:
    """ARCHITECTURE.md section 8: 8,192 tokens 224 ms, steps of batch 1 and 64 at 1,024 6.75 and 10.3 ms."""
    catalogue = load_catalogue()
    h100 = Instance(catalogue.model("llama-3.1-8b"), catalogue.device("h100"), 1)

    assert float(h100.prefill_s(8192)) == pytest.approx(0.224, rel=0.2)
    assert h100.decode_step_s(1, 1024) == pytest.approx(6.75e-3, rel=0.2)
    assert h100.decode_step_s(64, 1024) == pytest.approx(10.3e-3, rel=0.2)


def test_the_live_cost_model_begins_at_the_same_seconds() -> None:
    live = ONE.live()
    weights_s, per_token_s, per_pair_s = live.prefill()

    assert weights_s == pytest.approx(0.02)
    assert per_token_s * 1000 + per_pair_s * 1000 * 1001 / 2 == pytest.approx(float(ONE.prefill_s(1000)))


def test_an_efficiency_is_a_share() -> None:
    with pytest.raises(InvalidConfig, match=r"memory: must be above 0 and at most 1, got 1.5"):
        Efficiency(memory=1.5)


LIVE = ComputeProfile("", 2, weight_bytes=10**9, weight_flops=2e9, attention_flops=1e5, step_tokens=512)


@pytest.mark.parametrize(
    ("name", "flops_per_s", "bytes_per_s"),
    [
        ("NVIDIA H100 80GB HBM3", 2 * 989.4e12 * 0.6, 2 * 3350e9 * 0.75),
        ("NVIDIA H20", 2 * 148e12 * 0.6, 2 * 4000e9 * 0.75),
        ("NVIDIA A100-SXM4-80GB", 2 * 312e12 * 0.6, 2 * 2039e9 * 0.75),
        ("cpu Intel(R) Xeon(R) Processor", 2 * 2.5e11, 1e10),
        ("NVIDIA GeForce RTX 9090", 1e14, 7e11),
    ],
)
def test_a_live_engine_begins_at_its_device_or_at_an_assumption(
    name: str, flops_per_s: float, bytes_per_s: float
) -> None:
    roofline = of_engine(replace(LIVE, device=name), "bfloat16", 1000, load_catalogue(), Efficiency())

    assert (roofline.flops_per_s, roofline.bytes_per_s) == pytest.approx((flops_per_s, bytes_per_s))
    assert (roofline.weight_flops, roofline.attention_flops) == (2e9, 1e5)
    assert (roofline.weight_bytes, roofline.kv_bytes_per_token) == (10**9, 1000)


def test_a_cpu_is_slower_in_float32() -> None:
    roofline = of_engine(replace(LIVE, device="cpu Xeon"), "float32", 1000, load_catalogue(), Efficiency())
    assert roofline.flops_per_s == 2 * 1e11
