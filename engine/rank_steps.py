"""Who decides what the ranks of a worker compute? Rank 0, step by step; the others do as they are told.

Rank 0 has the scheduler, the page allocator and the sampler: one owner of the pages, whose ids are the same on every
rank. Before it computes a step it sends the step's packed arrays; then every rank computes it, and their collectives
meet. Tokens that the step before has sampled and the host does not know yet (``engine.plan_ahead``) go from device to
device. Ranks other than 0 compute logits too, as a part of them is theirs, and throw them away.

So pages may be given to somebody else as soon as rank 0 has a step's tokens: each rank's part of the last collective
came after everything that it read and wrote for the step.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from engine.rank_group import RankGroup
from engine.step_packing import PackedStep


@dataclass(frozen=True, slots=True)
class RankStep:
    """What every rank computes next."""

    packed: PackedStep
    num_previous: int  # tokens of the step before that rank 0 sends for this one; 0: none


class RankLeader:
    """Rank 0's end: tells the others."""

    def __init__(self, group: RankGroup, send: Callable[[RankStep], None]) -> None:
        """``send`` gets each step to every other rank, in order; raises ``RankLost``."""
        self.group = group
        self._send = send

    def begin(self, packed: PackedStep, previous: torch.Tensor | None) -> None:
        """The other ranks compute this too; ``previous``: tokens of the step before, on the device."""
        if not len(packed.pending):
            self._send(RankStep(packed, 0))
            return
        assert previous is not None, "somebody waits for a token of the step before"
        self._send(RankStep(packed, len(previous)))
        self.group.broadcast(previous)


def receive_previous(group: RankGroup, step: RankStep, device: torch.device) -> torch.Tensor | None:
    """What ``RankLeader.begin`` sends from device to device; called once for each step, before it is computed."""
    if not step.num_previous:
        return None
    return group.broadcast(torch.empty(step.num_previous, dtype=torch.int64, device=device))
