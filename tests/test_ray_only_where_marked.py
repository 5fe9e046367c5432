"""A Ray starts only in tests that are marked ``ray``, which tests/conftest.py runs in one process."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from cluster.ray_fleet import RayFleet
from core.errors import InvalidConfig
from tests.cluster.ray_service import service

THE_RULE = r"@pytest\.mark\.ray"


def test_a_fleet_has_no_ray_of_its_own() -> None:
    fleet = RayFleet(service("dummy:of no model"))

    with pytest.raises(InvalidConfig, match=THE_RULE):
        fleet.join()
    fleet.stop(0.0)


def test_the_command_ray_starts_no_head() -> None:
    ray = shutil.which("ray", path=os.pathsep.join((str(Path(sys.executable).parent), os.environ["PATH"])))
    assert ray is not None

    done = subprocess.run([ray, "start", "--head", "--include-dashboard=false"], capture_output=True, text=True)

    assert done.returncode != 0
    assert "@pytest.mark.ray" in done.stderr
