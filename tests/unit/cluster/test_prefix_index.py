from __future__ import annotations

import random

from hypothesis import given
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from cluster.prefix_index import NO_MATCH, PrefixIndex
from core.prefix_hash import PageHash, page_hashes, page_key
from core.request import EngineId

PAGE = 2
ENGINES = [EngineId(name) for name in "abcde"]
# Prompts that share beginnings: every one is a path through a small tree of tokens.
PROMPTS = [tuple(random.Random(seed).choices((1, 2), k=24)) for seed in range(12)] + [(1,) * 24, (1,) * 12 + (2,) * 12]
HASHES = [page_hashes(prompt, PAGE) for prompt in PROMPTS]


def keys(hashes: tuple[PageHash, ...]) -> list[int]:
    return [page_key(page_hash) for page_hash in hashes]


def scan(pages: set[int], hashes: tuple[PageHash, ...]) -> int:
    """Leading pages held, by looking at each."""
    count = 0
    for key in keys(hashes):
        if key not in pages:
            break
        count += 1
    return count


class PrefixIndexMachine(RuleBasedStateMachine):
    """The index answers what a scan of every worker's own pages does, whatever came before."""

    def __init__(self) -> None:
        super().__init__()
        self.index = PrefixIndex()
        self.pages: dict[EngineId, set[int]] = {}

    @rule(engine=st.sampled_from(ENGINES))
    def add(self, engine: EngineId) -> None:
        self.index.add_worker(engine)
        self.pages[engine] = set()

    @rule(engine=st.sampled_from(ENGINES))
    def lose(self, engine: EngineId) -> None:
        self.index.remove_worker(engine)
        self.pages.pop(engine, None)

    @rule(engine=st.sampled_from(ENGINES), prompt=st.sampled_from(HASHES), depth=st.integers(1, 12))
    def store(self, engine: EngineId, prompt: tuple[PageHash, ...], depth: int) -> None:
        self.index.stored(engine, keys(prompt[:depth]))
        if engine in self.pages:
            self.pages[engine] |= set(keys(prompt[:depth]))

    @rule(engine=st.sampled_from(ENGINES), prompt=st.sampled_from(HASHES), depth=st.integers(0, 11))
    def evict(self, engine: EngineId, prompt: tuple[PageHash, ...], depth: int) -> None:
        """The end of a prefix goes, and with it whatever goes on from there."""
        lost = set(keys(prompt[depth:]))
        for other in HASHES:
            cut = next((i for i, key in enumerate(keys(other)) if key in lost), len(other))
            lost |= set(keys(other)[cut:])
        self.index.removed(engine, sorted(lost))
        if engine in self.pages:
            self.pages[engine] -= lost

    @rule(steps=st.integers(1, 600))
    def sweep(self, steps: int) -> None:
        for _ in range(steps):
            if not self.index.sweep():
                break

    @invariant()
    def answers_are_those_of_a_scan(self) -> None:
        for hashes in HASHES:
            match = self.index.match(hashes)
            expected = {engine: scan(pages, hashes) for engine, pages in self.pages.items()}
            assert {engine: match.pages_on(engine) for engine in ENGINES} == dict.fromkeys(ENGINES, 0) | expected
            assert match.longest == max(expected.values(), default=0)
            assert [level.num_pages for level in match.levels] == sorted(set(expected.values()) - {0}, reverse=True)


TestPrefixIndex = PrefixIndexMachine.TestCase


def test_a_prompt_of_less_than_a_page_matches_nothing() -> None:
    index = PrefixIndex()
    index.add_worker(ENGINES[0])
    assert index.match(()) == NO_MATCH


def test_sweeping_returns_all_memory_of_lost_workers() -> None:
    index = PrefixIndex()
    for round_ in range(3):
        for engine in ENGINES:
            index.add_worker(engine)
            index.stored(engine, range(round_ * 1000, round_ * 1000 + 1000))
        for engine in ENGINES:
            index.remove_worker(engine)
        while index.sweep():
            pass
        assert index.num_keys == 0
    index.add_worker(ENGINES[0])
    assert index._num_slots == len(ENGINES), "slots are used again"
    assert len(index._sets) == 0, "no set of lost workers is kept"


@given(workers=st.integers(1, 40), seed=st.integers(0, 1000))
def test_lookups_grow_with_the_logarithm_of_the_prompt_and_the_number_of_distinct_depths(
    workers: int, seed: int
) -> None:
    hashes = page_hashes(range(2048), 1)
    index = PrefixIndex()
    depths = set()
    for i in range(workers):
        depth = random.Random(seed + i % 4).randint(1, 2048)
        depths.add(depth)
        index.add_worker(EngineId(f"w{i}"))
        index.stored(EngineId(f"w{i}"), keys(hashes[:depth]))
    count = 0
    get = index._table.get

    def counted(key: int) -> int:
        nonlocal count
        count += 1
        return get(key)

    index._table.get = counted  # type: ignore[method-assign]
    assert {level.num_pages for level in index.match(hashes).levels} == depths
    assert count <= 2 + len(depths) * 11
