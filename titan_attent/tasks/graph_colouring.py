"""``graph_colouring``: three colours on a cycle, with a random seed in the row.

    p2 p0 p3 p1 , n3 n1 n0 n2 ... = c0 c0 c1 c1

The seed is a random order of the nodes: one priority for each of n0, n1, ... Then come the edges of the cycle, two
nodes each, in random order and direction. The answer is a colour for each of n0, n1, ...: in the order of falling
priority, each node takes the smallest colour that no neighbour has. Three are always enough on a cycle. Without the
seed, equal neighbourhoods could not be told apart by an algorithm that sees neighbourhoods alone.

Source: "Learning randomized algorithms with transformers" (arXiv 2408.10818). There any proper colouring is right; here
a row has one answer, the greedy one of its seed.
"""

from dataclasses import dataclass

import numpy as np

from titan_attent.tasks.task import Rows, SeededTask, option

COLOURS = 3
SMALLEST_FREE = np.array([0, 1, 0, 2, 0, 1, 0, 0], dtype=np.int16)
"""The smallest colour that no neighbour has, by the bits of the neighbours' colours: 1, 2 and 4. A cycle never asks for
the last one."""


@dataclass(frozen=True, kw_only=True)
class GraphColouring(SeededTask):
    name = "graph_colouring"
    summary = "three colours on a cycle, with a random seed in the row"

    nodes: int = option(8, "nodes of the cycle")

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require(3 <= self.nodes <= 1024, f"--nodes is {self.nodes}; set it to 3 to 1,024")

    def words(self) -> tuple[str, ...]:
        nodes, priorities = (f"n{i}" for i in range(self.nodes)), (f"p{i}" for i in range(self.nodes))
        return ",", "=", *(f"c{i}" for i in range(COLOURS)), *nodes, *priorities

    def rows(self, split: str, numbers: np.ndarray) -> Rows:
        draws, size, n = self.draws(split), self.nodes, len(numbers)
        first_colour, first_node, first_priority = 2, 2 + COLOURS, 2 + COLOURS + size
        inputs = numbers // self.seeds
        cycle = draws.orders(inputs, size, what="cycle")
        priorities = draws.orders(self.seed_rows(numbers), size, what="seed")
        following = np.roll(cycle, -1, axis=1)
        flipped = draws.bits(inputs, size, what="directions").astype(bool)
        edges = np.stack((np.where(flipped, following, cycle), np.where(flipped, cycle, following)), axis=2)
        edges = np.take_along_axis(edges, draws.orders(inputs, size, what="edges")[:, :, None].astype(int), axis=1)
        # Flat positions [n * size]: one gather per step instead of one per row and step.
        base = (np.arange(n) * size)[:, None]
        before, after = np.empty((2, n * size), dtype=np.int64)
        before[base + following], after[base + cycle] = base + cycle, base + following
        by_priority = np.empty((n, size), dtype=np.int64)
        np.put_along_axis(by_priority, (size - 1 - priorities).astype(int), base + np.arange(size), axis=1)
        used, colours = np.zeros(n * size, dtype=np.int8), np.empty(n * size, dtype=np.int16)
        for node in np.ascontiguousarray(by_priority.T):
            colour = SMALLEST_FREE[used[node]]
            colours[node] = colour
            bit = np.left_shift(1, colour, dtype=np.int8, casting="unsafe")
            used[before[node]] |= bit
            used[after[node]] |= bit
        return Rows.of_table(
            priorities + first_priority,
            np.array([[0]]),
            edges.reshape(n, -1) + first_node,
            np.array([[1]]),
            colours.reshape(n, size) + first_colour,
            answer=size,
        )
