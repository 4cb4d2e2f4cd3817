"""titan_attent: a teacher for torchtitan that selects the examples to train on.

    text -> tokens on disk -> sampler -> batch {input, example_id}, labels -> learner (torchtitan model, FSDP2)
                                ^                                               |
                                |                                     per-example loss (compiled)
        selection (ids, weights)|                                               |
                                +-- teacher <-- importance <-- loss buffer <----+   (async all-gather, sharded by id)

The packages, in the order of the data flow; the docstring of each lists its modules:

    data/          text and images on disk -> the examples that this rank reads -> batches
    losses/        logits, labels -> one loss per example; the buffer of the last loss of every example
    scores/        numbers per example on disk, written once by a model
    models/        learners that torchtitan does not have: vision
    systems/       extensions of the training step: teaching (selects examples), freezing (skips gradients of modules),
                   highway (approximates the backward pass)
    titan/         torchtitan's Trainer with the systems, its loader, validator and metrics; checks; patches
    adapters/      the teacher in the Hugging Face Trainer and in Lightning
    report/        a table and curves of runs, and what one run saved against another in steps, compute and time
    look/          data, and what a teacher would keep of it, before a run
    edit/          arithmetic on checkpoints: task vectors, averages
    foundations/   shared code: keyed random numbers, sharding, agreement, checks of values, the ledger

    __main__.py          lists the commands
    train.py, score.py   the commands; scorers.py is a former name, which only names its successor
    job_config.py        the TOML sections; the dataclass of each is in the package that reads it

Only ``titan/`` imports torchtitan; the other packages work in any PyTorch loop.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from titan_attent.data.plan.sampler import TeachingSampler
    from titan_attent.data.text.shards import TokenDataset
    from titan_attent.losses.buffer import LossBuffer
    from titan_attent.losses.cross_entropy import per_example_cross_entropy
    from titan_attent.systems.teaching.config import TeacherConfig
    from titan_attent.systems.teaching.teacher import Teacher

__version__ = "0.1.0"

__all__ = ["LossBuffer", "Teacher", "TeacherConfig", "TeachingSampler", "TokenDataset", "per_example_cross_entropy"]

_HOMES = {
    "LossBuffer": "losses.buffer",
    "Teacher": "systems.teaching.teacher",
    "TeacherConfig": "systems.teaching.config",
    "TeachingSampler": "data.plan.sampler",
    "TokenDataset": "data.text.shards",
    "per_example_cross_entropy": "losses.cross_entropy",
}
"""Name -> its module. It is imported when the name is first used, so that commands check what they can before torch."""


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = globals()[name] = getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
    return value
