"""Groups are real, disjoint, and save as much as any division into groups could."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from hypothesis import given
from hypothesis import strategies as st

from engine import shared_prefixes
from engine.cache_layout import CacheLayout, LayerCache
from engine.shared_prefixes import CascadeTerms, PrefixGroup, find_groups

# Two pages to choose from at each depth: most tables share something.
Tables = list[tuple[int, ...]]
TABLES = st.lists(st.lists(st.integers(0, 1), min_size=1, max_size=5).map(tuple), max_size=6)


def as_tree(tables: Sequence[tuple[int, ...]]) -> Tables:
    """A page's name says what is before it, as in a prefix cache."""
    return [tuple(int("1" + "".join(map(str, t[: i + 1])), 2) for i in range(len(t))) for t in tables]


def divisions(numbers: Sequence[int]) -> Iterator[list[list[int]]]:
    """All ways to put numbers into groups."""
    if not numbers:
        yield []
        return
    for rest in divisions(numbers[1:]):
        yield [[numbers[0]], *rest]
        for i, group in enumerate(rest):
            yield [*rest[:i], [numbers[0], *group], *rest[i + 1 :]]


def common(tables: Tables, group: Sequence[int]) -> int:
    first = tables[group[0]]
    lengths = range(min(len(tables[i]) for i in group) + 1)
    return max(n for n in lengths if all(tables[i][:n] == first[:n] for i in group))


@given(TABLES, st.data())
def test_nothing_saves_more(tables: Sequence[tuple[int, ...]], data: st.DataObject) -> None:
    named = as_tree(tables)
    num_full = [data.draw(st.integers(0, len(table))) for table in named]
    full = [table[:count] for table, count in zip(named, num_full, strict=True)]

    groups = find_groups(named, num_full)

    members = [i for group in groups for i in group.members]
    assert len(members) == len(set(members))
    for group in groups:
        assert len(group.members) >= 2
        assert group.num_pages >= 1
        assert common(full, group.members) >= group.num_pages
    best = max(
        sum((len(group) - 1) * common(full, group) for group in division) for division in divisions(range(len(named)))
    )
    assert sum(group.saved_pages for group in groups) == best


def test_a_deeper_group_takes_its_sequences_from_the_one_above() -> None:
    system, conversation = tuple(range(10)), tuple(range(10, 50))
    tables = [(*system, 100 + i) for i in range(5)] + [(*system, *conversation, 200 + i) for i in range(3)]

    groups = find_groups(tables, [len(table) for table in tables])

    assert groups == (PrefixGroup((5, 6, 7), 50), PrefixGroup((0, 1, 2, 3, 4), 10))


def test_a_step_holds_only_the_groups_that_save_most() -> None:
    tables = [(10 * group + 1, *range(1000 * group, 1000 * group + group)) for group in range(1, 6) for _ in range(2)]

    groups = find_groups(tables, [len(table) for table in tables], max_groups=2)

    assert [group.members for group in groups] == [(8, 9), (6, 7)]


def test_pages_are_shared_if_that_saves_more_than_it_costs() -> None:
    window, full = (LayerCache(i, 2, 64, 64, "bfloat16", window=w) for i, w in enumerate((128, None)))
    terms = CascadeTerms.of(CacheLayout((window, full), page_size=16))
    assert terms is not None
    assert terms.page_bytes == 16 * 2 * 128 * 2, "of the layer without a window alone"
    pages = shared_prefixes.LAYER_COST_BYTES // terms.page_bytes
    tables = [(*range(pages + 1), 10_000 + i) for i in range(2)]
    at = (pages + 1) * 16

    assert terms.groups(tables, [at, at + 3]) == (PrefixGroup((0, 1), pages + 1),)
    assert terms.groups(tables, [at - 1, at]) == (), "the page of a token that is computed now is not shared"
    assert CascadeTerms.of(CacheLayout((window,), page_size=16)) is None
    anyhow = CascadeTerms.of(CacheLayout((full,), page_size=16), whatever_it_saves=True)
    assert anyhow is not None
    assert anyhow.groups(tables, [17, 40]) == (PrefixGroup((0, 1), 1),)
