"""The commands that score: a number per example, written once before a run.

scorer.py           one model scores; scoring_checks.py: its input
write_losses.py     scores every example on all ranks, and writes the losses
scorers.py          trains two small models and scores with both; pair_plan.py: what they are
pair_bigram.py   scorers that are counted, not trained
subcommands.py      the commands that train the others, one after the other
"""
