"""Distillation on text: how many steps does a student save, in its own domain and out of it?

__main__.py    the command
data.py        the training text, and validation text of two domains
rules.py       the arms, and the tasks of their runs
measure.py     what a task does in its process
table.py       the page of results
"""
