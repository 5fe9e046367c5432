"""What is the least time that a step could take on this device? Two measured rates, and what the model must do.

Bandwidth is the better of a copy of 2 GiB (read and written bytes) and a sum of as many (read alone, as decode reads);
the multiplication rate is that of 8192 x 8192 x 8192 in bfloat16. Medians, of random data.

A decode step of a mixture reads the experts that one of its tokens meets. They are counted on the model that is
measured (``experts_met``): random tokens through random weights do not spread evenly.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn.modules.module import register_module_forward_pre_hook

from core.clock import WallClock
from engine.engine import Engine

_REPEATS = 9


@dataclass(frozen=True)
class Floors:
    """Measured rates of one device."""

    copy_bytes_per_s: float
    read_bytes_per_s: float
    flops_per_s: float

    @property
    def bytes_per_s(self) -> float:
        """What floors are taken from: the better of the two."""
        return max(self.copy_bytes_per_s, self.read_bytes_per_s)

    @property
    def figures(self) -> dict[str, float]:
        """For the report."""
        return {
            "copy_tb_per_s": self.copy_bytes_per_s / 1e12,
            "read_tb_per_s": self.read_bytes_per_s / 1e12,
            "matmul_tflops": self.flops_per_s / 1e12,
        }

    @property
    def text(self) -> str:
        """One line."""
        copy, read, flops = self.figures.values()
        return f"copy {copy:.2f} TB/s, read {read:.2f} TB/s, matmul {flops:.0f} TFLOP/s"


def measure_floors(device: torch.device, scale: float = 1.0) -> Floors:
    """``scale``: of the sizes, where they would take too long."""
    num_elements = int((1 << 30) * scale)
    source = torch.randn(num_elements, device=device, dtype=torch.bfloat16)
    target = torch.empty_like(source)
    copy_s = _seconds(lambda: target.copy_(source), device)
    read_s = _seconds(source.sum, device)
    side = int(8192 * scale**0.5)
    left, right = (torch.randn(side, side, device=device, dtype=torch.bfloat16) for _ in range(2))
    product_s = _seconds(lambda: left @ right, device)
    return Floors(2 * source.nbytes / copy_s, source.nbytes / read_s, 2 * side**3 / product_s)


def _seconds(run: Callable[[], object], device: torch.device) -> float:
    clock = WallClock()
    for _ in range(3):
        run()
    times = []
    for _ in range(_REPEATS):
        _wait(device)
        began_at = clock.now()
        run()
        _wait(device)
        times.append(clock.now() - began_at)
    return statistics.median(times)


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


@dataclass(frozen=True)
class ModelCost:
    """What a step of one model must compute and read."""

    weight_bytes: int  # embedding not counted: a row of it is looked up
    weight_flops: float  # of one token, the head apart
    head_flops: float  # of one sampled token
    attention_flops: float  # of one pair of tokens
    kv_token_bytes: int

    @classmethod
    def of(cls, engine: Engine) -> ModelCost:
        """As the engine counted its model (engine/model_costs.py)."""
        compute = engine.model.compute
        # Whatever a step reads beside what every token is multiplied by is the head (and a few norms).
        head = 2 * (compute.weight_bytes / engine.pool.pages(0).element_size() - compute.weight_flops / 2)
        return cls(
            compute.weight_bytes, compute.weight_flops, head, compute.attention_flops, engine.layout.bytes_per_token
        )

    def prefill_flops(self, lengths: Sequence[int]) -> float:
        """Each token meets the weights and half of its prompt; each prompt's last one the head."""
        pairs = sum(length * (length + 1) / 2 for length in lengths)
        return sum(lengths) * self.weight_flops + len(lengths) * self.head_flops + pairs * self.attention_flops

    def decode_bytes(self, batch: int, context: int, unmet_bytes: float = 0.0) -> float:
        """Every weight once, but for ``unmet_bytes`` of experts, and the K/V of every sequence."""
        return self.weight_bytes - unmet_bytes + batch * context * self.kv_token_bytes


def unmet_bytes(config: Mapping[str, Any], met: float) -> float:
    """Weights of the experts of a mixture that a step does not read, if in each layer it meets ``met`` of them."""
    expert_weights: int = 3 * config["hidden_size"] * config["moe_intermediate_size"] * config["num_hidden_layers"]
    itemsize: int = getattr(torch, config["torch_dtype"]).itemsize
    num_unmet: float = config["num_experts"] - met
    return num_unmet * expert_weights * itemsize


def experts_met(batch: int, run: Callable[[], object]) -> float:
    """Experts of a layer that steps of ``batch`` tokens meet, on average over those that ``run`` computes; they must be
    launched, not captured."""
    counts: list[int] = []

    def count(module: torch.nn.Module, args: tuple[torch.Tensor, ...]) -> None:
        if hasattr(type(module), "_apply_gate") and len(args[1]) == batch:  # experts, and whom each token meets
            counts.append(len(set(args[1].flatten().tolist())))

    hook = register_module_forward_pre_hook(count)
    try:
        with torch.compiler.set_stance("force_eager"):
            run()
    finally:
        hook.remove()
    return statistics.fmean(counts)
