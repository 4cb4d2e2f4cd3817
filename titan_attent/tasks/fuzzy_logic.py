"""``fuzzy_logic``: a function of fuzzy variables that the samples of the row define.

    x x x x y   x x x x y   ...   x x x x y        one sample after the other; the last y is the answer

A function is the OR of some conjunctions, in each of which every variable occurs once, plain or negated. With Zadeh's
operators on values in [0, 1], x AND y = min(x, y), x OR y = max(x, y), NOT x = 1 - x. Here a value is one of the
equidistant ``levels``, which these operators never leave. All rows of a function have other samples.

    in_distribution   functions that are trained on
    held_out          new combinations of conjunctions, each of which is trained on in others
    new_terms         combinations of conjunctions that are in no function that is trained on

Source: Schug et al., "Attention as a hypernetwork" (ICLR 2025, arXiv 2406.05816) and its code, where values are real
numbers and the loss is a squared error.
"""

from dataclasses import dataclass
from functools import cached_property
from itertools import combinations, product
from typing import Any

import numpy as np

from titan_attent.tasks.task import IN_DISTRIBUTION, TRAIN, Rows, Task, option

HELD_OUT, NEW_TERMS = "held_out", "new_terms"


@dataclass(frozen=True, kw_only=True)
class FuzzyLogic(Task):
    name = "fuzzy_logic"
    summary = "fuzzy functions learned in context, with held-out combinations of their terms"
    splits = (IN_DISTRIBUTION, HELD_OUT, NEW_TERMS)

    variables: int = option(4, "variables of a function")
    terms: int = option(2, "conjunctions of a function")
    samples: int = option(16, "samples in a row, with the last one, which is asked for")
    levels: int = option(16, "different values")
    held_out_share: float = option(0.5, "share of the functions of trained conjunctions that are held out")
    new_terms_share: float = option(0.25, "share of the conjunctions that no trained function has")

    def __post_init__(self) -> None:
        self.require(2 <= self.variables <= 6, f"--variables is {self.variables}; set it to 2 to 6")
        self.require(1 <= self.terms <= 3, f"--terms is {self.terms}; set it to 1, 2 or 3")
        self.require(2 <= self.samples <= 1024, f"--samples is {self.samples}; set it to 2 to 1,024")
        self.require(2 <= self.levels <= 1024, f"--levels is {self.levels}; set it to 2 to 1,024")
        self.require_share("--held-out-share", self.held_out_share)
        self.require_share("--new-terms-share", self.new_terms_share)
        for split, functions in self.functions.items():
            self.require(
                len(functions) > 0,
                f"no function for the split {split} with --terms {self.terms}, --held-out-share {self.held_out_share} "
                f"and --new-terms-share {self.new_terms_share}: change one of them",
            )

    @cached_property
    def functions(self) -> dict[str, np.ndarray]:
        """Split -> its functions: bool [functions, terms, variables], whether a variable of a term is negated."""
        row, draws = np.zeros(1, dtype=np.int64), self.draws()
        negated = np.array(list(product([False, True], repeat=self.variables)))
        negated = negated[draws.orders(row, len(negated), what="conjunctions")[0]]
        num_seen = len(negated) - int(self.new_terms_share * len(negated))
        seen = np.array(list(combinations(range(num_seen), self.terms)), dtype=int).reshape(-1, self.terms)
        new = list(combinations(range(num_seen, len(negated)), self.terms))
        if len(seen):
            seen = seen[draws.orders(row, len(seen), what="functions")[0]]
        num_held_out = int(self.held_out_share * len(seen))
        trained = negated[seen[num_held_out:]]
        return {
            TRAIN: trained,
            IN_DISTRIBUTION: trained,
            HELD_OUT: negated[seen[:num_held_out]],
            NEW_TERMS: negated[np.array(new, dtype=int).reshape(-1, self.terms)],
        }

    def facts(self) -> dict[str, Any]:
        """The functions of each split; for each term, which variables are negated."""
        return {"functions": {split: functions.astype(int).tolist() for split, functions in self.functions.items()}}

    def words(self) -> tuple[str, ...]:
        inputs, outputs = (f"x{i}" for i in range(self.levels)), (f"y{i}" for i in range(self.levels))
        return *inputs, *outputs

    def rows(self, split: str, numbers: np.ndarray) -> Rows:
        draws, functions, highest = self.draws(split), self.functions[split], self.levels - 1
        chosen = draws.integers(numbers, 1, len(functions), what="function")[:, 0]
        # |x - highest| is the negation of x, |x - 0| is x.
        offsets = functions.astype(np.int16)[chosen] * np.int16(highest)
        inputs = draws.integers(numbers, self.variables * self.samples, self.levels, what="inputs")
        inputs = inputs.reshape(len(numbers), self.variables, self.samples)
        table = np.empty((len(numbers), self.samples, self.variables + 1), dtype=np.int16)
        table[:, :, :-1] = inputs.swapaxes(1, 2)
        outputs = np.zeros((len(numbers), self.samples), dtype=np.int16)
        for term in range(self.terms):
            smallest = np.full_like(outputs, highest)
            for variable in range(self.variables):
                values = inputs[:, variable] - offsets[:, term, variable, None]
                np.minimum(smallest, np.abs(values, out=values), out=smallest)
            np.maximum(outputs, smallest, out=outputs)
        table[:, :, -1] = outputs + np.int16(self.levels)
        return Rows.of_table(table.reshape(len(numbers), -1), answer=1)
