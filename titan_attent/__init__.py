"""titan_attent: a teacher for torchtitan that trains the sequences worth training.

    text -> tokens on disk -> sampler -> batch {input, example_id}, labels -> learner (torchtitan model, FSDP2)
                                ^                                               |
                                |                                     per-example loss (compiled)
        selection (ids, weights)|                                               |
                                +-- teacher <-- importance <-- loss buffer <----+   (async all-gather, sharded by id)

One folder a question, in the order of the data's way; the docstring of each lists its modules:

    data/          text -> tokens on disk -> which examples this rank reads -> batches
    losses/        logits, labels -> one loss an example; the buffer that keeps the last loss of every example
    scores/        numbers per example on disk, written by a model once: reference losses
    vision/        learners of images: the models, and what they are asked
    teacher/       which examples a pass trains, and with what weights
    titan/         torchtitan: its Trainer with the systems in it, its loader, validator, metrics; checks; mends
    report/        a table and curves of runs, and what one saved against another
    foundations/   what all of them stand on: keyed randomness, sharding, agreement, checks of values, the ledger

    train.py, score.py   the commands
    job_config.py        the TOML sections, each a dataclass in its room

Only ``titan/`` imports torchtitan; everything else works in any PyTorch loop.
"""

from titan_attent.data.sampler import TeachingSampler
from titan_attent.data.shards import TokenDataset
from titan_attent.losses.buffer import LossBuffer
from titan_attent.losses.cross_entropy import per_example_cross_entropy
from titan_attent.teacher.config import TeacherConfig
from titan_attent.teacher.teacher import Teacher

__version__ = "0.1.0"

__all__ = ["LossBuffer", "Teacher", "TeacherConfig", "TeachingSampler", "TokenDataset", "per_example_cross_entropy"]
