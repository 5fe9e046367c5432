"""How long would a published model take on a published device? Two bounds, the slower of which counts.

    prefill      max(operations / compute rate, weights read / memory rate) + all-reduces of tensor parallelism
    decode step  max(operations / compute rate, weights and K/V read / memory rate) + all-reduces

Rates are the maker's peaks times an ``Efficiency``. The defaults are a little under what was measured for an 8B Llama
shape on one H100 (ARCHITECTURE.md section 8): 8,192 tokens in 224 ms are 0.67 of the compute peak, decode steps of
batch 1 to 128 read at 0.76 to 0.79 of the memory peak. A measured profile is better than any of this: plans take one,
and cost_model.py fits one to a live service.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType

import numpy as np

from cluster import cost_model
from cluster.catalogue import Catalogue, DeviceSpec, ModelShape, Numbers
from core.compute import ComputeProfile
from core.errors import InvalidConfig


@dataclass(frozen=True)
class Efficiency:
    """The shares of a device's peaks that are sustained.

    compute: of the dense compute rate, in prefill and decode.
    memory: of the memory bandwidth.
    interconnect: of the bandwidth between the devices of an instance.
    """

    compute: float = 0.6
    memory: float = 0.75
    interconnect: float = 0.6

    def __post_init__(self) -> None:
        for name in ("compute", "memory", "interconnect"):
            value = getattr(self, name)
            if not 0 < value <= 1:
                raise InvalidConfig(name, f"must be above 0 and at most 1, got {value!r}")


@dataclass(frozen=True)
class Instance:
    """One copy of a model on ``num_gpus`` devices in tensor parallel (attention and experts divided evenly)."""

    model: ModelShape
    device: DeviceSpec
    num_gpus: int
    efficiency: Efficiency = Efficiency()
    overhead_s: float = 0.0  # of each step, whatever its size: launches, sampling, scheduling

    @property
    def flops_per_s(self) -> float:
        """The compute rate of all devices, in the weights' dtype."""
        rate = self.device.flops_per_s(self.model.weights_dtype)
        return self.num_gpus * rate * self.efficiency.compute

    @property
    def bytes_per_s(self) -> float:
        """The memory rate of all devices."""
        return self.num_gpus * self.device.memory_bandwidth_gb_s * 1e9 * self.efficiency.memory

    def prefill_s(self, tokens: Numbers | float, cached_tokens: float = 0.0) -> Numbers:
        """Seconds of the prefill of ``tokens`` new tokens, alone, behind ``cached_tokens`` cached ones."""
        compute = self.model.prefill_flops(tokens, cached_tokens) / self.flops_per_s
        weights = self.model.weight_bytes() / self.bytes_per_s
        return np.maximum(compute, weights) + self._all_reduce_s(tokens) + self.overhead_s

    def decode_step_s(self, batch_size: float, context_tokens: float) -> float:
        """Seconds of a step that makes one token for each of ``batch_size`` sequences of ``context_tokens`` each."""
        compute = batch_size * float(self.model.decode_flops(context_tokens)) / self.flops_per_s
        weights = self.model.touched_weight_bytes(batch_size)
        kv_bytes = batch_size * float(self.model.kv_bytes(context_tokens))
        memory = (weights + kv_bytes) / self.bytes_per_s
        return max(compute, memory) + float(self._all_reduce_s(batch_size)) + self.overhead_s

    def step_s(self, chunks: Sequence[tuple[int, int]], batch_size: int, context_tokens: int) -> float:
        """Seconds of a step over parts of prompts, as (tokens, tokens before them), and over one token for each of
        ``batch_size`` sequences of ``context_tokens`` together."""
        num_tokens = batch_size + sum(tokens for tokens, _ in chunks)
        flops = sum(float(self.model.prefill_flops(tokens, before)) for tokens, before in chunks)
        num_bytes = self.model.touched_weight_bytes(num_tokens)
        if batch_size:
            context = context_tokens / batch_size
            flops += batch_size * float(self.model.decode_flops(context))
            num_bytes += batch_size * float(self.model.kv_bytes(context))
        seconds = max(flops / self.flops_per_s, num_bytes / self.bytes_per_s)
        return seconds + float(self._all_reduce_s(num_tokens)) + self.overhead_s

    def kv_capacity_bytes(self, reserve: float = 0.1) -> float:
        """Bytes for K/V beside the weights, ``reserve`` of the memory left free; negative: the weights do not fit."""
        return self.num_gpus * self.device.memory_gb * 1e9 * (1 - reserve) - self.model.weight_bytes()

    def max_batch_size(self, context_tokens: float, tpot_s: float) -> int:
        """The largest batch whose K/V fits and whose step takes at most ``tpot_s``; 0: not even one sequence."""
        fits = int(max(0.0, self.kv_capacity_bytes()) // max(1.0, float(self.model.kv_bytes(context_tokens))))
        low, high = 0, fits
        while low < high:  # a step's time grows with the batch
            middle = (low + high + 1) // 2
            low, high = (middle, high) if self.decode_step_s(middle, context_tokens) <= tpot_s else (low, middle - 1)
        return low

    def live(self) -> cost_model.Roofline:
        """The same bounds as the linear coefficients at which cost_model.py begins."""
        one_pair = float(self.model.prefill_flops(1.0, 1.0) - self.model.prefill_flops(1.0, 0.0))
        return cost_model.Roofline(
            weight_flops=2 * self.model.active_parameters,
            attention_flops=one_pair,
            weight_bytes=self.model.weight_bytes(),
            kv_bytes_per_token=self.model.kv_bytes_per_token,
            flops_per_s=self.flops_per_s,
            bytes_per_s=self.bytes_per_s,
        )

    def _all_reduce_s(self, tokens: Numbers | float) -> Numbers:
        """Two ring all-reduces of the residual stream in each layer: each device sends 2 (n-1)/n of it."""
        num_bytes = np.asarray(tokens, dtype=float) * self.model.hidden_size * 2  # activations are 16-bit
        sent = 2 * (self.num_gpus - 1) / self.num_gpus * num_bytes
        rate = self.device.interconnect_gb_s * 1e9 * self.efficiency.interconnect
        return np.asarray(2 * self.model.num_layers * sent / rate)


# Where the catalogue does not know a live device, its sustained rates are taken to be these. CPU: what SmolLM2-135M
# reached on two cores with AMX (ARCHITECTURE.md section 8: prefill of 2,700 tokens/s in bfloat16 and 1,000 in float32,
# 270 MB of weights read in 30 ms). Any other: about a third of an A100.
CPU_FLOPS_PER_THREAD: Mapping[str, float] = MappingProxyType({"bfloat16": 2.5e11})
CPU_FLOPS_PER_THREAD_OTHERWISE = 1e11
CPU_BYTES_PER_S = 1e10
UNKNOWN_FLOPS_PER_S = 1e14
UNKNOWN_BYTES_PER_S = 7e11


def of_engine(
    compute: ComputeProfile, dtype: str, kv_bytes_per_token: float, catalogue: Catalogue, efficiency: Efficiency
) -> cost_model.Roofline:
    """Where the costs of a live engine begin, before anything was measured: what it says of its model, on its device
    as the catalogue knows it, or else on the rates above."""
    device = _known_device(compute.device, catalogue)
    if device is not None:
        flops_per_s = compute.num_devices * device.flops_per_s(dtype) * efficiency.compute
        bytes_per_s = compute.num_devices * device.memory_bandwidth_gb_s * 1e9 * efficiency.memory
    elif compute.device.startswith("cpu"):
        flops_per_s = compute.num_devices * CPU_FLOPS_PER_THREAD.get(dtype, CPU_FLOPS_PER_THREAD_OTHERWISE)
        bytes_per_s = CPU_BYTES_PER_S
    else:
        flops_per_s, bytes_per_s = UNKNOWN_FLOPS_PER_S, UNKNOWN_BYTES_PER_S
    return cost_model.Roofline(
        weight_flops=compute.weight_flops,
        attention_flops=compute.attention_flops,
        weight_bytes=compute.weight_bytes,
        kv_bytes_per_token=kv_bytes_per_token,
        flops_per_s=flops_per_s,
        bytes_per_s=bytes_per_s,
    )


def _known_device(name: str, catalogue: Catalogue) -> DeviceSpec | None:
    """The catalogue's entry whose name is a word of what the driver says: ``NVIDIA H100 80GB HBM3`` is ``h100``."""
    words = re.split(r"[^a-z0-9]+", name.lower())
    return next((spec for known, spec in sorted(catalogue.devices.items()) if known.lower() in words), None)
