"""The vision experiment: what teaching saves on images in many passes, clean and dirty, all costs charged.

__main__.py    the command
rules.py       the sets, the rules, and the cost of a rule
tasks.py       data, scorers and runs as tasks, with the configuration of each
data.py        the images of a condition, written as data sets of the package
runs.py        runs a task in a process forked from one that has imported torch
numbers.py     pairs of runs, when a run reached uniform's final accuracy, verdicts
table.py       table.md
pictures.py    accuracy against compute
"""
