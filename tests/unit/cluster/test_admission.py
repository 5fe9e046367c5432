"""Who starts, who waits, who is refused: rules on a small fleet that a test steps by hand, and properties on many."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import count

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cluster.admission import LOOK_AHEAD, WAIT_BUCKETS_S, Admission, Bound, Proposal, Ticket
from cluster.config import AdmissionConfig
from cluster.cost_model import ComputeCost, CostView, LinearCost
from cluster.view import ClusterView, Forecast, Route, WorkerLoad, WorkerView
from core.clock import VirtualClock
from core.errors import Cancelled, NoRoute, Overloaded
from core.prefix_hash import tenant_of
from core.request import MAX_PRIORITY, NO_SLO, GenerateRequest, RequestId, Role, SamplingParams, Slo, WorkerId
from tests.unit.cluster.scripted_router import worker

# A prompt of 100 tokens takes 1 s; a decode step 10 ms and 1 ms for each sequence.
COSTS = CostView({"": ComputeCost(LinearCost((0.0, 0.01, 0.0)), LinearCost((0.010, 0.001, 0.0)))}, {})
NAMES = {tenant_of(salt.encode()): salt for salt in ("a", "b", "c")}


@dataclass
class Fleet:
    """Admission before workers that do what the test says. Each prompt goes to the prefill worker that ``pick`` names.

    ``run`` is the router's part: release while somebody may start.
    """

    config: AdmissionConfig
    pick: Callable[[Ticket], int] = lambda ticket: 0
    num_prefill: int = 1
    slots: int = 4
    costs: CostView = COSTS
    expected: Forecast | None = None
    clock: VirtualClock = field(default_factory=lambda: VirtualClock(1000.0))
    started: list[Ticket] = field(default_factory=list)  # released and not over, in order
    order: list[str] = field(default_factory=list)  # ids of all that were released
    no_worker: bool = False

    def __post_init__(self) -> None:
        self.admission = Admission(self.config, self.clock)
        self.numbers = count()
        self.tickets: list[Ticket] = []
        decode = replace(worker("decode-0", Role.DECODE, load=WorkerLoad(pages_free=10_000)), max_batch_size=self.slots)
        prefill = tuple(worker(f"prefill-{i}", Role.PREFILL, load=WorkerLoad()) for i in range(self.num_prefill))
        self.decode, self.prefill = decode, prefill
        self.unreported: dict[str, list[Ticket]] = {w.worker_id: [] for w in (decode, *prefill)}

    def seen(self, worker: WorkerView) -> WorkerView:
        """The worker as membership shows it: its last report, and what was sent there since."""
        there, sent = self.started, self.unreported[worker.worker_id]
        if worker.role is Role.DECODE:
            assigned = sum(t.request.sampling.n for t in there)
            return replace(worker, num_assigned=assigned, num_unreported=sum(t.request.sampling.n for t in sent))
        tokens = sum(len(t.request.prompt_token_ids) for t in sent)
        return replace(worker, num_unreported=len(sent), unreported_tokens=tokens)

    def report(self, load: WorkerLoad, role: Role = Role.DECODE) -> None:
        """The first worker of that role reports: what was sent there is in it."""
        if role is Role.DECODE:
            self.decode = replace(self.decode, load=load)
        else:
            self.prefill = (replace(self.prefill[0], load=load), *self.prefill[1:])
        self.unreported[f"{role}-0"].clear()
        self.run()

    def propose(self, ticket: Ticket) -> Proposal | None:
        if self.no_worker:
            return None
        prefill, decode = self.seen(self.prefill[self.pick(ticket)]), self.seen(self.decode)
        route = Route(prefill, decode, "scripted", expected=self.expected)
        view = ClusterView(self.clock.now(), (decode, *map(self.seen, self.prefill)), costs=self.costs)
        return Proposal(route, len(ticket.request.prompt_token_ids), view)

    def join(
        self,
        name: str = "",
        *,
        tokens: int = 100,
        n: int = 1,
        salt: str = "",
        priority: int = 0,
        slo: Slo = NO_SLO,
        max_tokens: int = 8,
        deadline_s: float | None = None,
    ) -> Ticket:
        """What the router does with a request that comes."""
        now = self.clock.now()
        request = GenerateRequest(
            RequestId(name or f"r{next(self.numbers)}"),
            (1,) * tokens,
            SamplingParams(n=n, max_tokens=max_tokens, seed=0),
            salt=salt.encode(),
            arrived_at=now,
            deadline_at=None if deadline_s is None else now + deadline_s,
            slo=slo,
            priority=priority,
        )
        ticket = self.admission.join(request, max_tokens)
        self.tickets.append(ticket)
        self.run()
        if ticket.waits:
            self.admission.arrived(ticket, self.propose)
        return ticket

    def run(self) -> None:
        while (ticket := self.admission.serve(self.propose)) is not None:
            self.started.append(ticket)
            self.order.append(ticket.request.request_id)
            if ticket.proposal is not None:
                route = ticket.proposal.route
                assert route.prefill is not None
                self.unreported[route.prefill.worker_id].append(ticket)
                self.unreported[route.decode.worker_id].append(ticket)
                self.admission.begun(ticket, route)

    def first_tokens(self, *tickets: Ticket) -> None:
        for ticket in tickets:
            self.admission.first_token(ticket)
            self._gone(ticket, Role.PREFILL)
        self.run()

    def finish(self, *tickets: Ticket, tokens: int | None = 8) -> None:
        for ticket in tickets:
            self.started.remove(ticket)
            self._gone(ticket, Role.PREFILL)
            self._gone(ticket, Role.DECODE)
            self.admission.leave(ticket, tokens)
        self.run()

    def _gone(self, ticket: Ticket, role: Role) -> None:
        for worker_id, sent in self.unreported.items():
            if worker_id.startswith(role) and ticket in sent:
                sent.remove(ticket)

    def advance(self, seconds: float) -> None:
        self.clock.advance(seconds)
        self.run()


def refusal(ticket: Ticket) -> Overloaded:
    with pytest.raises(Overloaded) as caught:
        ticket.check()
    return caught.value


def starts(ticket: Ticket) -> bool:
    """Released, and not refused."""
    ticket.check()
    return not ticket.waits


# ---- room ----


def test_what_has_room_starts_at_once() -> None:
    fleet = Fleet(AdmissionConfig())

    assert starts(fleet.join())
    assert fleet.admission.num_waiting == 0
    assert fleet.admission.counters.wait_counts[0] == 1


def test_prompts_beyond_the_seconds_that_a_prefill_worker_should_hold_wait_in_line() -> None:
    fleet = Fleet(AdmissionConfig(prefill_queue_s=2.0), slots=100)
    first, second, third, fourth = (fleet.join() for _ in range(4))  # 1 s each

    assert [t.waits for t in (first, second, third, fourth)] == [False, False, False, True]
    fleet.advance(1.0)
    fleet.first_tokens(first)
    assert starts(fourth)
    assert fourth.waited_s == 1.0


def test_sequences_beyond_the_slots_of_decode_wait_and_n_counts_n() -> None:
    fleet = Fleet(AdmissionConfig(prefill_queue_s=1e9), slots=4, costs=CostView({}, {}))
    first = fleet.join(n=3)
    second, third = fleet.join(), fleet.join()

    assert (starts(second), third.waits) == (True, True)
    fleet.first_tokens(first, second)
    assert third.waits
    fleet.finish(second)
    assert starts(third)


def test_a_request_for_more_than_there_is_starts_when_nothing_else_is_there() -> None:
    fleet = Fleet(AdmissionConfig(), slots=4)
    small = fleet.join()
    large = fleet.join(n=64, tokens=10_000)

    assert large.waits
    fleet.first_tokens(small)
    fleet.finish(small)
    assert starts(large)


def test_a_slot_that_will_be_free_when_the_prefill_ends_is_room_already() -> None:
    fleet = Fleet(AdmissionConfig(), slots=1)
    first = fleet.join()
    fleet.advance(1.0)
    fleet.first_tokens(first)
    fleet.advance(0.7)
    fleet.finish(first)  # 0.7 s of decoding, which is now known

    fleet.first_tokens(fleet.join())

    assert fleet.join(tokens=50).waits  # half a second of prefill: the slot is still taken then
    fleet.advance(0.3)
    assert len(fleet.started) == 2


def test_one_that_waits_for_a_worker_lets_others_pass_to_other_workers_but_not_to_that_one() -> None:
    fleet = Fleet(
        AdmissionConfig(prefill_queue_s=1.0), num_prefill=2, slots=100, pick=lambda t: int(t.request.request_id[-1])
    )
    names = ("busy-0", "more-0", "late-0", "also-0", "free-1")
    tickets = {name: fleet.join(name, tokens=10 if name == "also-0" else 200) for name in names}

    assert fleet.order == ["busy-0", "free-1"]
    fleet.first_tokens(tickets["busy-0"])
    assert fleet.order == ["busy-0", "free-1", "more-0"]


def test_sequences_of_other_gateways_take_slots_too() -> None:
    fleet = Fleet(AdmissionConfig(), slots=4)
    fleet.report(WorkerLoad(num_running=2, num_waiting=1, num_announced=1, pages_free=1000))

    assert fleet.join().waits
    fleet.report(WorkerLoad(num_running=3, pages_free=1000))
    assert len(fleet.started) == 1


def test_what_ended_since_the_last_report_is_not_taken_for_another_gateways() -> None:
    fleet = Fleet(AdmissionConfig(), slots=2)
    first, second = fleet.join(), fleet.join()
    fleet.first_tokens(first, second)
    fleet.report(WorkerLoad(num_running=2, pages_free=1000))
    third = fleet.join()
    assert third.waits

    fleet.finish(first)  # the report still says two

    assert starts(third)


def test_without_a_worker_a_request_is_the_routers_to_wait_with() -> None:
    fleet = Fleet(AdmissionConfig(max_queued=0), no_worker=True)

    assert starts(fleet.join())


def test_what_a_prefill_worker_has_computed_since_is_in_its_report() -> None:
    fleet = Fleet(AdmissionConfig(prefill_queue_s=2.0), slots=100)
    fleet.join(tokens=1000)  # 10 s
    waiting = fleet.join()
    fleet.report(WorkerLoad(num_waiting_tokens=1000), Role.PREFILL)
    fleet.advance(8.0)
    assert waiting.waits

    fleet.report(WorkerLoad(num_waiting_tokens=200), Role.PREFILL)

    assert starts(waiting)
    assert fleet.join().waits  # 2 s reported, and 1 s that was sent since


# ---- turns ----


def blocked(config: AdmissionConfig, **more: object) -> tuple[Fleet, Ticket]:
    """A fleet with one worker, of which a request that runs has the only place."""
    fleet = Fleet(replace(config, prefill_queue_s=0.0), slots=1000, **more)  # type: ignore[arg-type]
    return fleet, fleet.join("running")


def drained(fleet: Fleet) -> list[str]:
    """The order in which those that wait start when each gets its first token before the next."""
    while fleet.started:
        fleet.first_tokens(*fleet.started)
        fleet.finish(*fleet.started)
    return fleet.order


def test_tenants_share_by_weight() -> None:
    weights = {tenant_of(b"b"): 3.0}
    fleet, _ = blocked(AdmissionConfig(tenant_weights=weights))
    for number in range(4):
        fleet.join(f"a{number}", salt="a")
    for number in range(4):
        fleet.join(f"b{number}", salt="b")

    assert drained(fleet) == ["running", "b0", "b1", "a0", "b2", "b3", "a1", "a2", "a3"]


def test_a_higher_priority_goes_first_within_its_tenant_only() -> None:
    fleet, _ = blocked(AdmissionConfig())
    fleet.join("a-low", salt="a", priority=-1)
    fleet.join("a-plain", salt="a")
    fleet.join("a-high", salt="a", priority=5)
    fleet.join("b-plain", salt="b")

    order = drained(fleet)[1:]

    assert [name for name in order if name.startswith("a")] == ["a-high", "a-plain", "a-low"]
    assert order.index("b-plain") <= 1


def test_waiting_counts_as_priority_so_that_low_ones_do_not_starve() -> None:
    fleet, _ = blocked(AdmissionConfig(ageing_s=10.0))
    fleet.join("patient", priority=-3)
    fleet.clock.advance(20.0)
    fleet.join("newer")
    fleet.clock.advance(10.0)
    fleet.join("as old in classes")
    fleet.clock.advance(10.0)
    fleet.join("newest", priority=0)

    assert drained(fleet)[1:] == ["newer", "patient", "as old in classes", "newest"]


def test_the_earlier_deadline_goes_first_within_a_class() -> None:
    fleet, _ = blocked(AdmissionConfig(on_miss="serve"))
    fleet.join("none")
    fleet.join("late", slo=Slo(ttft_s=900.0))
    fleet.join("soon", slo=Slo(ttft_s=500.0))
    fleet.join("grpc deadline", deadline_s=700.0)

    assert drained(fleet)[1:] == ["soon", "grpc deadline", "late", "none"]


# ---- bounds ----


def test_more_than_may_wait_are_refused_and_the_tenant_that_waits_for_most_gives_way() -> None:
    fleet, _ = blocked(AdmissionConfig(max_queued=3))
    greedy = [fleet.join(salt="a") for _ in range(3)]
    modest = fleet.join(salt="b")

    assert modest.waits
    assert [t.waits for t in greedy] == [True, True, False]
    error = refusal(greedy[2])
    assert (error.reason, error.predicted, error.allowed) == ("max_queued", 4, 3)
    assert fleet.admission.counters.num_queued == 3


def test_each_tenant_may_be_bounded_by_itself() -> None:
    fleet, _ = blocked(AdmissionConfig(max_queued_per_tenant=2))
    tickets = [fleet.join(salt="a") for _ in range(3)]
    urgent = fleet.join(salt="a", priority=1)

    assert refusal(tickets[2]).reason == "max_queued_per_tenant"
    assert refusal(tickets[1]).reason == "max_queued_per_tenant"  # the urgent one goes before it
    assert (urgent.waits, fleet.join(salt="b").waits) == (True, True)


def test_a_request_larger_than_the_queue_pushes_nobody_out() -> None:
    fleet, _ = blocked(AdmissionConfig(max_queued=3))
    waiting = fleet.join()

    assert refusal(fleet.join(n=4)).reason == "max_queued"
    assert waiting.waits


def test_no_queue_means_start_or_be_refused() -> None:
    fleet, running = blocked(AdmissionConfig(max_queued=0))

    assert refusal(fleet.join()).reason == "max_queued"
    fleet.finish(running)
    assert starts(fleet.join())


def test_nobody_waits_longer_than_the_bound() -> None:
    fleet, _ = blocked(AdmissionConfig(max_wait_s=5.0))
    ticket = fleet.join()
    fleet.advance(4.9)
    assert ticket.waits
    fleet.advance(0.1)

    error = refusal(ticket)
    assert (error.reason, error.predicted, error.allowed) == ("max_wait", pytest.approx(5.0), 5.0)
    assert fleet.admission.num_waiting == 0


def test_retry_after_is_when_the_queue_will_have_moved() -> None:
    fleet, _ = blocked(AdmissionConfig(max_queued=2))
    for _ in range(2):
        fleet.join()
    for _ in range(4):  # each turn takes 3 s
        fleet.advance(3.0)
        fleet.finish(*fleet.started)
        fleet.join()

    error = refusal(fleet.join())

    assert error.retry_after_s == pytest.approx(9.0, rel=0.2)  # two turns ahead of it and its own


# ---- objectives ----


def test_a_ttft_that_would_be_missed_is_refused_before_any_work_is_done() -> None:
    fleet = Fleet(AdmissionConfig(prefill_queue_s=100.0), slots=100)
    for _ in range(3):
        fleet.join()

    late = fleet.join(slo=Slo(ttft_s=3.5))

    error = refusal(late)
    assert (error.reason, error.predicted, error.allowed) == ("slo_ttft", pytest.approx(4.0), 3.5)
    assert error.retry_after_s == pytest.approx(0.5)
    assert starts(fleet.join(slo=Slo(ttft_s=4.1)))


def test_a_ttft_is_judged_by_the_wait_for_its_turn_too() -> None:
    fleet, _ = blocked(AdmissionConfig())
    fleet.join("ahead")
    for number in range(4):  # a turn every 2 s
        fleet.advance(2.0)
        fleet.finish(*fleet.started)
        fleet.join(f"next-{number}")

    error = refusal(fleet.join(slo=Slo(ttft_s=3.5)))

    assert error.reason == "slo_ttft"
    # It would be next, in 2 s, behind a prompt of 1 s, and takes 1 s itself.
    assert error.predicted == pytest.approx(4.0)
    assert fleet.join(slo=Slo(ttft_s=4.5)).waits


def test_one_that_waits_past_its_ttft_is_refused_then() -> None:
    fleet, _ = blocked(AdmissionConfig(max_wait_s=60.0))
    ticket = fleet.join(slo=Slo(ttft_s=5.0))

    fleet.advance(4.0)
    assert ticket.waits
    fleet.advance(1.0)

    assert refusal(ticket).reason == "slo_ttft"


def test_a_tpot_that_would_be_missed_is_refused() -> None:
    fleet = Fleet(AdmissionConfig(prefill_queue_s=100.0), slots=100)
    fleet.first_tokens(*[fleet.join() for _ in range(5)])

    error = refusal(fleet.join(slo=Slo(tpot_s=0.0155)))

    assert (error.reason, error.predicted, error.allowed) == ("slo_tpot", pytest.approx(0.016), 0.0155)
    assert starts(fleet.join(slo=Slo(tpot_s=0.0165)))


def test_the_policys_forecast_is_believed() -> None:
    fleet = Fleet(AdmissionConfig(), expected=Forecast(ttft_s=30.0, tpot_s=0.5, bytes_shipped=0))

    assert refusal(fleet.join(slo=Slo(ttft_s=29.0))).predicted == 30.0
    assert refusal(fleet.join(slo=Slo(tpot_s=0.4))).predicted == 0.5
    assert starts(fleet.join(slo=Slo(31.0, 0.6)))


def test_misses_may_be_served_and_are_then_named_and_counted_once(caplog: pytest.LogCaptureFixture) -> None:
    fleet = Fleet(AdmissionConfig(on_miss="serve", prefill_queue_s=0.0))
    running = fleet.join()

    with caplog.at_level(logging.WARNING):
        late = fleet.join(slo=Slo(ttft_s=1.5))
    assert late.waits
    fleet.advance(1.0)
    fleet.finish(running)

    assert starts(late)
    assert late.slo_miss_expected == "slo_ttft: a TTFT of 2 s is predicted, 1.5 s is allowed"
    assert fleet.admission.counters.misses_served_by_reason == {"slo_ttft": 1}
    assert fleet.admission.counters.refusals_by_reason == {}
    assert "served although slo_ttft is expected to be missed" in caplog.text


def test_without_costs_what_was_measured_predicts_and_is_forgotten_when_all_are_refused_for_it() -> None:
    fleet = Fleet(AdmissionConfig(), costs=CostView({}, {}))
    slow = fleet.join(slo=Slo(ttft_s=1.0))  # nothing is known: it starts
    assert starts(slow)
    fleet.advance(50.0)  # the worker was compiling
    fleet.first_tokens(slow)
    fleet.finish(slow)

    assert refusal(fleet.join(slo=Slo(ttft_s=1.0))).predicted == pytest.approx(50.0)
    fleet.advance(31.0)
    assert starts(fleet.join(slo=Slo(ttft_s=1.0)))


def test_another_attempt_elsewhere_is_booked_there() -> None:
    fleet = Fleet(AdmissionConfig(), slots=1)
    ticket, waiting = fleet.join(), fleet.join()
    assert waiting.waits
    other = replace(fleet.decode, worker_id=WorkerId("decode-1"))

    fleet.admission.begun(ticket, Route(fleet.prefill[0], other, "another attempt"))
    fleet.run()

    assert starts(waiting)


# ---- leaving ----


def test_one_that_goes_away_while_it_waits_makes_room_in_the_queue() -> None:
    fleet, _ = blocked(AdmissionConfig(max_queued=1))
    gone = fleet.join()

    fleet.admission.leave(gone)

    assert fleet.admission.num_waiting == 0
    assert fleet.join().waits
    assert sum(1 for _ in fleet.admission.counters.refusals_by_reason) == 0


def test_closing_refuses_whoever_waits_with_an_error_of_its_own() -> None:
    fleet, running = blocked(AdmissionConfig())
    tickets = [fleet.join(), fleet.join()]

    fleet.admission.close(lambda: NoRoute("stopping"))

    errors = []
    for ticket in tickets:
        with pytest.raises(NoRoute) as caught:
            ticket.check()
        errors.append(caught.value)
    assert errors[0] is not errors[1]
    assert starts(running)
    assert fleet.admission.num_waiting == 0


def test_a_flood_of_refusals_is_logged_once_with_their_number(caplog: pytest.LogCaptureFixture) -> None:
    fleet, _ = blocked(AdmissionConfig(max_queued=0, max_wait_s=1e6))
    with caplog.at_level(logging.WARNING):
        for _ in range(50):
            fleet.join()
        fleet.clock.advance(11.0)
        fleet.join()

    assert len(caplog.records) == 2
    assert "49 more since the last such line" in caplog.text


def test_tenants_that_the_configuration_does_not_name_are_one_label() -> None:
    named = tenant_of(b"a")
    fleet, _ = blocked(AdmissionConfig(tenant_weights={named: 2.0, "unsalted": 1.0}))
    for salt in ("a", "b", "c", "c", ""):
        fleet.join(salt=salt)

    assert fleet.admission.counters.queued_by_tenant == {named: 1, "unsalted": 1, "other": 3}


# ---- properties ----

CONFIGS = st.builds(
    AdmissionConfig,
    max_queued=st.integers(0, 6),
    max_queued_per_tenant=st.none() | st.integers(1, 4),
    max_wait_s=st.sampled_from([3.0, 20.0, 1e6]),
    ageing_s=st.sampled_from([1.0, 10.0]),
    prefill_queue_s=st.sampled_from([0.0, 1.5]),
    decode_slots=st.none() | st.integers(1, 6),
    on_miss=st.sampled_from(["reject", "serve"]),
)


@dataclass(frozen=True)
class Step:
    """Something that happens; ``which`` chooses among those that it can happen to."""

    what: str
    which: int = 0
    tokens: int = 100
    n: int = 1
    salt: str = "a"
    priority: int = 0
    ttft_s: float | None = None
    tpot_s: float | None = None


STEPS = st.lists(
    st.builds(
        Step,
        what=st.sampled_from(["join", "join", "join", "first", "finish", "finish", "cancel", "advance"]),
        which=st.integers(0, 100),
        tokens=st.integers(1, 300),
        n=st.integers(1, 3),
        salt=st.sampled_from("abc"),
        priority=st.integers(-MAX_PRIORITY, MAX_PRIORITY),
        ttft_s=st.none() | st.floats(0.1, 20.0),
        tpot_s=st.none() | st.floats(0.011, 0.03),
    ),
    max_size=40,
)


def play(config: AdmissionConfig, steps: Sequence[Step]) -> Iterator[Fleet]:
    """The fleet after each step."""
    fleet = Fleet(config, num_prefill=2, slots=5, pick=lambda t: len(t.request.prompt_token_ids) % 2)
    for step in steps:
        running = fleet.started
        match step.what:
            case "join":
                fleet.join(
                    tokens=step.tokens,
                    n=step.n,
                    salt=step.salt,
                    priority=step.priority,
                    slo=Slo(step.ttft_s, step.tpot_s),
                )
            case "first" if running:
                fleet.first_tokens(running[step.which % len(running)])
            case "finish" if running:
                ticket = running[step.which % len(running)]
                fleet.first_tokens(ticket)
                fleet.finish(ticket, tokens=1 + step.which % 8)
            case "cancel":
                ticket = fleet.tickets[step.which % len(fleet.tickets)] if fleet.tickets else None
                if ticket in running:
                    fleet.finish(ticket, tokens=None)
                elif ticket is not None and ticket.waits:
                    fleet.admission.leave(ticket)
                    fleet.run()
            case "advance":
                fleet.advance(step.which / 10)
        yield fleet


@settings(max_examples=150, deadline=None)
@given(CONFIGS, STEPS)
def test_the_queue_is_bounded_and_nothing_waits_while_there_is_room(config: AdmissionConfig, steps: list[Step]) -> None:
    for fleet in play(config, steps):
        waiting = [t for t in fleet.tickets if t.waits]
        sizes = Counter[bytes]()
        for ticket in waiting:
            sizes[ticket.request.salt] += ticket.request.sampling.n
        assert sizes.total() == fleet.admission.counters.num_queued <= config.max_queued
        assert max(sizes.values(), default=0) <= (config.max_queued_per_tenant or config.max_queued)
        if len(waiting) <= LOOK_AHEAD:
            assert fleet.admission.serve(fleet.propose) is None
        if waiting:
            assert fleet.started, "an idle fleet has room for anything"
        assert all(fleet.clock.now() < t.request.arrived_at + config.max_wait_s for t in waiting)


@settings(max_examples=100, deadline=None)
@given(CONFIGS, STEPS)
def test_every_request_starts_or_is_refused_and_nothing_is_left_behind(
    config: AdmissionConfig, steps: list[Step]
) -> None:
    fleet = [Fleet(config), *play(config, steps)][-1]
    for _ in range(2 * len(fleet.tickets)):
        if fleet.started:
            fleet.first_tokens(fleet.started[0])
            fleet.finish(fleet.started[0])

    admission = fleet.admission
    assert (admission.num_waiting, fleet.started) == (0, [])
    assert (admission._on_decode, admission._queue.sizes) == ({}, {})
    refused = sum(admission.counters.refusals_by_reason.values())
    assert refused == sum(t._refusal is not None for t in fleet.tickets)
    assert admission.counters.wait_counts[-1] == len(fleet.tickets)
    assert len(admission.counters.wait_counts) == len(WAIT_BUCKETS_S) + 1
    if config.on_miss == "serve":
        assert not {Bound.SLO_TTFT, Bound.SLO_TPOT} & set(admission.counters.refusals_by_reason)


@settings(max_examples=50, deadline=None)
@given(CONFIGS, STEPS)
def test_the_same_happens_again_when_the_same_comes(config: AdmissionConfig, steps: list[Step]) -> None:
    first, second = ([Fleet(config), *play(config, steps)][-1] for _ in range(2))

    assert first.order == second.order
    assert [repr(t) for t in first.tickets] == [repr(t) for t in second.tickets]
    assert first.admission.counters == second.admission.counters


@settings(max_examples=50, deadline=None)
@given(st.lists(st.integers(-3, 3), min_size=1, max_size=30), st.integers(-3, 3))
def test_no_request_of_a_tenant_is_overtaken_for_ever(newcomers: list[int], priority: int) -> None:
    """Turns of 1 s, a newcomer for each; six classes at most are between two requests, each worth 2 s of waiting."""
    fleet, _ = blocked(AdmissionConfig(ageing_s=2.0, max_wait_s=1e6))
    patient = fleet.join("patient", priority=priority)
    for newcomer in newcomers:
        fleet.join(priority=newcomer)
        fleet.advance(1.0)
        fleet.finish(*fleet.started)
        if not patient.waits:
            break

    assert fleet.order.index("patient") <= 2 * 6 + 3 if not patient.waits else len(newcomers) <= 2 * 6 + 2


@settings(max_examples=50, deadline=None)
@given(st.dictionaries(st.sampled_from("abc"), st.integers(1, 4), min_size=2), st.integers(1, 200))
def test_tenants_that_compete_get_prompt_tokens_by_weight(weights: dict[str, int], tokens: int) -> None:
    config = AdmissionConfig(tenant_weights={tenant_of(salt.encode()): w for salt, w in weights.items()})
    fleet, _ = blocked(config)
    for salt in sorted(weights):
        for number in range(12):
            fleet.join(f"{salt}{number}", salt=salt, tokens=tokens)
    while len(fleet.admission.counters.queued_by_tenant) == len(weights):  # all of them compete
        fleet.first_tokens(fleet.started[-1])
        fleet.finish(fleet.started[0], tokens=1)

    got = Counter(name[0] for name in fleet.order[1:])
    for a in weights:
        for b in weights:
            assert abs(got[a] / weights[a] - got[b] / weights[b]) <= 1 / weights[a] + 1 / weights[b] + 1e-9


async def test_whoever_waits_for_a_decision_hears_it() -> None:
    fleet, running = blocked(AdmissionConfig())
    ticket = fleet.join()
    fleet.admission.moved.clear()

    fleet.finish(running)

    assert await ticket.decided()
    assert fleet.admission.moved.is_set()
    fleet.admission.close(lambda: Cancelled("nobody hears this"))
    assert starts(ticket)
