"""How do two datacenters come to this machine? A network namespace each, a Ray cluster each, and one link.

    east   the gateway, two workers that prefill and one that decodes
    west   a worker that only prefills, and joins east's gateway

Both are what an operator starts: ``prfaas serve FILE``. The model is a small Llama with random weights, whose K/V is
large for what it computes (16 KiB a token), so that a link of a few hundred Mbit/s is what limits, as 100 Gbit/s is in
PAPERS.md A.

Invariant: what was started is stopped, in order, when the ``with`` block ends, however it ends.
"""

from __future__ import annotations

import json
import sys
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import yaml
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast

from benchmarks.network_lab import Namespace, NetworkLab
from cluster.service_process import ServiceProcess
from engine.config import EngineConfig

VOCAB_SIZE = 384
MAX_MODEL_LEN = 2048
EAST, WEST = "east", "west"
REGISTRY_PORT, GRPC_PORT, HTTP_PORT = 9100, 9000, 8000  # alone in their namespace
LEASE_S = 3.0

_MODEL = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "num_key_value_heads": 8,
    "head_dim": 64,
    "max_position_embeddings": MAX_MODEL_LEN,
    "initializer_range": 0.2,  # large enough for tokens to vary and to depend on every earlier one
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": 0,
    "tie_word_embeddings": False,
}
_ENGINE: dict[str, Any] = {
    "device": "cpu",
    "dtype": "float32",
    "threads": 1,
    "page_size": 16,
    "num_pages": 1024,
    "max_model_len": MAX_MODEL_LEN,
    "max_batch_tokens": 256,
    "max_batch_size": 2,  # so that answers need not be long for decoding to be what limits
}


def save_model(folder: Path) -> str:
    """A configuration and a tokenizer in ``folder``; returns the name by which a service loads it."""
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(_MODEL), encoding="utf-8")
    words = Tokenizer(models.WordLevel({f"w{number}": number for number in range(VOCAB_SIZE)}, unk_token="w0"))
    PreTrainedTokenizerFast(tokenizer_object=words).save_pretrained(str(folder))
    return f"dummy:{folder}"


def engine_config() -> EngineConfig:
    """What every worker computes with."""
    return EngineConfig(**_ENGINE)


@dataclass(frozen=True)
class Datacenter:
    """One side: where it runs, and its configuration."""

    name: str
    namespace: Namespace
    config: dict[str, Any]


def _datacenter(lab: NetworkLab, name: str, model: str, folder: Path, capacity_gbps: float) -> Datacenter:
    namespace = lab.left if name == EAST else lab.right
    config: dict[str, Any] = {
        "model": model,
        "served_model_name": "random-llama",
        "cluster_id": name,
        "host": namespace.address,
        "engine": _ENGINE,  # one thread each: the kernel shares the cores out
        "kv_transfer": {
            "lease_s": 10.0,
            "links": [{"from_cluster": WEST, "to_cluster": EAST, "connections": 2, "capacity_gbps": capacity_gbps}],
        },
        "tls": {"mode": "off"},
        "drain_timeout_s": 2.0,
        "start_timeout_s": 120.0,
    }
    pool = {"num_cpus": 0.1}
    if name == EAST:
        config |= {
            "prefill": {"count": 2, **pool},
            "decode": {"count": 1, **pool},
            "registry": {"port": REGISTRY_PORT},
            "router": {"policy": "prfaas", "lease_s": LEASE_S},
            "http": {"port": HTTP_PORT},
            "grpc": {"port": GRPC_PORT},
        }
    else:
        config |= {
            "join": [f"{lab.left.address}:{REGISTRY_PORT}"],
            "prefill": {"count": 1, **pool},
            "decode": {"count": 0},
        }
    return Datacenter(name, namespace, config)


class TwoDatacenters:
    """Both services, from ``with`` to its end."""

    def __init__(self, lab: NetworkLab, folder: Path, capacity_gbps: float, more: dict[str, Any] | None = None) -> None:
        """``folder``: for files of the run; short, as Ray makes sockets in it. ``more``: sections of east's service."""
        self.model = save_model(folder / "model")
        self._folder = folder
        sides = [_datacenter(lab, name, self.model, folder, capacity_gbps) for name in (EAST, WEST)]
        sides[0].config.update(more or {})
        self._sides = sides
        self._services: dict[str, ServiceProcess] = {}
        self._opened = ExitStack()

    def __enter__(self) -> Self:
        for side, path in zip(self._sides, self.write_configurations(), strict=True):
            self._services[side.name] = self._opened.enter_context(self._start(side, path))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._opened.close()

    @property
    def door(self) -> str:
        """host:port of the gateway's gRPC door, from inside east."""
        return f"127.0.0.1:{GRPC_PORT}"

    def wait_until_ready(self, timeout_s: float) -> float:
        """Return after how many seconds east serves; raises ``ServiceNotHealthy`` with the end of a log otherwise."""
        return self._services[EAST].wait_until_healthy(timeout_s)

    def log(self, name: str) -> str:
        """The last lines that a datacenter's service wrote."""
        return self._services[name].log_tail()

    def write_configurations(self) -> list[Path]:
        """The files from which east and west are served."""
        paths = [self._folder / f"{side.name}.yaml" for side in self._sides]
        for side, path in zip(self._sides, paths, strict=True):
            path.write_text(yaml.safe_dump(side.config, sort_keys=False), encoding="utf-8")
        return paths

    def _start(self, side: Datacenter, path: Path) -> ServiceProcess:
        return ServiceProcess(
            side.namespace.command([sys.executable, "-m", "cluster", "serve", str(path)]),
            f"http://127.0.0.1:{HTTP_PORT}/health",  # of west: there is nobody, and nobody asks
            self._folder / f"{side.name}.log",
            env={"RAY_TMPDIR": str(self._folder / side.name)},
        )
