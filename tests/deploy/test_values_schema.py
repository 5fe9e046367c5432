"""Wrong values are refused before anything is rendered, by a message that names the value and what is allowed."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.deploy.chart import ROOT, NotRendered, Rendered, render

RenderWith = Callable[..., Rendered]

WRONG = {
    "a misspelt section": ('gatway={"hostNetwork":true}', "additional properties 'gatway' not allowed"),
    "a misspelt key of the service": (
        "config.engine.pagesize=32",
        "at '/config/engine': additional properties 'pagesize'",
    ),
    "text for a count": ('config.prefill.count="two"', "'/config/prefill/count': got string, want integer"),
    "a routing policy that is none": (
        'config.router.policy="fastest"',
        "'/config/router/policy': value must be one of 'round_robin', 'least_loaded', 'cache_aware', 'prfaas'",
    ),
    "a pull policy that is none": (
        'image.pullPolicy="Sometimes"',
        "'/image/pullPolicy': value must be one of 'Always'",
    ),
    "a port that is none": ("gateway.service.httpPort=70000", "'/gateway/service/httpPort': maximum: got 70,000"),
    "a service type that is none": ('gateway.service.type="Internal"', "'/gateway/service/type': value must be one of"),
    "models on a kind of volume that is none": (
        'models.type="nfs"',
        "'/models/type': value must be one of 'emptyDir', 'pvc'",
    ),
    "no worker in a pod": (
        "workerGroups.prefill.workersPerPod=0",
        "'/workerGroups/prefill/workersPerPod': minimum: got 0",
    ),
    "a number for an option of ray start": (
        'workerGroups.decode.rayStartParams={"num-cpus":4}',
        "'/workerGroups/decode/rayStartParams/num-cpus': got number, want string",
    ),
    "a size that is none": (
        'workerGroups.prefill.shmSize="1 GB"',
        "'/workerGroups/prefill/shmSize': '1 GB' does not match",
    ),
    "an inline secret": ('huggingFace={"token":"hf_x"}', "'/huggingFace': additional properties 'token' not allowed"),
    "an address for a CIDR": ('networkPolicy.otherClusters=["10.0.0.1"]', "'/networkPolicy/otherClusters/0'"),
    "an upgrade strategy that is none": (
        'ray.upgradeStrategy="Rolling"',
        "'/ray/upgradeStrategy': value must be one of 'Recreate', 'None'",
    ),
}

CONTRADICTIONS = {
    "fewer pods at most than workers need": (
        ["ray.autoscaler.enabled=true", "config.prefill.count=4", "workerGroups.prefill.maxReplicas=2"],
        "workerGroups.prefill: minReplicas (4) and maxReplicas (2) must enclose the 4 pods",
    ),
    "a range without an autoscaler": (
        ["workerGroups.decode.maxReplicas=3"],
        "workerGroups.decode: minReplicas and maxReplicas differ, which means something only with ray.autoscaler",
    ),
    "a pool that grows without an autoscaler": (
        ["config.decode.max_replicas=3"],
        "config.decode.max_replicas: needs ray.autoscaler.enabled, or no pod ever comes",
    ),
    "fewer pods than a pool may grow to": (
        ["ray.autoscaler.enabled=true", "config.decode.max_replicas=3", "workerGroups.decode.maxReplicas=2"],
        "workerGroups.decode.maxReplicas: must be at least 3, the pods that config.decode.max_replicas (3) needs",
    ),
    "joining without certificates": (
        ['config={"cluster_id":"west","join":["10.0.0.1:9100"],"decode":{"count":0}}'],
        "tls.existingSecret: is needed with config.join",
    ),
    "joining with decode workers": (
        ['config={"cluster_id":"west","join":["10.0.0.1:9100"]}', 'tls.existingSecret="x"'],
        "config.decode.count: must be 0 with config.join",
    ),
    "a registry without a port": (
        ["registry.service.enabled=true", 'tls.existingSecret="x"'],
        "config.registry.port: is needed with registry.service.enabled",
    ),
    "a registry without certificates": (
        ["registry.service.enabled=true", "config.registry.port=9100"],
        "tls.existingSecret: is needed with registry.service.enabled",
    ),
    "workers that could be put anywhere": (
        ["config.prefill.resources.prefill=0"],
        "config.prefill.resources: must hold an amount above 0",
    ),
    "a new volume of no size": (
        ['models={"type":"pvc","pvc":{"size":""}}'],
        "models.pvc.size: is needed unless models.pvc.existingClaim is given",
    ),
}


@pytest.mark.parametrize("wrong", WRONG)
def test_a_wrong_value_is_refused_by_name(wrong: str, rendered_with: RenderWith) -> None:
    setting, said = WRONG[wrong]

    with pytest.raises(NotRendered) as caught:
        rendered_with(setting)

    assert said in str(caught.value)


@pytest.mark.parametrize("wrong", CONTRADICTIONS)
def test_values_that_contradict_each_other_are_refused_by_name(wrong: str, rendered_with: RenderWith) -> None:
    settings, said = CONTRADICTIONS[wrong]

    with pytest.raises(NotRendered) as caught:
        rendered_with(*settings)

    assert said in str(caught.value)


def test_a_release_named_like_no_service_can_be_is_refused_by_name(helm_home: Path) -> None:
    with pytest.raises(NotRendered, match="fullnameOverride: is needed with a release named 1p1d"):
        render(helm_home, release="1p1d")

    assert render(helm_home, "--set", "fullnameOverride=one", release="1p1d").all("Service", "one")


def test_the_schema_of_config_is_the_services_own() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "deploy.helm.embed_schema", "--check"], cwd=ROOT, capture_output=True, text=True
    )

    assert done.returncode == 0, done.stderr
