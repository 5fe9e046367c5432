from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from cluster.page_events import PageEventLog
from core.prefix_hash import PageEvents, PageHash, page_key

HASHES = [PageHash(bytes([i]) * 16) for i in range(8)]
KEYS = [page_key(page_hash) for page_hash in HASHES]


class Reader:
    """A gateway's end: applies what it is told and refuses a gap."""

    def __init__(self) -> None:
        self.number: int | None = None
        self.keys: set[int] = set()

    def apply(self, events: PageEvents | None) -> None:
        if events is None:
            return
        if events.snapshot:
            self.keys = set(events.stored)
        else:
            assert events.after == self.number, "a gap"
            self.keys = (self.keys - set(events.removed)) | set(events.stored)
        self.number = events.number


page_sets = st.lists(st.sampled_from(range(8)), max_size=4, unique=True)


@given(
    steps=st.lists(st.tuples(page_sets, st.booleans(), st.booleans()), max_size=30),
    max_changes=st.integers(0, 12),
)
def test_every_reader_knows_what_is_cached_however_seldom_it_reads(
    steps: list[tuple[list[int], bool, bool]], max_changes: int
) -> None:
    log = PageEventLog(max_changes)
    cached: set[int] = set()
    readers = [Reader(), Reader()]
    for pages, first_reads, second_reads in steps:
        stored, removed = [p for p in pages if p not in cached], [p for p in pages if p in cached]
        cached = cached.symmetric_difference(pages)
        log.record([HASHES[p] for p in stored], [HASHES[p] for p in removed])
        for reader, reads in zip(readers, (first_reads, second_reads), strict=True):
            if reads:
                reader.apply(log.since(reader.number))
                assert reader.keys == {KEYS[p] for p in cached}
    for reader in readers:
        reader.apply(log.since(reader.number))
        assert (reader.keys, log.since(reader.number)) == ({KEYS[p] for p in cached}, None)


def test_a_late_joiner_gets_a_snapshot_and_a_steady_reader_only_what_is_new() -> None:
    log = PageEventLog()
    log.record(HASHES[:3], [])
    assert log.since(None) == PageEvents(1, snapshot=True, stored=tuple(sorted(KEYS[:3])))
    log.record([HASHES[3]], [HASHES[0]])
    assert log.since(1) == PageEvents(2, after=1, stored=(KEYS[3],), removed=(KEYS[0],))


def test_a_reader_too_far_behind_gets_a_snapshot() -> None:
    log = PageEventLog(max_changes=2)
    for page_hash in HASHES[:4]:
        log.record([page_hash], [])
    assert log.since(3) == PageEvents(4, after=3, stored=(KEYS[3],))
    events = log.since(1)
    assert events is not None
    assert (events.snapshot, set(events.stored)) == (True, set(KEYS[:4]))


def test_what_came_and_went_is_told_to_nobody() -> None:
    log = PageEventLog()
    log.record([HASHES[0]], [])
    log.record([HASHES[1]], [])
    log.record([], [HASHES[1]])
    events = log.since(1)
    assert events is not None
    assert events.stored == ()
    assert log.since(events.number) is None


def test_a_number_from_the_future_is_of_another_life_of_the_worker() -> None:
    log = PageEventLog()
    log.record([HASHES[0]], [])
    events = log.since(7)
    assert events is not None
    assert events.snapshot
