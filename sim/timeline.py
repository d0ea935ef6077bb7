"""Span and Timeline: what happened when, simulated or measured, in one form."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import pandas as pd

from hwmodels.errors import FormatError
from hwmodels.profile import RESOURCES, Resource
from hwmodels.schema import check_header, read_json, write_json

SCHEMA = "scheinfer.timeline"
VERSION = 1
SourceName = Literal["simulated", "measured"]
_PID = {"simulated": 1, "measured": 2}


@dataclass(frozen=True, slots=True)
class Span:
    """One task: when it held its resource."""

    task: str
    kind: str
    resource: Resource
    step: str
    layer: int
    start_s: float
    end_s: float
    bytes: float = 0.0
    flops: float = 0.0

    @property
    def duration_s(self) -> float:
        """Seconds from start to end."""
        return self.end_s - self.start_s


@dataclass(frozen=True)
class Timeline:
    """All spans of a run. info names model, plan, profile, device, evidence counts."""

    source: SourceName
    spans: tuple[Span, ...]
    info: dict[str, Any] = field(default_factory=dict)

    @cached_property
    def start_s(self) -> float:
        """Start of the first span."""
        return min((s.start_s for s in self.spans), default=0.0)

    @cached_property
    def end_s(self) -> float:
        """End of the last span."""
        return max((s.end_s for s in self.spans), default=0.0)

    @property
    def makespan_s(self) -> float:
        """From the first start to the last end."""
        return self.end_s - self.start_s

    @cached_property
    def steps(self) -> tuple[str, ...]:
        """Step names in order of appearance."""
        return tuple(dict.fromkeys(s.step for s in self.spans))

    def step(self, name: str) -> Timeline:
        """The spans of one step."""
        return Timeline(self.source, tuple(s for s in self.spans if s.step == name), self.info)

    @cached_property
    def step_s(self) -> dict[str, float]:
        """Wall time of every step: from its first start to its last end."""
        bounds: dict[str, tuple[float, float]] = {}
        for span in self.spans:
            low, high = bounds.get(span.step, (span.start_s, span.end_s))
            bounds[span.step] = (min(low, span.start_s), max(high, span.end_s))
        return {name: high - low for name, (low, high) in bounds.items()}

    @cached_property
    def busy_s(self) -> dict[str, float]:
        """Seconds each resource was held."""
        busy = dict.fromkeys(RESOURCES, 0.0)
        for span in self.spans:
            busy[span.resource] += span.duration_s
        return {str(k): v for k, v in busy.items()}

    @property
    def overlap(self) -> float:
        """Sum of busy times over the makespan: 1 is one resource at a time, more is real overlap."""
        return sum(self.busy_s.values()) / self.makespan_s if self.makespan_s > 0 else 0.0

    @property
    def ttft_s(self) -> float:
        """Time to first token: the steps whose name starts with prefill."""
        return sum(v for k, v in self.step_s.items() if k.startswith("prefill"))

    @property
    def tpot_s(self) -> float:
        """Mean time per output token after the first; 0 without decode steps."""
        steps = [v for k, v in self.step_s.items() if k.startswith("decode")]
        return sum(steps) / len(steps) if steps else 0.0

    def to_frame(self) -> pd.DataFrame:
        """One row per span."""
        columns = list(Span.__slots__)
        return pd.DataFrame([[getattr(s, c) for c in columns] for s in self.spans], columns=columns)

    def plot(self, **options: Any) -> Any:
        """Gantt chart of this timeline (matplotlib Figure); see sim.plot.gantt."""
        from sim.plot import gantt

        return gantt([self], **options)

    # -- files ----------------------------------------------------------------------------------------

    def chrome_events(self) -> list[dict[str, Any]]:
        """Trace events: pid 1 simulated, pid 2 measured, one tid per resource."""
        pid = _PID[self.source]
        events: list[dict[str, Any]] = [{"ph": "M", "pid": pid, "name": "process_name", "args": {"name": self.source}}]
        for tid, name in enumerate(RESOURCES, start=1):
            events.append({"ph": "M", "pid": pid, "tid": tid, "name": "thread_name", "args": {"name": name}})
        for s in self.spans:
            args = {"task": s.task, "step": s.step, "layer": s.layer, "bytes": s.bytes, "flops": s.flops}
            events.append(
                {
                    "ph": "X",
                    "pid": pid,
                    "tid": RESOURCES.index(s.resource) + 1,
                    "name": s.kind,
                    "cat": "cpu_op" if s.resource == "CPU" else "kernel" if s.resource == "GPU" else "gpu_memcpy",
                    "ts": (s.start_s - self.start_s) * 1e6,
                    "dur": s.duration_s * 1e6,
                    "args": args,
                }
            )
        return events

    def save_chrome_trace(self, path: str | Path) -> None:
        """Chrome Trace Event JSON, opens in Perfetto; reads back with `load_timeline`."""
        header = {"schema": SCHEMA, "version": VERSION, "source": self.source, "info": self.info}
        write_json(path, {"traceEvents": self.chrome_events(), "displayTimeUnit": "ms", "scheinfer": header})

    def save_parquet(self, path: str | Path) -> None:
        """The frame as Parquet."""
        self.to_frame().to_parquet(path, index=False)


def load_timeline(path: str | Path) -> Timeline:
    """Read a trace that `save_chrome_trace` wrote; FormatError says what is wrong with another."""
    value = read_json(path, "timeline")
    if not isinstance(value, dict) or "scheinfer" not in value:
        raise FormatError(f"{path}: no 'scheinfer' header; expected a trace written by simulate or generate --trace")
    header = check_header(value["scheinfer"], SCHEMA, VERSION, f"{path}: scheinfer")
    if header.get("source") not in _PID:
        raise FormatError(f"{path}: source is {header.get('source')!r}, expected simulated or measured")
    try:
        spans = tuple(_span(event) for event in value["traceEvents"] if event["ph"] == "X")
    except (KeyError, TypeError, IndexError) as error:
        raise FormatError(f"{path}: malformed trace event ({error})") from error
    return Timeline(header["source"], spans, header.get("info", {}))


def read_spans(path: str | Path, source: SourceName) -> Timeline:
    """Read the Parquet table that `save_parquet` wrote; FormatError if it is something else."""
    try:
        frame = pd.read_parquet(path)
    except (OSError, ValueError) as error:
        raise FormatError(f"cannot read spans {str(path)!r}: {error}") from error
    columns = list(Span.__slots__)
    missing = [c for c in columns if c not in frame.columns]
    if missing:
        raise FormatError(f"{path}: no column {missing[0]!r}; expected spans with {', '.join(columns)}")
    return Timeline(source, tuple(Span(*row) for row in frame[columns].itertuples(index=False, name=None)))


def _span(event: dict[str, Any]) -> Span:
    args, start_s, resource = event["args"], event["ts"] / 1e6, event["tid"] - 1
    if resource not in range(len(RESOURCES)):
        raise IndexError(f"tid is {event['tid']}, expected 1 to {len(RESOURCES)}")
    return Span(
        task=args["task"],
        kind=event["name"],
        resource=RESOURCES[resource],
        step=args["step"],
        layer=args["layer"],
        start_s=start_s,
        end_s=start_s + event["dur"] / 1e6,
        bytes=args["bytes"],
        flops=args["flops"],
    )
