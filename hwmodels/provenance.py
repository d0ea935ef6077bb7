"""What belongs beside every number: the code's commit, the versions of what it used, the machine."""

from __future__ import annotations

import platform
import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from hwmodels.machine import fingerprint

PACKAGES = ("scheinfer", "torch", "transformers", "simpy", "numpy", "pandas", "pyarrow")


def versions() -> dict[str, str]:
    """Versions of Python, this program and the libraries that matter, by name."""
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "not installed as a package"
    return found


def provenance() -> dict[str, object]:
    """Commit of the code (None outside of its own repository), versions, and the machine as JSON values."""
    own = _git("ls-files", "--error-unmatch", Path(__file__).name) is not None
    return {
        "commit": _git("rev-parse", "--short=12", "HEAD") if own else None,
        "uncommitted_changes": bool(_git("status", "--porcelain", "--untracked-files=no")) if own else None,
        "versions": versions(),
        "host": fingerprint(),
    }


def _git(*arguments: str) -> str | None:
    """What git says of the folder of this file; None if it refuses or is not there."""
    try:
        done = subprocess.run(
            ["git", *arguments], cwd=Path(__file__).parent, capture_output=True, text=True, check=False
        )
    except OSError:
        return None
    return done.stdout.strip() if done.returncode == 0 else None
