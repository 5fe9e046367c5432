"""A page table is a dict, also when keys crowd one shard, come twice in a batch, go and come again."""

from __future__ import annotations

import random
from collections import Counter

from hypothesis import given, settings
from hypothesis import strategies as st

from cluster.page_table import NUM_SHARDS, PageTable

# Few shards and few homes, so that probes run into each other, and keys from all over.
CROWDED = st.integers(1, 40).map(lambda n: n * NUM_SHARDS)
ANYWHERE = st.integers(1, 2**38 - 1).flatmap(lambda tag: st.integers(0, NUM_SHARDS - 1).map(lambda n: tag << 8 | n))
BATCHES = st.lists(
    st.tuples(st.lists(st.one_of(CROWDED, ANYWHERE), max_size=60), st.integers(0, 3), st.booleans()), max_size=12
)


@given(batches=BATCHES)
def test_a_table_holds_what_a_dict_would(batches: list[tuple[list[int], int, bool]]) -> None:
    table, expected = PageTable(), dict[int, int]()
    for keys, value, absent_too in batches:
        before = Counter(expected.values())
        moves = table.move(keys, lambda _, value=value: value, absent_too=absent_too)
        for key in keys:
            if absent_too or expected.get(key, 0):
                expected[key] = value
        expected = {key: kept for key, kept in expected.items() if kept}

        assert len(table) == len(expected)
        assert {key: table.get(key) for key in keys} == {key: expected.get(key, 0) for key in keys}
        for move in moves:
            assert move.before != move.after == value
            before[move.before] -= move.num_keys
            before[move.after] += move.num_keys
        del before[0]
        assert +before == Counter(expected.values()), "every change is told"
    assert all(table.get(key) == value for key, value in expected.items())


@settings(max_examples=20)
@given(seed=st.integers(0, 100), num_keys=st.integers(0, 3000))
def test_moving_every_shard_moves_every_key_and_packs(seed: int, num_keys: int) -> None:
    draw = random.Random(seed)
    keys = [draw.randrange(2**46) for _ in range(num_keys)]
    table = PageTable()
    table.move(keys[::2], lambda _: 7, absent_too=True)
    table.move(keys[1::2], lambda _: 8, absent_too=True)
    after = {7: 0, 8: 9}

    moves = [move for shard in range(NUM_SHARDS) for move in table.move_shard(shard, after.__getitem__)]

    assert [table.get(key) for key in keys] == [0 if i % 2 == 0 else 9 for i in range(num_keys)]
    assert len(table) == num_keys // 2
    assert sum((Counter({move[:2]: move.num_keys}) for move in moves), Counter()) == +Counter(
        {(7, 0): (num_keys + 1) // 2, (8, 9): num_keys // 2}
    )


def test_only_the_lowest_46_bits_tell_keys_apart() -> None:
    table = PageTable()
    table.move([5, 5 + 2**46, 2**64 - 1], lambda _: 1, absent_too=True)

    assert (len(table), table.get(5 + 2**50), table.get(2**46 - 1), table.get(6)) == (2, 1, 1, 0)


def test_churn_for_ever_takes_no_more_memory_and_what_went_is_given_back() -> None:
    table = PageTable()
    draw = random.Random(0)
    held = [draw.randrange(2**46) for _ in range(20_000)]
    table.move(held, lambda _: 1, absent_too=True)
    while table.tidy():
        pass
    before = table.num_bytes
    for _ in range(30):
        fresh = [draw.randrange(2**46) for _ in range(5_000)]
        table.move(held[:5_000], lambda _: 0, absent_too=False)
        table.move(fresh, lambda _: 1, absent_too=True)
        held = held[5_000:] + fresh
    while table.tidy():
        pass

    assert len(table) == len(held)
    assert table.num_bytes <= 1.5 * before
    assert not table.move(held, lambda _: 1, absent_too=True), "what stays is not a change"
    table.move(held[500:], lambda _: 0, absent_too=False)
    while table.tidy():
        pass
    assert table.num_bytes < before / 2
    assert all(table.get(key) for key in held[:500])
