"""The peer in one process: the same model in transformers, all requests of a wave handed over at once.

    python -m benchmarks.transformers_arm {static,continuous} MODEL_FOLDER DTYPE    waves on stdin, times on stdout

``static`` is ``generate`` on one left-padded batch, ``continuous`` is ``generate_batch``. Both run on as many
threads as the machine has cores, and see no network, no tokenizer and no client: what they give is an upper bound for
a server built on them. ``generate_batch`` makes its cache anew in every call, seconds on a CPU, which a
server would do once: its clock starts when its requests are accepted and stops at the last token.
One JSON line a wave in each direction, so that the parent can show progress.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from typing import Any

import torch
from transformers import (
    AutoModelForCausalLM,
    ContinuousBatchingConfig,
    GenerationConfig,
    StoppingCriteria,
    StoppingCriteriaList,
)
from transformers.utils import logging as transformers_logging

from benchmarks.measurement import RequestTimes, WaveTimes

# Models are Any here: by transformers' own annotations, PreTrainedModel has a Tensor for ``generate``.
Prompts = Sequence[Sequence[int]]
_PAD = 0


class _TokenInstants(StoppingCriteria):
    """Notes when each step of ``generate`` ended; stops nothing."""

    def __init__(self) -> None:
        self.instants: list[float] = []

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor, **kwargs: object) -> torch.Tensor:
        self.instants.append(time.perf_counter())
        return torch.zeros(input_ids.shape[0], dtype=torch.bool)


def run_static(model: Any, prompts: Prompts, num_new_tokens: int) -> WaveTimes:
    """One ``generate`` call on the left-padded batch."""
    width = max(len(prompt) for prompt in prompts)
    ids = torch.tensor([[_PAD] * (width - len(prompt)) + list(prompt) for prompt in prompts])
    mask = torch.tensor([[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts])
    steps = _TokenInstants()
    began_at = time.perf_counter()
    output = model.generate(
        input_ids=ids,
        attention_mask=mask,
        max_new_tokens=num_new_tokens,
        do_sample=False,
        stopping_criteria=StoppingCriteriaList([steps]),
    )
    wall_s = time.perf_counter() - began_at
    num_output_tokens = output.shape[1] - width
    times = RequestTimes(steps.instants[0] - began_at, steps.instants[-1] - began_at, num_output_tokens)
    return WaveTimes(wall_s, (times,) * len(prompts))


def run_continuous(model: Any, prompts: Prompts, num_new_tokens: int) -> WaveTimes:
    """One ``generate_batch`` call."""
    outputs = model.generate_batch(
        inputs=[list(prompt) for prompt in prompts],
        generation_config=GenerationConfig(
            max_new_tokens=num_new_tokens, do_sample=False, eos_token_id=None, pad_token_id=_PAD
        ),
        # By default it takes most of the free memory for its cache; 32 short requests need far less than a tenth.
        continuous_batching_config=ContinuousBatchingConfig(max_memory_percent=0.1),
        record_timestamps=True,
    ).values()
    assert len(outputs) == len(prompts), "generate_batch lost a request"
    began_at = min(output.created_time for output in outputs)
    times = [
        RequestTimes(output.timestamps[0] - began_at, output.timestamps[-1] - began_at, len(output.generated_tokens))
        for output in outputs
    ]
    return WaveTimes(max(request.e2e_s for request in times), tuple(times))


MODES: dict[str, Callable[[Any, Prompts, int], WaveTimes]] = {
    "static": run_static,
    "continuous": run_continuous,
}


def load(model_folder: str, dtype: str) -> Any:
    """The model, told that no token ends a sequence."""
    model = AutoModelForCausalLM.from_pretrained(model_folder, dtype=getattr(torch, dtype)).eval()
    model.generation_config.eos_token_id = None
    model.generation_config.pad_token_id = _PAD
    return model


def main(mode: str, model_folder: str, dtype: str) -> None:
    """Answer every wave on stdin with its times on stdout."""
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    torch.set_num_threads(os.cpu_count() or 1)
    model = load(model_folder, dtype)
    for line in sys.stdin:
        wave = json.loads(line)
        times = MODES[mode](model, wave["prompts"], wave["num_new_tokens"])
        print(json.dumps(asdict(times)), flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
