"""Which quantised checkpoints are taken is a function of method, device and what is installed."""

from __future__ import annotations

from typing import Any

import pytest

from core.errors import UnsupportedModel, UnsupportedQuantisation
from engine.quantisation import assess


def everything(module: str) -> bool:
    return True


def nothing(module: str) -> bool:
    return False


@pytest.mark.parametrize("device", ["cpu", "cuda"])
@pytest.mark.parametrize("method", ["awq", "bitsandbytes", "compressed-tensors", "gptq", "torchao"])
def test_a_method_whose_library_is_installed_is_taken(method: str, device: str) -> None:
    found = assess({"quant_method": method}, device, (9, 0) if device == "cuda" else None, everything)

    assert (found.method, found.dequantised, found.label) == (method, False, f"{method} weights")


def test_bitsandbytes_may_leave_its_name_out() -> None:
    assert assess({"load_in_8bit": True}, "cpu", None, everything).method == "bitsandbytes"


@pytest.mark.parametrize(
    ("device", "capability", "why"),
    [("cpu", None, "a CUDA device"), ("cuda", (8, 0), "compute capability 8.9"), ("cuda", (9, 0), "kernels")],
)
def test_float8_without_its_kernels_is_dequantised_and_says_why(device: str, capability: Any, why: str) -> None:
    found = assess({"quant_method": "fp8"}, device, capability, nothing)

    assert found.dequantised
    assert found.label == "fp8 weights, dequantised"
    assert why in found.reason


def test_float8_with_its_kernels_is_not() -> None:
    assert not assess({"quant_method": "fp8"}, "cuda", (9, 0), everything).dequantised


@pytest.mark.parametrize(
    ("method", "device", "is_installed", "needs", "allowed"),
    [
        ("gptq", "cpu", nothing, "pip install gptqmodel optimum", ("fp8", "mxfp4")),
        ("fbgemm_fp8", "cpu", everything, "a CUDA device", None),
        ("bitsandbytes", "cuda", nothing, "pip install bitsandbytes>=0.46.1", ("fp8", "mxfp4")),
        ("aqlm", "cpu", everything, "a method that is known here", None),
        ("fbgemm_fp8", "cuda", everything, "compute capability 9.0", None),
    ],
)
def test_the_rest_is_refused_with_what_it_takes_and_what_would_do(
    method: str, device: str, is_installed: Any, needs: str, allowed: tuple[str, ...] | None
) -> None:
    with pytest.raises(UnsupportedQuantisation) as raised:
        assess({"quant_method": method}, device, (8, 9) if device == "cuda" else None, is_installed)

    error = raised.value
    assert isinstance(error, UnsupportedModel)
    assert (error.quant_method, error.needs) == (method, needs)
    assert method not in error.allowed
    assert allowed is None or error.allowed == allowed
    assert str(error).startswith(f"quantization_config.quant_method: {method} needs {needs}; allowed here: ")
