"""What ``prfaas top`` shows of a fleet under load, after its link has degraded, and of nothing at all."""

import io

import pytest
from rich.console import Console

from cluster.grpc_gateway import GrpcGateway
from cluster.internal_tls import TlsDecision
from cluster.top_frame import frame
from protos import serving_pb2 as pb
from tests.unit.cluster.page_views import fleet, requests
from tests.unit.cluster.scripted_router import Gateway


def shown(service: Gateway, width: int = 160) -> str:
    door = GrpcGateway(
        service.generation,
        service.router,
        service.membership,
        service.links,
        service.planner,
        service.config,
        service.clock,
        TlsDecision(False, "this is a test"),
        service.requests,
    )
    return text_of(door.cluster_info(), door.recent_requests(40), width)


def text_of(info: pb.GetClusterInfoResponse, recent: pb.GetRecentRequestsResponse, width: int = 160) -> str:
    console = Console(file=io.StringIO(), width=width, color_system=None)
    console.print(frame(info, recent.requests))
    return console.file.getvalue()  # type: ignore[attr-defined]


@pytest.mark.parametrize("width", [100, 160])
def test_a_frame_has_workers_links_plan_and_requests(service, width):
    fleet(service, degraded=True)
    requests(service.requests, service.clock.now(), degraded=True)

    text = shown(service, width)

    assert "oslo/prefill-1" in text
    assert "threshold 7,168 tokens, 2 prefill, 4 decode" in text
    assert "decode pool: 4 ready of 5 desired (2 to 6), 1 pending, 0 draining" in text
    assert "link from oslo is full" in text
    assert max(map(len, text.splitlines())) <= width
    if width == 160:
        assert "decode-3 becomes a prefill worker" in text
        assert "153 MB/s" in text
        assert "request-23" in text
        assert "overloaded" in text


def test_a_bar_is_as_long_as_its_request_and_cut_by_its_parts(service):
    fleet(service, degraded=False)
    requests(service.requests, service.clock.now(), num=1)

    line = next(line for line in shown(service).splitlines() if "request-0" in line)

    bar = next(word for word in line.split() if set(word) & set("PD") and len(word) > 20)
    assert len(bar) == 46
    assert bar.index("P") < bar.index("T") < bar.index("D")
    assert bar == "".join(sorted(bar, key="itwsr!muqPgTd2D".index)), "parts stand in the order of time"


def test_a_request_without_a_timing_has_a_plain_bar(service):
    fleet(service, degraded=True)
    requests(service.requests, service.clock.now(), degraded=True)

    line = next(line for line in shown(service).splitlines() if "overloaded" in line)

    assert "////" in line


def test_nothing_is_said_to_be_nothing():
    text = text_of(pb.GetClusterInfoResponse(model="m"), pb.GetRecentRequestsResponse())

    assert "none has registered yet" in text
    assert "none has ended yet" in text
    assert "none is offloaded" in text
