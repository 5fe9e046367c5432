"""One contestant of benchmarks/engine_cpu.py, in a process of its own: ours, or transformers' ``generate_batch``.

    python -m benchmarks.engine_cpu_arm {ours,eager,continuous} MODEL_FOLDER DTYPE THREADS

``ours`` has its layers compiled, ``eager`` has not. Says on stdout when it is ready, as
one JSON line, and answers each line {"prompts", "num_new_tokens"} on stdin with {"seconds", "cpu_s", "tokens"}; greedy,
no token ends a sequence. benchmarks/vllm_offline_arm.py is the same for vLLM.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Sequence
from itertools import count
from typing import Any

import torch
from transformers import AutoModelForCausalLM, ContinuousBatchingConfig, GenerationConfig
from transformers.utils import logging as transformers_logging

from core.clock import WallClock
from core.request import SamplingParams, SequenceId, SequenceSpec
from engine.config import EngineConfig
from engine.engine import Engine

Prompts = Sequence[Sequence[int]]
Outputs = list[list[int]]
Generate = Callable[[Prompts, int], tuple[float, Outputs]]  # seconds, and the tokens of each prompt

_KV_BYTES = 2 << 30
_MAX_BATCH = 64
_MAX_LEN = 4096


def ours(model_folder: str, dtype: str, threads: int, compile_layers: str) -> tuple[str, Generate]:
    """The engine, without a service around it."""
    config = EngineConfig(
        device="cpu",
        dtype=dtype,
        kv_cache_bytes=_KV_BYTES,
        max_model_len=_MAX_LEN,
        max_batch_size=_MAX_BATCH,
        prefix_cache=False,
        compile=compile_layers,
        threads=threads,
    )
    clock = WallClock()
    engine = Engine.load_model(config, model_folder, clock)
    numbers = count()

    def generate(prompts: Prompts, num_new_tokens: int) -> tuple[float, Outputs]:
        sampling = SamplingParams(max_tokens=num_new_tokens, temperature=0.0, ignore_eos=True)
        ids = [SequenceId(str(next(numbers))) for _ in prompts]
        began_at = clock.now()
        for sequence_id, prompt in zip(ids, prompts, strict=True):
            engine.add(SequenceSpec(sequence_id, tuple(prompt), sampling))
        found: dict[SequenceId, list[int]] = {sequence_id: [] for sequence_id in ids}
        while engine.has_work:
            output = engine.step()
            if output.failures:
                raise RuntimeError(output.failures[0].message)
            for chunk in output.chunks:
                found[chunk.sequence_id].extend(chunk.token_ids)
        return clock.now() - began_at, list(found.values())

    modes = engine.modes()
    return f"attention {modes.attention}, {modes.forward} {modes.forward_reason}".strip(), generate


def continuous(model_folder: str, dtype: str, threads: int) -> tuple[str, Generate]:
    """transformers' own continuous batching. Its cache is made in every call, so the clock starts when the requests
    are accepted."""
    torch.set_num_threads(threads)
    model: Any = AutoModelForCausalLM.from_pretrained(model_folder, dtype=getattr(torch, dtype)).eval()

    def generate(prompts: Prompts, num_new_tokens: int) -> tuple[float, Outputs]:
        outputs = model.generate_batch(
            inputs=[list(prompt) for prompt in prompts],
            generation_config=GenerationConfig(
                max_new_tokens=num_new_tokens, do_sample=False, eos_token_id=None, pad_token_id=0
            ),
            continuous_batching_config=ContinuousBatchingConfig(max_memory_percent=0.1),
            record_timestamps=True,
        )
        by_prompt = {tuple(output.prompt_ids): output for output in outputs.values()}
        assert len(by_prompt) == len(prompts), "generate_batch lost a request"
        began_at = min(output.created_time for output in by_prompt.values())
        seconds = max(output.timestamps[-1] for output in by_prompt.values()) - began_at
        return seconds, [list(by_prompt[tuple(prompt)].generated_tokens) for prompt in prompts]

    return "generate_batch", generate


def main(arm: str, model_folder: str, dtype: str, threads: str) -> None:
    """Answer every wave on stdin."""
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    began_at = time.perf_counter()
    if arm == "continuous":
        mode, generate = continuous(model_folder, dtype, int(threads))
    else:
        mode, generate = ours(model_folder, dtype, int(threads), "always" if arm == "ours" else "never")
    print(json.dumps({"start_s": time.perf_counter() - began_at, "mode": mode}), flush=True)
    for line in sys.stdin:
        wave = json.loads(line)
        cpu_began_at = time.process_time()
        seconds, tokens = generate(wave["prompts"], wave["num_new_tokens"])
        print(
            json.dumps({"seconds": seconds, "cpu_s": time.process_time() - cpu_began_at, "tokens": tokens}), flush=True
        )


if __name__ == "__main__":
    main(*sys.argv[1:])
