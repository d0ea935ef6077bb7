"""Can the simulator be trusted to choose a plan?

    python -m experiments.fidelity                    40 minutes on 2 cores; writes experiments/results/fidelity/
    python -m experiments.fidelity --models tiny-llama    one model; the other's evidence stays as it is
    python -m experiments.fidelity --replay           10 s: today's simulator over the evidence that is there
    python -m experiments.fidelity --smoke            30 s on a tiny shape; writes nowhere unless --out is given

Two small checkpoints (a Mixtral and a Llama of random weights, each many times larger than the caches) run on this
machine by many plans: every policy, the best that the search finds and some drawn at random, in three cells of
workload and device memory. Profiles are calibrated on other steps than those that run. All plans take turns,
twelve times, with models loaded anew; what the last six times differ from the first six is the noise. The speed of a
shared machine changes within seconds, and one calibration would tell of one minute: so a second one takes turns with
the runs, and what is simulated rests on it. What was predicted before anything ran rests on the first, and stands
beside it.

One should see step errors of a few per cent, hardly above the noise, and that the plan predicted best is among
the best measured. On a machine without a GPU the device is emulated, and the rows say so.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

import pandas as pd
from transformers import LlamaConfig, LlamaForCausalLM

from experiments.record import RESULTS, record
from hwmodels.catalog import cache_folder
from runtime.calibrate import ALONGSIDE, QUICK, SMOKE, Extent, calibrate, calibrating
from runtime.demo_models import write_demo_models
from runtime.fidelity import Protocol, run_protocol
from sim.evidence import Evidence, load_evidence
from sim.replay import Replayed, replay
from sim.verdict import Verdict, verdict
from sim.workload import Workload

MODELS = ("tiny-mixtral", "tiny-llama")
CELLS = (Workload(100, 10), 0.5), (Workload(100, 10), 0.25), (Workload(20, 12), 0.4)
PROTOCOL = Protocol(CELLS, n_drawn=96, visits=12)
FIRST = replace(QUICK, passes=3)
"""Before anything runs: of one minute's pass alone, rates of work side by side are known to some per cent only."""
TINY_PROTOCOL = Protocol(
    ((Workload(10, 3), 0.5), (Workload(6, 4), 0.3)),
    ("cpu-only", "stream", "scheinfer"),
    n_drawn=4,
    n_spread=1,
    n_top=2,
    visits=2,
)


def measure(names: Sequence[str], device: str) -> dict[str, Evidence]:
    """The protocol with each demonstration model."""
    folders = write_demo_models(cache_folder() / "demo")
    return {name: _run(folders[name], device, PROTOCOL, FIRST, ALONGSIDE) for name in names}


def _run(folder: Path, device: str, protocol: Protocol, first: Extent, beside: Extent) -> Evidence:
    profile = calibrate(folder, device, extent=first)
    return run_protocol(folder, profile, partial(calibrating, folder, device=device, extent=beside), protocol, device)


def measure_tiny(device: str) -> dict[str, Evidence]:
    """The same on a shape that takes no time."""
    config = LlamaConfig(
        vocab_size=256, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4
    )
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch) / "tiny"
        LlamaForCausalLM(config).save_pretrained(folder)
        return {"tiny": _run(folder, device, TINY_PROTOCOL, SMOKE, SMOKE)}


# -- what is printed and kept -------------------------------------------------------------------------


def numbers(found: Verdict) -> dict[str, Any]:
    """The verdict as plain numbers."""
    return {
        "errors": {name: {side: asdict(e) for side, e in sides.items()} for name, sides in found.errors.items()},
        "noise_of_total": found.noise,
        "orders": {side: asdict(o) for side, o in found.orders.items()},
        "regrets": {str(n): list(cells.values()) for n, cells in found.regrets.items()},
        "kinds": found.kinds.to_dict("records"),
        "resources": {name: asdict(e) for name, e in found.resources.items()},
        "causes": {name: {str(k): float(v) for k, v in part.items()} for name, part in found.causes.items()},
        "loaded": asdict(found.loaded) if found.loaded is not None else None,
    }


def print_verdict(found: Verdict) -> None:
    """Bars, errors, kinds of tasks and causes as tables."""
    rows = [
        {
            "": check.name,
            "value": f"{check.value:.3g}",
            "bar": f"{'>=' if check.at_least else '<='} {check.bar:g}",
            "measured twice": "" if check.floor is None else f"{check.floor:.3g}",
            "met": "yes" if check.met else "NO",
        }
        for check in found.checks()
    ]
    print(pd.DataFrame(rows).to_string(index=False))
    flat = [
        {"of": name, "against measured": side, **asdict(e)}
        for name, sides in found.errors.items()
        for side, e in sides.items()
    ]
    for table in (pd.DataFrame(flat), found.kinds):
        print("\n" + table.to_string(index=False, float_format=lambda v: f"{v:.3f}"))
    causes = pd.DataFrame(found.causes).fillna(0.0)
    print("\nparts of the error, as shares of measured time\n" + causes.to_string(float_format=lambda v: f"{v:+.3f}"))


def main(argv: Sequence[str] | None = None) -> None:
    """Run the experiment; see the module's docstring."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--smoke", action="store_true", help="a tiny shape, in seconds")
    parser.add_argument("--replay", action="store_true", help="measure nothing, replay what is in the folder")
    parser.add_argument("--models", nargs="+", choices=MODELS, default=MODELS, help="which models to measure")
    parser.add_argument("--device", default="auto", help="auto, cuda:0 or emulated (default auto)")
    parser.add_argument("--out", type=Path, help="folder to write to (default results/fidelity, none if --smoke)")
    flags = parser.parse_args(argv)
    out = flags.out or (None if flags.smoke else RESULTS / "fidelity")
    evidence: dict[str, Evidence] = {}
    if not flags.replay:
        evidence = measure_tiny(flags.device) if flags.smoke else measure(flags.models, flags.device)
    if out is not None:
        for name, own in evidence.items():
            own.save(out / name)
        evidence = {folder.name: load_evidence(folder) for folder in sorted(out.iterdir()) if folder.is_dir()}
    replayed = Replayed.together([replay(own) for own in evidence.values()])
    found = verdict(replayed)
    print_verdict(found)
    profiles = {name: own.profile for name, own in evidence.items()}
    settings = {
        "command": "python -m experiments.fidelity",
        "protocol": asdict(TINY_PROTOCOL if flags.smoke else PROTOCOL),
        "verdict": numbers(found),
        "profiles": {name: {"id": p.id, "created": p.created, "notes": list(p.notes)} for name, p in profiles.items()},
    }
    summary = {
        "device": ", ".join(sorted({p.device for p in profiles.values()})),
        "n_plans": found.n_plans,
        "noise": found.noise,
        "checks": {check.name: check.value for check in found.checks()},
    }
    rows = [{str(k): v for k, v in row.items()} for row in replayed.cases.to_dict("records")]
    record(out, settings, rows, summary)


if __name__ == "__main__":
    main()
