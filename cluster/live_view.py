"""How does a view of a thousand workers cost only what changed since the last one?

A gateway makes a view for nearly every sequence that it places: placing one changes what it assigned, and each worker
reports four times a second. So everything that a view holds is kept here and made anew in parts:

    workers           those that changed are replaced, in a copy of the rest
    pools             likewise, when somebody looks at them: not every policy does
    links             made when somebody looks at one, and kept until its sender reports again
    pools.may_ship    changes with self-tests and with who is there

When a worker comes, goes, restarts, changes its role or drains, positions move, and the pools are made anew.

Invariant: a view equals one that is made of the same workers and links from nothing. ``Membership`` is the one user.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property, partial

import numpy as np
from numpy.typing import NDArray

from cluster.cost_model import CostView
from cluster.view import (
    ClusterView,
    Flags,
    Integers,
    LinkView,
    Offload,
    Pools,
    WorkerPool,
    WorkerView,
    alike,
    identities_of,
    identities_with,
)
from core.link import LinkEstimate, ProbeReport
from core.request import EngineId, Role, WorkerId

_SHIPS = (Role.PREFILL, Role.DECODE)  # roles of a sending and a receiving worker
_NOWHERE = Pools(WorkerPool.of(()), WorkerPool.of(()))


class LiveView:
    """The workers as they were last heard of. One thread."""

    def __init__(self, *, self_test: bool) -> None:
        """``self_test``: a link from a prefill to a decode worker may be used only once its self-test has passed."""
        self._self_test = self_test
        self._workers: dict[WorkerId, WorkerView] = {}  # in order of their ids, but for those that came since a view
        self._senders: dict[WorkerId, _Sender] = {}  # as _workers; written only after ``_own_senders``
        self._senders_are_shown = False  # by a view: they must not change any more
        self._changed: set[WorkerId] = set()  # since the last view
        self._is_moved = True  # positions, since the last view
        self._probes_changed = False  # since the last view
        # As of the last view:
        self._rows: list[WorkerView] = []  # [position]
        self._identities = identities_of(())  # [position]
        self._position_of: dict[WorkerId, int] = {}
        self._leases: NDArray[np.float64] = np.zeros(0)  # [position], instants
        self._alike: Flags | None = None  # [prefill, decode position]
        self._passed: Flags = np.zeros((0, 0), np.bool_)  # [prefill, decode position]: its self-test did
        # As of the last view whose pools were looked at, or of the last in which positions moved; and who that was:
        self._pools = _NOWHERE
        self._pooled = self._identities
        self.next_expiry_at = math.inf  # the view that was made last is wrong from then on

    def put(self, worker: WorkerView, estimates: Sequence[LinkEstimate], heard_at: float) -> None:
        """A worker came, or is not any more as it was. ``estimates``: of links that it sends on."""
        worker_id = worker.worker_id
        before, sender = self._workers.get(worker_id), self._senders.get(worker_id)
        if before is None or sender is None or before.engine_id != worker.engine_id:
            self._is_moved = True
            self._own_senders()[worker_id] = _Sender(worker, heard_at, estimates, {})
        else:
            self._is_moved = self._is_moved or _place(before) != _place(worker)
            if sender.estimates is not estimates or sender.heard_at != heard_at:
                self._own_senders()[worker_id] = _Sender(worker, heard_at, estimates, sender.probes)
        self._workers[worker_id] = worker
        self._changed.add(worker_id)

    def remove(self, worker_id: WorkerId) -> None:
        """A worker is gone, and with it all that is known of links to it; nothing happens if it never came."""
        worker = self._workers.pop(worker_id, None)
        if worker is None:
            return
        engine_id = worker.engine_id
        senders = self._own_senders()
        del senders[worker_id]
        for name, sender in senders.items():
            if engine_id in sender.probes:
                probes = {engine: probe for engine, probe in sender.probes.items() if engine != engine_id}
                senders[name] = _Sender(sender.worker, sender.heard_at, sender.estimates, probes)
        self._changed.discard(worker_id)
        self._is_moved = True

    def note_probe(self, sender: WorkerId, receiver: WorkerId, report: ProbeReport, at: float) -> None:
        """A self-test between two workers that are there has ended, at that instant."""
        known, to = self._senders[sender], self._workers[receiver].engine_id
        self._own_senders()[sender] = _Sender(
            known.worker, known.heard_at, known.estimates, {**known.probes, to: (report, at)}
        )
        self._probes_changed = True
        p = self._pools.prefill.roster.position_of.get(known.worker.engine_id)
        d = self._pools.decode.roster.position_of.get(to)
        if self._self_test and p is not None and d is not None:
            self._passed[p, d] = report.passed

    def view(self, now: float, costs: CostView, offload: Offload) -> ClusterView:
        """The cluster at ``now``."""
        if self._is_moved:
            self._move()
        elif self._changed:
            self._replace_changed()
        if self._is_moved or self._probes_changed:
            self._pools = Pools(self._pools.prefill, self._pools.decode, self._may_ship())
        self._changed.clear()
        self._is_moved = self._probes_changed = False
        first_expiry_at = float(self._leases[self._leases.argmin()]) if len(self._leases) else math.inf
        everybody_lives = first_expiry_at > now
        self.next_expiry_at = first_expiry_at if everybody_lives else self._expiry_after(now)
        links, self._senders_are_shown = _Links(self._senders, self._self_test), True
        rows, identities = tuple(self._rows), self._identities
        # Whose lease has run out is not ready, though it was not dropped yet: the view finds out who is.
        pools = partial(self._pools_of, rows, identities, self._pools, self._pooled) if everybody_lives else None
        return ClusterView(now, rows, links, costs, offload, pools, identities)

    # ---- inside ----

    def _move(self) -> None:
        self._workers = dict(sorted(self._workers.items()))
        self._senders = {worker_id: self._senders[worker_id].seen_anew(w) for worker_id, w in self._workers.items()}
        self._rows = list(self._workers.values())
        self._identities = identities_of(self._rows)
        self._position_of = {worker_id: i for i, worker_id in enumerate(self._workers)}
        self._leases = np.array([w.lease_expires_at for w in self._rows], np.float64)
        staying = [w for w in self._rows if not w.draining]
        prefill, decode = (WorkerPool.of(w for w in staying if w.role is role) for role in _SHIPS)
        if self._self_test:
            self._passed = self._passed_between(prefill, decode)
        self._alike = alike(prefill.roster, decode.roster)
        self._pools, self._pooled = Pools(prefill, decode), self._identities
        self._senders_are_shown = False

    def _own_senders(self) -> dict[WorkerId, _Sender]:
        """To be written to."""
        if self._senders_are_shown:
            self._senders, self._senders_are_shown = self._senders.copy(), False
        return self._senders

    def _expiry_after(self, now: float) -> float:
        return float(self._leases.min(where=self._leases > now, initial=math.inf))

    def _replace_changed(self) -> None:
        changed = [self._workers[worker_id] for worker_id in self._changed]
        positions = [self._position_of[worker.worker_id] for worker in changed]
        for position, worker in zip(positions, changed, strict=True):
            self._rows[position] = worker
        self._leases[positions] = [worker.lease_expires_at for worker in changed]
        self._identities = identities_with(self._identities, positions, changed)

    def _pools_of(
        self, rows: Sequence[WorkerView], identities: Integers, before: Pools, identities_before: Integers
    ) -> Pools:
        """Those of a view, which differ from ``before`` in what became of the same workers in the same places."""
        changed = [rows[position] for position in (identities != identities_before).nonzero()[0].tolist()]
        if not changed:
            return before
        pools = Pools(_with(before.prefill, changed), _with(before.decode, changed), before.may_ship)
        if self._pools is before:
            self._pools, self._pooled = pools, identities
        return pools

    def _passed_between(self, prefill: WorkerPool, decode: WorkerPool) -> Flags:
        """[p, d]: has the link passed? What is known of engines that stayed moves with them."""
        passed = np.zeros((len(prefill), len(decode)), np.bool_)
        stayed = [
            [(now, was) for engine, now in after.roster.position_of.items() if (was := before.get(engine)) is not None]
            for after, before in (
                (prefill, self._pools.prefill.roster.position_of),
                (decode, self._pools.decode.roster.position_of),
            )
        ]
        if all(stayed):
            (p_now, p_was), (d_now, d_was) = (np.array(pairs, np.int64).T for pairs in stayed)
            passed[np.ix_(p_now, d_now)] = self._passed[np.ix_(p_was, d_was)]
        probes = [self._senders[worker.worker_id].probes for worker in prefill.workers]
        old_p, old_d = ({now for now, _ in pairs} for pairs in stayed)
        new_d = [d for d in range(len(decode)) if d not in old_d]
        for p in range(len(prefill)):
            for d in new_d if p in old_p else range(len(decode)):
                probe = probes[p].get(decode.workers[d].engine_id)
                passed[p, d] = probe is not None and probe[0].passed
        return passed

    def _may_ship(self) -> Flags | None:
        if not self._self_test or self._passed.all():
            return self._alike
        return self._passed.copy() if self._alike is None else self._alike & self._passed


def _place(worker: WorkerView) -> tuple[Role, bool]:
    """What decides in which pool a worker is."""
    return worker.role, worker.draining


def _with(pool: WorkerPool, changed: Sequence[WorkerView]) -> WorkerPool:
    position_of = pool.roster.position_of
    here = {position_of[w.engine_id]: w for w in changed if w.engine_id in position_of}
    return pool.with_changed(here) if here else pool


@dataclass(frozen=True, eq=False)
class _Sender:
    """A worker as the sender of links. ``made`` fills when they are looked at."""

    worker: WorkerView
    heard_at: float
    estimates: Sequence[LinkEstimate]
    probes: Mapping[EngineId, tuple[ProbeReport, float]]  # receiver |-> last self-test, and when it ended
    made: dict[WorkerId, LinkView] = field(default_factory=dict)

    @cached_property
    def estimate_of(self) -> Mapping[WorkerId, LinkEstimate]:
        """By receiver."""
        return {estimate.worker_id: estimate for estimate in self.estimates}

    def seen_anew(self, worker: WorkerView) -> _Sender:
        """The same, with no link made yet: who is there, or in which role, has changed."""
        return _Sender(worker, self.heard_at, self.estimates, self.probes)

    def link(self, receiver: WorkerView, self_test: bool) -> LinkView | None:
        """The link to ``receiver``; None if it is of no use and carried nothing."""
        made = self.made.get(receiver.worker_id)
        if made is None:
            estimate = self.estimate_of.get(receiver.worker_id)
            ships = (self.worker.role, receiver.role) == _SHIPS
            if estimate is None and not ships:
                return None
            probe, probed_at = self.probes.get(receiver.engine_id, (None, -math.inf))
            usable, reason = True, ""
            # Links for pulls of cached pages are not tested before they are used: a pull that fails costs little.
            if self_test and probe is None and ships:
                usable, reason = False, "not tested yet"
            elif self_test and probe is not None and not probe.passed:
                usable, reason = False, f"{probe.error}: {probe.reason}"
            made = self.made[receiver.worker_id] = LinkView(
                from_worker=self.worker.worker_id,
                from_cluster=self.worker.cluster_id,
                to_worker=receiver.worker_id,
                to_cluster=receiver.cluster_id,
                heard_at=self.heard_at,
                estimate=estimate,
                probe=probe,
                probed_at=probed_at,
                usable=usable,
                reason=reason,
            )
        return made


class _Links(Mapping[tuple[WorkerId, WorkerId], LinkView]):
    """Every link of one view, made when it is looked at: a thousand workers have a quarter of a million."""

    def __init__(self, senders: Mapping[WorkerId, _Sender], self_test: bool) -> None:
        self._senders = senders  # in order of their ids
        self._self_test = self_test

    def __getitem__(self, pair: tuple[WorkerId, WorkerId]) -> LinkView:
        sender, receiver = self._senders.get(pair[0]), self._senders.get(pair[1])
        if sender is None or receiver is None:
            raise KeyError(pair)
        link = sender.made.get(pair[1]) or sender.link(receiver.worker, self._self_test)
        if link is None:
            raise KeyError(pair)
        return link

    def __iter__(self) -> Iterator[tuple[WorkerId, WorkerId]]:
        for name, sender in self._senders.items():
            for other, receiver in self._senders.items():
                if other in sender.estimate_of or (sender.worker.role, receiver.worker.role) == _SHIPS:
                    yield name, other

    def __len__(self) -> int:
        return sum(1 for _ in self)
