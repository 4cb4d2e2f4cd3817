"""Edits the weights of finished trainings, as ``titan_attent.edit`` computes them, and measures the results."""

import argparse
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import Any

from torch import Tensor

from benchmarks.common.evaluate import evaluate, whole_weights
from benchmarks.common.forks import command
from benchmarks.common.tasks import Task
from benchmarks.editing.languages import FIRST, LONGEST, RELATED
from benchmarks.editing.packages import NAMES
from benchmarks.editing.runs import (
    ASCENT_EVERY,
    ASCENT_STEPS,
    LAST,
    MEAN_EVERY,
    MEAN_STEPS,
    MEASURE,
    RUNS,
    weights,
)
from titan_attent.edit.averages import decay_weights
from titan_attent.edit.combine import Combination
from titan_attent.edit.expression import Expression, Vector, parse
from titan_attent.edit.options import add_vector_options, combination_of
from titan_attent.edit.transforms import RandomLike, Unchanged

FLAVOR, SEQ_LEN = "bench", 96
COEFFICIENTS = (0.25, 0.5, 0.75, 1.0, 1.5, 2.0)
"""Of the vector that unlearns."""
SECOND = (0.25, 0.5, 0.75, 1.0)
"""Of the second language's vector."""

Numbers = dict[str, Any]


def do(task: Task) -> Numbers:
    """Do one task, below the folder of all of them. Returns its numbers."""
    if task.module != MEASURE:
        command(task)
        return {}
    return MEASURES[task.labels["part"]](task.labels["seed"])


def combined(expression: Expression, *, random: Sequence[int] = (), seed: int = 0) -> dict[str, Tensor]:
    """The weights of an expression; vectors in ``random`` are replaced by random ones of their norm, by tensor."""
    parser = argparse.ArgumentParser()
    add_vector_options(parser)
    combination: Combination = combination_of(expression, parser.parse_args([]))
    for number in random:
        term = combination.terms[number]
        combination.terms = [*combination.terms]
        combination.terms[number] = replace(term, transform=RandomLike(Unchanged(), seed=seed))
    return whole_weights(combination)


def words(text: str) -> Expression:
    return parse(text.split())


# -- languages --------------------------------------------------------------------------------------------------------


def measure_languages(seed: int) -> Numbers:
    """relation -> edit -> (accuracy on the first language, its loss, accuracy on the related one, its loss)."""
    runs = RUNS["languages"](seed)
    root = f"languages/seed-{seed}/data"
    measured = partial(evaluate, flavor=FLAVOR, seq_len=LONGEST)
    base, first = weights(runs["base"]), weights(runs[FIRST])
    found: Numbers = {}
    for relation in RELATED:
        other = weights(runs[relation])
        single = {"base": base, "first": f"{base} + {first}", "other": f"{base} + {other}"}
        edits = {name: combined(words(text)) for name, text in single.items()}
        for sign, c in ((sign, c) for sign in "+-" for c in SECOND):
            expression = words(f"{base} + {first} {sign} {c} {other}")
            edits[f"first {sign} {c:g} other"] = combined(expression)
            edits[f"first {sign} {c:g} random"] = combined(expression, random=[1], seed=seed + len(edits))
        found[relation] = {
            name: [*measured(edited, f"{root}/{FIRST}/validation"), *measured(edited, f"{root}/{relation}/validation")]
            for name, edited in edits.items()
        }
    return {"edits": found}


# -- unlearning -------------------------------------------------------------------------------------------------------


def measure_unlearning(seed: int) -> Numbers:
    """arm -> amount -> {"NAME/PART": loss}: what each amount of forgetting costs each package.

    Amounts are coefficients of the vector, or steps of gradient ascent; 0 is the base.
    """
    runs = RUNS["unlearning"](seed)
    base, tuned = weights(runs["base"]), weights(runs["tuned"])
    losses = partial(losses_of, f"packages/seed-{seed}")
    found: Numbers = {
        "vector": {f"{c:g}": losses(combined(words(f"{base} - {c} {tuned}"))) for c in COEFFICIENTS},
        "random": {
            f"{c:g}": losses(combined(words(f"{base} - {c} {tuned}"), random=[0], seed=seed)) for c in COEFFICIENTS
        },
        "ascent": {
            str(step): losses(combined(words(f"{runs['ascent'].folder}/checkpoint/step-{step}")))
            for step in range(ASCENT_EVERY, ASCENT_STEPS + 1, ASCENT_EVERY)
        },
    }
    return {"base": losses(combined(words(base))), "tuned": losses(combined(words(tuned))), "arms": found}


def losses_of(root: str, edited: dict[str, Tensor]) -> dict[str, float]:
    """ "NAME/PART" -> loss, of the two parts that are not trained on."""
    return {
        f"{name}/{part}": evaluate(edited, f"{root}/{name}/{part}", flavor=FLAVOR, seq_len=SEQ_LEN).loss
        for name in NAMES
        for part in ("control", "validation")
    }


# -- means ------------------------------------------------------------------------------------------------------------


def measure_means(seed: int) -> Numbers:
    """Validation losses: of the constant rate's end; by number of checkpoints, of the mean and of the decayed run."""
    runs = RUNS["means"](seed)

    def loss(expression: Expression) -> float:
        data = f"packages/seed-{seed}/validation"
        return evaluate(combined(expression), data, flavor=FLAVOR, seq_len=SEQ_LEN).loss

    found: Numbers = {"constant": loss(words(weights(runs["constant"])))}
    for last in LAST:
        steps = [MEAN_STEPS - MEAN_EVERY * back for back in reversed(range(last))]
        paths = [f"{runs['constant'].folder}/checkpoint/step-{step}" for step in steps]
        shares = decay_weights(steps, "linear")
        vectors = [Vector(share, path, paths[0]) for share, path in zip(shares[1:], paths[1:], strict=True)]
        found[f"mean_{last}"] = loss(Expression(paths[0], tuple(vectors)))
        found[f"decayed_{last}"] = loss(words(weights(runs[f"decayed_{last}"])))
    return {"losses": found}


MEASURES = {"languages": measure_languages, "unlearning": measure_unlearning, "means": measure_means}
