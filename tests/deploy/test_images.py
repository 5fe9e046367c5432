"""deploy/docker, as far as it can be looked at without a container runtime: nothing here builds an image."""

from __future__ import annotations

import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import yaml

from cluster.config import load_config
from core.request import Role
from tests.deploy.chart import ROOT

DOCKER = ROOT / "deploy" / "docker"
INSTRUCTION = re.compile(r"([A-Z]+)\s+(.*)", re.DOTALL)


@pytest.fixture(scope="module")
def instructions() -> list[tuple[str, str]]:
    """(word, rest) of each instruction of the Dockerfile, comments gone and continued lines joined."""
    lines = [line for line in (DOCKER / "Dockerfile").read_text().splitlines() if not line.lstrip().startswith("#")]
    joined = re.sub(r"\\\n", " ", "\n".join(lines))
    found = [INSTRUCTION.fullmatch(line.strip()) for line in joined.splitlines() if line.strip()]
    assert all(found)
    return [(match[1], match[2]) for match in found if match]


def _copied(instructions: list[tuple[str, str]]) -> list[str]:
    """Paths of the build context."""
    return [source for word, rest in instructions if word == "COPY" for source in rest.split()[:-1]]


def test_the_image_copies_what_there_is_and_every_package(instructions: list[tuple[str, str]]) -> None:
    copied = _copied(instructions)
    packages = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"]["find"]["include"]

    assert [source for source in copied if not (ROOT / source).exists()] == []
    assert {name.rstrip("*") for name in packages} <= set(copied)


def test_the_context_holds_what_the_image_copies_and_nothing_else(instructions: list[tuple[str, str]]) -> None:
    lines = [line for line in (ROOT / ".dockerignore").read_text().splitlines() if line and not line.startswith("#")]

    assert lines[0] == "*"
    assert {line[1:] for line in lines if line.startswith("!")} == set(_copied(instructions))


def test_both_devices_have_a_base_and_every_stage_is_there(instructions: list[tuple[str, str]]) -> None:
    stages = [rest.split() for word, rest in instructions if word == "FROM"]

    assert {words[2] for words in stages} == {"base-cpu", "base-gpu", "image"}
    assert stages[-1][0] == "base-${DEVICE}"


def test_no_instruction_runs_as_root_at_the_end_and_signals_reach_the_process(
    instructions: list[tuple[str, str]],
) -> None:
    last = dict(instructions)  # of each word, the last

    assert last["USER"] == "1000"
    assert last["ENTRYPOINT"] == '["tini", "--"]'
    assert last["CMD"].startswith('["prfaas", "serve"')


def test_the_shell_of_every_step_is_well_formed(instructions: list[tuple[str, str]]) -> None:
    for word, rest in instructions:
        if word == "RUN":
            done = subprocess.run(["bash", "-n", "-c", rest], capture_output=True, text=True)
            assert done.returncode == 0, (rest, done.stderr)


def test_extras_that_the_image_installs_exist(instructions: list[tuple[str, str]]) -> None:
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]

    wanted = [name for word, rest in instructions for found in re.findall(r"EXTRAS=(\S+)", rest) if word == "ENV"
              for name in found.split(",")]  # fmt: skip
    assert set(wanted) == {"plot", "gpu", "structured"}
    assert set(wanted) <= set(extras)


def test_the_compose_file_is_one_by_its_schema() -> None:
    checker = [sys.executable, "-m", "check_jsonschema", "--builtin-schema", "vendor.compose-spec"]

    done = subprocess.run([*checker, str(DOCKER / "compose.yaml")], capture_output=True, text=True)

    assert done.returncode == 0, done.stdout + done.stderr


def test_an_unknown_key_in_a_compose_file_is_refused(tmp_path: Path) -> None:
    compose = yaml.safe_load((DOCKER / "compose.yaml").read_text())
    compose["services"]["gateway"]["replicas"] = 2
    (tmp_path / "compose.yaml").write_text(yaml.safe_dump(compose))
    checker = [sys.executable, "-m", "check_jsonschema", "--builtin-schema", "vendor.compose-spec"]

    done = subprocess.run([*checker, str(tmp_path / "compose.yaml")], capture_output=True, text=True)

    assert done.returncode == 1
    assert "'replicas'" in done.stdout


def test_compose_starts_ray_nodes_for_the_workers_that_its_service_asks_for() -> None:
    services = yaml.safe_load((DOCKER / "compose.yaml").read_text())["services"]
    config = load_config(DOCKER / "service.yaml")

    for role in Role:
        assert f'--resources={{"{role.value}": {config.pool(role).count}}}' in services[role.value]["command"]
        assert config.pool(role).resources == {role.value: 1.0}
    grace_s = float(services["gateway"]["stop_grace_period"].rstrip("s"))
    assert grace_s > config.drain_timeout_s
    assert services["gateway"]["ports"] == [f"127.0.0.1:{p}:{p}" for p in (config.http.port, config.grpc.port)]
