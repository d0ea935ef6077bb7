"""Several calibrations as one: means, the widest spreads, and nothing pooled that does not belong together."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hwmodels.calibrate import Part
from hwmodels.errors import FormatError
from hwmodels.pool import pooled, pooled_part, uncertainty
from hwmodels.profile import Cold, Contention, Curve, HardwareProfile, Move, Peak, Repeats, Sample, load_profile

PEAK = Peak({"float32": 1.0}, 1.0, efficiency=1.0, fixed_s=0.0, source="measured")


def calibrated(slowness: float, created: str = "2026-01-01", load: str = "up to 1%") -> HardwareProfile:
    """A machine that takes so many seconds for anything; its link halves the CPU's rate, as much slower as it is."""
    samples = tuple(Sample(n, float(n), 4e6, 0.0, n * slowness, 0.1, 5, 1) for n in (1, 2))
    return HardwareProfile(
        name="pool",
        device="emulated",
        created=created,
        fingerprint={"cpu": "made up", "others_load": load},
        vram_bytes=round(1000 / slowness),
        host_bytes=1000,
        cpu_threads=1,
        peaks={"CPU": PEAK, "H2D": PEAK},
        curves=(
            Curve("CPU", "ffn", "float32", 1, "measured", samples),
            Curve("H2D", "pinned", "float32", 0, "measured", (Sample(1, 0.0, 0.0, 2e6, slowness, 0.5, 7),)),
        ),
        handoff_s={"CPU>GPU": slowness / 8},
        handoff_repeats={"CPU>GPU": Repeats(0.25, 3)},
        contention=(Contention(("CPU", "H2D"), {"CPU": 0.5 / slowness, "H2D": 1.0}, "measured"),),
        cold=(Cold(slowness, slowness / 10, "measured", Repeats(0.01, 4)),),
        moves=(Move("GPU", slowness, slowness / 2, slowness / 4, "measured", Repeats(0.5, 2)),),
    )


def test_every_number_is_the_mean_of_the_calibrations_without_the_fastest_and_the_slowest():
    found = pooled([calibrated(2.0), calibrated(9.0), calibrated(1.0), calibrated(6.0, created="2026-01-02")])
    ffn = found.curve("CPU", "ffn", "float32")
    assert ffn is not None
    assert [s.median_s for s in ffn.samples] == [4.0, 8.0]
    assert found.handoff_s == {"CPU>GPU": 0.5}
    assert found.contention[0].rate == {"CPU": pytest.approx((1 / 4 + 1 / 12) / 2), "H2D": 1.0}
    assert (found.cold[0].waited_s, found.cold[0].cold_s) == (4.0, pytest.approx(0.4))
    assert found.moves == (Move("GPU", 4.0, 2.0, 1.0, "measured", Repeats(8.0, 8)),), "9 - 1 is the widest"
    assert found.peaks["CPU"].bytes_per_s == 4e6 / 4.0, "peaks are read from the pooled curves"
    assert found.peaks["H2D"].bytes_per_s == 2e6 / 4.0
    assert (found.vram_bytes, found.created) == (111, "2026-01-02"), "the least memory, the last date"


def test_passes_over_a_part_count_with_their_mean():
    one, two = (
        Part(p.curves, p.handoff_s, p.handoff_repeats, p.contention, p.cold, p.moves, load)
        for p, load in ((calibrated(1.0), None), (calibrated(2.0), 0.25))
    )
    found = pooled_part([one, two])
    assert [s.median_s for c in found.curves for s in c.samples] == [1.5, 3.0, 1.5]
    assert (found.handoff_s, found.others_load) == ({"CPU>GPU": 1.5 / 8}, 0.25)
    assert found.handoff_repeats["CPU>GPU"] == Repeats(0.25, 6)
    assert (found.contention[0].rate["CPU"], found.cold[0].waited_s) == (0.375, 1.5)
    assert found.moves[0].before_s == 1.5
    assert pooled_part([two]) == two


def test_what_passes_differ_by_tells_how_well_their_mean_is_known():
    # two passes of 0.9 and 1.1 of their mean: a standard deviation of 0.14, over the root of two
    one, two = ({"mlp": Part(calibrated(level).curves)} for level in (0.9, 1.1))
    assert uncertainty([one, two]) == pytest.approx(0.1)
    assert uncertainty([one, one, one]) == 0.0
    assert uncertainty([one]) == math.inf


def test_spreads_are_at_least_what_calibrations_differ_by_and_counts_add_up():
    found = pooled([calibrated(1.0), calibrated(1.25)])
    (one, two), (copy,) = (curve.samples for curve in found.curves)
    assert (one.spread_s, two.spread_s, copy.spread_s) == (0.25, 0.5, 0.5), "the range of medians, or their own"
    assert (one.count, one.outliers, copy.count) == (10, 2, 14)
    assert found.handoff_repeats["CPU>GPU"] == Repeats(0.25, 6)


def test_a_hand_off_that_some_did_not_meet_is_the_mean_of_the_others():
    without = calibrated(1.0).with_(handoff_s={}, handoff_repeats={})
    found = pooled([without, calibrated(2.0), without])
    assert (found.handoff_s, found.handoff_repeats) == ({"CPU>GPU": 0.25}, {"CPU>GPU": Repeats(0.25, 3)})


def test_a_pooled_profile_says_so_and_keeps_every_note_once(tmp_path):
    found = pooled([calibrated(1.0).with_(notes=("busy",)), calibrated(1.0, load="up to 9%").with_(notes=("busy",))])
    assert found.notes == ("The mean of 2 calibrations, the first of 2026-01-01.", "busy")
    assert found.fingerprint["others_load"] == "up to 1%, up to 9%"
    found.save(tmp_path / "pooled.json")
    assert load_profile(tmp_path / "pooled.json") == found


@given(st.lists(st.floats(0.5, 4.0), min_size=1, max_size=5))
def test_the_order_of_calibrations_does_not_matter_and_equal_ones_change_nothing(slowness: list[float]):
    one, other = pooled([calibrated(s) for s in slowness]), pooled([calibrated(s) for s in reversed(slowness)])
    for a, b in zip(one.curves, other.curves, strict=True):
        assert [s.median_s for s in a.samples] == pytest.approx([s.median_s for s in b.samples])
    assert one.handoff_s == pytest.approx(other.handoff_s)
    same = pooled([calibrated(slowness[0])] * 3)
    assert [s.median_s for c in same.curves for s in c.samples] == pytest.approx(
        [s.median_s for c in calibrated(slowness[0]).curves for s in c.samples]
    )


@pytest.mark.parametrize(
    ("other", "what"),
    [
        (calibrated(1.0).with_(device="cuda"), "device"),
        (calibrated(1.0).with_(fingerprint={"cpu": "another"}), "machine or software"),
        (calibrated(1.0).with_(cpu_threads=2), "threads"),
        (calibrated(1.0).with_(curves=calibrated(1.0).curves[:1]), "what curves measured"),
        (calibrated(1.0).with_(contention=()), "sets of contention"),
        (calibrated(1.0).with_(cold=()), "waits"),
        (calibrated(1.0).with_(moves=()), "moves"),
    ],
)
def test_what_does_not_belong_together_is_not_pooled(other: HardwareProfile, what: str):
    with pytest.raises(FormatError, match=f"differ in {what}: pool calibrations of one machine"):
        pooled([calibrated(1.0), other])


def test_nothing_is_no_profile_and_one_stays_as_it_is():
    with pytest.raises(FormatError, match="no profile to pool"):
        pooled([])
    alone = replace(calibrated(1.0), notes=("alone",))
    assert pooled([alone]) is alone
