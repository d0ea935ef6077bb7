# ---
# jupyter:
#   jupytext:
#     text_representation:
#       extension: .py
#       format_name: percent
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # Can the simulator be trusted?
#
# **Question.** The simulator picks the plan that runs. How far off is it, why, and does it pick well?
#
# `python -m experiments.fidelity` ran a few dozen plans of two small models for real: every policy's plan, the
# best that the search finds and some drawn at random, in three cells of workload and device memory. All plans took
# turns, in twelve visits, with models loaded anew, and so did the rounds of a calibration. The measured
# timelines are committed; the simulator that replays them below is the one of this checkout.
#
# The machine has two cores and no GPU, so the device is **emulated** (the second core computes, a thread copies
# at a fixed 2 GB/s). Tensors, copies and waiting are real. What is judged is the simulator, not the device.

# %%
import json
from pathlib import Path

import numpy as np
import pandas as pd
from IPython.display import display

from sim.chart import GREY, MEASURED, SERIES, SIMULATED, chart, styled
from sim.evidence import load_evidence
from sim.fidelity import errors
from sim.plot import scatter
from sim.replay import Replayed, replay
from sim.verdict import CELL, verdict

here = Path.cwd() if (Path.cwd() / "experiments").is_dir() else Path.cwd().parent
results = here / "experiments" / "results" / "fidelity"
config = json.loads((results / "config.json").read_text())
evidence = [load_evidence(folder) for folder in sorted(results.iterdir()) if folder.is_dir()]
replayed = Replayed.together([replay(own) for own in evidence])
found = verdict(replayed)
cases, steps = replayed.cases, replayed.steps
host = config["provenance"]["host"]
print(f"{host.get('cpu', 'unknown CPU')}, commit {config['provenance']['commit']}, plans {found.n_plans}")

# %% [markdown]
# ## Three numbers for every plan
#
# - **measured**: the mean of its runs without the fastest and the slowest.
# - **simulated**: the same plan with the routing that occurred, by the calibration whose rounds took turns with the
#   runs and saw the same minutes. This tests the model of time alone.
# - **predicted**: what the planner said before anything ran, with routing sampled, by a calibration before.
#   This is what a user gets who calibrates for a minute and runs for many: a shared machine has changed by then.
#
# The error is (simulated − measured) / measured. Below, decode speed: on the diagonal the simulator is right.

# %%
speeds = cases.assign(decode_tok_s=1 / cases["tpot_s"], predicted_decode_tok_s=1 / cases["simulated_tpot_s"])
display(scatter(speeds.to_dict("records"), title="Decode speed, emulated device"))

# %% [markdown]
# ## Against the bars, and against the noise
#
# A plan that is measured twice differs from itself, so every number stands beside the same number of the second half
# of the visits against the first.

# %%
checks = [
    {
        "number": c.name,
        "value": f"{c.value:.3f}",
        "bar": f"{'at least' if c.at_least else 'at most'} {c.bar:g}",
        "measured twice": "" if c.floor is None else f"{c.floor:.3f}",
        "met": "yes" if c.met else "no",
    }
    for c in found.checks()
]
display(pd.DataFrame(checks).set_index("number"))

# %% [markdown]
# The same protocol on another machine, two louder cores of another maker, with the code of its day:

# %%
other = json.loads((results.parent / "fidelity-turin-2" / "config.json").read_text())
print(f"{other['provenance']['host'].get('cpu', 'unknown CPU')}, commit {other['provenance']['commit']}")
machines = {"this one": config["summary"], "the other": other["summary"]}
beside = pd.DataFrame({name: {**s["checks"], "total time, measured twice": s["noise"]} for name, s in machines.items()})
display(beside.map(lambda v: "" if pd.isna(v) else f"{v:.3f}"))


# %%
@styled
def distribution() -> object:
    """Share of steps with at most so much error: simulated, without contention, and measured twice."""
    figure, axes = chart(5.6, 3.0)
    sides = {
        "simulated": ("simulated_s", "measured_s", SIMULATED),
        "without contention": ("isolated_s", "measured_s", SERIES[1]),
        "measured twice": ("second_s", "first_s", GREY),
    }
    for label, (of, against, colour) in sides.items():
        size = np.sort((steps[of] / steps[against] - 1).abs())
        axes.step(size * 100, np.arange(1, len(size) + 1) / len(size), where="post", color=colour, label=label)
    axes.axvline(10, color=GREY, linewidth=0.8, linestyle=":")
    axes.set(xlim=(0, 30), ylim=(0, 1), xlabel="absolute error of a step in %", ylabel="share of steps")
    axes.set_title("Errors of single steps, emulated device", loc="left")
    axes.legend(loc="lower right")
    return figure


display(distribution())

# %% [markdown]
# ## Where the error comes from
#
# One cause is put right at a time: the step is simulated again with the *measured* times of one kind of task, and
# by how much the wall time moves is that kind's part. With the measured times of all tasks, what is left lies
# between tasks (*waiting*: hand-offs, threads that wake late). *Contention* is by how much the model of shared
# memory lengthens the step, right or wrong. Parts do not add up exactly: a task that hides behind another costs
# nothing.

# %%
parts = pd.DataFrame(found.causes).drop(columns="all").fillna(0.0)
large = parts[(parts.abs() >= 0.002).any(axis=1)]
large = large.reindex(large.abs().max(axis=1).sort_values().index)


@styled
def anatomy_bars() -> object:
    """Part of the measured time by cause, in prefill and decode."""
    figure, axes = chart(5.6, 0.9 + 0.34 * len(large))
    for k, phase in enumerate(("prefill", "decode")):
        axes.barh(np.arange(len(large)) + 0.2 - 0.4 * k, large[phase] * 100, 0.36, color=SERIES[k], label=phase)
    axes.axvline(0, color=GREY, linewidth=0.8)
    axes.set_yticks(range(len(large)), list(large.index))
    axes.set_xlabel("simulated − measured, in % of measured time")
    axes.set_title("Anatomy of the error, all plans, emulated device", loc="left")
    axes.legend(loc="lower left")
    return figure


display(anatomy_bars())

# %%
kinds = found.kinds.set_index("kind")
display(kinds.assign(**{c: kinds[c].map("{:.1%}".format) for c in ("share", "error", "median", "p90")}))

# %% [markdown]
# ## Does it put plans in their order?
#
# Small errors alone do not make a good choice, so the choice itself is judged, among plans that do the same work.
#
# - **Kendall's tau** = (pairs in order − pairs out of order) / all pairs, corrected for ties.
# - **Clear pairs** differ by more than the noise; only these can be put in order at all. `agreed` is the share of them
#   that is in order.
# - **Regret** of a cell (one model, workload and budget) = time of the plan predicted best / time of the best
#   plan measured − 1. "Of three": the three best by prediction are measured, and the fastest is kept.

# %%
order = pd.DataFrame({side: vars(o) for side, o in found.orders.items()}).T
display(order.astype({"n_pairs": int, "n_clear": int}).round(3))
regrets = pd.DataFrame({f"top {n}": values for n, values in found.regrets.items()})
regrets.index = pd.MultiIndex.from_tuples(regrets.index, names=CELL)
display(regrets.map("{:.1%}".format))


# %%
@styled
def race() -> object:
    """Plans of each cell by predicted time: predicted line, measured points."""
    cells = list(cases.groupby(CELL, sort=False))
    figure, axes = chart(7.6, 3.0)
    left = 0
    for (model, n_prompt, _, budget), own in cells:
        own = own.sort_values("predicted_total_s")
        x = np.arange(left, left + len(own))
        axes.plot(x, own["predicted_total_s"], color=SIMULATED, label="predicted" if left == 0 else None)
        axes.plot(x, own["total_s"], "o", color=MEASURED, markersize=3, label="measured" if left == 0 else None)
        where = f"{model}\n{n_prompt} tokens\n{budget >> 20} MiB"
        axes.annotate(where, (left, 0.98), xycoords=("data", "axes fraction"), va="top", fontsize=6)
        left += len(own) + 2
    axes.set(yscale="log", ylabel="seconds of a generation", xticks=[])
    axes.set_yticks([0.1, 0.2, 0.5, 1, 2, 5], ["0.1", "0.2", "0.5", "1", "2", "5"])
    axes.minorticks_off()
    axes.set_xlabel("plans of each cell, predicted fastest first")
    axes.set_ylim(top=axes.get_ylim()[1] * 3)
    axes.set_title("Predicted order and measured times, emulated device", loc="left")
    figure.legend(loc="outside lower center", ncols=2)
    return figure


display(race())

# %% [markdown]
# ## Memory
#
# Device memory is counted by the device itself. How much the process grew when a plan was loaded and first run is
# independent of that count, and is compared with all weights and slots that the plan keeps on either side.

# %%
assert found.loaded is not None
print(f"device memory: largest difference {found.memory.worst_bytes / 2**20:.1f} MiB")
print(
    f"process: median error {found.loaded.errors.median:.1%}, "
    f"largest difference {found.loaded.worst_bytes / 2**20:.0f} MiB"
)

# %% [markdown]
# ## Contention on and off
#
# CPU, device and link share memory. Without that in the model, plans that overlap look too fast.

# %%
overlapping = cases[cases["isolated_tpot_s"] < 0.99 * cases["simulated_tpot_s"]]
for label, prefix in (("with contention", "simulated_"), ("without", "isolated_")):
    e = errors(overlapping[f"{prefix}tpot_s"].tolist(), overlapping["tpot_s"].tolist())
    print(
        f"{label:<16} TPOT error of {e.n} overlapping plans: "
        f"median {e.median:.1%}, bias {e.bias:+.1%}, worst {e.worst:.1%}"
    )

# %% [markdown]
# **Takeaway.** Whoever runs the plan predicted best gives away 0.4 % at worst in six cells of workload and memory. Of
# 715 pairs of plans that differ by more than the noise all but two are in their order, in simulation as well as
# predicted before anything ran: that is what a simulator is for. Steps miss by 2 % in the median and by 6 % for nine
# in ten, throughput and the first token by 2, where the machine itself repeats them within 1, 4, 1 and 1. What a user
# is told by a calibration before is right within 3.2 % of a generation's time in the median, 6 % for nine in ten,
# mostly too fast. On the other machine a neighbour on the same physical cores slowed two runs of three, and steps
# missed by 6 and 14 %. What is left is above all attention: 11 % too fast over all its tasks, though in plans that send
# weights much of it hides behind the link. `experiments/LOG.md` has the story.
