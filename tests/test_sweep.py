"""Sweeps: every point once, the same rows whoever works on them, and nothing lost by a kill."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import BrokenExecutor, Executor, Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from hwmodels.errors import ExecutionError, FormatError, PlanError
from runtime.cli import main
from runtime.cli.values import sizes
from sim import planner, shards, sweep
from sim.bounds import bound
from sim.model import ModelSpec, from_config
from sim.policies import POLICIES
from sim.rows import simulated_row
from sim.simulate import simulate
from sim.sweep import Point, grid, program_id, workloads
from sim.workers import run_in_processes, run_on
from sim.workload import Workload
from tests.machines import machine

KIB = 1024
CONFIG = {
    "model_type": "mixtral",
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_local_experts": 4,
    "num_experts_per_tok": 2,
    "vocab_size": 128,
    "max_position_embeddings": 256,
    "dtype": "bfloat16",
}
QUICK = ("cpu-only", "gpu-only", "stream", "fiddler")


def model(name: str = "moe", **changes: Any) -> ModelSpec:
    return from_config({**CONFIG, **changes}, name)


def points(n_prompts: Sequence[int] = (8, 16), budgets: Sequence[int] = (300 * KIB, 2000 * KIB)) -> tuple[Point, ...]:
    """Two policies that always fit and two that need memory, on two models."""
    return grid([model(), model("wide", hidden_size=128)], [machine()], QUICK, budgets, workloads(n_prompts, [4]))


def table(folder: Path) -> bytes:
    return (folder / "rows.csv").read_bytes()


class Watched(Executor):
    """An executor of one's own: works on submission, and remembers what it was given."""

    def __init__(self) -> None:
        self.given: list[str] = []

    def submit(self, call: Callable[..., Any], /, *arguments: Any, **named: Any) -> Future[Any]:
        self.given += [str(argument) for argument in arguments]
        future: Future[Any] = Future()
        future.set_result(call(*arguments, **named))
        return future


# -- the grid -----------------------------------------------------------------------------------------


def test_a_grid_holds_every_combination_once() -> None:
    lengths = workloads([8, 16], [4], batches=[1, 2])
    made = grid(
        [model(), model()], [machine(), machine()], ["cpu-only", "fiddler", "cpu-only"], [KIB, 2 * KIB], lengths
    )
    assert len(made) == 1 * 1 * 2 * 2 * 4
    assert len({point.id for point in made}) == len(made)


def test_without_budgets_every_machine_gives_all_its_memory() -> None:
    small, large = machine().with_(name="small", vram_bytes=1), machine().with_(name="large", vram_bytes=2)
    assert [p.vram_budget_bytes for p in grid([model()], [small, large], ["cpu-only"], None, workloads([8], [4]))] == [
        1,
        2,
    ]


def test_all_policies_are_all_that_are_registered() -> None:
    assert [p.policy for p in grid([model()], [machine()], ["all"], None, workloads([8], [4]))] == list(POLICIES)


def test_an_unknown_policy_is_refused_before_anything_runs() -> None:
    with pytest.raises(PlanError, match="no policy 'fidler'"):
        grid([model()], [machine()], ["fidler"], None, workloads([8], [4]))


def test_a_point_is_known_by_everything_its_row_depends_on() -> None:
    base = Point(model(), machine(), "cpu-only", KIB, Workload(8, 4))
    others = [
        Point(model("other"), machine(), "cpu-only", KIB, Workload(8, 4)),
        Point(model(hidden_size=128), machine(), "cpu-only", KIB, Workload(8, 4)),
        Point(model(), machine(link_gb_s=6), "cpu-only", KIB, Workload(8, 4)),
        Point(model(), machine(), "fiddler", KIB, Workload(8, 4)),
        Point(model(), machine(), "cpu-only", 2 * KIB, Workload(8, 4)),
        Point(model(), machine(), "cpu-only", KIB, Workload(8, 4, seed=1)),
        Point(model(), machine(), "cpu-only", KIB, Workload(8, 4), program="another"),
    ]
    assert Point(model(), machine(), "cpu-only", KIB, Workload(8, 4)).id == base.id
    assert len({base.id, *(other.id for other in others)}) == 1 + len(others)


def test_sizes_come_in_lists_and_ranges() -> None:
    assert sizes("512MiB,1GiB-2GiB+512MiB") == (2**29, 2**30, 3 * 2**29, 2**31)


# -- rows ---------------------------------------------------------------------------------------------


def test_a_row_is_what_simulate_says_of_the_policys_plan() -> None:
    point = points()[-1]
    row = sweep.sweep([point]).rows[0]
    plan = planner.plan(point.spec, point.profile, point.vram_budget_bytes, point.workload, point.policy)
    timeline = simulate(point.spec, plan, point.profile, point.workload)
    limit = bound(point.spec, point.profile, point.vram_budget_bytes, point.workload)
    expected = simulated_row(point.spec, plan, point.profile, point.workload, timeline, limit)
    assert {key: row[key] for key in expected} == expected
    assert set(row) == set(shards.COLUMNS.names)


@pytest.mark.parametrize(
    "point, reason",
    [
        (Point(model(), machine(), "gpu-only", KIB, Workload(8, 4)), "gpu-only needs"),
        (Point(model(), machine(), "cpu-only", 200 * 10**9, Workload(8, 4)), "made-up has"),
        (Point(model(), machine(), "cpu-only", KIB, Workload(300, 4)), "pass the 256 positions"),
        (Point(model(dtype="float16"), machine(), "cpu-only", KIB, Workload(8, 4)), "no FLOP/s of float16"),
    ],
    ids=["no room", "more than there is", "too long", "unknown dtype"],
)
def test_a_point_without_a_plan_is_a_row_that_says_why(point: Point, reason: str) -> None:
    (row,) = sweep.sweep([point]).rows
    assert reason in str(row["refused"])
    assert (row["failed"], row["decode_tok_s"], row["policy"]) == (None, None, point.policy)


def test_a_point_that_goes_wrong_is_named_and_takes_no_other_with_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: object) -> None:
        raise ZeroDivisionError("a mistake")

    monkeypatch.setitem(POLICIES, "broken", broken)
    made = grid([model()], [machine()], ["cpu-only", "broken", "fiddler"], [2000 * KIB], workloads([8], [4]))
    swept = sweep.sweep(made, tmp_path)
    (failure,) = swept.failures
    assert failure["policy"] == "broken"
    assert str(failure["failed"]).startswith("ZeroDivisionError: a mistake (test_sweep.py, line ")
    assert [row["policy"] for row in swept.rows if row["decode_tok_s"]] == ["cpu-only", "fiddler"]
    assert json.loads((tmp_path / "manifest.json").read_text())["n_failed"] == 1
    monkeypatch.setitem(POLICIES, "broken", POLICIES["cpu-only"])
    again = sweep.sweep(made, tmp_path)
    assert (again.n_found, again.failures) == (2, ())


def test_a_worker_with_another_program_does_not_answer() -> None:
    point = Point(model(), machine(), "cpu-only", KIB, Workload(8, 4), program="older")
    (row,) = sweep.sweep([point]).rows
    assert f"the worker has program {program_id()}, expected older" in str(row["failed"])


# -- folders ------------------------------------------------------------------------------------------


def test_the_files_agree_and_the_manifest_says_what_was_asked(tmp_path: Path) -> None:
    swept = sweep.sweep(points(), tmp_path)
    frame, text = pd.read_parquet(tmp_path / "rows.parquet"), pd.read_csv(tmp_path / "rows.csv")
    assert [*frame["point_id"]] == [*text["point_id"]] == [point.id for point in points()]
    assert [*frame["decode_tok_s"].dropna()] == [*text["decode_tok_s"].dropna()]
    assert frame.to_dict("records")[0]["evidence"] == swept.rows[0]["evidence"]
    manifest = json.loads((tmp_path / "manifest.json").read_text())
    assert manifest["config"]["policies"] == list(QUICK)
    assert manifest["config"]["vram_budgets_bytes"] == [300 * KIB, 2000 * KIB]
    assert manifest["config"]["hardware"] == [{"name": "made-up", "id": machine().id}]
    assert manifest["n_rows"] == len(points())
    assert manifest["n_refused"] == text["refused"].notna().sum() > 0
    assert manifest["provenance"]["versions"]["python"]


def test_what_is_there_is_not_simulated_again(tmp_path: Path) -> None:
    few, more = points([8]), points([8, 16])
    first, second = Watched(), Watched()
    sweep.sweep(few, tmp_path, first)
    swept = sweep.sweep(more, tmp_path, second)
    assert first.given == [str(point) for point in few]
    assert sorted(second.given) == sorted(str(point) for point in more if point not in few)
    assert swept.n_found == len(few)
    sweep.sweep(more, tmp_path / "fresh")
    assert table(tmp_path) == table(tmp_path / "fresh")


def test_a_finished_sweep_has_one_shard_of_all_rows(tmp_path: Path) -> None:
    sweep.sweep(points(), tmp_path)
    (shard,) = (tmp_path / "shards").iterdir()
    assert sorted(pd.read_parquet(shard)["point_id"]) == sorted(point.id for point in points())


def test_rows_that_are_in_two_shards_count_once(tmp_path: Path) -> None:
    # as a kill leaves them between writing the joined shard and removing the others
    sweep.sweep(points(), tmp_path)
    before = table(tmp_path)
    found = list(shards.read_shards(tmp_path).rows.values())
    shards.write_shard(tmp_path, found[:3])
    swept = sweep.sweep(points(), tmp_path, executor := Watched())
    assert (executor.given, swept.n_found, table(tmp_path)) == ([], len(points()), before)


@pytest.mark.parametrize("damage", [lambda b: b[: len(b) // 2], lambda b: b"", lambda b: b[:99] + b"x" + b[100:]])
def test_a_damaged_shard_is_made_anew(tmp_path: Path, damage: Callable[[bytes], bytes]) -> None:
    sweep.sweep(points(), tmp_path)
    before = table(tmp_path)
    (shard,) = (tmp_path / "shards").iterdir()
    shard.write_bytes(damage(shard.read_bytes()))
    (tmp_path / "shards" / "half.parquet1.part").write_bytes(b"half")
    swept = sweep.sweep(points(), tmp_path)
    assert (swept.n_found, swept.n_damaged) == (0, 1)
    assert table(tmp_path) == before
    assert len(list((tmp_path / "shards").iterdir())) == 1


def test_two_sweeps_do_not_write_into_one_folder(tmp_path: Path) -> None:
    with shards.held(tmp_path), pytest.raises(FormatError, match="another sweep writes into"):
        sweep.sweep(points(), tmp_path)
    sweep.sweep(points()[:1], tmp_path)


def test_a_folder_that_cannot_be_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(FormatError, match="cannot write into"):
        sweep.sweep(points(), tmp_path / "file")


def test_the_bar_counts_what_was_there_and_tells_rate_and_time_left(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    sweep.sweep(points([8]), tmp_path)
    sweep.sweep(points([8, 16]), tmp_path, progress=True)
    first, *_, last = capsys.readouterr().err.replace("\r", "\n").strip().splitlines()
    assert f"{len(points([8]))}/{len(points())}" in first
    assert f"{len(points())}/{len(points())}" in last
    assert "point/s" in last
    assert "<" in last


# -- workers ------------------------------------------------------------------------------------------


def test_rows_do_not_depend_on_the_number_of_workers(tmp_path: Path) -> None:
    sweep.sweep(points(), tmp_path / "one", workers=1)
    sweep.sweep(points(), tmp_path / "two", workers=2)
    assert table(tmp_path / "one") == table(tmp_path / "two")
    assert (tmp_path / "one" / "rows.parquet").read_bytes() == (tmp_path / "two" / "rows.parquet").read_bytes()


def test_any_executor_will_do_and_is_left_open() -> None:
    with ThreadPoolExecutor(3) as threads:
        swept = sweep.sweep(points(), executor=threads)
        assert threads.submit(len, "open").result() == 4
    assert swept.rows == sweep.sweep(points()).rows


def test_an_executor_that_breaks_keeps_what_it_did(tmp_path: Path) -> None:
    class Breaking(Watched):
        def submit(self, call: Callable[..., Any], /, *arguments: Any, **named: Any) -> Future[Any]:
            if len(self.given) == 3:
                raise BrokenExecutor("no more")
            return super().submit(call, *arguments, **named)

    with pytest.raises(ExecutionError, match="the executor broke; calls lost with it: 1, the first of moe on made-up"):
        sweep.sweep(points(), tmp_path, Breaking())
    assert sweep.sweep(points(), tmp_path).n_found == 3


def half_or_die(n: int) -> float:
    """Half of an even number; 3 ends the process, other odd numbers raise."""
    if n == 3:
        os._exit(1)
    if n % 2:
        raise ValueError(n)
    return n / 2


def test_a_call_that_kills_its_worker_is_found_out_and_all_others_end() -> None:
    done = {d.item: d for batch in run_in_processes(half_or_die, range(8), 2) for d in batch}
    assert {n: d.result for n, d in done.items() if d.error is None} == {0: 0, 2: 1, 4: 2, 6: 3}
    assert {n for n, d in done.items() if type(d.error) is ValueError} == {1, 5, 7}
    assert "its worker process died" in str(done[3].error)


def test_errors_come_back_as_results_from_any_executor() -> None:
    with ThreadPoolExecutor(2) as threads:
        done = [d for batch in run_on(threads, half_or_die, [0, 1, 2]) for d in batch]
    assert sorted(d.item for d in done if d.error is None) == [0, 2]
    assert [d.item for d in done if d.error is not None] == [1]


def test_a_script_without_a_guard_is_told_so(tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text("from sim.workers import run_in_processes\nprint(list(run_in_processes(abs, [1, 2], 2)))\n")
    done = subprocess.run([sys.executable, script], capture_output=True, text=True, env=environment(), check=False)
    assert done.returncode == 1
    assert "worker processes cannot start. A script that asks for workers" in done.stderr


@pytest.mark.slow
def test_a_dask_cluster_of_two_workers_gives_the_same_rows(tmp_path: Path) -> None:
    from distributed import Client, LocalCluster

    with (
        LocalCluster(n_workers=2, threads_per_worker=1, processes=True, dashboard_address=None) as cluster,
        Client(cluster) as client,
    ):
        pids = client.run(os.getpid).values()
        sweep.sweep(points(), tmp_path / "dask", client.get_executor())
        command = ["sweep", *words(tmp_path, "cpu-only,fiddler"), "-q", "--out"]
        assert main([*command, str(tmp_path / "address"), "--dask", client.scheduler.address]) == 0
    assert len({*pids, os.getpid()}) == 3
    sweep.sweep(points(), tmp_path / "here")
    assert table(tmp_path / "dask") == table(tmp_path / "here")
    assert main([*command, str(tmp_path / "no address")]) == 0
    assert table(tmp_path / "address") == table(tmp_path / "no address")


# -- interruptions ------------------------------------------------------------------------------------

COMMAND = [sys.executable, "-c", "import sys; from runtime.cli import main; sys.exit(main())"]


def environment() -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(Path(__file__).parent.parent)}


def words(folder: Path, policies: str = "cpu-only,fiddler,scheinfer") -> list[str]:
    """A sweep of 12 points for every policy."""
    (folder / "model").mkdir(exist_ok=True)
    (folder / "model" / "config.json").write_text(json.dumps(CONFIG))
    machine().save(folder / "hw.json")
    lengths = ["-p", "8-24+8", "-n", "4", "--vram-budget", "300KiB-900KiB+200KiB"]
    return ["-m", str(folder / "model"), "--hardware", str(folder / "hw.json"), *lengths, "--policy", policies]


Interrupted = Callable[[signal.Signals], subprocess.CompletedProcess[str]]


@pytest.fixture
def interrupted(tmp_path: Path) -> Iterator[Interrupted]:
    """Start a sweep with two workers, send a signal when it has kept some rows, and see all its processes end."""
    started: list[subprocess.Popen[str]] = []

    def run(signal_: signal.Signals) -> subprocess.CompletedProcess[str]:
        command = [*COMMAND, "sweep", *words(tmp_path), "--workers", "2", "--out", str(tmp_path / "out")]
        process = subprocess.Popen(
            command,
            env=environment(),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
        started.append(process)
        until(lambda: len(list((tmp_path / "out").glob("shards/*.parquet"))) >= 3 or process.poll() is not None)
        family = [process.pid, *children(process.pid)]
        process.send_signal(signal_)
        out, err = process.communicate(timeout=60)
        assert len(family) >= 3
        until(lambda: not any(alive(pid) for pid in family))
        return subprocess.CompletedProcess(command, process.returncode, out, err)

    yield run
    for process in started:
        process.kill()
        process.wait()


def until(happened: Callable[[], bool], most_s: float = 60) -> None:
    for _ in range(int(most_s / 0.02)):
        if happened():
            return
        time.sleep(0.02)
    raise AssertionError(f"did not happen within {most_s} s")


def children(pid: int) -> list[int]:
    return [int(p) for p in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


@pytest.mark.slow
@pytest.mark.parametrize("signal_", [signal.SIGKILL, signal.SIGINT], ids=["kill", "Ctrl-C"])
def test_an_interrupted_sweep_goes_on_with_nothing_lost_or_doubled(
    tmp_path: Path, interrupted: Interrupted, signal_: signal.Signals, capsys: pytest.CaptureFixture[str]
) -> None:
    ended = interrupted(signal_)
    kept = shards.read_shards(tmp_path / "out").rows
    assert not (tmp_path / "out" / "rows.csv").exists()
    assert 3 <= len(kept) < 36
    if signal_ == signal.SIGINT:
        assert (ended.returncode, ended.stdout) == (130, "")
        assert f"stopped; the same command goes on from {tmp_path / 'out'}" in ended.stderr
        assert "Traceback" not in ended.stderr
    assert main(["sweep", *words(tmp_path), "--workers", "2", "--out", str(tmp_path / "out")]) == 0
    assert f"{len(kept)} of them from an earlier sweep" in capsys.readouterr().err
    assert main(["sweep", *words(tmp_path), "--out", str(tmp_path / "whole"), "-q"]) == 0
    assert table(tmp_path / "out") == table(tmp_path / "whole")
    assert len(pd.read_parquet(tmp_path / "out" / "rows.parquet")["point_id"].unique()) == 36
