"""The one chain hash by which router, allocator and peers name a page of a prompt.

The digest of page *i* covers the tokens of pages 0..i, so equal digests mean equal prefixes and a longest-prefix
search may stop at the first miss. The hash is keyed: a tenant's ``salt`` separates tenants (nobody learns from a
cache hit what another tenant sent), and a cryptographic hash keeps one tenant from forging another's prefix.
"""

from __future__ import annotations

import hashlib
from array import array
from collections.abc import Sequence
from dataclasses import dataclass
from struct import Struct
from typing import NewType, TypeGuard

from core.cache_tiers import Tier

PageHash = NewType("PageHash", bytes)

DIGEST_BYTES = 16
_KEY = Struct("<Q")
KEY_BYTES = _KEY.size
_MAX_KEY_BYTES = 64


def extend_page_hashes(
    hashes: list[PageHash], token_ids: Sequence[int], page_size: int, salt: bytes = b""
) -> list[PageHash]:
    """Append to ``hashes`` the digests of those full pages of ``token_ids`` that it lacks, and return it.

    ``hashes[i]`` must be the digest of page *i* of the same tokens; a partial last page has no digest.
    """
    first, end = len(hashes) * page_size, len(token_ids) // page_size * page_size
    if end <= first:
        return hashes
    key = salt if len(salt) <= _MAX_KEY_BYTES else hashlib.blake2b(salt).digest()
    parent = hashes[-1] if hashes else b""
    # All pages at once become machine integers: that, not the hash, is what a long prompt costs. A scheduler's are.
    tokens = token_ids[first:end]
    missing = memoryview(tokens if _is_machine_integers(tokens) else array("q", tokens)).cast("B")
    page_bytes = page_size * missing.nbytes // (end - first)
    for start in range(0, missing.nbytes, page_bytes):
        page = missing[start : start + page_bytes]
        parent = hashlib.blake2b(parent + page, digest_size=DIGEST_BYTES, key=key).digest()
        hashes.append(PageHash(parent))
    return hashes


def _is_machine_integers(tokens: Sequence[int]) -> TypeGuard[array[int]]:
    return type(tokens) is array and tokens.typecode == "q"


def page_hashes(token_ids: Sequence[int], page_size: int, salt: bytes = b"") -> tuple[PageHash, ...]:
    """Digests of the full pages of ``token_ids``, in order."""
    return tuple(extend_page_hashes([], token_ids, page_size, salt))


def tenant_of(salt: bytes) -> str:
    """A name of the tenant whose prefixes ``salt`` sets apart, which tells nobody the salt; of none: empty."""
    return hashlib.blake2b(salt, digest_size=8, person=b"tenant").hexdigest() if salt else ""


def page_key(page_hash: PageHash) -> int:
    """What page events and the gateways' index call a page: the first ``KEY_BYTES`` of its hash."""
    key: int = _KEY.unpack_from(page_hash)[0]
    return key


@dataclass(frozen=True, slots=True)
class TierPages:
    """Page keys whose best place is this lower tier."""

    tier: Tier
    pages: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class PageEvents:
    """What a prefix cache gained and lost after ``after`` up to ``number``, as page keys.

    ``stored`` are on the device now, those of ``lower`` are in that tier at best, ``removed`` in none. Of a
    ``snapshot``, ``stored`` and ``lower`` are all there is, whatever came before.
    """

    number: int
    after: int = 0
    snapshot: bool = False
    stored: tuple[int, ...] = ()
    removed: tuple[int, ...] = ()
    lower: tuple[TierPages, ...] = ()
