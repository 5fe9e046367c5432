"""One request's trace, from real processes: the client's span, the gateway, prefill, transfer, grant and decode."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import httpx
import pytest

from cluster.config import HttpConfig, ServiceConfig, TracingConfig
from cluster.generation import Generation
from cluster.http_gateway import HttpGateway
from cluster.metrics import Metrics
from cluster.tokenizer import Tokenizer
from core.clock import WallClock
from core.tracing import TraceContext
from engine.config import EngineConfig
from tests.cluster.live_cluster import LiveCluster, live_cluster
from tests.cluster.otlp_receiver import OtlpReceiver, ReceivedSpan, otlp_receiver
from tests.cluster.reference import ReferenceModel
from tests.unit.cluster import tiny_tokenizers
from tests.unit.cluster.scripted_router import ScriptedPlanner

pytestmark = [pytest.mark.timeout(120), pytest.mark.parametrize("family", ["llama"])]

ENGINE = EngineConfig(
    dtype="float32", page_size=16, num_pages=256, max_prefill_chunk=16, max_batch_tokens=64, threads=1
)
CLIENT = TraceContext.new()
TOLERANCE_S = 0.005


@asynccontextmanager
async def http_door(cluster: LiveCluster, folder: Path) -> AsyncIterator[httpx.AsyncClient]:
    """The HTTP door of a live cluster, and a client of it."""
    config, clock = ServiceConfig(model="tiny", http=HttpConfig(port=0)), WallClock()
    metrics = Metrics(cluster.membership, cluster.router, lambda *_: None, ScriptedPlanner())
    tokenizer = Tokenizer.load(tiny_tokenizers.save(folder))
    generation = Generation(
        cluster.router, cluster.membership, tokenizer, metrics, config, clock, tracing=cluster.tracing
    )
    door = HttpGateway(generation, cluster.membership, metrics, config, clock, dict, lambda limit: {"requests": []})
    await door.start()
    try:
        async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{door.port}", timeout=30) as client:
            yield client
    finally:
        await door.stop(1)


def shown(receiver: OtlpReceiver, trace_id: str) -> str:
    """The trace as text: when each span began, how long it took, and where."""
    rows = list(receiver.tree(trace_id))
    first = min(span.began_ns for _, span in rows)
    return "\n".join(
        f"{(s.began_ns - first) / 1e6:8.2f} ms {(s.ended_ns - s.began_ns) / 1e6:8.2f} ms  "
        f"{'  ' * depth}{s.name} [{s.process}]"
        for depth, s in rows
    )


async def test_the_trace_of_a_request_has_every_process(
    family: str, tiny_model: ReferenceModel, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    async with otlp_receiver() as receiver:
        tracing = TracingConfig(endpoint=receiver.endpoint, sample_ratio=0.0)
        async with live_cluster(str(tiny_model.folder), engine=ENGINE, processes=True, tracing=tracing) as cluster:
            async with http_door(cluster, tmp_path) as client:
                body = {"prompt": list(tiny_model.prompts[-1]), "max_tokens": 6, "temperature": 0, "ignore_eos": True}
                headers = {"traceparent": str(CLIENT), "x-request-id": "the-one"}
                answer = (await client.post("/v1/completions", json=body, headers=headers)).json()
                quiet = await client.post("/v1/completions", json=body)  # no traceparent, and a ratio of 0
        # Every process has sent what it had when it was told to stop.
    assert quiet.status_code == 200
    assert {span.trace_id for span in receiver.spans} == {CLIENT.trace_id}
    with capsys.disabled():
        print(f"\n{shown(receiver, CLIENT.trace_id)}")
    check(receiver, answer["prfaas"]["timing"][0])


def check(receiver: OtlpReceiver, timing: dict[str, dict[str, float]]) -> None:
    """The spans are a tree under the client's, each in its process, and agree with the answer's timing."""
    spans: dict[str, ReceivedSpan] = {}
    for span in receiver.spans:
        assert span.name not in spans, f"{span.name} came twice"
        spans[span.name] = span
    parents = {
        name: next((other.name for other in spans.values() if other.span_id == span.parent_id), "")
        for name, span in spans.items()
    }
    assert parents == {
        "request": "",
        **dict.fromkeys(("receive", "tokenize", "admission", "route", "attempt"), "request"),
        "prefill": "attempt",
        "prefill.queue": "prefill",
        "prefill.compute": "prefill",
        "transfer": "prefill",
        "grant": "transfer",
        "decode": "attempt",
        **dict.fromkeys(("decode.await_kv", "decode.queue", "decode.first_step", "decode.later_steps"), "decode"),
    }
    assert spans["request"].parent_id == CLIENT.span_id
    processes = {name: span.process for name, span in spans.items()}
    assert {processes[name] for name in ("request", "attempt", "route")} == {"test-gateway"}
    assert {processes[name] for name in ("prefill", "prefill.compute", "transfer")} == {"prefill-0"}
    assert {processes[name] for name in ("grant", "decode", "decode.first_step")} == {"decode-0"}
    assert not any(span.failed for span in spans.values())
    assert spans["transfer"].attributes["prfaas.bytes_shipped"] > 0
    assert "the-one" in spans["request"].attributes["prfaas.request_id"]
    assert all("the-one" in spans[n].attributes["prfaas.sequence_id"] for n in ("attempt", "prefill", "decode"))

    # Wall clocks of one machine can be compared: what the parts call messages is what lies between the processes.
    began, ended = ({name: getattr(s, at) / 1e9 for name, s in spans.items()} for at in ("began_ns", "ended_ns"))
    parts = timing["ttft_parts"]
    first_token_at = began["request"] + sum(parts.values())
    out, back = began["prefill"] - began["attempt"], first_token_at - ended["prefill.compute"]
    assert out + back == pytest.approx(parts["messages_s"], abs=TOLERANCE_S)
    assert out > -TOLERANCE_S
    assert back > -TOLERANCE_S
