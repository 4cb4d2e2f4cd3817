"""Windows or documents, where a window holds several documents; and trusted text of another kind.

__main__.py    the command: data, scorers, runs, the page
corpora.py     the documents of each corpus
gpu.py         the same question on one GPU, with a larger model; the cost of document masks and of folding
"""
