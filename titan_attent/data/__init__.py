"""The way of the data, from documents to the ids of a step.

    inputs.py      NAME=PATH -> files              of named data sources; input_files.py: records or a text;
         |                                         folders.py: which files of a folder; walk.py: folders, each once
    documents.py   files -> documents              a JSON record (json_values.py), parquet row (parquet_text.py) or
         |                                         text file each; bad.py: what cannot be used
         |
    tokenizer.py   document -> token ids           a tiktoken encoding: by name, from a file, or trained (ranks.py)
         |                                         on text of all inputs (sample.py); encode.py: many at a time
         |
    writer.py      token ids -> shards on disk     parallel, resumable (progress.py, consumed.py)
         |                                         writer_options.py: its command; summary.py: what it tells
         |
    format.py      shards and index.json           hashes, fingerprint; atomic.py: files that are whole
         |
    shards.py      example id -> tokens            files.py: positioned reads, few files open
         |
    sampler.py     (selection, seed, pass, consumed) -> the ids of this rank; order.py: the order of a pass
         |
    reader.py      ids -> batches                  threads that live as long as the run

examples.py says what a data set is to the rest, of text or of images (images/: from image files to pixels). mixing.py
counts the documents that share an example. fixed.py reads a list of examples in order, for validation and scoring;
holdout.py cuts a data set in two; told.py is what a run tells of its data; same_tokens.py: whether the ids of two
data sets mean the same. config.py is the section [data]. torchtitan's loader over all this is titan/loader.py.
"""
