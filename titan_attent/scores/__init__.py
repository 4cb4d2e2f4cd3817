"""Numbers per example on disk, bound to the data that they are of.

reference.py   the losses of a reference model: what the files are, reading them
writer.py      writing them: one file that grows, resumable, finished by one small file
provenance.py  whose losses a run reads as whose, and what it refuses
bigram.py      the smallest model that has losses: counts of pairs of tokens
"""
