"""The proportions of the data sources in a run, from ``[data.sources]``: one word per source.

    [data.sources]
    web = { proportion = 0.7 }                                a share of the tokens that are trained
    code = { proportion = [[8000, 0.3], [10000, 0.1]] }       the same, linear between steps: 0.3 until step 8,000
    books = { repeat = 2.0 }                                  passes over the source per epoch of the mixture
    forum = { choose = 5_000_000 }                            tokens of the source per epoch of the mixture

``proportion`` says what every step trains, so a run with it names all sources, and the proportions have the sum 1 at
every step. ``repeat`` and ``choose`` say how much of each source an epoch of the mixture holds, and a source that is
not named is in it once; its proportions follow from these amounts and the sizes of the sources. The words are those of
MosaicML's streams, where ``choose`` counts samples.

The module imports no torch, so that a mistake is told before that. Proportions are whole numbers of ``UNITS``, so that
all ranks, and every machine, compute the same ones.
"""

from bisect import bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import cached_property
from typing import NamedTuple

from titan_attent.data.io.folder import is_source_name
from titan_attent.foundations.checks import check_number, check_one_of, closest

SECTION = "data.sources"
PROPORTION, REPEAT, CHOOSE = WORDS = ("proportion", "repeat", "choose")
TRAINED, CANDIDATES = OF = ("trained", "candidates")
"""The values of ``[data] proportions_of``."""

UNITS = 1 << 40
"""The proportion 1."""
TOLERANCE = 1e-6
"""The largest difference of the sum of all proportions from 1."""


class Point(NamedTuple):
    """The proportion of a source in a training step."""

    step: int
    proportion: float


class Word(NamedTuple):
    """What ``[data.sources]`` says of one source.

    Attributes:
        word: one of ``WORDS``.
        points: of a proportion, with ascending steps; a constant one has the step 0.
        amount: of the other words.
    """

    word: str
    points: tuple[Point, ...] = ()
    amount: Fraction = Fraction(0)


def parse_sources(section: object) -> dict[str, Word]:
    """The words of the section ``[data.sources]``, by source; empty without it.

    Raises:
        ValueError: a source has no word, more than one, or a value that is none; proportions stand beside other words.
    """
    if not isinstance(section, Mapping):
        raise ValueError(f"[{SECTION}] = {section!r}: write [{SECTION}], and below it NAME = {{ proportion = 0.5 }}")
    words = {name: _parse(name, keys) for name, keys in section.items()}
    with_proportion = [name for name, word in words.items() if word.word == PROPORTION]
    others = [name for name in words if name not in with_proportion]
    if with_proportion and others:
        name, word = others[0], words[others[0]].word
        raise ValueError(
            f"[{SECTION}] {with_proportion[0]} has a proportion and {name} has {word}: a proportion is of the tokens "
            f"of every step, {word} is of an epoch of the mixture. Give all sources a proportion, or none"
        )
    return words


def _parse(name: str, keys: object) -> Word:
    if not is_source_name(name):
        raise ValueError(f"[{SECTION}] {name!r}: the name of a source has only letters, digits, _, . and -")
    if not isinstance(keys, Mapping):
        raise ValueError(f"[{SECTION}] {name} = {keys!r}: write {name} = {{ proportion = 0.5 }}")
    for key in keys:
        if key not in WORDS:
            raise ValueError(
                f'[{SECTION}] {name}: unknown word "{key}"{closest(str(key), WORDS) or "."} '
                f"Use one of {', '.join(WORDS)}"
            )
    if len(keys) != 1:
        raise ValueError(
            f"[{SECTION}] {name} has {' and '.join(keys) or 'no word'}: give a source exactly one of {', '.join(WORDS)}"
        )
    ((word, value),) = keys.items()
    where = f"{SECTION}.{name}"
    if word == PROPORTION:
        return Word(word, _parse_points(name, value))
    check_number(word, value, at_least=0, whole=word == CHOOSE, section=where)
    return Word(word, amount=Fraction(str(value)))


def _parse_points(name: str, value: object) -> tuple[Point, ...]:
    where = f"{SECTION}.{name}"
    if not isinstance(value, list):
        check_number(PROPORTION, value, at_least=0, at_most=1, section=where)
        return (Point(0, float(value)),)  # type: ignore[arg-type]
    fix = "write [[STEP, PROPORTION], ...]"
    if not value or not all(isinstance(point, list) and len(point) == 2 for point in value):
        raise ValueError(f"[{where}] {PROPORTION} = {value!r}: {fix}")
    for step, proportion in value:
        check_number(f"{PROPORTION}: the step", step, at_least=0, whole=True, section=where)
        check_number(PROPORTION, proportion, at_least=0, at_most=1, section=where)
    points = tuple(Point(step, float(proportion)) for step, proportion in value)
    for before, after in zip(points, points[1:], strict=False):
        if after.step <= before.step:
            raise ValueError(
                f"[{where}] {PROPORTION}: step {after.step} stands behind step {before.step}: give the steps in "
                "ascending order, each once"
            )
    return points


@dataclass(frozen=True)
class Proportions:
    """The proportions of all sources at every step.

    Attributes:
        names: the sources.
        points: of each source: the proportion is linear between two points, and constant before the first and behind
            the last.
    """

    names: tuple[str, ...]
    points: tuple[tuple[Point, ...], ...]

    @cached_property
    def breakpoints(self) -> tuple[int, ...]:
        """The steps at which a proportion begins or ceases to change, ascending."""
        return tuple(sorted({point.step for points in self.points for point in points}))

    @cached_property
    def _scheduled(self) -> bool:
        return any(len(points) > 1 for points in self.points)

    def at(self, step: int) -> list[int]:
        """The proportions in step number ``step``, in ``UNITS``; their sum is ``UNITS``."""
        return self._constant.copy() if not self._scheduled else self._at(step)

    @cached_property
    def _constant(self) -> list[int]:
        return self._at(0)

    def _at(self, step: int) -> list[int]:
        units = [_interpolated(points, step) for points in self.points]
        units[units.index(max(units))] += UNITS - sum(units)
        return units

    def sums(self, steps: int) -> list[Fraction]:
        """The sum of each source's proportions over the steps 1 to ``steps``: the batches that it fills."""
        edges = [0, *(step for step in self.breakpoints if 0 < step < steps), steps]
        totals = [Fraction(0)] * len(self.names)
        for first, last in zip(edges, edges[1:], strict=False):
            # Linear from first to last: the mean of the values at first + 1 and at last.
            ends = [self.at(first + 1), self.at(last)] if last > first else []
            for i in range(len(totals)):
                totals[i] += Fraction(sum(end[i] for end in ends) * (last - first), 2 * UNITS)
        return totals

    @property
    def used(self) -> list[bool]:
        """Whether each source has a proportion above 0 in some step."""
        return [any(point.proportion for point in points) for points in self.points]


def _interpolated(points: Sequence[Point], step: int) -> int:
    i = bisect_right([point.step for point in points], step)
    if i in (0, len(points)):
        return round(points[min(i, len(points) - 1)].proportion * UNITS)
    (start, low), (stop, high) = points[i - 1], points[i]
    return (round(low * UNITS) * (stop - step) + round(high * UNITS) * (step - start)) // (stop - start)


def proportions_of(words: Mapping[str, Word], tokens: Mapping[str, int], *, where: str = "") -> Proportions:
    """The proportions of a run.

    Args:
        words: from :func:`parse_sources`, not empty.
        tokens: tokens of each source of the data, in the order of the data.
        where: the folder of the data, for messages.

    Raises:
        ValueError: a source is unknown, or not named where proportions are given; the proportions do not have the sum 1
            at some step; a source that is to be trained holds no example.
    """
    known = ", ".join(tokens)
    for name in words:
        if name not in tokens:
            raise ValueError(
                f'[{SECTION}] "{name}" is no source of [data] path = {where}{closest(name, tokens) or "."} '
                f"Its sources are {known}"
            )
    if any(word.word == PROPORTION for word in words.values()):
        if missing := [name for name in tokens if name not in words]:
            raise ValueError(
                f"[{SECTION}] names no proportion of {', '.join(missing)}: name all sources of the data ({known}), "
                "with proportion = 0 for those to leave out"
            )
        found = Proportions(tuple(tokens), tuple(words[name].points for name in tokens))
    else:
        amounts = [_amount(words.get(name), tokens[name]) for name in tokens]
        if not (total := sum(amounts)):
            raise ValueError(f"[{SECTION}] leaves nothing to train: all sources are chosen 0 times")
        found = Proportions(tuple(tokens), tuple((Point(0, float(amount / total)),) for amount in amounts))
    for step in found.breakpoints:
        at_step = sum(_interpolated(points, step) for points in found.points) / UNITS
        if abs(at_step - 1) > TOLERANCE:
            at = f" at step {step}" if len(found.breakpoints) > 1 else ""
            raise ValueError(f"[{SECTION}]: the proportions have the sum {at_step:.6g}{at}: make it 1")
    for name, is_used in zip(found.names, found.used, strict=True):
        if is_used and not tokens[name]:
            raise ValueError(
                f'[{SECTION}] "{name}" holds no example, so there is nothing to choose: give it proportion = 0, or '
                "write more data"
            )
    return found


def _amount(word: Word | None, tokens: int) -> Fraction:
    if word is None:
        return Fraction(tokens)
    return word.amount * tokens if word.word == REPEAT else word.amount


def check_of(value: object) -> None:
    """Refuse a value that ``[data] proportions_of`` cannot have; ValueError."""
    check_one_of("proportions_of", value, OF, section="data")


def rows_of_batch(
    deficits: Sequence[int], proportions: Sequence[int], prices: Sequence[int], *, batch_size: int
) -> list[int]:
    """How many rows of a global batch each source gets.

    A source gets the rows that it lacks to have had exactly its share of all tokens so far, rounded. Of the fractions
    the largest are rounded up.

    Args:
        deficits: the tokens that each source lacks so far, times ``UNITS``; their sum is 0.
        proportions: of this step, in ``UNITS``.
        prices: tokens of a row of each source, at least 1.
        batch_size: the number of rows.
    """
    owed = [deficit / (UNITS * price) for deficit, price in zip(deficits, prices, strict=True)]
    per_token = [share / (UNITS * price) for share, price in zip(proportions, prices, strict=True)]
    tokens = (batch_size - sum(owed)) / sum(per_token)
    exact = [rows + share * tokens for rows, share in zip(owed, per_token, strict=True)]
    rows = [max(0, int(x // 1)) for x in exact]
    missing = batch_size - sum(rows)
    by_fraction = sorted(range(len(rows)), key=lambda i: (rows[i] - exact[i], i))
    while missing > 0:
        for i in [i for i in by_fraction if proportions[i]][:missing]:
            rows[i] += 1
            missing -= 1
    while missing < 0:
        i = max((i for i in range(len(rows)) if rows[i]), key=lambda i: (rows[i] - exact[i], i))
        rows[i] -= 1
        missing += 1
    return rows
