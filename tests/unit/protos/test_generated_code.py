"""The committed code is what ``make protos`` makes of the .proto files."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[3]
PROTOS = sorted(path.name for path in (ROOT / "protos").glob("*.proto"))


@pytest.fixture(scope="module")
def regenerated(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("protos")
    flags = [f"-I{ROOT}", f"--python_out={out}", f"--pyi_out={out}", f"--grpc_python_out={out}"]
    files = [str(ROOT / "protos" / name) for name in PROTOS]
    # In a process of its own: protoc's library and nixl's abort a process that loads both, and other tests load nixl.
    subprocess.run([sys.executable, "-m", "grpc_tools.protoc", *flags, *files], check=True, timeout=60)
    return out / "protos"


@pytest.mark.parametrize("suffix", ["_pb2.py", "_pb2.pyi", "_pb2_grpc.py"])
@pytest.mark.parametrize("proto", PROTOS)
def test_committed_code_equals_regenerated(proto: str, suffix: str, regenerated: Path) -> None:
    name = proto.removesuffix(".proto") + suffix

    assert (ROOT / "protos" / name).read_bytes() == (regenerated / name).read_bytes()


def test_makefile_regenerates_every_proto_file() -> None:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")

    assert [name for name in PROTOS if f"protos/{name}" not in makefile] == []
