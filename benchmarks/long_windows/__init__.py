"""The recommended rule where it could harm: long windows, and trusted text of another kind.

corpora.py     corpora whose documents are shorter than a window
__main__.py    the command: data, scorers, runs, the table
"""
