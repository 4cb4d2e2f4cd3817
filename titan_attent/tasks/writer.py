"""Writes the rows of a task as data sets of titan_attent.data.text, each row a document with a mask.

    DIR/train              the rows to train on
    DIR/validation         the rows of all validation splits; each split is a data source of its name
    DIR/held_out, ...      each validation split alone, where there are several
    DIR/task.json          the task, its options, its rows per split, and what they have in common (Task.facts)

Only the words of the answer count as labels; the eos does not. A command that is refused leaves the folder as it was.
The index of the training data is written last: with it, all is done.

Cost: memory for ``ROWS_AT_ONCE`` rows; every token is hashed and written once.
"""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from titan_attent.data.io.atomic import write_atomically
from titan_attent.data.text.any_tokenizer import Tokenizer
from titan_attent.data.text.format import ShardEntry, ShardWriter, token_dtype, write_index
from titan_attent.data.text.held_out import VALIDATION
from titan_attent.data.text.output import TASK_FILE, check_output, delete_data_set, opened
from titan_attent.tasks.task import TRAIN, Rows, Task
from titan_attent.tasks.task_list import TASKS
from titan_attent.tasks.vocabulary import FIRST_WORD, tokenizer_of

ROWS_AT_ONCE = 4096
FOLDERS = tuple(sorted({TRAIN, VALIDATION, *(split for task in TASKS.values() for split in task.splits)}))
"""All folders of data sets that a task may have: ``overwrite`` deletes those of any earlier task."""


@dataclass(frozen=True, kw_only=True)
class TaskSummary:
    """The written data sets.

    Attributes:
        path: the folder that has all of them.
        rows, tokens: by the folder of the data set.
        longest: words of the longest row; ``seq_len`` of a run that trains each row whole.
    """

    path: Path
    rows: Mapping[str, int]
    tokens: Mapping[str, int]
    longest: int


def folders_of(task: Task) -> dict[str, tuple[str, ...]]:
    """The folder of each data set of a task -> the splits whose rows it has; the training data last."""
    alone = {split: (split,) for split in task.splits} if len(task.splits) > 1 else {}
    return alone | {VALIDATION: task.splits, TRAIN: (TRAIN,)}


def write_task(
    task: Task,
    *,
    output: str | Path,
    examples: int = 20_000,
    validation_examples: int = 1_000,
    shard_tokens: int = 2**27,
    overwrite: bool = False,
) -> TaskSummary:
    """Write the data sets of ``task`` into the folder ``output``, which is created if it is missing.

    Args:
        examples: rows of the training data.
        validation_examples: rows of each validation split.
        shard_tokens: a shard is finished after the chunk of rows that reaches this number of tokens.
        overwrite: delete the data sets of text in ``output`` first.

    Raises:
        ValueError: a number is not possible, or ``output`` holds a data set, or something else in its place.
    """
    per_input = task.rows_per_input()
    counts = {"--examples": examples, "--validation-examples": validation_examples, "--shard-tokens": shard_tokens}
    for name, count in counts.items():
        if count < 1:
            raise ValueError(f"{name} is {count}; set it to 1 or more")
        if name != "--shard-tokens" and count % per_input:
            raise ValueError(f"{name} is {count}; set it to a multiple of {per_input} (--seeds), the rows per input")
    folder = Path(output)
    check_output(folder, paths=(), overwrite=overwrite, parts=FOLDERS)
    words = task.words()
    tokenizer = tokenizer_of(task.name, words)
    sizes = {split: validation_examples for split in task.splits} | {TRAIN: examples}
    tokens: dict[str, int] = {}
    longest = 0
    with opened(folder, parts=FOLDERS):
        if overwrite:
            delete_data_set(folder, parts=FOLDERS)
        content = {"task": task.name, "options": asdict(task), "rows": sizes, "facts": task.facts()}
        write_atomically(folder / TASK_FILE, (json.dumps(content) + "\n").encode("ascii"))
        for name, splits in folders_of(task).items():
            part = folder / name
            part.mkdir(exist_ok=True)
            tokenizer.save(part)
            shards: list[ShardEntry] = []
            for split in splits:
                length = _write_split(
                    task, split, sizes[split], part, shards=shards, tokenizer=tokenizer, shard_tokens=shard_tokens
                )
                longest = max(longest, length)
            index = write_index(
                part,
                dtype=token_dtype(tokenizer.vocab_size),
                shards=shards,
                num_documents=sum(sizes[split] for split in splits),
                max_token_id=tokenizer.eos_id,
                tokenizer=tokenizer.info(),
            )
            tokens[name] = index.num_tokens
    rows = {name: sum(sizes[split] for split in splits) for name, splits in folders_of(task).items()}
    return TaskSummary(path=folder, rows=rows, tokens=tokens, longest=longest)


def _write_split(
    task: Task,
    split: str,
    num_rows: int,
    folder: Path,
    *,
    shards: list[ShardEntry],
    tokenizer: Tokenizer,
    shard_tokens: int,
) -> int:
    """Write the rows of one split to shards of their own, and append these to ``shards``.

    Returns:
        The words of the longest row.
    """
    longest, start = 0, 0
    while start < num_rows:
        path = folder / f"shard-{len(shards):05d}.bin"
        with ShardWriter(path, dtype=token_dtype(tokenizer.vocab_size), source=split, mask=True) as shard:
            while start < num_rows and shard.num_tokens < shard_tokens:
                stop = min(start + ROWS_AT_ONCE, num_rows)
                rows = task.rows(split, np.arange(start, stop))
                shard.append_documents(*documents_of(rows, eos_id=tokenizer.eos_id))
                longest = max(longest, int(np.diff(rows.ends, prepend=0).max()))
                start = stop
            shards.append(shard.finish())
    return longest


def documents_of(rows: Rows, *, eos_id: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Rows of words as documents.

    Returns:
        (token ids [T + n], each row with the eos behind it; int64 [n], the exclusive ends of the documents; bool
        [T + n], which tokens count as labels).
    """
    n = len(rows.ends)
    ends = rows.ends + np.arange(1, n + 1)
    is_word = np.ones(len(rows.words) + n, dtype=bool)
    is_word[ends - 1] = False
    tokens = np.full(len(is_word), eos_id, dtype=np.int32)
    tokens[is_word] = rows.words.astype(np.int32) + FIRST_WORD
    counts = np.zeros(len(is_word), dtype=bool)
    counts[is_word] = rows.counts
    return tokens, ends, counts
