"""What is a prefix in a lower tier worth? Time to the first token of a prompt that was seen before, by where it lies.

    python -m benchmarks.cache_tiers [--json FILE] [--device cpu|cuda] [--lengths N ...] [--no-disk] [--quick]

    recomputed   nothing of it is known
    device       its pages are in the pool
    host         they were pushed out of it, and come back from host memory (pinned on a GPU)
    disk         a new engine finds them in files, of which the kernel was told to keep nothing in memory

On one engine with random weights: a model in Llama-3.1-8B's shape in bfloat16 on a GPU, a small one in float32 on a
CPU. ``choice`` says what the engine did by its own prediction (engine/reload_choice.py): it may compute what is faster
to compute. ``loaded in`` is from the order to the step that finds the pages, threads and books included, and GB/s is
over that time. The floor, in the same run, is one plain copy to the device of as many bytes as the longest prompt has,
from pinned memory on a GPU; of files it is a plain read of some of them, nothing checked or copied further.

Then decoding: the median time between the steps of a batch, alone and while pages go up, and while pages go down.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import statistics
import sys
import tempfile
import threading
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from rich.console import Console

from benchmarks import report
from benchmarks.head_of_line import CPU as SMALL
from benchmarks.head_of_line import CUDA as LARGE
from benchmarks.orderly_exit import exit_on_sigterm
from benchmarks.report import Cell
from core.cache_tiers import LOWER_TIERS, ReloadReport, Tier
from core.clock import WallClock
from core.request import SamplingParams, SequenceId, SequenceSpec
from engine.cache_layout import DTYPE_BYTES
from engine.config import EngineConfig
from engine.engine import Engine

PAGE_SIZE = 16
COLUMNS = {
    "tokens": "tokens",
    "where": "prefix in",
    "ttft_ms": "TTFT ms",
    "over_recomputed": "of recomputed",
    "choice": "choice",
    "predicted_ms": "predicted ms",
    "mb": "MB",
    "load_ms": "loaded in ms",
    "loaded_gb_per_s": "GB/s",
    "floor_gb_per_s": "floor GB/s",
    "over_floor": "of the floor",
}
STEP_COLUMNS = {
    "beside": "decoding beside",
    "steps": "steps",
    "step_p50_ms": "step P50 ms",
    "step_p90_ms": "P90 ms",
    "slower": "slower",
}


@dataclass(frozen=True)
class Scale:
    """The sizes of one kind of machine."""

    device: str
    dtype: str
    model: Mapping[str, object]
    lengths: Sequence[int]
    repeats: int
    batch: int  # sequences that decode
    context: int  # tokens of each


SCALES = {
    "cpu": Scale("cpu", "float32", SMALL.model, (256, 1024, 4096), 3, 4, 256),
    "cuda": Scale("cuda", "bfloat16", LARGE.model, (1024, 8192, 32768), 2, 16, 1024),
}


@dataclass(frozen=True)
class Answer:
    """One prompt's first token."""

    ttft_s: float
    cached_tokens: int
    reload: ReloadReport | None


class Bench:
    """One engine that is stepped here."""

    def __init__(self, scale: Scale, folder: Path, disk: Path | None, host_bytes: int, num_pages: int) -> None:
        self.clock = WallClock()
        self._woken = threading.Event()
        self.num_asked = 0
        self.engine = Engine.load_model(
            EngineConfig(
                device=scale.device,
                dtype=scale.dtype,
                page_size=PAGE_SIZE,
                num_pages=num_pages,
                max_batch_tokens=8192 if scale.device == "cuda" else 2048,
                max_batch_size=64,
                decode_graphs="never",
                host_cache_bytes=host_bytes,
                disk_cache_bytes=8 * host_bytes if disk is not None else 0,
                disk_cache_dir=str(disk or "unused"),
            ),
            f"dummy:{folder}",
            self.clock,
        )
        self.engine.wake = self._woken.set
        self._vocabulary = int(str(scale.model["vocab_size"]))
        self._max_tokens = num_pages * PAGE_SIZE - 64

    def close(self) -> None:
        self.settle()
        self.engine.check_integrity()
        self.engine.close()

    def settle(self) -> None:
        """Until nothing is to be computed or copied."""
        while True:
            self.engine.wait_for_copies()
            if not self.engine.has_work:
                return
            self.engine.step()

    def prompt(self, seed: int, num_tokens: int) -> tuple[int, ...]:
        """Of each seed and length another one from its first token on."""
        first = seed * 7919 + num_tokens * 101
        return tuple((first + 31 * i + i * i % 97) % self._vocabulary for i in range(num_tokens))

    def ask(self, prompt: Sequence[int]) -> Answer:
        """One token; the engine has nothing else to do."""
        self.settle()
        spec = self.spec(prompt, 1)
        began_at = self.clock.now()
        self.engine.add(spec)
        while True:
            self._woken.clear()
            if not self.engine.has_work:
                self._woken.wait(5.0)
            for chunk in self.engine.step().chunks:
                assert chunk.stats is not None, "the first chunk is the last"
                return Answer(self.clock.now() - began_at, chunk.stats.cached_tokens, chunk.stats.reload)

    def push_out(self) -> None:
        """Everything that the device caches is evicted, as if a prompt that fills it had come and gone."""
        self.settle()
        room = self.engine.reserve(self.spec(self.prompt(1000 + self.num_asked, self._max_tokens), 2))
        assert room is not None, "an idle engine has all its pages"
        self.engine.cancel(room)

    def decode(self, batch: int, context: int) -> Decoding:
        """Begin so many sequences that do not end soon."""
        for index in range(batch):
            self.engine.add(self.spec(self.prompt(500 + index, context), 4000))
        while self.engine.load().num_waiting or self.engine.load().num_waiting_tokens:
            self.engine.step()
        return Decoding(self)

    @property
    def stored_pages(self) -> int:
        """Pages that were copied to host memory."""
        return self.engine.load().tiers[0].stored_pages

    def tier(self, tier: Tier) -> tuple[int, float]:
        """(tokens that were loaded from there, bytes/s as it is predicted)."""
        state = next(state for state in self.engine.load().tiers if state.tier is tier)
        return state.loaded_tokens, state.load_bytes_per_s

    def spec(self, prompt: Sequence[int], max_tokens: int) -> SequenceSpec:
        self.num_asked += 1
        sampling = SamplingParams(max_tokens=max_tokens, temperature=0.0, ignore_eos=True)
        return SequenceSpec(SequenceId(f"s{self.num_asked}"), tuple(prompt), sampling)


class Decoding:
    """A batch under way."""

    def __init__(self, bench: Bench) -> None:
        self._bench = bench

    def steps(self, *, until: threading.Event | None = None, count: int = 1 << 30) -> list[float]:
        """Seconds of each step, until something has happened."""
        engine, clock = self._bench.engine, self._bench.clock
        seconds: list[float] = []
        before = clock.now()
        while len(seconds) < count and not (until is not None and until.is_set()):
            engine.step()
            now = clock.now()
            seconds.append(now - before)
            before = now
        return seconds


def main() -> int:
    """Measure, print, and write what is asked for."""
    options = _parser().parse_args()
    exit_on_sigterm()
    scale = SCALES[options.device]
    if options.quick:
        scale = replace(scale, lengths=scale.lengths[:2], repeats=1)
    if options.lengths:
        scale = replace(scale, lengths=tuple(options.lengths))
    with tempfile.TemporaryDirectory(prefix="prfaas-bench-") as folder:
        (Path(folder) / "config.json").write_text(json.dumps(scale.model), encoding="utf-8")
        rows, steps, figures = measure(scale, Path(folder), with_disk=not options.no_disk)
    machine = report.machine() | ({"gpu": torch.cuda.get_device_name()} if scale.device == "cuda" else {})
    finished = report.Report("cache_tiers", report.commit(), machine, rows, figures)
    replace(finished, figures={}).print_table(COLUMNS, f"First token of a prompt that was seen before, {scale.device}")
    title = f"A batch of {scale.batch} at {scale.context} tokens decodes"
    replace(finished, rows=steps).print_table(STEP_COLUMNS, title)
    if options.json is not None:
        replace(finished, rows=[*rows, *steps]).write_json(options.json)
    return 0


def measure(
    scale: Scale, folder: Path, *, with_disk: bool
) -> tuple[list[dict[str, Cell]], list[dict[str, Cell]], dict[str, float]]:
    """(rows of first tokens, rows of decode steps, figures)."""
    console = Console(stderr=True)
    longest = max(scale.lengths)
    num_pages = (longest + longest // 4 + scale.batch * (scale.context + 512)) // PAGE_SIZE
    disk = folder / "pages" if with_disk else None
    page_bytes = _page_bytes(scale)
    host_bytes = page_bytes * 2 * num_pages
    clock = WallClock()
    began_at = clock.now()
    bench = Bench(scale, folder, disk, host_bytes, num_pages)
    console.print(f"engine with {host_bytes / 1e9:.1f} GB of host memory after {clock.now() - began_at:.1f} s")
    floor = copy_floor(torch.device(scale.device), min(page_bytes * longest // PAGE_SIZE, 4 << 30))
    answers: dict[tuple[int, str], list[Answer]] = {}
    for length in scale.lengths:
        bench.ask(bench.prompt(900, length))  # kernels of these shapes are loaded
        for repeat in range(scale.repeats):
            prompt = bench.prompt(repeat, length)
            answers.setdefault((length, "recomputed"), []).append(bench.ask(prompt))
            answers.setdefault((length, "device"), []).append(bench.ask(prompt))
            bench.push_out()
            answers.setdefault((length, "host"), []).append(bench.ask(prompt))
            bench.push_out()
        console.print(f"{length} tokens: {clock.now() - began_at:.1f} s")
    steps = list(decode_beside(bench, scale))
    host_speed = bench.tier(Tier.HOST)[1]
    bench.close()
    del bench
    gc.collect()
    read_floor = None
    if disk is not None:
        read_floor = forget_files(disk)
        bench = Bench(scale, folder, disk, host_bytes, num_pages)
        for length in scale.lengths:
            bench.ask(bench.prompt(901, length))
            for repeat in range(scale.repeats):
                answers.setdefault((length, "disk"), []).append(bench.ask(bench.prompt(repeat, length)))
        bench.close()
    floors = {"host": floor, "disk": read_floor}
    rows = [row(answers, length, where, page_bytes, floors) for length, where in sorted(answers, key=_place)]
    figures = {"copy_floor_gb_per_s": floor / 1e9, "host_fit_gb_per_s": host_speed / 1e9}
    if read_floor is not None:
        figures["read_floor_gb_per_s"] = read_floor / 1e9
    for length in scale.lengths:
        for where in ("device", "host", "disk"):
            if (length, where) in answers:
                figures[f"{where}_over_recomputed_{length}"] = _median(answers[length, where]) / _median(
                    answers[length, "recomputed"]
                )
    figures |= {f"decode_slower_{r['beside']}": float(r["slower"]) for r in steps if r["slower"]}
    return rows, steps, figures


def row(
    answers: Mapping[tuple[int, str], Sequence[Answer]],
    length: int,
    where: str,
    page_bytes: int,
    floors: Mapping[str, float | None],
) -> dict[str, Cell]:
    """Medians of one length and place."""
    own = answers[length, where]
    made: dict[str, Cell] = {
        "tokens": length,
        "where": where,
        "ttft_ms": _median(own) * 1e3,
        "over_recomputed": _median(own) / _median(answers[length, "recomputed"]),
        "choice": ", ".join(sorted({str(a.reload.outcome) if a.reload else f"{a.cached_tokens} cached" for a in own})),
    }
    reloads = [a.reload for a in own if a.reload is not None and a.reload.num_tokens]
    if reloads:
        num_bytes = reloads[0].num_tokens // PAGE_SIZE * page_bytes
        seconds = statistics.median(one.seconds for one in reloads)
        made |= {
            "mb": num_bytes / 1e6,
            "predicted_ms": float(reloads[-1].reason.split(" s to load")[0]) * 1e3,
            "load_ms": seconds * 1e3,
            "loaded_gb_per_s": num_bytes / seconds / 1e9,
        }
        if (floor := floors.get(where)) is not None:
            made |= {"floor_gb_per_s": floor / 1e9, "over_floor": num_bytes / seconds / floor}
    return made


def decode_beside(bench: Bench, scale: Scale) -> Iterator[dict[str, Cell]]:
    """A row for each of: nothing else, a prompt's pages going up, pages going down."""
    longest = max(scale.lengths)
    prompts = [bench.prompt(seed, longest) for seed in (600, 601)]
    for prompt in prompts:
        bench.ask(prompt)
        bench.push_out()
    decoding = bench.decode(scale.batch, scale.context)
    decoding.steps(count=8)
    alone = decoding.steps(count=40)
    yield _step_row("nothing", alone, alone)
    up: list[float] = []
    down: list[float] = []
    for prompt in prompts * 2:  # each pushes the other out
        bench.engine.add(bench.spec(prompt, 1))
        # Steps between the load's beginning and its end; those of the prompt itself are left out.
        while True:
            loading = bench.engine.load().num_waiting
            seconds = decoding.steps(count=1)
            if not bench.engine.load().num_waiting:
                break
            if loading:
                up += seconds
        while bench.engine.load().num_waiting_tokens or bench.engine.load().num_running > scale.batch:
            decoding.steps(count=1)
    yield _step_row("loads", up, alone)
    for seed in range(3):
        bench.engine.add(bench.spec(bench.prompt(700 + seed, longest), 1))
        while bench.engine.load().num_running > scale.batch or bench.engine.load().num_waiting:
            decoding.steps(count=1)
        stored, num_idle, own = bench.stored_pages, 0, list[float]()
        while num_idle < 3:
            own += decoding.steps(count=1)
            num_idle = num_idle + 1 if bench.stored_pages == stored else 0
            stored = bench.stored_pages
        down += own[:-num_idle]
    yield _step_row("saves", down, alone)
    for name in [f"s{number}" for number in range(bench.num_asked + 1)]:
        bench.engine.abort(SequenceId(name))


def _step_row(beside: str, seconds: Sequence[float], alone: Sequence[float]) -> dict[str, Cell]:
    middle = statistics.median(seconds) if seconds else None
    return {
        "beside": beside,
        "steps": len(seconds),
        "step_p50_ms": None if middle is None else middle * 1e3,
        "step_p90_ms": None if middle is None else (report.percentile(seconds, 90) or 0.0) * 1e3,
        "slower": None if middle is None else middle / statistics.median(alone),
    }


def copy_floor(device: torch.device, num_bytes: int) -> float:
    """Bytes/s of one plain copy to the device: from pinned memory, or within a CPU's memory; the best of five."""
    source = torch.empty(num_bytes, dtype=torch.uint8, pin_memory=device.type == "cuda")
    target = torch.empty(num_bytes, dtype=torch.uint8, device=device)
    clock, best = WallClock(), float("inf")
    for _ in range(5):
        if device.type == "cuda":
            torch.cuda.synchronize()
        began_at = clock.now()
        target.copy_(source, non_blocking=True)
        if device.type == "cuda":
            torch.cuda.synchronize()
        best = min(best, clock.now() - began_at)
    return num_bytes / best


def forget_files(folder: Path) -> float:
    """Write the files out and have the kernel forget them; bytes/s of a plain read of them, after which again."""
    paths = [path for path in folder.rglob("*") if path.is_file()]

    def forget() -> None:
        for path in paths:
            handle = os.open(path, os.O_RDONLY)
            os.fsync(handle)
            os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_DONTNEED)
            os.close(handle)

    forget()
    clock = WallClock()
    sample = paths[:: max(1, len(paths) // 200)]
    began_at = clock.now()
    num_bytes = sum(len(path.read_bytes()) for path in sample)
    seconds = clock.now() - began_at
    forget()
    return num_bytes / seconds


def _page_bytes(scale: Scale) -> int:
    numbers = {name: int(str(scale.model[name])) for name in ("num_hidden_layers", "num_key_value_heads", "head_dim")}
    itemsize = DTYPE_BYTES[scale.dtype]
    return (
        2 * numbers["num_hidden_layers"] * numbers["num_key_value_heads"] * numbers["head_dim"] * itemsize * PAGE_SIZE
    )


def _median(answers: Sequence[Answer]) -> float:
    return statistics.median(answer.ttft_s for answer in answers)


def _place(key: tuple[int, str]) -> tuple[int, int]:
    order = ("recomputed", Tier.DEVICE.value, *(tier.value for tier in LOWER_TIERS))
    return key[0], order.index(key[1])


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.cache_tiers", description=(__doc__ or "").partition("\n\n")[0]
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the report there")
    parser.add_argument("--device", choices=tuple(SCALES), default="cpu", help="(default: cpu)")
    parser.add_argument("--lengths", type=int, nargs="+", metavar="N", help="tokens of the prompts")
    parser.add_argument("--no-disk", action="store_true", help="device and host memory alone")
    parser.add_argument("--quick", action="store_true", help="two lengths, once each")
    return parser


if __name__ == "__main__":
    sys.exit(main())
