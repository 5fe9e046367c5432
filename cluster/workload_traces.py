"""What does a request trace say? Lengths, arrival times, sessions and shared prefixes, one request at a time.

Read as a stream, plain or gzipped; the form is told by the first line:

    CSV    columns input_length, output_length; t_s and client_id if known; Azure's TIMESTAMP, ContextTokens,
           GeneratedTokens; or BurstGPT's Timestamp (s), Request tokens, Response tokens, of which those without a
           response failed and are left out
    JSONL  Mooncake and AIPerf: timestamp (ms), input_length, output_length, hash_ids (512 tokens each), session_id,
           delay (ms)
           coding sessions: session_id, turn, t_s, think_s, input_length, output_length, hash_runs (64 tokens each)
           texts: append or input with output; turns with reference_output; or prompt (vLLM's custom) or text_input
           (AIPerf) with output_tokens or output_length; tokens are characters / 4
    JSON   ShareGPT: a list of conversations, of which the first question and answer count, as in vLLM

A line that cannot be read raises ``InvalidConfig`` with file, line and field.
"""

from __future__ import annotations

import csv
import gzip
import io
import json
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from datetime import datetime
from pathlib import Path
from typing import Any, TextIO

from core.errors import InvalidConfig

MOONCAKE_BLOCK_TOKENS = 512
SESSION_BLOCK_TOKENS = 64
CHARACTERS_PER_TOKEN = 4
_GZIP_MAGIC = b"\x1f\x8b"
_REPORT_EVERY_LINES = 1000


@dataclass(frozen=True, slots=True)
class TraceRequest:
    """One request. What the trace does not say is None, or empty."""

    input_tokens: int
    output_tokens: int
    arrival_s: float | None = None  # since the trace's begin; of a session's turn: since the session's
    session_id: str | None = None
    turn: int = 0
    think_s: float = 0.0  # what the client waits after the last answer before it sends this turn
    appended: bool = False  # the prompt begins with all of the session's last one
    prefix_blocks: tuple[str, ...] = ()  # names of the prompt's blocks, each standing for itself and all before it
    block_tokens: int = 0


def read_trace(path: str | Path, on_bytes: Callable[[int], None] | None = None) -> Iterator[TraceRequest]:
    """The requests of the file at ``path``, in its order. ``on_bytes`` hears how many bytes of it have been read."""
    place = Path(path)
    try:
        with place.open("rb") as raw:
            zipped = raw.peek(2)[:2] == _GZIP_MAGIC
            with io.TextIOWrapper(gzip.GzipFile(fileobj=raw) if zipped else raw, encoding="utf-8", newline="") as text:
                for number, request in enumerate(_parse(text, str(path))):
                    if on_bytes is not None and number % _REPORT_EVERY_LINES == 0:
                        on_bytes(raw.tell())
                    yield request
    except (OSError, EOFError, UnicodeDecodeError) as error:
        raise InvalidConfig(str(path), f"cannot be read: {error}") from error


def uncached_tokens(requests: Iterable[TraceRequest]) -> Iterator[int]:
    """Each prompt's length without the leading blocks seen before, as an endless cache would have it; at least 1."""
    seen: set[str] = set()
    for request in requests:
        hits = 0
        for block in request.prefix_blocks:
            if block not in seen:
                break
            hits += 1
        seen.update(request.prefix_blocks)
        yield max(1, request.input_tokens - hits * request.block_tokens)


@dataclass(frozen=True, slots=True)
class TraceSummary:
    """What a plan needs of a trace."""

    input_tokens: tuple[int, ...]  # of each request, uncached if a cache was assumed
    mean_input_tokens: float  # cached part included
    mean_output_tokens: float
    rate_rps: float | None  # None without arrival times


def summarise(requests: Iterable[TraceRequest], *, ideal_prefix_cache: bool, path: str) -> TraceSummary:
    """One pass over a trace; ``InvalidConfig`` naming ``path`` if it is empty."""
    read = list(requests)
    if not read:
        raise InvalidConfig(path, "holds no request")
    inputs = uncached_tokens(read) if ideal_prefix_cache else (request.input_tokens for request in read)
    times = [request.arrival_s for request in read if request.arrival_s is not None]
    span = max(times) - min(times) if times else 0.0
    sessions = any(request.session_id is not None and request.turn for request in read)  # their clocks start apart
    return TraceSummary(
        input_tokens=tuple(inputs),
        mean_input_tokens=sum(request.input_tokens for request in read) / len(read),
        mean_output_tokens=sum(request.output_tokens for request in read) / len(read),
        rate_rps=None if sessions or not span else (len(times) - 1) / span,
    )


def _parse(text: TextIO, path: str) -> Iterator[TraceRequest]:
    first = text.readline()
    if not first.strip():
        return
    if first.lstrip().startswith("{"):
        yield from _json_requests(first, text, path)
    elif first.lstrip().startswith("["):
        yield from _sharegpt_requests(first + text.read(), path)
    else:
        yield from _csv_requests(first, text, path)


# ---- CSV ----


def _csv_requests(header: str, text: TextIO, path: str) -> Iterator[TraceRequest]:
    names = next(csv.reader([header]))
    azure = "ContextTokens" in names
    burst = "Request tokens" in names
    columns = ("ContextTokens", "GeneratedTokens") if azure else ("input_length", "output_length")
    if burst:
        columns = ("Request tokens", "Response tokens")
    for column in columns:
        if column not in names:
            raise InvalidConfig(
                f"{path}:1: {column}", f"must be a column, or the file JSON lines; got {', '.join(names)}"
            )
    began: datetime | None = None
    for number, row in enumerate(csv.DictReader(text, names), start=2):
        line = _Line(f"{path}:{number}", row)
        arrival: float | None = None
        if azure:
            at = line.instant("TIMESTAMP")
            began = began or at
            arrival = (at - began).total_seconds()
        elif "t_s" in names:
            arrival = line.number("t_s")
        elif burst and "Timestamp" in names:
            arrival = line.number("Timestamp")
        if burst and line.count(columns[1], 0) == 0:
            continue
        yield TraceRequest(line.count(columns[0], 1), line.count(columns[1], 0), arrival)


# ---- JSON lines ----


def _json_requests(first: str, text: TextIO, path: str) -> Iterator[TraceRequest]:
    said: dict[str, int] = {}  # session |-> its last prompt, to which a turn's text is appended
    for number, content in enumerate(_chained(first, text), start=1):
        if not content.strip():
            continue
        where = f"{path}:{number}"
        try:
            fields = json.loads(content)
        except ValueError as error:
            raise InvalidConfig(where, f"is not JSON: {error}") from error
        if not isinstance(fields, dict):
            raise InvalidConfig(where, f"must be a JSON object, got {type(fields).__name__}")
        line = _Line(where, fields)
        if "input_length" in fields:
            yield _session_request(line) if "hash_runs" in fields else _mooncake_request(line)
        elif "prompt" in fields or "text_input" in fields:
            yield _prompt_request(line)
        elif "turns" in fields:
            yield TraceRequest(_text_tokens(line.texts("turns")), _text_tokens(line.optional_texts("reference_output")))
        else:
            request = _text_request(line, said)
            said[request.session_id or ""] = request.input_tokens
            yield request


def _chained(first: str, rest: Iterable[str]) -> Iterator[str]:
    yield first
    yield from rest


def _mooncake_request(line: _Line) -> TraceRequest:
    session = line.fields.get("session_id")
    request = TraceRequest(
        input_tokens=line.count("input_length", 1),
        output_tokens=line.count("output_length", 0),
        arrival_s=line.number("timestamp") / 1000 if "timestamp" in line.fields else None,
        session_id=None if session is None else str(session),
        think_s=line.number("delay") / 1000 if "delay" in line.fields else 0.0,
    )
    if "hash_ids" not in line.fields:
        return request
    return replace(request, prefix_blocks=line.names("hash_ids"), block_tokens=MOONCAKE_BLOCK_TOKENS)


def _session_request(line: _Line) -> TraceRequest:
    session = line.text("session_id")
    blocks: list[str] = []
    for index, run in enumerate(line.list("hash_runs")):
        if not (isinstance(run, list) and len(run) == 2 and all(_is_count(value) for value in run)):
            raise line.wrong(f"hash_runs[{index}]", "must be [start, count]", run)
        blocks += [f"{session}/{block}" for block in range(run[0], run[0] + run[1])]  # ids are local to a session
    return TraceRequest(
        input_tokens=line.count("input_length", 1),
        output_tokens=line.count("output_length", 0),
        arrival_s=line.number("t_s"),
        session_id=session,
        turn=line.count("turn", 0),
        think_s=line.number("think_s"),
        prefix_blocks=tuple(blocks),
        block_tokens=SESSION_BLOCK_TOKENS,
    )


def _text_request(line: _Line, said: Mapping[str, int]) -> TraceRequest:
    session = line.text("session_id")
    appended = "append" in line.fields
    new = _text_tokens(line.texts("append" if appended else "input"))
    return TraceRequest(
        input_tokens=new + (said.get(session, 0) if appended else 0),
        output_tokens=_text_tokens(line.texts("output")),
        arrival_s=line.number("t_s"),
        session_id=session,
        turn=line.count("turn", 0),
        appended=appended and session in said,
    )


def _prompt_request(line: _Line) -> TraceRequest:
    fields = line.fields
    asked = next((name for name in ("output_tokens", "output_length") if name in fields), None)
    return TraceRequest(
        input_tokens=_text_tokens(line.texts("prompt" if "prompt" in fields else "text_input")),
        output_tokens=0 if asked is None else line.count(asked, 0),
        arrival_s=line.number("timestamp") / 1000 if "timestamp" in fields else None,
    )


def _sharegpt_requests(text: str, path: str) -> Iterator[TraceRequest]:
    try:
        entries = json.loads(text)
    except ValueError as error:
        raise InvalidConfig(path, f"is not JSON: {error}") from error
    for index, entry in enumerate(entries):
        where = f"{path}: [{index}]"
        if not isinstance(entry, dict):
            raise InvalidConfig(where, f"must be a JSON object, got {type(entry).__name__}")
        said = _Line(where, entry).list("conversations")
        if len(said) < 2:  # as in vLLM
            continue
        question, answer = (
            _Line(f"{where}.conversations[{turn}]", said[turn] if isinstance(said[turn], dict) else {})
            for turn in (0, 1)
        )
        yield TraceRequest(_text_tokens(question.texts("value")), _text_tokens(answer.texts("value")))


def _text_tokens(texts: Iterable[str]) -> int:
    return max(1, math.ceil(sum(len(text) for text in texts) / CHARACTERS_PER_TOKEN))


@dataclass(frozen=True, slots=True)
class _Line:
    """One line's fields; whatever is wrong with one is said with file, line and field."""

    where: str
    fields: Mapping[str, Any]

    def wrong(self, field: str, allowed: str, value: object) -> InvalidConfig:
        return InvalidConfig(f"{self.where}: {field}", f"{allowed}, got {value!r}")

    def number(self, field: str) -> float:
        value = self.fields.get(field)
        try:
            number = float(value)  # type: ignore[arg-type]
        except (TypeError, ValueError):
            number = math.nan
        if not math.isfinite(number) or number < 0 or isinstance(value, bool):
            raise self.wrong(field, "must be a number of at least 0", value)
        return number

    def count(self, field: str, least: int) -> int:
        value = self.fields.get(field)
        number = self.number(field)
        if number != int(number) or number < least:
            raise self.wrong(field, f"must be an integer of at least {least}", value)
        return int(number)

    def text(self, field: str) -> str:
        value = self.fields.get(field)
        if not isinstance(value, str):
            raise self.wrong(field, "must be text", value)
        return value

    def texts(self, field: str) -> list[str]:
        value = self.fields.get(field)
        given = value if isinstance(value, list) else [value]
        texts = [text for text in given if isinstance(text, str)]
        if len(texts) < len(given):
            raise self.wrong(field, "must be text or a list of texts", value)
        return texts

    def optional_texts(self, field: str) -> list[str]:
        return self.texts(field) if field in self.fields else []

    def list(self, field: str) -> list[Any]:
        value = self.fields.get(field)
        if not isinstance(value, list):
            raise self.wrong(field, "must be a list", value)
        return value

    def names(self, field: str) -> tuple[str, ...]:
        values = self.list(field)
        for value in values:
            if not _is_count(value):
                raise self.wrong(field, "must be a list of integers", value)
        return tuple(map(str, values))

    def instant(self, field: str) -> datetime:
        value = self.text(field)
        try:
            return datetime.fromisoformat(value[:26])  # Azure writes 7 digits of a second; Python reads 6
        except ValueError as error:
            raise self.wrong(field, "must be an ISO date and time", value) from error


def _is_count(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0
