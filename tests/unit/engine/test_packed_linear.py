"""A packed linear layer computes what the plain one does, and models keep working around it."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from engine.packed_linear import PackedLinear, operators_work, pack_linears


def require(dtype: torch.dtype) -> None:
    if not operators_work(dtype):
        pytest.skip(f"this processor cannot pack {dtype}: the model is left as it is")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("num_rows", [0, 1, 5, 70])
def test_gives_the_plain_layers_output(dtype: torch.dtype, bias: bool, num_rows: int) -> None:
    require(dtype)
    torch.manual_seed(0)
    linear = nn.Linear(48, 80, bias=bias, dtype=dtype)
    x = torch.randn(1, num_rows, 48, dtype=dtype)

    with torch.inference_mode():
        expected, actual = linear(x), PackedLinear(linear)(x)

    assert actual.shape == expected.shape
    torch.testing.assert_close(actual, expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("bias", [True, False])
def test_a_product_in_float32_between_two_casts_is_one_in_a_short_type(dtype: torch.dtype, bias: bool) -> None:
    torch.manual_seed(0)
    linear = nn.Linear(48, 80, bias=bias, dtype=dtype)
    x = torch.randn(3, 48, dtype=dtype)

    with torch.inference_mode():
        expected = copy.deepcopy(linear).double()(x.double())
        packed = PackedLinear(linear, torch.float32)
        actual = packed(x)

    assert actual.dtype == dtype
    assert packed.itemsize == 4
    torch.testing.assert_close(actual, expected.to(dtype), rtol=1e-2, atol=1e-3)
    assert torch.equal(packed.weight, linear.weight)


def test_code_that_is_traced_finds_the_layer_by_its_number() -> None:
    layers = [PackedLinear(nn.Linear(8, 6)), PackedLinear(nn.Linear(8, 6))]
    x = torch.randn(3, 8)
    traced = torch.compile(lambda x: [layer(x) for layer in layers], fullgraph=True, backend="aot_eager")

    with torch.inference_mode():
        for actual, layer in zip(traced(x), layers, strict=True):
            torch.testing.assert_close(actual, layer(x))


def test_layers_of_a_library_for_quantised_weights_are_left_alone() -> None:
    hooked, replaced, marked = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4)
    hooked.register_forward_pre_hook(lambda module, args: None)
    replaced.forward = lambda x: x  # type: ignore[method-assign]
    marked.quantization_scheme = "int8"  # type: ignore[assignment]

    assert pack_linears(nn.Sequential(hooked, replaced, marked)) == 0


def test_its_weight_can_be_read_back() -> None:
    require(torch.bfloat16)
    linear = nn.Linear(48, 80, dtype=torch.bfloat16)

    assert torch.equal(PackedLinear(linear).weight, linear.weight)


def test_every_plain_linear_is_replaced_and_nothing_else() -> None:
    class Special(nn.Linear):
        pass

    model = nn.Sequential(nn.Linear(4, 4), nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4)), Special(4, 4))

    assert pack_linears(model) == 2
    assert type(model[0]) is type(model[1][0]) is PackedLinear  # type: ignore[index]
    assert type(model[2]) is Special


def test_a_shared_weight_stays_with_its_other_owner() -> None:
    embedding, head = nn.Embedding(16, 8), nn.Linear(8, 16, bias=False)
    head.weight = embedding.weight
    model = nn.ModuleList([embedding, head])

    pack_linears(model)

    x = torch.randn(2, 8)
    with torch.inference_mode():
        torch.testing.assert_close(model[1](x), x @ embedding.weight.T)


def test_other_dtypes_are_left_alone() -> None:
    assert pack_linears(nn.Sequential(nn.Linear(4, 4, dtype=torch.float64))) == 0
