"""How do measurements become predictions? From workers' reports into the CostModel, and from there into every view.

    Membership ── steps, self-tests of links ──> CostModel ── once a second ──> Membership.note_costs ──> ClusterView
                                                     └── now and then, and at the end ──> a file

The sole owner of the gateway's ``CostModel``. Everything happens on one event loop, but for writing the file.

Invariants: a worker has costs from the moment in which it joins (its roofline, or what the file remembers of its
like); a file that cannot be written costs a warning, never a request.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Protocol

from cluster.catalogue import Catalogue
from cluster.cluster_links import Capacity
from cluster.cost_model import CostModel, CostView
from cluster.roofline import Efficiency, of_engine
from cluster.worker_client import WorkerDescription
from core.compute import StepSample
from core.link import ProbeReport
from core.request import ClusterId

logger = logging.getLogger(__name__)

TELL_EVERY_S = 1.0  # a fit takes milliseconds, and a decision made with one a second old is as good
SAVE_EVERY_S = 30.0


class CostsReader(Protocol):
    """Whom the recorder tells: ``Membership``."""

    def note_costs(self, costs: CostView) -> None:
        """This is known from now on."""
        ...


class CostRecorder:
    """Hears of workers, steps and links (``WorkerListener``), and tells what they cost."""

    def __init__(self, catalogue: Catalogue, capacity: Capacity, path: Path | None = None) -> None:
        """``capacity``: configured bytes/s between two clusters; ``path``: where costs are kept; None: nowhere."""
        self._model = CostModel(path)
        self._catalogue = catalogue
        self._capacity = capacity
        self._path = path
        self._profiles: set[str] = set()
        self._clusters: set[ClusterId] = set()
        self._saved: CostView | None = None
        self._reader: CostsReader | None = None  # None: not started
        self._task: asyncio.Task[None] | None = None

    # ---- what it hears ----

    def worker_joined(self, worker: WorkerDescription) -> None:
        """Its kind gets a roofline, its cluster a pair with every other one; what is known already stays."""
        if worker.profile and worker.profile not in self._profiles:
            self._profiles.add(worker.profile)
            fingerprint = worker.model.fingerprint
            roofline = of_engine(
                worker.compute, fingerprint.dtype, worker.model.kv_bytes_per_token, self._catalogue, Efficiency()
            )
            self._model.add_profile(worker.profile, roofline, worker.compute.step_tokens or float("inf"))
        if worker.cluster_id not in self._clusters:
            self._clusters.add(worker.cluster_id)
            for other in sorted(self._clusters):
                for pair in {(worker.cluster_id, other), (other, worker.cluster_id)}:
                    self._model.add_link(pair, self._capacity(*pair))
        self._tell()

    def steps_measured(self, worker: WorkerDescription, steps: Sequence[StepSample]) -> None:
        """What the engine's last steps took."""
        if worker.profile in self._profiles:
            for step in steps:
                self._model.observe_step(worker.profile, step)

    def link_tested(self, sender: WorkerDescription, receiver: WorkerDescription, report: ProbeReport) -> None:
        """The largest transfer of a self-test had the link to itself, as far as this gateway knows."""
        if report.passed and report.timed_bytes > 0:
            pair = (sender.cluster_id, receiver.cluster_id)
            self._model.observe_transfer(pair, report.timed_bytes, report.seconds)

    # ---- what it tells ----

    def costs(self) -> CostView:
        """What is known now; the same object until something is learnt."""
        return self._model.view()

    def start(self, reader: CostsReader) -> None:
        """Tell ``reader`` at once, and then about once a second."""
        assert self._reader is None, "started already"
        self._reader = reader
        self._tell()
        self._task = asyncio.create_task(self._run())

    async def close(self) -> None:
        """Stop, and save what is known."""
        task, self._task = self._task, None
        if task is not None:
            task.cancel()
            with suppress(asyncio.CancelledError):
                await task
        await self.save()

    async def save(self) -> None:
        """Put it into the file, if there is one and something was learnt since."""
        costs = self.costs()
        if self._path is None or costs is self._saved:
            return
        try:
            await asyncio.to_thread(self._model.saving())
        except OSError as error:
            logger.warning("costs are not kept, %s cannot be written: %s", self._path, error)
        self._saved = costs  # also if it failed: the next try is for what is learnt next

    def _tell(self) -> None:
        if self._reader is not None:
            self._reader.note_costs(self.costs())

    async def _run(self) -> None:
        ticks_per_save = round(SAVE_EVERY_S / TELL_EVERY_S)
        while True:
            for _ in range(ticks_per_save):
                await asyncio.sleep(TELL_EVERY_S)
                self._tell()
            await self.save()
