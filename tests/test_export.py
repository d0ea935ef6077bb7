"""A plan for other engines takes no more device memory than the plan, and names what these engines know."""

from __future__ import annotations

import json
import re
import shlex
from dataclasses import replace

import pytest

from hwmodels.errors import PlanError
from sim.export import accelerate, llama_cpp, resident_layers
from sim.model import ModelSpec, from_config
from sim.plan import LayerPartition, Plan, Tier
from tests.tiny import FAMILIES, tiny_config, tiny_model

DENSE = from_config(tiny_config("llama", num_hidden_layers=4).to_dict())  # 4 layers of 44 columns


def plan_of(spec: ModelSpec, *gg: int) -> Plan:
    """A plan whose layers hold so many columns of every expert; None as many as there are."""
    layers = tuple(LayerPartition("GPU", (g,) * la.ffn.n_experts) for g, la in zip(gg, spec.layers, strict=True))
    tier = Tier("all", 64, True, (0,) * spec.n_layers, None, 0)
    return Plan("test", spec.name, spec.id, "", spec.dtype, 1 << 30, 64, 1, True, "GPU", layers, (tier,))


def test_half_of_every_mlp_becomes_half_of_the_mlps() -> None:
    assert resident_layers(plan_of(DENSE, 22, 22, 22, 22), DENSE) == {2, 3}


def test_the_fullest_layers_come_first() -> None:
    assert resident_layers(plan_of(DENSE, 44, 0, 30, 14), DENSE) == {0, 2}


def test_a_byte_less_than_a_layer_is_no_layer() -> None:
    assert resident_layers(plan_of(DENSE, 43, 0, 0, 0), DENSE) == set()


def test_llama_cpp_keeps_the_other_mlps_in_host_memory() -> None:
    words = shlex.split(llama_cpp(plan_of(DENSE, 0, 0, 44, 44), DENSE))
    assert words[:4] == ["-ngl", "5", "-c", "64"]  # four layers and the output
    pattern, _, place = words[5].partition("=")
    assert place == "CPU"
    kept = [f"blk.{i}.{name}" for i in range(4) for name in ("ffn_up.weight", "ffn_gate_inp.weight", "attn_q.weight")]
    assert [name for name in kept if re.search(pattern, name)] == ["blk.0.ffn_up.weight", "blk.1.ffn_up.weight"]
    assert words[6:] == ["--no-op-offload"]


def test_llama_cpp_gets_a_plans_chunk_as_its_micro_batch() -> None:
    plan = replace(plan_of(DENSE, 0, 0, 0, 0), chunk_tokens=8)
    size = str(8 * plan.batch)
    assert llama_cpp(plan, DENSE).endswith(f"-b {size} -ub {size}")


def test_llama_cpp_splits_layers_at_one_place_only() -> None:
    plan = plan_of(DENSE, 0, 0, 0, 0)
    first = replace(plan, layers=(LayerPartition("CPU", (0,)), *plan.layers[1:]))
    assert llama_cpp(first, DENSE).startswith("-ngl 4 ")
    last = replace(plan, layers=(*plan.layers[:3], LayerPartition("CPU", (0,))))
    with pytest.raises(PlanError, match="not the first ones"):
        llama_cpp(last, DENSE)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_device_map_places_every_weight_once(family: str) -> None:
    model = tiny_model(family)
    spec = from_config(model.config.to_dict())
    columns = spec.layers[-1].ffn.columns
    places = json.loads(accelerate(plan_of(spec, 0, 0, columns), spec))
    for name, _ in [*model.named_parameters(), *model.named_buffers()]:
        assert len([p for p in places if name == p or name.startswith(f"{p}.")]) == 1, name
    assert (places["model.layers.0.mlp"], places["model.layers.2"]) == ("cpu", 0)
