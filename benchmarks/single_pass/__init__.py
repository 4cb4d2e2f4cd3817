"""The evidence: what teaching saves in a single pass over data of which a run sees 40%, all costs charged.

__main__.py    the command: scorers, runs, tables, pictures
corpora.py     the eight corpora
rules.py       all that tells two runs apart, and their commands
results.py     results of this folder, of earlier calls and of other machines
numbers.py     pairs of runs, costs, when a run was where uniform ended
goals.py       the goals with a verdict each
table.py       results.json and table.md
pictures.py    the curves, and the differences to uniform
"""
