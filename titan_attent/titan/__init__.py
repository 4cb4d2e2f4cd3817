"""Everything that touches torchtitan 0.2.2: the one package that may import it.

    launch.py          the training command: configuration, checks, hand over to torchtitan
    checks/            what a run is refused for
    train_spec.py      which parts a model gets; models/: what differs between learners of text and of images
    loader.py          torchtitan's loader over shards; dataset_cache.py: the data sets of a run, each opened once
    trainer.py         torchtitan's Trainer with the run's systems in its step; joined_systems.py: all of them as one
    frozen_model.py    a second model beside the learner, frozen
    pipeline.py        the loss function of a pipeline schedule
    validator.py       validation over the same shards each time
    metrics.py         torchtitan's metrics with those of the systems beside them
    health.py          a run whose weights are no numbers any more; owner.py: one run per folder
    checkpoint_folder.py   which checkpoints a folder holds; checkpoint_metadata.py: a look that runs nothing of one;
                       resumed_schedule.py: the optimizer's settings after a resume
    user_errors.py     how a user's mistake ends a run
    scoring/           the commands that score
    patches/           of torchtitan and torch

Importing this package puts the patches in force (patches/registry.py) before anything of torchtitan is imported, which
copies the device type by name.
"""

from titan_attent.titan.patches.registry import apply_patches

apply_patches()
