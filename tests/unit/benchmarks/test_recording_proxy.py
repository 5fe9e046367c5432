"""A proxy that passes bytes on unchanged and sees what the client sees."""

from __future__ import annotations

import json

import aiohttp
import pytest

from benchmarks.recording_proxy import RecordingProxy
from benchmarks.scripted_endpoint import Script, ScriptedEndpoint
from cluster.bench.client_record import ClientRecord
from core.clock import WallClock
from tests.unit.cluster.bench.serving import served

ASKED = {"model": "m", "messages": [{"role": "user", "content": "one two"}], "max_tokens": 3, "stream": True}


async def test_an_answer_goes_through_unchanged_and_becomes_a_record() -> None:
    endpoint = ScriptedEndpoint(Script((0.0, 0.0), (0.0, 0.0)))
    asked = ASKED | {"stream_options": {"include_usage": True}}
    async with served(endpoint.application()) as upstream:
        async with served(RecordingProxy(upstream, WallClock()).application()) as proxy:
            async with aiohttp.ClientSession() as client:
                direct, passed = [
                    await (await client.post(f"{url}/v1/chat/completions", json=asked)).read()
                    for url in (upstream, proxy)
                ]
                await client.post(f"{proxy}/v1/chat/completions", json=asked | {"max_tokens": 1})  # looks around
                models = await (await client.get(f"{proxy}/v1/models")).json()
                lines = await (await client.get(f"{proxy}/records")).text()
                emptied = await (await client.get(f"{proxy}/records")).text()

    assert direct == passed
    assert models["data"][0]["id"] == "scripted"
    (line,) = lines.splitlines()
    record = ClientRecord.from_dict(json.loads(line), "line")
    assert (record.ok, record.output_tokens, record.prompt_tokens, len(record.chunk_s)) == (True, 3, 2, 3)
    assert emptied == ""


@pytest.mark.parametrize("number", range(30))
def test_a_script_gives_each_request_its_own_times_within_its_bounds(number: int) -> None:
    script = Script((0.1, 0.2), (0.01, 0.03))

    assert 0.1 <= script.ttft_s(number) < 0.2
    assert 0.01 <= script.tpot_s(number) < 0.03
    assert script.ttft_s(number) != script.ttft_s(number + 1)
