"""A layer's tasks, in any order that their dependencies allow, add up to the layer's MLP; routing groups by expert."""

from __future__ import annotations

import random
from collections.abc import Iterator

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.functional import silu

from runtime.binding import LayerBinding, send_pairs
from runtime.devices.emulated import EmulatedDevice, Link
from runtime.memory import Slots, fill_cache
from runtime.ops import Piece, gated_mlp, routed_mlp
from runtime.routing import Routed
from sim.compile import StepCompiler
from sim.graph import Part, Task
from sim.model import ModelSpec
from sim.plan import Plan
from sim.workload import Step
from tests.test_store import D, Weights, filled, rows
from tests.unit_machine import moe, plans, specs, uniform


@pytest.fixture(scope="module")
def device() -> Iterator[EmulatedDevice]:
    made = EmulatedDevice(1 << 40, link=Link(1e12, 1e12))
    yield made
    made.close()


def expected(x: Tensor, weights: list[Weights], routed: tuple[Tensor, Tensor] | None) -> Tensor:
    """The MLP written down: sum over a token's experts of weight * down(silu(gate x) * up x)."""
    every = torch.stack([(silu(x @ gate.T) * (x @ up.T)) @ down.T for gate, up, down in weights], 1)  # [S, E, D]
    if routed is None:
        return every[:, 0]
    index, share = routed
    return (every.gather(1, index[..., None].expand(-1, -1, D)) * share[..., None]).sum(1)


def choice(spec: ModelSpec, layer: int, n_tokens: int, seed: int) -> tuple[Tensor, Tensor] | None:
    """A router's choice [S, k] and its weights; None for a dense layer."""
    ffn = spec.layers[layer].ffn
    if not ffn.is_moe:
        return None
    scores = torch.rand(n_tokens, ffn.n_experts, generator=torch.Generator().manual_seed(seed))
    share, index = scores.topk(ffn.top_k)
    return index, share


def any_order(tasks: list[Task], seed: int) -> Iterator[Task]:
    """Tasks in a random order that keeps each resource's own and every dependency."""
    draw, left, done = random.Random(seed), list(tasks), set[str]()
    ours = {t.id for t in tasks}
    while left:
        heads = {t.resource: t for t in reversed(left)}.values()
        task = draw.choice([t for t in heads if all(d in done or d not in ours for d in t.deps)])
        left.remove(task)
        done.add(task.id)
        yield task


@settings(deadline=None)
@given(st.data(), st.integers(1, 5), st.integers(0, 1000))
def test_a_layers_tasks_in_any_allowed_order_make_its_mlp(
    device: EmulatedDevice, data: st.DataObject, n_tokens: int, seed: int
) -> None:
    spec = data.draw(specs())
    plan: Plan = data.draw(plans(spec))
    store, weights = filled(spec, plan, device)
    fill_cache(spec, plan, store)
    compiler = StepCompiler(spec, plan, Step("prefill", n_tokens, n_tokens))
    slots = store.slots[compiler.tier]
    for task in compiler.begin():
        if task.kind == "send":
            device.copy(send_pairs(store.layers[task.layer], slots, task), pinned=True)
    for i, layer in enumerate(store.layers):
        x, chosen = rows(n_tokens, seed), choice(spec, i, n_tokens, seed)
        routed = Routed.of(*chosen, spec.layers[i].ffn.n_experts) if chosen else None
        compiler.attention(i)
        tasks = compiler.mlp(i, routed.counts if routed else (n_tokens,))
        binding = LayerBinding(layer, slots, device, True, silu, x, routed, store.cache)
        bodies = {t.id: binding.bind(t, store.layers[t.layer]) for t in tasks}
        for task in any_order(tasks, seed):
            bodies[task.id]()
        mine = [weights[i, e] for e in range(len(layer.experts))]
        torch.testing.assert_close(binding.output, expected(x, mine, chosen), atol=1e-3, rtol=1e-4)


# -- sends --------------------------------------------------------------------------------------------


def test_neighbouring_experts_are_sent_in_one_copy_and_others_apart(device: EmulatedDevice) -> None:
    spec = moe(n_layers=1)  # four experts of 12 columns
    slots = Slots((torch.zeros(4 * 12 * 3 * D),))

    def runs(gg: int | tuple[int, ...], parts: tuple[Part, ...]) -> list[int]:
        store, _ = filled(spec, uniform(spec, gg, ahead=12), device)
        send = Task("send", "send", "H2D", parts=parts, slot=0)
        pairs = send_pairs(store.layers[0], slots, send)
        assert all(target.shape == source.shape for target, source in pairs)
        return [source.numel() // (3 * D) for _, source in pairs]

    def whole(*experts: int, start: int = 0, stop: int = 12) -> tuple[Part, ...]:
        return tuple(Part(e, start, stop, 1) for e in experts)

    assert runs(0, whole(0, 1, 2, 3)) == [48]
    assert runs(0, whole(0, 1, 3)) == [24, 12]
    assert runs(4, whole(0, 1, start=4)) == [16]  # host columns only: they touch, too
    assert runs(0, whole(0, 1, stop=6)) == [6, 6]  # the other halves lie between
    assert runs((12, 0, 0, 0), whole(1, 2, 3)) == [36]


def test_what_is_sent_arrives(device: EmulatedDevice) -> None:
    spec = moe(n_layers=1)
    store, _ = filled(spec, uniform(spec, 3, ahead=5), device)
    slots = store.slots[uniform(spec, 3, ahead=5).tiers[0]]
    parts = tuple(Part(e, 3, 8, 1) for e in range(4))
    device.copy(send_pairs(store.layers[0], slots, Task("send", "send", "H2D", parts=parts, slot=1)), True)
    for e in range(4):
        assert torch.equal(slots.run(1, e), store.layers[0].experts[e].host_run(3, 8))


# -- arithmetic and routing ---------------------------------------------------------------------------


def test_a_cut_mlp_is_the_sum_of_its_pieces() -> None:
    x, gate_up, down = rows(3), rows(2 * 6, seed=1), rows(6, seed=2).T
    whole = gated_mlp(x, [Piece(gate_up, down)], silu)
    first, second = (torch.cat([gate_up[a:b], gate_up[6 + a : 6 + b]]) for a, b in ((0, 2), (2, 6)))
    torch.testing.assert_close(gated_mlp(x, [Piece(first, down[:, :2]), Piece(second, down[:, 2:])], silu), whole)


def test_tokens_without_an_expert_stay_zero() -> None:
    # two tokens, one expert that only the second goes to with weight 2: up = gate = down = 1 and act = identity
    x, ones = torch.tensor([[1.0], [3.0]]), Piece(torch.ones(2, 1), torch.ones(1, 1))
    out = routed_mlp(x, [(torch.tensor([1]), torch.tensor([2.0]), [ones])], lambda t: t)
    assert out.tolist() == [[0.0], [18.0]]  # 2 * (3 * 3) * 1


def test_a_choice_is_grouped_by_expert() -> None:
    # token 0 -> experts 2, 0; token 1 -> 2, 1
    routed = Routed.of(torch.tensor([[2, 0], [2, 1]]), torch.tensor([[0.5, 0.1], [0.7, 0.3]]), 4)
    assert routed.counts == (1, 1, 2, 0)
    assert [routed.of_expert(e, on_host=True)[0].tolist() for e in range(4)] == [[0], [1], [0, 1], []]
    assert routed.of_expert(2, on_host=False)[1].tolist() == pytest.approx([0.5, 0.7])


def test_masked_choices_are_left_out() -> None:
    routed = Routed.of(torch.tensor([[3, 0], [1, 3]]), torch.ones(2, 2), 3)  # 3 is one past the last expert
    assert routed.counts == (1, 1, 0)
    assert [routed.of_expert(e, on_host=True)[0].tolist() for e in range(3)] == [[0], [1], []]


@given(st.integers(1, 20), st.integers(1, 6), st.integers(0, 1000), st.data())
def test_every_choice_is_kept_once(n_tokens: int, n_experts: int, seed: int, data: st.DataObject) -> None:
    top_k = data.draw(st.integers(1, n_experts))
    share, index = torch.rand(n_tokens, n_experts, generator=torch.Generator().manual_seed(seed)).topk(top_k)
    routed = Routed.of(index, share, n_experts)
    assert sum(routed.counts) == n_tokens * top_k
    pairs = {(int(t), e): float(w) for e in range(n_experts) for t, w in zip(*routed.of_expert(e, True), strict=True)}
    assert pairs == {(t, int(index[t, k])): float(share[t, k]) for t in range(n_tokens) for k in range(top_k)}
