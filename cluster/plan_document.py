"""Which planning document does a user mean? A file, or the ``plan`` section of a service's YAML, with options on top.

A service's section may leave out what the service says: the GPUs of its own cluster (its pools' workers) and the
capacities of links between named clusters (``kv_transfer.links``). Keys of ``--set`` are the document's in both cases:
``links.wan.gbps=4``, not ``plan.links.wan.gbps=4``.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cluster.catalogue import Catalogue, load_catalogue
from cluster.config import ServiceConfig, load_config
from cluster.planning_config import PlanConfig, read_plan_config
from cluster.yaml_source import YamlSource, overridden, read_yaml
from core.errors import InvalidConfig
from kv_transfer.config import ANY_CLUSTER

SECTION = "plan"
_SLO_KEYS = {"ttft": "ttft_s", "tpot": "tpot_s", "attainment": "attainment"}
_LENGTH_FORMS = "fixed:TOKENS or log_normal:MU,SIGMA,MINIMUM,MAXIMUM"


@dataclass(frozen=True)
class PlanOptions:
    """What the command line puts over the file."""

    overrides: Sequence[str] = ()  # KEY=VALUE
    trace: Path | None = None
    lengths: str | None = None
    slo: str | None = None
    catalogue: Path | None = None


@dataclass(frozen=True)
class PlanDocument:
    """A document that was read, and where each of its keys came from."""

    config: PlanConfig
    catalogue: Catalogue
    folder: Path  # paths of the document are relative to it
    source: YamlSource
    section: str  # "" where the file is the document
    overridden_keys: tuple[str, ...]


def load_plan(path: Path, options: PlanOptions) -> PlanDocument:
    """The document at ``path`` under ``options``; ``InvalidConfig`` with file, line and key, or with the option."""
    source = read_yaml(path)
    section = SECTION if SECTION in source.values else ""
    values: dict[str, Any] = source.values
    if section:
        values = section_values(load_config(path))
    elif "clusters" not in values:
        message = f"has neither clusters (a planning document) nor a section {SECTION} (a service's YAML)"
        raise InvalidConfig(str(path), f"{message}; see docs/planning.md")
    keys: list[str] = []
    for override in (*_option_overrides(options), *options.overrides):
        values = overridden(values, override)
        keys.append(override.partition("=")[0])
    with source.errors(section, keys):
        config = read_plan_config(values)
        _check_inferred(config, source, section)
    chosen = options.catalogue or (None if config.catalogue is None else path.parent / config.catalogue)
    return PlanDocument(config, load_catalogue(chosen), path.parent, source, section, tuple(keys))


def check_section(service: ServiceConfig) -> None:
    """``InvalidConfig`` if the service has a ``plan`` section that is wrong."""
    if service.plan:
        try:
            read_plan_config(section_values(service))
        except InvalidConfig as error:
            raise InvalidConfig(f"{SECTION}.{error.key}", error.message) from error


def section_values(service: ServiceConfig) -> dict[str, Any]:
    """The ``plan`` section of a service, with what the service says where the section is silent."""
    section = dict(service.plan)
    clusters = section.get("clusters")
    if clusters is None or isinstance(clusters, dict):
        own = (clusters or {}).get(service.cluster_id) or {}
        known = _gpus(service) if isinstance(own, dict) else {}
        section["clusters"] = {**(clusters or {}), service.cluster_id: known | own}
    links = section.get("links")
    if links is None or isinstance(links, dict):
        section["links"] = _links(service) | (links or {})
    return section


def _gpus(service: ServiceConfig) -> dict[str, int]:
    """GPUs of the service's own pools (a worker without one counts as its ranks), and of an instance if they agree."""
    pools = (service.prefill, service.decode)
    known = {"num_gpus": sum(pool.count * max(pool.tensor_parallel, round(pool.num_gpus)) for pool in pools)}
    degrees = {pool.tensor_parallel for pool in pools if pool.count}
    if len(degrees) == 1 and (degree := degrees.pop()) > 1:
        known["gpus_per_instance"] = degree
    return known


def _links(service: ServiceConfig) -> dict[str, Any]:
    """Links into the service's cluster whose capacity is known."""
    return {
        f"{link.from_cluster}-{link.to_cluster}": {
            "from_cluster": link.from_cluster,
            "to_cluster": link.to_cluster,
            "gbps": link.capacity_gbps,
        }
        for link in service.kv_transfer.links
        if link.capacity_gbps is not None
        and link.to_cluster == service.cluster_id
        and link.from_cluster not in (ANY_CLUSTER, service.cluster_id)
    }


def _check_inferred(config: PlanConfig, source: YamlSource, section: str) -> None:
    for key in config.inferred:
        if (f"{section}.{key}" if section else key) not in source.lines:
            raise InvalidConfig(f"inferred.{key}", "names no key of this document")


def still_inferred(document: PlanDocument) -> dict[str, str]:
    """``inferred`` without the keys to which an option gave another value."""

    def replaced(key: str) -> bool:
        return any(key == given or key.startswith((f"{given}.", f"{given}[")) for given in document.overridden_keys)

    return {key: reason for key, reason in document.config.inferred.items() if not replaced(key)}


# ---- options as overrides ----


def _option_overrides(options: PlanOptions) -> list[str]:
    found = []
    if options.trace is not None and options.lengths is not None:
        raise InvalidConfig("--lengths", "must not be given with --trace: both give the prompt lengths")
    if options.trace is not None:
        found += _only_source("trace", str(options.trace.absolute()))
        found.append("workload.output_tokens=null")
    if options.lengths is not None:
        found += _lengths(options.lengths)
    if options.slo is not None:
        found += _slo(options.slo)
    return found


def _only_source(name: str, value: str) -> list[str]:
    names = ("log_normal", "histogram", "fixed_tokens", "trace")
    return [f"workload.{other}=null" for other in names if other != name] + [f"workload.{name}={value}"]


def _lengths(text: str) -> list[str]:
    form, _, numbers = text.partition(":")
    given = numbers.split(",")
    if not all(_is_number(number) for number in given):
        raise InvalidConfig("--lengths", f"must be {_LENGTH_FORMS}, got {text!r}")
    if form == "fixed" and len(given) == 1:
        return _only_source("fixed_tokens", given[0])
    if form == "log_normal" and len(given) == 4:
        names = ("mu", "sigma", "minimum", "maximum")
        body = ", ".join(f"{name}: {number}" for name, number in zip(names, given, strict=True))
        return _only_source("log_normal", f"{{{body}}}")
    raise InvalidConfig("--lengths", f"must be {_LENGTH_FORMS}, got {text!r}")


def _slo(text: str) -> list[str]:
    found = []
    for part in text.split(","):
        name, _, value = part.partition("=")
        if name.strip() not in _SLO_KEYS or not _is_number(value):
            raise InvalidConfig("--slo", f"must be like ttft=2,tpot=0.025,attainment=0.9 (seconds), got {text!r}")
        found.append(f"slo.{_SLO_KEYS[name.strip()]}={value}")
    return found


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True
