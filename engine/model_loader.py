"""How does a folder become a model that can be served, and what is it then called?

Loads the transformers model with our attention function in place, finds out what its layers store (a probe forward,
model_runner.py), decides how many pages there are and how long a sequence may be, and names the cache: two workers
that loaded the same weights in the same way get equal fingerprints, wherever their folders lie.
"""

from __future__ import annotations

import hashlib
import json
import logging
import sys
from collections.abc import Iterable
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel
from transformers.utils import logging as transformers_logging

from core.clock import WallClock
from core.compute import ComputeProfile
from core.errors import InvalidConfig, UnsupportedModel
from core.fingerprint import CacheFingerprint
from engine import cpu_kernel
from engine.attention_choice import AttentionCase
from engine.cache_layout import CacheLayout
from engine.config import CPU_KV_CACHE_BYTES, EngineConfig
from engine.device_memory import pages_that_fit
from engine.merged_linear import merge_projections
from engine.model_costs import compute_profile
from engine.model_runner import ATTENTION_NAME, probe_layers, register_attention
from engine.model_source import ModelSource, SourceKind
from engine.packed_linear import operators_work, pack_linears
from engine.quantisation import Quantisation, assess
from engine.rank_group import RankGroup
from engine.sharded_model import loading_options, require_degree, shard_model

logger = logging.getLogger(__name__)

# What transformers raises for folders and configurations that it cannot load.
_LOADING_ERRORS = (AttributeError, ImportError, KeyError, OSError, RuntimeError, TypeError, ValueError)
_WEIGHT_SUFFIXES = (".safetensors", ".bin")
_NUM_SAMPLES, _SAMPLE_BYTES = 64, 4096
# Keys of a config that do not change what is computed, or that say where it came from.
_NOT_NUMBERS = frozenset({"transformers_version", "dtype", "torch_dtype", "architectures", "use_cache"})


@dataclass(frozen=True, slots=True)
class ModelDescription:
    """What others need to know of a loaded model."""

    architecture: str
    max_model_len: int  # tokens, prompt and output
    vocab_size: int
    eos_token_ids: tuple[int, ...]  # ascending; any of them ends a sequence
    compute: ComputeProfile
    weights: str = ""  # how they are quantised, in short; empty: they are not


@dataclass(frozen=True, slots=True)
class LoadedModel:
    """A model on its device, and how it is to be served."""

    model: PreTrainedModel
    device: torch.device
    layout: CacheLayout
    attention: AttentionCase
    num_pages: int
    description: ModelDescription
    fingerprint: CacheFingerprint
    quantisation: Quantisation | None  # None: plain weights
    folder: Path  # holds its tokenizer, if it has one


def load_model(source: ModelSource, config: EngineConfig, group: RankGroup | None = None) -> LoadedModel:
    """Load and probe. Raises ``UnsupportedModel`` with the reason, ``InvalidConfig`` if a key does not suit it.

    ``group``: the ranks among which the model is divided, each of which loads its part at the same time; None: one.

    Sets the process's number of torch threads if ``config.threads`` says so.
    """
    if config.threads is not None:
        torch.set_num_threads(config.threads)
    device = device_of(config)
    register_attention()
    model, quantisation = _load(source, config, device, group)
    layers = probe_layers(model)
    rank, num_ranks = (0, 1) if group is None else (group.rank, group.size)
    layout = CacheLayout(tuple(layer.cache for layer in layers), config.page_size, rank, num_ranks)
    capability = torch.cuda.get_device_capability(device) if device.type == "cuda" else None
    attention = AttentionCase(device.type, capability, config.page_size, layers, _native_missing(config, device))
    text_config = model.config.get_text_config()
    model_limit = _model_limit(text_config)
    num_pages = _num_pages(config, model, layout, attention, config.max_model_len or model_limit)
    if group is not None:
        num_pages = group.least(num_pages, device)  # pages have the same numbers on every rank
    description = ModelDescription(
        architecture=type(model).__name__,
        max_model_len=_max_model_len(config, model_limit, num_pages * config.page_size),
        vocab_size=text_config.vocab_size,
        eos_token_ids=_eos_token_ids(model, source.folder),
        compute=compute_profile(model, layout, device, config.step_tokens),
        weights="" if quantisation is None else quantisation.label,
    )
    fingerprint = CacheFingerprint(
        model=f"{description.architecture}-{_config_digest(text_config)}",
        revision=f"dummy-{config.dummy_seed}" if source.kind is SourceKind.DUMMY else weights_digest(source.folder),
        dtype=str(model.dtype).removeprefix("torch."),
        page_size=config.page_size,
        layout=layout.fingerprint(),
    )
    return LoadedModel(
        model, device, layout, attention, num_pages, description, fingerprint, quantisation, source.folder
    )


def _num_pages(
    config: EngineConfig, model: PreTrainedModel, layout: CacheLayout, attention: AttentionCase, limit: int | None
) -> int:
    if config.num_pages is not None:
        return config.num_pages
    if config.kv_cache_bytes is None and model.device.type == "cuda":
        return pages_that_fit(model, layout, attention, config, limit)
    num_pages = (config.kv_cache_bytes or CPU_KV_CACHE_BYTES) // layout.bytes_per_page
    if num_pages < 1:
        raise InvalidConfig("engine.kv_cache_bytes", f"must hold at least one page, {layout.bytes_per_page} bytes")
    return num_pages


def _native_missing(config: EngineConfig, device: torch.device) -> str | None:
    if device.type != "cpu" or config.attention not in ("auto", "native"):
        return "nobody asked for it"  # and it need not be compiled
    return cpu_kernel.missing(config.compile_cache)


def device_of(config: EngineConfig) -> torch.device:
    """Where the model will be. Raises ``InvalidConfig`` for a GPU that is not there."""
    if config.device == "cuda" and not torch.cuda.is_available():
        raise InvalidConfig("engine.device", "is cuda, but torch sees no GPU")
    if config.device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return torch.device(config.device)


def _load(
    source: ModelSource, config: EngineConfig, device: torch.device, group: RankGroup | None
) -> tuple[PreTrainedModel, Quantisation | None]:
    quantisation: Quantisation | None = None
    try:
        model_config = AutoConfig.from_pretrained(source.folder, local_files_only=True)
        _refuse(model_config)
        if group is not None:
            require_degree(model_config, group.size)
        dtype = _dtype(config, model_config, device)
        model: Any
        if source.kind is SourceKind.DUMMY:
            model = _random_model(model_config, dtype, device, config.dummy_seed)
            model.to(device)
        else:
            quantisation = _quantisation(model_config, device)
            if quantisation is not None and group is not None:
                raise InvalidConfig("tensor_parallel", f"must be 1 for {quantisation.label} weights, got {group.size}")
            model = _read_weights(source, model_config, dtype, device, group)
        if group is not None:
            shard_model(model, group)
            model = model.to(device)
    except _LOADING_ERRORS as error:
        raise UnsupportedModel(f"{source.name}: transformers cannot load it: {error}") from error
    loaded: PreTrainedModel = model.eval()
    pack_linears(loaded)
    if device.type == "cuda":
        merge_projections(loaded)
        torch.cuda.empty_cache()  # of the weights that were merged
        # Its heuristics are a tenth faster for some of a decode step's products, and never slower (docs/engine.md).
        torch.backends.cuda.preferred_blas_library("cublaslt")
    return loaded, quantisation


def _quantisation(model_config: Any, device: torch.device) -> Quantisation | None:
    """None: its weights are plain. May tell transformers to dequantise them."""
    settings = getattr(model_config, "quantization_config", None)
    if not settings:
        return None
    capability = torch.cuda.get_device_capability(device) if device.type == "cuda" else None
    quantisation = assess(settings, device.type, capability)
    if quantisation.dequantised:
        settings["dequantize"] = True
    logger.info("%s: %s", quantisation.label, quantisation.reason)
    return quantisation


def _read_weights(
    source: ModelSource, model_config: Any, dtype: torch.dtype, device: torch.device, group: RankGroup | None
) -> PreTrainedModel:
    """transformers maps all files and copies their tensors on several threads, each straight to the device; of a model
    that is divided this rank's slices, where it can."""
    options: dict[str, Any] = {"device_map": device if device.type == "cuda" else None}
    if group is not None:
        options = loading_options(group, device)
    if not sys.stderr.isatty():
        transformers_logging.disable_progress_bar()
    clock = WallClock()
    began_at = clock.now()
    model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(
        source.folder,
        config=model_config,
        dtype=dtype,
        attn_implementation=ATTENTION_NAME,
        local_files_only=True,
        **options,
    )
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    seconds, sizes = clock.now() - began_at, [path.stat().st_size for path in _weight_files(source.folder)]
    logger.info(
        "read %.2f GB of weights from %d files to %s in %.1f s, %.2f GB/s",
        *(sum(sizes) / 1e9, len(sizes), device, seconds, sum(sizes) / 1e9 / max(seconds, 1e-9)),
    )
    return model


def _random_model(model_config: Any, dtype: torch.dtype, device: torch.device, seed: int) -> PreTrainedModel:
    factory: Any = AutoModelForCausalLM
    devices = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices), torch.device(device):
        torch.manual_seed(seed)
        # A copy, because from_config keeps and changes the config that it is given.
        model: PreTrainedModel = factory.from_config(
            deepcopy(model_config), dtype=dtype, attn_implementation=ATTENTION_NAME
        )
    return model


def _refuse(model_config: Any) -> None:
    """Refuse what can be told from the configuration; the probe and the self-test find the rest."""
    if model_config.is_encoder_decoder:
        raise UnsupportedModel(f"{model_config.model_type} is an encoder-decoder model; only decoders can be served")
    if _rope_type(model_config.get_text_config()) == "dynamic":
        raise UnsupportedModel(
            "rope_type dynamic turns the keys of all sequences of a step by the longest one's length"
        )


def _rope_type(text_config: Any) -> str | None:
    parameters = getattr(text_config, "rope_parameters", None)
    rope_type = parameters.get("rope_type") if isinstance(parameters, dict) else None
    return rope_type if isinstance(rope_type, str) else None


def _dtype(config: EngineConfig, model_config: Any, device: torch.device) -> torch.dtype:
    name = config.dtype
    if name == "auto":
        if device.type == "cpu":
            # A processor without instructions for bfloat16 computes it many times slower than float32.
            return torch.bfloat16 if operators_work(torch.bfloat16) else torch.float32
        stored = getattr(model_config.get_text_config(), "dtype", None)
        return stored if isinstance(stored, torch.dtype) else torch.bfloat16
    dtype: torch.dtype = getattr(torch, name)
    return dtype


def _model_limit(text_config: Any) -> int | None:
    """Positions that the model was made for; None if its configuration does not say."""
    limit = getattr(text_config, "max_position_embeddings", None)
    if _rope_type(text_config) == "longrope":
        # Above it the model turns all keys of a step by other factors, short sequences' and cached ones' too.
        parameters = text_config.rope_parameters
        original = parameters.get("original_max_position_embeddings")
        limit = original or getattr(text_config, "original_max_position_embeddings", None) or limit
    return limit if isinstance(limit, int) else None


def _max_model_len(config: EngineConfig, model_limit: int | None, num_slots: int) -> int:
    asked = config.max_model_len
    if asked is None:
        return min(model_limit or num_slots, num_slots)
    if model_limit is not None and asked > model_limit:
        raise InvalidConfig("engine.max_model_len", f"must be at most the model's limit of {model_limit}, got {asked}")
    if asked > num_slots:
        raise InvalidConfig("engine.max_model_len", f"must fit the page pool of {num_slots} tokens, got {asked}")
    return asked


def _eos_token_ids(model: PreTrainedModel, folder: Path) -> tuple[int, ...]:
    """What ends a sequence by the generation config, the config or the tokenizer: chat models name their end of turn
    in one of them and the end of text in another."""
    found: set[int] = set()
    for config in (model.generation_config, model.config, model.config.get_text_config()):
        ids = getattr(config, "eos_token_id", None)
        found.update(ids if isinstance(ids, Iterable) else () if ids is None else (ids,))
    if (folder / "tokenizer_config.json").is_file():
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
        found.update(() if tokenizer.eos_token_id is None else (tokenizer.eos_token_id,))
    return tuple(sorted(found))


def _config_digest(text_config: Any) -> str:
    numbers = {
        key: value
        for key, value in text_config.to_dict().items()
        if key not in _NOT_NUMBERS and not key.startswith("_")
    }
    text = json.dumps(numbers, sort_keys=True, default=str)
    return hashlib.blake2b(text.encode(), digest_size=8).hexdigest()


def _weight_files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.iterdir() if path.suffix in _WEIGHT_SUFFIXES)


def weights_digest(folder: Path) -> str:
    """A digest of the weight files' sizes, headers and evenly spread samples: milliseconds, whatever their size."""
    digest = hashlib.blake2b(digest_size=16)
    for path in _weight_files(folder):
        size = path.stat().st_size
        digest.update(f"{path.name}/{size}/".encode())
        with path.open("rb") as file:
            for sample in range(_NUM_SAMPLES):
                file.seek(size * sample // _NUM_SAMPLES)
                digest.update(file.read(_SAMPLE_BYTES))
    return digest.hexdigest()
