"""How do self-tests of links fill, clear and read pages, of which each rank of a worker has its own?

Random bytes in the pages of every sending rank; what must have arrived is told by one digest. Between workers of one
rank it is the digest of the receiver's pages (probe_pattern.py). Otherwise it is made of one digest for each part of
the hand-over, of the heads that both its ends have, which each end computes of its own pages.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

from core.kv_layout import KvEnd, KvLayer, KvLayout
from core.rank_channel import RankChannel, RankLines
from core.request import SessionId
from kv_transfer.probe_pattern import DIGEST_BYTES, clear, digest_of, digest_there, write_pattern
from kv_transfer.rank_parts import part_name, senders_of
from kv_transfer.session import Grant
from kv_transfer.transport import Region

ANSWER_WAIT_S = 30.0  # of another rank, which moves some MiB

Digests = Mapping[SessionId, bytes]  # part |-> digest of it


class ProbePages(Protocol):
    """Pages of a worker, on all its ranks. Nobody else may use them meanwhile; methods block."""

    @property
    def page_bytes(self) -> int:
        """Of one page, on all ranks and in all layers."""
        ...

    def fill(self, pages: Sequence[int], grant: Grant, num_pages: int, num_tokens: int) -> bytes:
        """Put random bytes into ``pages``, of which ``num_tokens`` tokens go to ``num_pages`` pages there: the digest
        that will be found there."""
        ...

    def clear(self, pages: Sequence[int]) -> None:
        """Fill them with zeros."""
        ...

    def digest(self, session_id: SessionId, pages: Sequence[int], sender_ranks: Sequence[KvEnd]) -> bytes:
        """Of what a session put there; ``sender_ranks`` as it was granted."""
        ...


@dataclass(frozen=True, slots=True)
class FillPages:
    """Asked of another rank; it answers with the digests of its parts."""

    pages: tuple[int, ...]
    grant: Grant
    num_pages: int
    num_tokens: int


@dataclass(frozen=True, slots=True)
class ClearPages:
    """Asked of another rank."""

    pages: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class DigestPages:
    """Asked of another rank; it answers with the digests of its parts."""

    session_id: SessionId
    pages: tuple[int, ...]
    senders: tuple[KvEnd, ...]


class RankPages:
    """The pages of one rank; alone it is a worker's ``ProbePages``."""

    def __init__(self, region: Region, layout: KvLayout, rank: int = 0) -> None:
        """``layout``: what the region's pages hold."""
        self._region = region
        self._layout = layout
        self._rank = rank

    @property
    def page_bytes(self) -> int:
        return self._region.geometry.bytes_per_page

    def fill(self, pages: Sequence[int], grant: Grant, num_pages: int, num_tokens: int) -> bytes:
        if grant.parts:
            return joined(self.fill_parts(FillPages(tuple(pages), grant, num_pages, num_tokens)))
        write_pattern(self._region, pages)
        there = grant.layout or self._layout
        return digest_there(self._region, self._layout, pages, there, num_pages, num_tokens)

    def clear(self, pages: Sequence[int]) -> None:
        clear(self._region, pages)

    def digest(self, session_id: SessionId, pages: Sequence[int], sender_ranks: Sequence[KvEnd]) -> bytes:
        if sender_ranks:
            return joined(self.digest_parts(DigestPages(session_id, tuple(pages), tuple(sender_ranks))))
        return digest_of(self._region, pages)

    def fill_parts(self, asked: FillPages) -> Digests:
        """This rank's."""
        write_pattern(self._region, asked.pages)
        return {
            part.session_id: digest_there(
                self._region,
                self._layout,
                asked.pages,
                shared_layout(part.layout, self._layout),
                asked.num_pages,
                asked.num_tokens,
            )
            for part in asked.grant.parts
            if part.sender == self._rank
        }

    def digest_parts(self, asked: DigestPages) -> Digests:
        """This rank's."""
        here, layouts = self._layout, [end.layout for end in asked.senders]
        num_tokens = len(asked.pages) * here.page_size
        return {
            part_name(asked.session_id, sender, self._rank): digest_there(
                self._region,
                here,
                asked.pages,
                shared_layout(here, layouts[sender]),
                len(asked.pages),
                num_tokens,
            )
            for sender in senders_of(here, layouts)
        }

    def serve(self, channel: RankChannel) -> None:
        """Do what rank 0 asks."""
        channel.hear(FillPages, self.fill_parts)
        channel.hear(ClearPages, lambda asked: self.clear(asked.pages))
        channel.hear(DigestPages, self.digest_parts)


class RankedPages:
    """``ProbePages`` of a worker of several ranks."""

    def __init__(self, own: RankPages, lines: RankLines, layout: KvLayout) -> None:
        """``own``: rank 0's, of that layout."""
        self._own = own
        self._lines = lines
        self._end = KvEnd(layout, b"")

    @property
    def page_bytes(self) -> int:
        return self._own.page_bytes * self._lines.num_ranks

    def fill(self, pages: Sequence[int], grant: Grant, num_pages: int, num_tokens: int) -> bytes:
        asked = FillPages(tuple(pages), grant, num_pages, num_tokens)
        return self._joined(self._own.fill_parts(asked), asked)

    def clear(self, pages: Sequence[int]) -> None:
        self._own.clear(pages)
        self._lines.ask_all(ClearPages(tuple(pages)), ANSWER_WAIT_S)

    def digest(self, session_id: SessionId, pages: Sequence[int], sender_ranks: Sequence[KvEnd]) -> bytes:
        asked = DigestPages(session_id, tuple(pages), tuple(sender_ranks))
        return self._joined(self._own.digest_parts(asked), asked)

    def _joined(self, own: Digests, asked: object) -> bytes:
        others: list[Digests] = self._lines.ask_all(asked, ANSWER_WAIT_S)
        return joined({**own, **{name: digest for other in others for name, digest in other.items()}})


def joined(parts: Digests) -> bytes:
    """One digest of all parts', whichever end has computed them."""
    return hashlib.blake2b(b"".join(parts[name] for name in sorted(parts)), digest_size=DIGEST_BYTES).digest()


def shared_layout(layout: KvLayout, other: KvLayout) -> KvLayout:
    """Of ``layout`` the heads that ``other`` has too."""

    def shared(one: KvLayer, another: KvLayer) -> KvLayer:
        first, stop = max(one.heads.start, another.heads.start), min(one.heads.stop, another.heads.stop)
        return replace(one, first_head=first, num_heads=max(0, stop - first))

    pairs = zip(layout.layers, other.layers, strict=True)
    return KvLayout(layout.page_size, tuple(shared(one, another) for one, another in pairs))


def bytes_there(grant: Grant, layout: KvLayout, num_pages: int) -> int:
    """Bytes of ``num_pages`` pages where the grant is from; ``layout``: of them, if it does not say."""
    if not grant.parts:
        return num_pages * (grant.layout or layout).bytes_per_page
    ranks = {part.descriptor: part.layout for part in grant.parts}
    return num_pages * sum(rank.bytes_per_page for rank in ranks.values())
