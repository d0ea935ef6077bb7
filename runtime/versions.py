"""Versions that belong beside every measured number."""

from __future__ import annotations

import platform
from importlib.metadata import PackageNotFoundError, version

PACKAGES = ("scheinfer", "torch", "transformers", "simpy", "numpy", "pandas")


def versions() -> dict[str, str]:
    """Versions of this program and the libraries that matter, by name."""
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "not installed as a package"
    return found
