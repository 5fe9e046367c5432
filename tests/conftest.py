"""What holds for every test: how a process computes beside others, and what hypothesis does not measure."""

from __future__ import annotations

import gc
import logging
import os
import sys
from collections.abc import Iterator

import pytest
from hypothesis import HealthCheck, settings

# `make test` runs a process for each core, and those start services whose workers take all cores. Tiny models gain
# nothing from a second thread, and threads that wait for work by spinning take the cores from who has some: a model
# that loads in 3 s took 16. Children inherit both (Ray's workers the second); read when torch is first imported.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

# Tests start some eighty processes, which otherwise compile our packages each for itself, and pytest its rewritten tests.
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
