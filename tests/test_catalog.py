"""Shipped profiles: what they hold, how they compose, what can be changed."""

from __future__ import annotations

from dataclasses import replace
from typing import get_args

import pytest

from hwmodels import work
from hwmodels.catalog import beside_siblings, compose, hardware, names, with_overrides
from hwmodels.errors import FormatError, ProfileError
from hwmodels.parts import gpus, hosts, machines
from hwmodels.profile import Curve, Sample, Source, load_profile
from hwmodels.work import Work

MIXTRAL_EXPERT = work.ffn(1, 4096, 14336, "bfloat16")
PAIR = frozenset({"CPU", "H2D"})


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "scheinfer" / "profiles"


def test_at_least_ten_machines_are_known():
    assert len(names()) >= 10


@pytest.mark.parametrize("name", machines())
def test_a_shipped_profile_is_complete_and_survives_a_file(name, tmp_path):
    profile = hardware(name)
    assert profile.name == name
    assert profile.has_gpu
    assert all({"float32", "bfloat16", "float16"} <= set(profile.peaks[r].flops_per_s) for r in ("CPU", "GPU"))
    profile.save(tmp_path / "hw.json")
    assert load_profile(tmp_path / "hw.json") == profile


@pytest.mark.parametrize("name", machines())
def test_no_cost_of_published_figures_poses_as_measured(name):
    profile = hardware(name)
    works = [("CPU", MIXTRAL_EXPERT), ("GPU", MIXTRAL_EXPERT), ("H2D", work.copy(1e8, "bfloat16"))]
    works += [("H2D", work.copy(n_bytes, "bfloat16", pinned=False)) for n_bytes in (1e3, 2**16, 1e8, 1e10)]
    assert {profile.time_s(r, w).evidence for r, w in works} == {"specified"}


def test_every_number_of_a_part_has_a_source():
    for part in [*gpus().values(), *hosts().values()]:
        numbers = [value for value in vars(part).values() if isinstance(value, tuple)]
        assert len(numbers) >= 5
        assert all(value > 0 and source in get_args(Source) for value, source in numbers)


def test_published_timings_of_an_expert_are_met():
    # 352 MB in 13.98 ms over PCIe 4 x16 and in 26.7 ms over PCIe 3 x16
    copy = work.copy(MIXTRAL_EXPERT.weight_bytes, "bfloat16")
    assert hardware("rtx4090-ryzen7950x").time_s("H2D", copy).seconds == pytest.approx(13.98e-3, rel=0.05)
    assert hardware("rtx4090+ryzen7950x+pcie3x16").time_s("H2D", copy).seconds == pytest.approx(26.7e-3, rel=0.05)


def test_published_contention_is_the_ratio_of_the_published_rates():
    rates = hardware("rtx4090-tr5955wx").rates(PAIR)
    assert rates == pytest.approx({"CPU": 54.0 / 63.8, "H2D": 23.9 / 24.9}, abs=0.001)


@pytest.mark.parametrize("name", ["rtx3090-server32", "rtxpro4000-epyc7302"])
def test_on_two_published_machines_sending_beside_the_cpu_gains_nothing(name):
    profile = hardware(name)
    cpu, link = profile.peak("CPU"), profile.peak("H2D")
    alone = cpu.bytes_per_s * cpu.efficiency
    rates = profile.rates(PAIR)
    assert alone * rates["CPU"] + link.bytes_per_s * rates["H2D"] == pytest.approx(alone, rel=0.03)


def test_pageable_copies_are_slower_than_pinned_ones():
    profile = hardware("rtx3060-ryzen5900x")
    pinned, pageable = (profile.time_s("H2D", work.copy(1e8, "float16", pinned=p)).seconds for p in (True, False))
    assert 1.5 * pinned < pageable


def test_the_slower_side_decides_the_link():
    assert compose("rtx2080ti", "ryzen7950x").fingerprint["link"] == "PCIe 3.0 x16"
    assert compose("rtx5090", "epyc7302").fingerprint["link"] == "PCIe 3.0 x16"
    assert compose("rtx5090", "ryzen9950x").fingerprint["link"] == "PCIe 5.0 x16"


def test_parts_compose_by_name():
    assert hardware("rtx5090+epyc9654").peaks["GPU"] == compose("rtx5090", "epyc9654").peaks["GPU"]


def test_faster_memory_makes_the_cpu_faster_and_contention_less():
    slow, fast = compose("rtx4090", "ryzen7950x"), compose("rtx4090", "ryzen7950x", dram_bytes_per_s=140e9)
    assert fast.time_s("CPU", MIXTRAL_EXPERT).seconds == pytest.approx(
        slow.time_s("CPU", MIXTRAL_EXPERT).seconds / 2, 0.01
    )
    assert fast.rates(PAIR)["H2D"] > slow.rates(PAIR)["H2D"]


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("rtx4090-ryzen7950", r"no hardware profile 'rtx4090-ryzen7950'; known: rtx4090-ryzen7950x,"),
        ("rtx9090+ryzen7950x", r"no GPU 'rtx9090'; known: rtx2080ti, "),
        ("rtx4090+abacus", r"no host 'abacus'; known: ryzen5900x, "),
        ("rtx4090+ryzen7950x+isa", r"no link 'isa'; known: pcie3x16, "),
    ],
)
def test_an_unknown_name_lists_the_known_ones_closest_first(name, message):
    with pytest.raises(ProfileError, match=message):
        hardware(name)


def test_a_path_is_read_as_a_file(tmp_path):
    hardware("t4-epyc7r13").save(tmp_path / "mine.json")
    assert hardware(tmp_path / "mine.json").name == "t4-epyc7r13"
    with pytest.raises(FormatError, match="cannot read hardware profile"):
        hardware(tmp_path / "absent.json")


def test_a_profile_in_the_cache_is_known_by_its_name(cache):
    replace(hardware("t4-epyc7r13"), name="lab").save(cache / "lab.json")
    assert "lab" in names()
    assert hardware("lab").name == "lab"


# -- what if ------------------------------------------------------------------------------------------

MEASURED = replace(
    hardware("rtx4090-ryzen7950x"),
    curves=(
        Curve("CPU", "ffn", "bfloat16", 8, "measured", (Sample(1, 1.0, 1.0, 0.0, 1.0, 0.0, 5),)),
        Curve("GPU", "ffn", "bfloat16", 0, "measured", (Sample(1, 1.0, 1.0, 0.0, 1.0, 0.0, 5),)),
    ),
)


def test_an_override_changes_its_figure_and_says_so():
    changed = with_overrides(MEASURED, {"dram_read_GBps": "160", "vram_GiB": 16})
    assert changed.peaks["CPU"].bytes_per_s == 160e9
    assert changed.peaks["CPU"].source_of("bytes_per_s") == "estimated"
    assert changed.vram_bytes == 16 * 2**30
    assert changed.name == "rtx4090-ryzen7950x+dram_read_GBps=160,vram_GiB=16"


def test_curves_of_the_old_figure_are_dropped_and_the_others_kept():
    changed = with_overrides(MEASURED, {"dram_read_GBps": "160"})
    assert [c.resource for c in changed.curves] == ["GPU"]


def test_arithmetic_is_given_for_16_bits_and_float32_keeps_its_ratio():
    gpu = with_overrides(MEASURED, {"gpu_tflops": "330"}).peaks["GPU"]
    assert gpu.flops_per_s["bfloat16"] == 330e12
    assert gpu.flops_per_s["float32"] == pytest.approx(2 * 82.6e12)


def test_without_overrides_nothing_changes():
    assert with_overrides(MEASURED, {}) == MEASURED


@pytest.mark.parametrize("value", ["fast", "0", "-1", "nan", "inf", ""])
def test_a_value_that_is_no_positive_number_is_refused(value):
    with pytest.raises(ProfileError, match="pcie_GBps is .*expected a number above zero"):
        with_overrides(MEASURED, {"pcie_GBps": value})


def test_an_unknown_figure_lists_the_known_ones():
    with pytest.raises(ProfileError, match="no figure 'watts' to override; known: vram_GiB, ram_GiB, dram_read_GBps"):
        with_overrides(MEASURED, {"watts": "1"})


def test_a_hardware_thread_beside_a_busy_one_takes_longer_for_everything_and_the_link_does_not():
    whole = compose("rtx4090", "ryzen7950x")
    half = with_overrides(whole, {"cpu_smt_share": "0.5"})
    for demand in (Work("ffn", "float32", 1, 1e6, 4e6), Work("ffn", "float32", 512, 1e12, 4e6)):
        assert half.time_s("CPU", demand).seconds == pytest.approx(2 * whole.time_s("CPU", demand).seconds)
        assert half.time_s("GPU", demand) == whole.time_s("GPU", demand)
    assert half.peaks["CPU"].source_of("efficiency") == "estimated"
    assert half.peaks["H2D"] == whole.peaks["H2D"]


def test_a_hardware_thread_has_no_more_than_its_core():
    with pytest.raises(ProfileError, match="cpu_smt_share is 1.2; a hardware thread has at most its core"):
        with_overrides(MEASURED, {"cpu_smt_share": "1.2"})
    for nothing in (0.0, 1e-320):
        with pytest.raises(ProfileError, match=r"at most its core: 0\.01 to 1"):
            beside_siblings(MEASURED, nothing)
