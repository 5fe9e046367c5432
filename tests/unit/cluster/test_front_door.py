"""When is a service ready? Asked by both doors."""

from __future__ import annotations

from dataclasses import replace

from cluster.front_door import not_ready_reason
from cluster.view import LinkView
from core.request import ClusterId, Role
from tests.unit.cluster.scripted_router import FixedMembership, worker


def link(membership: FixedMembership, usable: bool) -> None:
    decode, prefill = membership.workers
    membership.links = {
        (prefill.worker_id, decode.worker_id): LinkView(
            prefill.worker_id,
            prefill.cluster_id,
            decode.worker_id,
            decode.cluster_id,
            heard_at=0.0,
            usable=usable,
            reason="" if usable else "not tested yet",
        )
    }


def test_ready_once_one_link_works() -> None:
    membership = FixedMembership()
    assert not_ready_reason(membership) is None, "nothing is known against the pair"

    link(membership, usable=False)
    reason = not_ready_reason(membership)
    assert reason is not None
    assert reason.endswith("prefill-0 to decode-0: not tested yet")

    link(membership, usable=True)
    assert not_ready_reason(membership) is None


def test_one_working_link_of_several_is_enough() -> None:
    membership = FixedMembership()
    link(membership, usable=False)
    membership.workers = (*membership.workers, worker("decode-1", Role.DECODE))

    assert not_ready_reason(membership) is None, "nothing is known against prefill-0 to decode-1"


def test_without_prefill_workers_no_link_is_asked_for() -> None:
    membership = FixedMembership()
    link(membership, usable=False)
    membership.workers = membership.workers[:1]

    assert not_ready_reason(membership) is None
    membership.workers = tuple(replace(w, draining=True) for w in membership.workers)
    assert not_ready_reason(membership) == "no decode worker is ready"


def test_a_link_from_another_cluster_makes_a_service_no_less_ready() -> None:
    membership = FixedMembership()
    decode, prefill = membership.workers
    membership.workers = (decode, replace(prefill, cluster_id=ClusterId("west")))
    link(membership, usable=False)

    assert not_ready_reason(membership) is None
