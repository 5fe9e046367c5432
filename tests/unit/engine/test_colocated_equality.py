"""However prompts and decoding share an engine, greedy tokens are those of ``transformers.generate``."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from functools import cache
from itertools import count
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from core.clock import VirtualClock
from core.request import SamplingParams, SequenceId, SequenceSpec
from engine.config import EngineConfig
from engine.engine import Engine, StepOutput
from engine.phase_streams import Partition, PhaseStreams
from engine.sampler import Sampled
from tests.tiny_models import VOCAB_SIZE, generate_with, save_tiny_model

NUM_TOKENS = 12
LENGTHS = (3, 17, 40, 64, 9, 30)

Example = tuple[Path, tuple[tuple[int, ...], ...], tuple[tuple[int, ...], ...]]


@pytest.fixture(scope="module")
def example(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Example]:
    @cache
    def make(family: str) -> Example:
        folder = save_tiny_model(family, tmp_path_factory.mktemp("models") / family)
        model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager")
        draw = random.Random(family)
        prompts = tuple(tuple(draw.randrange(1, VOCAB_SIZE) for _ in range(n)) for n in LENGTHS)
        return folder, prompts, tuple(tuple(generate_with(model, list(prompt), NUM_TOKENS)) for prompt in prompts)

    return make


class Talk:
    """An engine to which prompts come one by one, and what it said."""

    def __init__(self, folder: Path, **settings: Any) -> None:
        config = EngineConfig(
            **{
                "device": "cpu",
                "threads": 1,
                "dtype": "float32",
                "page_size": 4,
                "num_pages": 100,
                "max_batch_tokens": 48,
                "max_batch_size": 8,
                "tpot_slo_s": 1e-9,  # no group of layers and no chunk is short enough
                **settings,
            }
        )
        self.engine = Engine.load_model(config, str(folder), VirtualClock())
        self.said: dict[str, tuple[int, ...]] = {}

    def add(self, name: str, prompt: Sequence[int]) -> None:
        sampling = SamplingParams(max_tokens=NUM_TOKENS, temperature=0.0)
        self.engine.add(SequenceSpec(SequenceId(name), tuple(prompt), sampling))
        self.said[name] = ()

    def book(self, output: StepOutput) -> None:
        assert not output.failures
        for chunk in output.chunks:
            self.said[chunk.sequence_id] += chunk.token_ids

    def step(self) -> None:
        self.book(self.engine.step())

    def drain(self) -> None:
        while self.engine.has_work:
            self.step()
        self.engine.check_integrity()


@pytest.mark.parametrize("mode", ["chunked", "layered", "partitioned"])
@pytest.mark.parametrize("family", ["llama", "qwen3_moe", "gemma3"])
def test_prompts_that_come_while_others_decode(mode: str, family: str, example: Callable[[str], Example]) -> None:
    folder, prompts, expected = example(family)
    talk = Talk(folder, colocated_mode=mode)
    for number, prompt in enumerate(prompts):
        talk.add(str(number), prompt)
        talk.step()
        talk.step()
    talk.drain()
    assert tuple(talk.said.values()) == expected
    modes = talk.engine.modes()
    assert modes.colocated == mode
    assert (modes.num_decode_beside > 0) == (mode != "chunked")
    assert (dict(modes.prompt_steps).get("least", 0) > 0) == (mode == "chunked")


class Overlapping(PhaseStreams):
    """As if two steps were computed at the same time."""

    overlaps = True


@pytest.mark.parametrize("mode", ["chunked", "layered", "partitioned", "late"])
def test_preempted_and_aborted_in_the_middle_of_a_prompt(
    mode: str, example: Callable[[str], Example], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Calls come between layers, as on the engine's thread; there are pages for about half of what is asked. ``late``:
    tokens are there two looks later, as on a GPU, so decoding is under way when prompts begin and end."""
    folder, prompts, expected = example("llama")
    if mode == "late":
        mode, looked = "partitioned", count()
        monkeypatch.setattr(Sampled, "is_ready", property(lambda _: next(looked) % 3 == 2))
        streams = Overlapping((Partition(1.0, None), Partition(0.5, None)), None, "")
        monkeypatch.setattr("engine.engine_parts.streams_for", lambda *_: streams)
    talk = Talk(folder, colocated_mode=mode, num_pages=20, decode_graphs="always", plan_ahead="always")
    engine, looks = talk.engine, 0

    def between_layers() -> None:
        nonlocal looks
        looks += 1
        if looks % 5 == 0:
            engine.abort(SequenceId(f"gone-{looks // 5}"))
        talk.book(engine.step_between())

    if mode != "chunked":
        engine.between_layers = between_layers
    for number, prompt in enumerate(prompts):
        talk.add(f"gone-{number}", prompt[:9])
        talk.add(str(number), prompt)
        talk.step()
    for number in range(len(prompts)):
        engine.abort(SequenceId(f"gone-{number}"))
    talk.drain()
    assert tuple(said for name, said in talk.said.items() if not name.startswith("gone")) == expected
    assert all(
        said == full[: len(said)]
        for name, said in talk.said.items()
        if name.startswith("gone")
        for full in [_said_of(example, prompts[int(name[5:])][:9])]
    )
    assert engine.load().num_preemptions > 0


@cache
def _said_of(example: Callable[[str], Example], prompt: tuple[int, ...]) -> tuple[int, ...]:
    folder, _, _ = example("llama")
    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager")
    return tuple(generate_with(model, list(prompt), NUM_TOKENS))
