"""Why is one matrix product better than three? On a GPU a decode step reads every weight once, and a large product
reads faster than small ones; each product is a launch besides.

Projections of one input (q, k and v; gate and up) become slices of one product, with the model's code as it is: the
first of them to be called with an input computes for all, the last one forgets it. Called with different inputs each
computes for itself, which is slower and still right.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn
from torch.nn.functional import linear

from engine.packed_linear import is_plain_linear

# Names under which transformers' models keep projections of one input.
_GROUPS = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))


class MergedLinear(nn.Module):
    """The weights of several linear layers, one below the other. Not called itself: its ``LinearSlice``s are."""

    def __init__(self, linears: Sequence[nn.Linear]) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.cat([part.weight.detach() for part in linears]), requires_grad=False)
        biases = [part.bias.detach() for part in linears if part.bias is not None]
        self.bias = nn.Parameter(torch.cat(biases), requires_grad=False) if biases else None
        self._num_parts = len(linears)
        self._num_left = 0  # slices that have not taken their part of ``_output`` yet
        self._input: torch.Tensor | None = None
        self._output: torch.Tensor | None = None

    def take(self, x: torch.Tensor) -> torch.Tensor:
        """The product with ``x``, for one of the slices."""
        if self._input is not x or self._output is None:
            self._input, self._output, self._num_left = x, linear(x, self.weight, self.bias), self._num_parts
        output = self._output
        self._num_left -= 1
        if self._num_left == 0:
            self._input = self._output = None
        return output


class LinearSlice(nn.Module):
    """Stands where one of the merged layers stood."""

    def __init__(self, merged: MergedLinear, first: int, linear_layer: nn.Linear) -> None:
        super().__init__()
        self.in_features = linear_layer.in_features
        self.out_features = linear_layer.out_features
        self._merged = (merged,)  # in a tuple: the module is its parent's child, not each slice's
        self._rows = slice(first, first + linear_layer.out_features)

    @property
    def weight(self) -> torch.Tensor:
        """The layer's own weight, [out_features, in_features]; a view."""
        return self._merged[0].weight[self._rows]

    @property
    def bias(self) -> torch.Tensor | None:
        """The layer's own bias; a view."""
        bias = self._merged[0].bias
        return None if bias is None else bias[self._rows]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[..., in_features] -> [..., out_features], not contiguous."""
        return self._merged[0].take(x)[..., self._rows]


def merge_projections(model: nn.Module) -> int:
    """Merge what can be merged, in place; how many products are saved."""
    num_saved = 0
    for parent in list(model.modules()):
        for names in _GROUPS:
            parts = [getattr(parent, name, None) for name in names]
            linears = [part for part in parts if isinstance(part, nn.Linear) and is_plain_linear(part)]
            if len(linears) != len(names) or not _alike(linears):
                continue
            merged = MergedLinear(linears)
            parent.add_module(f"merged_{names[0]}", merged)
            first = 0
            for name, part in zip(names, linears, strict=True):
                setattr(parent, name, LinearSlice(merged, first, part))
                first += part.out_features
            num_saved += len(names) - 1
    return num_saved


def _alike(linears: Sequence[nn.Linear]) -> bool:
    first = linears[0]
    return all(
        part.in_features == first.in_features
        and part.weight.dtype == first.weight.dtype
        and part.weight.device == first.weight.device
        and (part.bias is None) == (first.bias is None)
        for part in linears
    )
