from __future__ import annotations

import pytest

from core.clock import VirtualClock, WallClock, unix_time


def test_wall_clock_never_goes_back() -> None:
    clock = WallClock()
    instants = [clock.now() for _ in range(100)]
    assert instants == sorted(instants)


def test_virtual_clock_moves_only_when_told_to() -> None:
    clock = VirtualClock(start=5.0)
    assert (clock.now(), clock.now()) == (5.0, 5.0)
    clock.advance(2.5)
    assert clock.now() == 7.5


def test_virtual_clock_refuses_to_go_back_and_stays_where_it_was() -> None:
    clock = VirtualClock()
    with pytest.raises(AssertionError):
        clock.advance(-1.0)
    assert clock.now() == 0.0


def test_unix_time_counts_from_1970() -> None:
    assert unix_time() > 1.7e9
