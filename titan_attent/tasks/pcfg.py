"""``pcfg``: sentences of a probabilistic context-free grammar, on which progressive distillation is studied.

The rules of a symbol are equally likely. Every symbol has a height above the terminals 1, 2 and 3, which are at height
0; a rule of a symbol at height h has two or three symbols at height h - 1. With ``height`` = h the labels that count
are the last terminals of all constituents at height h: to predict them, a model has to know where constituents end.
With ``height`` = 0 all terminals count.

Sources: the grammars are those of Allen-Zhu and Li, "Physics of language models: part 1" (arXiv 2305.13673). Panigrahi
et al. (arXiv 2410.05464) use them for distillation, and count the ends of constituents at height 3 in their code.
"""

from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np

from titan_attent.tasks.task import Rows, Task, option

_TEXTS = {
    "cfg3f": """22 20 21|20 19 21|21 19 19|20 20
        19 18 16 18|17 18|18 18; 20 16 16|16 17|17 16 18; 21 18 17|17 16|16 17 18|16 18
        16 15 15|13 15 13|14 13|14 14; 17 15 14 13|14 15|15 14; 18 14 15 13|15 13 13|13 15
        13 11 12|12 11 12|10 12 11; 14 10 12|12 10 12|12 11|10 12 12; 15 10 11 11|11 11 10|10 10|12 12 11
        10 8 9 9|9 7 9|7 9 9; 11 8 8|9 7|9 7 7; 12 7 9 7|9 8|8 8 9
        7 2 2 1|3 2 2|3 1 2|3 2; 8 3 1 1|1 2|3 3 1; 9 1 2 1|3 3|1 1""",
    "cfg3g": """22 19 20|20 20 19|20 19 21
        19 17 17 16|18 17 16|18 16 17; 20 16 17|18 18|16 17 17; 21 16 16|16 16 18|18 16
        16 14 13 13|13 14|13 13; 17 14 13 14|14 15 13|15 14; 18 15 13|15 15|14 13 15
        13 10 12|11 11 11|11 11; 14 11 12|11 10 11|10 10; 15 10 11|12 10 10|12 11
        10 8 8 8|7 7 7|7 7; 11 8 8 9|9 7|8 9 7; 12 7 9|7 8|9 9 9
        7 2 3 1|1 1|2 2; 8 1 3 2|1 3|3 3 1; 9 2 3 3|2 3|2 1""",
    "cfg3h": """22 20 20 21|19 21
        19 16 17|18 17; 20 18 16|17 16; 21 17 17 18|17 18 17
        16 14 13|15 13; 17 13 14|15 13 15; 18 15 13 13|15 14 14|14 15 15
        13 12 11|11 10; 14 10 12 12|10 10|12 12 10; 15 10 12|11 11 10
        10 8 7 9|9 7|8 8; 11 8 7 7|7 7|7 9 9; 12 7 9|8 7|9 8
        7 2 3 2|1 2 3|1 3 1; 8 1 2|3 3 1|1 3; 9 2 1 3|1 3 3""",
    "cfg3i": """22 19 19 20|21 20 19
        19 18 16 18|16 16; 20 17 16 17|18 18; 21 16 16 18|18 17
        16 13 13|14 14; 17 15 15|15 14; 18 14 15 13|14 15
        13 12 11|10 12 11; 14 10 10 10|10 10; 15 11 11 10|11 10 12
        10 8 7 7|9 9; 11 7 7 7|7 7 8; 12 7 9 9|8 7
        7 3 1 2|2 3 1; 8 1 1|2 2; 9 1 1 3|1 2""",
}
Grammar = dict[int, tuple[tuple[int, ...], ...]]
"""A symbol -> the right sides of its rules."""
NUM_SYMBOLS, TERMINALS, MAX_WIDTH, CHOICES = 23, 3, 3, 12
TOGETHER = 512
"""Sentences that are derived together: their arrays stay in the cache, and no page of memory is asked for anew."""
SENTENCE_BITS = 10
"""A sentence has fewer than 2^10 symbols at every height: at most 3^6 terminals."""


def parse(text: str) -> Grammar:
    """A grammar from its symbols, each with its rules: ``7 2 1|1 2; 8 ...``."""
    grammar = {}
    for entry in text.replace("\n", ";").split(";"):
        symbol, rules = entry.strip().split(" ", 1)
        grammar[int(symbol)] = tuple(tuple(map(int, rule.split())) for rule in rules.split("|"))
    return grammar


GRAMMARS = {name: parse(text) for name, text in _TEXTS.items()}


def height_of(symbol: int) -> int:
    """The height of a symbol: 0 for 1 to 3, 1 for 7 to 9, 2 for 10 to 12, ..., 6 for 22."""
    return 0 if symbol <= TERMINALS else (symbol - 4) // 3


@dataclass(frozen=True, kw_only=True)
class Pcfg(Task):
    name = "pcfg"
    summary = "sentences of a context-free grammar; the ends of constituents count"

    grammar: str = option("cfg3f", f"the grammar: {', '.join(GRAMMARS)}")
    root: int = option(22, "the symbol that sentences derive from: 22, or a lower one for shorter sentences")
    height: int = option(3, "the ends of constituents at this height count as labels; 0 for all words")

    def __post_init__(self) -> None:
        self.require(self.grammar in GRAMMARS, f"--grammar is {self.grammar}; it is one of {', '.join(GRAMMARS)}")
        symbols = GRAMMARS[self.grammar]
        self.require(
            self.root in symbols, f"--root is {self.root}; it is one of {', '.join(map(str, sorted(symbols)))}"
        )
        heights = height_of(self.root)
        self.require(
            0 <= self.height < heights, f"--height is {self.height}; with --root {self.root} it is below {heights}"
        )

    def facts(self) -> dict[str, Any]:
        return {"rules": {str(symbol): rules for symbol, rules in GRAMMARS[self.grammar].items()}}

    def words(self) -> tuple[str, ...]:
        return tuple(str(i) for i in range(TERMINALS + 1))  # word 0, which no sentence has, saves a shift

    def rows(self, split: str, numbers: np.ndarray) -> Rows:
        parts = [self._derive(split, numbers[start : start + TOGETHER]) for start in range(0, len(numbers), TOGETHER)]
        symbols, sizes, counts = (np.concatenate(arrays) for arrays in zip(*parts, strict=True))
        return Rows(symbols, np.cumsum(sizes), counts)

    def _derive(self, split: str, numbers: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """(terminals, their number in each sentence, which of them count) of some rows."""
        draws, n, height = self.draws(split), len(numbers), height_of(self.root)
        symbols, sizes = np.full(n, self.root, dtype=np.int8), np.ones(n, dtype=np.int64)
        counts = np.zeros(n, dtype=bool)
        while height > 0:
            if height == self.height:
                counts[:] = True
            levels = 2 - height % 2
            table, widths = expansions(self.grammar, levels)
            starts = np.cumsum(sizes) - sizes
            # The number of a symbol in its sentence, after the number of the row.
            ids = np.repeat((numbers << SENTENCE_BITS) - starts, sizes)
            ids += np.arange(len(ids))
            drawn = draws.integers(ids, 1, CHOICES ** (1 if levels == 1 else 1 + MAX_WIDTH), what=f"height {height}")
            drawn = drawn[:, 0] + symbols.astype(np.int64) * (len(table) // NUM_SYMBOLS)
            # take and compress are three times as fast as indexing by arrays of two dimensions.
            block, width = np.take(table, drawn, axis=0), np.take(widths, drawn)
            is_symbol = (block > 0).ravel()
            height -= levels
            symbols = np.compress(is_symbol, block)
            inherited = np.zeros(len(symbols), dtype=bool)
            if levels == 2 and self.height == height + 1:  # the ends of the constituents between
                inherited = np.compress(is_symbol, ends_of_parts(block))
            else:
                inherited[np.cumsum(width, dtype=np.int64)[counts] - 1] = True
            counts, sizes = inherited, np.add.reduceat(width, starts, dtype=np.int64)
        if self.height == 0:
            counts[:] = True
        return symbols, sizes, counts


@cache
def expansions(grammar: str, levels: int) -> tuple[np.ndarray, np.ndarray]:
    """What a symbol derives one or two levels below, for each number that is drawn.

    A rule is chosen by a number below 12, which 2, 3 and 4 divide: so the rules of a symbol are equally likely. Two
    levels take four such numbers, for the symbol and for its up to three parts.

    Returns:
        (int8 [symbols x 12, 3] or [symbols x 12^4, 9], 0 where there is no symbol; int8, how many there are). 5 MB.
    """
    one = np.zeros((NUM_SYMBOLS, CHOICES, MAX_WIDTH), dtype=np.int8)
    for symbol, rules in GRAMMARS[grammar].items():
        for drawn in range(CHOICES):
            rule = rules[drawn * len(rules) // CHOICES]
            one[symbol, drawn, : len(rule)] = rule
    if levels == 1:
        return _with_widths(one)
    digits = np.unravel_index(np.arange(CHOICES ** (1 + MAX_WIDTH)), (CHOICES,) * (1 + MAX_WIDTH))
    parts = one[:, digits[0]]
    return _with_widths(np.concatenate([one[parts[:, :, i], digits[1 + i]] for i in range(MAX_WIDTH)], axis=2))


def _with_widths(table: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    table = table.reshape(-1, table.shape[2])
    return table, (table > 0).sum(axis=1, dtype=np.int8)


def ends_of_parts(block: np.ndarray) -> np.ndarray:
    """int8 [n, 9] of :func:`expansions` -> bool [n, 9]: which symbols end one of the three parts."""
    parts = np.pad(block.reshape(len(block), MAX_WIDTH, MAX_WIDTH) > 0, ((0, 0), (0, 0), (0, 1)))
    return (parts[:, :, :-1] & ~parts[:, :, 1:]).reshape(block.shape)
