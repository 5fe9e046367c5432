"""Which build of prfaas is this?"""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError
from importlib.metadata import version as installed_version


def version() -> str:
    """The installed distribution's version; ``0+source`` in a checkout that is not installed (a Ray job's folder)."""
    try:
        return installed_version("prfaas")
    except PackageNotFoundError:
        return "0+source"
