"""Text: from documents of many kinds of files to shards of tokens, and from shards to windows.

    inputs.py      NAME=PATH -> files              of named data sources; input_files.py: records or a text;
         |                                         folders.py: which files of a folder
    documents.py   files -> documents              a JSON record (json_values.py), parquet row (parquet_text.py) or
         |                                         text file each
    tokenizer.py   document -> token ids           a tiktoken encoding: by name, from a file, or trained (bpe.py)
         |                                         on text of all inputs (sample.py); encode.py: many at a time
    writer.py      token ids -> shards on disk     parallel, resumable (progress.py, consumed.py)
         |                                         __main__.py: its command; summary.py: what it reports
    format.py      shards and index.json           hashes, fingerprint
         |
    shards.py      example id -> tokens

mixing.py counts the documents that share an example; holdout.py cuts a data set in two; same_tokens.py: whether the ids
of two data sets mean the same.
"""
