"""How does compiled model code reach the attention of the step that is being computed?

torch.compile cannot look into FlashInfer, a page pool or a scheduler's lists. So attention with its K/V store is one
operator that it leaves alone, ``prfaas::paged_attention``. Operators take tensors and numbers only: what belongs to
the step lies on a *desk*, which the operator finds by its number. Compiled code is thereby the same for every step,
for every layer (its number comes in a tensor) and for eager and captured attention.

The one global state of the engine is here, and torch asks for it: operators are registered by name in the process. A
desk goes with the runner that holds it.
"""

from __future__ import annotations

from collections.abc import Callable
from weakref import WeakValueDictionary

import torch
from torch import nn

LAYER_BUFFER = "prfaas_layer"

# (layer, query, key, value, sinks, scaling, softcap) -> output, all packed [tokens, heads, dim]
Attend = Callable[
    [int, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor | None, float, float | None], torch.Tensor
]


class Desk:
    """Where a runner lays down what its compiled layers are to attend with; one step at a time."""

    __slots__ = ("__weakref__", "attend", "number")

    def __init__(self) -> None:
        self.number = next(n for n in range(len(_DESKS) + 1) if n not in _DESKS)  # compiled code may hold it: reuse
        self.attend: Attend | None = None
        _DESKS[self.number] = self


_DESKS: WeakValueDictionary[int, Desk] = WeakValueDictionary()


class DeskBatch:
    """What travels through a compiled model as ``forward_batch``."""

    __slots__ = ("desk_number",)

    def __init__(self, desk: Desk) -> None:
        self.desk_number = desk.number

    def call(
        self,
        module: nn.Module,
        query: torch.Tensor,  # [1, heads, tokens, key_dim]; key and value likewise
        key: torch.Tensor,
        value: torch.Tensor,
        sinks: torch.Tensor | None,
        scaling: float,
        softcap: float | None,
    ) -> torch.Tensor:
        """Attention of one layer, [1, tokens, heads, value_dim]."""
        out: torch.Tensor = torch.ops.prfaas.paged_attention(
            query[0].transpose(0, 1).contiguous(),
            key[0].transpose(0, 1),
            value[0].transpose(0, 1),
            sinks,
            getattr(module, LAYER_BUFFER),
            self.desk_number,
            scaling,
            softcap,
        )
        return out.unsqueeze(0)


def number_layers(model: nn.Module) -> None:
    """Give every module with a ``layer_idx`` its number as a tensor, so that layers differ in data and not in code."""
    for module in model.modules():
        number = getattr(module, "layer_idx", None)
        if isinstance(number, int):
            module.register_buffer(LAYER_BUFFER, torch.tensor(number), persistent=False)


@torch.library.custom_op("prfaas::paged_attention", mutates_args=())
def _paged_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    sinks: torch.Tensor | None,
    layer: torch.Tensor,
    desk: int,
    scaling: float,
    softcap: float | None,
) -> torch.Tensor:
    attend = _DESKS[desk].attend
    assert attend is not None, "no step lies on the desk"
    # Compiled code relies on the order of dimensions that is declared below.
    return attend(int(layer), query, key, value, sinks, scaling, softcap).contiguous()


@_paged_attention.register_fake
def _(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    sinks: torch.Tensor | None,
    layer: torch.Tensor,
    desk: int,
    scaling: float,
    softcap: float | None,
) -> torch.Tensor:
    return query.new_empty(query.shape[0], query.shape[1], value.shape[2])
