"""Hand-overs between pools that are not alike, over every transport: other page sizes, other heads, other strides."""

from __future__ import annotations

import random
from dataclasses import replace
from typing import Any

import pytest

from core.errors import Incompatible
from core.kv_layout import KvLayer, KvLayout
from core.request import SessionId

A = SessionId("a")
NUM_TOKENS = 150
HEADS = 8
LAYERS = (
    KvLayer(HEADS, 16, 16, "bfloat16", 2),
    KvLayer(HEADS, 16, 16, "bfloat16", 2),
    KvLayer(HEADS, 24, 4, "int8", 1),
)


def layout(page_size: int, heads: range = range(HEADS)) -> KvLayout:
    layers = (replace(layer, num_heads=len(heads), first_head=heads.start) for layer in LAYERS)
    return KvLayout(page_size, tuple(layers))


def token_at(worker: Any, layer: int, pages: tuple[int, ...], token: int, head: int) -> bytes:
    """K and V of one head of one token, read as an attention kernel would find them."""
    held, page_size = worker.layout.layers[layer], worker.layout.page_size
    at = pages[token // page_size] * worker.layout.page_bytes(layer)
    slot, index = token % page_size, head - held.first_head
    found = b""
    for dim in (held.key_dim, held.value_dim):
        start = at + (index * page_size + slot) * dim * held.itemsize
        found += bytes(worker.region.bytes_at(layer, start, dim * held.itemsize))
        at += held.num_heads * page_size * dim * held.itemsize
    return found


def scrambled(worker: Any, seed: int) -> tuple[int, ...]:
    return tuple(random.Random(seed).sample(range(64), worker.layout.num_pages(NUM_TOKENS)))


def hand_over(prefill: Any, decode: Any, src: tuple[int, ...], dst: tuple[int, ...], first_page: int = 0) -> Any:
    """The session, with its chunks of three pages stored layer by layer; the report of its end."""
    grant = decode.receiver.issue(A, first_page, dst[first_page:], NUM_TOKENS, prefill.layout)
    prefill.sender.open(A, len(src), num_tokens=NUM_TOKENS)
    for start in range(0, len(src), 3):
        for layer in range(len(LAYERS)):
            prefill.sender.pages_stored(A, layer, start, src[start : start + 3])
        if start == 3:
            prefill.sender.granted(A, grant)
    if len(src) <= 3:
        prefill.sender.granted(A, grant)
    prefill.sender.commit(A, b"token")
    decode.outcomes.payload_of(A)
    return prefill.outcomes.close_of(A)


@pytest.mark.parametrize("link_bytes_per_s", [1.0, None], ids=["layer by layer", "in groups"])
@pytest.mark.parametrize(("src_size", "dst_size", "first_page"), [(16, 64, 1), (64, 16, 5), (5, 7, 3), (16, 16, 2)])
def test_every_token_of_pages_of_another_size_is_found_where_it_belongs(
    make_worker: Any, src_size: int, dst_size: int, first_page: int, link_bytes_per_s: float | None
) -> None:
    prefill, decode = make_worker(1, layout(src_size)), make_worker(None, layout(dst_size))
    prefill.link_bytes_per_s = link_bytes_per_s
    src, dst = scrambled(prefill, 2), scrambled(decode, 3)
    report = hand_over(prefill, decode, src, dst, first_page)
    first_token = first_page * dst_size
    for layer in range(len(LAYERS)):
        for token in range(NUM_TOKENS):
            for head in (0, 3, HEADS - 1):
                found = token_at(decode, layer, dst, token, head)
                sent = token_at(prefill, layer, src, token, head)
                assert found == sent if token >= first_token else not any(found)
    if src_size != dst_size:
        assert report.bytes_sent == (NUM_TOKENS - first_token) * sum(layer.token_bytes for layer in LAYERS)


def test_two_ranks_of_a_split_model_fill_the_pages_of_one_that_is_whole(make_worker: Any) -> None:
    """Two sessions into the same pages, each with the heads of its sender; then from the whole one to a rank."""
    lower, upper = make_worker(1, layout(16, range(3))), make_worker(2, layout(32, range(3, HEADS)))
    whole = make_worker(None, layout(16))
    dst = scrambled(whole, 3)
    tables = [scrambled(rank, 4) for rank in (lower, upper)]
    for rank, src in zip((lower, upper), tables, strict=True):
        hand_over(rank, whole, src, dst)
        whole.outcomes.committed.clear()
    part = make_worker(None, layout(8, range(2, 6)))
    part_pages = scrambled(part, 5)
    hand_over(whole, part, dst, part_pages)
    for layer in range(len(LAYERS)):
        for token in range(NUM_TOKENS):
            for head in range(2, 6):
                rank = 0 if head < 3 else 1
                sent = token_at((lower, upper)[rank], layer, tables[rank], token, head)
                assert (
                    token_at(whole, layer, dst, token, head) == sent == token_at(part, layer, part_pages, token, head)
                )


def test_another_element_type_is_refused_by_field_at_both_ends(make_worker: Any) -> None:
    other = KvLayout(16, tuple(replace(layer, dtype="float8_e4m3fn", itemsize=1) for layer in LAYERS))
    prefill, decode = make_worker(1, other), make_worker(None, layout(16))
    with pytest.raises(Incompatible) as refused:
        decode.receiver.issue(A, 0, (1, 2), 32, other)
    assert refused.value.field == "dtype"
    prefill.sender.open(A, 2)
    with pytest.raises(Incompatible) as refused:
        prefill.sender.granted(A, decode.receiver.issue(A, 0, (1, 2), 32))
    assert refused.value.field == "dtype"
    prefill.sender.abort(A, "refused")
    decode.receiver.abort(A, "refused")
