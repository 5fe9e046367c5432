"""The sampler against a reference that does one row at a time, sorts, and follows the definitions word by word."""

from __future__ import annotations

import math
from array import array
from collections import Counter
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from core.request import SamplingParams, SequenceId
from engine.sampler import Sampler
from engine.step_plan import StepItem

VOCAB = 600  # above the first guess of a nucleus' size, and no multiple of the draw's run
EOS = 0


def item(prompt: Sequence[int] = (1,), output: Sequence[int] = (), **sampling: Any) -> StepItem:
    known = array("q", [*prompt, *output])
    params = SamplingParams(**{"seed": 1, **sampling})
    return StepItem(SequenceId("s"), (known[-1],), len(known) - 1, (0,), True, params, known, len(prompt))


def make_logits(num_rows: int, seed: int = 0, scale: float = 3.0, vocab: int = VOCAB) -> torch.Tensor:
    return torch.randn(num_rows, vocab, generator=torch.Generator().manual_seed(seed)) * scale


def sample(logits: torch.Tensor, items: Sequence[StepItem]) -> list[int]:
    return [token.token_id for token in Sampler((EOS,)).sample(logits, items)]


def at(position: int, **sampling: Any) -> StepItem:
    """An item whose next token has ``position``."""
    return item(output=[1] * position, **sampling)


# ---- the reference ----


def edited(logits: Sequence[float], one: StepItem) -> list[float]:
    params = one.sampling
    scores = list(logits)
    output = list(one.known_token_ids[one.num_prompt_tokens :])
    if len(output) < params.min_tokens:
        for token in {*params.stop_token_ids, *(() if params.ignore_eos else (EOS,))}:
            scores[token] = -math.inf
    for token, bias in params.logit_bias.items():
        scores[token] += bias
    for token in set(one.known_token_ids):
        scores[token] = (
            scores[token] / params.repetition_penalty
            if scores[token] > 0
            else (scores[token] * params.repetition_penalty)
        )
    for token, count in Counter(output).items():
        scores[token] -= params.frequency_penalty * count + params.presence_penalty
    return scores


def filtered(logits: Sequence[float], one: StepItem) -> dict[int, float]:
    """The tokens that may be drawn, with their probabilities."""
    params = one.sampling
    scores = [score / params.temperature for score in edited(logits, one)]
    top = max(scores)
    weights = sorted(((math.exp(score - top), token) for token, score in enumerate(scores)), reverse=True)
    weights = [(weight, token) for weight, token in weights if weight > 0 and weight >= params.min_p]
    if params.top_k:
        weights = weights[: params.top_k]
    total, mass, kept = sum(weight for weight, _ in weights), 0.0, []
    for weight, token in weights:
        if mass >= params.top_p * total and params.top_p < 1:
            break
        kept.append((weight, token))
        mass += weight
    return {token: weight / mass for weight, token in kept}


# ---- greedy ----


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_greedy_takes_the_maximum(dtype: torch.dtype) -> None:
    logits = make_logits(5).to(dtype)
    assert sample(logits, [item(temperature=0.0)] * 5) == logits.argmax(dim=-1).tolist()


def test_of_equal_maxima_greedy_takes_the_lowest_id() -> None:
    logits = torch.zeros(1, VOCAB)
    logits[0, [7, 300]] = 1.0
    assert sample(logits, [item(temperature=0.0)]) == [7]


def test_top_k_one_and_vanishing_temperatures_are_greedy() -> None:
    logits = make_logits(2)
    assert sample(logits, [item(top_k=1), item(temperature=1e-9)]) == logits.argmax(dim=-1).tolist()


def test_logits_are_left_as_they_are() -> None:
    logits = make_logits(2)
    before = logits.clone()
    sample(logits, [item(logit_bias={3: 5.0}, repetition_penalty=1.5, top_k=3, min_p=0.1), item(temperature=0.0)])
    assert torch.equal(logits, before)


def test_no_items_give_no_tokens() -> None:
    assert Sampler().sample(torch.empty(0, VOCAB), []) == []


# ---- masks, bias, penalties ----


def test_stop_tokens_are_masked_until_min_tokens_are_out() -> None:
    logits = torch.zeros(1, VOCAB)
    logits[0, EOS], logits[0, 5], logits[0, 9] = 9.0, 8.0, 7.0
    greedy: dict[str, Any] = {"temperature": 0.0, "min_tokens": 2, "stop_token_ids": (5,)}
    assert sample(logits, [at(0, **greedy)]) == [9]
    assert sample(logits, [at(1, **greedy)]) == [9]
    assert sample(logits, [at(2, **greedy)]) == [EOS]
    assert sample(logits, [at(0, ignore_eos=True, **greedy)]) == [EOS]


def test_bias_and_stop_ids_beyond_the_vocabulary_are_ignored() -> None:
    logits = make_logits(1)
    odd = item(temperature=0.0, logit_bias={VOCAB: 100.0, 10**9: 1.0}, min_tokens=1, stop_token_ids=(VOCAB + 5,))
    assert sample(logits, [odd]) == logits[:, 1:].argmax(dim=-1).add(1).tolist()  # EOS is masked


TOKENS = st.lists(st.integers(0, 19), max_size=12)


@settings(derandomize=True, deadline=None)
@given(
    st.lists(
        st.builds(
            item,
            prompt=st.lists(st.integers(0, 19), min_size=1, max_size=12),
            output=TOKENS,
            temperature=st.just(0.0),
            min_tokens=st.integers(0, 6),
            stop_token_ids=st.lists(st.integers(0, 19), max_size=3, unique=True).map(tuple),
            ignore_eos=st.booleans(),
            logit_bias=st.dictionaries(st.integers(0, 19), st.floats(-9, 9), max_size=4),
            repetition_penalty=st.sampled_from([1.0, 0.5, 1.7]),
            frequency_penalty=st.sampled_from([0.0, 0.7, -0.4]),
            presence_penalty=st.sampled_from([0.0, 1.3, -0.9]),
        ),
        min_size=1,
        max_size=5,
    ),
    st.integers(0, 1000),
)
def test_edits_are_those_of_the_reference(items: list[StepItem], seed: int) -> None:
    logits = make_logits(len(items), seed, vocab=20)
    for row, token in enumerate(sample(logits, items)):
        scores = edited(logits[row].tolist(), items[row])
        assert scores[token] == pytest.approx(max(scores), abs=1e-4)


def test_the_schedulers_array_can_grow_after_sampling() -> None:
    one = item(prompt=[1, 2], output=[3], repetition_penalty=2.0, presence_penalty=1.0)
    sample(make_logits(1), [one])
    one.known_token_ids.append(4)


# ---- filters ----

FILTERS: list[dict[str, Any]] = [
    {},
    {"temperature": 0.5},
    {"temperature": 2.0},
    {"top_k": 2},
    {"top_k": 400},
    {"top_k": 10_000},
    {"top_p": 0.01},
    {"top_p": 0.5},
    {"top_p": 0.999, "temperature": 2.0},
    {"min_p": 0.2},
    {"min_p": 1.0},
    {"top_k": 20, "top_p": 0.8},
    {"top_k": 50, "top_p": 0.9, "min_p": 0.05, "temperature": 0.7},
    {"top_p": 0.9, "logit_bias": {4: 9.0}, "repetition_penalty": 1.2, "presence_penalty": 0.5},
]


@pytest.mark.parametrize("sampling", FILTERS, ids=str)
def test_what_is_drawn_is_what_the_filters_leave_and_as_often_as_it_is_likely(sampling: dict[str, Any]) -> None:
    logits = make_logits(1)
    num_draws = 4000
    items = [item(prompt=[1, 2, 3], output=[4, 4], **{**sampling, "seed": seed}) for seed in range(num_draws)]
    counts = Counter(sample(logits.expand(num_draws, -1), items))
    allowed = filtered(logits[0].tolist(), items[0])
    assert set(counts) <= set(allowed)
    for token, probability in allowed.items():
        deviation = math.sqrt(num_draws * probability * (1 - probability))
        assert abs(counts[token] - num_draws * probability) <= 5 * deviation + 1, f"token {token}"


def test_a_nucleus_beyond_every_guess_is_found_by_sorting() -> None:
    vocab = 5000
    logits = make_logits(1, scale=0.01, vocab=vocab)
    items = [item(top_p=0.95, seed=seed) for seed in range(300)]
    allowed = filtered(logits[0].tolist(), items[0])
    assert 4096 < len(allowed) < vocab
    assert set(sample(logits.expand(300, -1), items)) <= set(allowed)


def test_tokens_of_equal_weight_stay_or_go_together() -> None:
    logits = torch.zeros(1, VOCAB)
    logits[0, [10, 20, 30]] = 20.0
    for sampling in ({"top_k": 2}, {"top_p": 0.5}, {"min_p": 1.0}):
        items = [item(seed=seed, **sampling) for seed in range(200)]
        assert set(sample(logits.expand(200, -1), items)) == {10, 20, 30}


def test_an_impossible_token_is_never_drawn() -> None:
    logits = torch.full((1, VOCAB), -math.inf)
    logits[0, [0, 299, VOCAB - 1]] = 0.0
    items = [item(seed=seed) for seed in range(300)]
    assert set(sample(logits.expand(300, -1), items)) == {0, 299, VOCAB - 1}


@pytest.mark.parametrize(("uniform", "token"), [(0.0, 299), (1 - 2.0**-53, 410)], ids=["first", "last"])
def test_the_ends_of_the_interval_draw_the_first_and_the_last_possible_token(
    uniform: float, token: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("engine.sampler._uniform", lambda item: uniform)
    logits = torch.full((2000, VOCAB), -math.inf)  # so many rows that rounding puts some targets beyond the total
    logits[:, 299:411] = make_logits(2000, vocab=112)
    assert set(sample(logits, [item()] * 2000)) == {token}


def test_a_row_of_nan_gives_some_token_and_spoils_no_neighbour() -> None:
    logits = make_logits(4)
    items = [item(seed=row, top_p=0.9, top_k=30) for row in range(4)]
    clean = sample(logits, items)
    logits[1] = math.nan
    spoilt = sample(logits, items)
    assert 0 <= spoilt[1] < VOCAB
    assert [spoilt[row] for row in (0, 2, 3)] == [clean[row] for row in (0, 2, 3)]


# ---- draws ----


def test_a_draw_is_a_function_of_seed_and_position_only() -> None:
    logits = make_logits(1, scale=0.1)
    tokens = [sample(logits, [at(position, seed=5)])[0] for position in range(50)]
    assert tokens == [sample(logits, [at(position, seed=5)])[0] for position in range(50)]
    assert len(set(tokens)) > 30
    assert tokens != [sample(logits, [at(position, seed=6)])[0] for position in range(50)]


def test_negative_and_large_seeds_are_seeds() -> None:
    logits = make_logits(1, scale=0.1)
    tokens = {sample(logits, [item(seed=seed)])[0] for seed in (-(2**63), -1, 0, 2**63 - 1)}
    assert len(tokens) == 4


@settings(derandomize=True, deadline=None, max_examples=40)
@given(st.data())
def test_a_rows_token_does_not_depend_on_its_neighbours(data: st.DataObject) -> None:
    samplings = [*FILTERS, {"temperature": 0.0}, {"logprobs": 2}]
    chosen = data.draw(st.lists(st.sampled_from(samplings), min_size=2, max_size=6))
    items = [item(output=[2, 2], **{**sampling, "seed": row}) for row, sampling in enumerate(chosen)]
    logits = make_logits(len(items), seed=len(items)).to(torch.bfloat16)  # coarse: ties occur
    together = Sampler((EOS,)).sample(logits, items)
    alone = [Sampler((EOS,)).sample(logits[row : row + 1], items[row : row + 1])[0] for row in range(len(items))]
    assert [token.token_id for token in together] == [token.token_id for token in alone]


def test_a_row_that_is_drawn_needs_a_seed() -> None:
    assert sample(make_logits(1), [item(temperature=0.0, seed=None)])
    with pytest.raises(AssertionError, match="seed"):
        sample(make_logits(1), [item(seed=None)])


# ---- log-probabilities ----


def test_logprobs_are_those_of_the_untouched_logits() -> None:
    logits = make_logits(3)
    reference = logits.log_softmax(dim=-1)
    bias = {7: 100.0}
    tokens = Sampler((EOS,)).sample(
        logits,
        [item(temperature=0.0, logprobs=3, logit_bias=bias), item(), item(logprobs=0, temperature=0.3, top_k=2)],
    )
    first, none, last = (token.logprob for token in tokens)
    assert none is None
    assert first is not None
    assert last is not None
    assert (first.token_id, tokens[0].token_id) == (7, 7)
    assert first.logprob == pytest.approx(float(reference[0, 7]), abs=1e-5)
    best = reference[0].topk(3)
    assert [token for token, _ in first.top] == best.indices.tolist()
    assert [logprob for _, logprob in first.top] == pytest.approx(best.values.tolist(), abs=1e-5)
    assert last.top == ()
    assert last.logprob == pytest.approx(float(reference[2, tokens[2].token_id]), abs=1e-5)
