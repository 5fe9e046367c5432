"""A client of a service under test, over HTTP."""

from __future__ import annotations

import json
import threading
import urllib.error
import urllib.request
from collections.abc import Iterator
from typing import Any

WAIT_S = 120.0
MAX_TOKENS = 120


class Stream(threading.Thread):
    """A client that reads a long answer to its end."""

    def __init__(self, http_port: int, key: str = "") -> None:
        super().__init__(daemon=True)
        self._http_port = http_port
        self._key = key
        self.begun = threading.Event()
        self.num_events = 0
        self.finish_reason: str | None = None
        self.usage: dict[str, int] = {}

    def run(self) -> None:
        for event in completion(self._http_port, MAX_TOKENS, stream=True, key=self._key):
            self.num_events += 1
            self.begun.set()
            for choice in event["choices"]:
                self.finish_reason = choice["finish_reason"] or self.finish_reason
            self.usage = event.get("usage") or self.usage

    def require_whole(self) -> None:
        if self.ident is not None:
            self.join(WAIT_S)
        assert self.finish_reason == "length"
        assert self.usage["completion_tokens"] == MAX_TOKENS


class Load(threading.Thread):
    """A client that asks again once it has its answer, until it is turned away: one is always under way."""

    def __init__(self, http_port: int) -> None:
        super().__init__(daemon=True)
        self._http_port = http_port
        self.begun = threading.Event()
        self.answers: list[Stream] = []

    def run(self) -> None:
        while True:
            answer = Stream(self._http_port)
            try:
                answer.run()
            except urllib.error.URLError:  # 503, or nobody listens any more; an answer that breaks off raises another
                return
            self.answers.append(answer)
            self.begun.set()

    def require_whole(self) -> None:
        self.join(WAIT_S)
        assert not self.is_alive()
        assert self.answers
        for answer in self.answers:
            answer.require_whole()


def completion(http_port: int, max_tokens: int, *, stream: bool, key: str = "") -> Iterator[Any]:
    """The answer's JSON, or those of its events."""
    body: dict[str, object] = {"prompt": "the quick brown fox", "max_tokens": max_tokens, "temperature": 0}
    body |= {"ignore_eos": True, "stream": stream} | ({"stream_options": {"include_usage": True}} if stream else {})
    headers = {"content-type": "application/json"} | ({"authorization": f"Bearer {key}"} if key else {})
    url = f"http://127.0.0.1:{http_port}/v1/completions"
    request = urllib.request.Request(url, json.dumps(body).encode(), headers)
    with urllib.request.urlopen(request, timeout=WAIT_S) as response:
        if not stream:
            yield json.load(response)
            return
        for line in response:
            if line.startswith(b"data: {"):
                yield json.loads(line[6:])
