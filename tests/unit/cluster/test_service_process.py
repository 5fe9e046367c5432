"""A child service is waited for, stopped in order, and leaves nothing behind."""

from __future__ import annotations

import socket
import sys
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from cluster.service_process import ServiceNotHealthy, ServiceProcess

SERVE = """
import http.server, signal, sys
class Health(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200)
        self.end_headers()
    def log_message(self, *words):
        pass
signal.signal(signal.SIGTERM, {on_term})
print("ready soon", flush=True)
{before}
http.server.HTTPServer(("127.0.0.1", {port}), Health).serve_forever()
"""
LEAVE = "lambda *_: sys.exit(3)"
STAY = "signal.SIG_IGN"
HAVE_A_CHILD = "import subprocess; subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(60)'])"

Start = Callable[..., ServiceProcess]


@pytest.fixture
def start(tmp_path: Path) -> Start:
    def run(on_term: str = LEAVE, before: str = "") -> ServiceProcess:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = int(free.getsockname()[1])
        source = SERVE.format(on_term=on_term, before=before, port=port)
        return ServiceProcess([sys.executable, "-c", source], f"http://127.0.0.1:{port}/health", tmp_path / "log")

    return run


def test_healthy_service_is_stopped_with_its_own_exit_code(start: Start) -> None:
    with start() as service:
        service.wait_until_healthy(30.0)

        assert service.stop(10.0) == 3
        assert service.stop(10.0) == 3


def test_service_that_ignores_the_signal_is_killed(start: Start) -> None:
    with start(on_term=STAY) as service:
        service.wait_until_healthy(30.0)

        assert service.stop(0.1) == -9


def test_children_of_a_killed_service_are_gone_too(start: Start) -> None:
    with start(on_term=STAY, before=HAVE_A_CHILD) as service:
        service.wait_until_healthy(30.0)
        (child,) = psutil.Process(service.pid).children()

        service.stop(0.1)

    assert psutil.wait_procs([child], timeout=5.0)[1] == []


def test_service_that_ends_early_is_reported_with_its_last_words(start: Start) -> None:
    with (
        start(before="sys.exit('no weights here')") as service,
        pytest.raises(ServiceNotHealthy, match="no weights here"),
    ):
        service.wait_until_healthy(30.0)


def test_waiting_tells_the_last_line_of_the_log_and_ends_in_time(start: Start) -> None:
    lines: list[str] = []

    with (
        start(before="import time; time.sleep(60)") as service,
        pytest.raises(ServiceNotHealthy, match="not healthy after"),
    ):
        service.wait_until_healthy(1.0, lambda waited_s, line: lines.append(line))

    assert lines[-1] == "ready soon"
