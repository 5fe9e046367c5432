"""What shape does a published model have, and what can a published device do? Numbers with their sources, as data.

The numbers are in catalogue.yaml beside this file, each entry with its source; a file of the same form (``--catalogue``
or the plan's ``catalogue`` key) adds entries or replaces some. What follows from the numbers alone is computed here:
``S_kv``, bytes of weights, floating-point operations. Seconds are roofline.py's.

Units: bytes and operations are plain counts, GB is 1e9 bytes, TFLOPS are 1e12 operations a second without sparsity.
Curves take a number of tokens or an array of them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from importlib.resources import files
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cluster import config_schema
from cluster.yaml_source import read_yaml
from core.errors import InvalidConfig

FULL, LATENT, WINDOW, RECURRENT = "full", "latent", "window", "recurrent"
KINDS = (FULL, LATENT, WINDOW, RECURRENT)
DTYPE_BYTES: Mapping[str, float] = MappingProxyType({"float32": 4, "bfloat16": 2, "float16": 2, "fp8": 1, "int8": 1})

Numbers = NDArray[np.float64]


@dataclass(frozen=True)
class AttentionLayers:
    """Layers of a model that remember a sequence in the same way.

    kind: ``full`` keeps keys and values of all tokens, ``window`` those of the last ``window`` ones, ``latent`` (MLA)
        one compressed vector a token, ``recurrent`` (linear attention) a state whose size no length changes.
    num_layers: how many layers of the model are of this kind.
    num_heads: query heads; of a recurrent layer, heads of its state.
    key_dim: values of a head's key (in MLA of the expanded one, position part included).
    value_dim: values of a head's value.
    num_kv_heads: heads of which keys and values are kept; ``full`` and ``window`` only.
    latent_dim: values kept for each token; ``latent`` only.
    window: tokens that a ``window`` layer sees.
    conv_values: values of a recurrent layer's short convolution, kept beside the state.
    """

    kind: str
    num_layers: int
    num_heads: int
    key_dim: int
    value_dim: int
    num_kv_heads: int = 0
    latent_dim: int = 0
    window: int = 0
    conv_values: int = 0

    def __post_init__(self) -> None:
        for name in ("num_layers", "num_heads", "key_dim", "value_dim"):
            _require(getattr(self, name) >= 1, name, "must be at least 1", getattr(self, name))
        if self.kind in (FULL, WINDOW):
            _require(self.num_kv_heads >= 1, "num_kv_heads", f"must be at least 1 for kind {self.kind}", 0)
        if self.kind == LATENT:
            _require(self.latent_dim >= 1, "latent_dim", "must be at least 1 for kind latent", self.latent_dim)
        if self.kind == WINDOW:
            _require(self.window >= 1, "window", "must be at least 1 for kind window", self.window)

    def kept_tokens(self, tokens: Numbers | float) -> Numbers:
        """Tokens of a sequence of ``tokens`` whose keys and values are kept."""
        if self.kind == RECURRENT:
            return np.zeros_like(tokens, dtype=float)
        return np.minimum(tokens, self.window) if self.kind == WINDOW else np.asarray(tokens, dtype=float)

    @property
    def token_values(self) -> int:
        """Values that all these layers keep of one token."""
        if self.kind == RECURRENT:
            return 0
        per_layer = self.latent_dim if self.kind == LATENT else self.num_kv_heads * (self.key_dim + self.value_dim)
        return self.num_layers * per_layer

    def state_bytes(self, state_dtype: str, kv_dtype: str) -> float:
        """Bytes that all these layers keep of a sequence, whatever its length."""
        if self.kind != RECURRENT:
            return 0.0
        state_values = self.num_heads * self.key_dim * self.value_dim
        return self.num_layers * (state_values * DTYPE_BYTES[state_dtype] + self.conv_values * DTYPE_BYTES[kv_dtype])

    def prefill_flops(self, tokens: Numbers | float, cached_tokens: Numbers | float) -> Numbers:
        """Operations of attention over ``tokens`` new tokens behind ``cached_tokens``; projections are not in it."""
        if self.kind == RECURRENT:  # decay, update and read of the state: a product and a sum each
            return np.asarray(6.0 * self.num_layers * self.num_heads * self.key_dim * self.value_dim * tokens)
        seen = tokens * cached_tokens + tokens * (np.asarray(tokens, dtype=float) + 1) / 2
        if self.kind == WINDOW:
            seen = np.minimum(seen, np.asarray(tokens, dtype=float) * self.window)
        return np.asarray(2.0 * self.num_layers * self.num_heads * (self.key_dim + self.value_dim) * seen)

    def decode_flops(self, context_tokens: Numbers | float) -> Numbers:
        """Operations of attention for one new token of a sequence of ``context_tokens``."""
        if self.kind == RECURRENT:
            return self.prefill_flops(1.0, 0.0)
        dims = (
            2 * self.latent_dim if self.kind == LATENT else self.key_dim + self.value_dim
        )  # MLA decodes in the latent
        return np.asarray(2.0 * self.num_layers * self.num_heads * dims * self.kept_tokens(context_tokens))


@dataclass(frozen=True)
class ModelShape:
    """A model's sizes, as its published configuration states them.

    hidden_size: width of the residual stream.
    num_parameters: parameters in all.
    num_active_parameters: parameters that one token passes; null: all of them (a dense model).
    num_experts: routed experts of a layer; 0: a dense model.
    num_experts_per_token: routed experts that a token passes.
    attention: the layers by how they remember.
    weights_dtype: of the published weights.
    kv_dtype: of keys, values and latents.
    state_dtype: of recurrent states.
    source: where the numbers come from.
    unverified: keys whose numbers were not read in a source, each to be checked before much depends on it.
    """

    hidden_size: int
    num_parameters: float
    attention: tuple[AttentionLayers, ...]
    num_active_parameters: float | None = None
    num_experts: int = 0
    num_experts_per_token: int = 0
    weights_dtype: str = "bfloat16"
    kv_dtype: str = "bfloat16"
    state_dtype: str = "float32"
    source: str = ""
    unverified: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        _require(self.hidden_size >= 1, "hidden_size", "must be at least 1", self.hidden_size)
        _require(self.num_parameters > 0, "num_parameters", "must be above 0", self.num_parameters)
        _require(bool(self.attention), "attention", "must list at least one kind of layer", self.attention)
        active = self.active_parameters
        _require(0 < active <= self.num_parameters, "num_active_parameters", "must be at most num_parameters", active)
        sparse = self.num_experts > 0
        _require(
            not sparse or 1 <= self.num_experts_per_token < self.num_experts,
            "num_experts_per_token",
            "must be between 1 and num_experts",
            self.num_experts_per_token,
        )

    @property
    def active_parameters(self) -> float:
        """Parameters that one token passes."""
        return self.num_parameters if self.num_active_parameters is None else self.num_active_parameters

    @property
    def num_layers(self) -> int:
        """Layers in all."""
        return sum(layers.num_layers for layers in self.attention)

    @property
    def kv_bytes_per_token(self) -> float:
        """What one more token adds to the cache, of the layers that keep every token."""
        values = sum(layers.token_values for layers in self.attention if layers.kind in (FULL, LATENT))
        return values * DTYPE_BYTES[self.kv_dtype]

    @property
    def state_bytes(self) -> float:
        """The part of the cache whose size no length changes: recurrent states."""
        return sum(layers.state_bytes(self.state_dtype, self.kv_dtype) for layers in self.attention)

    def kv_bytes(self, tokens: Numbers | float) -> Numbers:
        """``S_kv(l)``: bytes of the cache of ``tokens`` tokens (PrfaaS section 2.1), states included."""
        per_value = DTYPE_BYTES[self.kv_dtype]
        kept = sum((layers.token_values * layers.kept_tokens(tokens) for layers in self.attention), np.zeros(()))
        return np.asarray(kept * per_value + self.state_bytes, dtype=float)

    def prefill_flops(self, tokens: Numbers | float, cached_tokens: Numbers | float = 0.0) -> Numbers:
        """Operations of the prefill of ``tokens`` new tokens behind ``cached_tokens`` cached ones."""
        attention = sum((a.prefill_flops(tokens, cached_tokens) for a in self.attention), np.zeros(()))
        return np.asarray(2.0 * self.active_parameters * tokens + attention, dtype=float)

    def decode_flops(self, context_tokens: Numbers | float) -> Numbers:
        """Operations of one decode step of one sequence of ``context_tokens``."""
        attention = sum((a.decode_flops(context_tokens) for a in self.attention), np.zeros(()))
        return np.asarray(2.0 * self.active_parameters + attention, dtype=float)

    def weight_bytes(self, weights_dtype: str | None = None) -> float:
        """Bytes of all weights."""
        return self.num_parameters * DTYPE_BYTES[weights_dtype or self.weights_dtype]

    def touched_weight_bytes(self, num_tokens: float, weights_dtype: str | None = None) -> float:
        """Bytes of the weights that a step over ``num_tokens`` tokens reads, experts taken as chosen independently.

        The routed experts' share of the parameters follows from the two totals: total = rest + experts and
        active = rest + experts * k / n.
        """
        if not self.num_experts:
            return self.weight_bytes(weights_dtype)
        share = self.num_experts_per_token / self.num_experts
        experts = (self.num_parameters - self.active_parameters) / (1 - share)
        touched = 1 - float((1 - share) ** num_tokens)
        parameters = self.num_parameters - experts * (1 - touched)
        return parameters * DTYPE_BYTES[weights_dtype or self.weights_dtype]


@dataclass(frozen=True)
class DeviceSpec:
    """What the maker states of an accelerator.

    tflops: peak dense rate for each dtype of the operands, TFLOPS without sparsity.
    memory_gb: memory, GB.
    memory_bandwidth_gb_s: memory bandwidth, GB/s.
    interconnect_gb_s: what it sends to its neighbours in the server, one direction, GB/s.
    price_per_hour: what an hour costs; null: not known. Any currency, the same for all devices.
    source: where the numbers come from.
    """

    tflops: dict[str, float]
    memory_gb: float
    memory_bandwidth_gb_s: float
    interconnect_gb_s: float
    price_per_hour: float | None = None
    source: str = ""

    def __post_init__(self) -> None:
        _require(bool(self.tflops), "tflops", "must state a rate for at least one dtype", self.tflops)
        for dtype, rate in self.tflops.items():
            _require(dtype in DTYPE_BYTES, f"tflops.{dtype}", f"must be one of {', '.join(DTYPE_BYTES)}", dtype)
            _require(rate > 0, f"tflops.{dtype}", "must be above 0 TFLOPS", rate)
        for name in ("memory_gb", "memory_bandwidth_gb_s", "interconnect_gb_s"):
            _require(getattr(self, name) > 0, name, "must be above 0", getattr(self, name))
        price = self.price_per_hour
        _require(price is None or price >= 0, "price_per_hour", "must be null or at least 0", price)

    def flops_per_s(self, dtype: str) -> float:
        """Peak dense rate for operands of ``dtype``; a device without that rate computes in its widest stated one."""
        rate = self.tflops.get(dtype)
        return (min(self.tflops.values()) if rate is None else rate) * 1e12


@dataclass(frozen=True)
class Catalogue:
    """Models and devices by name.

    models: shapes by name.
    devices: specifications by name.
    """

    models: dict[str, ModelShape] = field(default_factory=dict)
    devices: dict[str, DeviceSpec] = field(default_factory=dict)

    def model(self, name: str) -> ModelShape:
        """The shape of a model; ``InvalidConfig`` naming the known ones otherwise."""
        if name not in self.models:
            raise InvalidConfig("model", f"must be in the catalogue ({', '.join(sorted(self.models))}), got {name!r}")
        return self.models[name]

    def device(self, name: str) -> DeviceSpec:
        """The specification of a device; ``InvalidConfig`` naming the known ones otherwise."""
        if name not in self.devices:
            raise InvalidConfig("device", f"must be in the catalogue ({', '.join(sorted(self.devices))}), got {name!r}")
        return self.devices[name]

    def with_entries(self, other: Catalogue) -> Catalogue:
        """This catalogue with ``other``'s entries added, replacing those of the same name."""
        return replace(self, models=self.models | other.models, devices=self.devices | other.devices)


_DTYPES = tuple(DTYPE_BYTES)
CHOICES: config_schema.Choices = {
    (AttentionLayers, "kind"): KINDS,
    (ModelShape, "weights_dtype"): _DTYPES,
    (ModelShape, "kv_dtype"): _DTYPES,
    (ModelShape, "state_dtype"): _DTYPES,
}


def load_catalogue(path: str | Path | None = None) -> Catalogue:
    """The shipped catalogue, with the entries of the file at ``path`` on top.

    Raises ``InvalidConfig`` with file, line and key.
    """
    shipped = _read(files(__package__) / "catalogue.yaml")
    return shipped if path is None else shipped.with_entries(_read(Path(path)))


def _read(path: Any) -> Catalogue:
    source = read_yaml(path)
    with source.errors():
        return config_schema.read(Catalogue, source.values, CHOICES)


def _require(ok: bool, key: str, allowed: str, value: object) -> None:
    if not ok:
        raise InvalidConfig(key, f"{allowed}, got {value!r}")
