from __future__ import annotations

from dataclasses import replace

import pytest

from core.clock import VirtualClock
from core.errors import InvalidConfig
from core.fingerprint import CacheFingerprint
from kv_transfer.config import KvTransferConfig
from kv_transfer.local import LocalTransport
from kv_transfer.tcp import TcpTransport
from kv_transfer.transport import (
    HOST_PIECES,
    TRANSPORTS,
    LayerPages,
    PageGeometry,
    PieceLimits,
    Region,
    create_transport,
)

FINGERPRINT = CacheFingerprint("m", "r", "d", 16, "l")


@pytest.mark.parametrize(("name", "kind"), [("local", LocalTransport), ("tcp", TcpTransport)])
def test_a_transport_is_made_by_its_name(name: str, kind: type) -> None:
    transport = create_transport(KvTransferConfig(transport=name), FINGERPRINT, VirtualClock())
    assert isinstance(transport, kind)
    assert name in TRANSPORTS


def test_an_unknown_name_is_refused_with_the_known_ones() -> None:
    with pytest.raises(InvalidConfig, match="local, nixl, tcp"):
        create_transport(KvTransferConfig(transport="pigeon"), FINGERPRINT, VirtualClock())


@pytest.mark.parametrize(
    ("bytes_per_s", "max_bytes"),
    [
        pytest.param(None, 1 << 20, id="not known"),
        pytest.param(0.125e9, 1 << 20, id="1 Gbit/s"),
        pytest.param(2e9, 3_000_000, id="16 Gbit/s"),
        pytest.param(50e9, 4 << 20, id="faster than pieces pay"),
    ],
)
def test_pieces_grow_with_the_speed_of_the_link_within_bounds(bytes_per_s: float | None, max_bytes: int) -> None:
    assert HOST_PIECES.at(bytes_per_s) == replace(HOST_PIECES, max_bytes=max_bytes)


def test_pieces_of_a_transport_that_names_one_size_stay() -> None:
    limits = PieceLimits(7, 3)
    assert limits.at(50e9) == limits


def test_a_region_gives_the_bytes_of_a_run_uncopied() -> None:
    layers = (bytearray(range(12)), bytearray(range(24)))
    region = Region(PageGeometry((LayerPages(4), LayerPages(8)), 3), tuple(memoryview(layer) for layer in layers))
    pages = region.pages(1, 1, 2)
    assert bytes(pages) == bytes(range(8, 24))
    pages[0] = 99
    assert layers[1][8] == 99


def test_a_geometry_counts_the_bytes_of_a_page_over_all_layers() -> None:
    assert PageGeometry((LayerPages(4), LayerPages(8)), 3).bytes_per_page == 12
