"""Calibrated profiles under $XDG_CACHE_HOME/scheinfer/, found again only on the machine they describe."""

from __future__ import annotations

from pathlib import Path

from hwmodels.catalog import cache_folder
from hwmodels.errors import FormatError
from hwmodels.pool import pooled
from hwmodels.profile import HardwareProfile, load_profile
from runtime.calibrate import calibrate
from runtime.devices import device_name
from runtime.resume import measurement_key
from sim.model import load_model


def profile_path(folder: Path, device: str, quick: bool, cpu_threads: int | None, dtype: str = "auto") -> Path:
    """Where the profile of this machine for a model's shapes is kept.

    The name carries what the measurement depends on; another CPU, GPU, torch or shape is another file.
    """
    spec, name = load_model(folder, dtype), device_name(device)
    key = measurement_key(spec, name, cpu_threads, "quick" if quick else "full")
    return cache_folder() / "profiles" / f"{name.partition(':')[0]}-{spec.name}-{key}.json"


def kept_profile(path: Path) -> HardwareProfile | None:
    """The profile that is kept there; None if there is none, or the file is damaged or of an earlier version."""
    try:
        return load_profile(path)
    except FormatError:
        return None


def cached_profile(
    folder: Path,
    device: str = "auto",
    quick: bool = False,
    cpu_threads: int | None = None,
    progress: bool = True,
    fresh: bool = False,
    dtype: str = "auto",
    repeats: int = 1,
) -> HardwareProfile:
    """The cached profile if it is usable, or the mean of new calibrations that is then kept."""
    path = profile_path(folder, device, quick, cpu_threads, dtype)
    if not fresh and (kept := kept_profile(path)) is not None:
        return kept
    profile = pooled([calibrate(folder, device, quick, cpu_threads, progress, dtype) for _ in range(repeats)])
    profile.save(path)
    return profile
