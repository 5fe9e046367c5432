"""What is loaded is what is predicted to be faster than computing it, as far as that goes."""

from __future__ import annotations

from dataclasses import replace

from hypothesis import given
from hypothesis import strategies as st

from core.cache_tiers import Tier
from engine.reload_choice import PrefillCost, ReloadView, TierSpeed, choose_reload

H, D = Tier.HOST, Tier.DISK
VIEW = ReloadView(
    num_tokens=1000,
    num_known=0,
    tiers=[H] * 40 + [D] * 20,
    page_size=16,
    page_bytes=1000,
    speeds={H: TierSpeed(0.001, 1e6), D: TierSpeed(0.001, 1e5)},
    prefill=PrefillCost(0.01, 1e-3, 0.0, 2048),
    queued_bytes={},
)


def test_all_is_loaded_where_loading_is_faster() -> None:
    choice = choose_reload(replace(VIEW, prefill=PrefillCost(0.01, 0.1, 0.0, 2048)))
    assert choice.num_pages == 60
    # 20 pages from the disk, then 60 from host memory, then 40 tokens
    assert round(choice.load_s, 6) == round(0.001 + 0.2 + 0.001 + 0.06, 6)
    assert round(choice.compute_s, 6) == round(0.01 + 40 * 0.1, 6)


def test_a_slow_tier_is_left_alone() -> None:
    assert choose_reload(replace(VIEW, speeds={H: TierSpeed(0.001, 1e6), D: TierSpeed(5.0, 1e5)})).num_pages == 40


def test_nothing_is_loaded_that_is_computed_faster_and_it_says_so() -> None:
    choice = choose_reload(replace(VIEW, prefill=PrefillCost(0.0, 1e-6, 0.0, 2048)))
    assert (choice.num_pages, choice.load_s) == (0, 0.0)
    assert "no load would shorten" in choice.reason


def test_what_others_load_first_counts() -> None:
    assert choose_reload(replace(VIEW, queued_bytes={H: 2_000_000})).num_pages == 0


@given(
    tiers=st.lists(st.sampled_from([H, D]), max_size=12),
    token_s=st.floats(0, 1e-2),
    pair_s=st.floats(0, 1e-5),
    host=st.floats(1e3, 1e9),
    disk=st.floats(1e3, 1e9),
    queued=st.integers(0, 10**7),
    num_known=st.integers(0, 200),
)
def test_no_end_of_a_run_is_better_and_no_choice_is_worse_than_computing(
    tiers: list[Tier], token_s: float, pair_s: float, host: float, disk: float, queued: int, num_known: int
) -> None:
    view = replace(
        VIEW,
        tiers=tiers,
        num_known=num_known,
        speeds={H: TierSpeed(1e-4, host), D: TierSpeed(1e-4, disk)},
        prefill=PrefillCost(1e-3, token_s, pair_s, 64),
        queued_bytes={H: queued},
    )
    choice = choose_reload(view)
    total_s = choice.load_s + choice.compute_s
    assert total_s <= choice.recompute_s
    assert 0 <= choice.num_pages <= len(tiers)
    ends = [i for i in range(len(tiers) + 1) if i in (0, len(tiers)) or tiers[i - 1] is not tiers[i]]
    for end in ends:
        cut = choose_reload(replace(view, tiers=tiers[:end]))
        assert total_s <= cut.load_s + cut.compute_s
