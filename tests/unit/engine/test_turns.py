"""Workers on the same cores compute one after the other, in turn, and none waits for ever."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from core.clock import VirtualClock
from engine.turns import FileTurns, NoTurns, make_turns


@pytest.fixture
def clock() -> VirtualClock:
    return VirtualClock()


@pytest.fixture
def pair(tmp_path: Path, clock: VirtualClock) -> tuple[FileTurns, FileTurns]:
    return FileTurns(tmp_path / "turns", clock, patience_s=10), FileTurns(tmp_path / "turns", clock, patience_s=10)


def test_one_has_the_turn_and_the_other_waits_for_it(pair: tuple[FileTurns, FileTurns]) -> None:
    first, second = pair
    assert first.try_take()
    assert not second.try_take()
    first.give_back()
    assert second.try_take()


def test_who_had_its_turn_comes_after_who_waits(pair: tuple[FileTurns, FileTurns]) -> None:
    first, second = pair
    order = []
    assert first.try_take()
    assert not second.try_take()  # stands in line
    for _ in range(3):
        order.append("first")
        first.give_back()
        assert not first.try_take(), "the line comes first"
        assert second.try_take()
        assert not first.try_take()  # stands in line
        order.append("second")
        second.give_back()
        assert not second.try_take()
        assert first.try_take()
        assert not second.try_take()
    assert order == ["first", "second"] * 3


def test_who_leaves_the_line_blocks_nobody(tmp_path: Path, clock: VirtualClock) -> None:
    first, second, third = (FileTurns(tmp_path / "turns", clock) for _ in range(3))
    assert first.try_take()
    assert not second.try_take()
    second.give_back()  # its work was aborted while it waited
    first.give_back()
    assert third.try_take()


def test_a_turn_that_never_ends_is_waited_for_once(
    pair: tuple[FileTurns, FileTurns], clock: VirtualClock, caplog: pytest.LogCaptureFixture
) -> None:
    first, second = pair
    assert first.try_take()
    assert not second.try_take()
    clock.advance(10.1)
    assert second.try_take()
    second.give_back()
    assert second.try_take(), "patience is lost once, not at every step"
    assert len(caplog.records) == 1
    first.give_back()
    assert second.try_take()
    assert not first.try_take(), "it has a real turn again"


def test_a_process_that_dies_gives_up_its_turn(tmp_path: Path, clock: VirtualClock) -> None:
    path = tmp_path / "turns"
    holder = subprocess.Popen(
        [
            sys.executable,
            "-c",
            "import sys, pathlib; from core.clock import WallClock; from engine.turns import FileTurns\n"
            "turns = FileTurns(pathlib.Path(sys.argv[1]), WallClock()); print(turns.try_take(), flush=True)\n"
            "sys.stdin.read()",
            str(path),
        ],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        cwd=Path(__file__).resolve().parents[3],
    )
    with holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == b"True\n"
        mine = FileTurns(path, clock)
        assert not mine.try_take()
        holder.kill()
        holder.wait()
    assert mine.try_take()


def test_without_a_file_there_are_no_turns(clock: VirtualClock) -> None:
    turns = make_turns(None, clock)
    assert isinstance(turns, NoTurns)
    assert turns.try_take()
    turns.give_back()
    assert turns.try_take()
