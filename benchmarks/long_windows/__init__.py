"""The recommended rule where it could harm: long windows, and trusted text of another kind.

__main__.py    the command: data, scorers, runs, the table
corpora.py     the documents
gpu.py         the same question on one GPU, with a larger model; the cost of document masks and of folding
"""
