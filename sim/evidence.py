"""Evidence: what was measured of many plans of one model, in files that today's simulator can replay.

A folder holds config.json (the model's sizes), hardware.json (the profile that simulation is judged with: the mean
of all calibrations of that time), cases.json (plans, workloads, memory), runs.parquet (wall time of every step of every
run), spans.parquet (the tasks of each plan's median run) and routing.parquet (tokens per expert of that run).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd

from hwmodels.errors import FormatError
from hwmodels.profile import HardwareProfile, load_profile
from hwmodels.schema import check_header, from_json, read_json, to_json, write_json
from sim.model import ModelSpec, load_model
from sim.plan import Plan
from sim.timeline import Span, Timeline
from sim.workload import RoutingTrace, Workload

SCHEMA = "scheinfer.evidence"
VERSION = 1
RUNS = ("plan_id", "visit", "repetition", "step", "wall_s")
SPANS = ("plan_id", "task", "start_s", "end_s")
ROUTING = ("plan_id", "step", "layer", "expert", "n_tokens")


@dataclass(frozen=True)
class Case:
    """One plan as it was run on a workload.

    plan              with the prediction that was made before anything ran, by the first calibration alone
    peak_vram_bytes   most device memory held, as the device counts it
    loaded_bytes      by how much loading and a first short run made the process grow, median of its visits; None
                      where the system does not tell
    others_load       share of all cores that other processes took, the worst of its runs
    tokens            what it generated
    slowed            share of hwmodels.pace's loops before and after its runs that were slow, on any core
    """

    plan: Plan
    workload: Workload
    peak_vram_bytes: int
    loaded_bytes: int | None
    others_load: float | None
    tokens: tuple[int, ...]
    slowed: float | None = None


@dataclass(frozen=True)
class Evidence:
    """Measured cases of one model; the tables have a row per step of a run, per task, per layer's expert.

    config is the model's Hugging Face config, from which spec was made.
    """

    config: Mapping[str, Any]
    spec: ModelSpec
    profile: HardwareProfile
    cases: tuple[Case, ...]
    runs: pd.DataFrame
    spans: pd.DataFrame
    routing: pd.DataFrame

    def measured(self, case: Case, like: Timeline) -> Timeline:
        """The measured timeline of a case's median run; kind, resource, bytes of each task as in a simulated one."""
        own = self.spans[self.spans["plan_id"] == case.plan.id]
        known = {span.task: span for span in like.spans}
        found = []
        for task, start_s, end_s in own[["task", "start_s", "end_s"]].itertuples(index=False, name=None):
            if task not in known:
                raise FormatError(f"plan {case.plan.id} was measured with task {task!r}, which it does not compile to")
            s = known[task]
            found.append(Span(task, s.kind, s.resource, s.step, s.layer, start_s, end_s, s.bytes, s.flops))
        return Timeline("measured", tuple(found), {"device": self.profile.device, "plan_id": case.plan.id})

    def trace(self, case: Case) -> RoutingTrace:
        """The routing of a case's median run."""
        return RoutingTrace.of(self.routing[self.routing["plan_id"] == case.plan.id], f"routing of {case.plan.id}")

    def save(self, folder: Path) -> None:
        """Write all files into a folder."""
        folder.mkdir(parents=True, exist_ok=True)
        write_json(folder / "config.json", dict(self.config))
        self.profile.save(folder / "hardware.json")
        write_json(folder / "cases.json", {"schema": SCHEMA, "version": VERSION, "cases": to_json(self.cases)})
        for name, table in (("runs", self.runs), ("spans", self.spans), ("routing", self.routing)):
            table.to_parquet(folder / f"{name}.parquet", index=False, compression="zstd")


def load_evidence(folder: Path) -> Evidence:
    """Read what `save` wrote; FormatError says which file is not what it should be."""
    cases_file = folder / "cases.json"
    fields = check_header(read_json(cases_file, "cases"), SCHEMA, VERSION, str(cases_file))
    return Evidence(
        config=read_json(folder / "config.json", "model config"),
        spec=load_model(folder),
        profile=load_profile(folder / "hardware.json"),
        cases=from_json(tuple[Case, ...], fields.get("cases"), f"{cases_file}: cases"),
        runs=_table(folder / "runs.parquet", RUNS),
        spans=_table(folder / "spans.parquet", SPANS),
        routing=_table(folder / "routing.parquet", ROUTING),
    )


def _table(path: Path, columns: tuple[str, ...]) -> pd.DataFrame:
    try:
        frame = pd.read_parquet(path)
    except (OSError, ValueError) as error:
        raise FormatError(f"cannot read {str(path)!r}: {error}") from error
    missing = [name for name in columns if name not in frame.columns]
    if missing:
        raise FormatError(f"{path}: no column {missing[0]!r}; expected {', '.join(columns)}")
    return frame
