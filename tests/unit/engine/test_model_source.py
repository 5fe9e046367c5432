"""Every way of naming a model leads to a folder, or to a reason why not."""

from __future__ import annotations

import json
import logging
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from core.errors import UnsupportedModel
from engine import model_source
from engine.model_source import ModelSource, SourceKind, main, resolve


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    return folder


@pytest.fixture
def gguf(tmp_path: Path) -> Path:
    path = tmp_path / "small.gguf"
    path.write_bytes(b"GGUF" + bytes(100))
    return path


@pytest.fixture
def conversions(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """Stands in for the conversion itself, and notes every run of it."""
    runs: list[Path] = []

    def convert(gguf: Path, folder: Path) -> None:
        runs.append(gguf)
        folder.mkdir()
        (folder / "config.json").write_text("{}")

    monkeypatch.setattr(model_source, "_convert", convert)
    return runs


def test_a_folder_is_itself(folder: Path) -> None:
    assert resolve(str(folder)) == ModelSource(str(folder), SourceKind.FOLDER, folder)


def test_a_folder_without_config_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UnsupportedModel, match=r"there is no config.json"):
        resolve(str(tmp_path))


@pytest.mark.parametrize("tail", ["", "config.json"])
def test_dummy_names_a_config_or_its_folder(folder: Path, tail: str) -> None:
    assert resolve(f"dummy:{folder / tail}").folder == folder
    assert resolve(f"dummy:{folder / tail}").kind is SourceKind.DUMMY


def test_dummy_without_config_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UnsupportedModel, match=r"there is no config.json"):
        resolve(f"dummy:{tmp_path}")


def test_a_gguf_file_is_converted_once(gguf: Path, tmp_path: Path, conversions: list[Path]) -> None:
    first = resolve(str(gguf), tmp_path / "cache")
    second = resolve(str(gguf), tmp_path / "cache")

    assert first == second
    assert first.kind is SourceKind.GGUF
    assert (first.folder / "config.json").is_file()
    assert conversions == [gguf]


def test_another_file_of_the_same_name_has_another_folder(gguf: Path, tmp_path: Path, conversions: list[Path]) -> None:
    first = resolve(str(gguf), tmp_path / "cache")
    gguf.write_bytes(b"GGUF" + bytes([1] * 100))

    assert resolve(str(gguf), tmp_path / "cache").folder != first.folder
    assert len(conversions) == 2


def test_a_conversion_that_fails_leaves_nothing_and_may_be_tried_again(
    gguf: Path, tmp_path: Path, conversions: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(gguf: Path, folder: Path) -> None:
        folder.mkdir()
        raise UnsupportedModel("no")

    with monkeypatch.context() as patch:
        patch.setattr(model_source, "_convert", fail)
        with pytest.raises(UnsupportedModel):
            resolve(str(gguf), tmp_path / "cache")
    assert not [path for path in (tmp_path / "cache").iterdir() if path.is_dir()]

    assert resolve(str(gguf), tmp_path / "cache").folder.is_dir()


def test_what_a_killed_conversion_left_is_cleared_away(gguf: Path, tmp_path: Path, conversions: list[Path]) -> None:
    folder = resolve(str(gguf), tmp_path / "cache").folder
    partial = folder.rename(folder.with_name(f"{folder.name}.partial"))

    assert resolve(str(gguf), tmp_path / "cache").folder == folder
    assert folder.is_dir()
    assert not partial.exists()


def test_those_who_ask_at_one_time_wait_for_one_conversion(gguf: Path, tmp_path: Path, conversions: list[Path]) -> None:
    found: list[Path] = []
    threads = [
        threading.Thread(target=lambda: found.append(resolve(str(gguf), tmp_path / "cache").folder)) for _ in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()

    assert len(found) == 4
    assert len(set(found)) == 1
    assert len(conversions) == 1


def test_a_packages_gguf_is_found_without_importing_it(
    tmp_path: Path, conversions: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    package = tmp_path / "packaged_model_of_a_test"
    package.mkdir()
    (package / "__init__.py").write_text("raise RuntimeError('imported')")
    (package / "weights.gguf").write_bytes(b"GGUF")
    monkeypatch.syspath_prepend(tmp_path)

    source = resolve("package:packaged_model_of_a_test", tmp_path / "cache")

    assert source.name == "package:packaged_model_of_a_test"
    assert conversions == [package / "weights.gguf"]


@pytest.mark.parametrize("name", ["surely_not_installed", "json", "not.a.package", ""])
def test_a_package_that_holds_no_model_is_refused(name: str) -> None:
    with pytest.raises(UnsupportedModel, match="package:"):
        resolve(f"package:{name}")


def test_a_file_that_is_no_gguf_is_refused(gguf: Path, tmp_path: Path) -> None:
    with pytest.raises(UnsupportedModel, match=r"small.gguf: cannot be converted"):
        resolve(str(gguf), tmp_path / "cache")


def test_a_name_that_nothing_answers_to_is_refused_with_both_reasons(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)

    with pytest.raises(UnsupportedModel, match="nobody/nothing: no such folder or file, and the hub does not give it"):
        resolve("nobody/nothing")


def test_main_prints_the_folder(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(folder)]) == 0
    assert capsys.readouterr().out == f"{folder}\n"


def test_main_explains_a_refusal(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(tmp_path)]) == 2
    assert "there is no config.json" in capsys.readouterr().err


def test_conversion_is_announced(
    gguf: Path, tmp_path: Path, conversions: list[Path], caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO):
        resolve(str(gguf), tmp_path / "cache")

    assert [record.getMessage().split()[0] for record in caplog.records] == ["converting", "converted"]


def test_loading_the_module_loads_no_torch() -> None:
    code = "import json, sys, engine.model_source; print(json.dumps(list(sys.modules)))"

    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, check=True, text=True).stdout

    assert not {"torch", "transformers", "huggingface_hub"} & set(json.loads(loaded))
