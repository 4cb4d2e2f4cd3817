"""One clear error for a value that a key cannot have."""

import difflib
from collections.abc import Iterable


def closest(word: str, choices: Iterable[str]) -> str:
    """'; did you mean "x"?' when ``word`` looks like a misspelling of one of ``choices``, else an empty string."""
    matches = difflib.get_close_matches(word, list(choices), n=1)
    return f'; did you mean "{matches[0]}"?' if matches else ""


def check_one_of(key: str, value: object, choices: tuple[str, ...], *, section: str = "teacher") -> None:
    """Raise a ValueError that lists ``choices`` unless ``value`` is one of them."""
    if value not in choices:
        names = ", ".join(f'"{choice}"' for choice in choices)
        raise ValueError(f"[{section}] {key} = {value!r} is unknown: use one of {names}{closest(str(value), choices)}")


def check_number(
    key: str,
    value: object,
    *,
    above: float | None = None,
    at_least: float | None = None,
    below: float | None = None,
    at_most: float | None = None,
    whole: bool = False,
    finite: bool = True,
    section: str = "teacher",
) -> None:
    """Raise a ValueError that states the bounds unless ``value`` is a number within them; a bool is not a number."""
    types = (int,) if whole else (int, float)
    good = isinstance(value, types) and not isinstance(value, bool) and value == value
    good = good and (not finite or abs(value) != float("inf"))  # type: ignore[arg-type]
    if good:
        assert isinstance(value, (int, float))
        good = (
            (above is None or value > above)
            and (at_least is None or value >= at_least)
            and (below is None or value < below)
            and (at_most is None or value <= at_most)
        )
    if not good:
        bounds = [
            f"{text} {bound}"
            for text, bound in (("above", above), ("at least", at_least), ("below", below), ("at most", at_most))
            if bound is not None
        ]
        noun = "a whole number" if whole else "a number"
        raise ValueError(
            f"[{section}] {key} = {value!r}: it must be {noun}{' ' if bounds else ''}{' and '.join(bounds)}"
        )
