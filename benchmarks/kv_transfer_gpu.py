"""How fast does K/V go from one GPU's pages into another's, and how much of it is left when prefill ends?

    python -m benchmarks.kv_transfer_gpu [--json FILE] [--tokens 8192] [--devices cuda:0 cuda:1] [--rounds 5]

The K/V of a prompt of an 8B model (kv_prompt.py: 1 GiB at 8,192 tokens, 16-token pages, scrambled page tables) goes
from a process on the first device to one on the second: by our nixl (UCX's own choice, and with UCX_TLS=tcp), by our
tcp with 1, 4 and 8 connections through pinned memory, whole after prefill and layer by layer while a prefill of the
given seconds would run. Beside it a plain copy between the devices by one process. Pages are compared after each arm's
warm-up; GB/s is the median round's. ``--devices cpu cpu`` rehearses all of it without a GPU, and says so in the report.

The tail is what a decode worker waits for after the last layer was stored; layers are paced by a clock here, so kernels
of a model do not compete for the device: benchmarks.overlap has a real engine.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from rich.console import Console

from benchmarks import report
from benchmarks.child_process import CallFailed, ChildProcess
from benchmarks.gpu_end import HandOver
from benchmarks.kv_prompt import Prompt, scrambled
from benchmarks.report import Cell

_SPARE = 1.25  # pages of a pool over those of the prompt
_CALL_TIMEOUT_S = 200.0
COLUMNS = {
    "arm": "arm",
    "connections": "conns",
    "path": "path, as found",
    "gbytes_per_s": "GB/s",
    "gbytes_per_s_min": "min",
    "gbytes_per_s_max": "max",
    "tail_ms": "tail, ms",
    "num_rounds": "rounds",
    "error": "error",
}


@dataclass(frozen=True)
class Arm:
    name: str
    transport: str
    connections: int = 1
    ucx_tls: str | None = None
    staging_mib: int | None = None  # of each ring; None: what the code takes


ARMS = (
    Arm("ours nixl", "nixl"),
    Arm("ours nixl, rings of 256 MiB", "nixl", staging_mib=256),
    Arm("ours nixl UCX_TLS=tcp", "nixl", ucx_tls="tcp,cuda_copy"),
    Arm("ours tcp", "tcp", 1),
    Arm("ours tcp", "tcp", 4),
    Arm("ours tcp", "tcp", 8),
)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the arms, print the table, write the JSON."""
    options = _parser().parse_args(arguments)
    missing = [name for name in options.devices if name.startswith("cuda") and not _has(torch.device(name))]
    if missing:
        print(f"there is no {' and no '.join(missing)} here; --devices cpu cpu rehearses", file=sys.stderr)
        return 2
    prompt = Prompt(options.tokens)
    rows = [_copy_row(options.devices, prompt)]
    for arm in ARMS:
        Console(stderr=True).print(f"{arm.name} x{arm.connections}")
        rows.append(_arm_row(arm, options.devices, prompt, options.rounds, options.prefill_s))
    machine = {**report.machine(), **{f"device{i}": _name(name) for i, name in enumerate(options.devices)}}
    finished = report.Report("kv_transfer_gpu", report.commit(), machine, rows, figures(rows))
    rehearsal = "" if all(name.startswith("cuda") for name in options.devices) else " (a rehearsal: not two GPUs)"
    finished.print_table(COLUMNS, f"K/V of {prompt.num_tokens} tokens of an 8B model, device to device{rehearsal}")
    if options.json:
        finished.write_json(options.json)
    return 0


def figures(rows: Sequence[dict[str, Cell]]) -> dict[str, float]:
    """The numbers that a claim may rest on; those of arms that failed are left out."""
    rates = {(row["arm"], row["connections"]): row["gbytes_per_s"] for row in rows}
    tails = {row["arm"]: row["tail_ms"] for row in rows if row["connections"] == 1}
    tcp = [rate for (arm, _), rate in rates.items() if arm == "ours tcp" and isinstance(rate, float)]
    named: dict[str, Cell] = {
        "copy_gbytes_per_s": rates.get(("plain copy", 1)),
        "nixl_gbytes_per_s": rates.get(("ours nixl", 1)),
        "nixl_256_mib_gbytes_per_s": rates.get(("ours nixl, rings of 256 MiB", 1)),
        "nixl_tail_ms": tails.get("ours nixl"),
        "ucx_tcp_gbytes_per_s": rates.get(("ours nixl UCX_TLS=tcp", 1)),
        "tcp_gbytes_per_s": max(tcp, default=None),
    }
    ucx, ours = named["ucx_tcp_gbytes_per_s"], named["tcp_gbytes_per_s"]
    if isinstance(ucx, float) and isinstance(ours, float):
        named["tcp_over_ucx_tcp"] = ours / ucx
    return {name: value for name, value in named.items() if isinstance(value, float)}


def _copy_row(devices: Sequence[str], prompt: Prompt) -> dict[str, Cell]:
    child = _start(devices[0], 1, None)
    try:
        seconds = child.call("copy_to", devices[1], prompt.num_bytes, timeout_s=_CALL_TIMEOUT_S)
    except CallFailed as error:
        return _row(Arm("plain copy", ""), error=str(error))
    finally:
        child.close()
    return _row(Arm("plain copy", ""), path="copy", rates=[prompt.num_bytes / seconds / 1e9])


def _arm_row(arm: Arm, devices: Sequence[str], prompt: Prompt, num_rounds: int, prefill_s: float) -> dict[str, Cell]:
    pool_pages = int(prompt.num_pages * _SPARE)
    sender, receiver = (_start(device, pool_pages, arm.ucx_tls) for device in devices)
    try:
        sender.call("fill", timeout_s=_CALL_TIMEOUT_S)
        for child in (sender, receiver):
            child.call("open", arm.transport, arm.connections, arm.staging_mib, timeout_s=_CALL_TIMEOUT_S)
        whole: list[HandOver] = []
        paced: list[HandOver] = []
        for number in range(num_rounds + 1):
            for taken, seconds in ((whole, 0.0), (paced, prefill_s)):
                name = f"{number} {seconds}"
                src, dst = (scrambled(prompt.num_pages, pool_pages, f"{end} {name}") for end in ("src", "dst"))
                receiver.call("wipe", timeout_s=_CALL_TIMEOUT_S)
                grant = receiver.call("expect", name, dst)
                taken.append(sender.call("move", name, src, grant, seconds, timeout_s=_CALL_TIMEOUT_S))
                wrong = receiver.call("count_wrong", src, dst, timeout_s=_CALL_TIMEOUT_S) if number == 0 else 0
                if wrong:
                    return _row(arm, error=f"{wrong} pages arrived wrong")
    except CallFailed as error:
        return _row(arm, error=str(error))
    finally:
        for child in (sender, receiver):
            child.close()
    rates = [one.num_bytes / one.seconds / 1e9 for one in whole[1:]]
    return _row(arm, path=whole[-1].path, rates=rates, tails_s=[one.tail_s for one in paced[1:]])


def _row(
    arm: Arm, *, path: str = "", rates: Sequence[float] = (), tails_s: Sequence[float] = (), error: str | None = None
) -> dict[str, Cell]:
    return {
        "arm": arm.name,
        "connections": arm.connections,
        "path": path,
        "gbytes_per_s": statistics.median(rates) if rates else None,
        "gbytes_per_s_min": min(rates, default=None),
        "gbytes_per_s_max": max(rates, default=None),
        "tail_ms": statistics.median(tails_s) * 1e3 if tails_s else None,
        "num_rounds": len(rates),
        "error": error,
    }


def _start(device: str, pool_pages: int, ucx_tls: str | None) -> ChildProcess:
    variables = {} if ucx_tls is None else {"UCX_TLS": ucx_tls}
    return ChildProcess(list, "benchmarks.gpu_peer", (device, str(pool_pages)), variables=variables)


def _has(device: torch.device) -> bool:
    return torch.cuda.is_available() and (device.index or 0) < torch.cuda.device_count()


def _name(device: str) -> str:
    return torch.cuda.get_device_name(device) if device.startswith("cuda") else device


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.kv_transfer_gpu", description=(__doc__ or "").partition("\n")[0]
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the report there")
    parser.add_argument("--tokens", type=int, default=8192, help="of the prompt (default 8192: 1 GiB)")
    parser.add_argument("--devices", nargs=2, default=["cuda:0", "cuda:1"], metavar=("FROM", "TO"))
    parser.add_argument("--rounds", type=int, default=5, help="after one warm-up (default 5)")
    parser.add_argument("--prefill-s", type=float, default=0.25, help="seconds over which the layers are stored")
    return parser


if __name__ == "__main__":
    sys.exit(main())
