"""The way of the data, from documents to the ids of a step.

    inputs.py      NAME=PATH -> files              of named data sources; walk.py: folders, each once
         |
    documents.py   files -> documents              one JSON line, parquet row or text file each
         |
    tokenizer.py   document -> token ids           a tiktoken encoding: by name, from a file, or trained (ranks.py)
         |                                         encode.py: many documents at a time
         |
    writer.py      token ids -> shards on disk     parallel, resumable (progress.py)
         |
    format.py      shards and index.json           hashes, fingerprint; atomic.py: files that are whole
         |
    shards.py      example id -> tokens            files.py: positioned reads, few files open
         |
    sampler.py     (selection, seed, pass, consumed) -> the ids of this rank
         |
    reader.py      ids -> batches                  threads that live as long as the run

examples.py says what a data set is to the rest, of text or of images (images/: from image files to pixels).
fixed.py reads a list of examples in order, for validation and scoring; holdout.py cuts a data set in two; told.py is
what a run tells of its data. config.py is the section [data]. torchtitan's loader over all this is titan/loader.py.
"""
