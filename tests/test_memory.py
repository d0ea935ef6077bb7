"""Memory: every byte of a plan is counted once, where it is, and a shortage is told in bytes."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hwmodels.errors import PlanError
from sim.memory import activation_bytes, check_memory, ends_bytes, memory, slot_bytes
from sim.plan import LayerPartition
from tests.unit_machine import dense, moe, on_cpu, plan_of, plans, specs, tier, uniform

COLUMN = 3 * 8 * 4  # gate, up and down of one column: three vectors of 8 float32


@given(st.data())
def test_what_a_model_weighs_lies_on_the_device_or_in_host_memory(data):
    spec = data.draw(specs())
    need = memory(spec, data.draw(plans(spec)))
    assert need.ends + need.rest + need.gg + need.host_weights == spec.weight_bytes


@given(st.data())
def test_the_kv_cache_lies_where_attention_runs(data):
    spec = data.draw(specs())
    plan = data.draw(plans(spec))
    need = memory(spec, plan)
    whole = sum(plan.batch * spec.kv_bytes(i, plan.n_ctx) for i in range(spec.n_layers))
    assert need.kv + need.host_kv == whole
    assert (need.kv == whole) == all(part.rest == "GPU" for part in plan.layers)


@given(st.data())
def test_the_parts_sum_up(data):
    spec = data.draw(specs())
    need = memory(spec, data.draw(plans(spec)))
    assert need.vram_bytes == need.ends + need.rest + need.gg + need.slots + need.cache + need.kv + need.activations
    assert need.host_bytes == need.host_weights + need.host_kv


def test_a_resident_column_moves_its_bytes_from_the_host_to_the_device():
    spec = dense(3, columns=12)
    none, five = memory(spec, uniform(spec)), memory(spec, uniform(spec, gg=5))
    assert five.gg == 3 * 5 * COLUMN
    assert none.host_weights - five.host_weights == five.gg


def test_a_plan_without_a_device_takes_nothing_of_it():
    spec = moe()
    assert memory(spec, on_cpu(spec)).vram_bytes == 0


def test_a_slot_holds_what_all_experts_send_ahead_at_once():
    spec = moe(columns=12, n_experts=4)
    plan = uniform(spec, gg=(0, 6, 9, 12), ahead=6)
    assert slot_bytes(spec, plan, plan.tiers[0]) == (6 + 6 + 3 + 0) * COLUMN


def test_a_slot_holds_what_one_routed_expert_sends():
    spec = moe(columns=12, n_experts=4)
    plan = uniform(spec, gg=(2, 6, 9, 12), stream_min_tokens=1)
    assert slot_bytes(spec, plan, plan.tiers[0]) == 10 * COLUMN
    part = uniform(spec, gg=(2, 6, 9, 12), stream_min_tokens=1, stream_columns=4)
    assert slot_bytes(spec, part, part.tiers[0]) == 4 * COLUMN


def test_the_largest_layer_decides_a_slot_and_the_hungriest_tier_their_number():
    spec = dense(2, columns=12)
    layers = [LayerPartition("GPU", (0,)), LayerPartition("GPU", (9,))]
    small, large = tier(spec, ahead=12, n_slots=2, max_tokens=1), tier(spec, stream_min_tokens=1, n_slots=3)
    assert memory(spec, plan_of(spec, layers, small)).slots == 2 * 12 * COLUMN
    assert memory(spec, plan_of(spec, layers, small, large)).slots == 3 * 12 * COLUMN


def test_a_layer_on_the_cpu_needs_no_slot():
    spec = dense(2, columns=12)
    layers = [LayerPartition("CPU", (0,)), LayerPartition("GPU", (9,))]
    plan = plan_of(spec, layers, tier(spec, ahead=12))
    assert memory(spec, plan).slots == 2 * 3 * COLUMN


def test_a_tied_embedding_is_stored_once():
    # 16 tokens of 8 float32 = 512 bytes; the final norm of 32 bytes stays
    assert ends_bytes(dense()) == 2 * 512 + 32
    assert ends_bytes(dense(tie_word_embeddings=True)) == 512 + 32


def test_activations_grow_with_the_tokens_of_a_step_and_logits_with_the_batch():
    spec = dense()
    one, two, pair = (activation_bytes(spec, n, batch) for n, batch in ((1, 1), (2, 1), (2, 2)))
    row = two - one
    assert activation_bytes(spec, 100, 1) == one + 99 * row
    assert pair - two == 16 * (4 + 4)  # float32 logits, and a float32 copy to sample from


def test_a_shorter_step_needs_less_than_the_whole_context():
    spec = dense()
    assert memory(spec, uniform(spec), n_tokens=8).activations < memory(spec, uniform(spec)).activations


@given(st.data())
def test_a_shortage_is_told_to_the_byte(data):
    spec = data.draw(specs())
    plan = replace(data.draw(plans(spec)), vram_budget_bytes=0)
    need = memory(spec, plan).vram_bytes
    if need == 0:
        assert check_memory(spec, plan).vram_bytes == 0
        return
    with pytest.raises(PlanError, match="are missing"):
        check_memory(spec, plan)
    check_memory(spec, replace(plan, vram_budget_bytes=need))
    with pytest.raises(PlanError, match="1 B are missing"):
        check_memory(spec, replace(plan, vram_budget_bytes=need - 1))


def test_host_memory_is_checked_too():
    spec = dense()
    need = memory(spec, on_cpu(spec)).host_bytes
    check_memory(spec, on_cpu(spec), host_bytes=need)
    with pytest.raises(PlanError, match="in host memory"):
        check_memory(spec, on_cpu(spec), host_bytes=need - 1)
