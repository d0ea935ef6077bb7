"""CPU threads as a decision: machines measured with several numbers, plans that use fewer, the runtime that obeys."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from hwmodels.errors import FormatError, ProfileError
from hwmodels.profile import Curve, HardwareProfile, Sample
from hwmodels.threads import faster_counts, thread_counts, with_threads
from sim.limit import kind_of, limit_of
from sim.plan import load_plan
from sim.planner import explain, plan
from sim.simulate import forecast
from sim.workload import Workload
from tests.machines import budget, machine, moe
from tests.planned import loaded, spec_of, three_ways

SPEC = moe(2, columns=128)
WORKLOAD = Workload(16, 8)


def curve(threads: int, times: dict[int, float], widths: tuple[float, ...] = (0.5, 1.0)) -> Curve:
    """Seconds of one expert by tokens, in proportion to its width."""
    whole = SPEC.ffn_work(0, 1, 128)
    samples = [
        Sample(n, whole.flops * n * w, whole.weight_bytes * w, whole.io_bytes * n, s * w, 0.0, 5)
        for n, s in times.items()
        for w in widths
    ]
    return Curve("CPU", "ffn", "bfloat16", threads, "measured", tuple(samples))


def measured(own: dict[int, float], **others: dict[int, float]) -> HardwareProfile:
    """A machine of four threads; others by name t1, t2, ... were measured at whole width only."""
    more = [curve(int(name[1:]), times, (1.0,)) for name, times in others.items()]
    return replace(machine(link_gb_s=0.1, together=(0.9, 0.9)), curves=(curve(4, own), *more))


HYPERTHREADED = measured({1: 4e-5, 16: 8e-5}, t2={1: 2e-5, 16: 6e-5}, t1={1: 8e-5, 16: 32e-5})


def test_counts_that_were_measured_and_those_that_are_faster():
    assert thread_counts(HYPERTHREADED, "bfloat16") == (2, 1)
    assert faster_counts(HYPERTHREADED, "bfloat16") == (2,)
    assert faster_counts(machine(), "bfloat16") == ()
    assert faster_counts(HYPERTHREADED, "float32") == ()


@pytest.mark.parametrize("share", [0.5, 1.0])
@pytest.mark.parametrize(("n_tokens", "ratio"), [(1, 1 / 2), (16, 3 / 4), (4, (3 / 8) ** 0.5)])
def test_fewer_threads_take_the_measured_ratio_at_every_width_and_its_mean_between(n_tokens, ratio, share):
    few, work = with_threads(HYPERTHREADED, "bfloat16", 2), SPEC.ffn_work(0, n_tokens, int(128 * share))
    own_s = HYPERTHREADED.time_s("CPU", work).seconds
    if n_tokens == 4:  # interpolated in its own curve as well: only the order is plain
        assert own_s / 2 < few.time_s("CPU", work).seconds < own_s * 3 / 4
    else:
        assert few.time_s("CPU", work).seconds == pytest.approx(own_s * ratio)
    assert few.time_s("CPU", work).evidence == "specified"
    assert few.cpu_threads == 2


def test_the_own_number_is_the_machine_itself_and_an_unmeasured_one_an_error():
    assert with_threads(HYPERTHREADED, "bfloat16", None) is HYPERTHREADED
    assert with_threads(HYPERTHREADED, "bfloat16", 4) is HYPERTHREADED
    with pytest.raises(ProfileError, match="with 3 CPU threads in bfloat16 but with 1, 2, 4.*--threads 3"):
        with_threads(HYPERTHREADED, "bfloat16", 3)


def made(profile: HardwareProfile):
    return plan(SPEC, profile, budget(SPEC, WORKLOAD, 0.25), WORKLOAD, "auto")


def test_auto_takes_fewer_threads_where_a_generation_gets_faster():
    found = made(HYPERTHREADED)
    assert found.cpu_threads == 2
    assert found.profile_id == HYPERTHREADED.id
    with_all = forecast(SPEC, replace(found, cpu_threads=None), HYPERTHREADED, WORKLOAD)
    assert found.prediction == forecast(SPEC, found, HYPERTHREADED, WORKLOAD)
    assert found.prediction.tpot_s < with_all.tpot_s
    assert "computes with 2 threads" in explain(SPEC, HYPERTHREADED, found, WORKLOAD)
    limit = limit_of(SPEC, HYPERTHREADED, found.vram_budget_bytes, WORKLOAD, kind_of(found))
    assert limit.decode_s <= found.prediction.tpot_s


@pytest.mark.parametrize(
    "profile",
    [
        measured({1: 2e-5, 16: 8e-5}, t2={1: 4e-5, 16: 16e-5}),  # nowhere faster
        measured({1: 2e-5, 16: 8e-5}, t2={1: 19.9e-6, 16: 8e-5}),  # not clearly
        measured({1: 2e-5, 16: 8e-5}),
    ],
)
def test_auto_keeps_the_machines_number_otherwise(profile):
    assert made(profile).cpu_threads is None


def test_a_plan_keeps_its_threads_in_a_file_and_its_id_without_them(tmp_path: Path):
    found = made(HYPERTHREADED)
    found.save(tmp_path / "plan.json")
    assert load_plan(tmp_path / "plan.json") == found
    assert replace(found, cpu_threads=None).id != found.id
    replace(found, cpu_threads=0).save(tmp_path / "none.json")
    with pytest.raises(FormatError, match="cpu_threads: is 0; expected at least 1, or null"):
        load_plan(tmp_path / "none.json")


def test_a_machine_that_was_not_measured_so_cannot_simulate_such_a_plan():
    with pytest.raises(ProfileError, match="not measured with 2 CPU threads"):
        forecast(SPEC, made(HYPERTHREADED), machine(), WORKLOAD)


def test_another_type_of_numbers_needs_its_own_measurement():
    with pytest.raises(ProfileError, match="2 CPU threads in float32 but with 4"):
        with_threads(HYPERTHREADED, "float32", 2)


def test_an_emulated_device_keeps_its_threads():
    assert made(replace(HYPERTHREADED, device="emulated")).cpu_threads is None


def test_fewer_threads_where_nothing_fits_without_chunks():
    workload, small = Workload(2000, 64), replace(HYPERTHREADED, host_bytes=600_000)
    made = plan(SPEC, small, int(budget(SPEC, workload, 0.0) * 0.3), workload, "auto")
    assert made.chunk_tokens is not None
    assert made.cpu_threads == 2


@pytest.mark.parametrize(("asked", "used"), [(None, 1), (1, 1), (2, 1)])
def test_the_runtime_uses_no_more_threads_than_the_plan_says(tiny_checkpoint, monkeypatch, asked, used):
    monkeypatch.setattr("hwmodels.machine._usable_threads", lambda: 4)
    folder = tiny_checkpoint("mixtral")
    plan = replace(three_ways(spec_of(folder)), cpu_threads=1)
    with loaded(folder, plan, cpu_threads=asked) as model:
        assert model.executor.device.cpu_threads == used
