"""Whether one row of a task is right, by a plain function per task, independent of its generator.

A checker sees the words of a row, which of them count, the split, and what task.json says: the task's options and
facts. It returns "" for a right row, or what is wrong with it. The tests run it on every row of small data sets.
"""

from collections.abc import Callable, Sequence
from itertools import permutations, product
from typing import Any, NamedTuple


class Row(NamedTuple):
    """One row: its words, whether each counts as a label, and its split."""

    words: list[str]
    counts: list[bool]
    split: str


Checker = Callable[[Row, dict[str, Any], dict[str, Any]], str]
"""(row, options, facts) -> what is wrong; "" if nothing is."""


def answer_of(row: Row, length: int) -> list[str] | None:
    """The last ``length`` words; None unless exactly these count."""
    expected = [False] * (len(row.words) - length) + [True] * length
    return row.words[-length:] if row.counts == expected else None


def check_parity(row: Row, options: dict[str, Any], facts: dict[str, Any]) -> str:
    bits, length = row.words[: options["bits"]], options["k"] - 1 if options.get("chain_of_thought") else 1
    answer = answer_of(row, length)
    if set(bits) - {"0", "1"} or row.words[options["bits"]] != "=" or answer is None:
        return "is not bits, =, and an answer that counts"
    if len(set(facts["positions"])) != options["k"] or len(row.words) != options["bits"] + 1 + length:
        return "has another number of hidden bits or words"
    level, chain = [int(bits[position]) for position in facts["positions"]], list[int]()
    if length == 1:
        chain = [sum(level) % 2]
    while length > 1 and len(level) > 1:
        level = [(level[i] + level[i + 1]) % 2 for i in range(0, len(level), 2)]
        chain += level
    return "" if answer == [str(bit) for bit in chain] else f"{answer} should be {chain}"


def check_recall(row: Row, options: dict[str, Any], facts: dict[str, Any]) -> str:
    answer, start = answer_of(row, 1), options["seed_bits"]
    pairs = row.words[start : start + 2 * options["pairs"]]
    values = dict(zip(pairs[::2], pairs[1::2], strict=True))
    if answer is None or set(row.words[:start]) - {"r0", "r1"} or row.words[start + len(pairs)] != "?":
        return "is not a seed, pairs, ?, a key and a value that counts"
    if len(values) != options["pairs"] or len(row.words) != start + len(pairs) + 3:
        return "has a key twice, or another number of words"
    if any(key[0] != "k" or value[0] != "v" for key, value in values.items()):
        return "has a pair that is not a key and a value"
    return "" if [values.get(row.words[-2])] == answer else f"{answer} is not the value of {row.words[-2]}"


def check_graph_colouring(row: Row, options: dict[str, Any], facts: dict[str, Any]) -> str:
    size = options["nodes"]
    answer = answer_of(row, size)
    if answer is None or len(row.words) != 4 * size + 2 or row.words[size] != "," or row.words[3 * size + 1] != "=":
        return "is not priorities, the edges, =, and colours that count"
    priorities = [int(word[1:]) for word in row.words[:size]]
    ends = [int(word[1:]) for word in row.words[size + 1 : 3 * size + 1]]
    neighbours: dict[int, set[int]] = {node: set() for node in range(size)}
    for one, other in zip(ends[::2], ends[1::2], strict=True):
        neighbours[one].add(other)
        neighbours[other].add(one)
    reached, ahead = {0}, [0]
    while ahead:
        new = neighbours[ahead.pop()] - reached
        reached |= new
        ahead += new
    if any(len(others) != 2 for others in neighbours.values()) or len(reached) != size:
        return "its edges are not a cycle through all nodes"
    if sorted(priorities) != list(range(size)):
        return "its priorities are not an order of the nodes"
    if any(answer[node] == answer[other] for node in neighbours for other in neighbours[node]):
        return "gives two neighbours one colour"
    colours: dict[int, int] = {}
    for node in sorted(range(size), key=lambda node: -priorities[node]):
        taken = {colours.get(other) for other in neighbours[node]}
        colours[node] = min({0, 1, 2} - taken)
    return "" if answer == [f"c{colours[node]}" for node in range(size)] else "is not the greedy colouring of its seed"


def check_fuzzy_logic(row: Row, options: dict[str, Any], facts: dict[str, Any]) -> str:
    width, highest = options["variables"] + 1, options["levels"] - 1
    if answer_of(row, 1) is None or len(row.words) != width * options["samples"]:
        return "is not samples of which the last output counts"
    samples = [row.words[i : i + width] for i in range(0, len(row.words), width)]
    if any([word[0] for word in sample] != ["x"] * (width - 1) + ["y"] for sample in samples):
        return "has a sample that is not inputs and an output"
    numbers = [[int(word[1:]) for word in sample] for sample in samples]
    for function in facts["functions"][row.split]:
        for *inputs, output in numbers:
            terms = [min(highest - x if no else x for x, no in zip(inputs, term, strict=True)) for term in function]
            if max(terms) != output:
                break
        else:
            return ""
    return f"no function of the split {row.split} has these samples"


def follows(rule: str, x: Sequence[int]) -> bool:
    """Whether three values of a feature in one row of the grid can follow a rule; "distribute" takes any distinct."""
    if rule == "distribute":
        return len(set(x)) == 3
    if rule == "sum":
        return (x[0] + x[1]) % 8 == x[2]
    if rule == "difference":
        return (x[0] - x[1]) % 8 == x[2]
    step = 0 if rule == "constant" else int(rule)
    return (x[0] + step) % 8 == x[1] and (x[1] + step) % 8 == x[2]


def check_sraven(row: Row, options: dict[str, Any], facts: dict[str, Any]) -> str:
    size, rules = options["features"], facts["rules"]
    if answer_of(row, size) is None or len(row.words) != 9 * size:
        return "is not nine panels of which the last counts"
    values = [int(word) for word in row.words]
    panels = [values[i : i + size] for i in range(0, len(values), size)]  # of row r and column c: panels[3 r + c]

    # The rules that hold in all rows for a feature of each column.
    fits: dict[tuple[int, ...], list[int]] = {}
    for features in product(range(size), repeat=3):
        rows = [[panels[3 * r + c][features[c]] for c in range(3)] for r in range(3)]
        same = len({tuple(sorted(x)) for x in rows}) == 1
        holds = [all(follows(rule, x) for x in rows) and (same or rule != "distribute") for rule in rules]
        fits[features] = [i for i, fit in enumerate(holds) if fit]
    tasks = {tuple(task) for task in facts["tasks"][row.split]}
    for second, third in product(permutations(range(size)), repeat=2):
        of_features = [fits[features] for features in zip(range(size), second, third, strict=True)]
        if all(of_features) and tasks & {tuple(sorted(task)) for task in product(*of_features)}:
            return ""
    return f"no rules of the split {row.split} give these panels"


def check_pcfg(row: Row, options: dict[str, Any], facts: dict[str, Any]) -> str:
    rules = {int(symbol): [tuple(rule) for rule in of_symbol] for symbol, of_symbol in facts["rules"].items()}
    heights = {1: 0, 2: 0, 3: 0}
    for symbol in sorted(rules):
        heights[symbol] = heights[rules[symbol][0][0]] + 1

    def roots(segments: list[set[int]], height: int, until: int) -> set[int]:
        """The symbols at ``until`` that derive a sequence; each element is a set of possible symbols at ``height``."""
        length = len(segments)
        spans = {(i, i + 1): set(segments[i]) for i in range(length)}
        for level in range(height + 1, until + 1):
            higher: dict[tuple[int, int], set[int]] = {}
            for symbol in (symbol for symbol in rules if heights[symbol] == level):
                for rule in rules[symbol]:
                    for start in range(length):
                        ends = {start}
                        for part in rule:
                            ends = {j for i in ends for j in range(i + 1, length + 1) if part in spans.get((i, j), ())}
                        for end in ends:
                            higher.setdefault((start, end), set()).add(symbol)
            spans = higher
        return spans.get((0, length), set())

    words, height = [int(word) for word in row.words], options["height"]
    segments, start = list[set[int]](), 0
    for end, counts in enumerate(row.counts, start=1):
        if counts:
            segments.append(roots([{word} for word in words[start:end]], 0, height))
            start = end
    if start != len(words):
        return "does not end with a word that counts"
    if options["root"] in roots(segments, height, heights[options["root"]]):
        return ""
    return "is no sentence whose constituents end at the words that count"


CHECKERS: dict[str, Checker] = {
    "parity": check_parity,
    "sparse_parity": check_parity,
    "recall": check_recall,
    "graph_colouring": check_graph_colouring,
    "fuzzy_logic": check_fuzzy_logic,
    "sraven": check_sraven,
    "pcfg": check_pcfg,
}
