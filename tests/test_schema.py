"""Dataclasses to JSON and back; what is wrong with a file is said with its place."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, field
from typing import Any, Literal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hwmodels.errors import FormatError
from hwmodels.schema import check_header, digest, from_json, read_json, to_json, write_bytes, write_json, write_text


@dataclass(frozen=True)
class Leaf:
    kind: Literal["oak", "elm"]
    width_m: float

    def __post_init__(self) -> None:
        if self.width_m < 0:
            raise ValueError(f"width_m is {self.width_m}, must not be negative")


@dataclass(frozen=True)
class Tree:
    age_years: int
    leaves: tuple[Leaf, ...]
    size: tuple[float, float]
    name: str | None = None
    tags: dict[str, bool] = field(default_factory=dict)


GOOD: dict[str, Any] = {
    "age_years": 7,
    "leaves": [{"kind": "oak", "width_m": 0.1}],
    "size": [1.0, 2],
    "tags": {"a": True},
}

sizes = st.just(0.0) | st.floats(1e-30, 1e30) | st.floats(-1e30, -1e-30)
leaves = st.builds(Leaf, st.sampled_from(["oak", "elm"]), st.just(0.0) | st.floats(1e-30, 1e9))
trees = st.builds(
    Tree,
    st.integers(-(2**63), 2**63 - 1),
    st.lists(leaves, max_size=3).map(tuple),
    st.tuples(sizes, sizes),
    st.none() | st.text(),
    st.dictionaries(st.text(), st.booleans(), max_size=3),
)


@given(trees)
def test_a_value_survives_a_file(tree):
    assert from_json(Tree, json.loads(json.dumps(to_json(tree))), "tree") == tree


@given(trees, trees)
def test_digests_are_equal_for_equal_values_only(one, other):
    assert (digest(one) == digest(other)) == (to_json(one) == to_json(other))


def test_a_whole_number_may_stand_for_a_float():
    assert from_json(Tree, GOOD, "tree").size == (1.0, 2.0)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"age_years": "seven"}, r"t.json.age_years: expected a whole number, found 'seven'"),
        ({"age_years": 7.5}, r"t.json.age_years: expected a whole number, found 7.5"),
        ({"age_years": True}, r"t.json.age_years: expected a whole number, found True"),
        ({"size": [1.0]}, r"t.json.size: expected 2 entries, found 1"),
        ({"size": [1.0, math.nan]}, r"t.json.size\[1\]: expected a finite number, found nan"),
        ({"size": {"x": 1}}, r"t.json.size: expected a list, found"),
        (
            {"leaves": [{"kind": "ash", "width_m": 1}]},
            r"t.json.leaves\[0\].kind: found 'ash', expected one of 'oak', 'elm'",
        ),
        ({"leaves": [{"kind": "oak"}]}, r"t.json.leaves\[0\]: field 'width_m' is missing"),
        ({"leaves": [{"kind": "oak", "width_m": -1}]}, r"t.json.leaves\[0\]: width_m is -1.0, must not be negative"),
        ({"leaves": ["oak"]}, r"t.json.leaves\[0\]: expected an object \(Leaf\), found 'oak'"),
        ({"height_m": 3}, r"t.json: unknown field 'height_m'; known: age_years, leaves, size, name, tags"),
        ({"name": 5}, r"t.json.name: expected a text, found 5"),
        ({"tags": {"a": 1}}, r"t.json.tags.a: expected true or false, found 1"),
        ({"tags": []}, r"t.json.tags: expected an object, found \[\]"),
    ],
)
def test_what_is_wrong_is_said_with_its_place(change, message):
    with pytest.raises(FormatError, match=message):
        from_json(Tree, GOOD | change, "t.json")


def test_a_value_that_is_long_is_not_quoted_whole():
    with pytest.raises(FormatError) as error:
        from_json(Tree, GOOD | {"age_years": "x" * 10_000}, "t.json")
    assert len(str(error.value)) < 200


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ([], "expected an object with schema 'tree'"),
        ({"schema": "bush", "version": 1}, "schema is 'bush', expected 'tree'; is this the right file"),
        ({"schema": "tree", "version": 0}, "version 0 of tree, this program reads version 1; write it anew"),
        ({"schema": "tree"}, "version None of tree"),
    ],
)
def test_a_file_of_another_kind_or_version_is_refused(value, message):
    with pytest.raises(FormatError, match=message):
        check_header(value, "tree", 1, "t.json")


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(FormatError, match=r"cannot read profile '.*none.json': No such file"):
        read_json(tmp_path / "none.json", "profile")


@pytest.mark.parametrize("content", [b"", b"{", b"\xff\xfe\x00", b"[" * 100_000])
def test_a_file_that_is_not_json_is_refused(tmp_path, content):
    path = tmp_path / "bad.json"
    path.write_bytes(content)
    with pytest.raises(FormatError, match="bad.json"):
        read_json(path, "profile")


def test_json_is_written_without_nan(tmp_path):
    with pytest.raises(ValueError, match="JSON"):
        write_json(tmp_path / "x.json", {"a": math.nan})


def test_a_file_is_written_whole_or_not_at_all(tmp_path, monkeypatch):
    path = tmp_path / "new" / "x.txt"
    write_text(path, "old ä")
    monkeypatch.setattr("os.replace", lambda *_: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    with pytest.raises(FormatError, match="cannot write .*No space left on device"):
        write_bytes(path, b"new")
    assert path.read_text(encoding="utf-8") == "old ä"
    assert list(path.parent.iterdir()) == [path]


def test_a_folder_that_cannot_be_made_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(FormatError, match="cannot write"):
        write_text(tmp_path / "file" / "x.txt", "")
