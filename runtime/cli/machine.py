"""doctor, calibrate, hardware, models: what is there to plan for."""

from __future__ import annotations

from argparse import Namespace

from hwmodels.catalog import compose, with_overrides
from hwmodels.catalog import hardware as find_hardware
from hwmodels.catalog import names as hardware_names
from hwmodels.errors import FormatError
from hwmodels.machine import Finding, Machine, findings, read_machine
from hwmodels.pace import pace_findings, watch
from hwmodels.pool import pooled
from hwmodels.profile import HardwareProfile
from hwmodels.units import format_bytes
from runtime.cli import profile_rows
from runtime.cli.console import emit, note, say
from runtime.cli.files import check_file
from runtime.cli.model_rows import COLUMNS as MODEL_COLUMNS
from runtime.cli.model_rows import LIST_COLUMNS as MODEL_LIST_COLUMNS
from runtime.cli.model_rows import part_rows, shape_rows
from runtime.cli.table import Row, key
from runtime.resolve import resolve_folder, resolve_model
from sim.shapes import SOURCES, shapes

_WATCHED_S = 2.0

# -- doctor -------------------------------------------------------------------------------------------


def doctor(flags: Namespace) -> None:
    """What this machine is, and what limits the product on it."""
    from hwmodels.provenance import versions
    from runtime import native
    from runtime.gpu import gpu_findings, gpus

    machine, devices = read_machine(), gpus()
    rows: list[Row] = [
        _fact("cpu", machine.cpu),
        _fact("instruction sets", ", ".join(machine.isa) or "none known"),
        _fact("cores", f"{machine.n_cores}, {machine.n_threads} threads"),
        _fact("NUMA nodes", str(machine.n_numa_nodes)),
        _fact("RAM", f"{format_bytes(machine.ram_bytes)}, {format_bytes(machine.free_bytes)} free"),
        _fact("memory modules", _modules(machine)),
        _fact("memlock", "unlimited" if machine.memlock_bytes is None else format_bytes(machine.memlock_bytes)),
    ]
    rows.append(_fact("CPU kernel", native.describe()))
    for index, gpu in enumerate(devices):
        memory = f"{format_bytes(gpu.vram_bytes)}, {format_bytes(gpu.free_bytes)} free"
        rows.append(_fact(f"cuda:{index}", f"{gpu.name}, compute capability {gpu.capability}, {memory}"))
        rows.append(_fact(f"cuda:{index} link", gpu.link))
        rows.append(_fact(f"cuda:{index} driver", gpu.driver or "unknown"))
    rows += [_fact(name, version) for name, version in versions().items()]
    found = [*findings(machine), *pace_findings(watch(_WATCHED_S)), *native.kernel_findings(), *gpu_findings(devices)]
    limits = [_limit(finding) for finding in found]
    if flags.output != "md":
        emit(flags, [*rows, *limits], ())
        return
    emit(flags, rows, (key("name"), key("value")))
    say(flags, "\n".join(["", "What limits it:", *(f"- {row['value']}. {row['fix']}." for row in limits)]))


def _fact(name: str, value: str) -> Row:
    return {"kind": "fact", "name": name, "value": value, "fix": ""}


def _modules(machine: Machine) -> str:
    if machine.modules is None:
        return "unknown, `sudo dmidecode -t memory` lists them"
    n_modules, n_slots = machine.modules
    return f"{n_modules} in {n_slots} slots"


def _limit(finding: Finding) -> Row:
    return {"kind": "limit", "name": finding.name, "value": finding.limit, "fix": finding.fix}


# -- calibrate ----------------------------------------------------------------------------------------


def calibrate(flags: Namespace) -> None:
    """Measure this machine and write its profile."""
    check_file(flags.out)
    profile = _measured(flags)
    profile.save(flags.out)
    note(flags, f"wrote {flags.out}: profile {profile.name} ({profile.id}) of the {profile.device} device")
    for remark in [*profile.notes, *profile_rows.accuracy(profile)]:
        note(flags, remark)
    emit(flags, profile_rows.figure_rows(profile), profile_rows.COLUMNS)


def _measured(flags: Namespace) -> HardwareProfile:
    from runtime.cache import cached_profile
    from runtime.calibrate import calibrate as measure

    progress = not flags.quiet
    try:
        if flags.model is None:
            own = flags.device, flags.quick, flags.threads, progress, flags.dtype
            return pooled([measure(None, *own) for _ in range(flags.repeats)])
        how = flags.device, flags.quick, flags.threads, progress, True, flags.dtype, flags.repeats
        return cached_profile(resolve_folder(flags.model), *how)
    except KeyboardInterrupt:
        note(
            flags,
            "interrupted: finished parts of this calibration are kept for an hour, the same command goes on from there",
        )
        raise


# -- hardware -----------------------------------------------------------------------------------------


def hardware(flags: Namespace) -> None:
    """List profiles, or show one: by name or put together from parts, with other figures if asked."""
    check_file(flags.out)
    if not any((flags.name, *_parts(flags).values(), flags.set, flags.out)):
        emit(flags, [_profile_row(name) for name in hardware_names()], profile_rows.LIST_COLUMNS)
        return
    profile = with_overrides(_asked(flags), flags.set or {})
    if flags.out is not None:
        profile.save(flags.out)
        note(flags, f"wrote {flags.out}: profile {profile.name} ({profile.id})")
    say(flags, "\n".join([_heading(profile), *profile.notes]))
    emit(flags, profile_rows.figure_rows(profile), profile_rows.COLUMNS)


def _parts(flags: Namespace) -> dict[str, str | int | None]:
    return {"--gpu": flags.gpu, "--cpu": flags.cpu, "--pcie": flags.pcie, "--dram": flags.dram}


def _asked(flags: Namespace) -> HardwareProfile:
    """The profile of a name or of parts; FormatError for both, neither or too few parts."""
    given = [flag for flag, part in _parts(flags).items() if part is not None]
    if flags.name is not None:
        if given:
            raise FormatError(
                f"found both {flags.name!r} and {', '.join(given)}; give a name with --set, or parts alone"
            )
        return find_hardware(flags.name)
    if flags.gpu is None or flags.cpu is None:
        raise FormatError(f"found {', '.join(given) or 'no machine'}; give a profile's NAME, or --gpu and --cpu")
    dram = None if flags.dram is None else f"dram_read_GBps={flags.dram / 1e9:g}"
    name = "+".join(filter(None, (flags.gpu, flags.cpu, flags.pcie, dram)))
    return compose(flags.gpu, flags.cpu, flags.pcie, flags.dram, name)


def _heading(profile: HardwareProfile) -> str:
    return f"{profile.name} ({profile.id}), {profile.device} device, {profile.created}"


def _profile_row(name: str) -> Row:
    try:
        profile = find_hardware(name)
    except FormatError as error:  # one damaged file must not hide the others
        return {column.heading: "" for column in profile_rows.LIST_COLUMNS} | {
            "name": name,
            "kind": f"unusable: {error}",
        }
    return {
        "name": name,
        "kind": _kind(profile),
        "device": profile.device,
        "cpu": profile.fingerprint.get("cpu", ""),
        "gpu": profile.fingerprint.get("gpu", ""),
        "vram": format_bytes(profile.vram_bytes),
        "ram": format_bytes(profile.host_bytes),
        "vram_bytes": profile.vram_bytes,
        "host_bytes": profile.host_bytes,
        "profile_id": profile.id,
    }


def _kind(profile: HardwareProfile) -> str:
    """Whether a profile was calibrated or put together from published figures."""
    return "calibrated" if any(curve.source == "measured" for curve in profile.curves) else "published figures"


# -- models -------------------------------------------------------------------------------------------


def models(flags: Namespace) -> None:
    """List built-in shapes, or show a model's bytes and FLOPs by part."""
    if flags.name is None:
        emit(flags, shape_rows(), MODEL_LIST_COLUMNS)
        return
    spec = resolve_model(flags.name, flags.dtype)
    if flags.name in shapes():
        known = shapes()[flags.name]
        heading = f"{spec.name} ({spec.id}); source of the sizes: {SOURCES[known.source]}"
        say(flags, "\n".join(filter(None, (heading, known.note))))
    emit(flags, part_rows(spec), MODEL_COLUMNS)
