"""What is kept and logged of requests that have ended."""

import logging
from dataclasses import replace

from cluster.finished_requests import RecentRequests, RequestLog
from cluster.front_door import Door
from cluster.metrics import Outcome, RequestRecord
from cluster.request_info import recent_request
from core.request import RequestId
from core.request_log import REQUESTS
from core.tracing import TraceContext
from tests.unit.cluster.scripted_router import TIMING

RECORD = RequestRecord(
    door=Door.HTTP,
    outcome=Outcome.OK,
    e2e_s=0.5,
    prompt_tokens=10,
    cached_tokens=4,
    generated_tokens=6,
    ttft_s=0.25,
    tpot_s=(0.02,),
    timings=(TIMING,),
    tenant="unsalted",
    request_id=RequestId("r"),
    ended_at=7.0,
    trace=TraceContext("a" * 32, "b" * 16),
    tokenize_s=0.004,
)


def test_the_latest_are_kept_newest_first():
    requests = RecentRequests(max_kept=2)
    for name in "abc":
        requests.observe(replace(RECORD, request_id=RequestId(name)))

    assert [r.request_id for r in requests.latest()] == ["c", "b"]
    assert [r.request_id for r in requests.latest(1)] == ["c"]


def test_a_request_as_a_message_has_its_parts_and_no_text():
    message = recent_request(RECORD, now=9.5)

    assert (message.request_id, message.trace_id, message.age_s) == ("r", "a" * 32, 2.5)
    assert (message.outcome, message.door, message.tenant) == ("ok", "http", "unsalted")
    assert message.timings[0].tokenize_s == 0.004
    assert message.timings[0].ttft_parts.prefill_s == 0.06
    assert message.timings[0].ttst_parts.transfer_s == 0.02
    failed = recent_request(replace(RECORD, outcome=Outcome.OVERLOADED, ttft_s=None, timings=(), trace=None), now=7.0)
    assert not failed.HasField("ttft_s")
    assert (failed.trace_id, list(failed.timings)) == ("", [])


def test_each_is_a_line_with_its_ids_and_parts(caplog):
    with caplog.at_level(logging.INFO, logger=REQUESTS.name):
        RequestLog().observe(RECORD)

    (line,) = caplog.records
    assert line.getMessage() == "request r: ok after 0.500 s, first token after 0.250 s"
    assert (line.request_id, line.trace_id, line.prefill_worker) == ("r", "a" * 32, "prefill-0")
    assert line.ttft_parts["prefill_s"] == 0.06
