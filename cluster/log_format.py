"""How does a log line look, and how is one request found in the logs of all processes?

``text`` is for people; ``json`` is one object a line, for collectors: time (UTC), level, logger, message, process, and
whatever the call gave as ``extra``. What is about one sequence gives it with ``about``: its name, and the client's name
for the request, which is the same in every process.

``REQUESTS`` is the logger of one line for each sequence that each process is done with; it is silent unless
``log_requests`` asks for it, because a request that goes well is no event that anybody acts on.
"""

from __future__ import annotations

import json
import logging
import sys
from datetime import UTC, datetime
from typing import Any

from core.request_log import REQUESTS

TEXT_FORMAT = "%(asctime)s %(levelname)s %(name)s %(message)s"
LOG_FORMATS = TEXT, JSON = ("text", "json")

# What every record has: all else came from ``extra``, or is a library's own mark (Ray's begin with an underscore).
_STANDARD = frozenset(vars(logging.makeLogRecord({}))) | {"message", "asctime", "taskName"}


class JsonFormatter(logging.Formatter):
    """One JSON object a line."""

    def __init__(self, process: str) -> None:
        """``process``: the gateway's or the worker's name."""
        super().__init__()
        self._process = process

    def format(self, record: logging.LogRecord) -> str:
        line: dict[str, Any] = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "logger": record.name,
            "process": self._process,
            "message": record.getMessage(),
        }
        line |= {key: value for key, value in vars(record).items() if key not in _STANDARD and not key.startswith("_")}
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        return json.dumps(line, ensure_ascii=False, default=str)


def configure_logging(level: str, log_format: str, log_requests: bool, process: str) -> None:
    """Log to standard error, or to the handlers that are there already (Ray's, a test's), from ``level`` on."""
    root = logging.getLogger()
    root.setLevel(level.upper())
    if not root.handlers:
        root.addHandler(logging.StreamHandler(sys.stderr))
        root.handlers[0].setFormatter(logging.Formatter(TEXT_FORMAT))
    if log_format == JSON:
        for handler in root.handlers:
            handler.setFormatter(JsonFormatter(process))
    REQUESTS.setLevel(logging.INFO if log_requests else logging.WARNING)
