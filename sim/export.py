"""A plan in the words of other engines, which place whole MLPs: as near as they can come to it.

A layer's MLP goes to the device if its layer is among those that hold most of the plan's GG columns, and only
as many as fit into the GG columns' bytes: what is exported never takes more device memory than the plan.
"""

from __future__ import annotations

import json
import shlex
from collections.abc import Callable

from hwmodels.errors import PlanError
from sim.model import ModelSpec
from sim.plan import Plan, check_plan


def resident_layers(plan: Plan, spec: ModelSpec) -> frozenset[int]:
    """Layers whose whole MLP goes to the device, the fullest first, within the bytes of the plan's GG columns."""
    check_plan(plan, spec)
    held = [sum(part.gg) * spec.column_bytes(i) for i, part in enumerate(plan.layers)]
    left, chosen = sum(held), set()
    for i in sorted(range(spec.n_layers), key=lambda i: (-held[i] / spec.ffn_bytes(i), -i)):
        if plan.layers[i].rest == "GPU" and spec.ffn_bytes(i) <= left:
            chosen.add(i)
            left -= spec.ffn_bytes(i)
    return frozenset(chosen)


def llama_cpp(plan: Plan, spec: ModelSpec) -> str:
    """Flags of llama.cpp's programs: layers on the device, MLPs that stay in host memory, context, micro-batch.

    Raises PlanError if layers on the CPU are not the first ones: llama.cpp has no flag for that.
    """
    resident = resident_layers(plan, spec)
    on_device = [part.rest == "GPU" for part in plan.layers]
    n_device = sum(on_device)
    if on_device != [False] * (spec.n_layers - n_device) + [True] * n_device:
        raise PlanError("the plan leaves layers to the CPU that are not the first ones; llama.cpp cannot do that")
    flags = ["-ngl", str(n_device + (plan.ends == "GPU")), "-c", str(plan.n_ctx * plan.batch)]
    host = [str(i) for i in range(spec.n_layers) if on_device[i] and i not in resident]
    if host:
        flags += ["-ot", rf"blk\.({'|'.join(host)})\.ffn_(gate|up|down)(_exps)?\.weight=CPU"]
    prompt = plan.tiers[-1]
    if host and prompt.stream_min_tokens is None and not any(prompt.ahead):
        flags.append("--no-op-offload")
    if plan.cpu_threads is not None:
        flags += ["-t", str(plan.cpu_threads)]
    if plan.chunk_tokens is not None:
        size = str(plan.step_tokens * plan.batch)
        flags += ["-b", size, "-ub", size]
    return shlex.join(flags)


def accelerate(plan: Plan, spec: ModelSpec) -> str:
    """A device_map for transformers' from_pretrained, as JSON: 0 is the device, "cpu" is streamed when used."""
    resident = resident_layers(plan, spec)
    ends = 0 if plan.ends == "GPU" else "cpu"
    places: dict[str, int | str] = {"model.embed_tokens": ends, "model.rotary_emb": ends}
    for i, part in enumerate(plan.layers):
        name = f"model.layers.{i}"
        if part.rest == "CPU" or i in resident:
            places[name] = "cpu" if part.rest == "CPU" else 0
        else:
            for module in ("input_layernorm", "self_attn", "post_attention_layernorm"):
                places[f"{name}.{module}"] = 0
            places[f"{name}.mlp"] = "cpu"
    return json.dumps(places | {"model.norm": ends, "lm_head": ends})


EXPORTS: dict[str, Callable[[Plan, ModelSpec], str]] = {"llama.cpp": llama_cpp, "accelerate": accelerate}
