"""The effect of each teaching rule on the validation loss, on clean and on dirty text.

__main__.py    the command
rules.py       the rules, and the configurations of their runs
table.py       results.json and table.md
"""
