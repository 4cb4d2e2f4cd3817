"""What is compared: a fixed or a random seed in the row, each trained on the mean loss and on the q-norm."""

from typing import Any, NamedTuple

from benchmarks.seeds.model import LinearRecall, LocalColouring
from titan_attent.tasks.graph_colouring import GraphColouring
from titan_attent.tasks.recall import Recall
from titan_attent.tasks.task import SeededTask

Q = 8.0
"""The power of the adversarial arms. The paper's own is not in its public text."""


class Arm(NamedTuple):
    fixed_seed: bool
    q: float


ADVERSARIAL = "random seed, q = 8"
ARMS = {
    "fixed seed, q = 1": Arm(True, 1.0),
    "fixed seed, q = 8": Arm(True, Q),
    "random seed, q = 1": Arm(False, 1.0),
    ADVERSARIAL: Arm(False, Q),
}


RECALL = "8 pairs of 8 keys and 2 values, 8 bits of seed, and a memory of 2 x 2 numbers"
COLOURING = (
    "cycles of 8 nodes with names, a random or a fixed order of priorities as the seed, and a view of",
    "the two neighbours; any proper colouring is right, as in the paper",
)
"""Lines of the page."""


class Problem(NamedTuple):
    """A task with its model and its training, the same for all arms."""

    name: str
    steps: int
    rate: float
    inputs: int = 16
    seeds: int = 4

    def task(self, arm: Arm, *, seeds: int) -> SeededTask:
        given: dict[str, Any] = {"seeds": seeds, "fixed_seed": arm.fixed_seed}
        if self.name == "recall":
            return Recall(pairs=8, keys=8, values=2, seed_bits=8, **given)
        return GraphColouring(nodes=8, **given)

    def model(self, task: SeededTask) -> LinearRecall | LocalColouring:
        return LinearRecall(task) if isinstance(task, Recall) else LocalColouring(task)  # type: ignore[arg-type]


PROBLEMS = {
    "recall": Problem("recall", steps=2000, rate=5e-3),
    "graph_colouring": Problem("graph_colouring", steps=1000, rate=5e-3),
}
