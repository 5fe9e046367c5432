"""What do both halves of a simulated worker share? What it is, its engine, and its ways to others."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVarTuple

from cluster.cost_model import ComputeCost
from cluster.simulator.answers import AnswerBook
from cluster.simulator.engine import SimulatedEngine
from cluster.simulator.hand_over import KvShape
from cluster.simulator.link_reports import LinkReports
from cluster.simulator.network import Network
from cluster.simulator.step_cost import StepCost
from cluster.view import ModelInfo
from cluster.worker_client import WorkerDescription
from core.compute import UNKNOWN_PROFILE, ComputeProfile
from core.request import SequenceFailure, SequenceSpec, TokenChunk
from engine.config import EngineConfig

_Ts = TypeVarTuple("_Ts")

Publish = Callable[[TokenChunk | SequenceFailure], None]  # to the gateway that a sequence came from


@dataclass(frozen=True)
class WorkerKind:
    """What all workers of one kind have in common. ``engine.num_pages`` is set."""

    cost: StepCost
    engine: EngineConfig
    kv: KvShape
    model: ModelInfo
    compute: ComputeProfile = UNKNOWN_PROFILE  # as workers describe themselves; names the costs
    send_bytes_per_s: float = 50e9  # what one worker sends
    grant_wait_s: float = 60.0  # of a finished prompt, for pages at its receiver
    pull_timeout_s: float = 10.0  # no page pull takes longer
    lease_s: float = 30.0  # of K/V links: how long a silent peer is waited for
    conversion_s: float = 0.0  # for which a worker computes nothing when it changes its role

    def seen(self) -> ComputeCost:
        """``cost`` as policies see it."""
        return self.cost.seen(self.engine.max_prefill_chunk or self.engine.max_batch_tokens)


@dataclass(frozen=True)
class Host:
    """One worker process, as its two halves know it."""

    loop: asyncio.AbstractEventLoop
    kind: WorkerKind
    description: WorkerDescription
    engine: SimulatedEngine
    network: Network
    links: LinkReports
    answers: AnswerBook

    def send(self, to: WorkerDescription, deliver: Callable[[*_Ts], None], *args: *_Ts) -> None:
        """``deliver(*args)`` is called at that worker when the message has arrived there."""
        self.network.path(self.description.cluster_id, to.cluster_id).send(deliver, *args)


def num_known_tokens(spec: SequenceSpec) -> int:
    """Tokens whose K/V must exist before the next one is sampled."""
    return len(spec.prompt_token_ids) + len(spec.output_token_ids)
