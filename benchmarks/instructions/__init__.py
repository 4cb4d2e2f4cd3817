"""Fine-tuning a small pretrained model on instruction pairs: does teaching save steps?

__main__.py    the command
pairs.py       instruction pairs of Debian and Python packages, and the exchange of completions
data.py        the data sets
rules.py       rules, and the tasks of their runs
measure.py     what a task does in its process; token accuracy
table.py       the page of results
"""
