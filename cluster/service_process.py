"""A service as a child process: started, waited for until it is healthy, stopped.

The demo, the benchmarks and the tests that need a whole service use this, so they meet it as an operator does: a
command line, a health URL, SIGTERM. Nothing here knows what the command serves.

Invariants: the child has a process group of its own, so a Ctrl-C in the terminal reaches only the parent, which
then stops the child in order; after ``stop`` no process of that group is left.
"""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Self

from core.clock import Clock, WallClock
from core.errors import PrfaasError

OnWait = Callable[[float, str], None]  # seconds so far, the log's last line

_POLL_S = 0.2
_START_TIMEOUT_S = 600.0  # a first start may convert a model
_STOP_TIMEOUT_S = 60.0
_LOG_TAIL_BYTES = 4096


class ServiceNotHealthy(PrfaasError):
    """The child ended or did not answer in time; the message ends with the last lines of its log."""


class ServiceProcess:
    """One child, from construction (started) to ``stop``. Use as a context manager.

    command: argv. health_url: answers 200 once the service can take requests. log_path: where the child's stdout and
    stderr go. env: variables on top of this process's own.
    """

    def __init__(
        self,
        command: Sequence[str],
        health_url: str,
        log_path: Path,
        *,
        env: Mapping[str, str] | None = None,
        clock: Clock | None = None,
    ) -> None:
        self._clock = clock or WallClock()
        self._health_url = health_url
        self._log_path = log_path
        with log_path.open("wb") as log:
            self._child = subprocess.Popen(
                list(command),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                env={**os.environ, **(env or {})},
                start_new_session=True,
            )

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop(timeout_s=10.0)

    @property
    def pid(self) -> int:
        return self._child.pid

    def wait_until_healthy(self, timeout_s: float, on_wait: OnWait = lambda waited_s, last_line: None) -> float:
        """Return the seconds that it took; ``on_wait`` is told the seconds so far and the log's last line.

        Raises ``ServiceNotHealthy`` when the child ends or ``timeout_s`` passes first.
        """
        began_at = self._clock.now()
        while not self._answers():
            waited_s = self._clock.now() - began_at
            if self._ended_within(_POLL_S):
                raise ServiceNotHealthy(f"ended with exit code {self._child.returncode}:\n{self.log_tail()}")
            if waited_s > timeout_s:
                raise ServiceNotHealthy(f"{self._health_url} not healthy after {timeout_s:g} s:\n{self.log_tail()}")
            on_wait(waited_s, re.split(r"[\r\n]", self.log_tail())[-1])
        return self._clock.now() - began_at

    def stop(self, timeout_s: float) -> int:
        """SIGTERM, wait up to ``timeout_s``, then SIGKILL what is left of the group; return the exit code.

        A child that had to be killed has exit code -9. Calling it again returns the same code.
        """
        if self._child.poll() is None:
            self._child.terminate()
            self._ended_within(timeout_s)
        with suppress(ProcessLookupError):
            os.killpg(self._child.pid, signal.SIGKILL)
        return self._child.wait()

    def log_tail(self) -> str:
        """The last lines that the child wrote."""
        with self._log_path.open("rb") as log:
            log.seek(0, os.SEEK_END)
            log.seek(max(0, log.tell() - _LOG_TAIL_BYTES))
            return log.read().decode(errors="replace").strip()

    def _ended_within(self, seconds: float) -> bool:
        with suppress(subprocess.TimeoutExpired):
            self._child.wait(seconds)
        return self._child.returncode is not None

    def _answers(self) -> bool:
        try:
            with urllib.request.urlopen(self._health_url, timeout=2.0) as response:
                return bool(response.status == 200)
        except (urllib.error.URLError, OSError):  # not listening yet, or 503 while no worker is ready
            return False


@dataclass(frozen=True)
class ServiceDoors:
    """Where a service that was started here is reached."""

    http_url: str  # http://127.0.0.1:PORT
    grpc_address: str  # 127.0.0.1:PORT


@contextmanager
def prfaas_service(
    config_path: Path,
    overrides: Sequence[str],
    log_path: Path,
    on_wait: OnWait = lambda waited_s, last_line: None,
) -> Iterator[ServiceDoors]:
    """``prfaas serve CONFIG`` with these overrides, on free ports of loopback, until the context ends.

    Raises ``ServiceNotHealthy`` if it does not come up.
    """
    http_port, grpc_port = free_ports(2)
    command = [sys.executable, "-m", "cluster", "serve", str(config_path)]
    for setting in (*overrides, "http.host=127.0.0.1", f"http.port={http_port}", f"grpc.port={grpc_port}"):
        command += ["--set", setting]
    url = f"http://127.0.0.1:{http_port}"
    service = ServiceProcess(command, f"{url}/health", log_path)
    try:
        service.wait_until_healthy(_START_TIMEOUT_S, on_wait)
        yield ServiceDoors(url, f"127.0.0.1:{grpc_port}")
    finally:
        service.stop(_STOP_TIMEOUT_S)


def free_ports(count: int) -> list[int]:
    """Ports of loopback that were free a moment ago, all different."""
    sockets = [socket.socket() for _ in range(count)]
    try:
        for one in sockets:
            one.bind(("127.0.0.1", 0))
        return [int(one.getsockname()[1]) for one in sockets]
    finally:
        for one in sockets:
            one.close()
