"""titan_attent: a teacher for torchtitan that trains the sequences worth training.

    text -> tokens on disk -> sampler -> batch {input, example_id}, labels -> learner (torchtitan model, FSDP2)
                                ^                                               |
                                |                                     per-example loss (compiled)
        selection (ids, weights)|                                               |
                                +-- teacher <-- importance <-- loss buffer <----+   (async all-gather, sharded by id)

One folder a question, in the order of the data's way; the docstring of each lists its modules:

    data/          text and images on disk -> which examples this rank reads -> batches
    losses/        logits, labels -> one loss per example; the buffer that keeps the last loss of every example
    scores/        numbers per example on disk, written by a model once
    models/        learners beside torchtitan's own: vision
    systems/       what takes part in a step: teaching (which examples), freezing (which parts), highway (which way)
    titan/         torchtitan: its Trainer with the systems in it, its loader, validator, metrics; checks; patches
    report/        a table and curves of runs, and what one saved against another
    foundations/   what all of them stand on: keyed randomness, sharding, agreement, checks of values, the ledger

    train.py, score.py, scorers.py   the commands
    job_config.py                    the TOML sections, each a dataclass in the package that it is about

Only ``titan/`` imports torchtitan; everything else works in any PyTorch loop.
"""

from titan_attent.data.plan.sampler import TeachingSampler
from titan_attent.data.text.shards import TokenDataset
from titan_attent.losses.buffer import LossBuffer
from titan_attent.losses.cross_entropy import per_example_cross_entropy
from titan_attent.systems.teaching.config import TeacherConfig
from titan_attent.systems.teaching.teacher import Teacher

__version__ = "0.1.0"

__all__ = ["LossBuffer", "Teacher", "TeacherConfig", "TeachingSampler", "TokenDataset", "per_example_cross_entropy"]
