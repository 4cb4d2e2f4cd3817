"""Coefficients by layer: which factor a weight has, by patterns of its name that need no quotes in a shell.

A pattern is words of a name in order, joined by dots; ``2-5`` stands for any number from 2 to 5. It fits a name that
has these words next to each other: ``attention`` fits layers.3.attention.wq.weight, ``layers.0-7.feed_forward`` the
feed-forward weights of the first eight layers, and ``norm`` the last norm alone: the others are attention_norm and
ffn_norm.
"""

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from titan_attent.foundations.checks import closest

_RANGE = re.compile(r"(\d+)-(\d+)")


@dataclass(frozen=True)
class LayerFactor:
    """A factor for the weights that a pattern fits.

    Attributes:
        vector: the number of the vector in the expression, from 1; 0 for all of them.
        pattern: as described above.
        factor: multiplies the coefficient of the vector there.
    """

    vector: int
    pattern: str
    factor: float

    def fits(self, name: str) -> bool:
        """Whether the words of the pattern stand next to each other in ``name``."""
        words, wanted = name.split("."), self.pattern.split(".")
        return any(all(map(_fits, wanted, words[i : i + len(wanted)])) for i in range(len(words) - len(wanted) + 1))


def _fits(wanted: str, word: str) -> bool:
    if (bounds := _RANGE.fullmatch(wanted)) and word.isdigit():
        return int(bounds[1]) <= int(word) <= int(bounds[2])
    return wanted == word


def parse_factor(text: str, *, num_vectors: int) -> LayerFactor:
    """``[N:]PATTERN=FACTOR`` as a :class:`LayerFactor`; ValueError for another form, or a vector that is not there."""
    where = f"--scale {text}"
    match = re.fullmatch(r"(?:(\d+):)?([^=:\s]+)=(\S+)", text)
    try:
        factor = float(match[3]) if match else float("nan")
    except ValueError:
        factor = float("nan")
    if match is None or factor in (float("inf"), -float("inf")) or factor != factor:
        raise ValueError(f"{where}: write it as LAYERS=FACTOR, such as attention=0.5, or 2:layers.0-7=0")
    vector = int(match[1] or 0)
    if match[1] is not None and not 1 <= vector <= num_vectors:
        raise ValueError(f"{where}: there is no vector {vector}: the expression has {num_vectors}, numbered from 1")
    return LayerFactor(vector, match[2], factor)


def factor_of(factors: Sequence[LayerFactor], vector: int, name: str) -> float:
    """The factor of the weight ``name`` in a vector: of the last pattern that fits; 1 if none does."""
    for one in reversed(factors):
        if one.vector in (0, vector) and one.fits(name):
            return one.factor
    return 1.0


def check_factors(factors: Iterable[LayerFactor], names: Sequence[str]) -> None:
    """Refuse a pattern that fits no weight; ValueError."""
    for one in factors:
        if not any(map(one.fits, names)):
            words = {word for name in names for word in name.split(".") if not word.isdigit()}
            hint = closest(one.pattern.split(".")[-1], sorted(words)) or f", such as {names[0]}"
            raise ValueError(f"--scale {one.pattern}={one.factor:g}: it fits none of the {len(names)} weights{hint}")
