"""titan_attent: a teacher for torchtitan that trains the sequences worth training.

    text -> tokens on disk -> sampler -> batch {input, example_id}, labels -> learner (torchtitan model, FSDP2)
                                ^                                               |
                                |                                     per-example loss (compiled)
        selection (ids, weights)|                                               |
                                +-- teacher <-- importance <-- loss buffer <----+   (async all-gather, sharded by id)

The way of the data is the way of the modules:

    data/writer.py        documents -> tokens -> shards          data/tokenizer.py
    data/shards.py        example id -> tokens
    data/order.py         pools and passes: position -> example id
    data/sampler.py       (pass, consumed) -> this rank's ids and weights
    titan/loader.py        torchtitan's loader over them
    losses/cross_entropy.py               logits, labels -> one loss an example
    losses/vocab_parallel.py      the same where vocabulary or sequence are cut; titan/pipeline.py: where the loss is stages away
    losses/chunked.py       the same without a second copy of the logits; losses/head.py: without the logits
    losses/buffer.py        the last loss of every example, sharded (losses/records.py); losses/window.py: the last of all
    foundations/agreement.py          do all ranks follow the same decision?
    teacher/teacher.py    rounds: what the next pass trains
    teacher/draws.py      pool -> importance -> guards -> strategy -> selection, weights, audit
    foundations/ledger.py     where the time went, what was trained and skipped
    scores/reference.py          losses of a reference model, for excess_loss; written by score.py with scores/writer.py
    titan/trainer.py            torchtitan's Trainer with the teacher beside it
    titan/train_spec.py         which parts a model gets
    train.py              the command; titan/preflight.py, titan/parallelism.py and titan/value_checks.py check its input
    titan/compat.py             mends torchtitan 0.2.2; titan/compat_cpu.py: on CPU, whose log titan/quiet.py keeps free of GPUs
    report/               a table and curves of runs, and what one saved against another

``data/`` (but for loader.py), ``loss*.py``, ``scores/reference.py`` and ``teacher/`` need no torchtitan and work in any
PyTorch loop.
"""

from titan_attent.data.sampler import TeachingSampler
from titan_attent.data.shards import TokenDataset
from titan_attent.job_config import TeacherConfig
from titan_attent.losses.buffer import LossBuffer
from titan_attent.losses.cross_entropy import per_example_cross_entropy
from titan_attent.teacher.teacher import Teacher

__version__ = "0.1.0"

__all__ = ["LossBuffer", "Teacher", "TeacherConfig", "TeachingSampler", "TokenDataset", "per_example_cross_entropy"]
