"""What teaching saves where images are seen many times, clean and dirty, all costs charged.

__main__.py    the command
rules.py       the sets, the rules, and what a rule costs
tasks.py       data, scorers and runs as tasks, with the configuration of each
data.py        the images of a condition, written as data sets of the package
runs.py        a task done in a process forked from one that has imported torch
numbers.py     pairs of runs, when one was where uniform ended, verdicts
table.py       table.md
pictures.py    accuracy against compute
"""
