"""Which function multiplies experts follows from device, type and size; every number here is worked out by hand."""

from __future__ import annotations

from dataclasses import replace

import pytest

from engine.experts import ExpertsCase, choose_experts

MIB = 1 << 20
HOPPER = ExpertsCase("cuda", (9, 0), "bfloat16", 72 * MIB, 64)  # Qwen3-30B-A3B: 8 experts of 9 MiB for each token


@pytest.mark.parametrize("capability", [(9, 0), (10, 0)])
def test_groups_found_on_the_device_are_captured_for_every_batch(capability: tuple[int, int]) -> None:
    choice = choose_experts(replace(HOPPER, capability=capability))

    assert (choice.batched_tokens, choice.graph_batch_size) == (0, 64)
    assert not choice.needs_host(2048)


@pytest.mark.parametrize(
    "case",
    [
        replace(HOPPER, dtype="float32"),
        replace(HOPPER, dtype="float16"),
        replace(HOPPER, capability=(8, 0)),
        replace(HOPPER, capability=(12, 0)),
        replace(HOPPER, device="cpu", capability=None),
    ],
    ids=["float32", "float16", "Ampere", "a Blackwell of desktops", "cpu"],
)
def test_elsewhere_steps_copy_weights_as_long_as_they_are_few(case: ExpertsCase) -> None:
    choice = choose_experts(case)

    assert (choice.batched_tokens, choice.graph_batch_size) == (3, 3), "256 MiB hold the experts of three tokens"
    assert "72 MiB of weights a token" in choice.reason
    small = choose_experts(replace(case, token_bytes=4 * MIB))
    assert (small.batched_tokens, small.graph_batch_size) == (64, 64)
    assert (small.needs_host(64), small.needs_host(65)) == (False, True)
    assert "asks the host" in small.reason
    huge = choose_experts(replace(case, token_bytes=300 * MIB))
    assert (huge.batched_tokens, huge.graph_batch_size, huge.text) == (0, 0, "experts by grouped_mm")
