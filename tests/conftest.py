"""What holds for every test: how a process computes beside others, which tests run at one time, and what hypothesis
does not measure.
"""

from __future__ import annotations

import gc
import logging
import os
import sys
from collections.abc import Iterator

import pytest
from hypothesis import HealthCheck, settings
from xdist.remote import Producer
from xdist.scheduler import LoadGroupScheduling

# `make test` runs a process for each core, and those start services whose workers take all cores. Tiny models gain
# nothing from a second thread, and threads that wait for work by spinning take the cores from who has some: a model
# that loads in 3 s took 16. Children inherit both (Ray's workers the second); read when torch is first imported.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

# Tests start dozens of processes, each of which would otherwise compile our packages for itself.
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
sys.dont_write_bytecode = False

# Collecting imports everything and makes millions of objects, all of which stay: looking for garbage among them takes
# as long as the rest of it. Afterwards they are out of the collector's sight, as in our own services.
gc.disable()

# No test asserts on wall time, and neither does hypothesis: an example that takes long says that the machine is busy.
# The suite says the same of the same commit; `--hypothesis-profile explore` draws examples that nobody has seen.
for name, derandomize in (("suite", True), ("explore", False)):
    settings.register_profile(
        name, deadline=None, suppress_health_check=[HealthCheck.too_slow], derandomize=derandomize
    )
settings.load_profile("suite")

_MOST_PROCESSES = 4


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_auto_num_workers() -> int:
    """``-n auto``: one more than there are cores, because tests with real services wait for much."""
    return min((os.cpu_count() or 1) + 1, _MOST_PROCESSES)


def _starts_ray(item: pytest.Item) -> bool:
    """Half a dozen processes that begin at once and then wait for one another. Two Rays, each with a service on it,
    starve each other on two cores, and what waits for seconds then waits in vain.
    """
    return item.get_closest_marker("ray") is not None


@pytest.hookimpl(tryfirst=True)  # before xdist reads which group a test is in
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Tests with Ray are one group and come first, because nothing takes as long; the others as they come."""
    for item in filter(_starts_ray, items):
        item.add_marker(pytest.mark.xdist_group("ray"))
    items.sort(key=lambda item: not _starts_ray(item))


# Where a Ray would put its files, unless a test is marked: nobody can make a folder there, and the error names it.
_NO_RAY = "/dev/null/no Ray without @pytest.mark.ray"
_RAY_TMPDIR = os.environ.get("RAY_TMPDIR")


@pytest.hookimpl(tryfirst=True)  # before fixtures, of which some start a Ray for a whole file
def pytest_runtest_setup(item: pytest.Item) -> None:
    """A Ray that an unmarked test starts, by itself or by a process of its own, does not start."""
    if not _starts_ray(item):
        os.environ["RAY_TMPDIR"] = _NO_RAY
    elif _RAY_TMPDIR is not None:
        os.environ["RAY_TMPDIR"] = _RAY_TMPDIR
    else:
        os.environ.pop("RAY_TMPDIR", None)


class _GroupsAndFiles(LoadGroupScheduling):
    """The tests of a group run in one process, and so do those of a file, which share what is slow to build."""

    def _split_scope(self, nodeid: str) -> str:
        return super()._split_scope(nodeid).partition("::")[0]


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Producer) -> LoadGroupScheduling | None:
    """``--dist loadgroup``, as ``make test`` says, is the class above."""
    return _GroupsAndFiles(config, log) if config.getvalue("dist") == "loadgroup" else None


def pytest_collection_finish() -> None:
    gc.freeze()
    gc.enable()


@pytest.fixture(autouse=True)
def _logging_as_it_was() -> Iterator[None]:
    """A service that is started in a test's own process sets up its logging, pytest's handlers among it."""
    root = logging.getLogger()
    level, formatters = root.level, [(handler, handler.formatter) for handler in root.handlers]
    yield
    root.setLevel(level)
    for handler, formatter in formatters:
        handler.setFormatter(formatter)
