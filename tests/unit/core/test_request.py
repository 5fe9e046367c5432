from __future__ import annotations

import dataclasses
import math
from typing import Any

import pytest

from core.errors import InvalidRequest
from core.request import GenerateRequest, RequestId, SamplingParams, SequenceId, SequenceSpec, sequence_id


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("max_tokens", 0),
        ("min_tokens", -1),
        ("temperature", -0.1),
        ("temperature", 2.1),
        ("temperature", math.nan),
        ("top_p", 0.0),
        ("top_p", 1.1),
        ("top_p", math.nan),
        ("top_k", -1),
        ("min_p", -0.1),
        ("min_p", 1.1),
        ("repetition_penalty", 0.0),
        ("repetition_penalty", 10.5),
        ("presence_penalty", -2.1),
        ("presence_penalty", math.inf),
        ("frequency_penalty", 2.1),
        ("logit_bias", {-1: 0.0}),
        ("logit_bias", {1: 101.0}),
        ("seed", 2**63),
        ("seed", -(2**63) - 1),
        ("stop", ("",)),
        ("stop", ("x",) * 17),
        ("stop_token_ids", (-1,)),
        ("logprobs", -1),
        ("logprobs", 21),
        ("n", 0),
        ("n", 129),
    ],
)
def test_a_wrong_value_is_refused_by_the_name_of_its_field(name: str, value: Any) -> None:
    with pytest.raises(InvalidRequest) as error:
        SamplingParams(**{name: value})
    assert error.value.field == name
    assert str(error.value).startswith(f"{name}: ")


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("max_tokens", 1),
        ("temperature", 0.0),
        ("temperature", 2.0),
        ("top_p", 1.0),
        ("top_k", 0),
        ("min_p", 1.0),
        ("repetition_penalty", 10.0),
        ("presence_penalty", -2.0),
        ("frequency_penalty", 2.0),
        ("logit_bias", {0: -100.0, 5: 100.0}),
        ("seed", -(2**63)),
        ("stop", ("x",) * 16),
        ("logprobs", 0),
        ("logprobs", 20),
        ("n", 128),
    ],
)
def test_the_ends_of_each_range_are_allowed(name: str, value: Any) -> None:
    assert getattr(SamplingParams(**{name: value}), name) == value


def test_min_tokens_above_max_tokens_is_refused() -> None:
    with pytest.raises(InvalidRequest, match=r"^min_tokens: must be at most max_tokens \(3\), got 4$"):
        SamplingParams(max_tokens=3, min_tokens=4)


def test_only_temperature_zero_is_greedy() -> None:
    assert SamplingParams(temperature=0.0).greedy
    assert not SamplingParams(temperature=0.01).greedy


def test_continuations_have_their_own_seeds_and_the_first_keeps_the_requests() -> None:
    request = SamplingParams(seed=7, n=4, top_k=5)
    split = [request.for_index(index) for index in range(4)]
    assert split[0] == dataclasses.replace(request, n=1)
    assert len({params.seed for params in split}) == 4
    assert all(params.n == 1 and params.top_k == 5 for params in split)
    assert split == [request.for_index(index) for index in range(4)]


def test_a_request_without_tokens_is_refused() -> None:
    with pytest.raises(InvalidRequest) as error:
        GenerateRequest(RequestId("r"), (), SamplingParams())
    assert error.value.field == "prompt"


def test_a_sequences_tokens_are_prompt_then_output() -> None:
    spec = SequenceSpec(SequenceId("s"), (1, 2), SamplingParams(), output_token_ids=(3,))
    assert spec.token_ids == (1, 2, 3)


def test_each_try_at_each_continuation_has_its_own_name() -> None:
    names = {sequence_id(RequestId("r"), index, attempt) for index in range(3) for attempt in range(3)}
    assert len(names) == 9
