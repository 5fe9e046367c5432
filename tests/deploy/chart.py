"""The chart as Helm renders it, and whether Kubernetes and KubeRay would take what comes out.

Kubernetes' own kinds are checked by kubernetes-validate's strict schemas, KubeRay's by their CRDs in kuberay_crds, the
Prometheus operator's by the fields of its API that the chart uses. In all of them a field that does not exist is
refused, which a real API server would drop with a warning.
"""

from __future__ import annotations

import functools
import gzip
import os
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jsonschema
import kubernetes_validate
import pytest
import yaml

from deploy.helm.fetch_helm import find_helm

ROOT = Path(__file__).resolve().parents[2]
CHART = ROOT / "deploy" / "helm" / "prfaas"
VALUES = ROOT / "deploy" / "helm" / "values"
CRDS = Path(__file__).parent / "kuberay_crds"
KUBERNETES = ("1.30", "1.37")  # the oldest that Chart.yaml allows, the newest that kubernetes-validate knows
NAMESPACE = "serving"

_MONITORS = {"ServiceMonitor": "endpoints", "PodMonitor": "podMetricsEndpoints"}  # kind |-> its list

Manifest = Mapping[str, Any]


class NotRendered(Exception):
    """Helm refused; the message is what it said."""


def helm(*arguments: str, home: Path) -> str:
    """What helm prints. ``home``: an empty folder instead of the user's settings and caches."""
    binary = find_helm()
    if binary is None:
        pytest.skip("there is no helm: `make helm` fetches one (Linux on x86-64), or install it")
    env = {**os.environ, **{f"HELM_{kind}_HOME": str(home / kind.lower()) for kind in ("CACHE", "CONFIG", "DATA")}}
    done = subprocess.run([str(binary), *arguments], capture_output=True, text=True, env=env, timeout=60)
    if done.returncode != 0:
        raise NotRendered(done.stderr + done.stdout)
    return done.stdout


@dataclass(frozen=True)
class Rendered:
    """The manifests of one ``helm template``."""

    manifests: Sequence[Manifest]

    def one(self, kind: str, name: str | None = None) -> Any:
        """The only one of a kind (of a name)."""
        (found,) = self.all(kind, name)
        return found

    def all(self, kind: str, name: str | None = None) -> list[Any]:
        return [m for m in self.manifests if m["kind"] == kind and name in (None, m["metadata"]["name"])]

    @property
    def config(self) -> dict[str, Any]:
        """What `prfaas serve` is told."""
        (data,) = (m["data"] for m in self.all("ConfigMap") if "prfaas.yaml" in m["data"])
        config: dict[str, Any] = yaml.safe_load(data["prfaas.yaml"])
        return config

    def groups(self) -> dict[str, Any]:
        """Worker groups of the RayCluster, by name."""
        return {group["groupName"]: group for group in self.one("RayCluster")["spec"]["workerGroupSpecs"]}


def render(home: Path, *arguments: str, chart: Path = CHART, release: str = "demo") -> Rendered:
    """`helm template` with these values; ``NotRendered`` with what helm said."""
    text = helm("template", release, str(chart), "--namespace", NAMESPACE, *arguments, home=home)
    return Rendered([m for m in yaml.load_all(text, Loader=yaml.CSafeLoader) if m])


def require_valid(manifest: Manifest, kubernetes: str) -> None:
    """Raise what is wrong with a manifest, or that nothing knows its kind."""
    group = manifest["apiVersion"].rpartition("/")[0]
    if group in ("ray.io", "monitoring.coreos.com"):
        jsonschema.Draft202012Validator(_schema(manifest["kind"])).validate(manifest)
    else:
        kubernetes_validate.validate(manifest, kubernetes, strict=True)


@functools.cache
def _schema(kind: str) -> dict[str, Any]:
    """Of a kind that is not Kubernetes' own."""
    if kind in _MONITORS:
        return _monitor(_MONITORS[kind])
    packed = (CRDS / f"ray.io_{kind.lower()}s.yaml.gz").read_bytes()
    definition = yaml.load(gzip.decompress(packed), Loader=yaml.CSafeLoader)
    versions = definition["spec"]["versions"]
    (schema,) = (version["schema"]["openAPIV3Schema"] for version in versions if version["name"] == "v1")
    _refuse_unknown_fields(schema)
    return dict(schema)


def _refuse_unknown_fields(schema: dict[str, Any]) -> None:
    """As an API server prunes: what a structural schema does not name does not exist, unless it says otherwise."""
    for part in _parts(schema):
        if part.pop("x-kubernetes-int-or-string", False):
            part.pop("type", None)
        if "properties" in part and not part.get("x-kubernetes-preserve-unknown-fields"):
            part.setdefault("additionalProperties", False)


def _parts(schema: dict[str, Any]) -> Iterator[dict[str, Any]]:
    yield schema
    inner = [*schema.get("properties", {}).values()]
    inner += [schema[name] for name in ("items", "additionalProperties") if isinstance(schema.get(name), dict)]
    for part in inner:
        yield from _parts(part)


def _monitor(endpoints: str) -> dict[str, Any]:
    """monitoring.coreos.com/v1, as far as the chart uses it (https://prometheus-operator.dev/docs/api-reference/api)."""
    strings = {"type": "object", "additionalProperties": {"type": "string"}}
    relabeling = _object(
        sourceLabels={"type": "array", "items": {"type": "string"}},
        targetLabel={"type": "string"},
        regex={"type": "string"},
        action={"type": "string"},
        replacement={"type": "string"},
        separator={"type": "string"},
    )
    endpoint = _object(
        port={"type": "string"},
        path={"type": "string"},
        scheme={"enum": ["http", "https"]},
        interval={"type": "string", "pattern": "^[0-9]+(ms|s|m|h)$"},
        relabelings={"type": "array", "items": relabeling},
    )
    listed = {"type": "array", "items": endpoint, "minItems": 1}
    spec = _object(selector=_object(matchLabels=strings), **{endpoints: listed})
    metadata = _object(name={"type": "string"}, namespace={"type": "string"}, labels=strings, annotations=strings)
    root = _object(apiVersion={"const": "monitoring.coreos.com/v1"}, kind={}, metadata=metadata, spec=spec)
    return {**root, "required": ["apiVersion", "kind", "metadata", "spec"]}


def _object(**properties: Any) -> dict[str, Any]:
    return {"type": "object", "properties": properties, "additionalProperties": False}
