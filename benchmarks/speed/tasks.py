"""The generators of tasks against a plain Python loop of the same task.

    python -m benchmarks.speed.tasks [--output tasks.json]

Both make rows of words and masks, no files. The loop is what one would write: ``random``, a row at a time, with one
generator for all rows. It does not give a row that depends on its number alone, which the generators do. One thread;
seconds are CPU seconds of the process, so that other work on the machine counts little.
"""

import argparse
import random
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.common import measure
from titan_attent.tasks.fuzzy_logic import FuzzyLogic
from titan_attent.tasks.graph_colouring import GraphColouring
from titan_attent.tasks.parity import Parity
from titan_attent.tasks.pcfg import Pcfg
from titan_attent.tasks.recall import Recall
from titan_attent.tasks.sparse_parity import SparseParity
from titan_attent.tasks.sraven import Sraven
from titan_attent.tasks.task import TRAIN, Task
from titan_attent.tasks.writer import ROWS_AT_ONCE

PythonRow = tuple[list[int], list[bool]]
RNG = random.Random(0)


def masked(question: list[int], answer: list[int]) -> PythonRow:
    return question + answer, [False] * len(question) + [True] * len(answer)


def parity(task: Any, positions: list[int]) -> PythonRow:
    bits = [RNG.randint(0, 1) for _ in range(task.bits)]
    level, chain = [bits[i] for i in positions], []
    while len(level) > 1:
        level = [level[i] ^ level[i + 1] for i in range(0, len(level), 2)]
        chain += level
    return masked([*bits, 2], chain if task.chain_of_thought else chain[-1:])


def sparse_parity(task: Any, positions: list[int]) -> PythonRow:
    bits = [RNG.randint(0, 1) for _ in range(task.bits)]
    return masked([*bits, 2], [sum(bits[i] for i in positions) % 2])


def recall(task: Any, _: Any) -> PythonRow:
    keys = RNG.sample(range(task.keys), task.pairs)
    values = [RNG.randrange(task.values) for _ in keys]
    words = [RNG.randint(0, 1) for _ in range(task.seed_bits)]
    for key, value in zip(keys, values, strict=True):
        words += [3 + key, 3 + task.keys + value]
    asked = RNG.randrange(task.pairs)
    return masked([*words, 2, 3 + keys[asked]], [3 + task.keys + values[asked]])


def graph_colouring(task: Any, _: Any) -> PythonRow:
    size = task.nodes
    cycle, priorities = list(range(size)), list(range(size))
    RNG.shuffle(cycle)
    RNG.shuffle(priorities)
    edges = [(cycle[i], cycle[(i + 1) % size]) for i in range(size)]
    neighbours: list[list[int]] = [[] for _ in range(size)]
    for a, b in edges:
        neighbours[a].append(b)
        neighbours[b].append(a)
    edges = [(b, a) if RNG.random() < 0.5 else (a, b) for a, b in edges]
    RNG.shuffle(edges)
    colours: dict[int, int] = {}
    for node in sorted(range(size), key=lambda node: -priorities[node]):
        taken = {colours.get(other) for other in neighbours[node]}
        colours[node] = next(colour for colour in range(3) if colour not in taken)
    words = [5 + size + priority for priority in priorities] + [0] + [5 + node for edge in edges for node in edge] + [1]
    return masked(words, [2 + colours[node] for node in range(size)])


def fuzzy_logic(task: Any, functions: list[list[list[bool]]]) -> PythonRow:
    function, highest, words = RNG.choice(functions), task.levels - 1, []
    for _ in range(task.samples):
        inputs = [RNG.randrange(task.levels) for _ in range(task.variables)]
        output = max(min(highest - x if no else x for x, no in zip(inputs, term, strict=True)) for term in function)
        words += [*inputs, task.levels + output]
    return masked(words[:-1], words[-1:])


def sraven(task: Any, tasks: list[list[int]]) -> PythonRow:
    columns: list[list[list[int]]] = [[], [], []]  # by column, feature and row
    for rule in RNG.choice(tasks):
        rows = []
        triple = RNG.sample(range(8), 3)
        for _ in range(3):
            a, b = RNG.randrange(8), RNG.randrange(8)
            if rule < 5:
                step = (0, 1, 2, -1, -2)[rule]
                rows.append((a, (a + step) % 8, (a + 2 * step) % 8))
            elif rule < 7:
                rows.append((a, b, (a + b if rule == 5 else a - b) % 8))
            else:
                rows.append(tuple(RNG.sample(triple, 3)))
        for column, values in enumerate(zip(*rows, strict=True)):
            columns[column].append(list(values))
    for column in columns:
        RNG.shuffle(column)
    words = [feature[row] for row in range(3) for column in columns for feature in column]
    return masked(words[: -task.features], words[-task.features :])


def pcfg(task: Any, rules: dict[int, list[list[int]]]) -> PythonRow:
    heights = {symbol: (symbol - 4) // 3 for symbol in rules}
    words: list[int] = []
    counts: list[bool] = []

    def expand(symbol: int) -> None:
        if symbol not in rules:
            words.append(symbol)
            counts.append(False)
            return
        for part in RNG.choice(rules[symbol]):
            expand(part)
        if heights[symbol] == task.height:
            counts[-1] = True

    expand(task.root)
    return words, counts


def cases() -> list[tuple[str, Task, Callable[..., PythonRow], Any]]:
    """(name, task, loop, what its rows have in common)."""
    direct, chain, logic, raven, grammar = (
        Parity(k=16),
        Parity(k=16, chain_of_thought=True),
        FuzzyLogic(),
        Sraven(),
        Pcfg(),
    )
    positions = direct.positions().tolist()
    return [
        ("parity", direct, parity, positions),
        ("parity, chain of thought", chain, parity, positions),
        ("sparse_parity", SparseParity(), sparse_parity, list(range(6))),
        ("recall", Recall(), recall, None),
        ("graph_colouring", GraphColouring(), graph_colouring, None),
        ("fuzzy_logic", logic, fuzzy_logic, logic.functions[TRAIN].tolist()),
        ("sraven", raven, sraven, raven.tasks[TRAIN].tolist()),
        ("pcfg", grammar, pcfg, {int(symbol): rules for symbol, rules in grammar.facts()["rules"].items()}),
    ]


def cpu_seconds(variants: dict[str, Callable[[], None]], *, rounds: int) -> dict[str, list[float]]:
    """CPU seconds of every call, in turns, after one call of each that is not counted."""
    times: dict[str, list[float]] = {name: [] for name in variants}
    for i in range(-1, rounds):
        for name, run in variants.items():
            start = time.process_time()
            run()
            if i >= 0:
                times[name].append(time.process_time() - start)
    return times


def main() -> None:
    parser = argparse.ArgumentParser(description="The generators of tasks against plain Python loops.")
    parser.add_argument("--rounds", type=int, default=11, help="repetitions of each variant")
    parser.add_argument(
        "--rows", type=int, default=ROWS_AT_ONCE, help="rows per call of a generator; a loop makes an eighth"
    )
    parser.add_argument("--output", type=Path, help="JSON file")
    args = parser.parse_args()
    torch.set_num_threads(1)
    header, rows, shown = measure.header(), list[dict[str, Any]](), list[dict[str, Any]]()
    numbers, few = np.arange(args.rows), args.rows // 8
    for name, task, loop, common in cases():

        def ours(task: Task = task) -> None:
            task.rows(TRAIN, numbers)

        def theirs(task: Task = task, loop: Any = loop, common: Any = common) -> None:
            for _ in range(few):
                loop(task, common)

        times = cpu_seconds({"ours": ours, "loop": theirs}, rounds=args.rounds)
        per_row = {way: {**measure.summary(times[way])} for way in times}
        for way, size in (("ours", args.rows), ("loop", few)):
            for key in ("seconds", "min_seconds"):
                per_row[way][key] /= size
            rows.append({"what": name, "way": way, **per_row[way]})
        pair = [per_row[way]["seconds"] for way in ("ours", "loop")]
        least = [per_row[way]["min_seconds"] for way in ("ours", "loop")]
        ratios = {"ratio": pair[1] / pair[0], "ratio of the fastest": least[1] / least[0]}
        shown.append({"what": name, "ours, us per row": 1e6 * pair[0], "loop, us per row": 1e6 * pair[1], **ratios})
    settings = {key: value for key, value in vars(args).items() if key != "output"}
    measure.publish(args.output, header | {"settings": settings, "rows": rows, "ratios": shown}, shown)


if __name__ == "__main__":
    main()
