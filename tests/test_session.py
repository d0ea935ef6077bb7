"""A loaded model is a Hugging Face model: it generates like one, gives everything back, and shares the machine."""

from __future__ import annotations

import gc
import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from threading import Thread
from typing import Any

import pytest
import torch
from transformers import AutoTokenizer, PreTrainedModel, StoppingCriteria, StoppingCriteriaList, TextIteratorStreamer

from hwmodels.errors import CheckpointError, ExecutionError, ModelError, PlanError
from runtime import session
from runtime.checkpoint import Checkpoint
from runtime.memory import trim_heap
from runtime.session import PlannedModel, load_planned
from sim.memory import memory
from sim.plan import Plan
from tests.conftest import TinyCheckpoint
from tests.planned import exact_budget, greedy, left_padded, loaded, logits, on_cpu, shares, spec_of, three_ways
from tests.tiny import eager, tokens

ROOT = Path(__file__).resolve().parent.parent


def our_threads() -> set[threading.Thread]:
    return {t for t in threading.enumerate() if t.name.startswith("scheinfer")}


def machine_state() -> tuple[set[int], int, set[threading.Thread]]:
    """What a device borrows: cores and intra-op threads of the calling thread; and its own threads."""
    return os.sched_getaffinity(0), torch.get_num_threads(), our_threads()


@pytest.fixture
def mixtral(tiny_checkpoint: TinyCheckpoint) -> Path:
    return tiny_checkpoint("mixtral")


@pytest.fixture
def plan(mixtral: Path) -> Plan:
    return three_ways(spec_of(mixtral))


# -- generate -----------------------------------------------------------------------------------------


def both(folder: Path, plan: Plan, ask: Callable[[PreTrainedModel], Any]) -> tuple[Any, Any]:
    """What Hugging Face and the planned model answer."""
    with loaded(folder, plan) as model:
        return ask(eager(folder)), ask(model)


def test_a_loaded_model_keeps_its_class_and_its_config(mixtral: Path, plan: Plan) -> None:
    with loaded(mixtral, plan) as model:
        assert isinstance(model, PlannedModel)
        assert type(model).__name__ == "MixtralForCausalLM"
        assert isinstance(model, type(eager(mixtral)))
        assert model.config.num_local_experts == 5
        assert model.plan == plan


def test_sampling_with_a_seed_is_repeatable_and_hugging_faces(mixtral: Path, plan: Plan) -> None:
    def sample(model: PreTrainedModel) -> list[list[int]]:
        found = []
        for seed in (1, 1, 2):
            torch.manual_seed(seed)
            out = model.generate(tokens(5), max_new_tokens=8, do_sample=True, temperature=0.7, top_p=0.9)  # type: ignore[operator]
            found.append(out[0].tolist())
        return found

    theirs, ours = both(mixtral, plan, sample)
    assert ours == theirs
    assert ours[0] == ours[1] != ours[2]


def test_beams_and_several_answers_are_hugging_faces(mixtral: Path) -> None:
    def beams(model: PreTrainedModel) -> list[list[int]]:
        out = model.generate(tokens(5), max_new_tokens=6, num_beams=3, num_return_sequences=2, do_sample=False)  # type: ignore[operator]
        return out.tolist()  # type: ignore[no-any-return]

    theirs, ours = both(mixtral, three_ways(spec_of(mixtral), batch=3), beams)
    assert ours == theirs


class After(StoppingCriteria):
    """Stop when a number of tokens is there."""

    def __init__(self, n_tokens: int) -> None:
        self.n_tokens = n_tokens

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor, **how: object) -> torch.BoolTensor:
        return torch.full((input_ids.shape[0],), input_ids.shape[1] >= self.n_tokens)  # type: ignore[return-value]


def test_stopping_criteria_stop(mixtral: Path, plan: Plan) -> None:
    with loaded(mixtral, plan) as model:
        out = model.generate(tokens(5), max_new_tokens=20, stopping_criteria=StoppingCriteriaList([After(9)]))
    assert out.shape == (1, 9)


def test_an_end_token_ends_a_sequence_while_others_go_on(mixtral: Path, plan: Plan) -> None:
    ids, mask = left_padded(tokens(6, 3), (6, 2, 4))
    end = greedy(eager(mixtral), ids, 3, mask)[1][2]

    def ask(model: PreTrainedModel) -> list[list[int]]:
        out = model.generate(  # type: ignore[operator]
            ids, attention_mask=mask, max_new_tokens=8, do_sample=False, eos_token_id=end, pad_token_id=0
        )
        return out.tolist()  # type: ignore[no-any-return]

    theirs, ours = both(mixtral, plan, ask)
    assert ours == theirs
    assert ours[1][8] == end


def test_text_streams_from_another_thread(demo_models: dict[str, Path]) -> None:
    folder = demo_models["tiny-mixtral"]
    tokenizer = AutoTokenizer.from_pretrained(folder)
    asked = tokenizer("A list of words", return_tensors="pt")
    with loaded(folder, on_cpu(spec_of(folder), batch=1)) as model:
        expected = tokenizer.decode(greedy(model, asked["input_ids"], 6)[0])
        streamer = TextIteratorStreamer(tokenizer, skip_prompt=True, timeout=60)
        run = Thread(target=lambda: model.generate(**asked, max_new_tokens=6, do_sample=False, streamer=streamer))
        run.start()
        pieces = list(streamer)
        run.join()
    assert "".join(pieces) == expected
    assert len(pieces) > 1


def test_direct_calls_continue_a_cache(mixtral: Path, plan: Plan) -> None:
    ids = tokens(9)

    def ask(model: PreTrainedModel) -> torch.Tensor:
        with torch.no_grad():
            first = model(ids[:, :5], use_cache=True)
            second = model(ids[:, 5:8], past_key_values=first.past_key_values, use_cache=True)
            third = model(ids[:, 8:], None, None, second.past_key_values)  # by position
        return torch.cat([first.logits, second.logits, third.logits], 1)

    theirs, ours = both(mixtral, plan, ask)
    torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=0)


def test_embeddings_may_be_given_in_place_of_tokens(mixtral: Path, plan: Plan) -> None:
    def ask(model: PreTrainedModel) -> tuple[torch.Tensor, list[list[int]]]:
        with torch.no_grad():
            given = model.get_input_embeddings()(tokens(5, 2))
            asked = model(inputs_embeds=given).logits
        out = model.generate(inputs_embeds=given, max_new_tokens=4, do_sample=False)  # type: ignore[operator]
        return asked, out.tolist()

    theirs, ours = both(mixtral, plan, ask)
    torch.testing.assert_close(ours[0], theirs[0], atol=1e-4, rtol=0)
    assert ours[1] == theirs[1]


def test_hidden_states_and_losses_are_hugging_faces(mixtral: Path, plan: Plan) -> None:
    ids = tokens(6, 2)

    def ask(model: PreTrainedModel) -> tuple[torch.Tensor, ...]:
        with torch.no_grad():
            out = model(ids, labels=ids, output_hidden_states=True)
        return (out.loss, *out.hidden_states)

    theirs, ours = both(mixtral, plan, ask)
    torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=0)


def test_embeddings_that_a_caller_keeps_are_not_those_of_the_next_step(mixtral: Path) -> None:
    def kept(model: PreTrainedModel) -> tuple[torch.Tensor, ...]:
        how = {"output_hidden_states": True, "return_dict_in_generate": True, "max_new_tokens": 4, "pad_token_id": 0}
        out = model.generate(tokens(6), do_sample=False, **how)  # type: ignore[operator]
        return tuple(step[0] for step in out.hidden_states)

    with loaded(mixtral, shares(spec_of(mixtral), gg=1.0, ends="CPU")) as model:
        for found, expected in zip(kept(model), kept(eager(mixtral)), strict=True):
            torch.testing.assert_close(found, expected)


def test_inference_mode_and_ordinary_calls_mix(mixtral: Path, plan: Plan) -> None:
    with loaded(mixtral, plan) as model:
        with torch.inference_mode():
            inside = model(tokens(6)).logits
        outside = model(tokens(6)).logits
        assert torch.equal(inside, outside)
        assert not outside.requires_grad


# -- what a model borrows -----------------------------------------------------------------------------


def test_loading_and_generating_leave_the_callers_cores_and_threads_as_they_were(mixtral: Path, plan: Plan) -> None:
    cores, n_threads, threads = machine_state()
    with loaded(mixtral, plan) as model:
        assert machine_state()[:2] == (cores, n_threads)
        greedy(model, tokens(4), 2)
        logits(model, tokens(4))
        assert machine_state()[:2] == (cores, n_threads)
        with model.executor.device.driving():  # one half of the cores is the accelerator, the other the CPU
            n_cores = max(1, len(cores) - max(1, len(cores) // 2))
            assert (len(os.sched_getaffinity(0)), torch.get_num_threads()) == (n_cores, n_cores)
        started: list[int] = []
        late = Thread(target=lambda: started.append(torch.get_num_threads()))
        late.start()
        late.join()
        assert started == [n_threads]
    assert machine_state() == (cores, n_threads, threads)


def test_close_gives_everything_back_and_may_be_called_twice(mixtral: Path, plan: Plan) -> None:
    before = machine_state()
    model = load_planned(mixtral, plan, device="emulated")
    ours = our_threads() - before[2]
    assert sorted(t.name for t in ours) == ["scheinfer-cpu", "scheinfer-d2h", "scheinfer-h2d"]
    model.close()
    model.close()
    assert machine_state() == before
    assert sum(p.numel() for p in model.parameters()) == 0


def test_a_closed_model_says_so(mixtral: Path, plan: Plan) -> None:
    with loaded(mixtral, plan) as model:
        greedy(model, tokens(3), 2)
    with pytest.raises(ExecutionError, match="mixtral.* is closed and its weights are gone; load it again"):
        greedy(model, tokens(3), 2)
    with pytest.raises(ExecutionError, match="is closed"):
        model(tokens(3))
    assert model.last_timeline is not None


OUT_OF_MEMORY = (
    r"^task prefill\.L01\.attn failed on GPU: OutOfMemoryError: tried to allocate 1 GiB; device memory ran out: "
    r"the plan allows 1.00 GiB; raise --vram-budget"
)


def test_device_memory_that_runs_out_says_what_to_do(
    mixtral: Path, plan: Plan, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*args: object, **how: object) -> None:
        raise torch.OutOfMemoryError("tried to allocate 1 GiB")

    with loaded(mixtral, plan) as model:
        expected = greedy(model, tokens(4), 2)
        with monkeypatch.context() as patched:
            patched.setattr(model.get_submodule("model.layers.1.self_attn"), "forward", refuse)
            with pytest.raises(ExecutionError, match=OUT_OF_MEMORY):
                greedy(model, tokens(4), 2)
        assert greedy(model, tokens(4), 2) == expected


def test_closing_ends_a_generation_in_another_thread(mixtral: Path) -> None:
    first_step, caught, before = threading.Event(), list[str](), our_threads()

    class Tell(StoppingCriteria):
        def __call__(self, *args: object, **how: object) -> torch.BoolTensor:
            first_step.set()
            return torch.zeros(1, dtype=torch.bool)  # type: ignore[return-value]

    def run() -> None:
        try:
            model.generate(tokens(3), max_new_tokens=5000, min_new_tokens=5000, stopping_criteria=[Tell()])
        except ExecutionError as error:
            caught.append(str(error))

    model = load_planned(mixtral, three_ways(spec_of(mixtral), n_ctx=10_000), device="emulated")
    thread = Thread(target=run)
    thread.start()
    assert first_step.wait(60)
    model.close()
    thread.join(60)
    assert not thread.is_alive()
    assert len(caught) == 1
    assert "is closed" in caught[0]
    assert our_threads() == before


def test_threads_do_not_outlive_a_model_that_nobody_closed(mixtral: Path, plan: Plan) -> None:
    before = our_threads()
    model = load_planned(mixtral, plan, device="emulated")
    greedy(model, tokens(3), 2)
    del model
    gc.collect()
    assert our_threads() == before


def test_two_models_live_side_by_side_and_closing_one_leaves_the_other(tiny_checkpoint: TinyCheckpoint) -> None:
    before, folders = machine_state(), [tiny_checkpoint("mixtral"), tiny_checkpoint("qwen3")]
    first, second = (load_planned(f, three_ways(spec_of(f)), device="emulated") for f in folders)
    try:
        expected = [greedy(eager(folder), tokens(6), 4) for folder in folders]
        assert [greedy(model, tokens(6), 4) for model in (first, second, first)] == [*expected, expected[0]]
        assert second.executor.device.cpu_threads == first.executor.device.cpu_threads
        first.close()
        assert machine_state()[:2] == before[:2]
        assert len(our_threads() - before[2]) == 3
        assert greedy(second, tokens(6), 4) == expected[1]
    finally:
        first.close()
        second.close()
    assert machine_state() == before


def test_threads_take_turns_on_one_model_and_work_side_by_side_on_two(tiny_checkpoint: TinyCheckpoint) -> None:
    folders = [tiny_checkpoint("mixtral"), tiny_checkpoint("llama")]
    expected = [greedy(eager(folder), tokens(6), 12) for folder in folders]
    found: dict[int, list[list[int]]] = {}
    with loaded(folders[0], three_ways(spec_of(folders[0]))) as a, loaded(folders[1], on_cpu(spec_of(folders[1]))) as b:

        def run(i: int) -> None:
            found[i] = greedy((a, b)[i % 2], tokens(6), 12)

        threads = [Thread(target=run, args=(i,)) for i in range(6)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(60)
    assert found == {i: expected[i % 2] for i in range(6)}


# -- loading ------------------------------------------------------------------------------------------


def test_placed_bytes_are_planned_bytes(mixtral: Path) -> None:
    spec = spec_of(mixtral)
    for plan in (shares(spec, 0.3, ahead=0.2), shares(spec, 0.5, stream_min_tokens=2, n_slots=3), shares(spec, 1.0)):
        need = memory(spec, plan)
        with loaded(mixtral, plan) as model:
            executor = model.executor
            assert executor.store.device_bytes == need.gg
            assert executor.store.device_bytes + executor.store.host_bytes == sum(
                spec.ffn_bytes(i) for i in range(spec.n_layers)
            )
            assert executor.device.arena.used_bytes == need.vram_bytes
            report = model.memory_report()
            assert (report["gg"], report["peak_vram_bytes"]) == (need.gg, need.vram_bytes)


def test_a_budget_one_byte_too_small_is_refused_before_a_weight_is_read(
    mixtral: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*args: object) -> None:
        raise AssertionError("opened")

    spec, before = spec_of(mixtral), machine_state()
    budget = exact_budget(spec, three_ways(spec))
    with loaded(mixtral, three_ways(spec, vram_budget_bytes=budget)):
        pass
    monkeypatch.setattr(session, "open_device", refuse)
    monkeypatch.setattr(Checkpoint, "open", refuse)
    with pytest.raises(PlanError, match="1 B are missing"):
        load_planned(mixtral, three_ways(spec, vram_budget_bytes=budget - 1), device="emulated")
    with pytest.raises(PlanError, match="--host-budget"):
        load_planned(mixtral, three_ways(spec), device="emulated", host_bytes=1000)
    assert machine_state() == before


def test_a_plan_for_another_model_or_dtype_is_refused(mixtral: Path, tiny_checkpoint: TinyCheckpoint) -> None:
    other = three_ways(spec_of(tiny_checkpoint("llama")))
    with pytest.raises(PlanError, match="plan again for this model and dtype"):
        load_planned(mixtral, other, device="emulated")
    with pytest.raises(PlanError, match="bfloat16"):
        load_planned(mixtral, three_ways(spec_of(mixtral)), dtype="bfloat16", device="emulated")
    with pytest.raises(ModelError, match="int3"):
        load_planned(mixtral, three_ways(spec_of(mixtral)), dtype="int3", device="emulated")


def test_the_plans_dtype_is_the_models(mixtral: Path) -> None:
    plan = three_ways(spec_of(mixtral, "bfloat16"))
    with loaded(mixtral, plan) as model:
        assert model.dtype == torch.bfloat16
        assert model.executor.store.layers[0].experts[0].host.dtype == torch.bfloat16


def test_a_damaged_checkpoint_leaves_nothing_behind(mixtral: Path, plan: Plan, tmp_path: Path) -> None:
    before, folder = machine_state(), tmp_path / "mixtral"
    shutil.copytree(mixtral, folder)
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1])
    with pytest.raises(CheckpointError, match="truncated"):
        load_planned(folder, plan, device="emulated")
    assert machine_state() == before


def test_a_failure_while_loading_leaves_nothing_behind(
    mixtral: Path, plan: Plan, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*args: object) -> None:
        raise CheckpointError("the disk is gone")

    before = machine_state()
    monkeypatch.setattr(session, "_load_ffns", fail)
    with pytest.raises(CheckpointError, match="the disk is gone"):
        load_planned(mixtral, plan, device="emulated")
    assert machine_state() == before


# -- over time ----------------------------------------------------------------------------------------

PEAK_OF_LOADING = """
import sys
from pathlib import Path
import transformers.models.mixtral.modeling_mixtral
from runtime.session import load_planned
from tests.planned import shares, spec_of

def high_water_bytes():
    fields = dict(line.split(":") for line in Path("/proc/self/status").read_text().splitlines())
    return int(fields["VmHWM"].split()[0]) * 1024

folder = Path(sys.argv[1])
spec = spec_of(folder)
plan = shares(spec, gg=0.25, ahead=0.25)
before = high_water_bytes()
model = load_planned(folder, plan, device="emulated")
print((high_water_bytes() - before) / spec.weight_bytes)
"""


@pytest.mark.slow
def test_loading_takes_no_more_memory_than_the_weights(demo_models: dict[str, Path]) -> None:
    command = [sys.executable, "-c", PEAK_OF_LOADING, str(demo_models["tiny-mixtral"])]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert 0.9 < float(done.stdout) < 1.1


def resident_bytes() -> int:
    """Without what the C library keeps of other tests' memory, which it hands out again when it likes."""
    gc.collect()
    trim_heap()
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


@pytest.mark.slow
def test_two_hundred_generations_leak_nothing(mixtral: Path, plan: Plan) -> None:
    with loaded(mixtral, plan) as model:

        def generate(n: int) -> None:
            for i in range(n):
                greedy(model, tokens(5 + i % 3), 4)

        generate(30)
        n_bytes, n_threads, n_objects = resident_bytes(), threading.active_count(), len(gc.get_objects())
        generate(200)
        assert resident_bytes() - n_bytes < 8 << 20
        assert threading.active_count() == n_threads
        assert len(gc.get_objects()) - n_objects < 500
        assert model.executor.device.drain() == []


@pytest.mark.slow
def test_loading_again_and_again_leaks_nothing(mixtral: Path, plan: Plan) -> None:
    def load(n: int) -> None:
        for _ in range(n):
            with loaded(mixtral, plan) as model:
                greedy(model, tokens(4), 2)

    load(8)
    n_bytes, n_files = resident_bytes(), len(os.listdir("/proc/self/fd"))
    load(25)
    assert resident_bytes() - n_bytes < 16 << 20
    assert len(os.listdir("/proc/self/fd")) == n_files
