"""Which part of a transformers model is on which rank? What the model's own tensor-parallel plan says.

A plan (``base_model_tp_plan`` of the configuration, ``_tp_plan`` of the model class; together ``model.tp_plan``) gives
names of modules and parameters a style. They are served as plain tensors and modules, so that packed, merged and
compiled layers work on a slice as on the whole:

    colwise                  a linear layer with this rank's rows of the weight; its output is this rank's heads
    rowwise                  a linear layer with this rank's columns; outputs are added up over the ranks
    colwise_gather_output    this rank's rows; outputs are put side by side (the output head)
    packed_colwise           as colwise, of two weights packed into one (gate and up of experts)
    moe_tp_experts           outputs of the module are added up

Everything else, norms and embeddings too, is on every rank: an embedding is looked up and not multiplied, and to divide
it would cost a collective for each step. Invariants: slices are equal (a degree that does not divide is refused), and
every layer's keys and values are divided by heads, rank r holding the r-th run of them.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn
from torch.distributed.tensor import DTensor

from core.errors import InvalidConfig, UnsupportedModel
from engine.rank_group import RankGroup, join_over_ranks, sum_over_ranks

logger = logging.getLogger(__name__)

_ROWS = frozenset({"colwise", "colwise_gather_output", "colwise_rep"})
_GATHERED = frozenset({"colwise_gather_output", "colwise_rep"})
_SUMMED = frozenset({"moe_tp_experts", "all_reduce"})
_WHOLE = frozenset(
    {
        "replicate",
        "replicated_with_grad_allreduce",  # norms of heads: in inference they are norms
        "local_params",
        "mla_kv_a_proj",
        "embedding_rowwise",
        "embedding_colwise",
    }
)
# Names of the layers of which keys and values come; one of these sets must be divided by heads.
_KEY_PROJECTIONS = (frozenset({"k_proj", "v_proj"}), frozenset({"kv_b_proj"}))


class SummedLinear(nn.Module):
    """A linear layer of which each rank has some columns."""

    def __init__(self, part: nn.Linear) -> None:
        """``part``: with this rank's columns. Its bias is added once, to the sum."""
        super().__init__()
        self.bias = part.bias
        part.register_parameter("bias", None)
        self.linear = part

    @property
    def weight(self) -> torch.Tensor:
        """This rank's columns, [out_features, in_features / ranks]."""
        return self.linear.weight

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[..., in_features / ranks] -> [..., out_features], the same on every rank."""
        summed = sum_over_ranks(self.linear(x))
        return summed if self.bias is None else summed + self.bias


class JoinedLinear(nn.Module):
    """A linear layer of which each rank has some rows, and whose output every rank wants whole."""

    def __init__(self, part: nn.Linear) -> None:
        super().__init__()
        self.linear = part

    @property
    def weight(self) -> torch.Tensor:
        """This rank's rows, [out_features / ranks, in_features]."""
        return self.linear.weight

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[..., in_features] -> [..., out_features], the same on every rank."""
        return join_over_ranks(self.linear(x))


def require_degree(config: Any, size: int) -> None:
    """Raise ``InvalidConfig`` if a model of that configuration cannot be divided among ``size`` ranks."""
    text_config = config.get_text_config()
    for name, what in (("num_attention_heads", "attention heads"), ("num_key_value_heads", "key/value heads")):
        count = getattr(text_config, name, None)
        if isinstance(count, int) and count % size:
            raise InvalidConfig("tensor_parallel", f"must divide the model's {count} {what}, got {size}")


def loading_options(group: RankGroup, device: torch.device) -> dict[str, Any]:
    """What makes ``from_pretrained`` read this rank's slices only, where transformers can; else it reads everything,
    which costs host memory, and ``shard_model`` cuts it."""
    accelerator = torch.accelerator.current_accelerator()
    if device.type != ("cpu" if accelerator is None else accelerator.type):
        return {}  # transformers divides models on the accelerator alone, if there is one
    try:
        from transformers.distributed.configuration_utils import DistributedConfig
    except ImportError:
        logger.info("this transformers cannot read slices of a model: rank %d reads all of it", group.rank)
        return {}
    return {"distributed_config": DistributedConfig(tp_size=group.size)}


def shard_model(model: Any, group: RankGroup) -> None:
    """Leave of ``model`` what this rank computes, in place; on the way parameters may be whole or transformers'
    own ``DTensor`` slices. Raises ``UnsupportedModel`` for a model without a plan or with one that is not served."""
    plan: Mapping[str, str] = model.tp_plan or {}
    if not plan:
        raise UnsupportedModel(f"{type(model).__name__} has no tensor-parallel plan in transformers")
    _require_divided_heads(model, plan)
    for name, module in list(model.named_modules()):
        style = plan.get(_generic(name))
        for parameter_name, parameter in list(module.named_parameters(recurse=False)):
            own = plan.get(_generic(f"{name}.{parameter_name}"))
            if own is None and isinstance(module, nn.Linear | nn.Embedding):
                own = style
            setattr(module, parameter_name, _slice(f"{name}.{parameter_name}", parameter, own, group))
        if style is not None:
            module.__dict__.pop("forward", None)  # transformers' own, made for DTensors
            _replace(model, name, module, style)


def _replace(model: Any, name: str, module: nn.Module, style: str) -> None:
    """Have a module whose parameters are slices compute what the whole would."""
    if style in _WHOLE:
        return
    if style in _SUMMED:
        module.register_forward_hook(lambda _, __, output: sum_over_ranks(output))
        return
    if not isinstance(module, nn.Linear) or not (style in _ROWS or style.startswith("rowwise")):
        raise UnsupportedModel(f"{name}: its tensor-parallel plan asks for {style}, which is not served")
    module.out_features, module.in_features = module.weight.shape
    if style == "colwise":
        return
    replacement = JoinedLinear(module) if style in _GATHERED else SummedLinear(module)
    parent, _, own_name = name.rpartition(".")
    setattr(model.get_submodule(parent), own_name, replacement)


def _slice(name: str, parameter: nn.Parameter, style: str | None, group: RankGroup) -> nn.Parameter:
    if isinstance(parameter, DTensor):
        if style is not None and style.startswith("embedding_"):
            return nn.Parameter(parameter.full_tensor(), requires_grad=False)
        return nn.Parameter(parameter.to_local().contiguous(), requires_grad=False)
    if style is None or style in _WHOLE or style in _SUMMED:
        return parameter
    is_bias = name.endswith(".bias")
    if style in _ROWS:
        part = _part(name, parameter, parameter.dim() - (1 if parameter.dim() == 1 else 2), group)
    elif style == "packed_colwise":
        dim = max(0, parameter.dim() - 2)
        part = torch.cat([_part(name, half, dim, group) for half in parameter.chunk(2, dim)], dim)
    elif style.startswith("rowwise"):
        if is_bias:
            return parameter
        part = _part(name, parameter, parameter.dim() - 1, group)
    else:
        raise UnsupportedModel(f"{name}: its tensor-parallel plan asks for {style}, which is not served")
    return nn.Parameter(part.detach().clone(), requires_grad=False)


def _part(name: str, tensor: torch.Tensor, dim: int, group: RankGroup) -> torch.Tensor:
    size = tensor.shape[dim]
    if size % group.size:
        raise InvalidConfig("tensor_parallel", f"must divide {name}'s {size} rows or columns, got {group.size}")
    return tensor.narrow(dim, group.rank * (size // group.size), size // group.size)


def _require_divided_heads(model: Any, plan: Mapping[str, str]) -> None:
    """K/V heads must be divided: else every rank would store all of them, and pools could not be told apart."""
    names = {_generic(name) for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    whole = {name.rpartition(".")[2] for name in names if plan.get(name) != "colwise"}
    divided = {name.rpartition(".")[2] for name in names if plan.get(name) == "colwise"} - whole
    if not any(projections <= divided for projections in _KEY_PROJECTIONS):
        raise UnsupportedModel(
            f"{type(model).__name__}: its tensor-parallel plan in transformers does not divide keys and values by heads"
        )


def _generic(name: str) -> str:
    """As plans name it: ``model.layers.3.mlp`` is ``model.layers.*.mlp``."""
    return re.sub(r"\.\d+(?=\.|$)", ".*", name)
