"""What the chart makes of its five values files: valid manifests, a configuration that `prfaas serve` takes, and pods
that Ray, KubeRay's autoscaler and the service count alike."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jsonschema
import kubernetes_validate
import pytest
import yaml
from ray.autoscaler._private.kuberay.autoscaling_config import _derive_autoscaling_config_from_ray_cr

from cluster.config import load_config
from core.request import Role
from tests.deploy.chart import CHART, KUBERNETES, NAMESPACE, ROOT, VALUES, Rendered, helm, require_valid
from tests.deploy.conftest import VALUES_FILES

Render = Callable[[str], Rendered]
RenderWith = Callable[..., Rendered]

KINDS = {
    "laptop": {"ConfigMap", "Deployment", "Pod", "RayCluster", "Service", "ServiceAccount"},
    "everything-on": {
        "ConfigMap",
        "Deployment",
        "Ingress",
        "NetworkPolicy",
        "PersistentVolumeClaim",
        "Pod",
        "PodDisruptionBudget",
        "PodMonitor",
        "RayCluster",
        "Service",
        "ServiceAccount",
        "ServiceMonitor",
    },
}


def test_the_five_values_files_are_there() -> None:
    assert VALUES_FILES == ["1p1d-gpu", "8p4d", "everything-on", "laptop", "remote-prefill-cluster"]


@pytest.mark.parametrize("name", [None, *VALUES_FILES])
def test_lint_finds_nothing(name: str | None, helm_home: Path) -> None:
    files = [] if name is None else ["--values", str(VALUES / f"{name}.yaml")]

    said = helm("lint", "--strict", str(CHART), *files, home=helm_home)

    assert "0 chart(s) failed" in said
    assert "[WARNING]" not in said


@pytest.mark.parametrize("name", VALUES_FILES)
def test_every_manifest_is_one_that_kubernetes_and_kuberay_take(name: str, rendered: Render) -> None:
    manifests = rendered(name).manifests

    for manifest in manifests:
        for kubernetes in KUBERNETES:
            require_valid(manifest, kubernetes)
    assert KINDS.get(name, set()) <= {manifest["kind"] for manifest in manifests}


def _pod(manifest: Any) -> Any:
    """Of a Deployment, or of a group of a RayCluster."""
    return manifest.get("spec", manifest)["template"]["spec"]


@pytest.mark.parametrize(
    ("kind", "spoil", "error"),
    [
        ("Deployment", lambda m: _pod(m)["containers"][0].update(command_line=[]), kubernetes_validate.ValidationError),
        ("Service", lambda m: m["spec"].update(port=1), kubernetes_validate.ValidationError),
        ("RayCluster", lambda m: m["spec"].update(enableAutoscaling=True), jsonschema.ValidationError),
        ("RayCluster", lambda m: m["spec"]["headGroupSpec"].update(startParams={}), jsonschema.ValidationError),
        ("RayCluster", lambda m: _pod(m["spec"]["workerGroupSpecs"][0]).update(gpus=1), jsonschema.ValidationError),
        ("ServiceMonitor", lambda m: m["spec"]["endpoints"][0].update(url="x"), jsonschema.ValidationError),
    ],
)
def test_an_unknown_field_is_refused(kind: str, spoil: Any, error: type[Exception], rendered: Render) -> None:
    manifest = json.loads(json.dumps(rendered("everything-on").all(kind)[0]))
    spoil(manifest)

    with pytest.raises(error, match="Additional properties are not allowed"):
        require_valid(manifest, KUBERNETES[-1])


@pytest.mark.parametrize("name", VALUES_FILES)
def test_the_configuration_is_one_that_the_service_takes(name: str, rendered: Render, tmp_path: Path) -> None:
    file = tmp_path / "prfaas.yaml"
    file.write_text(yaml.safe_dump(rendered(name).config))

    config = load_config(file)

    assert config.ray.address == "auto"
    assert config.model_cache_dir.startswith("/models/")
    assert config.control.port
    assert config.kv_transfer.port
    for role in Role:
        assert config.pool(role).count == 0 or role.value in config.pool(role).resources


@pytest.mark.parametrize("name", VALUES_FILES)
def test_rays_autoscaler_reads_in_each_group_what_its_workers_ask_for(name: str, rendered: Render) -> None:
    cluster = rendered(name).one("RayCluster")
    cluster["metadata"]["namespace"] = NAMESPACE

    types = _derive_autoscaling_config_from_ray_cr(cluster)["available_node_types"]

    config = rendered(name).config
    assert types["headgroup"]["resources"]["CPU"] == 0
    groups = rendered(name).groups()
    assert set(groups) == {role for role in ("prefill", "decode") if config[role]["count"]}
    for role, group in groups.items():
        pool, has = config[role], types[role]["resources"]
        per_pod = -(-pool["count"] // group["replicas"])
        assert has["CPU"] >= pool["num_cpus"] * per_pod
        assert has.get("GPU", 0) == pool["num_gpus"] * per_pod
        for resource, amount in pool["resources"].items():
            assert has[resource] == amount * per_pod
        assert types[role]["min_workers"] <= group["replicas"] <= types[role]["max_workers"]
        limits = _pod(group)["containers"][0]["resources"]["limits"]
        assert limits.get("nvidia.com/gpu", 0) == has.get("GPU", 0)


def test_a_worker_too_many_for_its_pods_gets_one_more(rendered_with: RenderWith) -> None:
    groups = rendered_with("config.prefill.count=5", "workerGroups.prefill.workersPerPod=2").groups()

    assert groups["prefill"]["replicas"] == 3
    assert groups["prefill"]["rayStartParams"]["resources"] == '"{\\"prefill\\":2}"'
    assert groups["decode"]["replicas"] == 1


def test_a_pool_that_grows_gets_the_pods_that_its_fewest_and_most_workers_need(rendered_with: RenderWith) -> None:
    made = rendered_with(
        "ray.autoscaler.enabled=true",
        "config.prefill.count=2",
        "config.prefill.min_replicas=0",
        "config.prefill.max_replicas=5",
        "workerGroups.prefill.workersPerPod=2",
        "config.decode.max_replicas=3",
    )

    counts = {role: [g[f"{k}eplicas"] for k in ("minR", "r", "maxR")] for role, g in made.groups().items()}
    assert counts == {"prefill": [0, 1, 3], "decode": [1, 1, 3]}
    assert made.one("RayCluster")["spec"]["enableInTreeAutoscaling"] is True


def test_rdma_gets_its_device_a_user_who_may_pin_memory_and_nothing_else_changes(rendered_with: RenderWith) -> None:
    groups = rendered_with('workerGroups.prefill.rdma={"enabled":true,"resourceName":"rdma/ib","count":2}').groups()

    prefill, decode = (groups[role]["template"]["spec"] for role in ("prefill", "decode"))
    assert prefill["containers"][0]["resources"]["limits"]["rdma/ib"] == 2
    assert prefill["containers"][0]["securityContext"]["capabilities"] == {"add": ["IPC_LOCK"], "drop": ["ALL"]}
    assert (prefill["securityContext"]["runAsUser"], prefill["securityContext"]["runAsNonRoot"]) == (0, False)
    assert "add" not in decode["containers"][0]["securityContext"]["capabilities"]
    assert decode["securityContext"]["runAsUser"] == 1000


def test_rays_token_is_the_same_secret_for_the_operators_pods_and_for_the_gateways(rendered_with: RenderWith) -> None:
    for settings, secret in ((), "demo-prfaas"), (('ray.auth.existingSecret="own"',), "own"):
        made = rendered_with(*settings)
        env = {e["name"]: e for e in _pod(made.one("Deployment"))["containers"][0]["env"]}

        assert made.one("RayCluster")["spec"]["authOptions"].get("secretName", "demo-prfaas") == secret
        assert env["RAY_AUTH_MODE"]["value"] == "token"
        assert env["RAY_AUTH_TOKEN"]["valueFrom"]["secretKeyRef"] == {"name": secret, "key": "auth_token"}


def test_certificates_are_where_every_process_is_told_to_look(rendered: Render) -> None:
    made = rendered("everything-on")
    pods = [_pod(made.one("Deployment"))] + [g["template"]["spec"] for g in made.groups().values()]

    assert made.config["tls"] == {
        "mode": "on",
        "ca_file": "/etc/prfaas/tls/ca.crt",
        "cert_file": "/etc/prfaas/tls/tls.crt",
        "key_file": "/etc/prfaas/tls/tls.key",
    }
    for pod in pods:
        assert {v["name"]: v.get("secret", {}).get("secretName") for v in pod["volumes"]}["tls"] == "prfaas-tls"
        assert {m["name"]: m["mountPath"] for m in pod["containers"][0]["volumeMounts"]}["tls"] == "/etc/prfaas/tls"


def test_a_gated_models_token_reaches_whoever_loads_it_and_stands_in_no_manifest(rendered: Render) -> None:
    made = rendered("everything-on")
    pods = [_pod(made.one("Deployment"))] + [g["template"]["spec"] for g in made.groups().values()]

    for pod in pods:
        (token,) = (e for e in pod["containers"][0]["env"] if e["name"] == "HF_TOKEN")
        assert token["valueFrom"]["secretKeyRef"] == {"name": "huggingface", "key": "token"}
    assert made.all("Secret") == []


def test_the_gateway_alone_sees_the_clients_keys(rendered: Render) -> None:
    made = rendered("everything-on")

    gateway = _pod(made.one("Deployment"))
    mounts = {m["name"]: m["mountPath"] for m in gateway["containers"][0]["volumeMounts"]}
    assert made.config["api_keys_file"] == f"{mounts['api-keys']}/keys"
    assert {v["name"]: v.get("secret", {}).get("secretName") for v in gateway["volumes"]}["api-keys"] == "api-keys"
    assert "PRFAAS_API_KEY" in made.one("Pod")["spec"]["containers"][0]["args"][0]
    assert all("api-keys" not in {v["name"] for v in _pod(g)["volumes"]} for g in made.groups().values())


def test_a_cluster_that_joins_has_no_door_and_no_decode_worker(rendered: Render) -> None:
    made = rendered("remote-prefill-cluster")

    assert not {"http", "grpc", "router", "registry"} & set(made.config)
    assert made.all("Service") == []
    assert set(made.groups()) == {"prefill"}
    assert made.one("Deployment")["metadata"]["name"].endswith("-launcher")
    assert not {"readinessProbe", "startupProbe"} & set(_pod(made.one("Deployment"))["containers"][0])
    assert "prfaas.east.example.com" in made.one("Pod")["spec"]["containers"][0]["args"][0]


def test_the_registry_of_a_gateway_is_open_for_other_clusters(rendered: Render) -> None:
    made = rendered("everything-on")

    service = made.one("Service", "demo-llm-registry")
    assert [p["port"] for p in service["spec"]["ports"]] == [9100]
    policy = made.one("NetworkPolicy", "demo-llm-other-clusters")
    assert [(p["port"], p.get("endPort")) for p in policy["spec"]["ingress"][0]["ports"]] == [
        (9100, None),
        (9200, 9219),
        (9300, 9319),
    ]


def test_services_budgets_and_policies_select_pods_that_there_are(rendered: Render) -> None:
    made = rendered("everything-on")
    spec = made.one("RayCluster")["spec"]
    templates = [made.one("Deployment")["spec"]["template"], spec["headGroupSpec"]["template"]]
    labels = [t["metadata"]["labels"] for t in [*templates, *(g["template"] for g in made.groups().values())]]

    selectors = [m["spec"]["selector"] for m in made.all("Service")]
    selectors += [m["spec"]["selector"]["matchLabels"] for m in made.all("PodDisruptionBudget")]
    selectors += [m["spec"]["podSelector"]["matchLabels"] for m in made.all("NetworkPolicy")]
    assert len(selectors) >= 9
    for selector in selectors:
        assert any(selector.items() <= have.items() for have in labels), selector
    (monitor,) = made.all("ServiceMonitor")
    (door,) = made.all("Service", "demo-llm")
    assert monitor["spec"]["selector"]["matchLabels"].items() <= door["metadata"]["labels"].items()
    assert monitor["spec"]["endpoints"][0]["port"] in {p["name"] for p in door["spec"]["ports"]}


def test_a_changed_configuration_replaces_the_gateways_pod_and_no_pod_of_ray(rendered_with: RenderWith) -> None:
    before, after = rendered_with(), rendered_with("config.router.max_inflight=7")

    assert before.one("Deployment")["spec"]["template"] != after.one("Deployment")["spec"]["template"]
    assert before.one("RayCluster") == after.one("RayCluster")


def test_the_gateway_gets_the_time_that_draining_takes(rendered_with: RenderWith) -> None:
    pod = _pod(rendered_with("config.drain_timeout_s=90.5", "gateway.preStopSleepSeconds=7").one("Deployment"))

    assert pod["terminationGracePeriodSeconds"] >= 98


def test_every_dashboard_in_the_charts_folder_becomes_a_configmap(rendered_with: RenderWith, tmp_path: Path) -> None:
    chart = tmp_path / "prfaas"
    shutil.copytree(CHART, chart)
    (chart / "dashboards").mkdir(exist_ok=True)
    board = {"title": "Requests", "panels": [{"targets": [{"legendFormat": "{{pool}}", "expr": 'x{a="b"}'}]}]}
    (chart / "dashboards" / "zz_requests.json").write_text(json.dumps(board, indent=1))

    made = rendered_with("grafana.dashboards.enabled=true", chart=chart)

    files = {name: text for m in made.all("ConfigMap") for name, text in m["data"].items() if name.endswith(".json")}
    assert json.loads(files["zz_requests.json"]) == board
    assert set(files) == {path.name for path in (chart / "dashboards").glob("*.json")}


def test_versions_agree_with_the_package_and_with_its_ray() -> None:
    chart = yaml.safe_load((CHART / "Chart.yaml").read_text())
    values = yaml.safe_load((CHART / "values.yaml").read_text())

    assert f'version = "{chart["appVersion"]}"' in (ROOT / "pyproject.toml").read_text()
    assert f"\nray=={values['ray']['version']}\n" in (ROOT / "constraints.txt").read_text()


def test_every_section_of_the_values_says_what_it_is() -> None:
    lines = (CHART / "values.yaml").read_text().splitlines()
    sections = [n for n, line in enumerate(lines) if re.match(r"[a-zA-Z]", line)]

    assert len(sections) > 20
    for begin, end in zip(sections, [*sections[1:], len(lines)], strict=True):
        assert "#" in "\n".join(lines[max(0, begin - 1) : end]), lines[begin]
