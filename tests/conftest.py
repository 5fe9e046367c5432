"""What holds for every test: how many threads a process computes with, and what hypothesis does not measure."""

from __future__ import annotations

import os

from hypothesis import HealthCheck, settings

# `make test` runs a process for each core. Tiny models gain nothing from a second thread, and two processes of two
# threads each on two cores spend most of their time waiting for one another. Read when torch is first imported.
os.environ.setdefault("OMP_NUM_THREADS", "1")

# No test asserts on wall time, and neither does hypothesis: an example that takes long says that the machine is busy.
settings.register_profile("untimed", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("untimed")
