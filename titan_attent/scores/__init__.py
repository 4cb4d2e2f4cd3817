"""Scores on disk: numbers per example, written by a scorer, and bound to the data that was scored.

stored.py      the losses of a scorer: the files, and reading them
writer.py      writing them: one growing file, resumable, completed by one small file
find.py        which scorers' losses a folder holds
provenance.py  checks that a run reads each scorer's losses in their right role
bigram.py      the smallest scorer: counts of pairs of tokens
table.py       its counts on disk
targets.py     target ids of every token from a source, for distillation
"""
