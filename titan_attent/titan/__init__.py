"""Everything that touches torchtitan 0.2.2: the one room that may import it.

    launch.py          the training command: configuration, checks, hand over to torchtitan
    scorer.py          the scoring command; scoring_checks.py: its input
    write_losses.py    scores every example on all ranks, and writes the losses
    scorers.py         the command that makes scorers; scorers_plan.py: what they are; scorers_bigram.py: those that are
                       counted; stages.py: the commands that make those that are trained
    preflight.py       every check before the first process group; parallelism.py, value_checks.py: of the configuration
    mistakes.py        how a user's mistake ends a run; owner.py: one run a folder; health.py: a run whose weights are
                       no numbers any more
    load_sources.py    what a run starts from; checkpoint_folder.py: which checkpoints a folder holds;
                       resume_checks.py: whether one fits the run; checkpoint_look.py: a look that runs nothing
    opened.py          the data sets of a run, each opened once
    kinds.py           what differs between learners of text and of images; vision.py: the models of images, and theirs
                       in a run; initial_weights.py: a trunk with a new head
    train_spec.py      which parts a model gets
    loader.py          torchtitan's loader over the token shards
    trainer.py         torchtitan's Trainer with the run's systems in its step; together.py: all of them as one
    pipeline.py        the loss function of a pipeline schedule
    validator.py       validation over the same shards each time
    metrics.py         torchtitan's metrics with those of the systems beside them
    compat.py          mends torchtitan 0.2.2; compat_checkpoint.py: its checkpoints, with resumed_schedule.py;
                       compat_cpu.py: on CPU, whose log quiet.py keeps free of GPUs

Importing this package puts the mends in force before anything of torchtitan is imported, which copies the device type
by name.
"""

from titan_attent.titan import compat as compat
