"""The commands that write scores: one number per example, computed once before a run.

command.py            the command `titan_attent.score` and its subcommands
checkpoint.py         one checkpoint's model scores; checkpoint_checks.py: options and checks
pair.py               trains two small models and scores with both; pair_plan.py: their options, configuration and cost
pair_bigram.py        scorers that count pairs of tokens instead of training
targets.py            writes target ids of every token from a source, for distillation
write_targets.py      the batches in which that source reads, and where their targets belong
write_losses.py       scores every example on all ranks, and writes the losses
write_documents.py    scores every document in rows that others share, and writes the losses
subcommands.py        runs commands of this package one after the other, on all ranks
"""
