"""Why does a decode step on CPU multiply by weights that are laid out anew? Because it is memory-bound, and plain ones
are repacked in every call.

``nn.Linear`` hands oneDNN a row-major weight, which it reorders into blocks each time. Packing once takes a third off
a decode step's matrix products (SmolLM2-135M in bfloat16, one thread, batch 1 / 8 / 32: 28 / 34 / 56 ms to
18 / 19 / 41 ms); prefill gains nothing and loses nothing. Sums may be taken in another order: outputs compared equal in
bfloat16 and differed by up to 2e-6 in float32, so plain and packed models are not to be called bit-identical.

The two operators are what torch's own inductor uses for frozen CPU weights. They are private to torch, so a torch
without them, or a processor on which they do not run, leaves the model as it is.
"""

from __future__ import annotations

import torch
from torch import nn

_DTYPES = (torch.bfloat16, torch.float32)


class PackedLinear(nn.Module):
    """An ``nn.Linear`` for inference whose weight only oneDNN can read. Takes over the bias, not the weight."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.in_features = linear.in_features
        self.out_features = linear.out_features
        self.bias = linear.bias
        self._packed: torch.Tensor = torch.ops.mkldnn._reorder_linear_weight(linear.weight.detach(), None)

    @property
    def num_weights(self) -> int:
        """Elements of the weight."""
        return self.in_features * self.out_features

    @property
    def itemsize(self) -> int:
        """Bytes of one of them."""
        return self._packed.element_size()

    @property
    def weight(self) -> torch.Tensor:
        """A plain copy, [out_features, in_features], for model code that asks for it; made at every call."""
        return self._packed.to_dense()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[..., in_features] -> [..., out_features]."""
        out: torch.Tensor = torch.ops.mkldnn._linear_pointwise(x, self._packed, self.bias, "none", [], "")
        return out


def pack_linears(model: nn.Module) -> int:
    """Replace every plain ``nn.Linear`` of a CPU model by a packed one; how many were replaced.

    A weight that is shared with an embedding stays there and is packed as a copy.
    """
    works = {dtype for dtype in _DTYPES if operators_work(dtype)}
    found = [
        (parent, name, child)
        for parent in model.modules()
        for name, child in parent.named_children()
        if type(child) is nn.Linear and child.weight.device.type == "cpu" and child.weight.dtype in works
    ]
    for parent, name, linear in found:
        setattr(parent, name, PackedLinear(linear))
    return len(found)


def operators_work(dtype: torch.dtype) -> bool:
    """Can this torch, on this processor, pack weights of that type? bfloat16 takes AVX-512 or AVX-NE-CONVERT."""
    probe = torch.ones(1, 16, dtype=dtype)
    try:
        packed = torch.ops.mkldnn._reorder_linear_weight(probe.expand(16, 16).contiguous(), None)
        out = torch.ops.mkldnn._linear_pointwise(probe, packed, None, "none", [], "")
    except (AttributeError, RuntimeError):
        return False
    return bool((out == 16).all())
