"""Adopting: token files of other tools become a data set where they are, without a copy.

    options.py    what the user says: format, boundaries, ids
    find.py       inputs -> token files, each recognised by its format (data/formats/)
    boundaries.py which ids separate documents, and where they stand
    pieces.py     token file -> pieces of whole documents, each a shard
    scan.py       piece -> shard: hashed, its ids checked, its documents found
    record.py     the finished shards of an interrupted command
    adopt.py      all of it; __main__.py: the command

The index and the files beside it are those of data/text/format.py; from then on nobody asks a format again.
"""
