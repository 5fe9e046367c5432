"""What does one token cost on this model? Weights and attention, counted on the loaded model itself.

Not read from a catalogue: whatever transformers loaded, its parameters are there to be counted. An input embedding is
looked up and not multiplied; the output head is multiplied for sampled tokens only, so prefill pays it once a prompt
and it is left out of the operations of a token. Of the experts of a mixture a token meets the share that the
configuration says.
"""

from __future__ import annotations

import platform
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from core.compute import ComputeProfile
from engine.cache_layout import CacheLayout
from engine.packed_linear import PackedLinear

_FLOPS = 2  # of one weight and one token: a product and a sum
_NUM_EXPERTS = ("num_local_experts", "num_experts", "n_routed_experts", "moe_num_experts")
_EXPERTS_PER_TOKEN = ("num_experts_per_tok", "num_experts_per_token", "moe_k", "moe_topk", "top_k_experts")


def compute_profile(
    model: PreTrainedModel, layout: CacheLayout, device: torch.device, step_tokens: int
) -> ComputeProfile:
    """Count ``model``, as it lies on ``device``. ``step_tokens``: prompt tokens that a step computes at most.

    Of a model that is divided among ranks this one's part is counted, and taken for each of the others' too.
    """
    output = model.get_output_embeddings()
    head = set() if output is None else set(output.modules())
    num_ranks = layout.num_ranks
    share = expert_share(model.config.get_text_config())
    num_bytes, num_met = 0.0, 0.0
    for name, module in model.named_modules():
        if isinstance(module, nn.Embedding):
            continue
        for count, itemsize, is_matrix in _own_weights(module):
            num_bytes += count * itemsize
            if is_matrix and module not in head:
                num_met += count * (share if "experts" in name.split(".") else 1.0)
    full, windowed = _attention_flops(model, layout)
    return ComputeProfile(
        device=_device_name(device),
        num_devices=num_ranks * (torch.get_num_threads() if device.type == "cpu" else 1),
        weight_bytes=round(num_ranks * num_bytes),
        weight_flops=_FLOPS * num_ranks * num_met + windowed,
        attention_flops=full,
        step_tokens=step_tokens,
    )


def _quantised_size(module: nn.Module) -> tuple[int, int] | None:
    """(elements, bytes) of a linear layer whose weights are kept in another form; None if they are plain."""
    rows, columns = getattr(module, "out_features", None), getattr(module, "in_features", None)
    if not isinstance(rows, int) or not isinstance(columns, int):
        return None
    kept = (*module.parameters(recurse=False), *module.buffers(recurse=False))
    if not kept or any(tensor.numel() == rows * columns and tensor.is_floating_point() for tensor in kept):
        return None
    return rows * columns, sum(tensor.numel() * tensor.element_size() for tensor in kept)


def _own_weights(module: nn.Module) -> Iterator[tuple[int, float, bool]]:
    """Elements, bytes of one, and whether tokens are multiplied by it, of what ``module`` itself holds."""
    if isinstance(module, PackedLinear):  # keeps its weight where parameters() does not find it
        yield module.num_weights, module.itemsize, True
    elif (size := _quantised_size(module)) is not None:
        yield size[0], size[1] / size[0], True
        return
    for parameter in module.parameters(recurse=False):
        yield parameter.numel(), parameter.element_size(), parameter.dim() >= 2


def expert_share(config: Any) -> float:
    """The part of the routed experts that one token meets; 1.0 for a model without."""
    total = next((value for key in _NUM_EXPERTS if isinstance(value := getattr(config, key, None), int)), 0)
    met = next((value for key in _EXPERTS_PER_TOKEN if isinstance(value := getattr(config, key, None), int)), 0)
    return met / total if 0 < met <= total else 1.0


def _attention_flops(model: PreTrainedModel, layout: CacheLayout) -> tuple[float, float]:
    """Of one token for each token that it sees, in layers without a window; of one token, in those with one."""
    num_heads = getattr(model.config.get_text_config(), "num_attention_heads", None)
    full = windowed = 0.0
    for layer in layout.layers:
        heads = num_heads if isinstance(num_heads, int) else layer.num_kv_heads * layout.num_ranks
        pair = float(_FLOPS * heads * (layer.key_dim + layer.value_dim))
        if layer.window is None:
            full += pair
        else:
            windowed += pair * layer.window
    return full, windowed


def _device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return str(torch.cuda.get_device_name(device))
    return f"{device.type} {_processor()}" if device.type == "cpu" else device.type


def _processor() -> str:
    """What the kernel calls this machine's processor."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.machine())
