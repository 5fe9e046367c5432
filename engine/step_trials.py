"""What do steps take on this engine, before anybody asks it for anything? A few are tried at the start.

Without them the first prompts would be planned blindly: a roofline knows the weights, but not this attention backend,
this compiler or this CPU. Some seconds on a slow machine, a fraction of one on a GPU.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager
from typing import Any

from core.clock import Clock
from core.compute import StepSample
from core.request import SamplingParams, SequenceId
from engine.config import EngineConfig
from engine.model_runner import ModelRunner
from engine.step_plan import StepItem, StepPlan

PROMPTS = (64, 256, 1024, 4096)  # tokens
BATCHES = ((1, 1), (8, 1), (64, 1), (8, 4096), (64, 1024))  # (sequences, tokens of each)
_LONGEST_S = 1.0  # what takes longer is the last of its kind
_RUNS = 3  # of each, of which the first warms up


def try_steps(
    runner: ModelRunner,
    config: EngineConfig,
    clock: Clock,
    max_model_len: int,
    partitions: Sequence[AbstractContextManager[Any]] = (),
) -> list[tuple[StepSample, float]]:
    """Compute prompts and decoding steps of some sizes: what ``StepClock.observe`` takes of each. Writes to the pool:
    run it before anything is stored.

    ``partitions``: within each of them the longest prompt is computed once, so that its memory is there later: to ask
    the driver for it stops the whole device.
    """
    samples: list[tuple[StepSample, float]] = []
    pages, size = runner.pool.num_pages, runner.pool.layout.page_size
    longest = min(config.step_tokens, max_model_len - 1, pages * size)
    for num_tokens in _some(PROMPTS, longest):
        plan = StepPlan((_item(num_tokens, 0, range(-(-num_tokens // size))),))
        seconds, launch_s = _seconds_of(runner, plan, clock)
        samples.append((StepSample(num_tokens, num_tokens * num_tokens / 2, 0, 0, seconds), launch_s))
        if seconds > _LONGEST_S:
            break
    longest_prompt, _ = samples[-1]
    samples[-1] = (longest_prompt, 0.0)  # whatever it waited for: without it nothing bounds what a token takes
    for batch, context in BATCHES:
        batch, context = min(batch, config.max_batch_size), min(context, longest)
        # What they compute does not matter, only how much is read: from pages of their own, else from a cache.
        each = -(-context // size)
        firsts = [number * each % (pages - each + 1) for number in range(batch)]
        items = tuple(_item(1, context - 1, range(first, first + each)) for first in firsts)
        seconds, launch_s = _seconds_of(runner, StepPlan(items), clock)
        samples.append((StepSample(0, 0.0, batch, batch * context, seconds), launch_s))
    for partition in partitions:
        with partition:
            runner.run(StepPlan((_item(longest, 0, range(-(-longest // size))),)))
        runner.wait()
    return samples


def _some(sizes: tuple[int, ...], most: int) -> Iterator[int]:
    yield from (size for size in sizes if size <= most)
    if most < sizes[0]:
        yield most


def _seconds_of(runner: ModelRunner, plan: StepPlan, clock: Clock) -> tuple[float, float]:
    """(of a step, for launching it on a GPU or else 0), each the quickest of some."""
    times, launches = [], []
    for _ in range(_RUNS):
        began_at = clock.now()
        runner.run(plan)
        launches.append(clock.now() - began_at)
        runner.wait()
        times.append(clock.now() - began_at)
    launch_s = min(launches[1:]) if runner.pool.device.type == "cuda" else 0.0
    return max(min(times[1:]), 1e-6), launch_s


def _item(num_tokens: int, start: int, page_ids: range | tuple[int, ...]) -> StepItem:
    tokens = (1,) * num_tokens
    name = SequenceId("trial")
    return StepItem(name, tokens, start, tuple(page_ids), True, SamplingParams(), array("q", tokens), num_tokens)
