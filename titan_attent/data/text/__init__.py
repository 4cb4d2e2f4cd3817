"""Text: from documents in files of many formats to shards of tokens, and from shards to windows.

    inputs.py      NAME=PATH -> files              of named data sources; input_files.py: records or a text;
         |                                         folders.py: which files of a folder; saved_folder.py: of save_to_disk
    documents.py   files -> documents              from JSON records (json_values.py), rows of parquet and Arrow
         |                                         (parquet_text.py, arrow_text.py; column_values.py) and csv
         |                                         (csv_text.py), texts; compressed.py: .gz and .zst;
         |                                         records.py: prompts and conversations; text_template.py: several keys
    tokenizer.py   document -> token ids           a tiktoken encoding: by name, from a file, or trained (bpe.py)
         |                                         on text of all inputs (sample.py); encode.py: many at a time
    writer.py      token ids -> shards on disk     parallel, resumable (progress.py, consumed_records.py)
         |                                         output.py: its folder; held_out.py: which documents are
         |                                         validation data; __main__.py: its command; summary.py: its report
    format.py      shards and index.json           hashes, fingerprint; document_files.py: ends of documents, masks
         |
    shards.py      example id -> window of tokens  or, where documents are the unit: spans.py, document_examples.py

boundaries.py finds the documents of a data set of an earlier version by the eos ids (eos_documents.py), and adds them.
mixing.py counts the documents per example. decoded.py shows examples as text. holdout.py splits a data set in two.
tokenizer_check.py checks that two data sets were written with the same tokenizer. token_bytes.py says how much text a
token id is. source_tokens.py has the tokens and documents of each data source. segments.py reads tokens in pieces of
adopted files (file_view.py).
"""
