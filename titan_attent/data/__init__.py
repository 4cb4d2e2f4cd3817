"""The data, from files to the example ids of a step. Each folder's docstring lists its modules in reading order.

    text/        documents -> token ids -> shards on disk -> example id -> tokens
    formats/     token files of other tools: where their tokens are, where their documents end
    adopt/       such files -> a data set, without a copy
    images/      image files -> shards on disk -> example id -> augmented pixels
    plan/        (seed, pass, consumed batches) -> the example ids of this rank: the order of the data
    io/          atomic writes, positioned reads, folders in a fixed order, reader threads

    examples.py    the interface of a data set, of text or images
    config.py      the section [data]
    validation_sets.py  the validation data sets that it names
    run_record.py  the facts that a run records for the report
    branch.py      which checkpoints a run left behind when it went back to an earlier step

The loader for torchtitan is titan/loader.py.
"""
