"""Configurations as TOML, read again by a parser."""

import math
import sys
from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from titan_attent.foundations.toml import to_toml

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

TEXTS = st.text(st.characters(codec="utf-8"), max_size=8)
SCALARS = st.booleans() | st.integers(-(2**62), 2**62) | st.floats(allow_nan=False) | TEXTS
VALUES = st.recursive(SCALARS, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXTS, inner, max_size=3))


@given(st.dictionaries(TEXTS, VALUES, max_size=4))
def test_a_parser_reads_what_was_written(section: dict[str, Any]) -> None:
    assert tomllib.loads(to_toml({"one": section, "two": {}})) == {"one": section, "two": {}}


def test_what_toml_lacks() -> None:
    found = tomllib.loads(to_toml({"a": {"none": None, "table": {"none": None, "one": 1}, "nan": math.nan}}))
    assert math.isnan(found["a"].pop("nan")) and found == {"a": {"table": {"one": 1}}}
