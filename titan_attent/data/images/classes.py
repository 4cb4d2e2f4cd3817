"""The classes of a data set: which there are, in which order, and the number of a label as an input gives it."""

from collections.abc import Sequence

from titan_attent.data.images.examples import Bad, Input, Label
from titan_attent.data.images.format import check_classes

MOST_UNNAMED = 100_000
"""Classes that labels of numbers alone may make up: one wild label must not become a billion classes."""
_GIVE = "give the classes in order with --classes"
_MOST_DIGITS = 18


def find_classes(inputs: Sequence[Input], *, given: Sequence[str] | None) -> tuple[str, ...]:
    """The names of the classes, whose order numbers them.

    Those ``given``; or those that the inputs list in order, if all that do agree; or else the names that folders and
    labels have, sorted, as numbers if all are numbers; or, where labels are numbers, ``0``, ``1``, ... up to the
    largest.

    Raises:
        ValueError: the names are malformed, or the inputs leave them open.
    """
    if given is not None:
        check_classes(given)
        return tuple(given)
    lists = {tuple(item.names) for item in inputs if item.ordered and item.names is not None}
    if len(lists) > 1:
        first, second = sorted(lists)[:2]
        raise ValueError(f"the inputs list different classes, {_short(first)} and {_short(second)}; {_GIVE}")
    if lists:
        (names,) = lists
        check_classes(names)
        return names
    found = {label for item in inputs for label in (item.labels() if item.names is None else item.names)}
    texts = sorted(label for label in found if isinstance(label, str))
    numbers = [label for label in found if isinstance(label, int)]
    if texts and numbers:
        raise ValueError(f"the labels are names ({_short(texts)}) as well as numbers; {_GIVE}")
    if texts:
        values = [as_integer(text) for text in texts]
        if None not in values:
            texts = [text for _, text in sorted(zip(values, texts, strict=True))]
        return tuple(texts)
    if not numbers:
        any_example = next((example for item in inputs for example in item.examples()), None)
        bad = next((example for item in inputs for example in item.examples() if isinstance(example, Bad)), None)
        if any_example is None:
            paths = ", ".join(str(item.path) for item in inputs)
            raise ValueError(f"no image in {paths}; give inputs that hold images")
        why = f" ({bad.where}: {bad.problem}; {bad.fix})" if bad else ""
        raise ValueError(f"no input has a label{why}; {_GIVE}")
    most = max(numbers)
    if not 0 <= most < MOST_UNNAMED:
        raise ValueError(f"the largest label is {str(most)[:40]}; {_GIVE}")
    return tuple(str(number) for number in range(most + 1))


def as_integer(label: Label) -> int | None:
    """A number, or the number that a text is; None for other texts."""
    if isinstance(label, int):
        return label
    digits = label[1:] if label.startswith("-") else label
    return int(label) if digits.isdecimal() and len(digits) <= _MOST_DIGITS else None


class Classes:
    """Labels to numbers of classes.

    A number is the place of a class. Where the names are numbers themselves, it is a name: among 0, 1, 10, 11, 2 the
    label 2 is the last one. Where some names are numbers other than their places and some are none, it is refused.

    Args:
        names: of the classes, in order.
    """

    def __init__(self, names: Sequence[str]):
        self.names = names
        self._numbers = {name: number for number, name in enumerate(names)}
        values = [as_integer(name) for name in names]
        self._are_places = all(value in (None, place) for place, value in enumerate(values))
        self._are_numbers = None not in values and len(set(values)) == len(values)
        self._by_value = {value: place for place, value in enumerate(values)}

    def number(self, label: Label) -> int:
        """Of a name, or of a number, which may be a text; ValueError if it is none of the classes, or not clear."""
        if isinstance(label, str) and label in self._numbers:
            return self._numbers[label]
        value = as_integer(label)
        if value is not None and self._are_places:
            if not 0 <= value < len(self.names):
                raise ValueError(f"label {value} is outside [0, {len(self.names)}), the classes")
            return value
        if value is not None and not self._are_numbers:
            raise ValueError(
                f"label {value} may be the name or the place of a class ({_short(self.names)}): write labels as names"
            )
        if value is None or value not in self._by_value:
            shown = repr(label) if len(repr(label)) <= 80 else f"{repr(label)[:80]}..."
            raise ValueError(f"label {shown} is none of the classes ({_short(self.names)})")
        return self._by_value[value]


def _short(names: Sequence[str]) -> str:
    return ", ".join(names[:5]) + (f", ... {len(names)} in all" if len(names) > 5 else "")
