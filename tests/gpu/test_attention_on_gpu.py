"""FlashInfer's kernels on our pages equal the textbook, in ragged chunked steps and in static ones.

Skipped without a GPU or without FlashInfer. Its kernels are compiled when they are first used, which takes minutes.
"""

from __future__ import annotations

import importlib.util
import math

import pytest
import torch

from engine.attention import AttentionOptions
from engine.cache_layout import LayerCache
from tests.attention_case import SHARING, Case, ragged_steps, shared_steps

pytestmark = [
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU here"),
    pytest.mark.skipif(importlib.util.find_spec("flashinfer") is None, reason="no FlashInfer here"),
    pytest.mark.timeout(900),
]

# bfloat16 keeps 8 bits: outputs of size 1 to 3 are off by up to 2^-7, and sums of them by a little more.
TOLERANCE = 0.03
HEAD_DIM = 64


@pytest.mark.parametrize("static", [False, True], ids=["eager", "static"])
@pytest.mark.parametrize("page_size", [1, 16, 64])
@pytest.mark.parametrize("num_kv_heads", [8, 2, 1])
@pytest.mark.parametrize("window", [None, 5], ids=["full", "window"])
def test_flashinfer_equals_the_textbook(window: int | None, num_kv_heads: int, page_size: int, static: bool) -> None:
    layer = LayerCache(0, num_kv_heads, HEAD_DIM, HEAD_DIM, "bfloat16", window)
    options = AttentionOptions(scaling=HEAD_DIM**-0.5)
    case = Case("flashinfer", layer, page_size, options, num_heads=8, device="cuda", static=static)

    assert max(ragged_steps(case)) < TOLERANCE


@pytest.mark.parametrize("page_size", [1, 16, 64])
@pytest.mark.parametrize("num_kv_heads", [8, 2, 1])
@pytest.mark.parametrize(
    ("head_dim", "dtype", "window"),
    [(64, "bfloat16", None), (128, "bfloat16", None), (64, "float16", None), (64, "bfloat16", 5)],
    ids=["64", "128", "float16", "window"],
)
def test_shared_prefixes_read_once_equal_the_textbook(
    head_dim: int, dtype: str, window: int | None, num_kv_heads: int, page_size: int
) -> None:
    layer = LayerCache(0, num_kv_heads, head_dim, head_dim, dtype, window)
    options = AttentionOptions(scaling=head_dim**-0.5)
    case = Case(
        "flashinfer",
        layer,
        page_size,
        options,
        num_heads=8,
        device="cuda",
        cascade=SHARING,
        max_tokens=5 * page_size + 9,
    )

    assert max(shared_steps(case)) < TOLERANCE


@pytest.mark.parametrize("window", [None, 5], ids=["full", "window"])
def test_long_chunks_behind_stored_tokens_are_gathered(window: int | None, monkeypatch: pytest.MonkeyPatch) -> None:
    from engine import attention_flashinfer

    monkeypatch.setattr(attention_flashinfer, "LONG_CHUNK", 2)
    layer = LayerCache(0, 2, HEAD_DIM, HEAD_DIM, "bfloat16", window)
    case = Case("flashinfer", layer, 16, AttentionOptions(scaling=HEAD_DIM**-0.5), num_heads=8, device="cuda")

    errors = [
        case.step(("a", 37), ("b", 5)),
        case.step(("b", 1), ("a", 19)),
        case.step(("c", 3), ("b", 40), ("a", 7)),
        case.step(("b", 1), ("d", 9), ("c", 1), ("a", 21)),
    ]

    assert max(errors) < TOLERANCE


@pytest.mark.parametrize("static", [False, True], ids=["eager", "static"])
def test_nothing_in_other_pages_reaches_a_sequence(static: bool) -> None:
    layer = LayerCache(0, 2, HEAD_DIM, HEAD_DIM, "bfloat16")
    options = AttentionOptions(scaling=0.1)
    case = Case("flashinfer", layer, 16, options, num_heads=8, device="cuda", static=static)
    case.step(("a", 5), ("b", 18))
    own = [page for pages in case.pages.values() for page in pages]
    case.pool.pages(0)[[page for page in range(case.pool.num_pages) if page not in own]] = math.nan

    assert case.step(("a", 1), ("b", 1)) < TOLERANCE
    assert case.step(("a", 4), ("b", 2)) < TOLERANCE


@pytest.mark.parametrize("window", [None, 5], ids=["full", "window"])
def test_flashinfer_caps_scores(window: int | None) -> None:
    layer = LayerCache(0, 2, HEAD_DIM, HEAD_DIM, "bfloat16", window)
    options = AttentionOptions(scaling=0.3, softcap=2.0)

    for static in (False, True):
        case = Case("flashinfer", layer, 16, options, num_heads=8, device="cuda", static=static)
        assert max(ragged_steps(case)) < TOLERANCE
    case = Case("flashinfer", layer, 16, options, num_heads=8, device="cuda", cascade=SHARING, max_tokens=128)
    assert max(shared_steps(case)) < TOLERANCE


@pytest.mark.parametrize("backend", ["sdpa", "matmul"])
@pytest.mark.parametrize("static", [False, True], ids=["eager", "static"])
def test_the_references_equal_the_textbook_on_a_gpu(backend: str, static: bool) -> None:
    options = AttentionOptions(scaling=0.3)
    for layer in (LayerCache(0, 2, 8, 8, "float32"), LayerCache(0, 2, 12, 8, "float32", window=5)):
        case = Case(backend, layer, 4, options, device="cuda", static=static)
        assert max(ragged_steps(case)) < 1e-4
