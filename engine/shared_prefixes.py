"""Which sequences of a decode step begin with the same pages, and is it worth reading these once? Pure.

The prefix cache gives sequences that begin alike the same pages (one system prompt, several answers to one prompt, an
agent's calls), so page tables show it: no tokens are looked at. Tables that share beginnings make a tree, and a group
is a node of it: those below read the pages down to there once. Each sequence is in one group at most, so a deeper group
takes its sequences from those above. 8 sequences that share 10 pages, 3 of which share 40 more:

    all 8, 10 pages                       (8 - 1) x 10 = 70 pages that need not be read again
    the 3, 50 pages; the 5, 10 pages      (3 - 1) x 50 + (5 - 1) x 10 = 140, which is the best

What a group saves is counted in bytes. It must be more than a device reads in the time that the second kernel and the
merge take (``LAYER_COST_BYTES``); otherwise the step is computed as if nothing was shared.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from engine.cache_layout import CacheLayout

MAX_GROUPS = 16  # of one step: a captured kernel has its number for ever
MAX_LEVELS = 4  # of the tree: a system prompt, a tenant's, a conversation's, and the answers to it
# Bytes of K/V that a layer reads for all sequences in the time that cascade attention adds to it. On an H100 it paid
# from about 75 MB on with 4 sequences, 130 with 8, 160 with 16 and 220 with 64. That is more than memory gives in those
# 15 microseconds: sequences that read the same pages at the same time find them in the L2 cache.
LAYER_COST_BYTES = 192 << 20


@dataclass(frozen=True, slots=True)
class PrefixGroup:
    """Sequences, by their numbers, whose tables begin with the same ``num_pages`` pages."""

    members: tuple[int, ...]
    num_pages: int

    @property
    def saved_pages(self) -> int:
        """Pages that need not be read again."""
        return (len(self.members) - 1) * self.num_pages


@dataclass(frozen=True, slots=True)
class SharedPrefix:
    """A group as a packed step holds it: ``count`` neighbouring segments, from ``first`` on, begin with the same
    ``num_pages`` pages, all of whose tokens come before each segment's own."""

    first: int
    count: int
    num_pages: int

    @property
    def end(self) -> int:
        """The segment after the last."""
        return self.first + self.count


@dataclass(frozen=True, slots=True)
class CascadeTerms:
    """When shared pages are read once."""

    page_size: int
    page_bytes: int  # K and V of a page, in all layers that can do it
    least_bytes: int  # that a step must save

    @classmethod
    def of(cls, layout: CacheLayout, *, whatever_it_saves: bool = False) -> CascadeTerms | None:
        """None: no layer can. Those with a window cannot: of what is shared each sequence sees another part, and they
        read no more than a window of keys anyway."""
        layers = [layer for layer in layout.layers if layer.window is None]
        if not layers:
            return None
        page_bytes = layout.page_size * sum(layer.token_bytes for layer in layers)
        return cls(layout.page_size, page_bytes, 0 if whatever_it_saves else LAYER_COST_BYTES * len(layers))

    def groups(self, page_tables: Sequence[tuple[int, ...]], positions: Sequence[int]) -> tuple[PrefixGroup, ...]:
        """Of sequences that compute the one token at ``positions``; empty if it is not worth it."""
        groups = find_groups(page_tables, [position // self.page_size for position in positions])
        saved_bytes = self.page_bytes * sum(group.saved_pages for group in groups)
        return groups if saved_bytes > self.least_bytes else ()


def find_groups(
    page_tables: Sequence[tuple[int, ...]], num_full: Sequence[int], max_groups: int = MAX_GROUPS
) -> tuple[PrefixGroup, ...]:
    """The disjoint groups that save most, those that save more first; at most ``max_groups``.

    ``num_full``: how many of a table's pages are full of tokens that come before its sequence's next; no other page is
    shared, as it is still written.
    """
    first_pages: dict[int, list[int]] = {}
    for number, (table, count) in enumerate(zip(page_tables, num_full, strict=True)):
        if count:
            first_pages.setdefault(table[0], []).append(number)
    groups = [
        group
        for members in first_pages.values()
        if len(members) > 1
        for group in _best(_tree(page_tables, num_full, members, 1, MAX_LEVELS), 0)[1]
    ]
    return tuple(sorted(groups, key=lambda group: -group.saved_pages)[:max_groups])


@dataclass(frozen=True, slots=True)
class _Node:
    """Tables that begin with the same ``depth`` pages."""

    depth: int
    alone: tuple[int, ...]  # those that share no more with any other
    branches: tuple[_Node, ...]


def _tree(
    page_tables: Sequence[tuple[int, ...]], num_full: Sequence[int], members: Sequence[int], depth: int, levels: int
) -> _Node:
    """Of ``members``, at least two, whose first ``depth`` pages are the same."""
    depth = _common_pages(page_tables, num_full, members, depth)
    by_next: dict[int, list[int]] = {}
    alone = []
    for i in members:
        if levels > 1 and num_full[i] > depth:
            by_next.setdefault(page_tables[i][depth], []).append(i)
        else:
            alone.append(i)
    branches = [branch for branch in by_next.values() if len(branch) > 1]
    alone += [branch[0] for branch in by_next.values() if len(branch) == 1]
    nodes = tuple(_tree(page_tables, num_full, branch, depth + 1, levels - 1) for branch in branches)
    return _Node(depth, tuple(alone), nodes)


def _best(node: _Node, outer: int) -> tuple[int, list[PrefixGroup], list[int]]:
    """(pages saved, groups, sequences left to the group above) if that group saves ``outer`` pages for each of its."""
    closed = _below(node, outer)
    saved, groups, left = _below(node, node.depth)
    saved -= node.depth  # its first sequence reads them
    if saved > closed[0]:
        return saved, [*groups, PrefixGroup(tuple(left), node.depth)], []
    return closed


def _below(node: _Node, outer: int) -> tuple[int, list[PrefixGroup], list[int]]:
    """As ``_best`` if there is no group of this node."""
    saved, groups, left = outer * len(node.alone), list[PrefixGroup](), list(node.alone)
    for branch in node.branches:
        more_saved, more_groups, more_left = _best(branch, outer)
        saved, groups, left = saved + more_saved, groups + more_groups, left + more_left
    return saved, groups, left


def _common_pages(
    page_tables: Sequence[tuple[int, ...]], num_full: Sequence[int], members: Sequence[int], depth: int
) -> int:
    """How many leading pages they all have in common, ``depth`` or more."""
    limit = min(num_full[i] for i in members)
    shared = page_tables[members[0]][depth:limit]
    for i in members[1:]:
        if page_tables[i][depth : depth + len(shared)] != shared:
            same = zip(shared, page_tables[i][depth:], strict=False)
            shared = shared[: next(at for at, (one, other) in enumerate(same) if one != other)]
    return depth + len(shared)
