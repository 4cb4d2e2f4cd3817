"""What a command line asks for: a base, and task vectors with their coefficients.

    BASE + 0.4 FT1 - 0.6 FT2            the first checkpoint is the base; each other one stands for its task vector, its
                                        difference from the base: BASE + 0.4 (FT1 - BASE) - 0.6 (FT2 - BASE)
    C + B from A                        the vector of B from another origin, A: the analogy "A is to B as C to .."

So every result is a weighted mean of checkpoints whose weights sum to 1: coefficients that all are 0 give the base.
The words are separate arguments, without signs that a shell replaces. A path that is a number needs ``./`` before it.

Source: Ilharco et al., Editing models with task arithmetic, ICLR 2023 (addition, negation, analogy).
"""

from collections.abc import Sequence
from dataclasses import dataclass

SIGNS = {"+": 1.0, "-": -1.0}
FROM = "from"
FORM = "BASE + [COEFFICIENT] CHECKPOINT [from CHECKPOINT] - ..., each word separate, such as base + 0.4 tuned"


@dataclass(frozen=True)
class Vector:
    """A task vector: ``coefficient`` times (``checkpoint`` - ``origin``)."""

    coefficient: float
    checkpoint: str
    origin: str


@dataclass(frozen=True)
class Expression:
    """A base and its vectors, in the order of the command line."""

    base: str
    vectors: tuple[Vector, ...]

    @property
    def paths(self) -> list[str]:
        """Every checkpoint once, the base first."""
        paths = [self.base]
        for vector in self.vectors:
            paths += [vector.checkpoint, vector.origin]
        return list(dict.fromkeys(paths))

    def __str__(self) -> str:
        text = self.base
        for vector in self.vectors:
            sign = "-" if vector.coefficient < 0 else "+"
            text += f" {sign} {abs(vector.coefficient):g} ({vector.checkpoint} - {vector.origin})"
        return text


def parse(words: Sequence[str]) -> Expression:
    """The expression of the command line's words; ValueError that names the word that is wrong."""
    left = list(words)
    base = _path(left, words, after="")
    vectors = []
    while left:
        sign = left.pop(0)
        if sign not in SIGNS:
            raise ValueError(f"{_shown(words)}: + or - is expected before {sign}. The form is: {FORM}")
        coefficient = SIGNS[sign]
        if left and (number := _number(left[0])) is not None:
            left.pop(0)
            coefficient *= number
        checkpoint, origin = _path(left, words, after=sign), base
        if left and left[0] == FROM:
            left.pop(0)
            origin = _path(left, words, after=FROM)
        if checkpoint == origin:
            raise ValueError(f"{_shown(words)}: the vector of {checkpoint} from itself is 0: name another checkpoint")
        vectors.append(Vector(coefficient, checkpoint, origin))
    return Expression(base, tuple(vectors))


def _path(left: list[str], words: Sequence[str], *, after: str) -> str:
    where = f" after {after}" if after else ""
    if not left:
        raise ValueError(f"{_shown(words)}: a checkpoint is missing{where}. The form is: {FORM}")
    word = left.pop(0)
    if word in SIGNS or word == FROM or _number(word) is not None:
        raise ValueError(f"{_shown(words)}: a checkpoint is expected{where}, and {word} is none. The form is: {FORM}")
    return word.rstrip("/") or word


def _number(word: str) -> float | None:
    try:
        number = float(word)
    except ValueError:
        return None
    if number - number != 0:
        raise ValueError(f"a coefficient must be finite, and {word} is not")
    return number


def _shown(words: Sequence[str]) -> str:
    return " ".join(words) or "the command"
