"""deploy/ray: manifests that KubeRay takes, files that `ray up` takes, configurations that the service takes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import ray
import yaml
from ray.autoscaler._private.util import prepare_config, validate_config

from cluster.config import load_config
from tests.deploy.chart import CHART, KUBERNETES, ROOT, require_valid

RAY = ROOT / "deploy" / "ray"
MANIFESTS = ("raycluster.yaml", "rayjob.yaml")
CLUSTER_FILES = ("aws.yaml", "machines.yaml")


def documents(name: str) -> list[Any]:
    return [d for d in yaml.safe_load_all((RAY / name).read_text()) if d]


@pytest.mark.parametrize("name", MANIFESTS)
def test_kubernetes_and_kuberay_take_the_manifests(name: str) -> None:
    for manifest in documents(name):
        for kubernetes in KUBERNETES:
            require_valid(manifest, kubernetes)


def test_an_unknown_field_of_a_rayjob_is_refused() -> None:
    (job, *_) = documents("rayjob.yaml")
    job["spec"]["command"] = "prfaas"

    with pytest.raises(jsonschema.ValidationError, match="'command' was unexpected"):
        require_valid(job, KUBERNETES[-1])


def test_the_manifests_run_the_charts_ray_and_give_a_stopped_job_time_to_drain() -> None:
    version = yaml.safe_load((CHART / "values.yaml").read_text())["ray"]["version"]
    cluster, (job, config, _) = documents("raycluster.yaml")[0]["spec"], documents("rayjob.yaml")

    drains = {
        "raycluster.yaml": (cluster, yaml.safe_load((RAY / "job" / "service.yaml").read_text())),
        "rayjob.yaml": (job["spec"]["rayClusterSpec"], yaml.safe_load(config["data"]["service.yaml"])),
    }
    for spec, service in drains.values():
        (head,) = spec["headGroupSpec"]["template"]["spec"]["containers"]
        stop_s = {e["name"]: e["value"] for e in head["env"]}["RAY_JOB_STOP_WAIT_TIME_S"]
        assert float(stop_s) > service["drain_timeout_s"]
        assert spec["rayVersion"] == version
        assert {g["groupName"] for g in spec["workerGroupSpecs"]} == {"prefill", "decode"}


@pytest.mark.parametrize("name", CLUSTER_FILES)
def test_ray_up_takes_the_cluster_files(name: str) -> None:
    (config,) = documents(name)
    schema = json.loads((Path(ray.__file__).parent / "autoscaler" / "ray-schema.json").read_text())

    jsonschema.validate(config, schema)
    validate_config(prepare_config(config))


def test_the_configurations_are_ones_that_the_service_takes(tmp_path: Path) -> None:
    inline = tmp_path / "service.yaml"
    inline.write_text(documents("rayjob.yaml")[1]["data"]["service.yaml"])

    for file, overrides in (
        (inline, []),
        (RAY / "job" / "service.yaml", []),
        (RAY / "job" / "service.yaml", ["prefill.resources={}", "decode.resources={}"]),
    ):
        config = load_config(file, overrides)
        assert config.http.host == "0.0.0.0"
        assert bool(config.prefill.resources) != bool(overrides)


def test_a_jobs_runtime_environment_is_one_that_ray_takes() -> None:
    given = yaml.safe_load((RAY / "job" / "runtime-env.yaml").read_text())

    assert ray.runtime_env.RuntimeEnv(**given)["env_vars"] == given["env_vars"]


def test_pods_have_no_machine_in_a_test_that_is_not_marked(request: pytest.FixtureRequest) -> None:
    with pytest.raises(NotADirectoryError, match=r"@pytest\.mark\.ray"):
        request.getfixturevalue("machine")
