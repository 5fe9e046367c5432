"""What two workers must share before one may write K/V into the other's pool."""

from __future__ import annotations

from dataclasses import dataclass

from core.errors import Incompatible

MUST_AGREE = ("model", "revision", "dtype", "layout")


@dataclass(frozen=True, slots=True)
class CacheFingerprint:
    """Identity of what a pool holds. Pools that differ in ``page_size`` alone exchange K/V all the same: it is cut
    differently (kv_transfer/transfer_plan.py). Equal fingerprints mean that a page may be copied as it is."""

    model: str  # architecture and configuration digest, not the path it was loaded from
    revision: str  # digest of the weights
    dtype: str
    page_size: int  # tokens
    layout: str  # digest of every layer's heads, dims and window

    def require_compatible(self, theirs: CacheFingerprint) -> None:
        """Raise ``Incompatible`` naming the first field that differs and must not."""
        if (field := self._conflict(theirs)) is not None:
            raise Incompatible(field, str(getattr(self, field)), str(getattr(theirs, field)))

    def compatible(self, theirs: CacheFingerprint) -> bool:
        """May K/V be moved from one to the other?"""
        return self._conflict(theirs) is None

    def _conflict(self, theirs: CacheFingerprint) -> str | None:
        return next((name for name in MUST_AGREE if getattr(self, name) != getattr(theirs, name)), None)
