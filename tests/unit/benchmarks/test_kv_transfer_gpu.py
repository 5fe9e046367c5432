"""The GPU benchmark without GPUs: two peers of this process, and the figures of rows."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from benchmarks.gpu_peer import GpuPeer
from benchmarks.kv_prompt import NUM_LAYERS, PAGE_BYTES
from benchmarks.kv_transfer_gpu import figures, main


@pytest.fixture
def peers() -> Iterator[tuple[GpuPeer, GpuPeer]]:
    pair = GpuPeer(torch.device("cpu"), 6), GpuPeer(torch.device("cpu"), 6)
    yield pair
    for peer in pair:
        peer.close()


@pytest.mark.parametrize("transport", ["tcp", "nixl"])
def test_a_hand_over_is_counted_right_and_what_did_not_arrive_is_counted_wrong(
    peers: tuple[GpuPeer, GpuPeer], transport: str
) -> None:
    if transport == "nixl":
        pytest.importorskip("nixl", reason="pip install 'prfaas[nixl]'")
    sender, receiver = peers
    sender.fill()
    for peer in peers:
        peer.open(transport, 2)
    grant = receiver.expect("a", (5, 0, 3))
    moved = sender.move("a", (1, 2, 4), grant, prefill_s=0.01)
    assert moved.num_bytes == 3 * PAGE_BYTES * NUM_LAYERS
    assert moved.seconds >= moved.tail_s > 0
    assert receiver.count_wrong((1, 2, 4), (5, 0, 3)) == 0
    assert receiver.count_wrong((1, 2, 3), (5, 0, 3)) == NUM_LAYERS
    receiver.wipe()
    assert receiver.count_wrong((1, 2, 4), (5, 0, 3)) == 3 * NUM_LAYERS


def test_figures_leave_out_what_failed() -> None:
    def row(arm: str, rate: float | None, connections: int = 1, tail: float | None = None) -> dict[str, object]:
        return {"arm": arm, "connections": connections, "gbytes_per_s": rate, "tail_ms": tail}

    rows = [row("plain copy", 394.0), row("ours nixl", None), row("ours tcp", 4.0), row("ours tcp", 6.0, 4, 1.0)]
    assert figures(rows) == {"copy_gbytes_per_s": 394.0, "tcp_gbytes_per_s": 6.0}  # type: ignore[arg-type]
    rows.append(row("ours nixl UCX_TLS=tcp", 0.4))
    assert figures(rows)["tcp_over_ucx_tcp"] == pytest.approx(15.0)  # type: ignore[arg-type]


@pytest.mark.skipif(torch.cuda.is_available() and torch.cuda.device_count() > 1, reason="there are two GPUs here")
def test_without_two_gpus_it_says_how_to_rehearse(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == 2
    assert "--devices cpu cpu rehearses" in capsys.readouterr().err
