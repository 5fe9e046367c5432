"""Tracing is off unless asked for, and says what it lacks. tests/cluster/test_tracing.py sends spans."""

import sys

import pytest

from cluster.config import TracingConfig
from cluster.otlp import open_tracing
from core.clock import VirtualClock
from core.errors import InvalidConfig
from core.tracing import TRACING_OFF


def test_without_an_endpoint_nothing_is_traced_and_nothing_loaded():
    assert open_tracing(TracingConfig(), VirtualClock(), {}) == (TRACING_OFF, None)


def test_without_the_extra_the_key_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "opentelemetry.exporter.otlp.proto.grpc.trace_exporter", None)

    with pytest.raises(InvalidConfig, match=r"prfaas\[otel\]") as caught:
        open_tracing(TracingConfig(endpoint="http://127.0.0.1:4317"), VirtualClock(), {})

    assert caught.value.key == "tracing.endpoint"


@pytest.mark.parametrize("endpoint", ["127.0.0.1:4317", "http://", "ftp://a:1", "http://a:1/path", ""])
def test_an_endpoint_is_a_url_without_a_path(endpoint):
    with pytest.raises(InvalidConfig) as caught:
        TracingConfig(endpoint=endpoint)
    assert caught.value.key == "tracing.endpoint"


@pytest.mark.parametrize("endpoint", ["http://127.0.0.1:4317", "https://collector.example", "http://[::1]:4317/"])
def test_endpoints_that_are_taken(endpoint):
    assert TracingConfig(endpoint=endpoint).endpoint == endpoint
