"""The classes of a data set: which there are, in which order, and the number of a label as an input gives it."""

from collections.abc import Sequence

from titan_attent.data.images.examples import Input, Label
from titan_attent.data.images.format import check_classes

MOST_UNNAMED = 100_000
"""Classes that labels of numbers alone may make up: one wild label must not become a billion classes."""
_GIVE = "give the classes in order with --classes"


def find_classes(inputs: Sequence[Input], *, given: Sequence[str] | None) -> tuple[str, ...]:
    """The names of the classes, whose order numbers them.

    Those ``given``; or those that the inputs list in order, if all that do agree; or else the names that folders and
    labels have, sorted, or, where labels are numbers, ``0``, ``1``, ... up to the largest.

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
        return tuple(texts)
    most = max(numbers, default=-1)
    if not 0 <= most < MOST_UNNAMED:
        raise ValueError(f"the largest label is {most}; {_GIVE}" if numbers else f"no input has a label; {_GIVE}")
    return tuple(str(number) for number in range(most + 1))


class Classes:
    """Labels to numbers of classes.

    Args:
        names: of the classes, in order.
    """

    def __init__(self, names: Sequence[str]):
        self.names = names
        self._numbers = {name: number for number, name in enumerate(names)}

    def number(self, label: Label) -> int:
        """Of a name, or of a number, which may be a text; ValueError if it is none of the classes."""
        if isinstance(label, str):
            if label in self._numbers:
                return self._numbers[label]
            if not label.isdecimal():
                raise ValueError(f"label {label!r} is none of the classes ({_short(self.names)})")
            label = int(label)
        if not 0 <= label < len(self.names):
            raise ValueError(f"label {label} is outside [0, {len(self.names)}), the classes")
        return label


def _short(names: Sequence[str]) -> str:
    return ", ".join(names[:5]) + (f", ... {len(names)} in all" if len(names) > 5 else "")
