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
from xdist.scheduler import LoadFileScheduling

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

# Files with tests that start a Ray cluster and a service on it: half a dozen processes that begin at once and then wait
# for one another. Two such services starve each other on two cores, and what waits for seconds then waits in vain.
_WITH_RAY = frozenset(
    {
        "tests/cluster/test_links.py",
        "tests/cluster/test_ray_fleet.py",
        "tests/deploy/test_elastic_pools.py",
        "tests/deploy/test_ray_jobs.py",
        "tests/deploy/test_service_of_the_manifests.py",
    }
)


_MOST_PROCESSES = 4


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_auto_num_workers() -> int:
    """``-n auto``: one more than there are cores, because tests with real services wait for much."""
    return min((os.cpu_count() or 1) + 1, _MOST_PROCESSES)


def _starts_ray(nodeid: str) -> bool:
    return nodeid.partition("::")[0] in _WITH_RAY


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Tests with Ray first, because nothing takes as long; the others as they come."""
    items.sort(key=lambda item: not _starts_ray(item.nodeid))


class _OneRayAtATime(LoadFileScheduling):
    """A file's tests stay in one process, because they share what is slow to build; so do all tests with Ray."""

    def _split_scope(self, nodeid: str) -> str:
        return "with Ray" if _starts_ray(nodeid) else super()._split_scope(nodeid)


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Producer) -> LoadFileScheduling | None:
    """``--dist loadfile``, as ``make test`` says, is the class above."""
    return _OneRayAtATime(config, log) if config.getvalue("dist") == "loadfile" else None


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
