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
# # Bring your own machine
#
# **Question.** How does a machine get into the simulator, and how far is a measured one from a data sheet?
#
# `scheinfer calibrate` measures a profile in five minutes, `--quick` in under one. This notebook measures a tiny
# shape, so that it takes seconds: **its numbers show the method, not the machine**. Without a GPU the device is
# **emulated**: a second set of threads computes, and a thread copies at a fixed rate.

# %%
import tempfile
from pathlib import Path

import numpy as np
import pandas as pd
from IPython.display import display
from transformers import LlamaConfig

import scheinfer
from hwmodels.calibrate import residuals
from hwmodels.catalog import with_overrides
from hwmodels.parts import compose
from hwmodels.work import ffn
from runtime.calibrate import Extent, calibrate
from sim.chart import BLACK, GREY, SERIES, chart, styled
from sim.planner import plan as make_plan
from sim.workload import Workload

D, F = 512, 1536
sizes = {"vocab_size": 512, "hidden_size": D, "intermediate_size": F, "num_hidden_layers": 2, "num_attention_heads": 8}
config = LlamaConfig(**sizes, dtype="float32")

# %% [markdown]
# ## Measure
#
# Everything is measured through the queues and kernels that run plans: CPU and device over numbers of tokens, link
# over sizes, all of them beside each other, and what it takes to hand a task on. A number is the median of its
# repeats and keeps their spread (p90 − p10).

# %%
extent = Extent((1, 2, 4, 8, 16, 32, 64), (0,), 2, 4, 2.0, 0.02, False)
with tempfile.TemporaryDirectory() as scratch:
    config.save_pretrained(scratch)
    mine = calibrate(Path(scratch), "emulated", progress=False, extent=extent)
print(f"{mine.fingerprint['cpu']}, {mine.cpu_threads} threads, {len(mine.curves)} curves, device: {mine.device}")
print(*mine.notes, sep="\n")


# %%
@styled
def curve() -> object:
    """One MLP by tokens: measured medians with their spread, what the profile answers between, and the roofline."""
    figure, axes = chart(5.4, 3.2)
    for resource, colour in (("CPU", SERIES[1]), ("GPU", SERIES[2])):
        own = mine.curve(resource, "ffn", "float32")
        points = [s for s in own.samples if abs(s.weight_bytes - 3 * D * F * 4) < 1]
        half = [s.spread_s / 2 * 1e3 for s in points]
        axes.errorbar([s.n_tokens for s in points], [s.median_s * 1e3 for s in points], half, fmt="o", color=colour,
                      markersize=4, capsize=2, label=f"{resource}, measured")  # fmt: skip
        asked = np.unique(np.geomspace(1, 128, 60).round().astype(int))
        works = [ffn(int(n), D, F, "float32") for n in asked]
        axes.plot(asked, [mine.time_s(resource, w).seconds * 1e3 for w in works], color=colour, linewidth=1)
    axes.axvspan(64, 128, color=GREY, alpha=0.15, linewidth=0)
    axes.annotate("extrapolated", (67, 0.06), xycoords=("data", "axes fraction"), va="top", fontsize=7, color=BLACK)
    axes.set(xscale="log", yscale="log", xlabel="tokens", ylabel="ms")
    axes.set_xticks([1, 4, 16, 64], ["1", "4", "16", "64"])
    axes.set_yticks([0.25, 0.5, 1, 2, 4, 8, 16], ["0.25", "0.5", "1", "2", "4", "8", "16"])
    axes.set_ylim(0.15, 20)
    axes.minorticks_off()
    axes.set_title(f"A gated MLP of {D} x {F}, this machine, device emulated", loc="left")
    axes.legend(loc="upper left")
    return figure


display(curve())

# %% [markdown]
# ## Doubt it
#
# Leave every inner point out and predict it from its neighbours: if
#
# $$ e_i = \left|\frac{\hat t_i}{t_i} - 1\right| $$
#
# is small, the law between the points holds and they are dense enough. On a quiet machine the median of a curve
# should be below 5 % and its worst below 15 %; a short run on a shared machine, as here, is noisier.

# %%
left_out = pd.DataFrame([vars(r) for r in residuals(mine.curves)])
display(left_out.assign(**{c: left_out[c].map("{:.1%}".format) for c in ("median", "worst")}).set_index("curve"))

# %% [markdown]
# Resources that share memory slow each other down. The profile keeps the rate of each beside the others, 1 being
# alone, once for work that reads its weights (a token at a time) and once for work that computes (a prompt):

# %%
display(
    pd.DataFrame(
        [{"active": " + ".join(c.active), "computing": ", ".join(c.computing), **c.rate} for c in mine.contention]
    )
    .round(2)
    .astype(object)
    .fillna("")
)

# %% [markdown]
# ## Compare with a machine that is known
#
# The shipped profiles are put together from published figures; every number has its source. What one cannot find can
# be composed from parts, and any number overruled.

# %%
known = scheinfer.hardware("rtx4090-ryzen7950x")
composed = compose("rtx3090", "ryzen5950x", "pcie4x16")
richer = with_overrides(composed, {"dram_read_GBps": 60})
machines = {"this machine, emulated": mine, known.name: known, composed.name: composed, "and 60 GB/s of DRAM": richer}


def figures(profile: object) -> dict[str, str]:
    rate = {r: f"{profile.peak(r).bytes_per_s / 1e9:.0f} GB/s" for r in ("CPU", "GPU", "H2D")}
    return {**rate, "CPU float32": f"{profile.peak('CPU').flops_per_s['float32'] / 1e12:.2f} TFLOP/s",
            "source of CPU rate": profile.peak("CPU").source_of("bytes_per_s")}  # fmt: skip


display(pd.DataFrame({name: figures(p) for name, p in machines.items()}).T)

# %% [markdown]
# ## Use it
#
# A profile answers what a plan costs. The same question to all four machines: a Llama-2-7B, half of it in device
# memory, planned by the paper's scheme. What the tiny calibration knows of a layer 50 times its size is extrapolated,
# and says so.

# %%
spec, workload = scheinfer.model("llama-2-7b", "float32"), Workload(128, 64)
answers = []
for name, profile in machines.items():
    roomy = with_overrides(profile, {"ram_GiB": 64, "vram_GiB": 24})
    made = make_plan(spec, roomy, 14 * 2**30, workload, "scheinfer")
    timeline = scheinfer.simulate(made, spec, roomy, 128, 4)
    evidence = {k: n for k, n in timeline.info["evidence"].items() if n}
    answers.append({"machine": name, "TTFT, s": made.prediction.ttft_s, "decode, tok/s": made.prediction.decode_tok_s,
                    "costs": ", ".join(f"{n} {k}" for k, n in evidence.items())})  # fmt: skip
with pd.option_context("display.max_colwidth", None):
    display(pd.DataFrame(answers).set_index("machine").round(2))

# %% [markdown]
# **Takeaway.** A machine is some curves with their spread, rates beside each other, and delays. Measure it where you
# can; compose it where you cannot; and look at the word beside the number: *measured*, *interpolated*,
# *extrapolated*, *specified*.
