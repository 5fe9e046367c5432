"""What torch's varlen_attn is told of a step: its kernel runs on GPUs only, so a plain one of the same signature is put
in its place."""

from __future__ import annotations

import pytest
import torch

from engine import attention_varlen
from engine.attention import AttentionOptions
from engine.cache_layout import LayerCache
from tests.attention_case import Case, ragged_steps


def plain_varlen_attn(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    cu_seq_q: torch.Tensor,
    cu_seq_k: None,
    max_q: int,
    max_k: int,
    *,
    scale: float,
    window_size: tuple[int, int],
    enable_gqa: bool,
    seqused_k: torch.Tensor,
    block_table: torch.Tensor,
) -> torch.Tensor:
    """As its documentation has it: the last query of a sequence sees all of its ``seqused_k`` keys."""
    group = query.shape[1] // key.shape[2]
    assert enable_gqa == (group != 1)
    assert max_q == int((cu_seq_q[1:] - cu_seq_q[:-1]).max())
    assert max_k >= int(seqused_k.max())
    assert block_table.shape[1] * key.shape[1] >= max_k
    outputs = []
    for first, end, num_keys, pages in zip(cu_seq_q, cu_seq_q[1:], seqused_k, block_table.long(), strict=False):
        k = key[pages].flatten(0, 1)[:num_keys].repeat_interleave(group, 1)
        v = value[pages].flatten(0, 1)[:num_keys].repeat_interleave(group, 1)
        q = query[first:end]
        scores = torch.einsum("qhd,khd->hqk", q, k) * scale
        place = torch.arange(len(q))[:, None] + num_keys - len(q)
        keys = torch.arange(int(num_keys))[None]
        hidden = keys > place + window_size[1]
        if window_size[0] >= 0:
            hidden |= keys < place - window_size[0]
        outputs.append(torch.einsum("hqk,khd->qhd", scores.masked_fill(hidden, -torch.inf).softmax(-1), v))
    return torch.cat(outputs)


@pytest.mark.parametrize("static", [False, True], ids=["eager", "static"])
@pytest.mark.parametrize("page_size", [1, 4, 16])
@pytest.mark.parametrize(
    "layer",
    [
        LayerCache(0, 6, 8, 8, "float32"),
        LayerCache(0, 2, 8, 8, "float32"),
        LayerCache(0, 2, 8, 8, "float32", window=5),
    ],
    ids=["one head each", "grouped", "window"],
)
def test_equals_the_textbook(layer: LayerCache, page_size: int, static: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention_varlen, "varlen_attn", plain_varlen_attn)
    case = Case("varlen", layer, page_size, AttentionOptions(scaling=0.3), static=static)

    assert max(ragged_steps(case)) < 1e-5
