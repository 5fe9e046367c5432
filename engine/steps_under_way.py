"""Which steps may the device still be writing for, and when are the pages of what has ended free?

    begin(plan) ── a sequence of it ends: keep(its pages) ── end(plan) ── freed_by(plan): the last that could write them

Only steps that are planned ahead of another one's end, or into the middle of which calls may come, are told here: while
any other step is computed nothing ends. Torch-free.
"""

from __future__ import annotations

from core.request import SequenceId
from engine.step_plan import StepPlan

PageIds = tuple[int, ...]


class StepsUnderWay:
    """Sole owner of pages that no sequence has any more and that a step may still write."""

    def __init__(self) -> None:
        self._plans: list[StepPlan] = []
        self._leaving: list[
            tuple[list[StepPlan], PageIds]
        ] = []  # (those that may write there and have not ended, pages)

    def begin(self, plan: StepPlan) -> None:
        """It will be computed."""
        self._plans.append(plan)

    def keep(self, sequence_id: SequenceId, page_ids: PageIds) -> bool:
        """A sequence gives its pages up: whether a step under way holds it. Then they stay here until that has ended;
        else they are free now."""
        writers = [plan for plan in self._plans if any(item.sequence_id == sequence_id for item in plan.items)]
        if writers:
            self._leaving.append((writers, page_ids))
        return bool(writers)

    def end(self, plan: StepPlan) -> None:
        """The device is done with it; harmless if it was not told. ``freed_by`` comes next."""
        self._plans = [other for other in self._plans if other is not plan]

    def freed_by(self, plan: StepPlan) -> list[PageIds]:
        """Pages that were kept, and that nothing writes any more now that ``plan`` has ended; each once."""
        freed: list[PageIds] = []
        if not self._leaving:
            return freed
        leaving, self._leaving = self._leaving, []
        for writers, page_ids in leaving:
            others = [writer for writer in writers if writer is not plan]
            if others:
                self._leaving.append((others, page_ids))
            else:
                freed.append(page_ids)
        return freed
