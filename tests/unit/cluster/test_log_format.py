"""Logs for people and for collectors."""

import io
import json
import logging
from collections.abc import Iterator

import pytest

from cluster.log_format import configure_logging
from core.request import SequenceId
from core.request_log import REQUESTS, about


@pytest.fixture
def stream() -> Iterator[io.StringIO]:
    """What is written by the root logger's only handler."""
    root, stream = logging.getLogger(), io.StringIO()
    handlers, level, of_requests = list(root.handlers), root.level, REQUESTS.level
    root.handlers = [logging.StreamHandler(stream)]
    yield stream
    root.handlers = handlers
    root.setLevel(level)
    REQUESTS.setLevel(of_requests)


def test_json_lines_have_what_a_collector_looks_for(stream):
    configure_logging("info", "json", True, "prefill-0")

    logging.getLogger("a.b").warning(
        "sequence %s: no", "x", extra=about(SequenceId("g/1/client/0.0")) | {"_ray_mark": 1}
    )
    try:
        raise ValueError("boom")
    except ValueError:
        logging.getLogger("a.b").exception("it broke")

    first, second = map(json.loads, stream.getvalue().splitlines())
    assert {key: first[key] for key in ("level", "logger", "process", "message", "request_id", "sequence_id")} == {
        "level": "warning",
        "logger": "a.b",
        "process": "prefill-0",
        "message": "sequence x: no",
        "request_id": "client",
        "sequence_id": "g/1/client/0.0",
    }
    assert first["time"].endswith("+00:00")
    assert set(first) == {"time", "level", "logger", "process", "message", "request_id", "sequence_id"}
    assert "ValueError: boom" in second["exception"]


def test_what_json_does_not_know_is_written_as_text(stream):
    configure_logging("info", "json", False, "gateway")

    logging.getLogger("a").info("so", extra={"thing": {1, 2}})

    assert json.loads(stream.getvalue())["thing"] == "{1, 2}"


def test_text_is_as_handlers_have_it_and_the_level_holds(stream):
    configure_logging("warning", "text", False, "gateway")

    logging.getLogger("a").info("quiet")
    logging.getLogger("a").warning("loud")

    assert stream.getvalue() == "loud\n"


@pytest.mark.parametrize(("wanted", "lines"), [(True, 1), (False, 0)])
def test_requests_that_went_well_are_logged_if_asked_for(stream, wanted, lines):
    configure_logging("info", "text", wanted, "gateway")

    REQUESTS.info("request x: ok")

    assert len(stream.getvalue().splitlines()) == lines


def test_without_a_handler_there_is_standard_error(capsys):
    root = logging.getLogger()
    handlers, level, of_requests = list(root.handlers), root.level, REQUESTS.level
    root.handlers = []
    try:
        configure_logging("info", "text", False, "gateway")
        logging.getLogger("a").info("here")
    finally:
        root.handlers, _ = handlers, root.setLevel(level)
        REQUESTS.setLevel(of_requests)
    assert capsys.readouterr().err.rstrip().endswith("INFO a here")
