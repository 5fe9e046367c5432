"""A gateway's brain in virtual time: the real Membership and Router, and clients that note what they see."""

from __future__ import annotations

from collections.abc import Mapping

from cluster.config import RouterConfig
from cluster.cost_model import ComputeCost, CostView, LinearCost
from cluster.membership import Connect, Membership
from cluster.router import Router
from cluster.routing_policy import RoutingPolicy
from cluster.simulator.conversation import Turn
from cluster.simulator.records import OK, RequestRecord
from cluster.simulator.virtual_loop import VirtualTimeLoop
from core.errors import PrfaasError
from core.request import ClusterId, GatewayId, RequestTiming
from protos.channels import InternalGrpc

_GATEWAY = GatewayId("gateway")


class SimulatedGateway:
    """Made on its loop. ``began_at`` is the loop's time at which the workload begins."""

    def __init__(self, loop: VirtualTimeLoop, config: RouterConfig, policy: RoutingPolicy, connect: Connect) -> None:
        self._loop = loop
        self.membership = Membership(config, _GATEWAY, loop, InternalGrpc(None), connect=connect)
        self.router = Router(self.membership, policy, config, loop, _GATEWAY)
        self.records: list[RequestRecord] = []
        self.began_at = 0.0

    def know_costs(
        self, profiles: Mapping[str, ComputeCost], links: Mapping[tuple[ClusterId, ClusterId], LinearCost]
    ) -> None:
        """What policies predict with."""
        self.membership.note_costs(CostView(profiles, links))

    async def send(self, turn: Turn) -> None:
        """Send one request, read its tokens, note what was seen."""
        arrived_at = self._loop.time()
        first_at: float | None = None
        num_tokens = 0
        timing: RequestTiming | None = None
        outcome = OK
        try:
            async for chunk in self.router.generate(turn.request(arrived_at)):
                if chunk.token_ids:
                    num_tokens += len(chunk.token_ids)
                    first_at = self._loop.time() if first_at is None else first_at
                timing = chunk.timing or timing
        except PrfaasError as error:
            outcome = type(error).__name__
        now = self._loop.time()
        self.records.append(
            RequestRecord(
                number=turn.number,
                arrived_at=arrived_at - self.began_at,
                input_tokens=turn.input_tokens,
                output_tokens=num_tokens,
                outcome=outcome,
                ttft_s=None if first_at is None else first_at - arrived_at,
                total_s=now - arrived_at,
                slo=turn.slo,
                timing=timing,
            )
        )
