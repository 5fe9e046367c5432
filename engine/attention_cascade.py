"""How is attention to a shared prefix computed once and merged with each sequence's own part? The reference in torch.

Softmax over two disjoint sets of keys follows from softmax over each of them, if each also gives its weight, the
logarithm of the sum of exponentials of its scores: out = (e^w1 out1 + e^w2 out2) / (e^w1 + e^w2). Positions have gone
into q and k before, and all shared keys come before each query: so the shared part is not causal, and the own part is a
decode step of a sequence that begins behind the shared pages.

That holds with soft caps, which change each score alone. Sinks take part in the sum once, so layers with sinks are left
as they are, and so are those with a window (``CascadeTerms.of`` says why).

On a GPU it is FlashInfer that does this (flashinfer_decode.py). Here shapes follow the groups, so it is for CPUs.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from engine.attention import AttentionOptions, Segment, StaticAttention
from engine.page_pool import PagePool
from engine.shared_prefixes import SharedPrefix


def behind_shared(segments: Sequence[Segment], shared: Sequence[SharedPrefix], page_size: int) -> list[Segment]:
    """The segments as of sequences that begin behind what they share."""
    rests = list(segments)
    for group in shared:
        num_tokens = group.num_pages * page_size
        for i in range(group.first, group.end):
            segment = segments[i]
            assert segment.start >= num_tokens, "shared pages come before the token"
            rests[i] = Segment(segment.start - num_tokens, segment.num_tokens, segment.page_ids[group.num_pages :])
    return rests


def merge_partial(
    out: torch.Tensor, weight: torch.Tensor, other: torch.Tensor, other_weight: torch.Tensor
) -> torch.Tensor:
    """Attention over two disjoint sets of keys, [..., dim], of that over each and of their weights, [...]."""
    share = torch.sigmoid(weight - other_weight)[..., None]
    return share * out + (1 - share) * other


class TiledCascade:
    """``CascadeAttention`` of plain torch; ``plain`` stores, and attends in layers that share nothing."""

    def __init__(self, pool: PagePool, plain: StaticAttention) -> None:
        self._pool = pool
        self._plain = plain
        self.store = plain.store
        self._segments: Sequence[Segment] = ()
        self._rests: Sequence[Segment] = ()
        self._shared: Sequence[SharedPrefix] = ()

    def fill(self, segments: Sequence[Segment], shared: Sequence[SharedPrefix]) -> None:
        """As ``CascadeAttention``'s."""
        self._plain.fill(segments)
        self._segments, self._shared = segments, shared
        self._rests = behind_shared(segments, shared, self._pool.layout.page_size)

    def attend(self, index: int, query: torch.Tensor, options: AttentionOptions) -> torch.Tensor:
        """As ``StepAttention``'s."""
        if self._pool.layout.layers[index].window is not None or options.sinks is not None:
            return self._plain.attend(index, query, options)
        parts = [
            self._part(index, query[i : i + 1], rest.page_ids, rest.end, options) for i, rest in enumerate(self._rests)
        ]
        out, weight = (torch.cat(some) for some in zip(*parts, strict=True))
        for group in self._shared:
            rows = slice(group.first, group.end)
            num_tokens = group.num_pages * self._pool.layout.page_size
            shared = self._part(index, query[rows], self._segments[group.first].page_ids, num_tokens, options)
            out[rows] = merge_partial(out[rows], weight[rows], *shared)
        return out.to(query.dtype)

    def _part(
        self, index: int, query: torch.Tensor, page_ids: Sequence[int], num_tokens: int, options: AttentionOptions
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """(attention of all queries [n, heads, dim] to the first tokens of these pages, weights [n, heads])."""
        page_size = self._pool.layout.page_size
        tokens = torch.arange(num_tokens)
        slots = torch.tensor(page_ids)[tokens // page_size], tokens % page_size
        keys, values = (half[slots].float() for half in (self._pool.keys(index), self._pool.values(index)))
        q = query.float().view(len(query), keys.shape[1], -1, query.shape[2])  # [n, kv_heads, group, dim]
        scores = torch.einsum("nhgd,khd->nhgk", q, keys) * options.scaling
        if options.softcap is not None:
            scores = options.softcap * torch.tanh(scores / options.softcap)
        out = torch.einsum("nhgk,khd->nhgd", scores.softmax(-1), values)
        return out.flatten(1, 2), scores.logsumexp(-1).flatten(1, 2)
