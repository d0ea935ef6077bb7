"""Every column of every expert lies in one place, between two cuts in one run of memory."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.functional import silu

from runtime.devices.emulated import EmulatedDevice
from runtime.memory import ExpertStore, LayerStore, Slots, WeightStore, allocate, cuts
from runtime.ops import gated_mlp
from sim.graph import Part
from sim.memory import memory
from sim.model import ModelSpec
from sim.plan import LayerPartition, Plan
from tests.planned import plan_for
from tests.unit_machine import dense, mixed, plans, specs, tier, uniform

D = 8  # the width of these models


@pytest.fixture(scope="module")
def device() -> Iterator[EmulatedDevice]:
    made = EmulatedDevice(1 << 40)
    yield made
    made.close()


Weights = tuple[torch.Tensor, torch.Tensor, torch.Tensor]
"""gate [F, D], up [F, D], down [D, F]."""


def rows(n_rows: int, seed: int = 0) -> torch.Tensor:
    """Activations [n_rows, D]."""
    return torch.randn(n_rows, D, generator=torch.Generator().manual_seed(seed))


def filled(spec: ModelSpec, plan: Plan, device: EmulatedDevice) -> tuple[WeightStore, dict[tuple[int, int], Weights]]:
    """A store, and the weights that every expert of it was filled with."""
    store, found = allocate(spec, plan, device), {}
    for i, layer in enumerate(store.layers):
        for e, expert in enumerate(layer.experts):
            gate, up, down = rows(3 * spec.layers[i].ffn.columns, seed=100 * i + e).chunk(3)
            expert.fill(gate, up, down.T, after_each=lambda: None)
            found[i, e] = gate, up, down.T
    return store, found


# -- cuts ---------------------------------------------------------------------------------------------


def test_an_expert_is_cut_where_the_device_part_and_what_each_tier_sends_end() -> None:
    # columns |0 gg=3 |  +4 = 7  |  +20 is past the end |12
    assert cuts(12, 3, (4, 20)) == (0, 3, 7, 12)
    assert cuts(12, 0, (0,)) == (0, 12)
    assert cuts(12, 12, (5,)) == (0, 12)


@given(st.integers(1, 40), st.data())
def test_cuts_rise_from_zero_to_all_columns(columns: int, data: st.DataObject) -> None:
    gg = data.draw(st.integers(0, columns))
    found = cuts(columns, gg, data.draw(st.lists(st.integers(0, 50), max_size=3)))
    assert found[0] == 0
    assert found[-1] == columns
    assert gg in found
    assert all(a < b for a, b in pairwise(found))


# -- placement ----------------------------------------------------------------------------------------


@settings(deadline=None)
@given(st.data())
def test_a_store_takes_the_bytes_that_the_estimate_says(device: EmulatedDevice, data: st.DataObject) -> None:
    spec = data.draw(specs())
    plan = data.draw(plans(spec))
    before, need = device.arena.used_bytes, memory(spec, plan)
    store = allocate(spec, plan, device)
    assert store.device_bytes == need.gg
    assert store.device_bytes + store.host_bytes == sum(spec.ffn_bytes(i) for i in range(spec.n_layers))
    assert device.arena.used_bytes - before == need.gg + need.slots + need.cache


@settings(deadline=None)
@given(st.data())
def test_any_parts_that_a_plan_may_ask_for_add_up_to_the_whole_expert(
    device: EmulatedDevice, data: st.DataObject
) -> None:
    spec = data.draw(specs())
    plan = data.draw(plans(spec))
    store, weights = filled(spec, plan, device)
    x = rows(2)
    for (i, e), (gate, up, down) in weights.items():
        expert, columns = store.layers[i].experts[e], spec.layers[i].ffn.columns
        stop = data.draw(st.sampled_from([c for c in expert.cuts if c >= expert.gg]))
        parts = [expert.views(expert.host_run(a, b), a, b) for a, b in ((expert.gg, stop), (stop, columns)) if a < b]
        got = sum(gated_mlp(x, pieces, silu) for pieces in [*parts, expert.resident()] if pieces)
        expected = (silu(x @ gate.T) * (x @ up.T)) @ down.T
        torch.testing.assert_close(got, expected, atol=1e-3, rtol=1e-4)


def test_experts_that_are_neighbours_in_a_layer_are_neighbours_in_memory(device: EmulatedDevice) -> None:
    spec = mixed(n_layers=2)  # a dense layer, then one of four experts of 12 columns
    expert_bytes = 3 * D * 12 * 4
    layers = [LayerPartition("GPU", (0,) * layer.ffn.n_experts) for layer in spec.layers]
    store = allocate(spec, plan_for(spec, layers, tier(spec)), device)
    first = [expert.host.data_ptr() for expert in store.layers[1].experts]
    assert [address - first[0] for address in first] == [e * expert_bytes for e in range(4)]


def test_filling_tells_after_each_matrix_so_that_file_pages_can_be_given_back(device: EmulatedDevice) -> None:
    spec, told = dense(n_layers=1), []
    expert = allocate(spec, uniform(spec, 3, ahead=4), device).layers[0].experts[0]
    expert.host.zero_()  # memory comes as it is found: it may hold infinity
    expert.device.zero_()
    gate, up, down = torch.ones(12, D), torch.full((12, D), 2.0), torch.full((D, 12), 3.0)
    expert.fill(gate, up, down, after_each=lambda: told.append((int(expert.host.sum()), int(expert.device.sum()))))
    # of 12 columns of 8: 9 on the host, 3 on the device
    assert told == [(9 * 8 * n, 3 * 8 * n) for n in (1, 1 + 2, 1 + 2 + 3)]


# -- slots --------------------------------------------------------------------------------------------


def test_parts_lie_one_after_the_other_in_a_slot() -> None:
    slots = Slots((torch.zeros(100), torch.zeros(100)))
    runs = slots.place(1, [Part(2, 0, 3, 1), Part(4, 5, 6, 1)], width=10)
    assert [run.numel() for run in runs] == [30, 10]
    assert runs[1].data_ptr() == runs[0].data_ptr() + 30 * 4
    assert slots.run(1, 4).data_ptr() == runs[1].data_ptr()
    slots.place(1, [Part(4, 5, 6, 1)], width=10)
    assert slots.run(1, 4).data_ptr() == runs[0].data_ptr()


def test_tiers_share_one_region_cut_anew_for_each(device: EmulatedDevice) -> None:
    # twelve columns of 3 * 8 * 4 bytes: two slots of 4 columns, three of 2; the larger tier decides the region
    spec = dense(n_layers=1)
    few, many = tier(spec, ahead=4, max_tokens=1), tier(spec, stream_min_tokens=1, stream_columns=2, n_slots=3)
    before = device.arena.used_bytes
    plan = plan_for(spec, uniform(spec, 0).layers, few, many)
    store = allocate(spec, plan, device)
    column = 3 * D
    assert device.arena.used_bytes - before == 2 * 4 * column * 4
    part = [Part(0, 0, 1, 1)]
    addresses = {
        t: [store.slots[t].place(s, part, column)[0].data_ptr() for s in range(t.n_slots)] for t in (few, many)
    }
    assert addresses[few][0] == addresses[many][0]
    assert {b - a for a, b in pairwise(addresses[few])} == {4 * column * 4}
    assert {b - a for a, b in pairwise(addresses[many])} == {2 * column * 4}


def test_a_store_of_nothing_takes_nothing() -> None:
    store = WeightStore((LayerStore(()),), {})
    assert store.device_bytes == store.host_bytes == 0
    empty = ExpertStore(D, 3 * D, 0, (0, 4), torch.empty(0), torch.zeros(4 * 3 * D))
    assert empty.resident() == []
