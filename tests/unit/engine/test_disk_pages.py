"""A file is used if it holds exactly what its name says, on exactly this model; anything else is deleted."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

import pytest

from core.errors import InvalidConfig
from core.fingerprint import CacheFingerprint
from core.prefix_hash import PageHash
from engine.disk_pages import HEADER_BYTES, DamagedPage, DiskPages

MODEL = CacheFingerprint("model", "weights", "float32", 4, "layout")
PAGE_BYTES = 100
NAME, OTHER = PageHash(bytes(range(16))), PageHash(bytes(range(1, 17)))
PAYLOAD = bytes(range(PAGE_BYTES))


def opened(folder: Path, model: CacheFingerprint = MODEL) -> DiskPages:
    return DiskPages(folder, model, PAGE_BYTES)


def path_of(folder: Path, name: PageHash) -> Path:
    return next(folder.rglob(name.hex()))


def read(pages: DiskPages, name: PageHash) -> bytes:
    into = bytearray(PAGE_BYTES)
    pages.read(name, memoryview(into))
    return bytes(into)


def test_what_was_written_is_found_and_read_after_a_restart(tmp_path: Path) -> None:
    pages = opened(tmp_path)
    pages.write(NAME, memoryview(PAYLOAD))
    pages.write(OTHER, memoryview(PAYLOAD[::-1].ljust(PAGE_BYTES)))
    os.utime(path_of(tmp_path, OTHER), (1, 1))
    pages.close()

    pages = opened(tmp_path)

    assert pages.scan(10) == ([OTHER, NAME], 0)  # the oldest first
    assert read(pages, NAME) == PAYLOAD
    assert os.stat(path_of(tmp_path, NAME)).st_mode & 0o077 == 0
    pages.close()


def test_of_more_files_than_the_budget_the_oldest_are_deleted(tmp_path: Path) -> None:
    pages = opened(tmp_path)
    for number in range(4):
        name = PageHash(bytes([number]) * 16)
        pages.write(name, memoryview(PAYLOAD))
        os.utime(path_of(tmp_path, name), (number, number))
    assert pages.scan(2) == ([PageHash(bytes([number]) * 16) for number in (2, 3)], 0)
    assert pages.scan(9)[0] == [PageHash(bytes([number]) * 16) for number in (2, 3)]
    pages.close()


@pytest.mark.parametrize("position", [0, 9, 17, 33, 49, 57, HEADER_BYTES, HEADER_BYTES + PAGE_BYTES - 1])
def test_a_flipped_bit_anywhere_is_noticed(tmp_path: Path, position: int) -> None:
    pages = opened(tmp_path)
    pages.write(NAME, memoryview(PAYLOAD))
    path = path_of(tmp_path, NAME)
    data = bytearray(path.read_bytes())
    data[position] ^= 0x10
    path.write_bytes(data)

    with pytest.raises(DamagedPage):
        read(pages, NAME)

    assert not path.exists()
    pages.close()


@pytest.mark.parametrize("change", ["longer", "shorter", "renamed", "gone"])
def test_a_file_that_was_tampered_with_is_noticed(tmp_path: Path, change: str) -> None:
    pages = opened(tmp_path)
    pages.write(NAME, memoryview(PAYLOAD))
    path = path_of(tmp_path, NAME)
    data, wanted = path.read_bytes(), NAME
    if change == "renamed":
        wanted = OTHER
        path.rename(path.parent.parent / OTHER.hex()[:2] / OTHER.hex())
    elif change == "gone":
        path.unlink()
    else:
        path.write_bytes(data + b"x" if change == "longer" else data[:-1])
    with pytest.raises(DamagedPage):
        read(pages, wanted)
    pages.close()


def test_files_of_another_model_and_other_things_are_deleted_and_counted(tmp_path: Path) -> None:
    pages = opened(tmp_path)
    pages.write(NAME, memoryview(PAYLOAD))
    pages.close()
    pages = opened(tmp_path, replace(MODEL, revision="other weights"))
    pages.write(OTHER, memoryview(PAYLOAD))
    folder = path_of(tmp_path, OTHER).parent
    (folder / "notes.txt").write_text("hello")
    (folder / f"{OTHER.hex()[:2]}{'0' * 30}").write_bytes(b"short")
    (folder / f"{OTHER.hex()}.unfinished").write_bytes(b"of a crash")

    assert pages.scan(10) == ([OTHER], 3)

    assert {path.name for path in tmp_path.rglob("*") if path.is_file()} == {"lock", OTHER.hex()}
    pages.close()


def test_nobody_else_may_use_the_folder_meanwhile(tmp_path: Path) -> None:
    pages = opened(tmp_path)
    with pytest.raises(InvalidConfig, match=r"engine\.disk_cache_dir.*another process"):
        opened(tmp_path)
    pages.close()
    opened(tmp_path).close()


def test_a_folder_that_cannot_be_made_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(InvalidConfig, match=r"engine\.disk_cache_dir"):
        opened(tmp_path / "file")
