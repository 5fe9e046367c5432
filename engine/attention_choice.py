"""Which attention backend runs, and why? Pure: what is asked of it, and on which device.

``auto`` takes the first of the device's backends that can do all that the model's layers ask. One that is named and
cannot is refused with its reason and with those that can, instead of being replaced.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from inspect import signature
from types import MappingProxyType

from core.errors import InvalidConfig
from engine.cache_layout import LayerCache
from engine.cpu_kernel import MAX_DIM, MAX_GROUP, MAX_PAGE_SIZE

_HALF = ("bfloat16", "float16")
_NATIVE_DTYPES = ("float32", "bfloat16")
_FLASHINFER_DIMS = (64, 128, 256)
_VARLEN_MAX_DIM = 256
_VARLEN_PAGE = 256  # torch's FlashAttention 2 wants pages of a multiple of that many tokens


@dataclass(frozen=True, slots=True)
class LayerAttention:
    """What one layer asks of its attention."""

    cache: LayerCache
    num_heads: int  # of queries
    softcap: float | None = None
    sinks: bool = False


@dataclass(frozen=True, slots=True)
class AttentionCase:
    """What a backend has to do, and where."""

    device: str  # torch's type of it: cpu, cuda
    capability: tuple[int, int] | None  # of a CUDA device
    page_size: int
    layers: tuple[LayerAttention, ...]
    native_missing: str | None = None  # why the CPU's kernel is not to be had (cpu_kernel.py); None: it is there


@dataclass(frozen=True, slots=True)
class AttentionChoice:
    """The backend that runs, and why it and no other."""

    name: str
    reason: str


def choose_attention(asked: str, case: AttentionCase) -> AttentionChoice:
    """``asked`` is ``engine.attention``. Raises ``InvalidConfig`` that names the values that would do."""
    refusals = {name: refuse(case) for name, refuse in _REFUSALS.items()}
    possible = [name for name in _PREFERENCE.get(case.device, tuple(_REFUSALS)) if refusals[name] is None]
    if asked != "auto":
        if asked not in refusals:
            allowed = ", ".join(_REFUSALS)
            raise InvalidConfig("engine.attention", f"must be auto or one of {allowed}, got {asked!r}")
        if refusals[asked] is not None:
            raise InvalidConfig(
                "engine.attention",
                f"{asked} cannot be used here: {refusals[asked]}; allowed here: auto, {', '.join(possible)}",
            )
        return AttentionChoice(asked, "engine.attention names it")
    name = possible[0]
    passed_over = [f"{other}: {why}" for other, why in refusals.items() if why is not None]
    reason = f"the fastest on {case.device} that can do what the model asks"
    return AttentionChoice(name, f"{reason} ({'; '.join(passed_over)})" if passed_over else reason)


def _refuse_nothing(case: AttentionCase) -> str | None:
    return None


def _refuse_native(case: AttentionCase) -> str | None:
    if case.device != "cpu":
        return "it is for CPUs"
    if case.page_size > MAX_PAGE_SIZE:
        return f"it has pages of up to {MAX_PAGE_SIZE} tokens"
    for layer in case.layers:
        cache = layer.cache
        if cache.dtype not in _NATIVE_DTYPES:
            return f"it computes {' and '.join(_NATIVE_DTYPES)}, not {cache.dtype}"
        if max(cache.key_dim, cache.value_dim) > MAX_DIM:
            return f"it has heads of up to {MAX_DIM}, not {cache.key_dim} and {cache.value_dim}"
        if layer.num_heads > MAX_GROUP * cache.num_kv_heads:
            return f"it has up to {MAX_GROUP} query heads for a K/V head, not {layer.num_heads // cache.num_kv_heads}"
    return case.native_missing


def _refuse_flashinfer(case: AttentionCase) -> str | None:
    if case.device != "cuda" or case.capability is None:
        return "it needs a CUDA device"
    if case.capability < (8, 0):
        return f"it needs compute capability 8.0, the device has {case.capability[0]}.{case.capability[1]}"
    if importlib.util.find_spec("flashinfer") is None:
        return "flashinfer is not installed (pip install 'prfaas[gpu]')"
    for layer in case.layers:
        cache = layer.cache
        if cache.dtype not in _HALF:
            return f"it computes {' and '.join(_HALF)}, not {cache.dtype}"
        if cache.key_dim != cache.value_dim or cache.key_dim not in _FLASHINFER_DIMS:
            return f"it has heads of {', '.join(map(str, _FLASHINFER_DIMS))}, not {cache.key_dim} and {cache.value_dim}"
        if layer.sinks:
            return "it has no attention sinks"
    return None


def _refuse_varlen(case: AttentionCase) -> str | None:
    if case.device != "cuda" or case.capability is None:
        return "it needs a CUDA device"
    if case.capability < (8, 0):
        return f"it needs compute capability 8.0, the device has {case.capability[0]}.{case.capability[1]}"
    if not torch_has_paged_varlen():
        return "the installed torch's varlen_attn has no block_table"
    if case.page_size % _VARLEN_PAGE:
        return f"it needs engine.page_size to be a multiple of {_VARLEN_PAGE}"
    for layer in case.layers:
        cache = layer.cache
        if cache.dtype not in _HALF:
            return f"it computes {' and '.join(_HALF)}, not {cache.dtype}"
        if cache.key_dim != cache.value_dim or cache.key_dim > _VARLEN_MAX_DIM or cache.key_dim % 8:
            return f"it has equal heads of up to {_VARLEN_MAX_DIM}, not {cache.key_dim} and {cache.value_dim}"
        if layer.sinks or layer.softcap is not None:
            return "it has neither sinks nor soft caps"
    return None


@cache
def torch_has_paged_varlen() -> bool:
    """Whether ``torch.nn.attention.varlen.varlen_attn`` reads pages: from torch 2.12 or 2.13 on."""
    try:
        from torch.nn.attention.varlen import varlen_attn
    except ImportError:
        return False
    return {"block_table", "seqused_k"} <= signature(varlen_attn).parameters.keys()


_REFUSALS: Mapping[str, Callable[[AttentionCase], str | None]] = MappingProxyType(
    {
        "native": _refuse_native,
        "matmul": _refuse_nothing,
        "sdpa": _refuse_nothing,
        "varlen": _refuse_varlen,
        "flashinfer": _refuse_flashinfer,
    }
)
_PREFERENCE: Mapping[str, tuple[str, ...]] = MappingProxyType(
    {"cpu": ("native", "matmul", "sdpa"), "cuda": ("flashinfer", "varlen", "sdpa", "matmul")}
)
