"""The way of the data, from documents to the ids of a step.

    inputs.py      NAME=PATH -> files              of named data sources
         |
    documents.py   files -> documents              one JSON line, parquet row or text file each
         |
    tokenizer.py   document -> token ids           a tiktoken encoding: by name, from a file, or trained (ranks.py)
         |                                         encode.py: many documents at a time
         |
    writer.py      token ids -> shards on disk     parallel, resumable (progress.py)
         |
    format.py      shards and index.json           hashes, fingerprint, atomic files
         |
    shards.py      example id -> tokens            files.py: positioned reads, few files open
         |                                         opened.py: each data set of a run opened once
    sampler.py     (selection, seed, pass, consumed) -> the ids of this rank
         |
    reader.py      ids -> batches                  threads that live as long as the run
         |
    loader.py      batches of the run              torchtitan's loader, with a state that names no rank

All but loader.py work without torchtitan.
"""
