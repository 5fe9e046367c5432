"""What two workers must share before one may write pages into the other's pool."""

from __future__ import annotations

from dataclasses import dataclass, fields

from core.errors import Incompatible


@dataclass(frozen=True, slots=True)
class CacheFingerprint:
    """Identity of the K/V bytes in a pool: equal fingerprints mean that a page may be copied as it is."""

    model: str  # architecture and configuration digest, not the path it was loaded from
    revision: str  # digest of the weights
    dtype: str
    page_size: int  # tokens
    layout: str  # digest of every layer's heads, dims and window

    def require_equal(self, theirs: CacheFingerprint) -> None:
        """Raise ``Incompatible`` naming the first field that differs."""
        for field in fields(self):
            mine, other = getattr(self, field.name), getattr(theirs, field.name)
            if mine != other:
                raise Incompatible(field.name, str(mine), str(other))
