"""Decoding beside prompts on a GPU: the same tokens, and kernels that stay on their part of it.

Skipped without a GPU.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from core.clock import WallClock
from core.request import SamplingParams, SequenceId, SequenceSpec
from engine.config import EngineConfig
from engine.engine import Engine
from engine.phase_streams import two_streams
from tests.tiny_engine import draw_prompts, greedy_tokens
from tests.tiny_models import save_tiny_model

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU here")

NUM_NEW = 24
LENGTHS = (5, 17, 40, 64, 200, 33, 120)


@pytest.mark.parametrize("mode", ["chunked", "layered", "partitioned"])
@pytest.mark.parametrize("family", ["llama", "qwen3_moe"])
def test_tokens_are_those_of_transformers(family: str, mode: str, tmp_path: Path) -> None:
    folder = save_tiny_model(family, tmp_path)
    prompts = draw_prompts(family, LENGTHS)
    expected = greedy_tokens(folder, prompts, NUM_NEW)
    config = EngineConfig(
        device="cuda",
        dtype="float32",
        page_size=16,
        num_pages=64,
        attention="sdpa",
        compile="never",
        max_batch_size=8,
        max_batch_tokens=128,
        colocated_mode=mode,
        tpot_slo_s=1e-6,
    )
    engine = Engine.load_model(config, str(folder), WallClock())
    said: dict[str, list[int]] = {str(number): [] for number in range(len(prompts))}
    waiting = list(enumerate(prompts))
    steps = 0
    while engine.has_work or waiting:
        if waiting and steps % 2 == 0:
            number, prompt = waiting.pop(0)
            sampling = SamplingParams(max_tokens=NUM_NEW, temperature=0.0)
            engine.add(SequenceSpec(SequenceId(str(number)), tuple(prompt), sampling))
        output = engine.step()
        assert not output.failures
        for chunk in output.chunks:
            said[chunk.sequence_id] += chunk.token_ids
        steps += 1
    assert list(said.values()) == expected
    engine.check_integrity()
    modes = engine.modes()
    assert modes.colocated == mode
    assert (modes.num_decode_beside > 0) == (mode != "chunked")
    print(modes)


def test_a_partition_has_fewer_multiprocessors_and_leaves_the_rest() -> None:
    """The same product takes longer on a smaller part; on the whole device as long as ever."""
    device = torch.device("cuda")
    before = torch.cuda.current_stream(device)
    try:
        streams = two_streams(device)
        assert not streams.reason, streams.reason
        shares = [partition.share for partition in streams.partitions]
        assert shares[0] == 1.0
        assert shares == sorted(shares, reverse=True)
        a = torch.randn(8192, 8192, device=device, dtype=torch.bfloat16)
        torch.cuda.synchronize()
        took = []
        for index in range(len(shares)):
            with streams.prompts(index):
                for _ in range(3):
                    a @ a
                begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
                begin.record()
                for _ in range(10):
                    a @ a
                end.record()
                end.synchronize()
            took.append(begin.elapsed_time(end) / 10)
        print({f"{share:.2f}": f"{ms:.2f} ms" for share, ms in zip(shares, took, strict=True)})
        assert took[-1] > 1.15 * took[0]
    finally:
        torch.cuda.set_stream(before)
