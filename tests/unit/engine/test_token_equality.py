"""Greedy tokens of the engine are those of ``transformers.generate``, for every family, however they are computed."""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from core.clock import VirtualClock
from core.request import SamplingParams, SequenceId, SequenceSpec
from engine.config import EngineConfig
from engine.engine import Engine, StepOutput
from engine.model_runner import SpeedUps
from engine.step_plan import StepPlan
from tests.tiny_models import FAMILIES, VOCAB_SIZE, generate_with, save_tiny_model

NUM_TOKENS = 10
PROMPT_LENGTHS = (1, 2, 5, 16, 17, 23, 40, 64)
SHAPES = [(1, 7), (16, 5), (64, None)]  # page size, most tokens of one prompt in one step


@dataclass(frozen=True)
class Example:
    """A model and what transformers goes on with after each prompt."""

    folder: Path
    prompts: tuple[tuple[int, ...], ...]
    expected: tuple[tuple[int, ...], ...]


@pytest.fixture(scope="session")
def example(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Example]:
    @cache
    def make(family: str) -> Example:
        folder = save_tiny_model(family, tmp_path_factory.mktemp("models") / family)
        model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager")
        draw = random.Random(family)
        prompts = tuple(tuple(draw.randrange(1, VOCAB_SIZE) for _ in range(n)) for n in PROMPT_LENGTHS)
        expected = tuple(tuple(generate_with(model, list(prompt), NUM_TOKENS)) for prompt in prompts)
        assert len(set(sum(expected, ()))) > NUM_TOKENS, "tokens that hardly vary would prove nothing"
        return Example(folder, prompts, expected)

    return make


def load(folder: Path, **settings: Any) -> Engine:
    config = EngineConfig(**{"device": "cpu", "threads": 1, "dtype": "float32", "num_pages": 64, **settings})
    return Engine.load_model(config, str(folder), VirtualClock())


def spec(name: str, prompt: Sequence[int], outputs: Sequence[int] = (), *, hold_kv: bool = False) -> SequenceSpec:
    sampling = SamplingParams(max_tokens=NUM_TOKENS, temperature=0.0)
    return SequenceSpec(SequenceId(name), tuple(prompt), sampling, tuple(outputs), hold_kv=hold_kv)


def run(engine: Engine, specs: Sequence[SequenceSpec]) -> Mapping[str, tuple[int, ...]]:
    """Add ``specs`` at once and run until nothing is left to do."""
    outputs: dict[str, tuple[int, ...]] = {s.sequence_id: () for s in specs}
    for s in specs:
        engine.add(s)
    while engine.has_work:
        output = engine.step()
        assert not output.failures
        for chunk in output.chunks:
            outputs[chunk.sequence_id] += chunk.token_ids
    return outputs


def tokens(engine: Engine, case: Example, tag: str) -> tuple[tuple[int, ...], ...]:
    """What the engine makes of all prompts at once."""
    specs = [spec(f"{tag}-{i}", prompt) for i, prompt in enumerate(case.prompts)]
    return tuple(run(engine, specs).values())


@pytest.mark.parametrize(("page_size", "chunk"), SHAPES)
@pytest.mark.parametrize("family", FAMILIES)
def test_batched_alone_and_cached(
    family: str, page_size: int, chunk: int | None, example: Callable[[str], Example]
) -> None:
    """Each prompt is alone in one of the shapes: it takes as many steps as all of them at once."""
    case = example(family)
    engine = load(case.folder, page_size=page_size, num_pages=1024 // page_size, max_prefill_chunk=chunk)

    assert tokens(engine, case, "all at once") == case.expected
    num_cached = engine.load().cached_tokens
    assert tokens(engine, case, "again, from the prefix cache") == case.expected
    assert (engine.load().cached_tokens > num_cached) == (page_size < max(PROMPT_LENGTHS))
    for i in range(SHAPES.index((page_size, chunk)), len(case.prompts), len(SHAPES)):
        assert run(engine, [spec(f"alone-{i}", case.prompts[i])])[f"alone-{i}"] == case.expected[i]
    engine.check_integrity()


@pytest.mark.parametrize("family", FAMILIES)
def test_preempted(family: str, example: Callable[[str], Example]) -> None:
    case = example(family)
    engine = load(case.folder, page_size=4, num_pages=26, max_prefill_chunk=7, prefix_cache=family < "m")

    assert tokens(engine, case, "crowded") == case.expected
    assert engine.load().num_preemptions > 0
    engine.check_integrity()


@pytest.mark.parametrize(("family", "compiled"), [*((family, False) for family in FAMILIES), ("llama", True)])
def test_held_up_between_two_layers(family: str, compiled: bool, example: Callable[[str], Example]) -> None:
    """A long prompt's step lets an urgent prompt through after its first layer, and goes on."""
    case = example(family)
    engine = load(case.folder, page_size=4, max_batch_tokens=128, prefill_order="slack")
    if compiled:
        engine._runner.speed_up(
            SpeedUps(compile=True, graph_batch_size=0, max_model_len=128, max_batch_size=8), backend="eager"
        )
        assert engine.forward.compiled
    clock = engine._clock
    assert isinstance(clock, VirtualClock)
    # A layer takes a second. At the end of the first one, its own share of such a step is just left.
    own_s = engine.layout.num_layers * len(case.prompts[5]) / len(case.prompts[7])
    urgent = replace(spec("urgent", case.prompts[5]), first_token_by=clock.now() + 1.5 + own_s)
    outputs: dict[str, tuple[int, ...]] = {"long": (), "urgent": ()}
    layers = 0

    def book(output: StepOutput) -> None:
        assert not output.failures
        for chunk in output.chunks:
            outputs[chunk.sequence_id] += chunk.token_ids

    def between_layers() -> None:
        nonlocal layers
        layers += 1
        clock.advance(1.0)
        if layers == 1:
            engine.add(urgent)
            book(engine.step_urgent())
            assert outputs["urgent"] == case.expected[5][:1]
            assert outputs["long"] == ()
            assert engine.step_urgent() == StepOutput(), "nobody else waits"

    engine.between_layers = between_layers
    engine.add(spec("long", case.prompts[7]))
    book(engine.step())
    assert outputs["long"] == case.expected[7][:1]
    assert layers == engine.layout.num_layers
    while engine.has_work:
        book(engine.step())
    assert outputs == {"long": case.expected[7], "urgent": case.expected[5]}
    assert engine.num_urgent_steps == 1
    engine.check_integrity()


@pytest.mark.parametrize("family", FAMILIES)
def test_handed_over_between_two_engines(family: str, example: Callable[[str], Example]) -> None:
    """Prefilled on one engine, its pages copied byte by byte at the moment each layer is stored, decoded on another."""
    case = example(family)
    prefill, decode = (load(case.folder, page_size=4, max_prefill_chunk=7) for _ in range(2))
    decode.fingerprint.require_compatible(prefill.fingerprint)
    prompt = case.prompts[5]
    reservation = decode.reserve(spec("s", prompt))
    assert reservation is not None
    prefill.listener = _Shipper(prefill, decode, reservation.page_ids)

    first = run(prefill, [spec("s", prompt, hold_kv=True)])["s"]
    assert prefill.release(SequenceId("s"))
    decode.admit(reservation, first)
    rest: list[int] = []
    while decode.has_work:
        rest.extend(token for chunk in decode.step().chunks for token in chunk.token_ids)

    assert (*first, *rest) == case.expected[5]
    assert len(first) == 1
    prefill.check_integrity()
    decode.check_integrity()


class _Shipper:
    """Copies whatever pages a step completes or touches, layer by layer, as a transport would."""

    def __init__(self, source: Engine, target: Engine, target_pages: Sequence[int]) -> None:
        self._source, self._target, self._target_pages = source, target, target_pages

    def sequence_started(self, spec: SequenceSpec, num_cached_tokens: int, page_ids: Sequence[int]) -> None:
        assert num_cached_tokens == 0

    def step_planned(self, plan: StepPlan) -> Callable[[int], None]:
        def layer_stored(layer: int) -> None:
            size = self._source.layout.page_bytes(layer)
            source, target = self._source.pool.layer_bytes(layer), self._target.pool.layer_bytes(layer)
            for item in plan.items:
                for i in range(item.start // 4, -(-(item.start + len(item.token_ids)) // 4)):
                    page, other = item.page_ids[i] * size, self._target_pages[i] * size
                    target[other : other + size] = source[page : page + size]

        return layer_stored


@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_resumed_elsewhere(family: str, example: Callable[[str], Example]) -> None:
    case = example(family)
    engine = load(case.folder, page_size=4)

    resumed = run(engine, [spec("b", case.prompts[4], case.expected[4][:6])])["b"]

    assert resumed == case.expected[4][6:]


def test_sdpa_backend(example: Callable[[str], Example]) -> None:
    for family in ("llama", "mistral", "deepseek_v3", "gpt_oss"):
        case = example(family)
        engine = load(case.folder, page_size=16, max_prefill_chunk=7, attention="sdpa")
        assert tokens(engine, case, "all at once") == case.expected
