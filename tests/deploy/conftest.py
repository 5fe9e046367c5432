from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from tests.deploy.chart import CHART, VALUES, Rendered, render

VALUES_FILES = sorted(path.stem for path in VALUES.glob("*.yaml"))


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
