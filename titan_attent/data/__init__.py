"""The way of the data, from files to the ids of a step. Each folder's docstring lists its modules in reading order.

    text/        documents -> token ids -> shards on disk -> example id -> tokens
    images/      image files -> shards on disk -> example id -> augmented pixels
    plan/        (seed, pass, consumed batches) -> the example ids of this rank: the order of the data
    io/          files that are whole, positioned reads, folders in a fixed order, reader threads

    examples.py  what a data set is to the rest, of text or of images
    config.py    the section [data]
    run_record.py      what a run reports of its data

torchtitan's loader over all this is titan/loader.py.
"""
