"""What an interrupted calibration had measured, kept for an hour, so that the same call goes on from there.

Finished parts are kept, and of others the rounds so far: parts take turns, so that all of them end at once.
"""

from __future__ import annotations

import os
import platform
import shutil
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Generic, TypeVar

import torch

from hwmodels.calibrate import Part
from hwmodels.catalog import cache_folder
from hwmodels.errors import FormatError
from hwmodels.machine import fingerprint
from hwmodels.profile import Resource
from hwmodels.schema import check_header, digest, from_json, read_json, to_json, write_json
from hwmodels.work import Work
from runtime import native
from sim.model import ModelSpec

SCHEMA, ROUNDS_SCHEMA = "scheinfer.calibration-part", "scheinfer.calibration-rounds"
Timed = str | Work | tuple[Resource, Work]
"""What rounds time: a hand-off, work, or work on a resource."""
Key = TypeVar("Key", bound=Timed)
VERSION = 3
MAX_AGE_S = 3600.0


def measurement_key(spec: ModelSpec, device: str, cpu_threads: int | None, extent: object) -> str:
    """Twelve hex digits of all that a calibration's numbers depend on.

    device is a name of device_name, extent says what is measured: anything that schema.to_json writes.
    """
    machine = [platform.node(), *(fingerprint().get(k, "") for k in ("cpu", "cores"))]
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

    def rounds(self, name: str) -> KeptRounds:
        """Rounds of a part that is not finished."""
        return KeptRounds(self._path(name))

    def n_rounds(self, name: str) -> int:
        """How many of them there are."""
        return self.rounds(name).following().load().n_rounds

    def clear(self) -> None:
        """Forget all parts."""
        shutil.rmtree(self.folder, ignore_errors=True)

    def _path(self, name: str) -> Path:
        return self.folder / f"{name.replace(' ', '-')}.json"


@dataclass(frozen=True)
class Rounds(Generic[Key]):
    """Rounds of one measurement: seconds that they took, and of each key its repeats by slice of a round."""

    spent_s: float = 0.0
    n_rounds: int = 0
    times: dict[Key, list[list[float]]] = field(default_factory=dict)


@dataclass
class KeptRounds:
    """Files of a part's rounds, one for each of the measurements that it makes in turn."""

    part: Path
    number: int = 0

    def following(self) -> KeptRounds:
        """The next measurement's; its own files are counted from there."""
        self.number += 1
        return KeptRounds(self.part.with_suffix(f".rounds-{self.number}.json"))

    def load(self) -> Rounds[Timed]:
        """Rounds that are younger than an hour; none if there are none, or their file is damaged."""
        where = str(self.part)
        try:
            if time.time() - self.part.stat().st_mtime > MAX_AGE_S:
                return Rounds()
            kept = from_json(_Kept, check_header(read_json(self.part, "rounds"), ROUNDS_SCHEMA, 1, where), where)
        except (OSError, FormatError):
            return Rounds()
        times: dict[Timed, list[list[float]]] = {}
        for case in kept.cases:
            timed = (case.resource, case.work) if case.resource and case.work else case.work or case.name
            times[timed] = [list(own) for own in case.rounds]
        n_slices = {len(slices) for slices in times.values()}
        whole = len(n_slices) == 1 and min(n_slices) >= kept.n_rounds
        return Rounds(kept.spent_s, kept.n_rounds, times) if whole else Rounds()

    def save(self, rounds: Rounds[Key]) -> None:
        """Keep all rounds so far; where the cache cannot be written, the calibration goes on without."""
        kept = _Kept(rounds.spent_s, rounds.n_rounds, tuple(_case(key, own) for key, own in rounds.times.items()))
        with suppress(FormatError):
            write_json(self.part, {"schema": ROUNDS_SCHEMA, "version": 1, **to_json(kept)})


@dataclass(frozen=True)
class _Case:
    """A key, what of it there is, with its rounds."""

    rounds: tuple[tuple[float, ...], ...]
    name: str = ""
    resource: Resource | None = None
    work: Work | None = None


@dataclass(frozen=True)
class _Kept:
    spent_s: float
    n_rounds: int
    cases: tuple[_Case, ...]


def _case(key: Timed, rounds: Sequence[Sequence[float]]) -> _Case:
    own = tuple(map(tuple, rounds))
    if isinstance(key, str):
        return _Case(own, name=key)
    if isinstance(key, Work):
        return _Case(own, work=key)
    return _Case(own, resource=key[0], work=key[1])
