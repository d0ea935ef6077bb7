"""Builds the native CPU kernel when the package is installed; without a compiler the package installs without it.

`python hatch_build.py` builds it in place, for a checkout that is used without being installed.
"""

from __future__ import annotations

import os
import platform
import shlex
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

SOURCES = Path("runtime") / "native"
LIBRARY = "libscheinfer.so"
_COMMON = ("-std=c++17", "-O3", "-fPIC", "-fno-math-errno", "-fvisibility-inlines-hidden", "-pthread")
_AVX512 = (
    "-mavx2",
    "-mfma",
    "-mf16c",
    "-mavx512f",
    "-mavx512bw",
    "-mavx512vl",
    "-mavx512dq",
    "-mprefer-vector-width=512",
)
_ANYWHERE: dict[str, tuple[str, ...]] = dict.fromkeys(
    (
        "amx.cpp",
        "forward.cpp",
        "latent.cpp",
        "layer.cpp",
        "linear.cpp",
        "link.cpp",
        "mlp.cpp",
        "pool.cpp",
        "portable.cpp",
        "probe.cpp",
        "queues.cpp",
        "prompt.cpp",
        "router.cpp",
        "step.cpp",
    ),
    (),
)
_X86: dict[str, tuple[str, ...]] = {
    "avx2.cpp": ("-mavx2", "-mfma", "-mf16c"),
    "avx512.cpp": _AVX512,
    "avx512_bf16.cpp": (*_AVX512, "-mavx512bf16"),
    "amx_bf16.cpp": (*_AVX512, "-mavx512bf16"),
}
_IF_KNOWN = {"amx_bf16.cpp": ("-mamx-tile", "-mamx-bf16")}
"""Flags that older compilers or assemblers lack; a source says without them that it has nothing."""
_PROBE = "#include <immintrin.h>\nvoid probe() { _tile_dpbf16ps(0, 1, 2); }\n"


class BuildFailedError(Exception):
    """The kernel could not be compiled; the text says why."""


def compiler() -> str:
    """The C++ compiler: $CXX, else g++, c++ or clang++. BuildFailedError if there is none."""
    names = [os.environ["CXX"]] if os.environ.get("CXX") else ["g++", "c++", "clang++"]
    found = [path for name in names if (path := shutil.which(name))]
    if not found:
        raise BuildFailedError(f"no C++ compiler found (looked for {', '.join(names)})")
    return found[0]


def build(folder: Path, target: Path) -> None:
    """Compile the sources of `folder` into the library `target`, with $CXXFLAGS. BuildFailedError if that fails."""
    if sys.platform != "linux":
        raise BuildFailedError(f"the kernel needs Linux, this is {sys.platform}")
    cxx, asked = compiler(), shlex.split(os.environ.get("CXXFLAGS", ""))
    sources = _ANYWHERE | (_X86 if platform.machine() in ("x86_64", "AMD64") else {})
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent) as scratch:
        objects = [str(Path(scratch) / f"{name}.o") for name in sources]
        probe = Path(scratch) / "flags.cpp"
        for (name, flags), out in zip(sources.items(), objects, strict=True):
            more = _IF_KNOWN[name] if name in _IF_KNOWN and _knows(cxx, _IF_KNOWN[name], asked, probe) else ()
            _run([cxx, *_COMMON, *flags, *more, *asked, "-c", str(folder / name), "-o", out])
        linked = Path(scratch) / LIBRARY
        _run([cxx, "-shared", "-pthread", *asked, *objects, "-o", str(linked)])
        linked.replace(target)  # at once: a process that has the old one mapped keeps it


def _knows(cxx: str, flags: Sequence[str], asked: Sequence[str], probe: Path) -> bool:
    """Whether compiler and assembler do: a new compiler may come with an old assembler, which only `-c` runs."""
    probe.write_text(_PROBE, encoding="ascii")
    try:
        _run([cxx, *flags, *asked, "-c", str(probe), "-o", f"{probe}.o"])
    except BuildFailedError:
        return False
    return True


def _run(command: Sequence[str]) -> None:
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    except OSError as error:
        raise BuildFailedError(f"{command[0]}: {error}") from error
    if done.returncode:
        last = "\n".join(done.stderr.strip().splitlines()[-5:])
        raise BuildFailedError(f"`{' '.join(command)}` failed:\n{last}")


def build_in(root: Path) -> str:
    """Compile into the tree at `root`; empty, or a note on why there is no library now."""
    library = root / SOURCES / LIBRARY
    try:
        build(root / SOURCES, library)
    except BuildFailedError as error:
        library.unlink(missing_ok=True)
        return f"scheinfer: native kernel not built, torch computes on the CPU: {error}"
    return ""


def main() -> int:
    """Build in place; 1 with a note if that fails."""
    note = build_in(Path(__file__).resolve().parent)
    print(note, end="\n" if note else "", file=sys.stderr)  # noqa: T201
    return 1 if note else 0


try:
    from hatchling.builders.hooks.plugin.interface import BuildHookInterface
except ImportError:  # not building a package: imported for `build` alone
    pass
else:

    class KernelHook(BuildHookInterface[Any]):
        """Adds the library to a wheel, or to the tree of an editable install."""

        def initialize(self, version: str, build_data: dict[str, Any]) -> None:
            """Compile; a failure is a note, never an error."""
            del version
            if self.target_name != "wheel":
                return
            note = build_in(Path(self.root))
            if note:
                self.app.display_warning(note)
                return
            build_data["artifacts"].append(f"{SOURCES.as_posix()}/{LIBRARY}")
            build_data["pure_python"] = False
            build_data["tag"] = f"py3-none-{sys.platform}_{platform.machine()}"


if __name__ == "__main__":
    sys.exit(main())
