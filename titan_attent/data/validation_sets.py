"""The validation data sets of a run: one folder, or several with names and weights.

    [data.validation_sets]
    web = { path = "data/validation/web" }
    code = { path = "data/validation/code", weight = 2.0 }

It imports no torch, so that a mistake is told before that.
"""

from collections.abc import Collection, Mapping, Sequence
from typing import Any, NamedTuple

from titan_attent.data.io.folder import is_source_name
from titan_attent.foundations.checks import check_number, closest

SECTION = "data.validation_sets"
KEYS = ("path", "weight")


class ValidationSet(NamedTuple):
    """A validation data set.

    Attributes:
        name: in its tags; empty for the single set of ``data.validation_path``.
        path: its folder.
        weight: of its loss in the mean of all sets.
    """

    name: str
    path: str
    weight: float = 1.0

    @property
    def key(self) -> str:
        """The key of its folder in the section ``[data]``."""
        return f"validation_sets.{self.name}" if self.name else "validation_path"

    def tag(self, tag: str) -> str:
        """The tag of one of its metrics: ``tag/NAME``."""
        return f"{tag}/{self.name}" if self.name else tag


def validation_sets(data: Any) -> tuple[ValidationSet, ...]:
    """The validation sets of the section ``[data]``, in its order; none if it names none.

    Raises:
        ValueError: ``validation_sets`` is malformed, or ``validation_path`` is given as well.
    """
    path, named = data.validation_path, data.validation_sets
    if not named:
        return (ValidationSet("", path),) if path else ()
    if path:
        raise ValueError(
            f"[data] validation_path = {path} beside [{SECTION}]: name that folder there, too, or remove one of the two"
        )
    sets = tuple(_parse(name, keys) for name, keys in named.items())
    if not any(one.weight for one in sets):
        raise ValueError(f"[{SECTION}]: all weights are 0, so there is no mean: give one set a weight above 0")
    return sets


def _parse(name: str, keys: object) -> ValidationSet:
    if not is_source_name(name):
        raise ValueError(f"[{SECTION}] {name!r}: a name has only letters, digits, _, . and -, as it is part of a tag")
    if not isinstance(keys, Mapping):
        raise ValueError(f'[{SECTION}] {name} = {keys!r}: write {name} = {{ path = "FOLDER", weight = 1.0 }}')
    if unknown := sorted(keys.keys() - set(KEYS)):
        raise ValueError(
            f'[{SECTION}] {name}: unknown key "{unknown[0]}"{closest(unknown[0], KEYS) or "."} '
            f"Its keys are {', '.join(KEYS)}"
        )
    path, weight = keys.get("path", ""), keys.get("weight", 1.0)
    if not isinstance(path, str) or not path:
        raise ValueError(f"[{SECTION}] {name}: path = {path!r}: give the folder of a data set")
    check_number("weight", weight, at_least=0, section=f"{SECTION}.{name}")
    return ValidationSet(name, path, float(weight))


def mean_of_sets(sets: Sequence[ValidationSet], values: Mapping[str, float]) -> float | None:
    """The mean of a metric over the sets by their weights; None if a set of a weight above 0 lacks it.

    Args:
        values: name of a set -> its value.
    """
    counted = [one for one in sets if one.weight]
    if any(one.name not in values for one in counted):
        return None
    return sum(one.weight * values[one.name] for one in counted) / sum(one.weight for one in counted)


def common(names: Sequence[Collection[str]]) -> list[str]:
    """The metrics that all sets have, in the order of the first."""
    return [name for name in names[0] if all(name in others for others in names)]
