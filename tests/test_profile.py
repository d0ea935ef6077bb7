"""Hardware profiles: what a cost rests on, what is refused and how it is said."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hwmodels import work
from hwmodels.errors import FormatError, ProfileError
from hwmodels.profile import Cold, Contention, Curve, HardwareProfile, Move, Peak, Repeats, Sample, load_profile
from hwmodels.schema import to_json
from hwmodels.work import Work

# 1 FLOP takes 1 s, and so does 1 byte, until an operation was measured.
PEAK = Peak({"float32": 1.0}, 1.0, efficiency=0.5, fixed_s=3.0, source="datasheet")


def sample(n_tokens: int, weight_bytes: float, median_s: float) -> Sample:
    return Sample(n_tokens, 1.0, weight_bytes, 0.0, median_s, 0.0, 5)


def ffn(n_tokens: int, weight_bytes: float) -> Work:
    return Work("ffn", "float32", n_tokens, 1.0, weight_bytes)


# A machine that takes twice its roofline at 10 bytes and three times at 20.
CURVE = Curve("GPU", "ffn", "float32", 0, "measured", (sample(1, 10, 20.0), sample(1, 20, 60.0)))
PROFILE = HardwareProfile(
    name="unit",
    device="cuda",
    created="2026-01-01",
    fingerprint={"cpu": "made up"},
    vram_bytes=100,
    host_bytes=1000,
    cpu_threads=1,
    peaks={"CPU": PEAK, "GPU": PEAK, "H2D": replace(PEAK, flops_per_s={}), "D2H": PEAK},
    curves=(CURVE,),
    handoff_s={"CPU>GPU": 0.5},
    contention=(Contention(("CPU", "H2D"), {"CPU": 0.5, "H2D": 0.8}, "measured"),),
    cold=(Cold(0.125, 0.25, "measured"), Cold(0.25, 0.5, "measured", Repeats(0.5, 9))),
    moves=(Move("CPU", 0.5, 0.25, 0.0, "measured"), Move("GPU", 1.0, 0.5, 2.0, "measured", Repeats(0.5, 9))),
)


# -- what a time rests on -----------------------------------------------------------------------------


def test_a_measured_point_is_returned_as_it_is():
    cost = PROFILE.time_s("GPU", ffn(1, 20))
    assert (cost.seconds, cost.evidence) == (60.0, "measured")


def test_between_two_points_time_is_linear():
    cost = PROFILE.time_s("GPU", ffn(1, 15))
    assert (cost.seconds, cost.evidence) == (40.0, "interpolated")


@given(st.floats(1.001, 1e6))
def test_beyond_the_last_point_its_efficiency_is_held(factor):
    # 60 s for 20 bytes: a third of the roofline, there and for all that is larger
    cost = PROFILE.time_s("GPU", ffn(1, 20 * factor))
    assert cost.seconds == pytest.approx(60.0 * factor)
    assert cost.evidence == "extrapolated"


@given(st.floats(0.1, 0.999))
def test_before_the_first_point_its_efficiency_is_held(factor):
    cost = PROFILE.time_s("GPU", ffn(1, 10 * factor))
    assert cost.seconds == pytest.approx(20.0 * factor)
    assert cost.evidence == "extrapolated"


def test_without_a_curve_the_roofline_over_the_efficiency_counts():
    # 10 bytes at 1 byte/s, half of it reached, 3 s to start
    cost = PROFILE.time_s("CPU", ffn(1, 10))
    assert (cost.seconds, cost.evidence) == (23.0, "specified")


def test_a_curve_that_nobody_measured_gives_no_measured_cost():
    profile = replace(PROFILE, curves=(replace(CURVE, source="estimated"),))
    costs = [profile.time_s("GPU", ffn(1, n)) for n in (10, 15, 20, 40)]
    assert [c.seconds for c in costs] == [20.0, 40.0, 60.0, 120.0]
    assert {c.evidence for c in costs} == {"specified"}


@given(st.integers(1, 4096), st.integers(1, 4096), st.integers(1, 8192))
def test_the_roofline_is_never_beaten_without_a_measurement(n_tokens, d_model, columns):
    demand = work.ffn(n_tokens, d_model, columns, "float32")
    assert PROFILE.time_s("CPU", demand).seconds >= PEAK.roofline_s("float32", demand.flops, demand.bytes)


def test_arithmetic_bounds_many_tokens_and_bandwidth_one():
    peak = Peak({"float32": 100.0}, 1.0, 1.0, 0.0, "datasheet")
    assert peak.roofline_s("float32", 50.0, 4.0) == 4.0
    assert peak.roofline_s("float32", 5000.0, 4.0) == 50.0


def test_a_rate_that_is_not_known_is_an_error_and_not_infinite():
    with pytest.raises(ProfileError, match="no FLOP/s of float16, it has float32; calibrate with --dtype float16"):
        PROFILE.time_s("CPU", replace(ffn(1, 10), dtype="float16"))


def test_a_resource_that_is_not_described_is_an_error():
    laptop = replace(PROFILE, peaks={"CPU": PEAK}, curves=())
    assert not laptop.has_gpu
    with pytest.raises(ProfileError, match="profile 'unit' describes CPU, not GPU; calibrate with a device"):
        laptop.time_s("GPU", ffn(1, 10))


def test_a_number_without_its_own_source_has_that_of_its_peak():
    peak = replace(PEAK, sources={"bytes_per_s": "published"})
    assert (peak.source_of("bytes_per_s"), peak.source_of("float32")) == ("published", "datasheet")


def test_a_copy_measured_in_one_dtype_answers_for_all():
    # bytes are bytes: 8 of them took 7 s
    pinned = Curve("H2D", "pinned", "bfloat16", 0, "measured", (Sample(1, 0.0, 0.0, 8.0, 7.0, 0.0, 5),))
    cost = replace(PROFILE, curves=(pinned,)).time_s("H2D", work.copy(8, "float32"))
    assert (cost.seconds, cost.evidence) == (7.0, "measured")


# -- contention ---------------------------------------------------------------------------------------


def test_alone_every_resource_runs_at_full_rate():
    assert all(PROFILE.rates(frozenset({r})) == {r: 1.0} for r in ("CPU", "GPU", "H2D", "D2H"))


def test_a_measured_pair_slows_both():
    assert PROFILE.rates(frozenset({"CPU", "H2D"})) == {"CPU": 0.5, "H2D": 0.8}


def test_a_third_resource_does_not_lift_what_a_pair_costs():
    assert PROFILE.rates(frozenset({"CPU", "H2D", "GPU"})) == {"CPU": 0.5, "H2D": 0.8, "GPU": 1.0}


BOTH = replace(
    PROFILE,
    contention=(*PROFILE.contention, replace(PROFILE.contention[0], rate={"CPU": 0.9, "H2D": 0.7}, computing=("CPU",))),
)


def test_work_that_computes_has_rates_of_its_own_where_they_were_measured():
    assert BOTH.rates(frozenset({"CPU", "H2D"}), {"CPU": 1.0}) == {"CPU": 0.9, "H2D": 0.7}
    assert BOTH.rates(frozenset({"CPU", "H2D"})) == {"CPU": 0.5, "H2D": 0.8}


def test_a_gpu_that_computes_beside_does_not_change_the_rates_of_a_pair():
    active = frozenset({"CPU", "H2D", "GPU"})
    assert BOTH.rates(active, {"GPU": 1.0}) == {"CPU": 0.5, "H2D": 0.8, "GPU": 1.0}
    assert BOTH.rates(active, {"CPU": 1.0, "GPU": 1.0}) == {"CPU": 0.9, "H2D": 0.7, "GPU": 1.0}


def test_without_rates_of_computing_those_of_reading_answer_for_all_work():
    assert PROFILE.rates(frozenset({"CPU", "H2D"}), {"CPU": 1.0}) == PROFILE.rates(frozenset({"CPU", "H2D"}))
    assert PROFILE.told_apart == frozenset()


def test_two_entries_of_one_kind_of_work_are_refused():
    with pytest.raises(FormatError, match=r"contention has two entries of CPU\+H2D, computing \['CPU'\]; expected one"):
        replace(BOTH, contention=(*BOTH.contention, BOTH.contention[1]))


def test_work_computes_by_how_far_it_is_beyond_the_ridge_of_the_roofline():
    # a FLOP and a byte take a second each: two FLOPs per token and weight, four bytes per weight
    works = {n: Work("ffn", "float32", n, 20.0 * n, 40.0) for n in (1, 2, 5, 8, 32)}
    assert [BOTH.computing({"CPU": one})["CPU"] for one in works.values()] == [0.0, 0.0, 0.5, 1.0, 1.0]
    assert BOTH.computing({"CPU": Work("ffn", "float32", 1, 1.0, 0.0)}) == {"CPU": 1.0}
    assert not PROFILE.computing({"CPU": works[32]})


ACTIVE = frozenset({"CPU", "GPU"})
APART = replace(
    PROFILE,
    contention=(
        Contention(("CPU", "GPU"), {"CPU": 0.25, "GPU": 0.5}, "measured"),
        Contention(("CPU", "GPU"), {"CPU": 1.0, "GPU": 0.8}, "measured", computing=("CPU", "GPU")),
    ),
)
shares = st.floats(0.0, 1.0)


def test_half_way_from_reading_to_computing_times_are_half_way():
    # 4 and 1 times as long: 2.5; 2 and 1.25 times: 1.625
    assert APART.rates(ACTIVE, {"CPU": 0.5, "GPU": 0.5}) == {
        "CPU": pytest.approx(1 / 2.5),
        "GPU": pytest.approx(1 / 1.625),
    }


def test_beside_work_that_reads_computing_was_not_measured_and_changes_nothing():
    assert APART.rates(ACTIVE, {"CPU": 0.5}) == APART.rates(ACTIVE) == {"CPU": 0.25, "GPU": 0.5}


@given(shares, shares, shares)
def test_rates_lie_between_those_of_reading_and_computing_and_follow_the_shares(cpu: float, gpu: float, more: float):
    reading, computing = APART.rates(ACTIVE), APART.rates(ACTIVE, {"CPU": 1.0, "GPU": 1.0})
    found = APART.rates(ACTIVE, {"CPU": cpu, "GPU": gpu})
    further = APART.rates(ACTIVE, {"CPU": max(cpu, more), "GPU": max(gpu, more)})
    for name in ACTIVE:
        assert reading[name] - 1e-12 <= found[name] <= further[name] + 1e-12 <= computing[name] + 2e-12


# -- files --------------------------------------------------------------------------------------------


def test_a_profile_survives_its_file(tmp_path):
    PROFILE.save(tmp_path / "hw.json")
    again = load_profile(tmp_path / "hw.json")
    assert again == PROFILE
    assert again.id == PROFILE.id
    assert again.time_s("GPU", ffn(1, 15)) == PROFILE.time_s("GPU", ffn(1, 15))


def test_fields_that_came_later_may_be_absent(tmp_path):
    value = document()
    del value["sources"], value["notes"], value["handoff_repeats"], value["cold"], value["moves"]
    del value["peaks"]["CPU"]["sources"], value["curves"][0]["laws"], value["curves"][0]["samples"][0]["outliers"]
    assert load_profile(written(tmp_path, value)).notes == ()


def document() -> dict[str, Any]:
    """The file of PROFILE as plain JSON values."""
    plain: dict[str, Any] = json.loads(json.dumps(to_json(PROFILE)))
    return {"schema": "scheinfer.hardware", "version": 1, **plain}


def written(folder: Any, value: Any) -> Any:
    path = folder / "hw.json"
    path.write_text(json.dumps(value))
    return path


def put(value: Any, path: str, new: Any) -> None:
    """Set ``peaks.CPU.source`` or ``curves.0.op``; delete it if new is `...`."""
    *way, last = path.split(".")
    for key in way:
        value = value[int(key)] if isinstance(value, list) else value[key]
    if new is ...:
        del value[last]
    else:
        value[int(last) if isinstance(value, list) else last] = new


@pytest.mark.parametrize(
    ("path", "new", "message"),
    [
        ("schema", "scheinfer.plan", "schema is 'scheinfer.plan', expected 'scheinfer.hardware'"),
        ("version", 0, "version 0 of scheinfer.hardware, this program reads version 1; write it anew"),
        ("vram_bytes", ..., "hw.json: field 'vram_bytes' is missing"),
        ("curves", ..., "hw.json: field 'curves' is missing; write it, empty if nothing is known"),
        ("handoff_s", ..., "hw.json: field 'handoff_s' is missing"),
        ("contention", ..., "hw.json: field 'contention' is missing"),
        ("vram_bytes", "24GiB", "hw.json.vram_bytes: expected a whole number, found '24GiB'"),
        ("vram_bytes", -1, "hw.json: vram_bytes must not be negative"),
        ("vram_GiB", 24, "hw.json: unknown field 'vram_GiB'; known: name, device"),
        ("device", "tpu", "hw.json.device: found 'tpu', expected one of 'cuda', 'emulated', 'none'"),
        ("peaks.CPU", ..., "peaks lacks 'CPU'"),
        ("peaks.NPU", {}, r"hw.json.peaks.NPU: field 'flops_per_s' is missing"),
        ("peaks.CPU.bytes_per_s", "70 GB/s", "hw.json.peaks.CPU.bytes_per_s: expected a number, found '70 GB/s'"),
        ("peaks.CPU.bytes_per_s", 0, "hw.json.peaks.CPU: flops_per_s and bytes_per_s must be above zero"),
        ("peaks.CPU.bytes_per_s", math.nan, "hw.json.peaks.CPU.bytes_per_s: expected a finite number, found nan"),
        ("peaks.CPU.efficiency", 1.5, "hw.json.peaks.CPU: efficiency is 1.5, must be above 0 and at most 1"),
        ("peaks.CPU.fixed_s", -1e-6, "hw.json.peaks.CPU: fixed_s is -1e-06, must not be negative"),
        ("peaks.CPU.GBps", 70, "hw.json.peaks.CPU: unknown field 'GBps'"),
        ("peaks.CPU.source", "hearsay", "hw.json.peaks.CPU.source: found 'hearsay', expected one of 'measured'"),
        ("peaks.CPU.sources", {"watts": "estimated"}, "hw.json.peaks.CPU: sources names 'watts'; numbers here are"),
        ("curves.0.op", "conv", r"hw.json.curves\[0\].op: found 'conv', expected one of 'ffn'"),
        ("curves.0.samples", [], r"hw.json.curves\[0\]: curve GPU/ffn/float32 has no samples"),
        ("curves.0.samples.1.median_s", 0, r"hw.json.curves\[0\].samples\[1\]: median_s is 0.0, must be above zero"),
        ("curves.0.samples.1.flops", -1, r"hw.json.curves\[0\].samples\[1\]: flops is -1.0, must not be negative"),
        ("curves.0.samples.1.count", 0, r"hw.json.curves\[0\].samples\[1\]: count is 0, must be at least 1"),
        ("curves.0.samples.1.outliers", 6, r"samples\[1\]: outliers is 6, must be between 0 and count, 5"),
        (
            "curves.0.laws",
            ["linear", "cubic"],
            r"curves\[0\].laws\[1\]: found 'cubic', expected one of 'linear', 'log'",
        ),
        ("curves.0.laws", ["linear"], r"curves\[0\].laws: expected 2 entries, found 1"),
        ("handoff_repeats", {"GPU>CPU": {"spread": 0, "count": 1}}, "handoff_repeats names 'GPU>CPU', which handoff_s"),
        (
            "contention.0.repeats",
            {"CPU": {"spread": 0, "count": 1}},
            r"contention\[0\]: repeats names \['CPU'\], active",
        ),
        ("curves.0.samples.1.weight_bytes", 10, r"curves\[0\]: curve GPU/ffn/float32: two samples at \(1, 10\)"),
        ("cold.0.cold_s", -1.0, r"hw.json.cold\[0\]: cold_s is -1.0, must not be negative"),
        ("cold.0.waited_s", 0, r"hw.json.cold\[0\]: waited_s is 0.*, must be above zero"),
        ("cold.0.factor", 1.1, r"hw.json: an earlier version of this program measured .* `scheinfer calibrate` anew"),
        ("cold.0.waited_s", 0.5, r"hw.json: cold has waits of \[0.5, 0.25\] s; expected rising ones"),
        ("moves.0.to", "H2D", r"moves\[0\].to: found 'H2D', expected one of 'CPU', 'GPU'"),
        ("moves.0.to", "GPU", "hw.json: moves has entries to GPU, GPU; expected one for each place"),
        ("moves.1.cold_s", -1.0, r"hw.json.moves\[1\]: cold_s is -1.0, must not be negative"),
        ("handoff_s", {"CPU->GPU": 0.1}, "hw.json: handoff_s names 'CPU->GPU'; write it as FROM>TO with CPU, GPU"),
        ("handoff_s", {"CPU>GPU": -0.1}, "hw.json: handoff_s.CPU>GPU is -0.1, must not be negative"),
        ("contention.0.rate.CPU", 1.2, r"hw.json.contention\[0\]: rate of CPU is 1.2, must be above 0 and at most 1"),
        (
            "contention.0.computing",
            ["H2D"],
            r"contention\[0\]: computing names \['H2D'\], active names \['CPU', 'H2D'\]",
        ),
        (
            "contention.0.computing",
            ["GPU"],
            r"names \['GPU'\], active names .*; expected those of CPU and GPU that are",
        ),
        ("contention.0.computing", "CPU", r"hw.json.contention\[0\].computing: expected a list, found 'CPU'"),
        ("contention.0.computing", ["CPU"], r"hw.json: contention of CPU\+H2D has rates of work that computes only"),
        ("contention.0.rate.GPU", 0.5, r"hw.json.contention\[0\]: rate names \['CPU', 'GPU', 'H2D'\], active names"),
    ],
)
def test_what_is_wrong_with_a_file_is_said_with_its_place(tmp_path, path, new, message):
    value = document()
    put(value, path, new)
    with pytest.raises(FormatError, match=message) as error:
        load_profile(written(tmp_path, value))
    assert str(tmp_path) in str(error.value)


def test_a_file_cut_short_is_refused(tmp_path):
    path = written(tmp_path, document())
    path.write_text(path.read_text()[:100])
    with pytest.raises(FormatError, match="not JSON .*; expected a hardware profile"):
        load_profile(path)
