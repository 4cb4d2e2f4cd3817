"""The one package that may import torchtitan 0.2.2.

    first_checks.py    what a command line needs no torch for: --help, keys, types, ranges
    launch.py          the training command: parses, checks, calls torchtitan
    run_plan.py        the plan of a run, which --check prints
    checks/            the checks that refuse a run before it starts
    train_spec.py      the TrainSpec of a model
    models/            the differences between text and image models
    loader.py          torchtitan's data loader over shards
    mixtures.py        the mixture of sources: checks, parts
    data_plan.py       the plan of the data, for the trainer
    forward_rows.py    the rows of documents in forward passes
    dataset_cache.py   the data sets of a run, each opened once
    trainer.py         torchtitan's Trainer with the run's systems in its step
    joined_systems.py  all systems of a run as one object
    frozen_model.py    a second, frozen model beside the learner
    pipeline.py        the loss function of a pipeline schedule
    validator.py       validation over the same examples each time
    measured_sets.py   the validation sets: which examples are read, and what is measured on them
    source_losses.py   the loss of each data source
    metrics.py         torchtitan's metrics and those of the systems
    tensorboard.py     the configuration and the order of the charts in TensorBoard
    health.py          ends a run whose weights are not finite
    owner.py           allows one run per folder
    checkpoint_folder.py    which checkpoints a folder holds
    checkpoint_metadata.py  reads a checkpoint's metadata without running its code
    hugging_face.py         torchtitan's conversion of Hugging Face's weights
    resumed_schedule.py     the optimizer's settings after a resume
    changed_settings.py     which settings changed since the checkpoint
    user_errors.py     how a user's mistake ends a run
    scoring/           the commands that score
    patches/           patches of torchtitan and torch

Importing this package imports neither torch nor torchtitan. The patches are applied when torchtitan is imported
(patches/at_import.py), so it must not be imported before this package.
"""

from titan_attent.titan.patches.at_import import patch_at_import

patch_at_import()
