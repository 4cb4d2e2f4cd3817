"""The tasks: every row by its checker, parts equal to the whole, splits apart, and what their options refuse."""

from dataclasses import asdict
from typing import Any

import numpy as np
import pytest

from titan_attent.tasks.checkers import CHECKERS, Row
from titan_attent.tasks.draws import Draws
from titan_attent.tasks.fuzzy_logic import FuzzyLogic
from titan_attent.tasks.graph_colouring import GraphColouring
from titan_attent.tasks.parity import Parity
from titan_attent.tasks.pcfg import GRAMMARS, Pcfg, height_of
from titan_attent.tasks.recall import Recall
from titan_attent.tasks.sparse_parity import SparseParity
from titan_attent.tasks.sraven import RULES, Sraven
from titan_attent.tasks.task import TRAIN, Rows, Task
from titan_attent.tasks.task_list import TASKS

VARIANTS: list[Task] = [
    *(Parity(k=k, chain_of_thought=chain, seed=k) for k in (2, 8, 16, 32) for chain in (False, True)),
    SparseParity(),
    SparseParity(k=1, bits=1),
    *(Recall(), Recall(seeds=5, pairs=3, keys=3, values=7, seed=2), Recall(fixed_seed=True, seed_bits=0)),
    *(GraphColouring(), GraphColouring(nodes=3, seeds=4), GraphColouring(nodes=17, fixed_seed=True, seed=9)),
    *(FuzzyLogic(), FuzzyLogic(variables=5, terms=3, levels=11, samples=5), FuzzyLogic(terms=1, new_terms_share=0.1)),
    *(Sraven(), Sraven(features=2, seed=1)),
    *(Pcfg(grammar=grammar, root=16) for grammar in GRAMMARS),
    *(Pcfg(root=19, height=4), Pcfg(root=12, height=0)),
]


def split_rows(task: Task, split: str, rows: Rows) -> list[Row]:
    words, starts = task.words(), [0, *rows.ends[:-1].tolist()]
    return [
        Row([words[word] for word in rows.words[start:end].tolist()], rows.counts[start:end].tolist(), split)
        for start, end in zip(starts, rows.ends.tolist(), strict=True)
    ]


def name_of(task: Task) -> str:
    return f"{task.name} {' '.join(f'{k}={v}' for k, v in asdict(task).items())}"


def rows_of(task: Task, split: str, num: int, *, first: int = 0) -> list[Row]:
    return split_rows(task, split, task.rows(split, np.arange(first, first + num)))


@pytest.mark.parametrize("task", VARIANTS, ids=name_of)
def test_every_row_is_right(task: Task) -> None:
    check, facts = CHECKERS[task.name], task.facts()
    num = 12 if task.name == "pcfg" else 120
    for split in (TRAIN, *task.splits):
        for row in rows_of(task, split, num):
            assert check(row, asdict(task), facts) == "", " ".join(row.words)


def damaged(row: Row, position: int, words: tuple[str, ...]) -> Row:
    """The row with another word of the same kind: the next with the same first letter, or digit."""
    word = row.words[position]
    kind = [other for other in words if other[0] == word[0] or (other.isdigit() and word.isdigit() and other != "0")]
    kind = ["0", "1"] if word in ("0", "1") and "=" in words else kind
    return row._replace(
        words=[*row.words[:position], kind[(kind.index(word) + 1) % len(kind)], *row.words[position + 1 :]]
    )


@pytest.mark.parametrize("name", TASKS)
def test_a_wrong_answer_or_mask_is_found(name: str) -> None:
    task = Pcfg(root=16, height=1) if name == "pcfg" else TASKS[name]()
    check, options, facts = CHECKERS[name], asdict(task), task.facts()
    wrong = unmasked = 0
    rows = rows_of(task, TRAIN, 40)
    for row in rows:
        position = row.counts.index(True)
        wrong += check(damaged(row, position, task.words()), options, facts) != ""
        counts = [*row.counts[:-1], False]
        unmasked += check(row._replace(counts=counts), options, facts) != ""
    assert unmasked == len(rows)
    # A few wrong panels and sentences are right by another rule, or with other constituents.
    assert wrong == len(rows) if name not in ("sraven", "pcfg", "fuzzy_logic") else wrong > 0.8 * len(rows)


@pytest.mark.parametrize("name", TASKS)
def test_rows_are_the_same_in_parts_and_in_any_order(name: str) -> None:
    task = TASKS[name]()
    whole = rows_of(task, TRAIN, 50)
    assert rows_of(task, TRAIN, 13, first=37) == whole[37:]
    order = np.random.default_rng(0).permutation(50)
    assert split_rows(task, TRAIN, task.rows(TRAIN, order)) == [whole[i] for i in order]
    assert rows_of(task, TRAIN, 3, first=10**12) != whole[:3]


@pytest.mark.parametrize("name", TASKS)
def test_splits_and_seeds_have_other_rows(name: str) -> None:
    task = TASKS[name]()
    texts = {" ".join(row.words) for row in rows_of(task, TRAIN, 200)}
    assert len(texts) == 200
    assert not texts & {" ".join(row.words) for row in rows_of(task, task.splits[0], 200)}
    assert not texts & {" ".join(row.words) for row in rows_of(TASKS[name](seed=1), TRAIN, 200)}


def test_held_out_functions_are_new_combinations_of_trained_terms() -> None:
    functions = FuzzyLogic().functions
    terms = {split: {tuple(term) for function in some for term in function} for split, some in functions.items()}
    whole = {split: {frozenset(map(tuple, function)) for function in some} for split, some in functions.items()}
    assert [len(whole[split]) for split in (TRAIN, "held_out", "new_terms")] == [33, 33, 6]
    assert not whole[TRAIN] & whole["held_out"] and not whole["held_out"] & whole["new_terms"]
    assert terms["held_out"] <= terms[TRAIN] and not terms["new_terms"] & (terms[TRAIN] | terms["held_out"])
    assert len(terms[TRAIN]) == 12 and len(terms["new_terms"]) == 4


def test_held_out_rules_are_new_combinations() -> None:
    tasks = {split: set(map(tuple, some.tolist())) for split, some in Sraven().tasks.items()}
    assert (len(tasks[TRAIN]), len(tasks["held_out"])) == (248, 82)
    assert not tasks[TRAIN] & tasks["held_out"] and tasks[TRAIN] == tasks["in_distribution"]
    assert {rule for task in tasks[TRAIN] for rule in task} == set(range(len(RULES)))


@pytest.mark.parametrize("kind", [Recall, GraphColouring])
def test_the_rows_of_an_input_differ_in_their_seed_alone(kind: Any) -> None:
    def parts(task: Task, size: int) -> list[tuple[str, str]]:
        return [(" ".join(row.words[:size]), " ".join(row.words[size : 3 * size])) for row in rows_of(task, TRAIN, 40)]

    for seeds in (1, 4):
        rows = parts(kind(seeds=seeds), 8)
        inputs = [rest for _, rest in rows]
        assert inputs == [inputs[i // seeds * seeds] for i in range(40)] and len(set(inputs)) == 40 // seeds
        assert len({seed for seed, _ in rows}) > 30
    assert len({seed for seed, _ in parts(kind(seeds=4, fixed_seed=True), 8)}) == 1
    assert [rest for _, rest in parts(kind(fixed_seed=True), 8)] == [rest for _, rest in parts(kind(), 8)]


def test_answers_are_balanced_where_they_should_be() -> None:
    for task in (Parity(), SparseParity(), Recall()):
        answers = [row.words[-1] for row in rows_of(task, TRAIN, 4000)]
        assert abs(np.mean([answer.endswith("1") for answer in answers]) - 0.5) < 0.04


@pytest.mark.parametrize("name", GRAMMARS)
def test_the_grammars_have_three_symbols_at_each_height_and_rules_one_height_down(name: str) -> None:
    grammar = GRAMMARS[name]
    assert sorted(grammar) == [*range(7, 23)]
    for symbol, rules in grammar.items():
        assert len(rules) in (2, 3, 4) and len(set(rules)) == len(rules)
        for rule in rules:
            assert len(rule) in (2, 3) and {height_of(part) for part in rule} == {height_of(symbol) - 1}


# -- random numbers ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("below", [1, 2, 3, 12, 16, 20, 256, 336, 2**15, 2**16])
def test_integers_are_equally_likely(below: int) -> None:
    drawn = Draws(0, name="test").integers(np.arange(200), 300, below, what="x").ravel()
    assert drawn.min() >= 0 and drawn.max() < below
    if below <= 336:
        expected = len(drawn) / below
        chi = ((np.bincount(drawn, minlength=below) - expected) ** 2 / expected).sum()
        assert abs(chi - (below - 1)) < 5 * (2 * below) ** 0.5


def test_orders_are_equally_likely() -> None:
    orders = Draws(0, name="test").orders(np.arange(12_000), 4, what="x")
    assert (np.sort(orders, axis=1) == np.arange(4)).all()
    _, counts = np.unique(orders @ [64, 16, 4, 1], return_counts=True)
    assert len(counts) == 24 and ((counts - 500) ** 2 / 500).sum() < 55
    assert sorted(Draws(0, name="test").orders(np.zeros(1, dtype=int), 1000, what="x")[0].tolist()) == list(range(1000))


def test_draws_of_other_names_rows_and_splits_are_independent() -> None:
    rows = np.arange(1000)
    base = Draws(0, name="a").bits(rows, 64, what="x")
    others = [
        Draws(0, name="a").bits(rows, 64, what="y"),
        Draws(0, name="b").bits(rows, 64, what="x"),
        Draws(0, name="a", split="train").bits(rows, 64, what="x"),
        Draws(1, name="a").bits(rows, 64, what="x"),
        np.roll(base, 1, axis=0),
    ]
    for other in others:
        assert abs((base == other).mean() - 0.5) < 0.01
    assert abs(base.mean() - 0.5) < 0.01


# -- refusals ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("parity", {"k": 6}, "--k is 6; set it to a power of two"),
        ("parity", {"k": 64, "bits": 32}, r"--bits is 32; set it to 64 \(--k\) to 4,096"),
        ("sparse_parity", {"k": 0}, "--k is 0"),
        ("recall", {"pairs": 40}, r"--keys is 32; set it to 40 \(--pairs\)"),
        ("recall", {"seeds": 0}, "--seeds is 0"),
        ("graph_colouring", {"nodes": 2}, "--nodes is 2; set it to 3"),
        ("fuzzy_logic", {"terms": 3, "new_terms_share": 0.1}, "no function for the split new_terms"),
        ("fuzzy_logic", {"held_out_share": 1.0}, "no function for the split train"),
        ("sraven", {"held_out_share": 0.0}, "leaves the split held_out no rules"),
        ("sraven", {"held_out_share": -0.25}, "--held-out-share is -0.25; set it to a number from 0 to 1"),
        ("sraven", {"held_out_share": float("nan")}, "--held-out-share is nan; set it to a number from 0 to 1"),
        ("fuzzy_logic", {"held_out_share": float("inf")}, "--held-out-share is inf; set it to a number from 0 to 1"),
        ("fuzzy_logic", {"new_terms_share": -0.1}, "--new-terms-share is -0.1; set it to a number from 0 to 1"),
        ("pcfg", {"grammar": "cfg3z"}, "one of cfg3f, cfg3g"),
        ("pcfg", {"root": 10, "height": 2}, "--height is 2; with --root 10 it is below 2"),
    ],
)
def test_options_that_do_not_fit_are_refused(name: str, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=f"^{name}: .*{message}"):
        TASKS[name](**options)
