"""Which backend runs is a function of device and model; a name that cannot be had is refused with those that can."""

from __future__ import annotations

from dataclasses import replace

import pytest

from core.errors import InvalidConfig
from engine import attention_choice
from engine.attention import BACKENDS
from engine.attention_choice import AttentionCase, LayerAttention, choose_attention
from engine.cache_layout import LayerCache

LAYER = LayerAttention(LayerCache(0, 8, 128, 128, "bfloat16"), 32)
HOPPER = AttentionCase("cuda", (9, 0), 16, (LAYER,))
ON_CPU = AttentionCase("cpu", None, 16, (LAYER,))


@pytest.fixture(autouse=True)
def installed(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a GPU host with the extra ``gpu`` and a new torch, whatever this machine has."""
    monkeypatch.setattr(attention_choice.importlib.util, "find_spec", lambda name: object())
    monkeypatch.setattr(attention_choice, "torch_has_paged_varlen", lambda: True)


def with_layer(layer: LayerAttention, **changes: object) -> AttentionCase:
    return replace(HOPPER, layers=(LAYER, layer), **changes)


def test_every_backend_can_be_chosen_by_its_name() -> None:
    for name in BACKENDS:
        case = ON_CPU if name == "native" else HOPPER
        assert choose_attention(name, replace(case, page_size=256)).name == name


def test_a_gpu_gets_flashinfer_and_a_cpu_its_own_kernel() -> None:
    assert choose_attention("auto", HOPPER).name == "flashinfer"
    on_cpu = choose_attention("auto", ON_CPU)
    assert on_cpu.name == "native"
    assert "flashinfer: it needs a CUDA device" in on_cpu.reason


@pytest.mark.parametrize(
    ("case", "why"),
    [
        (replace(ON_CPU, native_missing="no C++ compiler"), "native: no C++ compiler"),
        (replace(ON_CPU, page_size=1024), "native: it has pages of up to 512 tokens"),
        (
            replace(ON_CPU, layers=(replace(LAYER, cache=LayerCache(0, 8, 64, 64, "float16")),)),
            "native: it computes float32 and bfloat16, not float16",
        ),
        (replace(ON_CPU, layers=(replace(LAYER, cache=LayerCache(0, 8, 576, 512, "float32")),)), "not 576 and 512"),
        (replace(ON_CPU, layers=(replace(LAYER, num_heads=512),)), "up to 32 query heads for a K/V head, not 64"),
    ],
)
def test_a_cpu_without_its_kernel_multiplies_and_says_why(case: AttentionCase, why: str) -> None:
    choice = choose_attention("auto", case)

    assert choice.name == "matmul"
    assert why in choice.reason


@pytest.mark.parametrize(
    ("case", "name", "why"),
    [
        (with_layer(replace(LAYER, sinks=True)), "sdpa", "sinks"),
        (with_layer(replace(LAYER, cache=LayerCache(1, 8, 128, 128, "float32"))), "sdpa", "not float32"),
        (with_layer(replace(LAYER, cache=LayerCache(1, 8, 192, 128, "bfloat16"))), "sdpa", "not 192 and 128"),
        (with_layer(replace(LAYER, cache=LayerCache(1, 8, 96, 96, "bfloat16")), page_size=256), "varlen", "not 96"),
        (replace(HOPPER, capability=(7, 5)), "sdpa", "the device has 7.5"),
        (with_layer(replace(LAYER, softcap=30.0)), "flashinfer", ""),
        (with_layer(replace(LAYER, cache=LayerCache(1, 8, 128, 128, "bfloat16", window=512))), "flashinfer", ""),
    ],
)
def test_auto_passes_over_what_cannot_do_it_and_says_why(case: AttentionCase, name: str, why: str) -> None:
    choice = choose_attention("auto", case)

    assert choice.name == name
    assert why in choice.reason


@pytest.mark.parametrize(
    ("case", "name", "why"),
    [
        (
            with_layer(replace(LAYER, sinks=True)),
            "flashinfer",
            "it has no attention sinks; allowed here: auto, sdpa, mat",
        ),
        (HOPPER, "varlen", "page_size to be a multiple of 256; allowed here: auto, flashinfer, sdpa, matmul"),
        (with_layer(replace(LAYER, softcap=5.0), page_size=256), "varlen", "neither sinks nor soft caps"),
        (
            replace(HOPPER, device="cpu", capability=None),
            "varlen",
            "needs a CUDA device; allowed here: auto, native, matmul, sdpa",
        ),
        (HOPPER, "flash", "must be auto or one of native, matmul, sdpa, varlen, flashinfer, got 'flash'"),
    ],
)
def test_a_backend_that_is_named_and_cannot_is_refused(case: AttentionCase, name: str, why: str) -> None:
    with pytest.raises(InvalidConfig, match=r"engine.attention") as raised:
        choose_attention(name, case)

    assert why in str(raised.value)


def test_what_is_not_installed_is_passed_over(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention_choice.importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr(attention_choice, "torch_has_paged_varlen", lambda: False)

    choice = choose_attention("auto", replace(HOPPER, page_size=256))

    assert choice.name == "sdpa"
    assert "pip install" in choice.reason
    assert "block_table" in choice.reason
