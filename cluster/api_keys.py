"""May this client ask? Keys that clients of the doors show, from a file, if the configuration names one.

Invariants:
- Keys are compared by their digests in constant time, and none is logged, counted or told.
- The file is read again when it has changed. One that cannot be used never replaces one that could: a rotation that
  is under way, or wrong, shuts nobody out and lets nobody in.
"""

from __future__ import annotations

import hashlib
import hmac
import logging
import os
from collections.abc import Mapping
from pathlib import Path

from core.errors import InvalidConfig, WrongKey

logger = logging.getLogger(__name__)

AUTHORIZATION, X_API_KEY = "authorization", "x-api-key"  # OpenAI's way and Anthropic's
_SCHEME = "bearer"
_COMMENT = "#"

_Stamp = tuple[int, int, int] | None  # modified at in ns, size, inode; None: it cannot be looked at


class ApiKeys:
    """The keys of one file, one a line; empty lines and those that begin with # are none."""

    def __init__(self, file: str | None) -> None:
        """``file``: ``api_keys_file``; None: nobody needs a key. Raises ``InvalidConfig`` for one without any."""
        self._path = None if file is None else Path(file).expanduser()
        self._stamp: _Stamp = None
        self._digests: frozenset[bytes] = frozenset()
        if self._path is not None:
            self._stamp = _stamp(self._path)
            self._digests = _read(self._path)

    @property
    def needed(self) -> bool:
        """Must a client show one?"""
        return self._path is not None

    def check(self, headers: Mapping[str, str]) -> None:
        """Raise ``WrongKey`` unless the headers (lower case) hold a key, or none is needed."""
        if self._path is None:
            return
        self._reload(self._path)
        scheme, _, key = headers.get(AUTHORIZATION, "").partition(" ")
        shown = (key if scheme.lower() == _SCHEME else headers.get(X_API_KEY, "")).strip()
        if not shown:
            raise WrongKey("a key is needed: authorization: Bearer KEY, or x-api-key: KEY")
        digest = _digest(shown)
        # all are compared, so that time tells nothing of which one is near
        if not sum(hmac.compare_digest(digest, known) for known in self._digests):
            raise WrongKey("this key is not one of ours")

    def _reload(self, path: Path) -> None:
        stamp = _stamp(path)
        if stamp == self._stamp:
            return
        self._stamp = stamp
        try:
            self._digests = _read(path)
        except InvalidConfig as error:
            logger.warning("changed API keys cannot be used, the ones before stay in use: %s", error)
        else:
            logger.info("API keys reloaded from %s: %d", path, len(self._digests))


def _read(path: Path) -> frozenset[bytes]:
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise InvalidConfig("api_keys_file", f"{path} cannot be read: {error}") from error
    keys = [line.strip() for line in lines if line.strip() and not line.startswith(_COMMENT)]
    if not keys:
        raise InvalidConfig("api_keys_file", f"{path} holds no key: one a line")
    return frozenset(map(_digest, keys))


def _digest(key: str) -> bytes:
    return hashlib.sha256(key.encode()).digest()


def _stamp(path: Path) -> _Stamp:
    try:
        found = os.stat(path)
    except OSError:
        return None
    return found.st_mtime_ns, found.st_size, found.st_ino
