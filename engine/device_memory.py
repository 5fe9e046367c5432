"""How many pages does a GPU hold beside a model? What is left once the largest step has been computed.

``engine.gpu_memory_utilization`` of the device's memory may be in use, by whomever. Off that go the weights and all
else that is there when they are loaded, what the largest step takes at its height (computed once, eagerly, through
pages that nobody keeps), and an allowance for what an engine makes afterwards: graphs, and a second attention backend
where steps are held up. A transport's rings come out of what is not ours to use.
"""

from __future__ import annotations

import gc
import logging
from array import array
from dataclasses import dataclass

import torch
from transformers import PreTrainedModel

from core.errors import InvalidConfig
from core.request import SamplingParams, SequenceId
from engine.attention import create_backend
from engine.attention_choice import AttentionCase, choose_attention
from engine.cache_layout import CacheLayout
from engine.config import EngineConfig
from engine.model_runner import ModelRunner
from engine.page_pool import PagePool
from engine.sampler import Sampler
from engine.step_plan import StepItem, StepPlan

logger = logging.getLogger(__name__)

# Of an 8B model graphs for prompts take 0.5 to 0.7 GiB, those that read shared prefixes once 0.3; a second backend's
# work space is 0.4. Where that is more, it comes out of what the largest step takes at its height and others do not.
ALLOWANCE_BYTES = 1 << 30
_GIB = 1 << 30
_COSTLY = SamplingParams(temperature=1.0, top_p=0.999, min_p=1e-9, repetition_penalty=1.1, seed=0)


@dataclass(frozen=True, slots=True)
class DeviceMemory:
    """Bytes of one device. ``taken``: by weights, and by others. ``step``: by the largest step, at its height."""

    total: int
    taken: int
    step: int

    def room(self, utilization: float) -> int:
        """For pages; may be negative."""
        return int(self.total * utilization) - self.taken - self.step - ALLOWANCE_BYTES


def pages_that_fit(
    model: PreTrainedModel, layout: CacheLayout, attention: AttentionCase, config: EngineConfig, limit: int | None
) -> int:
    """Of a pool on the model's GPU, the current one. Of a divided model every rank asks at the same time.

    ``limit``: tokens of a sequence; None: any number. Raises ``InvalidConfig`` if there is no room.
    """
    memory, share = _measure(model, layout, attention, config, limit), config.gpu_memory_utilization
    room = memory.room(share)
    parts = (
        f"{share:g} of {memory.total / _GIB:.1f} GiB less {memory.taken / _GIB:.1f} that weights and others have, "
        f"{memory.step / _GIB:.1f} for a step of {config.max_batch_tokens} tokens and "
        f"{ALLOWANCE_BYTES / _GIB:.1f} for graphs"
    )
    if room < layout.bytes_per_page:
        raise InvalidConfig(
            "engine.gpu_memory_utilization",
            f"leaves no memory for K/V: {parts}; raise it, lower engine.max_batch_tokens, or give "
            "engine.kv_cache_bytes, as workers that share a GPU must",
        )
    num_pages = room // layout.bytes_per_page
    logger.info("%.1f GiB for K/V, %d tokens: %s", room / _GIB, num_pages * layout.page_size, parts)
    return num_pages


def _measure(
    model: PreTrainedModel, layout: CacheLayout, attention: AttentionCase, config: EngineConfig, limit: int | None
) -> DeviceMemory:
    _free()
    before = torch.cuda.memory_reserved()
    torch.cuda.reset_peak_memory_stats()
    try:
        pool_bytes = run_largest_step(model, layout, attention, config, limit)
    except torch.OutOfMemoryError as error:
        raise InvalidConfig(
            "engine.max_batch_tokens",
            f"must be small enough for a step to fit beside the weights, got {config.max_batch_tokens}",
        ) from error
    step = torch.cuda.max_memory_reserved() - before - pool_bytes
    _free()
    free, total = torch.cuda.mem_get_info()  # kernels have been loaded by now, which takes memory too
    return DeviceMemory(total, total - free, step)


@torch.inference_mode()
def run_largest_step(
    model: PreTrainedModel, layout: CacheLayout, attention: AttentionCase, config: EngineConfig, limit: int | None
) -> int:
    """Compute ``largest_step``, and choose its tokens; the bytes of the pool that it went through and that is gone."""
    plan = largest_step(config, layout.page_size, limit)
    pool = PagePool(layout, len(plan.items[-1].page_ids), model.device)
    name = choose_attention(config.attention, attention).name
    runner = ModelRunner(model, pool, create_backend(name, pool, config.compile_cache))
    flat = torch.zeros_like(runner.run(plan))  # of all distributions top_p takes most for this one: it sorts all of it
    Sampler().sample(flat, plan.sampling_items)
    return pool.num_pages * layout.bytes_per_page


def largest_step(config: EngineConfig, page_size: int, limit: int | None) -> StepPlan:
    """All the tokens that a step may hold in as many sequences as it may hold, the last ones as long as may be, and the
    first of one token. All go through the same pages: what they attend to does not matter."""
    longest = min(config.step_tokens, limit or config.step_tokens)
    lengths, left = [], config.max_batch_tokens
    for num_others in reversed(range(config.max_batch_size)):
        lengths.append(min(longest, left - num_others))
        left -= lengths[-1]
    page_ids = tuple(range(-(-longest // page_size)))
    return StepPlan(tuple(_item(length, page_ids) for length in reversed(lengths)))


def _item(length: int, page_ids: tuple[int, ...]) -> StepItem:
    tokens = (1,) * length
    return StepItem(SequenceId("largest"), tokens, 0, page_ids, True, _COSTLY, array("q", tokens), length)


def _free() -> None:
    """Give back what nobody names any more."""
    gc.collect()
    torch.cuda.empty_cache()
    torch.cuda.synchronize()
