"""Why does a step on CPU multiply by weights that are laid out anew? Because plain ones are repacked in every call, and
because processors differ in the types that they can multiply.

``nn.Linear`` hands oneDNN a row-major weight, which it reorders into blocks each time. Packing once takes a third off
a decode step's matrix products (SmolLM2-135M in bfloat16, one thread, batch 1 / 8 / 32: 28 / 34 / 56 ms to
18 / 19 / 41 ms); prefill gains nothing and loses nothing. Sums may be taken in another order: outputs compared equal in
bfloat16 and differed by up to 2e-6 in float32, so plain and packed models are not to be called bit-identical.

A processor without AVX-512 or AVX-NE-CONVERT has no oneDNN product in bfloat16, and torch's own loop takes ten times
as long as float32. There the weight is packed in float32 and the product taken in float32 between two casts. That is
what a product in bfloat16 means anywhere: exact products, sums in float32, one rounding at the end. The weight then
takes twice its bytes.

The two operators are what torch's own inductor uses for frozen CPU weights. They are private to torch, so a torch
without them leaves the model as it is. Compiled layers (compiled_layers.py) cannot hold a weight that only oneDNN can
read: for them the product is an operator, ``prfaas::packed_linear``, that finds the layer by a number in a tensor.
"""

from __future__ import annotations

from functools import cache
from typing import Any, TypeGuard
from weakref import WeakValueDictionary

import torch
from torch import nn

_DTYPES = (torch.bfloat16, torch.float16, torch.float32)
_NUMBER = "prfaas_packed"  # the buffer with the layer's number


class PackedLinear(nn.Module):
    """An ``nn.Linear`` for inference whose weight only oneDNN can read. Takes over the bias, not the weight."""

    def __init__(self, linear: nn.Linear, compute_dtype: torch.dtype | None = None) -> None:
        """``compute_dtype``: of the product, if not the weight's own."""
        super().__init__()
        self.in_features = linear.in_features
        self.out_features = linear.out_features
        self._compute_dtype = compute_dtype or linear.weight.dtype
        self._dtype = linear.weight.dtype
        bias = linear.bias
        self.bias = bias if bias is None or compute_dtype is None else nn.Parameter(bias.to(compute_dtype), False)
        weight = linear.weight.detach().to(self._compute_dtype)
        self._packed: torch.Tensor = torch.ops.mkldnn._reorder_linear_weight(weight, None)
        number = next(n for n in range(len(_LAYERS) + 1) if n not in _LAYERS)
        _LAYERS[number] = self
        self.register_buffer(_NUMBER, torch.tensor(number), persistent=False)

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
        return self._packed.to_dense().to(self._dtype)

    def multiply(self, x: torch.Tensor) -> torch.Tensor:
        """[..., in_features] -> [..., out_features], both of the type that it computes in."""
        out: torch.Tensor = torch.ops.mkldnn._linear_pointwise(x, self._packed, self.bias, "none", [], "")
        return out

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[..., in_features] -> [..., out_features]."""
        wide = x.to(self._compute_dtype)
        if torch.compiler.is_compiling():
            out: torch.Tensor = torch.ops.prfaas.packed_linear(wide, getattr(self, _NUMBER), self.out_features)
        else:
            out = self.multiply(wide)
        return out.to(x.dtype)


_LAYERS: WeakValueDictionary[int, PackedLinear] = WeakValueDictionary()  # operators take tensors and numbers only

# Not ``torch.library.custom_op``: what that adds to a call is a fifth of a decode step of one sequence.
_LIBRARY: Any = torch.library.Library("prfaas", "FRAGMENT")  # type: ignore[no-untyped-call]
_LIBRARY.define("packed_linear(Tensor x, Tensor number, int out_features) -> Tensor")


def _packed_linear(x: torch.Tensor, number: torch.Tensor, out_features: int) -> torch.Tensor:
    return _LAYERS[int(number)].multiply(x)


def _packed_linear_shape(x: torch.Tensor, number: torch.Tensor, out_features: int) -> torch.Tensor:
    return x.new_empty(*x.shape[:-1], out_features)


_LIBRARY.impl("packed_linear", _packed_linear, "CPU")
torch.library.register_fake("prfaas::packed_linear", _packed_linear_shape, lib=_LIBRARY)


def pack_linears(model: nn.Module) -> int:
    """Replace every plain ``nn.Linear`` of a CPU model by a packed one; how many were replaced.

    A weight that is shared with an embedding stays there and is packed as a copy.
    """
    found: list[tuple[nn.Module, str, nn.Linear, torch.dtype | None]] = [
        (parent, name, child, _compute_dtype(child.weight.dtype))
        for parent in model.modules()
        for name, child in parent.named_children()
        if is_plain_linear(child) and child.weight.device.type == "cpu"
    ]
    num_packed = 0
    while found:  # a plain weight goes as soon as it is packed, so both are there for one layer at a time
        parent, name, linear, dtype = found.pop()
        if dtype is not None:
            setattr(parent, name, PackedLinear(linear, dtype))
            num_packed += 1
    return num_packed


def is_plain_linear(module: nn.Module | None) -> TypeGuard[nn.Linear]:
    """Is it a linear layer and nothing else? Libraries for quantised weights put their own class, tensor or forward in
    its place, or hooks on it."""
    return (
        type(module) is nn.Linear
        and type(module.weight) is nn.Parameter
        and type(module.weight.data) is torch.Tensor
        and module.weight.is_floating_point()
        and "forward" not in vars(module)
        and not hasattr(module, "quantization_scheme")
        and not module._forward_pre_hooks
        and not module._forward_hooks
    )


def _compute_dtype(dtype: torch.dtype) -> torch.dtype | None:
    """In what weights of that type are multiplied here; None: not by a packed layer."""
    if dtype not in _DTYPES:
        return None
    return next((candidate for candidate in (dtype, torch.float32) if operators_work(candidate)), None)


@cache
def operators_work(dtype: torch.dtype) -> bool:
    """Can this torch, on this processor, multiply by packed weights of that type?"""
    probe = torch.ones(1, 16, dtype=dtype)
    try:
        packed = torch.ops.mkldnn._reorder_linear_weight(probe.expand(16, 16).contiguous(), None)
        out = torch.ops.mkldnn._linear_pointwise(probe, packed, None, "none", [], "")
    except (AttributeError, RuntimeError):
        return False
    return bool((out == 16).all())
