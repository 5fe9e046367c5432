"""Which prompts share beginnings, as real ones do, and are short enough for this machine?

From a trace whose requests name the blocks of their prompts (Mooncake's conversations, shared/traces): whole
conversations of more than one turn, evenly from the whole trace (those that begin first begin all at once), until there
are enough requests. A block of 512 tokens becomes one page of 16, made up from its name, so equal blocks are equal
tokens; lengths shrink alike. Arrivals keep their order and proportions and are as many a second as asked for.

Without the trace, conversations are made up: one system prompt, turns that each add a few blocks.
"""

from __future__ import annotations

import random
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from cluster.workload_traces import MOONCAKE_BLOCK_TOKENS, TraceRequest, read_trace

TRACE = "mooncake_conversation_0000-1800s.jsonl.gz"
PAGE_TOKENS = 16
SCALE = MOONCAKE_BLOCK_TOKENS // PAGE_TOKENS  # trace tokens for each of ours
MIN_OUTPUT_TOKENS, MAX_OUTPUT_TOKENS = 2, 16
_FIRST_TOKEN, _LAST_TOKEN = 1000, 40_000  # plain words of the default model's vocabulary
_TICK_S = 3.0  # the trace's times lie on a grid of so many seconds; its requests are spread over it


@dataclass(frozen=True, slots=True)
class SharedPrompt:
    """One request: when it is sent, after the first, what it says, how much it wants."""

    at_s: float
    token_ids: tuple[int, ...]
    num_new_tokens: int


def shared_prompts(traces: Path | None, count: int, rate: float, max_tokens: int) -> list[SharedPrompt]:
    """``count`` requests at ``rate`` a second, in order. Prompts above ``max_tokens`` lose their ends. ``traces``: the
    folder of shared/traces; None: made-up conversations."""
    path = None if traces is None else traces / TRACE
    requests = made_up(count) if path is None or not path.is_file() else conversations(read_trace(path), count)
    times = _spread([request.arrival_s or 0.0 for request in requests])
    span_s = times[-1] or 1.0
    return [
        SharedPrompt(
            at_s=at * (len(requests) - 1) / rate / span_s,
            token_ids=_tokens(request)[:max_tokens],
            num_new_tokens=min(MAX_OUTPUT_TOKENS, max(MIN_OUTPUT_TOKENS, request.output_tokens // SCALE)),
        )
        for at, request in zip(times, requests, strict=True)
    ]


def conversations(requests: Iterable[TraceRequest], count: int) -> list[TraceRequest]:
    """Whole conversations of more than one turn, evenly from all that there are, cut to ``count`` requests.

    Every prompt of the trace begins with the same block, so the second block names the conversation.
    """
    turns: dict[str, list[TraceRequest]] = {}
    for request in requests:
        if len(request.prefix_blocks) > 1:
            turns.setdefault(request.prefix_blocks[1], []).append(request)
    several = [conversation for conversation in turns.values() if len(conversation) > 1]
    chosen: list[TraceRequest] = []
    for num_chosen in range(1, len(several) + 1):
        chosen = [turn for number in range(num_chosen) for turn in several[number * len(several) // num_chosen]]
        if len(chosen) >= count:
            break
    return sorted(chosen, key=lambda request: request.arrival_s or 0.0)[:count]


def made_up(count: int, seed: int = 0) -> list[TraceRequest]:
    """Conversations of four turns behind one system prompt of four blocks; each turn adds up to twelve."""
    draw = random.Random(seed)
    requests: list[TraceRequest] = []
    histories: list[list[str]] = [[f"system-{i}" for i in range(4)] for _ in range(-(-count // 4))]
    for number in range(count):
        turn, conversation = divmod(number, len(histories))
        history = histories[conversation]
        history += [f"{conversation}-{turn}-{block}" for block in range(draw.randint(4, 12))]
        tokens = len(history) * MOONCAKE_BLOCK_TOKENS - draw.randrange(MOONCAKE_BLOCK_TOKENS // 2)
        blocks = tuple(history)
        requests.append(
            TraceRequest(tokens, 320, float(number), prefix_blocks=blocks, block_tokens=MOONCAKE_BLOCK_TOKENS)
        )
    return requests


def ideal_hit_rate(prompts: Sequence[SharedPrompt]) -> float:
    """Share of the prompts' tokens that one endless cache of whole pages would have held when each came."""
    seen: set[tuple[int, ...]] = set()
    hits = 0
    for prompt in prompts:
        tokens = prompt.token_ids
        ends = range(PAGE_TOKENS, len(tokens) + 1, PAGE_TOKENS)
        hit = max((end for end in ends if end < len(tokens) and tokens[:end] in seen), default=0)
        hits += hit
        seen.update(tokens[:end] for end in ends)
    return hits / sum(len(prompt.token_ids) for prompt in prompts)


def _tokens(request: TraceRequest) -> tuple[int, ...]:
    """A page for each block; the last one is as full as the block was."""
    tokens: list[int] = []
    for block in request.prefix_blocks:
        draw = random.Random(block)
        tokens += [draw.randint(_FIRST_TOKEN, _LAST_TOKEN) for _ in range(PAGE_TOKENS)]
    return tuple(tokens[: max(1, round(request.input_tokens / SCALE))])


def _spread(times: Sequence[float]) -> list[float]:
    """Seconds since the first, those of one tick spread evenly over it."""
    spread: list[float] = []
    for index, at in enumerate(times):
        first, together = times.index(at), times.count(at)
        spread.append(at - times[0] + _TICK_S * (index - first) / together)
    return [at - spread[0] for at in spread]
