"""The command line: results on stdout alone, one line per mistake, nothing half-written."""

from __future__ import annotations

import io
import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from hwmodels.catalog import hardware
from hwmodels.profile import HardwareProfile, Peak, load_profile
from runtime.cli import main
from runtime.cli.commands import COMMANDS
from runtime.cli.values import counts, wholes
from sim.memory import memory
from sim.model import load_model
from sim.plan import load_plan
from sim.timeline import load_timeline
from sim.workload import RoutingTrace
from tests.conftest import TinyCheckpoint

ROOT = Path(__file__).resolve().parent.parent
RESULT_KEYS = {
    *("model", "policy", "plan_id", "profile_id", "device", "dtype", "vram_budget_bytes"),
    *("n_prompt", "n_gen", "n_depth", "batch", "prefill_tok_s", "decode_tok_s", "ttft_s", "tpot_s"),
    *("bound_prefill_tok_s", "bound_decode_tok_s", "bound_fraction", "vram_bytes", "host_bytes", "h2d_bytes"),
    *("cpu_busy", "gpu_busy", "h2d_busy", "cache_hit_rate", "evidence"),
}
MEASURED_KEYS = {"stddev", "samples", "predicted_decode_tok_s", "predicted_prefill_tok_s", "error"}


def small_machine() -> HardwareProfile:
    """A device ten times as fast as its CPU, behind a link of half the CPU's bandwidth."""
    rates = {"float32": 1e9, "bfloat16": 1e9}
    fast = {name: 10 * rate for name, rate in rates.items()}
    return HardwareProfile(
        name="small",
        device="emulated",
        created="by hand",
        fingerprint={},
        vram_bytes=1 << 30,
        host_bytes=1 << 34,
        cpu_threads=1,
        peaks={
            "CPU": Peak(rates, 1e9, 1.0, 1e-6, "estimated"),
            "GPU": Peak(fast, 1e10, 1.0, 1e-6, "estimated"),
            "H2D": Peak({}, 5e8, 1.0, 1e-6, "estimated"),
            "D2H": Peak({}, 5e8, 1.0, 1e-6, "estimated"),
        },
    )


@dataclass(frozen=True)
class World:
    """A checkpoint, a profile and a plan that fit together, and an empty folder for output."""

    model: Path
    hardware: Path
    plan: Path
    out: Path


def half_the_mlps(model: Path) -> str:
    """A budget that is too small for the MLPs and large enough for all else."""
    spec = load_model(model)
    return str(spec.weight_bytes + 100_000 - sum(spec.ffn_bytes(i) for i in range(spec.n_layers)) // 2)


@pytest.fixture(scope="session")
def made(tmp_path_factory: pytest.TempPathFactory, tiny_checkpoint: TinyCheckpoint) -> World:
    folder = tmp_path_factory.mktemp("world")
    world = World(tiny_checkpoint("mixtral"), folder / "hw.json", folder / "plan.json", folder / "out")
    small_machine().save(world.hardware)
    words = ["plan", "-m", str(world.model), "--hardware", str(world.hardware), "-p", "8", "-n", "6", "-q"]
    code = main(
        [*words, "--vram-budget", half_the_mlps(world.model), "--policy", "scheinfer", "--out", str(world.plan)]
    )
    assert code == 0
    return world


@pytest.fixture
def world(made: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> World:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return replace(made, out=tmp_path / "out")


Run = Callable[..., str]


@pytest.fixture
def run(world: World, capsys: pytest.CaptureFixture[str]) -> Run:
    """run("plan", ...) -> stdout of a command that succeeds; {model} and the like are filled in."""

    def stdout_of(*words: str) -> str:
        capsys.readouterr()
        code = main([word.format(**vars(world)) for word in words])
        out, err = capsys.readouterr()
        assert code == 0, err
        return out

    return stdout_of


@pytest.fixture
def refuse(world: World, capsys: pytest.CaptureFixture[str]) -> Run:
    """refuse("plan", ...) -> the one line of a mistake: exit code 2, empty stdout, nothing written."""

    def line_of(*words: str) -> str:
        capsys.readouterr()
        code = main([word.format(**vars(world)) for word in words])
        out, err = capsys.readouterr()
        assert (code, out) == (2, ""), err
        assert err.startswith("scheinfer: error: "), err
        assert err.count("\n") == 1, err
        assert not world.out.exists()
        return err

    return line_of


PLAN = ("plan", "-q", "-m", "{model}", "--hardware", "{hardware}", "-p", "8", "-n", "6")
SIMULATE = ("simulate", "-q", "-m", "{model}", "--hardware", "{hardware}", "-p", "8", "-n", "6")
GENERATE = ("generate", "-q", "-m", "{model}", "--device", "emulated", "--prompt", "5 6 7", "-n", "4")


# -- help ---------------------------------------------------------------------------------------------


def fresh_python(code: str) -> str:
    found = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert found.returncode == 0, found.stderr
    return found.stdout


def test_help_lists_every_command_and_loads_nothing_heavy() -> None:
    out = fresh_python(
        "import sys; from runtime.cli import main; assert main(['--help']) == 0\n"
        "assert not {'torch', 'pandas', 'numpy', 'simpy'} & set(sys.modules)"
    )
    assert [command.name for command in COMMANDS if f"\n    {command.name}" not in out] == []


def test_planning_commands_never_load_torch(world: World) -> None:
    common = ["-m", str(world.model / "config.json"), "--hardware", str(world.hardware), "-p", "8", "-n", "4", "-q"]
    lines = [["plan", *common], ["simulate", *common], ["hardware"], ["models", str(world.model)]]
    fresh_python(
        f"import sys; from runtime.cli import main\nfor line in {lines!r}: assert main(line) == 0\n"
        "assert not {'torch', 'transformers', 'matplotlib'} & set(sys.modules)"
    )


@pytest.mark.parametrize("command", COMMANDS, ids=lambda command: command.name)
def test_every_flag_explains_itself(command: Any, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([command.name, "--help"]) == 0
    shown = "".join(capsys.readouterr().out.split())  # lines may break at any space or hyphen
    for option in command.all_options:
        assert "".join(option.help.split()) in shown, option.names


def test_no_command_is_wrong_usage(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == 2
    assert "COMMAND" in capsys.readouterr().err


# -- plan, simulate -----------------------------------------------------------------------------------


@pytest.mark.parametrize("policy", ["cpu-only", "stream", "llama-cpp", "fiddler", "scheinfer", "auto"])
def test_a_plan_fits_its_budget_and_simulates_at_the_speed_it_was_promised(run: Run, world: World, policy: str) -> None:
    budget = half_the_mlps(world.model)
    [planned] = json.loads(
        run(*PLAN, "--vram-budget", budget, "--policy", policy, "-o", "json", "--out", "{out}/p.json")
    )
    plan = load_plan(world.out / "p.json")
    assert memory(load_model(world.model), plan).vram_bytes <= int(budget)
    [simulated] = json.loads(run(*SIMULATE, "--plan", "{out}/p.json", "-o", "json"))
    assert planned["plan_id"] == simulated["plan_id"] == plan.id
    assert plan.prediction is not None
    assert plan.prediction.decode_tok_s == pytest.approx(simulated["decode_tok_s"], rel=0.05)


def test_result_rows_have_the_promised_keys(run: Run) -> None:
    [row] = json.loads(run(*SIMULATE, "-o", "json"))
    assert set(row) >= RESULT_KEYS
    assert 0 < row["bound_fraction"] <= 1


def test_an_explained_plan_says_what_was_searched_and_what_would_help(run: Run) -> None:
    told = run(*PLAN, "--explain")
    for words in ("candidates", "pruned", "simulated", "left", "What would help", "a link twice as fast"):
        assert words in told
    (row,) = json.loads(run(*PLAN, "--explain", "-o", "json"))
    search = row["search"]
    assert search["candidates"] == search["pruned"] + search["simulated"] + search["left"]
    assert set(row["bound_binds"]) == {"prefill", "decode"}
    assert all(gain["speedup"] > 0.99 for gain in row["what_if"])
    assert "search" not in json.loads(run(*PLAN, "-o", "json"))[0]


def test_a_plan_can_be_explained(run: Run) -> None:
    assert len(run(*PLAN, "--explain")) > len(run(*PLAN))


@pytest.mark.parametrize("engine", ["llama.cpp", "accelerate"])
def test_an_export_is_all_of_stdout(run: Run, engine: str) -> None:
    text = run(*PLAN, "--export", engine)
    [row] = json.loads(run(*PLAN, "--export", engine, "-o", "json"))
    assert text == row["export"] + "\n"


def test_formats_agree(run: Run) -> None:
    [row] = json.loads(run(*SIMULATE, "-o", "json"))
    assert json.loads(run(*SIMULATE, "-o", "jsonl")) == row
    table = pd.read_csv(io.StringIO(run(*SIMULATE, "-o", "csv")))
    assert list(table.columns) == list(row)
    assert table.loc[0, "ttft_s"] == pytest.approx(row["ttft_s"])
    heading, rule, cells = run(*SIMULATE).splitlines()
    assert heading.count("|") == rule.count("|") == cells.count("|")


def test_a_larger_context_leaves_room_in_the_plan(run: Run, world: World) -> None:
    run(*PLAN, "-c", "200", "--out", "{out}/p.json")
    assert load_plan(world.out / "p.json").n_ctx == 200


def test_without_contention_nothing_is_slower(run: Run) -> None:
    [shared] = json.loads(run(*SIMULATE, "-o", "json"))
    [alone] = json.loads(run(*SIMULATE, "--no-contention", "-o", "json"))
    assert alone["tpot_s"] <= shared["tpot_s"]


# -- sweep --------------------------------------------------------------------------------------------


def test_a_sweep_answers_every_combination_and_goes_on_where_it_was(run: Run, world: World) -> None:
    words = (
        "sweep",
        "-m",
        "{model}",
        "--hardware",
        "{hardware}",
        "--policy",
        "cpu-only,gpu-only",
        "-p",
        "8,16",
        "-n",
        "4",
    )
    budgets = ("--vram-budget", f"{half_the_mlps(world.model)},1MiB", "--out", "{out}", "-o", "json")
    rows = json.loads(run(*words, *budgets, "-q"))
    assert len(rows) == 2 * 2 * 2
    assert {row["policy"] for row in rows if row["refused"]} == {"gpu-only"}
    assert all(set(row) >= RESULT_KEYS for row in rows)
    assert len(pd.read_parquet(world.out / "rows.parquet")) == 8
    assert json.loads(run(*words, *budgets, "-q")) == rows


# -- the environment ----------------------------------------------------------------------------------


def test_a_variable_sets_a_flag_and_a_flag_wins(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SCHEINFER_OUTPUT", "jsonl")
    monkeypatch.setenv("SCHEINFER_POLICY", "cpu-only")
    assert json.loads(run(*SIMULATE))["policy"] == "cpu-only"
    assert json.loads(run(*SIMULATE, "--policy", "stream"))["policy"] == "stream"


def test_a_variable_can_stand_for_a_required_flag(run: Run, world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SCHEINFER_MODEL", str(world.model))
    monkeypatch.setenv("SCHEINFER_HARDWARE", str(world.hardware))
    assert run("simulate", "-p", "8", "-n", "4").startswith("| model")


def test_a_wrong_variable_is_named_like_a_wrong_flag(refuse: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SCHEINFER_N_PROMPT", "many")
    assert "--n-prompt" in refuse("simulate", "-m", "{model}", "--hardware", "{hardware}")
    monkeypatch.delenv("SCHEINFER_N_PROMPT")
    monkeypatch.setenv("SCHEINFER_NO_CONTENTION", "maybe")
    assert "SCHEINFER_NO_CONTENTION" in refuse(*SIMULATE)


# -- generate, chat, bench, compare -------------------------------------------------------------------


def test_generate_writes_text_and_traces_that_the_simulator_replays(run: Run, world: World) -> None:
    words = ("--plan", "{plan}", "--trace", "{out}/real.json", "--routing-out", "{out}/routing.parquet")
    text = run(*GENERATE, *words)
    assert len(text.split()) == 4
    assert all(word.isdigit() for word in text.split())
    measured = load_timeline(world.out / "real.json")
    assert measured.steps == ("prefill", "decode1", "decode2", "decode3")
    assert sum(RoutingTrace.load(world.out / "routing.parquet").counts["prefill", 0]) == 3 * 2
    replay = ("--routing", "{out}/routing.parquet", "--trace", "{out}/sim.json", "-p", "3", "-n", "4")
    run(*SIMULATE, "--plan", "{plan}", *replay)
    simulated = load_timeline(world.out / "sim.json")
    assert {s.task for s in simulated.spans} == {s.task for s in measured.spans}
    rows = json.loads(
        run("compare", "{out}/sim.json", "{out}/real.json", "--out", "{out}/compared", "-o", "json", "-q")
    )
    assert {"end to end", "resource", "kind", "step"} <= {row["scope"] for row in rows}
    assert (world.out / "compared" / "gantt.png").read_bytes().startswith(b"\x89PNG")
    assert len(pd.read_parquet(world.out / "compared" / "tasks.parquet")) == len(measured.spans)


def test_generate_plans_by_itself_where_no_plan_is_given(run: Run) -> None:
    out = run(*GENERATE, "--hardware", "{hardware}", "-o", "json")
    [row] = json.loads(out)
    assert (row["policy"], row["device"], row["n_gen"]) == ("auto", "emulated", 4)
    assert len(row["text"].split()) == 4


def test_generation_is_the_same_whatever_the_plan(run: Run) -> None:
    policies = ("cpu-only", "stream", "scheinfer")
    texts = {run(*GENERATE, "--hardware", "{hardware}", "--policy", policy) for policy in policies}
    assert len(texts) == 1


def test_a_seed_repeats_what_was_sampled(run: Run) -> None:
    words = (*GENERATE, "--plan", "{plan}", "--temp", "3")
    assert run(*words, "--seed", "1") == run(*words, "--seed", "1") != run(*words, "--seed", "2")


def test_bench_measures_and_predicts_every_policy_and_depth(run: Run) -> None:
    words = ("-p", "8", "-n", "4", "-d", "0,16", "-r", "2", "--policy", "cpu-only,scheinfer", "-o", "json", "-q")
    rows = json.loads(run("bench", "-m", "{model}", "--hardware", "{hardware}", "--device", "emulated", *words))
    found = [(row["policy"], row["n_depth"]) for row in rows]
    assert found == [("cpu-only", 0), ("cpu-only", 16), ("scheinfer", 0), ("scheinfer", 16)]
    assert all(set(row) >= RESULT_KEYS | MEASURED_KEYS for row in rows)
    assert [len(row["samples"]["decode_tok_s"]) for row in rows] == [2] * 4


def test_bench_says_which_policy_does_not_fit_and_measures_the_others(run: Run, world: World) -> None:
    words = ("--vram-budget", half_the_mlps(world.model), "-p", "8", "-n", "3", "-r", "1", "-o", "json", "-q")
    policies = ("--policy", "gpu-only,cpu-only", "--hardware", "{hardware}", "--device", "emulated")
    rows = json.loads(run("bench", "-m", "{model}", *policies, *words))
    assert [row["policy"] for row in rows] == ["cpu-only", "gpu-only"]
    assert "device memory" in rows[1]["refused"]


def words_of(n: int) -> list[str]:
    return [f"w{i}" for i in range(n)]


@pytest.fixture(scope="session")
def speaking(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny llama whose tokens are words."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    from tests.tiny import write_tiny

    folder = write_tiny(tmp_path_factory.mktemp("speaking"), "llama", eos_token_id=None)
    vocab = {word: i for i, word in enumerate(["<pad>", "<s>", "</s>", "user", "assistant", ":", *words_of(91)])}
    tokenizer = Tokenizer(models.WordLevel(vocab, unk_token="<pad>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>").save_pretrained(folder)
    return folder


def test_text_streams_as_words_where_there_is_a_tokenizer(run: Run, speaking: Path) -> None:
    words = ("--hardware", "{hardware}", "--device", "emulated", "-n", "5", "-q")
    text = run("generate", "-m", str(speaking), "--prompt", "w1 w2 w3", *words)
    assert text.split()
    assert set(text.split()) <= {*words_of(91), "user", "assistant", ":"}


def test_a_conversation_answers_every_line_until_it_ends(
    run: Run, speaking: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO("w1 w2\n\n!help\n!clear\nw3\n!exit\nw4\n"))
    words = ("--hardware", "{hardware}", "--device", "emulated", "-n", "3", "-c", "64", "-q")
    out = run("chat", "-m", str(speaking), *words)
    assert len(out.splitlines()) == 2


def test_a_conversation_keeps_its_cache_and_answers_as_if_it_had_not(
    world: World, speaking: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def talk() -> tuple[str, str]:
        monkeypatch.setattr(sys, "stdin", io.StringIO("w1 w2\nw3\nw4 w5 w6\n!clear\nw7\n!exit\n"))
        words = ("--hardware", str(world.hardware), "--device", "emulated", "-n", "6", "-c", "64")
        assert main(["chat", "-m", str(speaking), *words]) == 0
        out, err = capsys.readouterr()
        return out, err

    kept_out, kept_err = talk()
    monkeypatch.setattr("runtime.prefix.shared", lambda *_: 0)
    anew_out, anew_err = talk()
    assert kept_out == anew_out
    assert len(kept_out.splitlines()) == 4
    assert (kept_err.count("tokens kept"), anew_err.count("tokens kept")) == (2, 0)


# -- what a person may get wrong ----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changed", "says"),
    [
        (("-m", "nowhere"), "no model 'nowhere'"),
        (("-m", "some/where"), "hf download some/where"),
        (("--hardware", "rtx1"), "no hardware profile 'rtx1'"),
        (("--policy", "best"), "no policy 'best'; known: "),
        (("--dtype", "int4"), "'int4' is not known; choose auto, bfloat16"),
        (("--vram-budget", "-8GiB"), "--vram-budget"),
        (("--vram-budget", "8 potatoes"), "write it like 8GiB"),
        (("--vram-budget", "0"), "zero bytes"),
        (("-p", "-1"), "at least 1"),
        (("-p", "1000000"), "256 positions"),
        (("-n", "0"), "at least 1"),
        (("-n", "1.5"), "at least 1"),
        (("--skew", "nan"), "--skew"),
        (("-c", "3"), "--ctx-size is 3"),
        (("-o", "yaml"), "choose md, csv, json, jsonl"),
        (("--budget", "8GiB"), "unrecognized arguments"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else "",
)
def test_a_wrong_flag_is_one_line(refuse: Run, changed: tuple[str, ...], says: str) -> None:
    assert says in refuse(*PLAN, *changed, "--out", "{out}/p.json")


def test_a_budget_too_small_for_attention_and_cache_names_what_is_missing(refuse: Run) -> None:
    line = refuse(*PLAN, "--policy", "scheinfer", "--vram-budget", "10KiB", "--out", "{out}/p.json")
    assert "10.00 KiB" in line
    assert "--vram-budget" in line


def test_a_model_that_fits_nowhere_says_what_host_memory_lacks(refuse: Run) -> None:
    words = ("--vram-budget", "20GiB", "-q")  # 87 GiB of weights, 20 + 60 GiB to hold them
    line = refuse("plan", "-m", "mixtral-8x7b", "--hardware", "rtx3090-ryzen5950x", *words)
    assert "auto keeps at least 67" in line
    assert "60.00 GiB can be had" in line


def test_a_folder_without_config_is_no_model(refuse: Run, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    assert "config.json" in refuse(*PLAN, "-m", str(tmp_path / "empty"))
    assert "config.json" in refuse(*GENERATE, "-m", str(tmp_path / "empty"))


def test_an_unsupported_architecture_is_named_with_the_supported_ones(refuse: Run, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "mamba"}')
    for command in (PLAN, GENERATE):
        line = refuse(*command, "-m", str(tmp_path))
        assert "'mamba' is not supported" in line
        assert "mixtral" in line


def test_a_truncated_shard_is_named_with_its_sizes(refuse: Run, world: World, tmp_path: Path) -> None:
    broken = tmp_path / "broken"
    broken.mkdir()
    for file in world.model.iterdir():
        content = file.read_bytes()
        (broken / file.name).write_bytes(content[:-100] if file.suffix == ".safetensors" else content)
    line = refuse(*GENERATE, "-m", str(broken), "--plan", "{plan}", "--trace", "{out}/t.json")
    assert "model.safetensors: truncated" in line


def test_a_family_that_cannot_run_is_refused_before_anything_is_measured(
    refuse: Run, world: World, tmp_path: Path
) -> None:
    (tmp_path / "m").mkdir()
    for file in world.model.iterdir():
        (tmp_path / "m" / file.name).write_bytes(file.read_bytes())
    edited(world.model / "config.json", tmp_path / "m" / "config.json", quantization_config={"quant_method": "awq"})
    for words in (GENERATE, ("bench", "-m", "{model}", "-q"), ("validate", "-m", "{model}", "--out", "{out}", "-q")):
        assert "quantised (awq)" in refuse(*words, "-m", str(tmp_path / "m"))


def edited(source: Path, target: Path, **changes: object) -> str:
    target.write_text(json.dumps({**json.loads(source.read_text()), **changes}))
    return str(target)


@pytest.mark.parametrize(
    ("changes", "says"),
    [({"version": 99}, "version 99"), ({"schema": "other"}, "schema is 'other'"), ({"tiers": 3}, "tiers: expected")],
    ids=["newer", "foreign", "malformed"],
)
def test_an_unusable_plan_is_one_line(
    refuse: Run, world: World, tmp_path: Path, changes: dict[str, object], says: str
) -> None:
    path = edited(world.plan, tmp_path / "p.json", **changes)
    assert says in refuse(*SIMULATE, "--plan", path)
    assert says in refuse(*GENERATE, "--plan", path)


@pytest.mark.parametrize(
    ("changes", "says"),
    [({"version": 99}, "version 99"), ({"schema": "x"}, "schema is 'x'"), ({"vram_bytes": "much"}, "vram_bytes")],
    ids=["newer", "foreign", "malformed"],
)
def test_an_unusable_profile_is_one_line(
    refuse: Run, world: World, tmp_path: Path, changes: dict[str, object], says: str
) -> None:
    assert says in refuse(*PLAN, "--hardware", edited(world.hardware, tmp_path / "h.json", **changes))


def test_a_file_that_is_not_json_is_no_profile(refuse: Run, tmp_path: Path) -> None:
    (tmp_path / "h.json").write_text("{")
    assert "not JSON" in refuse(*PLAN, "--hardware", str(tmp_path / "h.json"))


def test_a_plan_of_another_model_is_refused(refuse: Run, tiny_checkpoint: TinyCheckpoint) -> None:
    other = str(tiny_checkpoint("llama"))
    for command in (SIMULATE, GENERATE):
        assert "plan again for this model" in refuse(*command, "-m", other, "--plan", "{plan}")


def test_a_prompt_that_outgrows_plan_or_model_is_refused_before_loading(refuse: Run) -> None:
    assert "--ctx-size 40" in refuse(*GENERATE, "--plan", "{plan}", "-n", "37")
    assert "256 positions" in refuse(*GENERATE, "--plan", "{plan}", "--prompt", "7 " * 1_000_000)


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (("--prompt", "Hello"), "no tokenizer"),
        (("--prompt", "5 1000"), "token 1000"),
        (("--prompt", "5", "--prompt-file", "x"), "one of them"),
        (("--device", "tpu"), "choose auto, cuda:0 or emulated"),
        (("--device", "cuda:77"), "cuda:77"),
        (("--temp", "-1"), "--temp"),
        (("--vram-budget", "1KiB"), "plan again"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else "",
)
def test_a_run_that_cannot_be_is_refused(refuse: Run, words: tuple[str, ...], says: str) -> None:
    assert says in refuse(*GENERATE, "--plan", "{plan}", *words)


def test_a_prompt_file_that_is_not_there_is_named(refuse: Run) -> None:
    words = [word for word in GENERATE if word not in ("--prompt", "5 6 7")]
    assert "cannot read --prompt-file 'gone.txt'" in refuse(*words, "--plan", "{plan}", "--prompt-file", "gone.txt")


def test_chat_needs_a_tokenizer(refuse: Run) -> None:
    assert "no tokenizer" in refuse("chat", "-m", "{model}", "--plan", "{plan}")


def test_an_output_that_cannot_be_written_is_refused_before_the_work(refuse: Run, world: World, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    below_a_file = str(tmp_path / "file" / "x.json")
    assert "cannot write" in refuse(*PLAN, "--out", below_a_file)
    assert "is a folder" in refuse(*SIMULATE, "--trace", str(tmp_path))
    assert "cannot write" in refuse(*GENERATE, "--plan", "{plan}", "--trace", below_a_file)
    assert "cannot write" in refuse("calibrate", "--quick", "--out", below_a_file)
    assert "is a file" in refuse("validate", "-m", "{model}", "--out", str(tmp_path / "file"))
    assert (tmp_path / "file").read_text() == ""


def test_validate_wants_a_model_or_the_demo(refuse: Run) -> None:
    assert "either --model or --demo" in refuse("validate", "--out", "{out}")
    assert "either --model or --demo" in refuse("validate", "--demo", "-m", "{model}", "--out", "{out}")


def test_compare_wants_the_simulated_timeline_first(refuse: Run, run: Run, world: World, tmp_path: Path) -> None:
    run(*SIMULATE, "--trace", str(tmp_path / "sim.json"))
    assert "simulated one first" in refuse("compare", str(tmp_path / "sim.json"), str(tmp_path / "sim.json"))
    assert "cannot read timeline" in refuse("compare", "a.json", "b.json")


# -- failures that are not the user's -----------------------------------------------------------------


def test_an_unexpected_failure_is_one_line_and_a_hint(
    world: World, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise ZeroDivisionError("a\nb")

    monkeypatch.setattr("runtime.cli.machine.hardware_names", fail)
    assert main(["hardware"]) == 1
    assert capsys.readouterr().err == "scheinfer: error: ZeroDivisionError: a b (--debug shows where)\n"
    assert main(["hardware", "--debug"]) == 1
    assert "Traceback" in capsys.readouterr().err


def test_an_interrupt_ends_quietly(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt() -> list[str]:
        raise KeyboardInterrupt

    monkeypatch.setattr("runtime.cli.machine.hardware_names", interrupt)
    assert main(["hardware"]) == 130
    assert capsys.readouterr().err == ""


def test_a_reader_that_leaves_early_is_no_error() -> None:
    code = "import sys; from runtime.cli import main; sys.exit(main(['hardware', '-o', 'json']))"
    line = f'{sys.executable} -c "{code}" | true'
    found = subprocess.run(["bash", "-c", line], cwd=ROOT, capture_output=True, text=True, check=False)
    assert found.stderr == ""


# -- other commands -----------------------------------------------------------------------------------


def test_doctor_tells_facts_and_limits(run: Run) -> None:
    rows = json.loads(run("doctor", "-o", "json"))
    assert {"cpu", "RAM", "torch"} <= {row["name"] for row in rows if row["kind"] == "fact"}
    assert all(row["fix"] for row in rows if row["kind"] == "limit")


def test_every_number_of_a_profile_has_a_source(run: Run) -> None:
    [name, *_] = [row["name"] for row in json.loads(run("hardware", "-o", "json"))]
    rows = json.loads(run("hardware", name, "-o", "json"))
    assert {row["source"] for row in rows} <= {"measured", "published", "datasheet", "estimated"}


def test_a_machine_of_parts_is_written_and_planned_for(run: Run, world: World, tmp_path: Path) -> None:
    file = tmp_path / "hw.json"
    parts = ("--gpu", "rtx4090", "--cpu", "ryzen7950x", "--pcie", "4x16", "--dram", "80GB/s")
    run("hardware", *parts, "--set", "vram_GiB=16", "--out", str(file), "-q")
    made = load_profile(file)
    assert (made.peak("CPU").bytes_per_s, made.vram_bytes) == (80e9, 16 * 2**30)
    assert made.peak("H2D") == hardware("rtx4090+ryzen7950x+pcie4x16").peak("H2D")
    assert run("plan", "-q", "-m", "{model}", "--hardware", str(file), "-p", "8", "-n", "2", "--policy", "cpu-only")


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (("--gpu", "rtx4090"), "found --gpu; give a profile's NAME, or --gpu and --cpu"),
        (("--set", "vram_GiB=16"), "found no machine; give a profile's NAME"),
        (("rtx4090-ryzen7950x", "--pcie", "4x8"), "found both 'rtx4090-ryzen7950x' and --pcie"),
        (("--gpu", "rtx1", "--cpu", "ryzen7950x"), "no GPU 'rtx1'; known: "),
        (("--gpu", "rtx4090", "--cpu", "ryzen7950x", "--pcie", "9x16"), "no link 'pcie9x16'; known: "),
        (("--gpu", "rtx4090", "--cpu", "ryzen7950x", "--dram", "80"), "'80' is not a bandwidth; write it like 80GB/s"),
        (("rtx4090-ryzen7950x", "--set", "dram"), "'dram' is not KEY=VALUE"),
        (("rtx4090-ryzen7950x", "--set", "watts=1"), "no figure 'watts' to override"),
    ],
)
def test_a_machine_that_cannot_be_put_together_is_refused(refuse: Run, words: tuple[str, ...], says: str) -> None:
    assert says in refuse("hardware", *words)


def test_a_models_parts_add_up(run: Run, world: World) -> None:
    rows = {row["part"]: row["bytes"] for row in json.loads(run("models", "{model}", "-o", "json"))}
    total, _ = rows.pop("all"), rows.pop("KV cache of a token")
    assert total == sum(rows.values()) == load_model(world.model).weight_bytes


def test_lists_and_ranges_read_as_benchmarks_write_them() -> None:
    assert counts("32,512-1536+512") == (32, 512, 1024, 1536)
    assert counts("1-16*4") == (1, 4, 16)
    assert wholes("0,0,4096") == (0, 4096)
