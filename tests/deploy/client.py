"""A client of a service under test, over HTTP."""

from __future__ import annotations

import json
import threading
import urllib.request
from collections.abc import Iterator
from typing import Any

WAIT_S = 120.0
MAX_TOKENS = 120


class Stream(threading.Thread):
    """A client that reads a long answer to its end."""

    def __init__(self, http_port: int) -> None:
        super().__init__(daemon=True)
        self._url = f"http://127.0.0.1:{http_port}/v1/completions"
        self.begun = threading.Event()
        self.num_events = 0
        self.finish_reason: str | None = None
        self.usage: dict[str, int] = {}

    def run(self) -> None:
        for event in completion(self._url, MAX_TOKENS, stream=True):
            self.num_events += 1
            self.begun.set()
            for choice in event["choices"]:
                self.finish_reason = choice["finish_reason"] or self.finish_reason
            self.usage = event.get("usage") or self.usage

    def require_whole(self) -> None:
        self.join(WAIT_S)
        assert self.finish_reason == "length"
        assert self.usage["completion_tokens"] == MAX_TOKENS


def completion(url: str, max_tokens: int, *, stream: bool) -> Iterator[Any]:
    """The answer's JSON, or those of its events."""
    body: dict[str, object] = {"prompt": "the quick brown fox", "max_tokens": max_tokens, "temperature": 0}
    body |= {"ignore_eos": True, "stream": stream} | ({"stream_options": {"include_usage": True}} if stream else {})
    request = urllib.request.Request(url, json.dumps(body).encode(), {"content-type": "application/json"})
    with urllib.request.urlopen(request, timeout=WAIT_S) as response:
        if not stream:
            yield json.load(response)
            return
        for line in response:
            if line.startswith(b"data: {"):
                yield json.loads(line[6:])
