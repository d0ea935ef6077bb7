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
# # Choosing a policy for your machine
#
# **Question.** A model does not fit on the GPU. How much device memory should it get, and who should compute the
# rest: CPU or link?
#
# No GPU and no weights are needed to answer: the simulator knows the machine from its profile and the model from its
# sizes. Here Mixtral-8x7B, 87 GiB in bfloat16, meets an RTX 4090 whose host was measured by others while CPU and
# link worked at the same time. Put your own names into the first cell; `scheinfer hardware` and `scheinfer models`
# list them.

# %%
import pandas as pd
from IPython.display import display

import scheinfer
from hwmodels.work import ffn
from sim.export import accelerate, llama_cpp
from sim.planner import decide, explain
from sim.plot import pareto, ranking, roofline
from sim.policies.problem import Problem
from sim.sensitivity import sensitivity
from sim.workload import Workload

MACHINE, MODEL = "rtx4090-tr5955wx", "mixtral-8x7b"
hw, spec = scheinfer.hardware(MACHINE), scheinfer.model(MODEL)
workload = Workload(n_prompt=512, n_gen=128)
cpu, link = hw.peak("CPU").bytes_per_s, hw.peak("H2D").bytes_per_s
print(f"{spec.name}: {spec.weight_bytes / 2**30:.0f} GiB; host memory {cpu / 1e9:.0f} GB/s, link {link / 1e9:.0f} GB/s")

# %% [markdown]
# ## Bytes decide at one token, arithmetic at many
#
# Every resource is bounded by its roofline,
#
# $$ t \ge \max\left(\frac{\mathrm{FLOPs}}{P}, \frac{\mathrm{bytes}}{B}\right), $$
#
# and a gated MLP does $2 S$ FLOPs per weight for $S$ tokens. At $S = 1$ that is 1 FLOP per byte of bfloat16: all
# resources wait for memory, the CPU is nearer to its bytes than the GPU behind the link is, and experts are best
# computed where they lie. From a few hundred tokens on the arithmetic of the CPU is the slowest thing around, and
# sending an expert pays although the link is slow.

# %%
d, f = 4096, 14336
works = {f"{n} token{'s' if n > 1 else ''}": ffn(n, d, f, "bfloat16") for n in (1, 8, 64, 512)}
display(roofline(hw, works, title=f"One expert of {MODEL} on {MACHINE}"))

# %% [markdown]
# ## All policies, several budgets
#
# A sweep simulates every combination; the same from a shell is `scheinfer sweep`. Each point below is a plan: how
# much device memory it uses and how fast it decodes. The front is what no other plan beats.

# %%
POLICIES = ["cpu-only", "stream-overlap", "llama-cpp", "fiddler", "ktransformers", "freetoken", "scheinfer"]
rows = scheinfer.sweep([MODEL], [MACHINE], POLICIES, ["6GiB", "12GiB", "18GiB"], [512], [128])
fits = rows[rows["refused"].isna()].to_dict("records")
display(pareto(fits, title=f"{MODEL} on {MACHINE}, simulated"))

# %%
table = rows.assign(GiB=rows["vram_budget_bytes"] / 2**30).pivot(index="policy", columns="GiB", values="decode_tok_s")
display(table.sort_values(table.columns[-1], ascending=False).round(2))

# %% [markdown]
# Streaming all weights is bound by the link: 87 GiB at its rate, whatever the budget. What computes experts on the
# CPU starts higher, and every GiB that moves to the device takes bytes off the CPU's memory, the slowest of the
# three sums. What lies between `scheinfer` and the others is the link: while the CPU reads its experts, the link
# brings some columns of them to the device, a few hundred MiB of slots are enough for that.

# %% [markdown]
# ## One budget: the choice and its reasons
#
# With the budget fixed, `auto` searches a million plans and more and simulates those that may be the best.

# %%
problem = Problem(spec, hw, 18 * 2**30, workload)
decision = decide(problem, "auto")  # scheinfer.plan(spec, hw, "18GiB", 512, 128) gives the same plan
plan = decision.plan
print(explain(spec, hw, plan, workload))

# %%
here = rows[(rows["vram_budget_bytes"] == 18 * 2**30) & rows["refused"].isna()]
chosen = {**here.iloc[0].to_dict(), "policy": "auto", "decode_tok_s": plan.prediction.decode_tok_s}
display(ranking([*here.to_dict("records"), chosen], title=f"{MODEL}, 18 GiB of device memory, simulated"))

# %% [markdown]
# ## What to buy
#
# The same search with one thing of the machine changed says what limits it.

# %%
gains = sensitivity(problem, decision)
display(pd.DataFrame({"change": [g.change for g in gains], "times as fast": [round(g.speedup, 3) for g in gains]}))

# %% [markdown]
# ## Take it elsewhere
#
# A plan is data. What other programs can do of it leaves as their own flags: llama.cpp's override of tensors,
# accelerate's `device_map`. They place experts of whole layers only, so a plan with few GPU layers loses most.

# %%
print(llama_cpp(plan, spec))
print(accelerate(plan, spec)[:300], "...")

# %% [markdown]
# **Takeaway.** At one token memory bandwidth is the whole story, so experts are computed where they lie, and the
# policy that keeps CPU, link and device busy at once is the fastest at every budget. Ask the simulator for your
# machine before you download 87 GiB, and ask it what to buy.
