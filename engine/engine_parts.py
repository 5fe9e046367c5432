"""What is an engine made of, as its config, its model and its device say? Each part is made of those before it.

    model ──> pool ──> runner        what computes steps, tried out and as fast as it gets
                  └──> allocator     whose pages are whose, over lower tiers of the prefix cache
    seconds of steps, tried out ──> scheduler     what is computed next
    grammars ──> sampler             which token comes next

The one caller of the parts is ``Engine``; what they are for is said where each is defined.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path

from core.clock import Clock
from core.errors import InvalidConfig
from core.fingerprint import CacheFingerprint
from engine.attention_choice import AttentionChoice
from engine.chunked_prefill import ChunkedPrefillScheduler
from engine.compiled_layers import keep_compiled_code
from engine.config import APART_MODES, EngineConfig
from engine.grammar import Grammars
from engine.model_loader import ModelDescription, load_model
from engine.model_runner import ModelRunner
from engine.model_source import resolve
from engine.page_allocator import PageAllocator
from engine.phase_streams import PhaseStreams
from engine.rank_steps import RankLeader
from engine.runner_setup import make_pool, make_runner, streams_for
from engine.sampler import Sampler
from engine.scheduler import Scheduler
from engine.step_seconds import StepClock
from engine.step_trials import try_steps
from engine.tiered_cache import TieredCache, open_cache
from engine.token_masks import TokenMasks

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class EngineParts:
    """One engine's. ``streams``: for decoding beside prompts; None: they share steps."""

    config: EngineConfig
    model: ModelDescription
    fingerprint: CacheFingerprint
    runner: ModelRunner
    attention: AttentionChoice
    streams: PhaseStreams | None
    step_clock: StepClock
    allocator: PageAllocator
    tiers: TieredCache | None
    scheduler: Scheduler
    grammars: Grammars
    sampler: Sampler

    @property
    def learns(self) -> bool:
        """Whether anybody asks what steps take."""
        return _learns(self.config, self.streams)

    @property
    def interrupts(self) -> bool:
        """Whether a step may be held up between two of its layers."""
        return self.config.prefill_order == "slack" and self.runner.may_be_held_up

    @property
    def plans_ahead(self) -> bool:
        """Whether a step may be launched before the one before it was read."""
        return self.config.switched_on("plan_ahead", self.runner.pool.device.type)


def load_parts(
    config: EngineConfig, model: str, clock: Clock, cache_dir: str | Path, leader: RankLeader | None
) -> EngineParts:
    """Load ``model`` and make the rest for it; raises as ``Engine.load_model`` says."""
    keep_compiled_code(config.compile_cache)
    loaded = load_model(resolve(model, cache_dir), config, None if leader is None else leader.group)
    pool = make_pool(config, loaded)
    if leader is not None:
        _require_that_ranks_can_follow(config)
    description = loaded.description
    streams = streams_for(config, loaded.device)
    runner, attention = make_runner(config, loaded, pool, leader, runs_beside=streams is not None)
    grammars = Grammars.of_model(loaded.folder, description.vocab_size, description.eos_token_ids)
    sampler = _make_sampler(config, description, grammars, clock)
    step_clock = _make_step_clock(config, description, runner, streams, clock)
    allocator, tiers = open_cache(config, pool, loaded.fingerprint, description.compute, clock)
    scheduler = _make_scheduler(config, description, allocator, tiers, step_clock)
    return EngineParts(
        config,
        description,
        loaded.fingerprint,
        runner,
        attention,
        streams,
        step_clock,
        allocator,
        tiers,
        scheduler,
        grammars,
        sampler,
    )


def _require_that_ranks_can_follow(config: EngineConfig) -> None:
    if config.colocated_mode in APART_MODES:
        allowed = f"must not be {config.colocated_mode} with tensor_parallel above 1: other ranks could not follow"
        raise InvalidConfig("engine.colocated_mode", allowed)
    if config.host_cache_bytes:
        allowed = "must be 0 with tensor_parallel above 1: pages of the other ranks would not be kept"
        raise InvalidConfig("engine.host_cache_bytes", f"{allowed}, got {config.host_cache_bytes}")


def _make_sampler(config: EngineConfig, model: ModelDescription, grammars: Grammars, clock: Clock) -> Sampler:
    masks = None if grammars.compiler is None else TokenMasks(grammars.compiler, 2 * config.max_batch_size, clock)
    return Sampler(model.eos_token_ids, masks)


def _learns(config: EngineConfig, streams: PhaseStreams | None) -> bool:
    return streams is not None or config.tpot_slo_s is not None


def _make_step_clock(
    config: EngineConfig, model: ModelDescription, runner: ModelRunner, streams: PhaseStreams | None, clock: Clock
) -> StepClock:
    """What steps take, tried out if anybody asks."""
    if not _learns(config, streams):
        return StepClock()
    partitions = [] if streams is None else [*map(streams.prompts, range(len(streams.partitions)))]
    step_clock = StepClock(try_steps(runner, config, clock, model.max_model_len, partitions))
    logger.info("steps take %s", step_clock.seconds)
    return step_clock


def _make_scheduler(
    config: EngineConfig,
    model: ModelDescription,
    allocator: PageAllocator,
    tiers: TieredCache | None,
    step_clock: StepClock,
) -> Scheduler:
    books = None if tiers is None else tiers.books
    return ChunkedPrefillScheduler(
        config, allocator, model.max_model_len, model.eos_token_ids, lambda: step_clock.seconds, books
    )
