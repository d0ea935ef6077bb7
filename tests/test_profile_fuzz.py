"""Whatever is wrong with a profile's file: a FormatError that says where and what, never a traceback or silence."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hwmodels import work
from hwmodels.errors import FormatError, ScheInferError
from hwmodels.profile import Cold, Contention, Curve, HardwareProfile, Move, Peak, Repeats, Sample, load_profile
from hwmodels.schema import to_json
from runtime.cli.entry import main

PEAK = Peak({"float32": 1e12}, 1e11, 0.8, 1e-6, "datasheet", {"bytes_per_s": "published"})
SPREAD = dict.fromkeys(("CPU", "H2D"), Repeats(0.1, 6))
CURVE = Curve(
    "CPU",
    "ffn",
    "float32",
    2,
    "measured",
    tuple(Sample(n, 2e6 * n, 1e6, 0.0, 1e-4 * n, 1e-5, 9, 1) for n in (1, 4, 8)),
    ("power", "linear"),
)
PROFILE = HardwareProfile(
    name="unit",
    device="cuda",
    created="2026-01-01",
    fingerprint={"cpu": "made up"},
    vram_bytes=100,
    host_bytes=1000,
    cpu_threads=2,
    peaks=dict.fromkeys(("CPU", "GPU", "H2D", "D2H"), PEAK),
    curves=(CURVE,),
    handoff_s={"CPU>GPU": 1e-5},
    contention=(
        Contention(("CPU", "H2D"), {"CPU": 0.5, "H2D": 0.8}, "measured", SPREAD),
        Contention(("CPU", "H2D"), {"CPU": 0.9, "H2D": 0.7}, "measured", SPREAD, ("CPU",)),
    ),
    sources={"vram_bytes": "datasheet"},
    notes=("A note.",),
    handoff_repeats={"CPU>GPU": Repeats(1e-6, 20)},
    cold=(Cold(1e-3, 5e-4, "measured", Repeats(0.5, 9)),),
    moves=(Move("GPU", 1e-4, 1e-5, 1e-3, "measured", Repeats(1e-6, 9)),),
)
OPTIONAL = {"sources", "notes", "handoff_repeats", "laws", "outliers", "repeats", "computing", "cold", "moves"}
"""What may be absent: it came later, or says nothing where it is empty."""
FREE = {"name", "created", "fingerprint", "notes"}
"""Texts in which anything is allowed."""
ENTRIES = (("fingerprint",), ("sources",), ("peaks",), ("handoff_s",))
"""Mappings that hold what is known, be it little."""
Way = tuple[str | int, ...]


def document() -> dict[str, Any]:
    plain: dict[str, Any] = json.loads(json.dumps(to_json(PROFILE)))
    return {"schema": "scheinfer.hardware", "version": 1, **plain}


def ways(value: Any, start: Way = ()) -> Iterator[Way]:
    """Paths of all fields, at all depths."""
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, item in inner:
        yield (*start, key)
        yield from ways(item, (*start, key))


WAYS = sorted(ways(document()), key=str)
WRONG = [math.nan, math.inf, -math.inf, -1, -1e-9, -(10**400), 10**400, "many", "", None, True, [], {}, [[]], {"x": 1}]


def at(value: Any, way: Way) -> Any:
    for key in way:
        value = value[key]
    return value


def names(message: str, way: Way) -> bool:
    """Whether a message names a field: its own name, or those of the lists and mappings that it stands in."""
    return any(str(key) in message for key in way if isinstance(key, str))


def written(folder: Path, text: str | bytes) -> Path:
    path = folder / "hw.json"
    path.write_bytes(text.encode() if isinstance(text, str) else text)
    return path


def loaded(path: Path, way: Way) -> HardwareProfile | None:
    """The profile; None if it is refused, with the file and the field named."""
    try:
        return load_profile(path)
    except FormatError as error:
        message = str(error)
    assert names(message, way)
    assert str(path) in message
    return None


def refusal(path: Path) -> str:
    with pytest.raises(FormatError) as error:
        load_profile(path)
    assert str(path) in str(error.value)
    return str(error.value)


@pytest.mark.parametrize("way", WAYS, ids=lambda way: ".".join(map(str, way)))
def test_a_field_that_is_not_there_is_named_or_was_optional(way, tmp_path):
    value = document()
    del at(value, way[:-1])[way[-1]]
    profile = loaded(written(tmp_path, json.dumps(value)), way)
    if profile is not None:
        is_entry = isinstance(way[-1], int) or way[-2:-1] in ENTRIES
        assert is_entry or way[-1] in OPTIONAL or "flops_per_s" in way or "handoff_repeats" in way
        assert load_profile(written(tmp_path, json.dumps({**document(), **to_json(profile)}))) == profile


@given(st.sampled_from(WAYS), st.sampled_from(WRONG))
def test_a_wrong_value_is_refused_by_name_or_kept_as_it_was_written(tmp_path_factory, way, wrong):
    value = document()
    at(value, way[:-1])[way[-1]] = wrong
    profile = loaded(written(tmp_path_factory.mktemp("fuzz"), json.dumps(value)), way)
    if profile is None:
        return
    assert at({**value, **to_json(profile)}, way) == wrong  # nothing is put right in silence
    is_empty = wrong in ([], {}) and not isinstance(wrong, bool)
    assert is_empty or way[0] in FREE or isinstance(wrong, int), f"{way} took {wrong!r}"


@given(st.sampled_from([w for w in WAYS if isinstance(at(document(), w), (int, float))]), st.floats(width=64))
def test_whatever_number_is_taken_costs_stay_finite_and_positive(tmp_path_factory, way, number):
    value = document()
    at(value, way[:-1])[way[-1]] = number
    profile = loaded(written(tmp_path_factory.mktemp("fuzz"), json.dumps(value)), way)
    if profile is None:
        return
    for n in (1, 3, 8, 4000):
        seconds = profile.time_s("CPU", work.ffn(n, 100, 200, "float32")).seconds
        assert math.isfinite(seconds)
        assert seconds > 0


@given(st.integers(0, len(json.dumps(document())) - 1))
def test_a_file_cut_short_anywhere_is_refused(tmp_path_factory, length):
    refusal(written(tmp_path_factory.mktemp("cut"), json.dumps(document())[:length]))


@given(st.binary(max_size=200))
def test_bytes_that_are_no_profile_are_refused(tmp_path_factory, content):
    refusal(written(tmp_path_factory.mktemp("bytes"), content))


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=5), inner, max_size=4),
)


@given(JSON)
def test_foreign_json_is_refused(tmp_path_factory, value):
    assert "expected" in refusal(written(tmp_path_factory.mktemp("foreign"), json.dumps(value)))


@pytest.mark.parametrize("version", [0, 2, -1, "1", None, True, 1.5, [1]])
def test_another_version_is_refused_with_what_this_program_reads(version, tmp_path):
    found = refusal(written(tmp_path, json.dumps({**document(), "version": version})))
    assert "this program reads version 1" in found


def test_a_folder_an_absent_file_and_one_that_may_not_be_read_are_refused(tmp_path):
    assert "Is a directory" in refusal(tmp_path)
    assert "No such file" in refusal(tmp_path / "nothing.json")
    path = written(tmp_path, json.dumps(document()))
    path.chmod(0)
    if not os.access(path, os.R_OK):
        assert "Permission denied" in refusal(path)


@pytest.mark.parametrize(
    ("way", "wrong", "message"),
    [
        (("curves", 0, "dtype"), "fp8", r"curves[0]: dtype names 'fp8'; expected float32, bfloat16, float16"),
        (("peaks", "CPU", "flops_per_s", "int3"), 1e9, "peaks.CPU: flops_per_s names 'int3'; expected float32"),
        (("curves", 0, "threads"), -1, "curves[0]: threads is -1, must not be negative"),
        (("sources", "watts"), "measured", "sources names 'watts'; numbers here are vram_bytes, host_bytes"),
        (("vram_bytes",), 2**63, ".vram_bytes: found 9223372036854775808, expected a number of at most 63 bits"),
        (("host_bytes",), 10**400, ".host_bytes: found a whole number of 1329 bits, expected"),
        (("handoff_s", "CPU>GPU"), 1e300, ".handoff_s.CPU>GPU: found 1e+300, expected 0 or a size between 1e-30 and"),
        (("peaks", "CPU", "efficiency"), 1e-300, ".peaks.CPU.efficiency: found 1e-300, expected 0 or a size between"),
    ],
)
def test_what_would_be_ignored_or_overflow_later_is_refused_now(way, wrong, message, tmp_path):
    value = document()
    at(value, way[:-1])[way[-1]] = wrong
    assert message in refusal(written(tmp_path, json.dumps(value)))


def test_a_list_nested_too_deep_is_refused(tmp_path):
    refusal(written(tmp_path, "[" * 100_000))


def test_a_field_written_twice_is_refused(tmp_path):
    text = json.dumps(document()).replace('"vram_bytes": 100', '"vram_bytes": 100, "vram_bytes": 900')
    assert "'vram_bytes' stands there twice" in refusal(written(tmp_path, text))


def test_the_command_line_says_it_in_a_line(tmp_path, capsys):
    path = written(tmp_path, json.dumps({**document(), "host_bytes": "lots"}))
    assert main(["hardware", str(path)]) != 0
    told = capsys.readouterr().err
    assert "hw.json.host_bytes: expected a whole number, found 'lots'" in told
    assert "Traceback" not in told


def test_a_format_error_is_an_error_of_this_program():
    assert issubclass(FormatError, ScheInferError)
