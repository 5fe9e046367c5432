"""What users call endpoints."""

from __future__ import annotations

from pathlib import Path

import pytest

from cluster.bench.endpoints import ConfiguredService, parse_arm, parse_endpoint
from core.errors import InvalidConfig

LAPTOP = Path(__file__).resolve().parents[4] / "deploy/examples/laptop.yaml"


@pytest.mark.parametrize(
    ("text", "api", "at", "found"),
    [
        ("http://host:8000", None, "http://host:8000/v1", "chat"),
        ("https://host/v1/", "completions", "https://host/v1", "completions"),
        ("http://host/openai/v2", None, "http://host/openai/v2", "chat"),
        ("host:9000", None, "host:9000", "grpc"),
        ("grpc://[::1]:9000", "grpc", "[::1]:9000", "grpc"),
    ],
)
def test_urls_and_addresses(text: str, api: str | None, at: str, found: str) -> None:
    endpoint = parse_endpoint(text, api)

    assert (endpoint.label, endpoint.at, endpoint.api) == (text, at, found)


def test_a_configuration_is_a_service_to_be_started_with_keys_of_its_own() -> None:
    arm = parse_arm(f"whole={LAPTOP}?prefill.count=0&decode.count=2", "grpc")

    assert (arm.label, arm.api) == ("whole", "grpc")
    assert arm.at == ConfiguredService(LAPTOP, ("prefill.count=0", "decode.count=2"))


@pytest.mark.parametrize(
    ("text", "api", "field"),
    [
        ("nowhere", None, "ENDPOINT: must be http"),
        ("http://host:1", "grpc", "--api: grpc needs an address"),
        ("host:9000", "chat", "--api: chat needs a URL"),
        ("http://host:1", "responses", "--api: must be one of chat, completions, grpc"),
        (f"{LAPTOP}?engine.page_sise=3", None, "engine.page_sise"),
        ("missing.yaml", None, "missing.yaml"),
    ],
)
def test_what_is_wrong_is_said_with_what_is_allowed(text: str, api: str | None, field: str) -> None:
    with pytest.raises(InvalidConfig, match=field):
        parse_endpoint(text, api)


@pytest.mark.parametrize("text", ["http://host:1", "=http://host:1", "label="])
def test_an_arm_has_a_label(text: str) -> None:
    with pytest.raises(InvalidConfig, match="--compare: must be LABEL=ENDPOINT"):
        parse_arm(text, None)
