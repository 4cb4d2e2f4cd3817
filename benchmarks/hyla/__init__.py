"""Attention as a hypernetwork against softmax and linear attention, on combinations that were not trained.

    python -m benchmarks.hyla --output outputs/hyla [--tasks fuzzy_logic sraven] [--seeds 0 1 2] [--publish PREFIX]

__main__.py   the command
problems.py   the two tasks as the authors pose them: real values and a squared error; all features at once
models.py     the authors' transformer with one of the attentions
training.py   one run: the authors' optimizer and schedule, in fewer steps
table.py      the tables, and the verdicts

The authors' settings are those of their code (github.com/smonsays/hypernetwork-attention, af9805f). A loop of its own,
because the product trains on token ids and the authors on real values.
"""
