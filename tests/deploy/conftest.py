from __future__ import annotations

import functools
import os
import shutil
import socket
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import kubernetes_validate.utils
import pytest

from tests.deploy.chart import CHART, VALUES, Rendered, render
from tests.deploy.pods import Machine
from tests.unit.cluster import tiny_tokenizers

VALUES_FILES = sorted(path.stem for path in VALUES.glob("*.yaml"))


@pytest.fixture(scope="session", autouse=True)
def _schemas_are_read_once() -> Iterator[None]:
    """kubernetes-validate reads and parses megabytes of JSON for each manifest."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            kubernetes_validate.utils, "schema_contents", functools.cache(kubernetes_validate.utils.schema_contents)
        )
        yield


@pytest.fixture(scope="session")
def helm_home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("helm")


@pytest.fixture(scope="session")
def rendered(helm_home: Path) -> Callable[[str], Rendered]:
    """The chart with one of the values files, rendered when first asked for."""
    done: dict[str, Rendered] = {}

    def get(name: str) -> Rendered:
        if name not in done:
            done[name] = render(helm_home, "--values", str(VALUES / f"{name}.yaml"))
        return done[name]

    return get


@pytest.fixture
def rendered_with(helm_home: Path) -> Callable[..., Rendered]:
    """The chart with ``--set`` of each argument; ``NotRendered`` if helm refuses."""

    def get(*settings: str, values: str | None = None, chart: Path = CHART) -> Rendered:
        files = ["--values", str(VALUES / f"{values}.yaml")] if values else []
        return render(helm_home, *files, *(word for s in settings for word in ("--set-json", s)), chart=chart)

    return get


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A model of random weights, with a tokenizer."""
    return tiny_tokenizers.save_dummy_model(tmp_path_factory.mktemp("dummy"))


@pytest.fixture(scope="module")
def ports() -> list[int]:
    """Free ones, all different, outside those that Ray gives its workers (10002 to 19999)."""
    with_sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(9)]
    found = [s.getsockname()[1] for s in with_sockets]
    for s in with_sockets:
        s.close()
    return found


@pytest.fixture(scope="module")
def machine(ports: list[int], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Machine]:
    """Where a Ray cluster runs whose head listens at the first of ``ports``; nothing is left of it."""
    ray_tmp = Path(tempfile.mkdtemp(prefix="prfaas-", dir=os.environ.get("RAY_TMPDIR", "/tmp")))
    machine = Machine(tmp_path_factory.mktemp("pods"), f"127.0.0.1:{ports[0]}", ray_tmp)
    try:
        yield machine
    finally:
        machine.stop()
        shutil.rmtree(ray_tmp, ignore_errors=True)
