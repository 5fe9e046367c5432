"""What does an OpenAI-compatible server answer? The events of one streamed answer, each timed as it comes.

Used by the load generator's client, and by whoever looks at another client's answers on their way.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from typing import Any

from cluster.bench.client_record import CHUNKS, TOKENIZER, USAGE
from cluster.bench.server_sent_events import EventStream
from cluster.bench.target import Reply, Stopwatch

MESSAGE_CHARS = 300  # of a server's error

_DONE = b"[DONE]"


class AnswerReader:
    """One streamed answer. ``take`` is its only writer."""

    def __init__(self, watch: Stopwatch, count_output: Callable[[str], int] | None) -> None:
        self._watch = watch
        self._count_output = count_output
        self._events = EventStream()
        self._text: list[str] = []
        self._usage: Mapping[str, Any] = {}
        self._timing: Mapping[str, Any] | None = None
        self._finish_reason: str | None = None
        self._is_done = False
        self._error: str | None = None

    def take(self, received: bytes) -> None:
        """Bytes of the body, now."""
        for data in self._events.push(received):
            if data == _DONE:
                self._is_done = True
                continue
            try:
                event = json.loads(data)
            except ValueError:
                self._fail(f"an event that is not JSON: {data[:80]!r}")
                continue
            if isinstance(event, dict):
                self._take_event(event)

    def reply(self, error: str | None = None, message: str | None = None) -> Reply:
        """What it amounts to; ``error``: the connection broke."""
        if error is None and self._error is not None:
            error, message = "stream_error", self._error
        elif error is None and not self._is_done and self._finish_reason is None:
            error, message = "stream_ended", "the stream ended before the answer did"
        elif error is None and not self._watch.chunk_at:
            error, message = "no_output", "the answer is empty"
        text = "".join(self._text)
        output, counted_by = self._count(text)
        details = self._usage.get("prompt_tokens_details") or {}
        return Reply(
            text=text,
            output_tokens=output,
            counted_by=counted_by,
            prompt_tokens=self._usage.get("prompt_tokens"),
            cached_tokens=details.get("cached_tokens"),
            finish_reason=self._finish_reason,
            error=error,
            error_message=None if message is None else message[:MESSAGE_CHARS],
            timing=self._timing,
        )

    def _take_event(self, event: Mapping[str, Any]) -> None:
        if event.get("error"):
            self._fail(said_by(event))
            return
        self._usage = event.get("usage") or self._usage
        timings = (event.get("prfaas") or {}).get("timing")
        if timings:
            self._timing = timings[0]
        for choice in event.get("choices") or ():
            text, has_output = _output(choice)
            if has_output:
                self._watch.chunk()
                self._text.append(text)
            else:
                self._watch.end()
            self._finish_reason = choice.get("finish_reason") or self._finish_reason

    def _fail(self, message: str) -> None:
        self._error = self._error or message
        self._watch.end()

    def _count(self, text: str) -> tuple[int, str]:
        if self._usage.get("completion_tokens") is not None:
            return int(self._usage["completion_tokens"]), USAGE
        if self._count_output is not None:
            return self._count_output(text), TOKENIZER
        return len(self._watch.chunk_at), CHUNKS


def _output(choice: Mapping[str, Any]) -> tuple[str, bool]:
    """The answer's text in one choice of an event, and whether it brings output of any kind."""
    delta = choice.get("delta")
    if not isinstance(delta, dict):
        text = choice.get("text") or ""
        return text, bool(text)
    text = delta.get("content") or ""
    others = ("reasoning_content", "reasoning", "refusal", "tool_calls")
    return text, bool(text) or any(delta.get(name) for name in others)


def said_by(body: object) -> str:
    """The message of an error body, whatever its form."""
    if isinstance(body, dict):
        error = body.get("error", body)
        body = error.get("message", error) if isinstance(error, dict) else error
    return str(body)[:MESSAGE_CHARS]
