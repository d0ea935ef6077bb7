"""What this machine is, read from the operating system, and what of it limits the product."""

from __future__ import annotations

import os
import platform
import re
import resource
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from hwmodels.units import format_bytes

_ISA = {
    "AVX2": "avx2",
    "AVX-VNNI": "avx_vnni",
    "AVX512": "avx512f",
    "AVX512_VNNI": "avx512_vnni",
    "AVX512_BF16": "avx512_bf16",
    "AMX_BF16": "amx_bf16",
    "NEON": "asimd",
    "SVE": "sve",
    "BF16": "bf16",
}
_STABLE = ("cpu", "isa", "cores", "threads", "numa_nodes", "ram", "kernels")
"""Keys of a fingerprint that a machine keeps from one day to the next, and what computes MLPs on its CPU."""


@dataclass(frozen=True)
class Machine:
    """A machine's CPU side.

    n_threads      logical CPUs that this process may use (affinity and container quota respected)
    n_online       logical CPUs that the machine has
    memlock_bytes  memory that may be page-locked; None without a limit
    load           load average of the last minute, in busy CPUs
    modules        memory modules, and slots for them; None where the firmware does not tell, as in a container
    """

    cpu: str
    isa: tuple[str, ...]
    n_cores: int
    n_threads: int
    n_online: int
    n_numa_nodes: int
    ram_bytes: int
    free_bytes: int
    memlock_bytes: int | None
    load: float
    kernel: str
    python: str
    modules: tuple[int, int] | None = None


@dataclass(frozen=True)
class Finding:
    """Something that limits speed or correctness of predictions here, and what to do about it."""

    name: str
    limit: str
    fix: str

    def __str__(self) -> str:
        """Both in one sentence pair."""
        return f"{self.limit}. {self.fix}."


def read_machine() -> Machine:
    """The machine this process runs on; what the operating system does not tell is unknown or at its least."""
    cpuinfo, meminfo = _text("/proc/cpuinfo"), _text("/proc/meminfo")
    model = _first(r"^(?:model name|Model)\s*:\s*(.+)$", cpuinfo) or platform.processor() or platform.machine()
    flags = set((_first(r"^(?:flags|Features)\s*:\s*(.+)$", cpuinfo) or "").split())
    soft, _ = resource.getrlimit(resource.RLIMIT_MEMLOCK)
    unlimited = soft == resource.RLIM_INFINITY
    ram_bytes = _kib(meminfo, "MemTotal") or os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    limit = _text("/sys/fs/cgroup/memory.max").strip()
    ram_bytes = min(ram_bytes, int(limit)) if limit.isdigit() else ram_bytes
    n_threads = _usable_threads()
    return Machine(
        cpu=" ".join(model.split()),
        isa=tuple(name for name, flag in _ISA.items() if flag in flags),
        n_cores=min(_physical_cores(cpuinfo) or n_threads, n_threads),
        n_threads=n_threads,
        n_online=max(n_threads, os.cpu_count() or 1),
        n_numa_nodes=max(1, len(list(Path("/sys/devices/system/node").glob("node[0-9]*")))),
        ram_bytes=ram_bytes,
        free_bytes=min(_kib(meminfo, "MemAvailable") or ram_bytes, ram_bytes),
        memlock_bytes=None if unlimited else soft,
        load=os.getloadavg()[0],
        kernel=f"{platform.system()} {platform.release()}",
        python=platform.python_version(),
        modules=memory_modules(_text("/run/udev/data/+dmi:id")),
    )


_CPUS = Path("/sys/devices/system/cpu")


def cache_bytes(cpus: Path = _CPUS) -> int:
    """Bytes of the last caches before memory that this process's CPUs have, each counted once.

    0 where the system does not tell. A virtual machine tells of the host's cache, of which it has what others leave.
    """
    last: dict[str, int] = {}
    for cpu in os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else ():
        levels = {_text(f"{i}/level").strip(): i for i in (cpus / f"cpu{cpu}" / "cache").glob("index[0-9]*")}
        if levels:
            own = levels[max(levels)]
            size = re.fullmatch(r"(\d+)K", _text(f"{own}/size").strip())
            last[_text(f"{own}/shared_cpu_list") or str(cpu)] = 1024 * int(size[1]) if size else 0
    return sum(last.values())


def memory_modules(udev: str) -> tuple[int, int] | None:
    """Modules and slots by what udev keeps of the firmware's tables, which anyone may read; None if it has none."""
    filled = set(re.findall(r"^E:MEMORY_DEVICE_(\d+)_SIZE=", udev, re.MULTILINE))
    empty = set(re.findall(r"^E:MEMORY_DEVICE_(\d+)_PRESENT=0", udev, re.MULTILINE))
    return (len(filled), len(filled | empty)) if filled else None


def fingerprint(machine: Machine | None = None) -> dict[str, str]:
    """What a machine is, as texts by name, for profiles and reports; of this machine if none is given."""
    m = machine or read_machine()
    return {
        "cpu": m.cpu,
        "isa": ", ".join(m.isa) or "none known",
        "cores": str(m.n_cores),
        "threads": str(m.n_threads),
        "numa_nodes": str(m.n_numa_nodes),
        "ram": f"{m.ram_bytes / 2**30:.0f} GiB",
        "memlock": "unlimited" if m.memlock_bytes is None else format_bytes(m.memlock_bytes),
        "kernel": m.kernel,
        "python": m.python,
    }


def differences(one: Mapping[str, str], other: Mapping[str, str]) -> list[str]:
    """What tells two fingerprints apart, a text each; empty if they are of one machine.

    Only what both know and a machine keeps counts: CPU, ISA, cores, NUMA, RAM, the CPU kernels, and any
    key that starts with ``gpu``.
    """
    keys = [k for k in one if k in other and (k in _STABLE or k.startswith("gpu"))]
    return [f"{key}: {one[key]} there, {other[key]} here" for key in keys if one[key] != other[key]]


def findings(machine: Machine | None = None) -> list[Finding]:
    """What of a machine limits the product, most severe first; of this machine if none is given."""
    m = machine or read_machine()
    return [*_memory_findings(m), *_cpu_findings(m)]


def _memory_findings(m: Machine) -> list[Finding]:
    found = []
    if m.ram_bytes < 15 * 2**30:
        limit = (
            f"The machine has {format_bytes(m.ram_bytes)} of memory, and weights that the device cannot hold live there"
        )
        found.append(Finding("ram", limit, "Choose a model whose weights fit into it, or add memory"))
    elif m.free_bytes < m.ram_bytes // 4:
        limit = f"Of {format_bytes(m.ram_bytes)} memory only {format_bytes(m.free_bytes)} are free"
        found.append(Finding("ram", limit, "Close what holds the rest before loading a model"))
    if m.modules is not None and m.modules[0] < min(m.modules[1], max(2, m.modules[1] // 2)):
        # Two slots share a channel on most boards with more than two.
        n_modules, n_slots = m.modules
        limit = f"{_count(n_modules, 'memory module')} in {n_slots} slots: channels stay empty, and with them bandwidth"
        fix = "Put a module of the same kind into every channel (the board's manual names their slots), calibrate anew"
        found.append(Finding("channels", limit, fix))
    if m.memlock_bytes is not None and m.memlock_bytes < m.ram_bytes // 2:
        limit = (
            f"This process may lock {format_bytes(m.memlock_bytes)} in memory: page-locking weights can fail, "
            "and copies from other memory run at about half the speed"
        )
        fix = "Run `ulimit -l unlimited`, set memlock in /etc/security/limits.conf, or `docker run --ulimit memlock=-1`"
        found.append(Finding("memlock", limit, fix))
    return found


def _cpu_findings(m: Machine) -> list[Finding]:
    found = []
    if m.load > 0.3 * m.n_online:
        limit = (
            f"Programs wanted {m.load:.1f} of {m.n_online} CPUs over the last minute: "
            "beside them measurements here come out slow and vary"
        )
        found.append(
            Finding("load", limit, "Stop them before calibrating, and calibrate anew if they ran while you did")
        )
    if m.n_threads < m.n_online:
        limit = f"This process may use {m.n_threads} of {m.n_online} CPUs, by its affinity or its container's quota"
        fix = "Give it more (`taskset -c`, `docker run --cpus`), and calibrate anew whenever that changes"
        found.append(Finding("affinity", limit, fix))
    if m.n_cores < 4:
        limit = f"{_count(m.n_cores, 'core')} must compute, drive the device and copy at once"
        found.append(Finding("cores", limit, "Expect little from CPU columns; use 4 cores or more for real models"))
    if not {"AVX512_BF16", "AMX_BF16", "BF16"} & set(m.isa):
        limit = "The CPU has no bfloat16 instructions; it converts every weight, so prompts are slow on it"
        fix = "Compare --dtype float32 with bfloat16 for CPU-heavy plans; calibrate measures each as it is"
        found.append(Finding("bf16", limit, fix))
    if not {"AVX2", "AVX512", "NEON"} & set(m.isa):
        found.append(Finding("simd", "The CPU reports no wide vector instructions", "Use a CPU with AVX2 or NEON"))
    if m.n_numa_nodes > 1:
        limit = f"Memory is split over {m.n_numa_nodes} NUMA nodes; reading the other node's halves the bandwidth"
        found.append(
            Finding("numa", limit, "Bind to the GPU's node: `numactl --cpunodebind=N --membind=N scheinfer ...`")
        )
    return found


def _count(n: int, what: str) -> str:
    return f"{n} {what}" if n == 1 else f"{n} {what}s"


def _text(path: str) -> str:
    try:
        return Path(path).read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""


def _first(pattern: str, text: str) -> str | None:
    match = re.search(pattern, text, re.MULTILINE)
    return match[1] if match else None


def _kib(meminfo: str, key: str) -> int | None:
    value = _first(rf"^{key}:\s*(\d+) kB", meminfo)
    return int(value) * 1024 if value else None


def _physical_cores(cpuinfo: str) -> int | None:
    """Different (socket, core) pairs."""
    sockets = re.findall(r"^physical id\s*:\s*(\d+)", cpuinfo, re.MULTILINE)
    cores = re.findall(r"^core id\s*:\s*(\d+)", cpuinfo, re.MULTILINE)
    return len(set(zip(sockets, cores, strict=False))) or None


def _usable_threads() -> int:
    n = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    quota = _text("/sys/fs/cgroup/cpu.max").split()
    if len(quota) == 2 and quota[0].isdigit():
        n = min(n, max(1, int(quota[0]) // int(quota[1])))
    return n
