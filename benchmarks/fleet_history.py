"""What does a gateway hear of a fleet that has served conversations for a while, and which prompts come next?

A made-up history, the same for equal seeds. A prompt is a system prompt, a document and a conversation, each a run of
pages. Few system prompts, documents of unequal popularity and many conversations; a conversation is computed by one
prefill and one decode worker, both of which then hold its pages: one that holds the document already, usually. So
system prompts end up everywhere, documents on some workers, the rest of the pages on two. One conversation in ten has
lost its end on its prefill worker.

Pages have made-up keys instead of hashes, which cost more than everything else here (benchmarks/router.py times them
apart); what a worker tells is a ``PageEvents``, as in life.
"""

from __future__ import annotations

import random
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from core.prefix_hash import PageEvents, PageHash

PAGE_TOKENS = 16
SYSTEM_PAGES, DOCUMENT_PAGES = 128, 512  # 2,048 and 8,192 tokens
MIN_CONVERSATION_PAGES, MAX_CONVERSATION_PAGES = 16, 1384  # up to 32K tokens with what comes before
NUM_SYSTEMS = 16
_SHARE_OF_DOCUMENTS = 0.1  # of the distinct pages
_AFFINITY = 0.8  # how often a worker that holds the document is taken
_LOST_ITS_END = 0.1

Keys = NDArray[np.uint64]


@dataclass(frozen=True, slots=True)
class Report:
    """What one worker tells."""

    worker: int
    events: PageEvents

    @property
    def num_events(self) -> int:
        return len(self.events.stored) + len(self.events.removed)


@dataclass(frozen=True, slots=True)
class Prompt:
    """``kind``: ``turn`` goes on with a conversation, ``document`` asks a new thing of a known document, ``new`` shares
    the system prompt alone, ``unknown`` nothing."""

    kind: str
    keys: Keys

    def hashes(self) -> list[PageHash]:
        """Its page hashes, made anew: who asks the index has just computed them, so the processor's cache has them."""
        octets = self.keys.astype("<u8").tobytes()
        return [PageHash(octets[i : i + 8] + bytes(8)) for i in range(0, len(octets), 8)]


@dataclass(slots=True)
class _Conversation:
    name: int
    document: int
    num_pages: int


@dataclass(slots=True)
class _Worker:
    runs: set[int] = field(default_factory=set)  # system prompts and documents that it holds
    conversations: deque[_Conversation] = field(default_factory=deque)  # oldest first
    number: int = 0  # of its last report


class FleetHistory:
    """Workers 0 .. n-1; the even ones prefill, the odd ones decode."""

    def __init__(self, num_workers: int, num_pages: int, seed: int = 0) -> None:
        """``num_pages``: distinct ones that the fleet holds when ``fill`` is over."""
        self._draw = random.Random(seed)
        self._num_pages_wanted = num_pages
        self.num_pages = 0  # distinct ones that were stored
        self._workers = [_Worker() for _ in range(num_workers)]
        self._pools = (range(0, num_workers, 2), range(1, num_workers, 2))
        self._num_documents = max(2, int(num_pages * _SHARE_OF_DOCUMENTS / DOCUMENT_PAGES))
        self._holders: dict[int, tuple[list[int], list[int]]] = {}  # document |-> its prefill and decode workers
        self._runs: set[int] = set()  # system prompts and documents that some worker holds
        self._next_conversation = NUM_SYSTEMS + self._num_documents
        self._living: list[_Conversation] = []

    def fill(self) -> Iterator[Report]:
        """Conversations come until ``num_pages`` are cached."""
        while self.num_pages < self._num_pages_wanted:
            conversation = self._new_conversation()
            runs = {conversation.document, self._system_of(conversation.document)} - self._runs
            self._runs |= runs
            self.num_pages += conversation.num_pages + sum(map(self._run_pages, runs))
            self._living.append(conversation)
            prefill, decode = self._place(conversation.document)
            for worker in (prefill, decode):
                yield self._report(worker, stored=self._take(worker, conversation))
            if self._draw.random() < _LOST_ITS_END:
                kept = self._draw.randrange(conversation.num_pages)
                yield self._report(prefill, removed=_keys(conversation.name, kept, conversation.num_pages).tolist())

    def churn(self, events_per_report: int) -> Iterator[Report]:
        """After that, for ever: a conversation comes, the oldest of its workers' go; told in reports of that size."""
        while True:
            conversation = self._new_conversation()
            self._living[self._draw.randrange(len(self._living))] = conversation
            for worker in self._place(conversation.document):
                known = self._workers[worker].conversations
                removed: list[int] = []
                while known and len(removed) < conversation.num_pages:
                    oldest = known.popleft()
                    removed += _keys(oldest.name, 0, oldest.num_pages).tolist()[::-1]
                stored = self._take(worker, conversation)
                for start in range(0, max(len(stored), len(removed)), events_per_report // 2 or 1):
                    piece = slice(start, start + (events_per_report // 2 or 1))
                    if events_per_report > 1:
                        yield self._report(worker, stored[piece], removed[piece])
                    else:
                        yield self._report(worker, removed=removed[piece])
                        yield self._report(worker, stored=stored[piece])

    def prompts(self, count: int, num_pages: int) -> list[Prompt]:
        """Half turns, three tenths documents, one tenth new, one tenth unknown; in no order."""
        return [self._prompt(kind, num_pages) for kind in self._draw.choices(_KINDS, _SHARES, k=count)]

    # ---- inside ----

    def _new_conversation(self) -> _Conversation:
        self._next_conversation += 1
        pages = self._draw.randint(MIN_CONVERSATION_PAGES, MAX_CONVERSATION_PAGES)
        return _Conversation(self._next_conversation, self._document(), pages)

    def _document(self) -> int:
        """The n-th is asked for about 1/n as often as the first."""
        return NUM_SYSTEMS + int(self._num_documents ** self._draw.random()) % self._num_documents

    def _system_of(self, document: int) -> int:
        return document % NUM_SYSTEMS

    def _run_pages(self, run: int) -> int:
        return SYSTEM_PAGES if run < NUM_SYSTEMS else DOCUMENT_PAGES

    def _place(self, document: int) -> tuple[int, int]:
        holders = self._holders.setdefault(document, ([], []))
        chosen = []
        for known, pool in zip(holders, self._pools, strict=True):
            if not known or self._draw.random() > _AFFINITY:
                known.append(self._draw.choice(pool))
            chosen.append(self._draw.choice(known))
        return chosen[0], chosen[1]

    def _take(self, worker: int, conversation: _Conversation) -> list[int]:
        """Keys of the pages that are new to the worker."""
        state, keys = self._workers[worker], list[int]()
        for run in (self._system_of(conversation.document), conversation.document):
            if run not in state.runs:
                state.runs.add(run)
                keys += _keys(run, 0, self._run_pages(run)).tolist()
        state.conversations.append(conversation)
        keys += _keys(conversation.name, 0, conversation.num_pages).tolist()
        return keys

    def _report(self, worker: int, stored: Sequence[int] = (), removed: Sequence[int] = ()) -> Report:
        state = self._workers[worker]
        state.number += 1
        first = state.number == 1
        events = PageEvents(state.number, state.number - 1, first, tuple(stored), tuple(removed))
        return Report(worker, events)

    def _prompt(self, kind: str, num_pages: int) -> Prompt:
        conversation = self._draw.choice(self._living)
        document = conversation.document
        runs = [(self._system_of(document), SYSTEM_PAGES), (document, DOCUMENT_PAGES)]
        runs.append((conversation.name, conversation.num_pages))
        known = [_keys(name, 0, pages) for name, pages in runs[: _NUM_KNOWN_RUNS[kind]]]
        self._next_conversation += 1
        keys = np.concatenate([*known, _keys(self._next_conversation, 0, num_pages)])[:num_pages]
        return Prompt(kind, keys)


_NUM_KNOWN_RUNS = {"turn": 3, "document": 2, "new": 1, "unknown": 0}
_KINDS, _SHARES = tuple(_NUM_KNOWN_RUNS), (5, 3, 1, 1)


def _keys(run: int, start: int, stop: int) -> Keys:
    """Keys of pages ``start`` .. ``stop`` - 1 of a run: splitmix64 of its name and their places."""
    with np.errstate(over="ignore"):
        mixed = (np.arange(start, stop, dtype=np.uint64) + np.uint64(run << 16)) * np.uint64(0x9E3779B97F4A7C15)
        mixed = (mixed ^ (mixed >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        mixed = (mixed ^ (mixed >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return mixed ^ (mixed >> np.uint64(31))
