"""What do tests ask an engine with a tiny model, and what does transformers say on a CPU in float32?"""

from __future__ import annotations

import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, PreTrainedConfig

from core.request import SamplingParams, SequenceId, SequenceSpec, TokenChunk
from engine.engine import Engine
from tests.tiny_models import VOCAB_SIZE, generate_with

NUM_NEW = 10
PROMPT_LENGTHS = (1, 5, 16, 17, 40, 64)


def draw_prompts(seed: int | str, lengths: Sequence[int] = PROMPT_LENGTHS) -> list[list[int]]:
    """Random tokens, the same for the same seed."""
    draw = random.Random(seed)
    return [[draw.randrange(1, VOCAB_SIZE) for _ in range(length)] for length in lengths]


def load_reference(folder: Path) -> Any:
    """The checkpoint as transformers computes it, in float32 on the CPU."""
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager")


def save_in_bfloat16(config: PreTrainedConfig, seed: int, folder: Path) -> Any:
    """A checkpoint with random weights of that type; ``load_reference`` of it."""
    torch.manual_seed(seed)
    factory: Any = AutoModelForCausalLM
    factory.from_config(config, dtype=torch.bfloat16).save_pretrained(folder)
    return load_reference(folder)


def greedy_tokens(folder: Path, prompts: Sequence[Sequence[int]], num_new: int = NUM_NEW) -> list[list[int]]:
    """What ``transformers.generate`` says to each prompt."""
    model = load_reference(folder)
    return [list(generate_with(model, prompt, num_new)) for prompt in prompts]


def chunks(engine: Engine, prompts: Sequence[Sequence[int]], tag: str, **sampling: Any) -> list[list[TokenChunk]]:
    """What the engine says to prompts that come together; greedy unless ``sampling`` says otherwise."""
    params = SamplingParams(**{"max_tokens": NUM_NEW, "temperature": 0.0, **sampling})
    for number, prompt in enumerate(prompts):
        engine.add(SequenceSpec(SequenceId(f"{tag}/{number}"), tuple(prompt), params))
    found: list[list[TokenChunk]] = [[] for _ in prompts]
    while engine.has_work:
        output = engine.step()
        assert not output.failures
        for chunk in output.chunks:
            found[int(chunk.sequence_id.split("/")[1])].append(chunk)
    engine.check_integrity()
    return found


def run(engine: Engine, prompts: Sequence[Sequence[int]], tag: str = "s", **sampling: Any) -> list[list[int]]:
    """``chunks``, tokens only."""
    found = chunks(engine, prompts, tag, **sampling)
    return [[token for chunk in one for token in chunk.token_ids] for one in found]
