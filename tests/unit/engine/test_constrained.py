"""Tokens under a grammar are those of ``transformers.generate`` with the library's masks, however they are computed."""

from __future__ import annotations

import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from core.clock import VirtualClock
from core.errors import InvalidRequest
from core.grammar import Grammar, GrammarKind
from core.request import FinishReason, SamplingParams, SequenceId, SequenceSpec, TokenChunk
from engine.config import EngineConfig
from engine.engine import Engine
from tests.constrained_model import EOS, GRAMMARS, PERSON, WORDS, ConstrainedReference, save_constrained_model
from tests.tiny_models import save_tiny_model

NUM_TOKENS = 60
Case = tuple[tuple[int, ...], Grammar | None]


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> ConstrainedReference:
    return ConstrainedReference(save_constrained_model(tmp_path_factory.mktemp("models") / "constrained"))


@pytest.fixture(scope="module")
def cases(reference: ConstrainedReference) -> dict[Case, list[int]]:
    """Prompts, half of them with a grammar |-> what has to come out."""
    draw = random.Random(5)
    prompts = [tuple(draw.randrange(3, 350) for _ in range(length)) for length in (1, 7, 19, 33)]
    asked: list[Case] = [(prompt, grammar) for prompt, grammar in zip(prompts, (*GRAMMARS, PERSON), strict=True)]
    asked += [(prompt, None) for prompt in prompts]
    expected = {case: reference.expected(*case, NUM_TOKENS) for case in asked}
    bounded = [tokens for (_, grammar), tokens in expected.items() if grammar is not None]
    assert any(tokens[-1] == EOS and len(tokens) > 8 for tokens in bounded), "some have to come to their end"
    assert len({tuple(tokens) for tokens in expected.values()}) == len(asked)
    return expected


def load(folder: Path, **settings: Any) -> Engine:
    sizes = {"page_size": 4, "num_pages": 256}
    config = EngineConfig(**{"device": "cpu", "threads": 1, "dtype": "float32", **sizes, **settings})
    return Engine.load_model(config, str(folder), VirtualClock())


def spec(number: int, case: Case, output: tuple[int, ...] = (), **sampling: Any) -> SequenceSpec:
    prompt, grammar = case
    params = SamplingParams(**{"max_tokens": NUM_TOKENS, "temperature": 0.0, "seed": 1, "grammar": grammar, **sampling})
    return SequenceSpec(SequenceId(f"s{number}"), prompt, params, output)


def run(engine: Engine, specs: list[SequenceSpec]) -> dict[SequenceId, list[TokenChunk]]:
    chunks: dict[SequenceId, list[TokenChunk]] = {s.sequence_id: [] for s in specs}
    for s in specs:
        engine.add(s)
    while engine.has_work:
        output = engine.step()
        assert not output.failures
        for chunk in output.chunks:
            chunks[chunk.sequence_id].append(chunk)
    return chunks


def outputs(engine: Engine, specs: list[SequenceSpec]) -> list[list[int]]:
    return [[token for chunk in chunks for token in chunk.token_ids] for chunks in run(engine, specs).values()]


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"plan_ahead": "always"},
        {"plan_ahead": "always", "decode_graphs": "always", "attention": "sdpa"},
        {"page_size": 4, "num_pages": 60, "max_prefill_chunk": 7},
        {"page_size": 4, "num_pages": 60, "plan_ahead": "always"},
    ],
    ids=["plain", "ahead", "ahead by graphs", "preempted", "preempted ahead"],
)
def test_beside_others_that_are_free(
    settings: dict[str, Any], reference: ConstrainedReference, cases: dict[Case, list[int]]
) -> None:
    engine = load(reference.folder, **settings)
    assert outputs(engine, [spec(i, case) for i, case in enumerate(cases)]) == list(cases.values())
    assert (engine.load().num_preemptions > 0) == (settings.get("num_pages") == 60)
    engine.check_integrity()


def test_resumed_from_the_tokens_of_another_worker(
    reference: ConstrainedReference, cases: dict[Case, list[int]]
) -> None:
    engine = load(reference.folder, plan_ahead="always")
    specs, expected = [], []
    for number, (case, tokens) in enumerate(cases.items()):
        num_known = min(number + 1, len(tokens) - 1)
        specs.append(spec(number, case, tuple(tokens[:num_known])))
        expected.append(tokens[num_known:])
    assert outputs(engine, specs) == expected


def test_draws_obey_too_and_do_not_depend_on_how_they_are_computed(
    reference: ConstrainedReference, cases: dict[Case, list[int]]
) -> None:
    hot = {"temperature": 1.3, "top_p": 0.9, "frequency_penalty": 0.5, "repetition_penalty": 1.1, "logprobs": 2}
    specs = [spec(i, case, seed=i, **hot) for i, case in enumerate(cases)]
    plain = run(load(reference.folder), specs)
    ahead = run(load(reference.folder, plan_ahead="always", page_size=16, num_pages=64), specs)
    assert _tokens(ahead) == _tokens(plain)
    assert _logprobs(ahead) == pytest.approx(_logprobs(plain), abs=1e-4)  # pages of another size add up differently
    engine = load(reference.folder)
    for one in specs:
        if one.sampling.grammar is None:
            continue
        compiling = engine.compile_grammar(one)
        assert compiling is not None
        matcher = compiling.result().start()
        matcher.advance([token for chunk in plain[one.sequence_id] for token in chunk.token_ids])
        assert matcher.error == ""
        assert all(len(chunk.logprobs) == len(chunk.token_ids) for chunk in plain[one.sequence_id])


def _tokens(outputs: dict[SequenceId, list[TokenChunk]]) -> dict[SequenceId, list[int]]:
    return {name: [token for chunk in chunks for token in chunk.token_ids] for name, chunks in outputs.items()}


def _logprobs(outputs: dict[SequenceId, list[TokenChunk]]) -> list[float]:
    return [one.logprob for chunks in outputs.values() for chunk in chunks for one in chunk.logprobs]


def test_an_output_that_can_not_go_on_fails_alone(
    reference: ConstrainedReference, cases: dict[Case, list[int]]
) -> None:
    engine = load(reference.folder, plan_ahead="always")
    free = spec(0, next(case for case in cases if case[1] is None))
    stuck = replace(spec(1, next(case for case in cases if case[1] is WORDS)), output_token_ids=(5, 5))
    engine.add(free)
    engine.add(stuck)
    failures, chunks = [], []
    while engine.has_work:
        output = engine.step()
        failures += output.failures
        chunks += output.chunks
    (failure,) = failures
    assert (failure.sequence_id, failure.retryable) == (stuck.sequence_id, False)
    assert "no token can be chosen" in failure.message
    assert {chunk.sequence_id for chunk in chunks} == {free.sequence_id}
    assert chunks[-1].finish_reason is not None
    engine.check_integrity()


def test_an_end_is_the_end(reference: ConstrainedReference) -> None:
    engine = load(reference.folder)
    done = spec(0, ((7,), Grammar(GrammarKind.REGEX, "a")))
    (chunks,) = run(engine, [done]).values()
    assert [chunk.token_ids for chunk in chunks][-1] == (EOS,)
    assert (len(chunks), chunks[-1].finish_reason) == (2, FinishReason.STOP)


def test_a_model_without_tokens_of_text_refuses_grammars(tmp_path: Path) -> None:
    engine = load(save_tiny_model("llama", tmp_path / "llama"))
    with pytest.raises(InvalidRequest, match="structured output is not available here") as raised:
        engine.check(spec(0, ((5,), WORDS)))
    assert raised.value.field == "grammar"
