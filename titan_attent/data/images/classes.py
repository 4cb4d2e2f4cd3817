"""The classes of a data set, their order, and the class index of a label as an input gives it."""

from collections.abc import Sequence

from titan_attent.data.images.examples import Bad, Input, Label
from titan_attent.data.images.format import check_classes

MAX_UNNAMED_CLASSES = 100_000
"""Largest number of classes inferred from numeric labels alone: one wrong label must not give a billion classes."""
_GIVE = "give the classes in order with --classes"
_MAX_DIGITS = 18


def find_classes(inputs: Sequence[Input], *, given: Sequence[str] | None) -> tuple[str, ...]:
    """The names of the classes in the order of their indices. The first of these that applies:

    1. ``given``.
    2. The ordered lists of the inputs that have one, which must all be equal.
    3. The names of the folders and labels, sorted; by value if all of them are numbers.
    4. For numeric labels ``0``, ``1``, ... up to the largest.

    Raises:
        ValueError: the names are malformed, or the inputs do not determine them.
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
    labels = {label for item in inputs for label in (item.labels() if item.names is None else item.names)}
    texts = sorted(label for label in labels if isinstance(label, str))
    numbers = [label for label in labels if isinstance(label, int)]
    if texts and numbers:
        raise ValueError(f"some labels are names ({_short(texts)}) and others are numbers; {_GIVE}")
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
    largest = max(numbers)
    if not 0 <= largest < MAX_UNNAMED_CLASSES:
        raise ValueError(f"the largest label is {str(largest)[:40]}; {_GIVE}")
    return tuple(str(number) for number in range(largest + 1))


def as_integer(label: Label) -> int | None:
    """The integer that a label is or spells; None for other texts."""
    if isinstance(label, int):
        return label
    digits = label[1:] if label.startswith("-") else label
    return int(label) if digits.isdecimal() and len(digits) <= _MAX_DIGITS else None


class Classes:
    """Maps labels to class indices.

    A numeric label is the index of a class. If all class names are numbers, it is a name instead: among 0, 1, 10, 11, 2
    the label 2 is the last class. If only some names are numbers, and one of these differs from its index, a numeric
    label is refused.

    Args:
        names: names of the classes, in order.
    """

    def __init__(self, names: Sequence[str]):
        self.names = names
        self._by_name = {name: index for index, name in enumerate(names)}
        values = [as_integer(name) for name in names]
        self._numbers_are_indices = all(value in (None, index) for index, value in enumerate(values))
        self._names_are_numbers = None not in values and len(set(values)) == len(values)
        self._by_value = {value: index for index, value in enumerate(values)}

    def index(self, label: Label) -> int:
        """The class index of a label: a name, or a number, possibly as text. ValueError if unknown or ambiguous."""
        if isinstance(label, str) and label in self._by_name:
            return self._by_name[label]
        value = as_integer(label)
        if value is not None and self._numbers_are_indices:
            if not 0 <= value < len(self.names):
                raise ValueError(f"label {value} is outside [0, {len(self.names)}), the classes")
            return value
        if value is not None and not self._names_are_numbers:
            raise ValueError(
                f"label {value} may be the name or the index of a class ({_short(self.names)}): write labels as names"
            )
        if value is None or value not in self._by_value:
            shown = repr(label) if len(repr(label)) <= 80 else f"{repr(label)[:80]}..."
            raise ValueError(f"label {shown} is not one of the classes ({_short(self.names)})")
        return self._by_value[value]


def _short(names: Sequence[str]) -> str:
    return ", ".join(names[:5]) + (f", ... {len(names)} in all" if len(names) > 5 else "")
