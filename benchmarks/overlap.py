"""How much of a hand-over hides behind prefill?

    python -m benchmarks.overlap [--json FILE] [--quick] [--rate GBIT/S] [--rounds N]

A real engine with a mid-size random model computes prompts on this CPU, in steps of a few chunk sizes, and a prefill
worker ships the K/V over tcp to another process on a shaped path (network_lab.py; without root: loopback, which the row
says), where it takes about as long as half a prefill. Compared in one run, in turns:

    while computed   in groups of so many layers (the sender itself joins those of less than half a MiB)
    after prefill    as peers do: the same code, its grant held back until the first token
    no shipping      what overlap costs prefill on shared cores

prefill: arrival to first token. Overlapped: bytes sent before that. Tail: first token to acknowledged commit, the time
by which a second token is later than without a hand-over.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from rich.console import Console

from benchmarks import report
from benchmarks.child_process import CallFailed, ChildProcess, Wrap
from benchmarks.network_lab import NetworkLab, NetworkPath, why_unavailable
from benchmarks.orderly_exit import exit_on_sigterm
from benchmarks.overlap_peer import PREFILL_TIMEOUT_S
from benchmarks.overlap_results import AFTER, ALONE, WHILE, Handover, Setting, figures, row
from benchmarks.report import Cell

NUM_LAYERS = 16
# About 0.2 billion parameters, 32 KiB of K/V per token.
MODEL = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 1024,
    "intermediate_size": 2816,
    "num_hidden_layers": NUM_LAYERS,
    "num_attention_heads": 16,
    "num_key_value_heads": 8,
    "head_dim": 64,
    "vocab_size": 8192,
    "max_position_embeddings": 8192,
    "torch_dtype": "bfloat16",
}
COLUMNS = {
    "chunk": "chunk",
    "mode": "shipped",
    "layers_per_group": "layers",
    "prefill_s": "prefill s",
    "mib": "MiB",
    "overlapped_mib": "before 1st token",
    "num_groups": "groups",
    "exposed_s": "tail s",
    "second_token_s": "prefill + tail s",
    "num_rounds": "rounds",
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run every setting, print the table, write the JSON."""
    options = _parser().parse_args(arguments)
    exit_on_sigterm()  # processes and namespaces are taken down
    num_tokens, chunks, usual = (512, (256,), 1) if options.quick else (2048, (256, 1024, 2048), 3)
    rounds = usual if options.rounds is None else options.rounds
    path = NetworkPath(rate_gbps=options.rate)
    console = Console(stderr=True)
    rows: list[dict[str, Cell]] = []
    with tempfile.TemporaryDirectory(prefix="prfaas-bench-") as folder, _two_ends(path, console) as ends:
        (Path(folder) / "config.json").write_text(json.dumps(MODEL), encoding="utf-8")
        for chunk in chunks:
            rows += _measure(ends, folder, num_tokens, chunk, rounds, console)
    for cells in rows:
        cells |= {"num_tokens": num_tokens, "rate_gbps": None if why_unavailable(path) else options.rate}
    finished = report.Report("overlap", report.commit(), report.machine(), rows, figures(rows))
    shown = f"{num_tokens} tokens over {options.rate:g} Gbit/s, medians of {rounds} rounds, {finished.commit[:12]}"
    finished.print_table(COLUMNS, shown)
    if options.json:
        finished.write_json(options.json)
    return 0


Ends = tuple[tuple[Wrap, str], tuple[Wrap, str]]  # how to run a command at each end, and its address


@contextmanager
def _two_ends(path: NetworkPath, console: Console) -> Iterator[Ends]:
    reason = why_unavailable(path)
    if reason is not None:
        console.print(f"on loopback, which hides nothing: {reason}")
        yield (list, "127.0.0.1"), (list, "127.0.0.1")
        return
    with NetworkLab(path) as lab:
        yield (lab.left.command, lab.left.address), (lab.right.command, lab.right.address)


def _settings(chunk: int) -> list[Setting]:
    shipped = [Setting(chunk, WHILE, layers) for layers in (1, 4, NUM_LAYERS)]
    return [Setting(chunk, ALONE), Setting(chunk, AFTER), *shipped]


def _measure(
    ends: Ends, folder: str, num_tokens: int, chunk: int, rounds: int, console: Console
) -> list[dict[str, Cell]]:
    """Every setting of one chunk size, in turns, after one round of warm-up."""
    settings = _settings(chunk)
    measured: dict[Setting, list[Handover]] = {setting: [] for setting in settings}
    failures: dict[Setting, str] = {}
    (left_wrap, left_host), (right_wrap, right_host) = ends
    left = ChildProcess(left_wrap, "benchmarks.overlap_peer", [left_host, folder])
    right = ChildProcess(right_wrap, "benchmarks.overlap_peer", [right_host, folder])
    try:
        fingerprint, layout, layers = left.call("load", num_tokens, chunk)
        num_pages = -(-num_tokens // fingerprint.page_size)
        right.call("serve", fingerprint, layout, layers, num_pages)
        for number in range(rounds + 1):
            console.print(f"chunk {chunk}: {'warm-up' if number == 0 else f'round {number} of {rounds}'}")
            for i, setting in enumerate(settings):
                if setting in failures:
                    continue
                name = f"{number}-{i}"
                try:
                    handover = _run(left, right, setting, name, num_pages)
                except CallFailed as error:
                    failures[setting] = str(error)
                    continue
                if number:
                    measured[setting].append(handover)
    except CallFailed as error:
        failures = {setting: str(error) for setting in settings} | failures
    finally:
        left.close()
        right.close()
    return [row(setting, measured[setting]) | {"error": failures.get(setting)} for setting in settings]


def _run(left: ChildProcess, right: ChildProcess, setting: Setting, name: str, num_pages: int) -> Handover:
    grant = None if setting.mode == ALONE else right.call("grant", name, num_pages)
    words = (name, grant, setting.layers_per_group or 1, setting.mode == AFTER)
    handover: Handover = left.call("prefill", *words, timeout_s=3 * PREFILL_TIMEOUT_S)
    return handover


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.overlap", description=(__doc__ or "").partition("\n")[0]
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the report there")
    parser.add_argument("--quick", action="store_true", help="a short prompt with one chunk size, one round")
    parser.add_argument("--rate", type=float, default=1.0, metavar="GBIT/S", help="of the path (default: 1)")
    parser.add_argument("--rounds", type=int, metavar="N", help="after one warm-up (default: 3, with --quick 1)")
    return parser


if __name__ == "__main__":
    sys.exit(main())
