"""Workers of one and of two ranks hand their heads to each other, over every transport; the lines between the ranks of
one worker are pipes."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack
from functools import partial
from multiprocessing import Pipe
from types import SimpleNamespace

import pytest

from core.errors import RankLost, TransferAborted
from core.kv_layout import KvEnd, KvLayer, KvLayout
from core.rank_channel import RankChannel, RankLines
from core.request import SessionId
from kv_transfer.rank_receiver import RankedReceiver, RankReceiving
from kv_transfer.rank_sender import RankedSender, RankSending
from kv_transfer.receiver import ReceivingEnd
from kv_transfer.sender import SendingEnd, StoredPages
from kv_transfer.session import Grant
from tests.contract.kv_sessions.conftest import MakeWorker, Outcomes, Worker

A = SessionId("a")
PAGE_SIZE, NUM_HEADS, NUM_LAYERS, KEY_DIM, VALUE_DIM, ITEM = 4, 4, 2, 8, 4, 2


class Heard:
    """Asked of a rank, to know that it has heard all that was said before."""


def layout_of(rank: int, num_ranks: int) -> KvLayout:
    heads = NUM_HEADS // num_ranks
    layer = KvLayer(heads, KEY_DIM, VALUE_DIM, "bfloat16", ITEM, first_head=rank * heads)
    return KvLayout(PAGE_SIZE, (layer,) * NUM_LAYERS)


class Ranks:
    """A worker of so many ranks; alone it is a plain one."""

    def __init__(self, make_worker: MakeWorker, num_ranks: int, seed: int | None, closing: ExitStack) -> None:
        self.outcomes = outcomes = Outcomes()
        self.lost: list[RankLost] = []
        self.sending: list[RankSending] = []
        if num_ranks == 1:
            self.ranks = [make_worker(seed, layout_of(0, 1), outcomes)]
            self.sender: SendingEnd = self.ranks[0].sender
            self.receiver: ReceivingEnd = self.ranks[0].receiver
            return
        pipes = [Pipe() for _ in range(1, num_ranks)]
        near = [RankChannel(pipe[0], f"rank {i}", self.lost.append) for i, pipe in enumerate(pipes, 1)]
        far = [RankChannel(pipe[1], "rank 0", self.lost.append) for pipe in pipes]
        self.lines = RankLines(near)
        sender = RankedSender(self.lines, outcomes.on_closed)
        receiver = RankedReceiver(self.lines, outcomes.on_committed, outcomes.on_released)
        own = SimpleNamespace(
            on_closed=partial(sender.closed, 0),
            on_committed=partial(receiver.committed, 0),
            on_released=partial(receiver.released, 0),
        )
        self.ranks = [make_worker(seed, layout_of(0, num_ranks), own, 0)]
        for rank, channel in enumerate(far, 1):
            sending, receiving = RankSending(channel), RankReceiving(channel)
            told = SimpleNamespace(
                on_closed=sending.closed, on_committed=receiving.committed, on_released=receiving.released
            )
            worker = make_worker(None if seed is None else seed + rank, layout_of(rank, num_ranks), told, rank)
            sending.attach(worker.sender)
            receiving.attach(worker.receiver)
            channel.hear(Heard, lambda _: None)
            channel.start()
            self.ranks.append(worker)
            self.sending.append(sending)
        self.lines.start()
        sender.attach(self.ranks[0].sender)
        receiver.attach(self.ranks[0].receiver)
        self.sender, self.receiver = sender, receiver
        for channel in (*near, *far):
            closing.callback(channel.close)

    @property
    def ends(self) -> tuple[KvEnd, ...]:
        return tuple(
            KvEnd(layout_of(rank, len(self.ranks)), worker.transport.describe())
            for rank, worker in enumerate(self.ranks)
        )

    def head(self, layer: int, page: int, head: int) -> bytes:
        """A head's keys and values, from whichever rank has it."""
        per_rank = NUM_HEADS // len(self.ranks)
        rank, index = divmod(head, per_rank)
        data = self.ranks[rank].page(layer, page)
        key, value = PAGE_SIZE * KEY_DIM * ITEM, PAGE_SIZE * VALUE_DIM * ITEM
        values = per_rank * key
        return data[index * key : (index + 1) * key] + data[values + index * value : values + (index + 1) * value]


@pytest.fixture
def closing() -> Iterator[ExitStack]:
    with ExitStack() as stack:
        yield stack


def grant_of(decode: Ranks, prefill: Ranks, pages: tuple[int, ...]) -> Grant:
    end = prefill.ends[0]
    ranks = prefill.ends if len(prefill.ranks) > 1 else ()
    return decode.receiver.issue(A, 0, pages, len(pages) * PAGE_SIZE, end.layout, end.descriptor, ranks)


def worker_of(ranks: Ranks, rank: int) -> Worker:
    return ranks.ranks[rank]


@pytest.mark.parametrize("degrees", [(1, 2), (2, 1), (2, 2), (4, 2)], ids=str)
def test_every_head_arrives_from_the_rank_that_has_it(
    degrees: tuple[int, int], make_worker: MakeWorker, closing: ExitStack
) -> None:
    prefill = Ranks(make_worker, degrees[0], 10, closing)
    decode = Ranks(make_worker, degrees[1], None, closing)
    src, dst = (3, 7, 1), (5, 0, 9)
    prefill.sender.open(A, len(src))
    prefill.sender.pages_stored(A, 0, 0, src)
    prefill.sender.granted(A, grant_of(decode, prefill, dst))
    prefill.sender.pages_stored(A, 1, 0, src)
    prefill.sender.commit(A, b"the first token")

    assert decode.outcomes.payload_of(A) == b"the first token"
    report = prefill.outcomes.close_of(A)
    assert report.error is None
    assert report.bytes_sent == len(src) * layout_of(0, 1).bytes_per_page
    for layer in range(NUM_LAYERS):
        for there, here in zip(dst, src, strict=True):
            for head in range(NUM_HEADS):
                assert decode.head(layer, there, head) == prefill.head(layer, here, head), (layer, head)
    assert prefill.lost + decode.lost == []


@pytest.mark.parametrize("degrees", [(1, 2), (2, 1), (2, 2)], ids=str)
def test_giving_up_at_either_end_ends_every_part_once(
    degrees: tuple[int, int], make_worker: MakeWorker, closing: ExitStack
) -> None:
    prefill = Ranks(make_worker, degrees[0], 10, closing)
    decode = Ranks(make_worker, degrees[1], None, closing)
    for give_up in (prefill.sender.abort, decode.receiver.abort):
        prefill.outcomes.closed.clear()
        decode.outcomes.released.clear()
        prefill.sender.open(A, 1)
        prefill.sender.granted(A, grant_of(decode, prefill, (2,)))
        prefill.sender.pages_stored(A, 0, 0, (4,))
        give_up(A, "nobody wants it")
        assert prefill.outcomes.close_of(A).error is not None  # one of two, by who hears first
        assert isinstance(decode.outcomes.release_of(A), TransferAborted)


def test_one_part_that_breaks_fails_the_whole(make_worker: MakeWorker, closing: ExitStack) -> None:
    prefill, decode = Ranks(make_worker, 2, 10, closing), Ranks(make_worker, 2, None, closing)
    prefill.sender.open(A, 1)
    grant = grant_of(decode, prefill, (2,))
    prefill.sender.granted(A, grant)
    worker_of(decode, 1).receiver.abort(A, "this rank has had enough")
    assert prefill.outcomes.close_of(A).error is not None
    assert "this rank has had enough" in str(decode.outcomes.release_of(A))


def test_a_commit_waits_for_what_a_rank_has_not_computed_yet(make_worker: MakeWorker, closing: ExitStack) -> None:
    prefill, decode = Ranks(make_worker, 2, 10, closing), Ranks(make_worker, 1, None, closing)
    prefill.sender.open(A, 1)
    prefill.sender.granted(A, grant_of(decode, prefill, (2,)))
    stores = (StoredPages(A, 0, (4,)),)
    layer_stored = prefill.sender.step_stores(stores)
    for layer in range(NUM_LAYERS):
        layer_stored(layer)
    prefill.sender.commit(A, b"")
    prefill.lines.ask_all(Heard(), 10.0)  # rank 1 has heard the commit
    assert not decode.outcomes.committed
    (sending,) = prefill.sending
    assert sending.take_stores() == stores
    late = sending.step_stores(stores)
    for layer in range(NUM_LAYERS):
        late(layer)
    sending.step_ended(stores)
    decode.outcomes.payload_of(A)
    assert prefill.outcomes.close_of(A).error is None
    assert decode.head(1, 2, 3) == prefill.head(1, 4, 3)


def test_a_grant_that_a_rank_does_not_give_is_refused_and_nobody_hears_of_it_again(
    make_worker: MakeWorker, closing: ExitStack
) -> None:
    prefill, decode = Ranks(make_worker, 1, 10, closing), Ranks(make_worker, 2, None, closing)
    worker_of(decode, 1).receiver.close()
    with pytest.raises(TransferAborted, match="not granted on every rank"):
        grant_of(decode, prefill, (2,))
    decode.outcomes.until(lambda: worker_of(decode, 0).receiver.num_sessions == 0)
    assert not decode.outcomes.released
