"""Finished parts of a calibration that was interrupted, kept for an hour, so that the same call goes on from there."""

from __future__ import annotations

import os
import shutil
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import torch

from hwmodels.calibrate import Part
from hwmodels.catalog import cache_folder
from hwmodels.errors import FormatError
from hwmodels.machine import fingerprint
from hwmodels.schema import check_header, digest, from_json, read_json, to_json, write_json
from runtime import native
from sim.model import ModelSpec

SCHEMA = "scheinfer.calibration-part"
VERSION = 2
MAX_AGE_S = 3600.0


def measurement_key(spec: ModelSpec, device: str, cpu_threads: int | None, extent: object) -> str:
    """Twelve hex digits of all that a calibration's numbers depend on.

    device is a name of device_name, extent says what is measured: anything that schema.to_json writes.
    """
    machine = {k: fingerprint().get(k, "") for k in ("cpu", "cores")}
    gpu = torch.cuda.get_device_name(device) if device != "emulated" else ""
    cores = sorted(os.sched_getaffinity(0))
    versions = [torch.__version__, native.describe()]
    return digest([machine, gpu, device, versions, spec.id, cpu_threads, cores, extent])


@dataclass(frozen=True)
class KeptParts:
    """A folder of parts by name, all of one calibration."""

    folder: Path

    @staticmethod
    def of(key: str) -> KeptParts:
        """The parts kept in the cache under a measurement's key."""
        return KeptParts(cache_folder() / "parts" / key)

    def load(self, name: str) -> Part | None:
        """A part that is younger than an hour; None if there is none, or its file is damaged."""
        path = self._path(name)
        try:
            if time.time() - path.stat().st_mtime > MAX_AGE_S:
                return None
            return from_json(Part, check_header(read_json(path, "part"), SCHEMA, VERSION, str(path)), str(path))
        except (OSError, FormatError):
            return None

    def save(self, name: str, part: Part) -> None:
        """Keep a part; where the cache cannot be written, the calibration goes on without."""
        with suppress(FormatError):
            write_json(self._path(name), {"schema": SCHEMA, "version": VERSION, **to_json(part)})

    def clear(self) -> None:
        """Forget all parts."""
        shutil.rmtree(self.folder, ignore_errors=True)

    def _path(self, name: str) -> Path:
        return self.folder / f"{name.replace(' ', '-')}.json"
