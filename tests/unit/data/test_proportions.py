"""[data.sources]: its words, the proportions that follow, and what is refused before anything heavy."""

from fractions import Fraction
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from titan_attent.data.plan.proportions import UNITS, Point, Proportions, check_of, parse_sources, proportions_of

TOKENS = {"web": 6000, "code": 3000, "books": 1000}


def parsed(**section: Any) -> Proportions:
    return proportions_of(parse_sources(section), TOKENS, where="data")


def shares(found: Proportions, step: int) -> list[float]:
    return [units / UNITS for units in found.at(step)]


def test_proportions_repeats_and_choices() -> None:
    given = parsed(code={"proportion": 0.3}, web={"proportion": 0.6}, books={"proportion": 0.1})
    assert given.names == ("web", "code", "books") and shares(given, 7) == pytest.approx([0.6, 0.3, 0.1])
    # An epoch of 6,000 + 2 x 3,000 + 4,000 tokens: books four times.
    assert shares(parsed(code={"repeat": 2}, books={"choose": 4000}), 1) == pytest.approx([6 / 16, 6 / 16, 4 / 16])
    assert shares(parsed(web={"repeat": 0.5}), 1) == pytest.approx([3 / 7, 3 / 7, 1 / 7])
    assert shares(parsed(web={"choose": 0}, books={"repeat": 0.0}), 1) == [0.0, 1.0, 0.0]


def test_a_schedule_is_linear_between_its_steps_and_constant_outside() -> None:
    found = parsed(
        web={"proportion": [[100, 0.6], [200, 0.2]]},
        code={"proportion": [[100, 0.3], [150, 0.4], [200, 0.6]]},
        books={"proportion": [[100, 0.1], [150, 0.2], [200, 0.2]]},
    )
    for step in (1, 100, 101, 137, 150, 151, 199, 200, 5000):
        expected = [
            np.interp(step, [100, 200], [0.6, 0.2]),
            np.interp(step, [100, 150, 200], [0.3, 0.4, 0.6]),
            np.interp(step, [100, 150, 200], [0.1, 0.2, 0.2]),
        ]
        assert shares(found, step) == pytest.approx(expected, abs=1e-9)
        assert sum(found.at(step)) == UNITS


@given(
    st.lists(st.tuples(st.integers(0, 60), st.integers(0, 9), st.integers(1, 9)), min_size=1, max_size=5),
    st.integers(1, 80),
)
def test_the_sums_over_a_run_are_those_of_its_steps(points: list[tuple[int, int, int]], steps: int) -> None:
    by_step = {step: (a, b) for step, a, b in points}
    pairs = [(step, a / (a + b)) for step, (a, b) in sorted(by_step.items())]
    found = Proportions(
        ("a", "b"), (tuple(Point(*pair) for pair in pairs), tuple(Point(step, 1 - p) for step, p in pairs))
    )
    exact = [sum(Fraction(found.at(step)[i], UNITS) for step in range(1, steps + 1)) for i in range(2)]
    assert [float(x) for x in found.sums(steps)] == pytest.approx([float(x) for x in exact], abs=1e-6)
    assert sum(found.sums(steps)) == steps


@pytest.mark.parametrize(
    ("section", "message"),
    [
        ({"web": 0.5}, r"web = 0.5: write web = { proportion = 0.5 }"),
        ({"web": {}}, r"web has no word: give a source exactly one of proportion, repeat, choose"),
        ({"web": {"proportion": 0.5, "repeat": 2}}, r"web has proportion and repeat: give a source exactly one"),
        ({"web": {"propotion": 0.5}}, r'unknown word "propotion"; did you mean "proportion"'),
        ({"web": {"proportion": -0.5}}, r"\[data.sources.web\] proportion = -0.5: it must be a number at least 0"),
        ({"web": {"proportion": 1.5}}, r"proportion = 1.5: it must be a number at least 0 and at most 1"),
        ({"web": {"proportion": "half"}}, r"proportion = 'half': it must be a number"),
        ({"web": {"proportion": True}}, r"proportion = True: it must be a number"),
        ({"web": {"proportion": []}}, r"proportion = \[\]: write \[\[STEP, PROPORTION\], ...\]"),
        ({"web": {"proportion": [0.5, 0.4]}}, r"write \[\[STEP, PROPORTION\], ...\]"),
        ({"web": {"proportion": [[9, 0.5], [9, 0.4]]}}, r"step 9 stands behind step 9: give the steps in ascending"),
        ({"web": {"proportion": [[9, 0.5], [3, 0.4]]}}, r"step 3 stands behind step 9"),
        ({"web": {"proportion": [[-1, 0.5]]}}, r"the step = -1: it must be a whole number at least 0"),
        ({"web": {"repeat": -1}}, r"repeat = -1: it must be a number at least 0"),
        ({"web": {"choose": 2.5}}, r"choose = 2.5: it must be a whole number at least 0"),
        ({"web": {"choose": float("inf")}}, r"choose = inf: it must be a whole number"),
        ({"a b": {"repeat": 1}}, r"'a b': the name of a source has only letters"),
        ({"web": {"proportion": 0.5}, "code": {"repeat": 1}}, r"web has a proportion and code has repeat"),
        (0.5, r"\[data.sources\] = 0.5: write"),
    ],
)
def test_malformed_words_are_refused(section: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        parse_sources(section)


@pytest.mark.parametrize(
    ("section", "message"),
    [
        ({"wbe": {"repeat": 1}}, r'"wbe" is no source of \[data\] path = data; did you mean "web".*web, code, books'),
        ({"web": {"proportion": 1}}, r"names no proportion of code, books: name all sources"),
        (
            {"web": {"proportion": 0.5}, "code": {"proportion": 0.3}, "books": {"proportion": 0.1}},
            r"the proportions have the sum 0.9: make it 1",
        ),
        (
            {"web": {"proportion": [[0, 0.9], [50, 0.5]]}, "code": {"proportion": 0.1}, "books": {"proportion": 0}},
            r"the sum 0.6 at step 50: make it 1",
        ),
        (dict.fromkeys(TOKENS, {"repeat": 0}), r"leaves nothing to train"),
        ({"empty": {"choose": 5}}, r'"empty" holds no example, so there is nothing to choose'),
    ],
)
def test_words_that_do_not_fit_the_data_are_refused(section: dict[str, Any], message: str) -> None:
    tokens = TOKENS | ({"empty": 0} if "empty" in section else {})
    with pytest.raises(ValueError, match=message):
        proportions_of(parse_sources(section), tokens, where="data")


def test_what_proportions_are_of() -> None:
    check_of("trained")
    with pytest.raises(ValueError, match="proportions_of = 'all' is unknown"):
        check_of("all")
