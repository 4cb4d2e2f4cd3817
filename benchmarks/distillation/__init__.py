"""Does a student learn sooner from intermediate checkpoints of its source? Sparse parity and PCFG.

__main__.py    the command
arms.py        which checkpoints, temperature and number of steps a run has
problems.py    the two problems: rows, models, optimizers, FLOPs
runs.py        trains a source and its students in a plain loop
results.py     results on disk, and those of other calls
table.py       the page
picture.py     accuracy against steps and against FLOPs
"""
