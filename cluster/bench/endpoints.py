"""Which endpoints are measured? What a user calls them, and how each is reached.

http://HOST:PORT[/v1], https://...   any OpenAI-compatible endpoint
grpc://HOST:PORT or HOST:PORT        a prfaas service over gRPC
CONFIG.yaml[?KEY=VALUE&...]          a service of ours that is started for its turn, with these keys set, and
                                     stopped after it: arms of one comparison share the machine, never at one time
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from cluster.bench.target import APIS, CHAT, GRPC, OFF, Target
from cluster.config import load_config
from cluster.service_process import OnWait, ServiceDoors, prfaas_service
from core.errors import InvalidConfig

FORMS = "http(s)://HOST:PORT, grpc://HOST:PORT or CONFIG.yaml?KEY=VALUE&..."

_ADDRESS = re.compile(r"[^/?\s]+:\d{1,5}")
_VERSION = re.compile(r"/v\d+$")


@dataclass(frozen=True)
class ConfiguredService:
    """A service that is started for its turn."""

    config: Path
    overrides: tuple[str, ...]


@dataclass(frozen=True)
class Endpoint:
    """One arm. ``at``: an HTTP base URL (with its version), a gRPC address, or what is to be started."""

    label: str
    at: str | ConfiguredService
    api: str


def parse_endpoint(text: str, api: str | None, label: str | None = None, option: str = "ENDPOINT") -> Endpoint:
    """``InvalidConfig`` naming ``option``. ``api``: None: chat over HTTP, grpc of a gRPC address."""
    if api is not None and api not in APIS:
        raise InvalidConfig("--api", f"must be one of {', '.join(APIS)}, got {api!r}")
    label = label or text
    if text.startswith(("http://", "https://")):
        if api == GRPC:
            raise InvalidConfig("--api", f"grpc needs an address like HOST:PORT, got {text!r}")
        url = text.rstrip("/")
        return Endpoint(label, url if _VERSION.search(url) else f"{url}/v1", api or CHAT)
    address = text.removeprefix("grpc://")
    if _ADDRESS.fullmatch(address):
        if api not in (None, GRPC):
            raise InvalidConfig("--api", f"{api} needs a URL like http://HOST:PORT, got {text!r}")
        return Endpoint(label, address, GRPC)
    path, _, keys = text.partition("?")
    if path.endswith((".yaml", ".yml")):
        service = ConfiguredService(Path(path), tuple(keys.split("&")) if keys else ())
        load_config(service.config, service.overrides)  # what is wrong is said before anything is measured
        return Endpoint(label, service, api or CHAT)
    raise InvalidConfig(option, f"must be {FORMS}, got {text!r}")


def parse_arm(text: str, api: str | None) -> Endpoint:
    """``LABEL=ENDPOINT`` of ``--compare``."""
    label, equals, target = text.partition("=")
    if not equals or not label.strip() or not target or "/" in label or ":" in label:
        raise InvalidConfig("--compare", f"must be LABEL=ENDPOINT, ENDPOINT being {FORMS}; got {text!r}")
    return parse_endpoint(target, api, label.strip(), "--compare")


@contextmanager
def running(endpoint: Endpoint, log_folder: Path, on_wait: OnWait) -> Iterator[Endpoint]:
    """The endpoint with an address, up for as long as the context lasts."""
    if not isinstance(endpoint.at, ConfiguredService):
        yield endpoint
        return
    name = re.sub(r"[^\w.-]", "_", endpoint.label)
    with prfaas_service(endpoint.at.config, endpoint.at.overrides, log_folder / f"{name}.log", on_wait) as doors:
        yield Endpoint(endpoint.label, _door(doors, endpoint.api), endpoint.api)


def make_target(
    endpoint: Endpoint,
    *,
    model: str | None,
    api_key: str | None,
    ignore_eos: str,
    count_output: Callable[[str], int] | None,
) -> Target:
    """The client of a running endpoint; it opens nothing yet."""
    assert isinstance(endpoint.at, str), "running"
    # Here, because the clients' libraries take half a second to load, and few commands need them.
    if endpoint.api == GRPC:
        from cluster.bench.grpc_target import GrpcTarget

        return GrpcTarget(endpoint.at, ignore_eos != OFF, model)
    from cluster.bench.openai_target import OpenAIEndpoint, OpenAITarget

    return OpenAITarget(OpenAIEndpoint(endpoint.at, endpoint.api, model, api_key, ignore_eos), count_output)


def _door(doors: ServiceDoors, api: str) -> str:
    return doors.grpc_address if api == GRPC else f"{doors.http_url}/v1"
