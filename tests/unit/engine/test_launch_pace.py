from __future__ import annotations

from engine.launch_pace import LaunchPace


def _after(launch_s: float, step_s: float, *, always: bool = False, times: int = 1) -> LaunchPace:
    pace = LaunchPace(always)
    for _ in range(times):
        pace.launched(launch_s)
        pace.stepped(step_s)
    return pace


def test_a_step_is_launched_ahead_until_anything_is_known() -> None:
    assert LaunchPace().launching_pays()


def test_a_captured_step_is_launched_ahead_and_one_launched_from_python_is_not() -> None:
    assert _after(0.001, 0.0066).launching_pays()
    assert not _after(0.033, 0.034).launching_pays()
    assert _after(0.033, 0.034, always=True).launching_pays()


def test_one_slow_launch_among_quick_ones_changes_nothing() -> None:
    pace = _after(0.001, 0.0066)
    pace.launched(0.5)
    pace.stepped(0.5)
    assert pace.launching_pays()


def test_what_was_quick_once_is_forgotten() -> None:
    pace = _after(0.001, 0.0066)
    for _ in range(100):
        pace.launched(0.033)
        pace.stepped(0.034)
    assert not pace.launching_pays()
    assert pace.step_s == 0.034


def test_prompts_whose_launch_is_a_small_part_of_them_are_launched_ahead() -> None:
    assert _after(0.035, 0.25, times=5).launching_pays()
