"""What does a stream of server-sent events say? Bytes in, as they come; the data of whole events out. Pure.

Of the standard (html.spec.whatwg.org, server-sent events) what answers are made of: ``data`` lines, several of which
are joined by a newline; comments and other fields are passed over; lines end with LF, CR LF or CR.
"""

from __future__ import annotations

from collections.abc import Iterator


class EventStream:
    """One answer's events. What is not whole yet waits for the next bytes."""

    def __init__(self) -> None:
        self._rest = b""
        self._data: list[bytes] = []
        self._after_cr = False  # an LF that comes next belongs to the CR before it

    def push(self, received: bytes) -> Iterator[bytes]:
        """The data of the events that these bytes complete."""
        if self._after_cr and received:
            received = received.removeprefix(b"\n")
            self._after_cr = False
        text = self._rest + received
        if b"\r" in text:
            self._after_cr = text.endswith(b"\r")
            text = text.replace(b"\r\n", b"\n").replace(b"\r", b"\n")
        *lines, self._rest = text.split(b"\n")
        for line in lines:
            if line.startswith(b"data:"):
                self._data.append(line[6:] if line[5:6] == b" " else line[5:])
            elif line == b"data":
                self._data.append(b"")
            elif not line and self._data:
                event, self._data = b"\n".join(self._data), []
                yield event
