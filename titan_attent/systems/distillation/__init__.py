"""Progressive distillation: a student learns from successive checkpoints of another model, its source.

    source's checkpoints, logs -> schedule (step -> checkpoint, weight of the labels) -> source, frozen -> targets
    loss of a token = a CE(label) + (1 - a) KL(source || student)

config.py     the section [distillation]
schedule.py   pure: which checkpoint at which step, and a
checks.py     the tokenizers of source and student
sources.py    the checkpoints on disk, the source's own losses, reading ahead
system.py     the system: forward passes of the source, the loss, swaps, scalars

Source: Panigrahi et al., Progressive distillation induces an implicit curriculum, ICLR 2025 (arXiv 2410.05464). The
token losses are in losses/divergence.py, targets on disk in scores/targets.py.
"""
