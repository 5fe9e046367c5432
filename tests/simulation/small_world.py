"""Workers whose seconds can be added up by hand.

A token of a prompt takes 1 ms, a decode step 100 ms whatever its batch. A page holds 10 tokens, a token's K/V is 1,000
bytes in 10 layers, a worker sends 1,000,000 bytes/s: a token's K/V takes as long to send as to compute. Messages take
no time unless a test says so.
"""

from __future__ import annotations

from dataclasses import replace

from cluster.config import RouterConfig
from cluster.routing_policy import RoutingPolicy
from cluster.simulator.answers import Answer
from cluster.simulator.conversation import Conversation, Prompt, Turn
from cluster.simulator.hand_over import KvShape
from cluster.simulator.host import WorkerKind
from cluster.simulator.network import LinkSpec
from cluster.simulator.records import RequestRecord
from cluster.simulator.scenario import ClusterSpec, Scenario, WorkerDeath
from cluster.simulator.step_cost import ProfiledCost
from cluster.simulator.workload import Workload
from cluster.simulator.world import SimulationResult, simulate
from cluster.throughput_model import Polynomial
from cluster.view import ModelInfo
from core.compute import ComputeProfile
from core.fingerprint import CacheFingerprint
from core.request import ClusterId
from engine.config import EngineConfig

PAGE = 10
MODEL = ModelInfo("made up", CacheFingerprint("made up", "1", "int8", PAGE, "one"), 10_000, 1 << 62, (), 1000)
KIND = WorkerKind(
    cost=ProfiledCost(Polynomial((0.0, 0.001)), 0.1),
    engine=EngineConfig(page_size=PAGE, num_pages=1000, max_batch_tokens=5000, max_batch_size=64),
    kv=KvShape(1000.0, num_layers=10),
    model=MODEL,
    compute=ComputeProfile(device="made up"),
    send_bytes_per_s=1e6,
)
HERE, AWAY = ClusterId("here"), ClusterId("away")  # in this order of workers' names: away/prefill-0 is first


def kind(**engine: int) -> WorkerKind:
    """``KIND`` with other keys of its engine."""
    return replace(KIND, engine=replace(KIND.engine, **engine))


def here(num_prefill: int = 1, num_decode: int = 1, latency_s: float = 0.0, of: WorkerKind = KIND) -> ClusterSpec:
    """The cluster of the gateway."""
    return ClusterSpec(HERE, of, num_prefill, num_decode, latency_s)


def away(num_prefill: int = 1, of: WorkerKind = KIND) -> ClusterSpec:
    """A cluster that only prefills."""
    return ClusterSpec(AWAY, of, num_prefill, 0, 0.0)


def link(bytes_per_s: float, latency_s: float = 0.0) -> LinkSpec:
    """From the prefill-only cluster to the gateway's."""
    return LinkSpec(AWAY, HERE, bytes_per_s, latency_s)


def prompt(
    number: int, starts_at: float = 0.0, tokens: int = 100, output_tokens: int = 3, content: int | None = None
) -> Conversation:
    """One request; two of equal ``content`` have the same prompt."""
    said = Prompt(tokens, number if content is None else content)
    turn = Turn(number, said, output_tokens, Answer(1000 + number))
    return Conversation(starts_at, (turn,))


def play(
    *conversations: Conversation,
    clusters: tuple[ClusterSpec, ...] = (here(),),
    links: tuple[LinkSpec, ...] = (),
    deaths: tuple[WorkerDeath, ...] = (),
    policy: str | RoutingPolicy = "least_loaded",
    lease_s: float = 5.0,
) -> tuple[list[RequestRecord], SimulationResult]:
    """The records by number, and everything."""
    named = policy if isinstance(policy, str) else "least_loaded"
    scenario = Scenario(clusters, links, router=RouterConfig(policy=named, lease_s=lease_s), deaths=deaths)
    result = simulate(scenario, Workload(conversations), policy=None if isinstance(policy, str) else policy)
    return sorted(result.records, key=lambda record: record.number), result
