"""What does iperf3 reach on the same path? The ceiling that the KV benchmark compares with.

Debian: ``apt-get install iperf3``. Bytes go from one small buffer into another, so that memory costs it nothing.
"""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import tempfile
import time

from benchmarks.child_process import Wrap
from benchmarks.kv_end import Moved

_TIMEOUT_S = 120.0
_START_TIMEOUT_S = 5.0
_ATTEMPTS = 3


class IperfServer:
    """``iperf3 -s``, running until ``close``. It serves one run after another."""

    def __init__(self, wrap: Wrap, address: str) -> None:
        """Raises RuntimeError when there is no iperf3."""
        if shutil.which("iperf3") is None:
            raise RuntimeError("there is no iperf3 (Debian: apt-get install iperf3)")
        self._address = address
        self._port = _free_port()
        command = wrap(["iperf3", "--server", "--port", str(self._port), "--forceflush"])
        self._log = tempfile.TemporaryFile()  # noqa: SIM115 (a pipe would fill: it tells of every run)
        self._process = subprocess.Popen(command, stdout=self._log, stderr=subprocess.STDOUT)
        deadline = time.monotonic() + _START_TIMEOUT_S
        while b"listening" not in self._told():
            if self._process.poll() is not None or time.monotonic() > deadline:
                told = self._told()
                self.close()
                raise RuntimeError(f"iperf3's server does not start: {told[:200]!r}")
            time.sleep(0.02)

    def run(self, wrap: Wrap, num_bytes: int, connections: int) -> Moved:
        """Send ``num_bytes`` on so many connections; timed by the receiving side.

        A run that fails is tried again: on a long path iperf3's control connection is now and then reset at the end.
        """
        words = ["--client", self._address, "--port", str(self._port), "--json"]
        words += ["--bytes", str(num_bytes), "--parallel", str(connections)]
        for attempt in range(_ATTEMPTS):
            done = subprocess.run(
                wrap(["iperf3", *words]), capture_output=True, text=True, check=False, timeout=_TIMEOUT_S
            )
            try:
                return parse(done.stdout)
            except RuntimeError:
                if attempt == _ATTEMPTS - 1:
                    raise
                time.sleep(1.0)
        raise AssertionError("the last attempt returns or raises")

    def close(self) -> None:
        self._process.kill()
        self._process.wait()
        self._log.close()

    def _told(self) -> bytes:
        return os.pread(self._log.fileno(), 4096, 0)


def parse(output: str) -> Moved:
    """The result of one run. Raises RuntimeError with iperf3's own words when it failed."""
    try:
        told = json.loads(output)
    except ValueError:
        raise RuntimeError(f"iperf3 gave no JSON: {output[:200]!r}") from None
    if "error" in told:
        raise RuntimeError(f"iperf3: {told['error']}")
    received = told["end"]["sum_received"]
    return Moved(float(received["seconds"]), int(received["bytes"]), "tcp")


def _free_port() -> int:
    """A port that no one has on loopback; in a namespace of its own every port is free."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
