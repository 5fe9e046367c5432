"""May a checkpoint whose weights are quantised be served here, and how are they multiplied? Pure and torch-free.

transformers replaces the linear layers by those of a library and loads the weights into them. This engine does not
look into such layers: what is merged, packed or compiled elsewhere is left alone (packed_linear.is_plain_linear), K/V
stays in the model's own dtype, and the self-test compares with the model's own attention over the same weights.

A method is taken if its library is installed and knows the device. Two have weights that mean something without a
library: where there is no kernel for them, they are dequantised while they are loaded and take the room of ``dtype``.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

from core.errors import UnsupportedQuantisation

Capability = tuple[int, int]  # of a CUDA device


@dataclass(frozen=True, slots=True)
class Quantisation:
    """How a checkpoint's weights are quantised, and what becomes of them here."""

    method: str  # ``quant_method`` of its config.json
    dequantised: bool  # while it is loaded
    reason: str  # for whoever wonders why

    @property
    def label(self) -> str:
        """As ``prfaas status`` shows it."""
        return f"{self.method} weights, dequantised" if self.dequantised else f"{self.method} weights"


@dataclass(frozen=True, slots=True)
class _Method:
    packages: tuple[tuple[str, str], ...]  # (module, what pip calls it)
    least_capability: Capability | None = None  # on a GPU; None: any
    on_cpu: bool = True
    dequantises: bool = False  # where a package or the capability is lacking, and on CPU


_METHODS: Mapping[str, _Method] = MappingProxyType(
    {
        "awq": _Method((("gptqmodel", "gptqmodel"),)),
        "bitsandbytes": _Method((("bitsandbytes", "bitsandbytes>=0.46.1"),)),
        "compressed-tensors": _Method((("compressed_tensors", "compressed-tensors>=0.15"),)),
        "fbgemm_fp8": _Method((("fbgemm_gpu", "fbgemm-gpu"),), (9, 0), on_cpu=False),
        "fp8": _Method((("kernels", "kernels"),), (8, 9), dequantises=True),
        "gptq": _Method((("gptqmodel", "gptqmodel"), ("optimum", "optimum"))),
        "mxfp4": _Method((("kernels", "kernels"), ("triton", "triton")), (7, 5), dequantises=True),
        "torchao": _Method((("torchao", "torchao"),)),
    }
)


def _is_installed(module: str) -> bool:
    return importlib.util.find_spec(module) is not None


def assess(
    settings: Mapping[str, Any],
    device: str,
    capability: Capability | None,
    is_installed: Callable[[str], bool] = _is_installed,
) -> Quantisation:
    """What becomes of a checkpoint with ``quantization_config`` ``settings`` on a device of torch's type ``device``.

    Raises ``UnsupportedQuantisation``, which says what it takes and which methods could be loaded here.
    """
    name = str(settings.get("quant_method") or _implied(settings))
    method = _METHODS.get(name)
    lacking = "a method that is known here" if method is None else _lacking(method, device, capability, is_installed)
    if lacking is None:
        return Quantisation(name, False, "its own kernels multiply")
    if method is not None and method.dequantises:
        return Quantisation(name, True, f"kernels for it need {lacking}")
    allowed = tuple(
        other
        for other, how in _METHODS.items()
        if how.dequantises or _lacking(how, device, capability, is_installed) is None
    )
    raise UnsupportedQuantisation(name, lacking, allowed)


def _implied(settings: Mapping[str, Any]) -> str:
    """bitsandbytes wrote no method once."""
    return "bitsandbytes" if settings.get("load_in_4bit") or settings.get("load_in_8bit") else "none"


def _lacking(
    method: _Method, device: str, capability: Capability | None, is_installed: Callable[[str], bool]
) -> str | None:
    """What the method's kernels need and do not have here; None: nothing."""
    if device == "cpu":
        if not method.on_cpu or method.dequantises:
            return "a CUDA device"
    elif method.least_capability is not None and (capability is None or capability < method.least_capability):
        major, minor = method.least_capability
        return f"compute capability {major}.{minor}"
    missing = [pip for module, pip in method.packages if not is_installed(module)]
    return f"pip install {' '.join(missing)}" if missing else None
