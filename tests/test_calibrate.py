"""Calibration: numbers from repeats, laws from points left out, parts that survive an interruption."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from hwmodels import work
from hwmodels.calibrate import (
    FLOOR_S,
    Part,
    contention,
    fastest,
    handoffs,
    is_known,
    merged,
    moved,
    remarks,
    residuals,
    samples,
    summarise,
    with_best_laws,
)
from hwmodels.load import LoadMeter
from hwmodels.profile import Cold, Contention, Curve, HardwareProfile, Repeats, Sample, load_profile
from hwmodels.work import Work
from runtime import calibrate as calibration
from runtime import native, rounds, turns
from runtime.byturns import moves
from runtime.calibrate import FULL, SMOKE, calibrate
from runtime.changes import beside_changes
from runtime.coldstart import attention
from runtime.resume import KeptParts, KeptRounds, Timed
from runtime.rounds import Effort, Measuring, finish, flat, in_rounds
from runtime.turns import Turn, progress_bar, take_turns
from sim.timeline import Span, Timeline
from tests.tiny import write_tiny

WORK = work.ffn(1, 4, 8, "float32")


def curve(times_s: dict[float, float], op: work.Op = "ffn") -> Curve:
    """A curve over tokens of one width."""
    samples = tuple(Sample(int(x), 1.0, 8.0, 0.0, seconds, 0.0, 5) for x, seconds in times_s.items())
    return Curve("CPU", op, "float32", 1, "measured", samples)


def yardstick(gigabytes_per_s: float) -> Part:
    sample = Sample(1, 0.0, 0.0, 1e9, 1 / gigabytes_per_s, 0.0, 5)
    return Part((Curve("CPU", "stream_read", "float32", 1, "measured", (sample,)),))


# -- points -------------------------------------------------------------------------------------------


def up_to(isa: str) -> native.Kernel:
    return native.Kernel(ctypes.CDLL(None), native.ISAS[: native.ISAS.index(isa) + 1])


def test_both_sides_of_a_change_of_kernel_are_measured(monkeypatch):
    monkeypatch.setattr(native, "leaves_to_torch", lambda dtype, n_rows: dtype is torch.bfloat16 and n_rows >= 40)
    monkeypatch.setattr(native, "kernel", lambda: up_to("AVX2"))
    assert beside_changes((1, 16, 64), "float32") == (1, 8, 9, 16, 64)
    assert beside_changes((1, 16, 64), "bfloat16") == (1, 8, 9, 16, 39, 40, 64)
    assert beside_changes((1, 4, 8), "bfloat16") == (1, 4, 8)
    assert beside_changes((1, 16, 64), "float32", 1) == (1, 8, 9, 16, 64)  # keys are never packed


def test_panels_and_tiles_are_other_kernels_and_torch_alone_has_one(monkeypatch):
    monkeypatch.setattr(native, "leaves_to_torch", lambda dtype, n_rows: False)
    monkeypatch.setattr(native, "kernel", lambda: up_to("AMX_BF16"))
    assert beside_changes((1, 64), "float32") == (1, 24, 25, 47, 48, 64)
    assert beside_changes((1, 64), "float32", 1) == (1, 24, 25, 32, 33, 47, 48, 64)
    assert beside_changes((1, 24), "float32", 4) == (1, 8, 9, 24)
    assert beside_changes((1, 7), "bfloat16", 8) == (1, 2, 7)
    assert beside_changes((1, 64), "bfloat16") == (1, 8, 9, 64)
    monkeypatch.setattr(native, "kernel", lambda: up_to("AVX512_BF16"))
    assert beside_changes((1, 128), "bfloat16") == (1, 24, 25, 95, 96, 128)
    monkeypatch.setattr(native, "kernel", lambda: up_to("AVX512"))  # widens it
    assert beside_changes((1, 128), "bfloat16") == (1, 24, 25, 31, 32, 128)
    monkeypatch.setattr(native, "kernel", lambda: None)
    assert beside_changes((1, 64), "float32") == (1, 64)


# -- repeats ------------------------------------------------------------------------------------------


def test_a_sample_is_the_median_with_its_spread_and_keeps_what_lies_far_off():
    # 1.0 .. 1.9 around 1.4, and one repeat that something held up
    sample = summarise(WORK, [1.0, 1.1, 1.2, 1.3, 1.4, 1.5, 1.6, 1.7, 9.0])
    assert (sample.median_s, sample.count, sample.outliers) == (1.4, 9, 1)
    assert sample.spread_s == pytest.approx(1.7 - 1.1)


@given(st.lists(st.floats(1e-6, 1e3), min_size=1, max_size=40))
def test_a_sample_lies_among_its_repeats(times_s):
    sample = summarise(WORK, times_s)
    assert min(times_s) <= sample.median_s <= max(times_s)
    assert 0 <= sample.outliers < max(1, len(times_s))
    assert 0 <= sample.spread_s <= max(times_s) - min(times_s)


def test_four_repeats_are_never_enough():
    assert not is_known([1.0] * 4)
    assert is_known([1.0] * 5)


def test_a_median_is_known_once_many_repeats_stand_behind_it():
    # half the repeats 10 % longer: 1.58 x 0.1 / sqrt(n) falls below 2 % of 1.05 between 9 and 100 repeats
    assert not is_known([1.0, 1.1] * 4)
    assert is_known([1.0, 1.1] * 50)


def test_a_microsecond_more_or_less_is_known_at_once():
    assert is_known([1e-6, 1.2e-6, 1.4e-6, 1.6e-6, 1.8e-6])


def test_a_handoff_is_the_mean_of_its_delays_without_the_outermost_and_never_negative():
    # delays add up: two tasks of the device are 1 apart, or 7 where the CPU's task is handed over between them
    found = handoffs({"GPU>GPU": [1.0, 1.0, 7.0, 7.0, 90.0, 0.0], "GPU>CPU": [-3.0, -2.0, 1.0], "H2D>GPU": []})
    assert found.handoff_s == {"GPU>GPU": 4.0, "GPU>CPU": 0.0}
    assert found.handoff_repeats["GPU>CPU"] == Repeats(4.0, 3)


def test_what_a_round_does_to_all_points_of_a_curve_cancels():
    # the second and third rounds of four are slower, 2 and 4 times; the points stay 1 to 3 whatever happens
    one, three = work.ffn(1, 4, 8, "float32"), work.ffn(3, 4, 8, "float32")
    found = samples({one: [[1.0], [2.0], [4.0], [1.0]], three: [[3.0, 3.0], [6.0], [12.0], []]})
    assert found[1].median_s == pytest.approx(3 * found[0].median_s)
    assert found[0].median_s == pytest.approx(2.0), "the mean round"
    assert (found[0].count, found[0].spread_s, found[1].count) == (4, 3.0, 4), "as measured"


def test_a_round_of_times_shorter_than_the_clocks_step_is_no_error():
    (found,) = samples({WORK: [[0.0], [2.0], [2.0]]})
    assert 0.0 < found.median_s < 2.0


@given(st.lists(st.lists(st.floats(1e-6, 1e3), min_size=1, max_size=4), min_size=1, max_size=8))
def test_a_point_alone_lies_among_its_repeats(rounds_s):
    (found,) = samples({WORK: rounds_s})
    repeated = [t for own in rounds_s for t in own]
    assert 0.999 * min(repeated) <= found.median_s <= 1.001 * max(repeated)


def test_a_rate_compares_within_each_round_so_that_drift_cancels():
    # the machine slows down twofold every round; together the CPU always takes twice its time alone
    found = contention(
        {"CPU": [1.0, 2.0, 4.0], "H2D": [1.0, 1.0, 1.0]}, {"H2D": [1.0, 1.0, 0.5], "CPU": [2.0, 4.0, 8.0]}
    )
    assert found.active == ("CPU", "H2D")
    assert found.rate == {"CPU": 0.5, "H2D": 1.0}
    assert found.repeats["CPU"] == Repeats(0.0, 3)


def test_a_peak_is_the_fastest_sample_and_the_yardstick_is_no_task():
    # 2 FLOP and 2 MB in 1 s, 4 FLOP and 2 MB in 4 s; reading alone reaches 4 MB/s, half of which tasks get at best
    tasks = tuple(Sample(n, 2.0 * n, 2e6, 0.0, float(n * n), 0.0, 5) for n in (1, 2))
    stream = Sample(1, 0.0, 0.0, 4e6, 1.0, 0.0, 5)
    peak = fastest(
        [
            Curve("CPU", "ffn", "float32", 1, "measured", tasks),
            Curve("CPU", "stream_read", "float32", 1, "measured", (stream,)),
        ],
        "CPU",
    )
    assert (peak.flops_per_s, peak.bytes_per_s, peak.fixed_s) == ({"float32": 2.0}, 4e6, 1.0)
    assert peak.efficiency == pytest.approx((1.0 + 0.5) / 2)  # 1 of 1 s and 2 of 4 s of the roofline


# -- points left out ----------------------------------------------------------------------------------


def test_a_straight_line_is_predicted_without_error():
    (found,) = residuals([curve({n: 1.0 + n for n in (1, 4, 16, 64)})])
    assert (found.n_points, found.median, found.worst) == (2, 0.0, 0.0)


def test_a_kink_is_the_error_of_the_point_that_makes_it():
    # 2 and 8 predict 4 as 4 s, it takes 5 s
    (found,) = residuals([curve({2: 2.0, 4: 5.0, 8: 8.0})])
    assert found.worst == pytest.approx(1 / 5)


def test_what_is_shorter_than_a_handoff_is_judged_against_one():
    # predicted as 2 % of a hand-off, measured as 1 %
    times_s = {2: 0.01 * FLOOR_S, 4: 0.01 * FLOOR_S, 6: 0.03 * FLOOR_S}
    (found,) = residuals([curve(times_s)])
    assert found.worst == pytest.approx(0.01)


def test_token_counts_with_nothing_between_them_are_not_left_out():
    assert residuals([curve({1: 1.0, 2: 9.0, 3: 2.0})]) == []


def test_a_spike_right_beside_a_token_count_says_nothing_of_the_gap_on_its_other_side():
    # 7 tokens are slow, 8 fast again: only 12, between 8 and 16, stands for what is interpolated
    (found,) = residuals([curve({7: 9.0, 8: 2.0, 12: 3.0, 16: 4.0})])
    assert (found.n_points, found.worst) == (1, 0.0)


@pytest.mark.parametrize(
    ("law", "time_s"),
    [("linear", lambda x: 1 + x), ("log", lambda x: 1 + x.bit_length()), ("power", lambda x: x**0.5)],
)
def test_the_law_that_predicts_best_is_found(law, time_s):
    found = with_best_laws(curve({2**i: float(time_s(2**i)) for i in range(8)}))
    assert found.laws == (law, "linear")
    assert residuals([found])[0].worst < 1e-9


def test_an_axis_that_begins_at_zero_stays_linear():
    samples = tuple(Sample(1, 1.0, 0.0, x, 1.0 + x**0.5, 0.0, 5) for x in (0.0, 1.0, 4.0, 16.0))
    assert with_best_laws(Curve("GPU", "attn", "float32", 0, "measured", samples)).laws == ("linear", "linear")


def test_curves_of_one_thing_become_one_and_the_faster_of_two_measurements_counts():
    first, second = curve({1: 1.0, 2: 5.0}), curve({2: 3.0, 4: 6.0})
    (found,) = merged([first, second])
    assert [(s.n_tokens, s.median_s) for s in found.samples] == [(1, 1.0), (2, 3.0), (4, 6.0)]
    assert len(merged([first, replace(second, threads=2)])) == 2


def test_slices_without_any_of_a_curves_points_tell_nothing_of_its_speed() -> None:
    whole = {Work("ffn", "float32", n, 1.0, 1.0): [[1.0 * n], [1.0 * n], [1.0 * n], [2.0 * n]] for n in (1, 2)}
    sparse = {demand: [*slices, [], [], [], []] for demand, slices in whole.items()}
    assert [s.median_s for s in samples(whole)] == [1.25, 2.5]
    assert samples(sparse) == samples(whole)


# -- rounds -------------------------------------------------------------------------------------------


class Clock:
    """A clock that only the cases move."""

    def __init__(self) -> None:
        self.now_s = 0.0

    def perf_counter(self) -> float:
        return self.now_s


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(rounds, "time", clock)
    return clock


class Runs:
    """A case that takes as long as it is told, visit by visit, and counts them."""

    def __init__(self, clock: Clock, *seconds: float) -> None:
        self.clock, self.seconds, self.visits = clock, seconds, 0

    def __call__(self) -> Iterator[tuple[str, float]]:
        each_s = self.seconds[self.visits % len(self.seconds)]
        self.visits += 1
        self.clock.now_s += each_s
        yield f"case {id(self)}", each_s


def test_the_first_round_warms_up_and_does_not_count(clock):
    case = Runs(clock, 9.0, 1.0)
    (times,) = finish(in_rounds([case], Effort(1, 1, 100.0))).values()
    assert times == [[1.0]]


def test_all_cases_are_visited_in_every_round_until_all_are_known(clock):
    steady, shaky = Runs(clock, 1.0), Runs(clock, 1.0, 2.0)
    times = finish(in_rounds([steady, shaky], Effort(2, 20, 1000.0)))
    assert [len(rounds) for rounds in times.values()] == [20, 20]


def test_what_is_known_ends_early_but_not_before_most_of_its_time_is_over(clock):
    # 1 s a round of 40 s: after five rounds all is known, after 30 it may end
    times = finish(in_rounds([Runs(clock, 1.0)], Effort(2, 100, 40.0)))
    assert [len(rounds) for rounds in times.values()] == [29], "the round that warms up takes time"


def test_the_least_rounds_are_run_even_when_the_time_is_over(clock):
    (times,) = finish(in_rounds([Runs(clock, 10.0, 20.0)], Effort(3, 20, 1.0))).values()
    assert len(times) == 3


def test_long_cases_are_visited_in_every_second_round(clock):
    # of 2.6 s the long case takes 2, more than four times the average of seven; its first visit warms up
    *short, long = [Runs(clock, 0.1) for _ in range(6)] + [Runs(clock, 2.0)]
    times = finish(in_rounds([*short, long], Effort(1, 6, 100.0)))
    assert [case.visits for case in short] == [1 + 6] * 6
    assert long.visits == 1 + 3
    assert [[len(own) for own in rounds] for rounds in times.values()] == [[1] * 6] * 6 + [[1, 0, 1, 0, 1, 0]]


def test_every_case_has_a_time_after_the_first_round_that_counts(clock):
    cases = [Runs(clock, 0.1), Runs(clock, 5.0), Runs(clock, 0.1), Runs(clock, 0.1)]
    assert len(finish(in_rounds(cases, Effort(1, 1, 100.0)))) == 4


def test_progress_only_grows_and_ends_at_one(clock):
    shares = list(in_rounds([Runs(clock, 1.0, 2.0)], Effort(1, 10, 5.0)))
    assert all(a <= b for a, b in pairwise(shares))
    assert shares[-1] == 1.0


def test_the_turns_of_others_are_not_the_time_of_a_measurement(clock):
    measuring, n_rounds = in_rounds([Runs(clock, 1.0, 2.0)], Effort(1, 100, 15.0)), 0
    for _ in measuring:
        clock.now_s += 1000.0
        n_rounds += 1
    assert n_rounds == 10, "rounds of 1 and 2 s, the first of which warms up"


def test_beside_runs_a_machine_that_slows_measures_as_many_rounds_as_its_first_ones_promised(clock):
    # 1 s to warm up and 3 rounds of 1 s: 10 s hold 9 rounds, and they are measured though all later ones take 5 s
    case = Runs(clock, *[1.0] * 4, *[5.0] * 96)
    (times,) = finish(in_rounds([case], Effort(1, 100, 10.0, counts_rounds=True))).values()
    assert [t for own in times for t in own] == [1.0] * 3 + [5.0] * 6


def test_beside_runs_nothing_ends_before_they_do(clock):
    # steady from the start, so that all is known after five rounds
    (times,) = finish(in_rounds([Runs(clock, 1.0)], Effort(2, 100, 41.0, counts_rounds=True))).values()
    assert len(times) == 40


def test_beside_runs_an_interrupted_measurement_goes_on_at_the_pace_it_finds(clock, tmp_path):
    # 21 s hold 1 to warm up, 5 rounds, 1 to warm up again and 14 rounds
    case = Runs(clock, 1.0)
    effort = partial(Effort, 1, 100, 21.0, counts_rounds=True)
    first = in_rounds([case], effort(kept=KeptRounds(tmp_path / "part.json")))
    for _ in range(6):
        next(first)
    first.close()
    (times,) = finish(in_rounds([case], effort(kept=KeptRounds(tmp_path / "part.json")))).values()
    assert len(times) == 19


def test_beside_runs_progress_only_grows_and_ends_at_one(clock):
    shares = list(in_rounds([Runs(clock, 1.0, 2.0, 4.0)], Effort(1, 50, 30.0, counts_rounds=True)))
    assert all(a <= b for a, b in pairwise(shares))
    assert shares[-1] == 1.0


def test_a_case_that_skips_a_round_keeps_its_rounds_in_step(clock):
    visits = 0

    def case() -> Iterator[tuple[str, float]]:
        nonlocal visits
        visits += 1
        clock.now_s += 1.0
        yield "always", 1.0
        if visits == 3:
            yield "once", 2.0

    found = finish(in_rounds([case], Effort(3, 3, 100.0)))
    assert found == {"always": [[1.0], [1.0], [1.0]], "once": [[], [2.0], []]}


def test_a_long_round_is_cut_into_slices_of_several_cases_in_an_order_of_its_own(clock):
    # 20 cases of an eighth: 2.5 s are seven slices of 0.35 s, but a slice has eight cases at least
    cases = [Runs(clock, 0.125) for _ in range(20)]
    times = finish(in_rounds(cases, Effort(3, 3, 100.0)))
    by_slice = [[case for case, own in times.items() if own[i]] for i in range(6)]
    assert [len(own) for own in by_slice] == [10] * 6
    assert {*by_slice[0], *by_slice[1]} == {*by_slice[2], *by_slice[3]} == set(times)
    assert set(by_slice[0]) != set(by_slice[2])


def test_a_part_may_stop_between_slices(clock):
    # 2.5 s to warm up and 2.5 s a round: the time is over amid the second that counts
    times = finish(in_rounds([Runs(clock, 0.125) for _ in range(20)], Effort(1, 9, 5.5)))
    assert sorted(len(flat(own)) for own in times.values()) == [1] * 10 + [2] * 10


# -- a calibration ------------------------------------------------------------------------------------


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "scheinfer"


def load_of(monkeypatch: pytest.MonkeyPatch, share: float | None) -> None:
    monkeypatch.setattr(LoadMeter, "others", lambda self: share)


@pytest.mark.slow
@pytest.mark.parametrize("family", ["llama", "mixtral"])
def test_a_calibration_measures_all_that_a_plan_may_ask(family, tmp_path, cache, monkeypatch):
    load_of(monkeypatch, 0.0)
    folder = write_tiny(tmp_path / family, family)
    profile = calibrate(folder, "emulated", progress=False, extent=replace(SMOKE, variants=True))
    assert profile.device == "emulated"
    have = {(c.resource, c.op) for c in profile.curves}
    both = {(place, op) for place in ("CPU", "GPU") for op in ("ffn", "attn", "embed", "head", "sample", "stream_read")}
    copies = {(link, op) for link in ("H2D", "D2H") for op in ("pinned", "pageable")}
    assert have >= both | copies | {("GPU", "join")}
    for kind in (set(), {"CPU", "GPU"}):  # work that reads, then work that computes
        measured = [e.active for e in profile.contention if set(e.computing) == kind & set(e.active)]
        assert tuple(measured) == calibration.SETS
    assert {"CPU>H2D", "D2H>CPU", "GPU>D2H", "H2D>GPU"} <= set(profile.handoff_s) == set(profile.handoff_repeats)
    assert {c.dtype for c in profile.curves if c.op == "ffn"} == {"float32", "bfloat16"}
    assert all(s.count >= 1 and s.median_s > 0 for c in profile.curves for s in c.samples)
    assert 0 < profile.vram_bytes < profile.host_bytes
    assert {"cpu", "isa", "torch", "kernels", "others_load"} <= set(profile.fingerprint)
    profile.save(tmp_path / "hw.json")
    assert load_profile(tmp_path / "hw.json") == profile
    assert not (cache / "parts").exists() or not list((cache / "parts").iterdir())


def test_a_curve_of_other_threads_answers_for_no_plan():
    one, four = curve({1: 4.0}), replace(curve({1: 1.0}), threads=4)
    for curves in ((one, four), (four, one)):
        profile = HardwareProfile("unit", "none", "", {}, 0, 1, 1, {"CPU": fastest(curves, "CPU")}, curves)
        assert profile.time_s("CPU", Work("ffn", "float32", 1, 1.0, 8.0)).seconds == 4.0
        assert profile.with_(cpu_threads=4).time_s("CPU", Work("ffn", "float32", 1, 1.0, 8.0)).seconds == 1.0


class Fake:
    """Parts that take no time; one of them may fail on its first call."""

    def __init__(self, fails: str = "") -> None:
        self.fails, self.ran = fails, []

    def part(self, name: str) -> calibration._Measure:
        def measure(rig: object, effort: Effort) -> Measuring:
            self.ran.append(name)
            if name == self.fails:
                self.fails = ""
                raise KeyboardInterrupt
            yield 0.1
            if name == "together":
                return Part(contention=(Contention(("CPU", "H2D"), {"CPU": 0.5, "H2D": 1.0}, "measured"),))
            if name == "waits":
                cold = (Cold(0.002, 0.001, "measured"),)
                return replace(handoffs({"CPU>H2D": [5.0], "GPU>H2D": [2.0]}), cold=cold)
            if name == "overlap":
                return handoffs({"CPU>H2D": [1.0]})
            return Part((curve({1: 1.0, 2: 2.0}),)) if name.startswith("rest") else Part()

        return measure


def faked(monkeypatch: pytest.MonkeyPatch, fails: str = "") -> Fake:
    fake = Fake(fails)
    parts = {name: (share, fake.part(name)) for name, (share, _) in calibration._PARTS.items()}
    monkeypatch.setattr(calibration, "_PARTS", parts)
    monkeypatch.setattr(turns, "_GLANCE_S", 0.0)
    return fake


def test_an_interrupted_calibration_goes_on_where_it_was(cache, monkeypatch, capsys):
    load_of(monkeypatch, 0.0)
    fake = faked(monkeypatch, fails="mlp")
    with pytest.raises(KeyboardInterrupt):
        calibrate(None, "emulated", quick=True)
    before = list(fake.ran)
    profile = calibrate(None, "emulated", quick=True)
    names = [name for name in calibration._PARTS if name != "variants"]
    assert before == names[: names.index("mlp") + 1]
    assert fake.ran[len(before) :] == names[names.index("mlp") :]
    assert (
        "going on: 6 of 10 parts and 0 rounds of others were measured within the last hour" in capsys.readouterr().err
    )
    assert profile.handoff_s == {"CPU>H2D": 1.0, "GPU>H2D": 2.0}  # of two parts the one that overlaps counts
    assert profile.contention[0].rate["CPU"] == 0.5
    assert profile.cold == (Cold(0.002, 0.001, "measured"),)


def test_rounds_are_kept_and_the_next_call_goes_on_after_them(tmp_path, clock):
    kept, work = KeptParts(tmp_path), Work("ffn", "float32", 1, 1.0, 8.0)

    def case() -> Iterator[tuple[Timed, float]]:
        clock.now_s += 1.0
        yield from ((("CPU", work), clock.now_s), (work, 2.0), ("CPU>GPU", 3.0))

    effort = Effort(1, 5, 1e9, kept.rounds("mlp 1"))
    measuring = in_rounds([case], effort)
    for _ in range(4):  # the first warms up
        next(measuring)
    measuring.close()
    assert kept.n_rounds("mlp 1") == 3
    found = finish(in_rounds([case], Effort(1, 5, 1e9, kept.rounds("mlp 1"))))
    assert found == {("CPU", work): [[2.0], [3.0], [4.0], [6.0], [7.0]], work: [[2.0]] * 5, "CPU>GPU": [[3.0]] * 5}


def test_the_measurements_of_a_part_keep_rounds_of_their_own(tmp_path, clock):
    kept, cases = KeptParts(tmp_path).rounds("variants 1"), [Runs(clock, 1.0), Runs(clock, 2.0)]
    effort = Effort(2, 2, 1e9, kept)
    one, two = (finish(in_rounds([case], effort)) for case in cases)
    again = KeptParts(tmp_path).rounds("variants 1")
    assert [again.following().load().times for _ in range(2)] == [one, two]


def test_damaged_rounds_are_measured_again(tmp_path, clock):
    kept = KeptParts(tmp_path)
    finish(in_rounds([Runs(clock, 1.0)], Effort(2, 2, 1e9, kept.rounds("mlp 1"))))
    (file,) = tmp_path.iterdir()
    file.write_text(file.read_text().replace('"n_rounds": 2', '"n_rounds": 3'))
    assert kept.n_rounds("mlp 1") == 0
    file.write_text("{")
    assert kept.n_rounds("mlp 1") == 0


def test_parts_take_turns_and_the_first_and_the_last_do_not(tmp_path):
    order: list[str] = []

    def measure(name: str) -> Measuring:
        for number in range(8):
            order.append(name)
            yield (number + 1) / 8
        return Part()

    parts = {f"{name} 1": Turn(0.25, partial(measure, name)) for name in ("before", "a", "b", "after")}
    found: dict[str, Part] = {}
    with progress_bar("", shown=False) as bar:
        take_turns(parts, found, KeptParts(tmp_path), bar, 100.0)
    assert order == ["before"] * 8 + ["a", "b"] * 8 + ["after"] * 8
    assert list(found) == ["before 1", "a 1", "b 1", "after 1"]


def test_a_finished_calibration_leaves_nothing_to_go_on_from(cache, monkeypatch):
    load_of(monkeypatch, 0.0)
    fake = faked(monkeypatch)
    calibrate(None, "emulated", quick=True, progress=False)
    calibrate(None, "emulated", quick=True, progress=False)
    assert len(fake.ran) == 2 * 10


def test_another_extent_does_not_go_on_from_this_one(cache, monkeypatch):
    load_of(monkeypatch, 0.0)
    fake = faked(monkeypatch, fails="mlp")
    with pytest.raises(KeyboardInterrupt):
        calibrate(None, "emulated", quick=True, progress=False)
    fake.ran.clear()
    calibrate(None, "emulated", quick=False, progress=False)
    assert fake.ran == list(calibration._PARTS) * FULL.passes


def drifting(monkeypatch: pytest.MonkeyPatch, seconds: Iterator[float]) -> None:
    """An MLP part that takes so long, pass by pass."""

    def measure(rig: object, effort: Effort) -> Measuring:
        yield 0.1
        one_s = next(seconds)
        return Part((curve({1: one_s, 2: 2 * one_s}),))

    monkeypatch.setitem(calibration._PARTS, "mlp", (1.0, measure))


@pytest.mark.parametrize(
    ("seconds", "n_passes", "sure"),
    [((1.0, 1.0, 1.0), 3, True), ((1.0, 1.0, 1.1, 1.0), 5, False), ((1.0, 1.0, 1.07, 1.0), 4, True)],
)
def test_a_full_calibration_goes_on_until_its_passes_agree_or_its_time_is_over(
    seconds, n_passes, sure, cache, monkeypatch
):
    load_of(monkeypatch, 0.0)
    fake = faked(monkeypatch)
    drifting(monkeypatch, iter((*seconds, 1.2, 1.2)))
    profile = calibrate(None, "emulated", progress=False)
    assert fake.ran.count("waits") == n_passes
    assert any("standard error" in note for note in profile.notes) != sure


def test_a_busy_machine_is_told_before_and_marked_after(cache, monkeypatch, capsys):
    load_of(monkeypatch, 0.4)
    faked(monkeypatch)
    profile = calibrate(None, "emulated", quick=True)
    assert "other programs keep 40% of all cores busy" in capsys.readouterr().err
    assert profile.fingerprint["others_load"] == "up to 40%"
    assert profile.notes[0].startswith(
        "Other programs kept up to 40% of all cores busy while yardstick, rest on the GPU"
    )


def test_a_quiet_machine_is_not_marked(cache, monkeypatch, capsys):
    load_of(monkeypatch, 0.01)
    faked(monkeypatch)
    assert calibrate(None, "emulated", quick=True).notes == ()
    assert "other programs" not in capsys.readouterr().err


def test_only_the_parts_that_others_disturbed_are_named():
    (found,) = remarks({"mlp": Part(others_load=0.5), "copies": Part(others_load=0.05), "rest": Part(others_load=None)})
    assert found.startswith("Other programs kept up to 50% of all cores busy while mlp was measured")


def test_a_machine_that_changed_its_speed_since_its_calibration_is_told():
    calibrated, same, slower = (yardstick(speed).curves for speed in (30.0, 28.0, 20.0))
    assert moved(calibrated, (*same, *same)) == []
    (told,) = moved(calibrated, (*same, *slower))
    assert "ran at 30.0 GB/s when the machine was calibrated and at 28.0 and 20.0 GB/s beside these runs" in told
    assert moved((), slower) == []  # nothing is known of then


def test_a_yardstick_that_moved_is_a_remark():
    (found,) = remarks({"before": yardstick(30.0), "after": yardstick(20.0)})
    assert "stream_read on the CPU ran at 30.0 and 20.0 GB/s, before and after" in found
    assert remarks({"before": yardstick(30.0), "after": yardstick(28.0)}) == ()


# -- cold starts --------------------------------------------------------------------------------------


def test_a_wait_is_what_the_device_did_not_compute_between_attentions():
    # GPU: |a0||gg|   |cg||a1|      1 to 6 between them, of which 3 were computed
    ran = (("attn", 0, 0, 1), ("gg", 0, 1, 3), ("cg", 0, 5, 6), ("attn", 1, 6, 8))
    spans = [Span(f"{k}{la}", k, "GPU", "prefill", la, s, e, 0.0, 0.0) for k, la, s, e in ran]
    spans.append(Span("cc", "cc", "CPU", "prefill", 0, 1, 5, 0.0, 0.0))
    assert attention(Timeline("measured", tuple(spans), {})) == {1: (2.0, 2.0)}


def test_changes_of_place_are_read_from_what_lies_around_their_copies():
    # CPU: |embed|            |attn|
    # GPU:             |attn|          its attention takes 3, 1 more than usual
    ran = (
        ("embed", "CPU", 0, 1),
        ("hidden_h2d", "H2D", 5, 6),
        ("attn", "GPU", 8, 11),
        ("hidden_d2h", "D2H", 12, 13),
        ("attn", "CPU", 13.5, 15),
    )
    spans = [Span(f"{kind}{start}", kind, place, "decode1", 1, start, end, 0.0, 0.0) for kind, place, start, end in ran]
    found = list(moves(Timeline("measured", tuple(spans), {}), usual_s=2.0))
    assert sorted(found) == [
        ("CPU after", 0.5),
        ("CPU before", 1.0),
        ("GPU after", 2.0),
        ("GPU before", 4.0),
        ("GPU cold", 1.0),
    ]
