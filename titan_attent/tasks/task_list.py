"""The tasks by name."""

from titan_attent.tasks.fuzzy_logic import FuzzyLogic
from titan_attent.tasks.graph_colouring import GraphColouring
from titan_attent.tasks.parity import Parity
from titan_attent.tasks.pcfg import Pcfg
from titan_attent.tasks.recall import Recall
from titan_attent.tasks.sparse_parity import SparseParity
from titan_attent.tasks.sraven import Sraven
from titan_attent.tasks.task import Task

TASKS: dict[str, type[Task]] = {
    task.name: task for task in (Parity, Recall, GraphColouring, FuzzyLogic, Sraven, Pcfg, SparseParity)
}
