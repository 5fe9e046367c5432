"""Tokens are those of ``transformers.generate`` whatever tier their prefix came back from, and the stats say which."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from pathlib import Path
from threading import Event
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from core.cache_tiers import ReloadOutcome, ReloadReport, Tier
from core.clock import WallClock
from core.errors import InvalidConfig
from core.request import SamplingParams, SequenceId, SequenceSpec, StageStats, TokenChunk
from engine.config import EngineConfig
from engine.engine import Engine, StepOutput
from engine.engine_thread import EngineThread
from engine.reload_choice import PrefillCost
from engine.reload_costs import ReloadCosts
from tests.tiny_models import VOCAB_SIZE, generate_with, save_tiny_model

PAGE_SIZE, NUM_TOKENS = 4, 6
PROMPT_TOKENS = 50
RELOADED = (PROMPT_TOKENS - 1) // PAGE_SIZE * PAGE_SIZE
BIG = 1 << 24  # bytes: everything


class Example:
    """Two models of different layouts, prompts, and what transformers goes on with."""

    def __init__(self, family: str, folder: Path) -> None:
        self.folder = save_tiny_model(family, folder)
        model: Any = AutoModelForCausalLM.from_pretrained(self.folder, dtype=torch.float32, attn_implementation="eager")
        draw = random.Random(family)
        self.prompts = [tuple(draw.randrange(1, VOCAB_SIZE) for _ in range(PROMPT_TOKENS)) for _ in range(5)]
        self.expected = [tuple(generate_with(model, list(prompt), NUM_TOKENS)) for prompt in self.prompts]


@pytest.fixture(scope="module", params=["llama", "gemma3"])
def example(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Example:
    return Example(request.param, tmp_path_factory.mktemp("models") / "model")


@pytest.fixture(autouse=True)
def loading_is_faster(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tiny models compute faster than a thread wakes up."""
    monkeypatch.setattr(ReloadCosts, "prefill", property(lambda self: PrefillCost(1.0, 1.0, 0.0, 64)))


@pytest.fixture
def engines(example: Example, tmp_path: Path) -> Iterator[Any]:
    """Makes engines, one after the other, on one folder; each is whole when it is left."""
    made: list[Engine] = []

    def close() -> None:
        for engine in made:
            settle(engine)
            engine.check_integrity()
            engine.close()
        made.clear()

    def make(**settings: Any) -> Engine:
        close()
        config = EngineConfig(
            **{
                "device": "cpu",
                "threads": 1,
                "dtype": "float32",
                "page_size": PAGE_SIZE,
                "num_pages": 36,
                "disk_cache_dir": str(tmp_path / "pages"),
                **settings,
            }
        )
        made.append(Engine.load_model(config, str(example.folder), WallClock()))
        return made[0]

    yield make
    close()


def settle(engine: Engine) -> None:
    """Compute and copy until there is nothing more to do."""
    while True:
        assert engine.wait_for_copies()
        if not engine.has_work:
            return
        assert not engine.step().failures


def ask(engine: Engine, prompt: Sequence[int], name: str = "a") -> tuple[tuple[int, ...], StageStats]:
    """Tokens of one prompt, and what the engine says of it; copies are done before and after."""
    settle(engine)
    engine.add(SequenceSpec(SequenceId(name), tuple(prompt), SamplingParams(max_tokens=NUM_TOKENS, temperature=0.0)))
    chunks: list[TokenChunk] = []
    while len(chunks) < NUM_TOKENS:
        assert engine.wait_for_copies()
        chunks += engine.step().chunks
    settle(engine)
    stats = chunks[0].stats
    assert stats is not None
    return tuple(token for chunk in chunks for token in chunk.token_ids), stats


def ask_all(engine: Engine, example: Example) -> list[StageStats]:
    """Every prompt once; together they are more than the device holds."""
    answers = [ask(engine, prompt) for prompt in example.prompts]
    assert [tokens for tokens, _ in answers] == example.expected
    return [stats for _, stats in answers]


def reloaded(stats: StageStats) -> ReloadReport:
    assert stats.reload is not None, "nothing was found below"
    return stats.reload


def test_from_host_memory(example: Example, engines: Any) -> None:
    engine = engines(host_cache_bytes=BIG)
    ask_all(engine, example)

    for stats in ask_all(engine, example)[:3]:
        assert reloaded(stats).outcome is ReloadOutcome.LOADED
        assert stats.cached_tokens == reloaded(stats).host_tokens == RELOADED
    assert engine.load().pages_lost == 0


def test_from_disk_where_host_memory_is_small_and_again_after_a_restart(example: Example, engines: Any) -> None:
    engine = engines(host_cache_bytes=BIG, disk_cache_bytes=4 * BIG)
    page_bytes = engine.layout.bytes_per_page
    engine = engines(host_cache_bytes=16 * page_bytes, disk_cache_bytes=4 * BIG)
    ask_all(engine, example)
    stats = ask_all(engine, example)[0]
    assert stats.cached_tokens == RELOADED
    assert reloaded(stats).disk_tokens > 0
    num_files = engine.load().tiers[1].pages_used

    engine = engines(host_cache_bytes=BIG, disk_cache_bytes=4 * BIG)

    assert engine.load().tiers[1].pages_used == num_files
    found = [reloaded(stats) for stats in ask_all(engine, example)[:3]]
    assert [report.disk_tokens for report in found] == [RELOADED] * 3
    host, disk = engine.load().tiers
    assert (host.tier, disk.tier) == (Tier.HOST, Tier.DISK)
    assert disk.loaded_tokens >= 3 * RELOADED


def test_a_flipped_bit_on_disk_is_computed_again_and_counted(example: Example, engines: Any, tmp_path: Path) -> None:
    engine = engines(host_cache_bytes=BIG, disk_cache_bytes=4 * BIG)
    ask_all(engine, example)
    engine = engines(host_cache_bytes=BIG, disk_cache_bytes=4 * BIG)  # closes the one before
    files = [path for path in (tmp_path / "pages").rglob("*") if path.is_file() and path.name != "lock"]
    assert files
    for path in files:
        data = bytearray(path.read_bytes())
        data[-7] ^= 1
        path.write_bytes(data)

    stats = ask_all(engine, example)[0]

    assert (reloaded(stats).outcome, reloaded(stats).num_tokens, stats.cached_tokens) == (ReloadOutcome.PARTLY, 0, 0)
    assert engine.load().tiers[1].damaged_pages >= len(example.prompts)


def test_preempted_and_crowded_while_pages_go_up_and_down(example: Example, engines: Any) -> None:
    engine = engines(host_cache_bytes=BIG, num_pages=26, max_prefill_chunk=7)
    for turn in range(3):
        expected = dict(zip((f"{turn}-{i}" for i in range(5)), example.expected, strict=True))
        outputs: dict[str, tuple[int, ...]] = dict.fromkeys(expected, ())
        for name, prompt in zip(expected, example.prompts, strict=True):
            sampling = SamplingParams(max_tokens=NUM_TOKENS, temperature=0.0)
            engine.add(SequenceSpec(SequenceId(name), prompt, sampling))
        while any(len(tokens) < NUM_TOKENS for tokens in outputs.values()):
            if not engine.has_work:
                assert engine.wait_for_copies()
            for chunk in engine.step().chunks:
                outputs[chunk.sequence_id] += chunk.token_ids
        assert outputs == expected
    assert engine.load().tiers[0].loaded_tokens > 0


def test_a_thread_that_sleeps_wakes_up_for_a_load(example: Example, engines: Any) -> None:
    engine: Engine = engines(host_cache_bytes=BIG)
    tokens: list[int] = []
    ended = Event()

    def hear(output: StepOutput) -> None:
        for chunk in output.chunks:
            tokens.extend(chunk.token_ids)
            if chunk.finish_reason is not None:
                ended.set()

    thread = EngineThread(lambda: engine, hear)
    thread.start()
    for prompt, expected in zip(example.prompts * 2, example.expected * 2, strict=True):
        tokens.clear()
        ended.clear()
        spec = SequenceSpec(SequenceId("a"), prompt, SamplingParams(max_tokens=NUM_TOKENS, temperature=0.0))
        thread.submit(lambda engine, spec=spec: engine.add(spec)).result()
        assert ended.wait(20)
        assert tuple(tokens) == expected
    assert thread.stop(20)
    assert engine.load().tiers[0].loaded_tokens > 0


@pytest.mark.parametrize(
    ("settings", "field"),
    [
        ({"host_cache_bytes": 10}, "engine.host_cache_bytes"),
        ({"host_cache_bytes": BIG, "disk_cache_bytes": 10}, "engine.disk_cache_bytes"),
        ({"disk_cache_bytes": BIG}, "engine.disk_cache_bytes"),
        ({"host_cache_bytes": BIG, "prefix_cache": False}, "engine.host_cache_bytes"),
    ],
)
def test_sizes_that_hold_nothing_are_refused(engines: Any, settings: dict[str, Any], field: str) -> None:
    with pytest.raises(InvalidConfig, match=field):
        engines(**settings)
