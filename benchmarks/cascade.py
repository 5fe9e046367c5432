"""What does it give to read a prefix once that the sequences of a decode step share, and from which size on?

    python -m benchmarks.cascade [--json FILE] [--shapes BATCHxSHARED[/GROUPS] ...] [--arms never always] [--rehearse]

Two engines, one after the other on the same GPU, with a Llama of 8B parameters in bfloat16 and random weights: one
reads shared pages for each sequence (``engine.cascade_attention: never``), one once (``always``). The prefix cache
holds the shared tokens (of each of several groups); then a batch of prompts comes that begin with them and have 256 of
their own each. Steps: the
median time between steps of the whole batch. Floors are the bytes of weights and of K/V as each arm must read them, at
the measured bandwidth: what many sequences read within a step may come from the GPU's L2 cache, so ``never`` can be
below its floor. ``auto`` says what ``engine.cascade_attention: auto`` does. Figures: the start and the memory left
after it, which differ by the second set of decode graphs.
"""

from __future__ import annotations

import argparse
import gc
import statistics
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from benchmarks import report
from benchmarks.engine import FULL, REHEARSAL, TIMED_STEPS, WARM_STEPS, Bench, Scale, make_engine
from benchmarks.engine_floors import Floors, ModelCost, measure_floors
from benchmarks.report import Cell
from core.clock import WallClock
from engine.shared_prefixes import CascadeTerms

COLUMNS = {
    "what": "sequences x shared tokens / groups",
    "never_ms": "each, ms",
    "never_floor_ms": "floor",
    "always_ms": "once, ms",
    "always_floor_ms": "floor",
    "speedup": "each/once",
    "auto": "auto",
}
SHAPES = (*((batch, shared, 1) for batch in (16, 64, 256) for shared in (2048, 8192)), (64, 8192, 4))
OWN_TOKENS = 256
REHEARSAL_SHAPES, REHEARSAL_OWN_TOKENS = ((8, 64, 1), (8, 16, 2)), 16
ARMS = ("never", "always")


@dataclass(frozen=True)
class Shape:
    """Sequences that begin with the same tokens, as their group, and have some of their own."""

    batch: int
    shared: int
    groups: int
    own: int

    @property
    def text(self) -> str:
        """As in the table."""
        return f"{self.batch} x {self.shared:,}" + (f" / {self.groups}" if self.groups > 1 else "")

    def kv_tokens(self, arm: str) -> int:
        """Whose K/V a step in the middle of those that are timed must read."""
        own = self.own + WARM_STEPS + TIMED_STEPS // 2
        times = self.batch if arm == "never" else self.groups
        return times * self.shared + self.batch * own


def main(arguments: Sequence[str] | None = None) -> int:
    options = _parse(arguments)
    console = Console(highlight=False)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if device.type != "cuda" and not options.rehearse:
        console.print("no GPU here: --rehearse runs a tiny model on CPU")
        return 2
    own = REHEARSAL_OWN_TOKENS if options.rehearse else OWN_TOKENS
    asked = options.shapes or (REHEARSAL_SHAPES if options.rehearse else SHAPES)
    shapes = [Shape(batch, shared, groups, own) for batch, shared, groups in asked]
    scale = REHEARSAL if options.rehearse else FULL
    floors = measure_floors(device, 1.0 if device.type == "cuda" else 0.02)
    console.print(floors.text)
    torch.cuda.empty_cache()  # nothing on CPU
    rows: list[dict[str, Cell]] = [{"what": shape.text} for shape in shapes]
    figures: dict[str, float] = dict(floors.figures)
    for arm in options.arms:
        _measure(arm, scale, shapes, device, floors, rows, figures, console)
        gc.collect()  # its memory is the next engine's
        torch.cuda.empty_cache()
        for row in rows:
            never, always = row.get("never_ms"), row.get("always_ms")
            if isinstance(never, float) and isinstance(always, float):
                row["speedup"] = never / always
        result = report.Report("cascade", report.commit(), report.machine(), rows, figures)
        if options.json is not None:
            result.write_json(options.json)  # after every arm: a run may be cut short
    result.print_table(COLUMNS, "decode steps with a shared beginning")
    return 0


def _measure(
    arm: str,
    scale: Scale,
    shapes: Sequence[Shape],
    device: torch.device,
    floors: Floors,
    rows: Sequence[dict[str, Cell]],
    figures: dict[str, float],
    console: Console,
) -> None:
    clock = WallClock()
    began_at = clock.now()
    more: dict[str, Any] = {"prefix_cache": True, "cascade_attention": arm, "decode_graphs": "always"}
    if device.type != "cuda":
        more["max_batch_size"] = max(shape.batch for shape in shapes)
    engine = make_engine(scale, device, **more)
    bench = Bench(engine, scale)
    figures[f"{arm}_start_s"] = clock.now() - began_at
    if device.type == "cuda":
        torch.cuda.empty_cache()
        figures[f"{arm}_free_gib"] = torch.cuda.mem_get_info()[0] / (1 << 30)  # pages take as much in both
    modes = engine.modes()
    console.print(
        f"{arm}: ready in {figures[f'{arm}_start_s']:.1f} s: {modes.attention}, {modes.forward} {modes.forward_reason}"
    )
    cost, terms = ModelCost.of(engine), CascadeTerms.of(engine.layout)
    for shape, row in zip(shapes, rows, strict=True):
        before = engine.modes().num_cascade
        seconds = bench.decode(shape.batch, shape.own, shape.shared, shape.groups)
        row[f"{arm}_ms"] = statistics.median(seconds) * 1e3
        row[f"{arm}_max_ms"] = max(seconds) * 1e3
        floor_bytes = cost.weight_bytes + shape.kv_tokens(arm) * cost.kv_token_bytes
        row[f"{arm}_floor_ms"] = floor_bytes / floors.bytes_per_s * 1e3
        row[f"{arm}_cascade_steps"] = engine.modes().num_cascade - before
        if terms is not None:
            pages = shape.shared // terms.page_size
            tables = [
                tuple(range(pages * (i % shape.groups), pages * (i % shape.groups + 1))) for i in range(shape.batch)
            ]
            pays = bool(terms.groups(tables, [shape.shared] * shape.batch))
            row["auto"] = "once" if pays else "each"
        console.print(f"{arm}, {shape.text}: {row[f'{arm}_ms']:.2f} ms")


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--json", type=Path, help="write the report here")
    parser.add_argument("--shapes", nargs="+", type=_shape, help="as 64x2048, or 64x2048/4 in groups")
    parser.add_argument("--arms", nargs="+", choices=ARMS, default=list(ARMS))
    parser.add_argument("--rehearse", action="store_true", help="a tiny model, on whatever is here")
    return parser.parse_args(arguments)


def _shape(text: str) -> tuple[int, int, int]:
    batch, _, rest = text.partition("x")
    shared, _, groups = rest.partition("/")
    return int(batch), int(shared), int(groups or 1)


if __name__ == "__main__":
    sys.exit(main())
