"""Layers are held back in groups and none is lost; figures compare the best overlap with shipping afterwards."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pytest

from benchmarks.overlap_peer import HoldBack
from benchmarks.overlap_results import AFTER, ALONE, WHILE, Handover, Setting, figures, row
from core.request import SequenceSpec
from engine.step_plan import StepPlan


class Recorder:
    """A listener that writes down which layers were stored when it heard of each."""

    def __init__(self) -> None:
        self.stored: list[int] = []
        self.heard: list[tuple[int, int]] = []  # layer, layers stored by then

    def sequence_started(self, spec: SequenceSpec, num_cached_tokens: int, page_ids: Sequence[int]) -> None: ...

    def step_planned(self, plan: StepPlan) -> Callable[[int], None]:
        return lambda layer: self.heard.append((layer, len(self.stored)))


@pytest.mark.parametrize(
    ("group", "stored_by_then"), [(1, [1, 2, 3, 4, 5]), (2, [2, 2, 4, 4, 5]), (5, [5] * 5), (99, [5] * 5)]
)
def test_layers_are_told_when_their_group_is_full_or_the_last(group: int, stored_by_then: list[int]) -> None:
    recorder = Recorder()
    held = HoldBack(recorder, num_layers=5)
    held.num_layers_per_group = group

    layer_stored = held.step_planned(StepPlan(()))
    for layer in range(5):
        recorder.stored.append(layer)
        layer_stored(layer)

    assert recorder.heard == list(enumerate(stored_by_then))


def test_a_row_is_the_median_hand_over() -> None:
    cells = row(
        Setting(256, WHILE, 4),
        [Handover(s, 64 << 20, 48 << 20, 8, tail) for s, tail in ((2.0, 0.3), (1.0, 0.1), (3.0, 0.2))],
    )

    assert (cells["prefill_s"], cells["exposed_s"], cells["exposed_s_max"]) == (2.0, 0.2, 0.3)
    assert (cells["mib"], cells["overlapped_mib"], cells["num_groups"]) == (64, 48, 8)
    assert cells["second_token_s"] == pytest.approx(2.3)


def test_a_setting_that_failed_has_no_numbers() -> None:
    assert row(Setting(256, AFTER), []) == {"chunk": 256, "mode": AFTER, "layers_per_group": None, "num_rounds": 0}


def test_figures_are_of_the_best_setting_and_of_others_with_its_chunk() -> None:
    rows = [
        row(Setting(256, ALONE), [Handover(2.0)]),
        row(Setting(256, AFTER), [Handover(2.0, 100, 0, 1, 1.2)]),
        row(Setting(256, WHILE, 1), [Handover(2.2, 100, 90, 9, 0.2)]),
        row(Setting(1024, AFTER), [Handover(1.5, 100, 0, 1, 1.2)]),
        row(Setting(1024, WHILE, 4), [Handover(2.5, 100, 50, 4, 0.1)]),
    ]

    assert figures(rows) == pytest.approx(
        {
            "best_chunk": 256,
            "exposed_ms": 200.0,
            "overlapped_share": 0.9,
            "exposed_over_prefill": 0.2 / 2.2,
            "exposed_after_prefill_ms": 1200.0,
            "second_token_speedup": 3.2 / 2.4,
            "prefill_slowdown": 0.1,
        }
    )


def test_without_overlap_there_are_no_figures() -> None:
    assert figures([row(Setting(256, ALONE), [Handover(2.0)]), row(Setting(256, WHILE, 1), [])]) == {}
