"""`import scheinfer`: the names it promises, and one whole way through them."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest
import torch

import scheinfer
from hwmodels import errors
from tests.conftest import TinyCheckpoint
from tests.test_cli import half_the_mlps, small_machine
from tests.tiny import eager, tokens


def test_all_names_are_public_and_sorted() -> None:
    tree = ast.parse(Path(scheinfer.__file__).read_text(encoding="utf-8"))
    defined = {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}
    known = {name for name in vars(errors) if name.endswith("Error")}
    assert scheinfer.__all__ == sorted(scheinfer.__all__)
    assert set(scheinfer.__all__) == {name for name in defined if not name.startswith("_")} | known
    assert all(hasattr(scheinfer, name) for name in scheinfer.__all__)


def test_from_sizes_to_a_comparison(tiny_checkpoint: TinyCheckpoint) -> None:
    folder = tiny_checkpoint("mixtral")
    hw, spec = small_machine(), scheinfer.model(folder)
    plan = scheinfer.plan(spec, hw, vram_budget=half_the_mlps(folder), n_prompt=8, n_gen=6, policy="scheinfer")
    model, tokenizer = scheinfer.load(folder, plan=plan, device="emulated")
    try:
        ids = tokens(8)
        out = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=6, do_sample=False)
        expected = eager(folder).generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=6, do_sample=False)
        assert out.tolist() == expected.tolist()
        assert tokenizer is None
        assert model.last_timeline is not None
        simulated = scheinfer.simulate(plan, spec, hw, 8, 6, routing=model.last_routing)
        comparison = scheinfer.compare(simulated, model.last_timeline)
    finally:
        model.close()
    assert comparison.missing == {"simulated": (), "measured": ()}


def test_a_plan_file_loads_like_a_plan(tiny_checkpoint: TinyCheckpoint, tmp_path: Path) -> None:
    folder = tiny_checkpoint("llama")
    plan = scheinfer.plan(scheinfer.model(folder), small_machine(), n_prompt=8, n_gen=6, policy="cpu-only")
    plan.save(tmp_path / "plan.json")
    model, _ = scheinfer.load(folder, plan=tmp_path / "plan.json", device="emulated")
    assert model.plan.id == plan.id
    model.close()


def test_a_sweep_is_a_table_of_every_combination(tiny_checkpoint: TinyCheckpoint) -> None:
    models, machines = [tiny_checkpoint("llama"), scheinfer.model(tiny_checkpoint("mixtral"))], [small_machine()]
    table = scheinfer.sweep(models, machines, "cpu-only", ["64KiB", "1MiB"], n_prompt=[4, 8], n_gen=[3])
    assert len(table) == 2 * 2 * 2
    assert table["decode_tok_s"].gt(0).all()


def test_mistakes_are_value_errors_with_words(tiny_checkpoint: TinyCheckpoint) -> None:
    spec, hw = scheinfer.model(tiny_checkpoint("llama")), small_machine()
    with pytest.raises(scheinfer.ProfileError, match="no hardware profile 'rtx1'"):
        scheinfer.hardware("rtx1")
    with pytest.raises(scheinfer.ModelError, match="no model 'nowhere'"):
        scheinfer.model("nowhere")
    with pytest.raises(scheinfer.PlanError, match="no policy 'best'"):
        scheinfer.plan(spec, hw, n_prompt=8, n_gen=6, policy="best")
    with pytest.raises(scheinfer.PlanError):
        scheinfer.plan(spec, hw, vram_budget="10KiB", n_prompt=8, n_gen=6, policy="scheinfer")
    with pytest.raises(ValueError, match="256 positions"):
        scheinfer.plan(spec, hw, n_prompt=10_000)
