"""What does a page of a prefix look like on disk? One file for each page, which proves itself before it is used.

    FOLDER/pages-v1/FINGERPRINT/ab/abcdef...  named by the page's hash, in 256 folders by its first byte
    file    magic 8 | version u32 | 0 u32 | fingerprint 16 | page hash 16 | payload bytes u64 | checksum u64 | payload

The checksum is xxh3 of all that stands before it and of the payload. The fingerprint is of the model, its weights, the
dtype, the page size and the layout; a hash names the tokens from the prompt's first on, keyed by the tenant's salt
(core/prefix_hash.py). So a file that passes holds the K/V of exactly that prefix on exactly this model, whoever wrote
it. One that does not is deleted: damage is counted as such, and a file of another model or format as foreign.

A file is written under another name and renamed: a crash leaves a whole file or none. It is not flushed; after a power
failure its checksum tells. Only this process uses the folder (a lock is held), and files are its user's alone: they
hold what users wrote, in the model's words. One thread reads and writes after the start.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import logging
import os
import shutil
from dataclasses import astuple
from pathlib import Path
from struct import Struct

import xxhash

from core.errors import InvalidConfig
from core.fingerprint import CacheFingerprint
from core.prefix_hash import DIGEST_BYTES, PageHash

logger = logging.getLogger(__name__)

MAGIC = b"prfaasKV"
VERSION = 1
_HEAD = Struct(f"<8sII{DIGEST_BYTES}s{DIGEST_BYTES}sQ")
_CHECKSUM = Struct("<Q")
HEADER_BYTES = _HEAD.size + _CHECKSUM.size
_UNFINISHED = ".unfinished"


class DamagedPage(Exception):
    """A file does not hold what its name says; it has been deleted."""


class DiskPages:
    """The files of one engine."""

    def __init__(self, folder: Path, fingerprint: CacheFingerprint, page_bytes: int) -> None:
        """Raises ``InvalidConfig`` if the folder cannot be had, or another process has it."""
        self._page_bytes = page_bytes
        self._fingerprint = _digest(fingerprint)
        self._top = folder / f"pages-v{VERSION}"
        self._folder = self._top / self._fingerprint.hex()
        try:
            self._folder.mkdir(parents=True, exist_ok=True, mode=0o700)
            self._lock = os.open(self._top / "lock", os.O_RDWR | os.O_CREAT, 0o600)
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            for first in range(256):
                (self._folder / f"{first:02x}").mkdir(exist_ok=True, mode=0o700)
        except OSError as error:
            why = "another process uses it" if error.errno == errno.EWOULDBLOCK else str(error)
            raise InvalidConfig("engine.disk_cache_dir", f"{folder} cannot be used: {why}") from error

    @property
    def file_bytes(self) -> int:
        """Of each file."""
        return HEADER_BYTES + self._page_bytes

    def scan(self, max_files: int) -> tuple[list[PageHash], int]:
        """What lies there from earlier: at most ``max_files`` names, those written last, the oldest first; and how many
        foreign files there were. Those, and what is too much, are deleted. Names and sizes are looked at, not contents.
        """
        num_foreign = self._delete_other_models()
        found: list[tuple[float, PageHash, str]] = []
        for folder in self._folder.iterdir():
            if not folder.is_dir():
                num_foreign += self._delete_foreign(folder, "no file of a page belongs there")
                continue
            for entry in os.scandir(folder):
                name = _name_of(entry.name)
                if entry.name.endswith(_UNFINISHED):
                    os.unlink(entry.path)  # of a write that a crash has cut off
                elif name is None or entry.name[:2] != folder.name:
                    num_foreign += self._delete_foreign(Path(entry.path), "its name is no page's")
                elif entry.stat().st_size != self.file_bytes:
                    num_foreign += self._delete_foreign(Path(entry.path), "its size is no page's")
                else:
                    found.append((entry.stat().st_mtime, name, entry.path))
        found.sort()
        for _, _, path in found[: max(0, len(found) - max_files)]:
            os.unlink(path)
        return [name for _, name, _ in found[max(0, len(found) - max_files) :]], num_foreign

    def write(self, name: PageHash, payload: memoryview) -> None:
        """Raises ``OSError``; then there is no such file."""
        head = _HEAD.pack(MAGIC, VERSION, 0, self._fingerprint, name, self._page_bytes)
        path = self._path(name)
        unfinished = f"{path}{_UNFINISHED}"
        try:
            handle = os.open(unfinished, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
            with open(handle, "wb", buffering=0) as file:
                parts = [memoryview(head + _CHECKSUM.pack(_checksum(head, payload))), payload.cast("B")]
                while parts:
                    written = os.writev(file.fileno(), parts)
                    while parts and written >= len(parts[0]):
                        written -= len(parts.pop(0))
                    if written:
                        parts[0] = parts[0][written:]
            os.replace(unfinished, path)
        except OSError:
            self._unlink(unfinished)
            raise

    def read(self, name: PageHash, into: memoryview) -> None:
        """Read a page's payload. Raises ``DamagedPage`` for a file that is not what it should be, or is gone."""
        path = self._path(name)
        try:
            why = self._read(path, name, into)
        except OSError as error:
            why = str(error)
        if why:
            self._unlink(path)
            logger.warning("disk cache: %s is not used and deleted: %s", path, why)
            raise DamagedPage(why)

    def delete(self, name: PageHash) -> None:
        """What is not there need not go."""
        self._unlink(self._path(name))

    def close(self) -> None:
        """Let another process have the folder."""
        os.close(self._lock)

    # ---- inside ----

    def _read(self, path: str, name: PageHash, into: memoryview) -> str:
        """Why the file is not to be used; empty if it is."""
        with open(path, "rb", buffering=0) as file:
            header = file.read(HEADER_BYTES)
            payload = into.cast("B")
            num_read = 0
            while num_read < len(payload) and (count := file.readinto(payload[num_read:])):
                num_read += count
            if len(header) != HEADER_BYTES or num_read != len(payload) or file.read(1):
                return "its length is wrong"
        magic, version, _, fingerprint, written_name, num_bytes = _HEAD.unpack_from(header)
        if (magic, version) != (MAGIC, VERSION):
            return "it is of another format"
        if (fingerprint, num_bytes) != (self._fingerprint, self._page_bytes):
            return "it is of another model"
        if written_name != name:
            return "it is another page"
        if _CHECKSUM.unpack_from(header, _HEAD.size)[0] != _checksum(header[: _HEAD.size], payload):
            return "its checksum is wrong"
        return ""

    def _path(self, name: PageHash) -> str:
        text = name.hex()
        return f"{self._folder}/{text[:2]}/{text}"

    def _delete_other_models(self) -> int:
        """Folders of another fingerprint, which nobody would ever read; how many files were in them."""
        num_files = 0
        for folder in self._top.iterdir():
            if folder == self._folder or folder.name == "lock":
                continue
            num_files += sum(len(files) for _, _, files in os.walk(folder)) if folder.is_dir() else 1
            self._delete_foreign(folder, "it is of another model, or nobody's")
        return num_files

    def _delete_foreign(self, path: Path, why: str) -> int:
        logger.warning("disk cache: %s is not used and deleted: %s", path, why)
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path, ignore_errors=True)
        else:
            self._unlink(str(path))
        return 1

    def _unlink(self, path: str) -> None:
        try:
            os.unlink(path)
        except FileNotFoundError:
            pass
        except OSError as error:
            logger.warning("disk cache: %s cannot be deleted: %s", path, error)


def _digest(fingerprint: CacheFingerprint) -> bytes:
    return hashlib.blake2b(repr(astuple(fingerprint)).encode(), digest_size=DIGEST_BYTES).digest()


def _checksum(head: bytes, payload: memoryview) -> int:
    state = xxhash.xxh3_64(head)
    state.update(payload)
    return state.intdigest()


def _name_of(file_name: str) -> PageHash | None:
    try:
        name = bytes.fromhex(file_name)
    except ValueError:
        return None
    return PageHash(name) if len(name) == DIGEST_BYTES and name.hex() == file_name else None
