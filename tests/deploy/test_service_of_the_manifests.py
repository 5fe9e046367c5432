"""The commands of the rendered manifests, as processes of this machine, are a service that answers and drains.

One Ray cluster, started by the commands of the RayCluster: a head that takes no workers, and one node of each worker
group. With the gateway and torch in two workers that takes half a minute of two cores, so there is one test.
"""

from __future__ import annotations

import urllib.error
import urllib.request
from pathlib import Path

import pytest
import yaml

from cluster.certificates import Authority
from tests.deploy.chart import Rendered, render
from tests.deploy.client import Stream, completion
from tests.deploy.pods import Machine

pytestmark = pytest.mark.ray

START_S = 120.0
KEY = "sk-of-a-client"


@pytest.fixture(scope="module")
def release(model: str, ports: list[int], helm_home: Path, tmp_path_factory: pytest.TempPathFactory) -> Rendered:
    """The chart with a tiny model and both Secrets, and ports that do not collide where pods share one network."""
    gcs, agent, client, http, grpc, *workers = ports
    values = {
        "models": {"mountPath": str(tmp_path_factory.mktemp("models"))},
        "config": {
            "model": model,
            "engine": {
                "device": "cpu",
                "dtype": "float32",
                "num_pages": 64,
                "max_batch_tokens": 64,
                "max_batch_size": 8,
            },
            "http": {"host": "127.0.0.1", "port": http},
            "grpc": {"host": "127.0.0.1", "port": grpc},
            "control": {"port": 0, "last_port": None},
            "kv_transfer": {"port": 0, "last_port": None},
        },
        "tls": {"existingSecret": "prfaas-tls"},
        "apiKeys": {"existingSecret": "api-keys"},
        "gateway": {"service": {"httpPort": http, "grpcPort": grpc}},
        "ray": {
            "head": {
                "rayStartParams": {
                    "port": str(gcs),
                    "include-dashboard": "false",  # a dozen processes, of which this asks nothing
                    "dashboard-agent-listen-port": str(agent),
                    "ray-client-server-port": str(client),
                    "metrics-export-port": "0",
                }
            }
        },
        "workerGroups": {
            role: {"rayStartParams": {"metrics-export-port": "0", "dashboard-agent-listen-port": str(port)}}
            for role, port in zip(("prefill", "decode"), workers, strict=False)
        },
    }
    file = tmp_path_factory.mktemp("values") / "values.yaml"
    file.write_text(yaml.safe_dump(values))
    return render(helm_home, "--values", str(file))


@pytest.fixture(scope="module")
def pods(release: Rendered, machine: Machine) -> Machine:
    """The RayCluster's pods, running."""
    pem = Authority.create("test").issue("pods")
    machine.secrets = {
        "prfaas-tls": {"ca.crt": pem.ca.decode(), "tls.crt": pem.cert.decode(), "tls.key": pem.key.decode()},
        "api-keys": {"keys": f"# of the test\n{KEY}\n"},
    }
    groups = {"head": release.one("RayCluster")["spec"]["headGroupSpec"], **release.groups()}
    for name, group in groups.items():  # one by one: nodes that begin at once in one /tmp disturb each other
        machine.start_ray(name, group, head=name == "head")
        machine.wait_for(name, "Ray runtime started.", START_S)
    return machine


@pytest.mark.timeout(600)  # a cluster, a service and what else this machine does
def test_the_gateways_pod_serves_with_workers_in_the_pods_of_their_groups_and_drains(
    pods: Machine, release: Rendered
) -> None:
    port = release.config["http"]["port"]
    pods.start_gateway(release)
    pods.wait_for("gateway", "prfaas: ready: ", START_S)

    assert {name: pods.workers_in(name) for name in ("head", "prefill", "decode")} == {
        "head": 0,
        "prefill": 1,
        "decode": 1,
    }
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/health") as response:
        assert response.status == 200
    assert '{"status":"ok"}' in pods.run_helm_test(release)
    assert "internal TLS on: tls.mode says so, with the certificates given" in pods.log("gateway")
    with pytest.raises(urllib.error.HTTPError, match="401"):
        list(completion(port, 8, stream=False))
    (answer,) = completion(port, 8, stream=False, key=KEY)
    assert answer["usage"]["completion_tokens"] == 8

    stream = Stream(port, KEY)
    stream.start()
    assert stream.begun.wait(START_S)
    code = pods.terminate("gateway")

    stream.require_whole()
    assert code == 0, pods.log("gateway")
    pods.wait_until_no_worker_is_left("prefill", "decode")
