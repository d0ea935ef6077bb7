"""Profiles by name: shipped with the program, calibrated before and kept in the cache, or a file of your own."""

from __future__ import annotations

import difflib
import os
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path

from hwmodels.errors import ProfileError
from hwmodels.parts import Recipe, assemble, compose, gpus, hosts, links, machines
from hwmodels.profile import Curve, HardwareProfile, Peak, Resource, Source, load_profile

__all__ = ["SMT_SHARE", "beside_siblings", "cache_folder", "compose", "hardware", "names", "with_overrides"]

SMT_SHARE = 0.61
"""Of a core's speed what one hardware thread has while the core's other one is busy.

Both threads of a Zen 3 core together do 1.22 times what one does alone, the average over AnandTech's programs with many
threads (Cutress, "Investigating Performance of Multi-Threading on Zen 3", 2020). It differs from program to program.
"""

_LEAST_SHARE = 0.01
_SHIPPED = Path(__file__).parent / "profiles"


def cache_folder() -> Path:
    """Where calibrated profiles and other results are kept: ``$XDG_CACHE_HOME/scheinfer``."""
    home = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(home) / "scheinfer"


def names() -> list[str]:
    """Names that `hardware` knows: calibrated and shipped, calibrated and cached, composed of published figures."""
    return list(dict.fromkeys([*_files(_SHIPPED), *_files(cache_folder() / "profiles"), *machines()]))


def hardware(name: str | Path) -> HardwareProfile:
    """A profile by name, by path of its JSON file, or composed on the spot as ``GPU+HOST`` or ``GPU+HOST+LINK``.

    >>> hardware("rtx4090-ryzen7950x").vram_bytes // 2**30
    23
    >>> hardware("rtx3060+epyc7302").fingerprint["link"]
    'PCIe 3.0 x16'

    Raises ProfileError for an unknown name, listing the closest first; FormatError for an unusable file.
    """
    text = str(name)
    if text.endswith(".json") or os.sep in text:
        return load_profile(text)
    for folder in (_SHIPPED, cache_folder() / "profiles"):
        if text in _files(folder):
            return load_profile(folder / f"{text}.json")
    if text in machines():
        return assemble(machines()[text], text)
    match text.split("+"):
        case [gpu, host]:
            return assemble(Recipe(gpu, host), text)
        case [gpu, host, link]:
            return assemble(Recipe(gpu, host, link), text)
    raise ProfileError(f"no hardware profile {text!r}; {_known(text)}")


def _files(folder: Path) -> list[str]:
    return sorted(path.stem for path in folder.glob("*.json"))


def _known(text: str) -> str:
    close = sorted(names(), key=lambda n: -difflib.SequenceMatcher(None, text.lower(), n).ratio())
    return (
        f"known: {', '.join(close)}. Or give a profile's .json file, measure this machine with `scheinfer calibrate`, "
        f"or compose GPU+HOST of {', '.join(gpus())} and {', '.join(hosts())}, with +LINK of {', '.join(links())}"
    )


# -- what if ------------------------------------------------------------------------------------------

_Change = Callable[[HardwareProfile, float], HardwareProfile]


def with_overrides(profile: HardwareProfile, changes: Mapping[str, str | float]) -> HardwareProfile:
    """The machine with other figures, such as ``{"dram_read_GBps": "160", "vram_GiB": "16"}``.

    Curves measured with the old figure are dropped where they no longer hold, so that no estimate poses
    as a measurement. Raises ProfileError for an unknown figure or a value that is not a number above zero.
    """
    for key, text in changes.items():
        if key not in _OVERRIDES:
            raise ProfileError(f"no figure {key!r} to override; known: {', '.join(_OVERRIDES)}")
        try:
            value = float(text)
        except ValueError:
            value = -1.0
        if not 0 < value < float("inf"):
            raise ProfileError(f"{key} is {text!r}; expected a number above zero, its unit is in the name")
        profile = _OVERRIDES[key](profile, value)
    described = ",".join(f"{key}={value}" for key, value in changes.items())
    return replace(profile, name=f"{profile.name}+{described}") if changes else profile


def _bandwidth(*resources: Resource) -> _Change:
    def change(profile: HardwareProfile, value: float) -> HardwareProfile:
        return _with_peaks(profile, resources, lambda peak: _rate(peak, value * 1e9))

    return change


def _arithmetic(resource: Resource) -> _Change:
    def change(profile: HardwareProfile, value: float) -> HardwareProfile:
        return _with_peaks(profile, (resource,), lambda peak: _flops(peak, value * 1e12))

    return change


def _rate(peak: Peak, bytes_per_s: float) -> Peak:
    return replace(peak, bytes_per_s=bytes_per_s, sources={**peak.sources, "bytes_per_s": "estimated"})


def _flops(peak: Peak, half_flops_per_s: float) -> Peak:
    """16-bit rates as given; float32 keeps its ratio to them."""
    fastest = max(peak.flops_per_s.values())
    rates = {dtype: half_flops_per_s * rate / fastest for dtype, rate in peak.flops_per_s.items()}
    return replace(peak, flops_per_s=rates, sources={**peak.sources, **dict.fromkeys(rates, "estimated")})


def _with_peaks(
    profile: HardwareProfile, resources: tuple[Resource, ...], change: Callable[[Peak], Peak]
) -> HardwareProfile:
    peaks = dict(profile.peaks)
    for resource in resources:
        peaks[resource] = change(profile.peak(resource))
    curves: tuple[Curve, ...] = tuple(c for c in profile.curves if c.resource not in resources)
    return replace(profile, peaks=peaks, curves=curves)


def beside_siblings(
    profile: HardwareProfile, share: float = SMT_SHARE, resources: tuple[Resource, ...] = ("CPU",)
) -> HardwareProfile:
    """The machine whose CPU is hardware threads of cores that others keep busy, as virtual cores may be.

    All that such a thread does takes 1 / share times as long: it computes, and has misses under way, in that share of
    the core; that this holds of memory too is an assumption. Curves measured without it are dropped;
    hand-offs and contention stay what they were.
    """
    if not _LEAST_SHARE <= share <= 1:
        expected = f"a hardware thread has at most its core: {_LEAST_SHARE:g} to 1"
        raise ProfileError(f"cpu_smt_share is {share:g}; {expected}")

    def shared(peak: Peak) -> Peak:
        sources: dict[str, Source] = {**peak.sources, "efficiency": "estimated", "fixed_s": "estimated"}
        return replace(peak, efficiency=share * peak.efficiency, fixed_s=peak.fixed_s / share, sources=sources)

    return _with_peaks(profile, resources, shared)


def _size(name: str) -> _Change:
    def change(profile: HardwareProfile, value: float) -> HardwareProfile:
        return profile.with_(**{name: int(value * 2**30)}, sources={**profile.sources, name: "estimated"})

    return change


_OVERRIDES: dict[str, _Change] = {
    "vram_GiB": _size("vram_bytes"),
    "ram_GiB": _size("host_bytes"),
    "dram_read_GBps": _bandwidth("CPU"),
    "gpu_memory_GBps": _bandwidth("GPU"),
    "pcie_GBps": _bandwidth("H2D", "D2H"),
    "cpu_tflops": _arithmetic("CPU"),
    "cpu_smt_share": beside_siblings,
    "gpu_tflops": _arithmetic("GPU"),
}
