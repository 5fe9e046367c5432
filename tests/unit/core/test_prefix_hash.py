from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from core.prefix_hash import DIGEST_BYTES, extend_page_hashes, page_hashes, tenant_of

TOKENS = st.lists(st.integers(0, 300_000), max_size=60)
PAGE_SIZES = st.integers(1, 8)


@settings(deadline=None, derandomize=True)
@given(TOKENS, PAGE_SIZES)
def test_every_full_page_has_a_digest_and_a_partial_one_has_none(tokens: list[int], page_size: int) -> None:
    hashes = page_hashes(tokens, page_size)
    assert len(hashes) == len(tokens) // page_size
    assert all(len(digest) == DIGEST_BYTES for digest in hashes)


@settings(deadline=None, derandomize=True)
@given(TOKENS, TOKENS, PAGE_SIZES)
def test_digests_are_equal_exactly_as_far_as_the_pages_are(left: list[int], right: list[int], page_size: int) -> None:
    for index, (a, b) in enumerate(zip(page_hashes(left, page_size), page_hashes(right, page_size), strict=False)):
        end = (index + 1) * page_size
        assert (a == b) == (left[:end] == right[:end])


@settings(deadline=None, derandomize=True)
@given(TOKENS, PAGE_SIZES, st.integers(0, 60))
def test_extending_gives_what_hashing_at_once_gives(tokens: list[int], page_size: int, known: int) -> None:
    hashes = list(page_hashes(tokens[:known], page_size))
    extended = extend_page_hashes(hashes, tokens, page_size)
    assert extended is hashes
    assert tuple(extended) == page_hashes(tokens, page_size)


def test_a_changed_first_token_changes_every_digest() -> None:
    assert set(page_hashes([1] * 12, 4)).isdisjoint(page_hashes([2] + [1] * 11, 4))


def test_equal_pages_at_different_depths_have_different_digests() -> None:
    assert len(set(page_hashes([7] * 12, 4))) == 3


def test_tenants_share_no_digest() -> None:
    tokens = list(range(12))
    seen = [page_hashes(tokens, 4, salt) for salt in (b"", b"a", b"b")]
    assert len({digest for hashes in seen for digest in hashes}) == 9


def test_salts_longer_than_a_key_count_in_full() -> None:
    long = b"x" * 80
    assert page_hashes([1, 2], 2, long) == page_hashes([1, 2], 2, long)
    assert page_hashes([1, 2], 2, long) != page_hashes([1, 2], 2, long + b"y")
    assert page_hashes([1, 2], 2, long) != page_hashes([1, 2], 2, long[:64])


def test_digests_are_the_same_in_every_process() -> None:
    assert page_hashes([1, 2, 3, 4], 4)[0].hex() == GOLDEN


# Recorded once: a change of this value makes every running worker's prefix cache and every peer's index miss.
GOLDEN = "087a24230771ee662be37e5493b333d7"


def test_a_tenants_name_is_of_its_salt_and_tells_nobody_the_salt() -> None:
    assert tenant_of(b"") == ""
    assert tenant_of(b"acme") == tenant_of(b"acme") != tenant_of(b"other")
    assert "acme" not in tenant_of(b"acme")
