"""Who sends what to whom when a worker has several ranks? Pure.

A rank holds some heads of every page. Each rank of the sending worker ships its own heads from its own pool, to each
rank of the receiving worker that holds some of them: a hand-over between workers of several ranks is as many sessions
as there are such pairs, its *parts*. A part is a session like any other (session.py); what lies between two pools of
unequal heads is cut by the transfer plan as ever. The whole is over when every part is, and has failed if one has.

    prefill, 2 ranks     decode, 1 rank              prefill, 1 rank     decode, 2 ranks
    heads 0-3  ───────>  heads 0-7                   heads 0-7  ──┬───>  heads 0-3
    heads 4-7  ───────>                                           └───>  heads 4-7
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from core.errors import Incompatible
from core.kv_layout import KvLayout
from core.request import SessionId
from kv_transfer.session import Grant, SendReport


def part_name(session_id: SessionId, sender: int, receiver: int) -> SessionId:
    """What the session from one rank to another is called, of those of ``session_id``."""
    return SessionId(f"{session_id}/{sender}-{receiver}")


def share_heads(one: KvLayout, other: KvLayout) -> bool:
    """Do both hold some head of some layer?"""
    pairs = zip(one.layers, other.layers, strict=True)
    return any(a.heads.start < b.heads.stop and b.heads.start < a.heads.stop for a, b in pairs)


def senders_of(receiver: KvLayout, senders: Sequence[KvLayout]) -> tuple[int, ...]:
    """Which ranks send to a rank of layout ``receiver``. Raises ``Incompatible`` unless each of its heads comes from
    exactly one of them."""
    for sender in senders:
        receiver.require_compatible(sender)
    for index, layer in enumerate(receiver.layers):
        found = sorted(head for sender in senders for head in sender.layers[index].heads if head in layer.heads)
        if found != list(layer.heads):
            raise Incompatible("layout", f"heads {list(layer.heads)} of layer {index}", f"heads {found} of these")
    return tuple(rank for rank, sender in enumerate(senders) if share_heads(receiver, sender))


def grant_for(grant: Grant, sender: int) -> Grant:
    """What one rank of the sending worker is told of a grant. Raises ``Incompatible`` if it has nothing to send."""
    parts = tuple(part for part in grant.parts if part.sender == sender)
    if not parts:
        raise Incompatible("layout", f"rank {sender}", "no rank that holds some of its heads")
    return replace(grant, parts=parts)


def together(reports: Sequence[SendReport]) -> SendReport:
    """How a hand-over ended whose parts ended so, in this order: what is counted is added, the longest part counts."""
    if len(reports) == 1:
        return reports[0]
    return SendReport(
        next((report.error for report in reports if report.error is not None), None),
        bytes_sent=sum(report.bytes_sent for report in reports),
        num_writes=sum(report.num_writes for report in reports),
        transfer_s=max(report.transfer_s for report in reports),
        exposed_s=max(report.exposed_s for report in reports),
        wait_s=max(report.wait_s for report in reports),
        tail_bytes=sum(report.tail_bytes for report in reports),
        num_groups=sum(report.num_groups for report in reports),
        writes_resent=sum(report.writes_resent for report in reports),
        receiver=reports[0].receiver,
    )
