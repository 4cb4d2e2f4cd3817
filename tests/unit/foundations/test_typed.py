"""typed.py and versioned_json.py: values of JSON against the types that a dataclass declares."""

import contextlib
import json
from dataclasses import asdict, dataclass, field
from typing import Any, NamedTuple

import pytest
from hypothesis import given
from hypothesis import strategies as st

from titan_attent.foundations import versioned_json
from titan_attent.foundations.typed import typed
from titan_attent.foundations.versioned_json import read_json_object, read_versioned


class Slot(NamedTuple):
    file: int = 0
    row: int = 0


@dataclass
class Part:
    name: str
    count: int = 0


@dataclass
class Whole:
    parts: tuple[Part, ...]
    share: float
    place: Slot = Slot()
    height: int | None = None
    counts: dict[str, int] = field(default_factory=dict)
    names: list[str] = field(default_factory=list)
    other: dict[str, Any] = field(default_factory=dict)


GOOD = {"parts": [{"name": "a", "count": 3}], "share": 0.5}


def test_a_dataclass_survives_json():
    whole = Whole((Part("a", 2**63 - 1), Part("b")), 1.5, Slot(1, 2), 7, {"x": 1}, ["n"], {"deep": [1, {"y": None}]})
    assert typed(Whole, json.loads(json.dumps(asdict(whole)))) == whole
    assert typed(Whole, GOOD) == Whole((Part("a", 3),), 0.5)
    assert typed(Whole, {**GOOD, "share": 1}).share == 1.0


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"parts": 3}, "parts is 3, of type int: expected a list"),
        ({"parts": ["a"]}, r"parts\[0\] is 'a', of type str: expected an object"),
        ({"parts": [{"count": 1}]}, r"parts\[0\]: has no field 'name'"),
        ({"parts": [{"name": "a", "size": 1}]}, r"parts\[0\]: has the unknown field 'size'"),
        ({"parts": [{"name": 5}]}, r"parts\[0\].name is 5, of type int: expected string"),
        *(
            ({"parts": [{"name": "a", "count": value}]}, r"parts\[0\].count is.* expected a (whole )?number")
            for value in (3.0, True, "3", None, [3], 2**63, -(2**63), float("nan"), float("inf"))
        ),
        *(({"share": value}, "share is.* a finite number") for value in (float("nan"), float("-inf"), 10**400, "1")),
        ({"place": [1]}, "place is of type list: expected a list of 2"),
        ({"place": [1, 2.0]}, r"place\[1\] is 2.0, of type float: expected a whole number"),
        ({"height": 1.0}, "height is 1.0"),
        ({"counts": {"x": "y"}}, r"counts\['x'\] is 'y'"),
        ({"counts": [1]}, "counts is of type list: expected an object"),
        ({"names": {"a": 1}}, "names is of type dict: expected a list"),
        ({"surplus": 1}, "has the unknown field 'surplus'"),
    ],
)
def test_another_type_is_one_error_that_names_the_field(change, message):
    with pytest.raises(ValueError, match=message):
        typed(Whole, {**GOOD, **change})


@given(
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=3),
        lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(list("ab")), inner, max_size=3),
        max_leaves=8,
    ),
    st.sampled_from(["parts", "share", "place", "height", "counts", "names", "other"]),
)
def test_no_value_raises_another_error_than_a_value_error(value, name):
    with contextlib.suppress(ValueError):
        typed(Whole, {**GOOD, name: value})


def test_a_file_that_is_nested_deeply_or_large_is_one_error(tmp_path, monkeypatch):
    path = tmp_path / "x.json"
    path.write_text('{"format": "f", "version": 1, "a": ' + "[" * 100_000 + "]" * 100_000 + "}")
    with pytest.raises(ValueError, match=r"x.json: not a file with a JSON object .*\(is nested too deeply\); fix it"):
        read_versioned(path, format="f", versions=(1,), fix="fix it")
    path.write_text('{"format": "f", "version": 1, "a": 2}')
    assert read_versioned(path, format="f", versions=(1,), fix="fix it") == {"a": 2}
    monkeypatch.setattr(versioned_json, "MAX_BYTES", 10)
    with pytest.raises(ValueError, match="has 37 bytes, more than the 10 bytes that are accepted"):
        read_versioned(path, format="f", versions=(1,), fix="fix it")
    with pytest.raises(ValueError, match="holds a list where an object"):
        path.write_text("[1]")
        read_json_object(path)


@pytest.mark.parametrize("version", [True, 1.0, [1], {"a": 1}, "1"])
def test_a_version_of_another_type(tmp_path, version):
    path = tmp_path / "x.json"
    path.write_text(json.dumps({"format": "f", "version": version}))
    with pytest.raises(ValueError, match="expected format 'f' version 1; use the package version that wrote it"):
        read_versioned(path, format="f", versions=(1,), fix="fix it")


def test_another_format_asks_for_another_folder(tmp_path):
    path = tmp_path / "x.json"
    path.write_text(json.dumps({"format": "g", "version": 1}))
    with pytest.raises(ValueError, match="reads 'g', give a folder of the expected format, or fix it"):
        read_versioned(path, format="f", versions=(1,), fix="fix it")
