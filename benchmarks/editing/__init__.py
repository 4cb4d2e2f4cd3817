"""What task vectors and means of checkpoints do: languages, unlearning, a mean in place of a decay.

__main__.py    the command
runs.py        the trainings, as tasks
languages.py   made-up languages: aligned, irrelevant, contradictory
packages.py    the text of packages of Python's standard library
ascent.py      a system that turns the loss around: gradient ascent
edits.py       edits the trained weights, and measures the results
page.py        docs/results/editing.md from the results
"""
