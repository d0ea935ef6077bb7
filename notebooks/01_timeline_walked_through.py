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
# # A timeline walked through
#
# **Question.** What do CPU, link and device do during one decode step, and does the simulator know?
#
# An MLP is cut along its intermediate dimension into three parts that work at the same time:
# **CC** (kept and computed by the CPU), **CG** (kept by the CPU, sent over the link, computed by the
# device) and **GG** (kept and computed by the device). The sum of their partial outputs is the MLP's output.
#
# The timelines below were measured by `python -m experiments.overlap` on a machine with two cores and no
# GPU: the device is **emulated** (the second core computes, a thread copies at a fixed 2 GB/s). Tensors,
# copies and waiting are real; the numbers show that plan, simulation and execution agree, not how fast a
# GPU would be.

# %%
import json
from pathlib import Path

import pandas as pd
from IPython.display import display

from sim.plot import gantt
from sim.timeline import read_spans

here = Path.cwd() if (Path.cwd() / "experiments").is_dir() else Path.cwd().parent
results = here / "experiments" / "results" / "overlap"
config = json.loads((results / "config.json").read_text())
rows = pd.read_csv(results / "rows.csv").set_index(["model", "plan"])
host = config["provenance"]["host"]
print(f"{host.get('cpu', 'unknown CPU')}, commit {config['provenance']['commit']}")

# %% [markdown]
# ## One layer at a time
#
# The bytes of one decode step decide its time: a Llama-like layer of width 768 and 3072 columns has
# 3 x 768 x 3072 x 4 B = 28.3 MB of MLP weights in float32. At about 15 GB/s of one core that is 1.9 ms. Run
# on both sides one after the other, half of it still costs 1.9 ms; run at the same time, 0.95 ms and a hand-off.
#
# Below: the same decode step by two plans of one placement. Simulated above, measured below.


# %%
def timelines(model: str, plan: str) -> list:
    return [read_spans(results / f"{model}.{plan}.{source}.parquet", source) for source in ("simulated", "measured")]


serial = timelines("llama-like", "serial")
display(gantt(serial, step="decode8", title="One part after the other, emulated"))

# %%
overlap = timelines("llama-like", "overlap-cg")
display(gantt(overlap, step="decode8", title="CC, CG and GG together, emulated"))

# %% [markdown]
# In the second picture the CPU's `cc`, the link's `send` and the device's `gg` of one layer lie above each
# other. The link already carries the next layer's columns while the device runs attention: nothing in an
# MLP's columns depends on what comes before.

# %% [markdown]
# ## How much of the work overlaps?
#
# Overlap = sum of busy times / makespan. One resource at a time gives at most 1; three that never wait give 3.

# %%
table = rows[["sum_of_busy_s", "makespan_s", "measured_overlap", "simulated_overlap"]]
display(table.round(2))

# %% [markdown]
# ## Does the simulator know?
#
# The simulator replays the plan and the routing that ran, with times calibrated beforehand on other shapes of
# steps. It knows nothing of these timelines. The calibration took 45 s and ended just before; the cores are
# shared, and in louder minutes decode ran 12 to 22 % slower than it says. How far predictions are right when the
# calibration sees the minutes of the runs is the third notebook's question.

# %%
errors = rows[["measured_tpot_s", "simulated_tpot_s", "tpot_error", "tpot_error_without_contention", "ttft_error"]]
per_cent = [c for c in errors.columns if "error" in c]
display(errors.assign(**{c: errors[c].map("{:+.1%}".format) for c in per_cent}).round(4))
worst = errors["tpot_error"].abs().max()
print(f"worst error of the time per output token: {worst:.1%}")

# %% [markdown]
# ## One prompt
#
# With 128 tokens the arithmetic of a layer grows, its bytes on the link do not: sending columns pays where
# computing them on the CPU would take longer.

# %%
display(gantt(overlap, step="prefill", title="Prompt of 128 tokens, emulated"))

# %% [markdown]
# **Takeaway.** Cutting one MLP by columns lets all resources work on the same layer; the makespan falls well
# below the sum of busy times, and the simulator says by how much before anything runs.
