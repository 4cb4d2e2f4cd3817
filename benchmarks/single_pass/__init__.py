"""The single-pass experiment: what teaching saves when a run sees 40% of the data once, all costs charged.

__main__.py    the command: scorers, runs, tables, pictures
corpora.py     the eight corpora
rules.py       the rules, and the commands of their runs
results.py     results in this folder, and from earlier calls and other machines
numbers.py     pairs of runs, costs, when a run reached uniform's final loss
goals.py       the goals, with a verdict for each
table.py       results.json and table.md
pictures.py    the curves, and the differences to uniform
"""
