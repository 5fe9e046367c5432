"""The CPU's kernel is compiled once for a machine, and where it cannot be had the reason is told."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from engine import cpu_kernel

needs_compiler = pytest.mark.skipif(cpu_kernel.compiler() is None, reason="no C++ compiler here")


@pytest.fixture(autouse=True)
def nothing_loaded() -> Iterator[None]:
    cpu_kernel.load_kernel.cache_clear()
    yield
    cpu_kernel.load_kernel.cache_clear()


@pytest.fixture
def broken_source(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = tmp_path / "broken.cpp"
    source.write_text("int main( {")
    monkeypatch.setattr(cpu_kernel, "_SOURCE", source)


@needs_compiler
def test_a_compiled_kernel_needs_no_compiler_any_more(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert cpu_kernel.missing(str(tmp_path)) is None
    cpu_kernel.load_kernel.cache_clear()
    monkeypatch.setattr(shutil, "which", lambda name: None)

    assert cpu_kernel.missing(str(tmp_path)) is None
    assert [path.suffix for path in (tmp_path / "kernels").iterdir()] == [".so"]


def test_without_a_compiler_it_is_missing_and_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "which", lambda name: None)

    assert "no C++ compiler (g++, c++, clang++) is installed" in (cpu_kernel.missing(str(tmp_path)) or "")


@needs_compiler
@pytest.mark.usefixtures("broken_source")
def test_what_cannot_be_compiled_leaves_nothing_behind(tmp_path: Path) -> None:
    assert "cannot compile its kernel" in (cpu_kernel.missing(str(tmp_path)) or "")
    assert list((tmp_path / "kernels").iterdir()) == []


@needs_compiler
@pytest.mark.usefixtures("broken_source")
def test_a_damaged_library_is_a_reason_too(tmp_path: Path) -> None:
    path = tmp_path / "kernels" / f"paged_attention-{cpu_kernel._digest()}.so"
    path.parent.mkdir()
    path.write_bytes(b"not a library")

    assert "cannot be loaded" in (cpu_kernel.missing(str(tmp_path)) or "")
