from __future__ import annotations

import pytest

from core.clock import VirtualClock
from core.errors import InvalidConfig
from core.fingerprint import CacheFingerprint
from kv_transfer.config import KvTransferConfig
from kv_transfer.local import LocalTransport
from kv_transfer.tcp import TcpTransport
from kv_transfer.transport import TRANSPORTS, LayerPages, PageGeometry, Region, create_transport

FINGERPRINT = CacheFingerprint("m", "r", "d", 16, "l")


@pytest.mark.parametrize(("name", "kind"), [("local", LocalTransport), ("tcp", TcpTransport)])
def test_a_transport_is_made_by_its_name(name: str, kind: type) -> None:
    transport = create_transport(KvTransferConfig(transport=name), FINGERPRINT, VirtualClock())
    assert isinstance(transport, kind)
    assert name in TRANSPORTS


def test_an_unknown_name_is_refused_with_the_known_ones() -> None:
    with pytest.raises(InvalidConfig, match="local, nixl, tcp"):
        create_transport(KvTransferConfig(transport="pigeon"), FINGERPRINT, VirtualClock())


def test_a_region_gives_the_bytes_of_a_run_uncopied() -> None:
    layers = (bytearray(range(12)), bytearray(range(24)))
    region = Region(PageGeometry((LayerPages(4), LayerPages(8)), 3), tuple(memoryview(layer) for layer in layers))
    pages = region.pages(1, 1, 2)
    assert bytes(pages) == bytes(range(8, 24))
    pages[0] = 99
    assert layers[1][8] == 99


def test_a_geometry_counts_the_bytes_of_a_page_over_all_layers() -> None:
    assert PageGeometry((LayerPages(4), LayerPages(8)), 3).bytes_per_page == 12
