"""Many simulations on all cores. Each is one process's work; equal arguments give equal results wherever it runs."""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import TypeVar

Task = TypeVar("Task")
Found = TypeVar("Found")

_ROOT = Path(__file__).resolve().parent.parent


def run_all(simulate: Callable[[Task], Found], tasks: Sequence[Task], num_processes: int | None = None) -> list[Found]:
    """``simulate`` of each task, in their order; a function of a module, as other processes must find it.

    ``num_processes`` None: as many as there are cores. What the simulated services log is told to nobody.
    """
    found = []
    with ProcessPoolExecutor(
        num_processes or os.cpu_count(), get_context("spawn"), initializer=logging.disable, initargs=(logging.WARNING,)
    ) as pool:
        for number, result in enumerate(pool.map(simulate, tasks), 1):
            print(f"\r{number} of {len(tasks)} simulations", end="", file=sys.stderr, flush=True)
            found.append(result)
    print(file=sys.stderr)
    return found


def shared_traces() -> Path | None:
    """The folder of recorded traces, in the repository or beside it; None: there is none."""
    near = (folder / "shared/traces" for folder in (_ROOT, *_ROOT.parents[:2]))
    return next((folder for folder in near if folder.is_dir()), None)
