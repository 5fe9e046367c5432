"""A gateway's brain in virtual time: the real Membership and Router, and clients that note what they see."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from cluster.catalogue import load_catalogue
from cluster.cost_model import CostView
from cluster.cost_recorder import CostRecorder
from cluster.demand import DemandMeter
from cluster.membership import Connect, Membership
from cluster.planner import Planner
from cluster.pool_scaler import PoolFleet, PoolScaler
from cluster.router import Router
from cluster.routing_policy import RoutingPolicy
from cluster.simulator.conversation import Turn
from cluster.simulator.records import OK, RequestRecord
from cluster.simulator.scenario import Scenario
from cluster.simulator.virtual_loop import VirtualTimeLoop
from core.errors import PrfaasError
from core.request import EngineId, GatewayId, RequestTiming, Role
from protos.channels import InternalGrpc

_GATEWAY = GatewayId("gateway")


@dataclass(frozen=True)
class _Traffic:
    """What the planner asks of the router."""

    router: Router
    num_untold: Callable[[], int]

    @property
    def num_open_tokens(self) -> int:
        return self.router.num_open_tokens + self.num_untold()

    @property
    def num_answering(self) -> int:
        return self.router.num_answering

    @property
    def num_queued(self) -> int:
        return self.router.num_queued

    @property
    def num_missed(self) -> Mapping[Role, int]:
        return self.router.num_missed


class SimulatedGateway:
    """Made on its loop. ``began_at`` is the loop's time at which the workload begins."""

    def __init__(
        self,
        loop: VirtualTimeLoop,
        scenario: Scenario,
        policy: RoutingPolicy,
        connect: Connect,
        num_untold: Callable[[], int],
        retest: Callable[[EngineId, EngineId], None],
        pools: PoolFleet | None,
    ) -> None:
        """``num_untold``: tokens that workers made and did not tell yet, as a real one would have. ``retest``: of the
        link between two engines. ``pools``: those that may grow; None: none may."""
        self._loop = loop
        self._costs = CostRecorder(load_catalogue(), scenario.capacity) if scenario.learn_costs else None
        self.membership = Membership(
            scenario.router, _GATEWAY, loop, InternalGrpc(None), listener=self._costs, connect=connect
        )
        demand = DemandMeter(loop, scenario.planner.demand_window_s)
        self.router = Router(self.membership, policy, scenario.router, loop, _GATEWAY, scenario.admission, demand)
        self._scaler: PoolScaler | None = None
        if pools is not None:
            self._scaler = PoolScaler(
                pools, self.membership, scenario.pools, scenario.planner.scaling, 10 * scenario.start_s, loop
            )
        self.planner = Planner(
            self.membership,
            demand,
            _Traffic(self.router, num_untold),
            scenario.planner,
            loop,
            cluster_id=scenario.home,
            capacity=scenario.capacity,
            retest=retest,
            tpot_s=scenario.tpot_slo_s or scenario.admission.tpot_slo_s,
            ttft_s=scenario.admission.ttft_slo_s,
            scaler=self._scaler,
        )
        self.records: list[RequestRecord] = []
        self.began_at = 0.0

    def start(self, costs: CostView) -> None:
        """Watch leases; policies predict with ``costs``, unless they are to learn them."""
        self.membership.watch_leases()
        if self._costs is None:
            self.membership.note_costs(costs)
        else:
            self._costs.start(self.membership)

    async def begin(self) -> None:
        """The workload begins now; the planner too."""
        self.began_at = self._loop.time()
        if self._scaler is not None:
            await self._scaler.start()
        self.planner.start()

    async def close(self) -> None:
        """Give everything up."""
        await self.planner.close()
        if self._scaler is not None:
            await self._scaler.close()
        await self.router.drain(0.0)
        if self._costs is not None:
            await self._costs.close()
        await self.membership.close()

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
