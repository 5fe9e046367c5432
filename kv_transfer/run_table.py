"""Runs of bytes as rows of one array: what a prompt's page table becomes on its way through both ends of a link.

A layer of a prompt of 8,192 tokens in pages of 16 is 512 runs. As 512 objects every step that makes, sums, packs,
parses, checks or indexes them takes a quarter or half of a millisecond, and there are a dozen such steps between the
first stored page and the first byte that lands, in which NVLink would move a gigabyte. As one array each takes
microseconds; the objects are made for those who look at single runs.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import ClassVar, Generic, Self, TypeVar, overload

import numpy as np
from numpy.typing import NDArray

Run = TypeVar("Run")
MAX_OFFSET = 1 << 62  # no memory is so large: sums of an offset and a length never overflow a row's integers


class RunTable(Sequence[Run], Generic[Run]):
    """An immutable sequence of runs, equal to any other sequence of equal runs."""

    __slots__ = ("rows",)
    run: ClassVar[type]  # a dataclass, whose fields are the columns
    columns: ClassVar[tuple[str, ...]]  # the last one is the length

    def __init__(self, runs: Iterable[Run] = ()) -> None:
        rows = [tuple(getattr(run, name) for name in self.columns) for run in runs]
        self.rows: NDArray[np.int64] = np.array(rows, dtype=np.int64).reshape(-1, len(self.columns))

    @classmethod
    def of_rows(cls, rows: NDArray[np.int64]) -> Self:
        """``rows``: [runs, columns], which nobody changes any more."""
        table = cls.__new__(cls)
        table.rows = rows
        return table

    def __len__(self) -> int:
        return len(self.rows)

    def __iter__(self) -> Iterator[Run]:
        run = self.run
        return (run(*row) for row in self.rows.tolist())

    @overload
    def __getitem__(self, index: int) -> Run: ...

    @overload
    def __getitem__(self, index: slice) -> Self: ...

    def __getitem__(self, index: int | slice) -> Run | Self:
        if isinstance(index, slice):
            return self.of_rows(self.rows[index])
        run: Run = self.run(*self.rows[index].tolist())
        return run

    def __eq__(self, other: object) -> bool:
        if isinstance(other, RunTable):
            return self.run is other.run and np.array_equal(self.rows, other.rows)
        if isinstance(other, tuple | list):
            return len(other) == len(self) and all(ours == theirs for ours, theirs in zip(self, other, strict=True))
        return NotImplemented

    def __hash__(self) -> int:
        return hash(tuple(self))

    def __repr__(self) -> str:
        return f"{type(self).__name__}({tuple(self)!r})"
