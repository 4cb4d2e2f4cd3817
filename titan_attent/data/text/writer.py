"""Documents to token shards: in parallel, and resumed after a kill. __main__.py is the command.

One thread reads ahead and writes, ``num_threads`` others encode chunks of documents. The tokens, every document closed
by the eos id, go to the shards in the order of the inputs, whatever the number of threads. A shard closes at the first
end of a document at which it holds ``shard_tokens``, and before a document of another source. Then progress.json
records what was consumed, so that a killed run loses one shard of work at most, and the same command ends in the same
bytes as an uninterrupted run.

Cost: the memory of encode.py; every token is hashed and written once.
"""

import os
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import closing
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from titan_attent.data.io.bad import BINARY, ENCODING, SKIPPED_FILE, SkippedLog
from titan_attent.data.io.folder import PROGRESS_FILE, locked
from titan_attent.data.io.inputs import parse_inputs
from titan_attent.data.io.walk import LeftOut
from titan_attent.data.text.consumed_records import in_utf8
from titan_attent.data.text.documents import MAX_DOCUMENT_BYTES, Document, read_documents
from titan_attent.data.text.encode import Encoded, encode_documents
from titan_attent.data.text.format import ShardWriter, token_dtype, write_index
from titan_attent.data.text.inputs import InputFile, list_files
from titan_attent.data.text.progress import Progress, check_output, resume, run_arguments
from titan_attent.data.text.sample import sample_texts
from titan_attent.data.text.summary import Summary, told_nothing
from titan_attent.data.text.tokenizer import Tokenizer, make_tokenizer

_JSON_LINES, _HEAD = b'}\n{"', 2**16
"""Where one record of JSON lines ends and the next begins; bytes of a document that are looked at for it."""


def write_dataset(
    inputs: Sequence[str | Path],
    *,
    output: str | Path,
    tokenizer: str,
    text_key: str = "text",
    shard_tokens: int = 2**27,
    num_threads: int = os.cpu_count() or 1,
    max_training_bytes: int = 2**28,
    extensions: Sequence[str] | None = None,
    on_bad: str = "refuse",
    max_document_bytes: int = MAX_DOCUMENT_BYTES,
    progress: bool = False,
) -> Summary:
    """Write the documents of ``inputs`` as a data set, or finish one that was interrupted.

    Args:
        inputs: .jsonl, .ndjson, .json (each also .gz), .parquet or text files, or folders; a string may be a pattern,
            and name the data source in front, ``NAME=PATH`` (:func:`~.inputs.parse_inputs`). Without a name it is
            ``default``. Inputs stay in their order; neighbours of one name are one stretch of that source.
        output: the folder to write, made if missing; not inside an input.
        tokenizer: a tiktoken encoding, the path of a rank file, or ``train:VOCAB_SIZE``, which learns one from the
            ``max_training_bytes`` of the inputs' text, of all alike (sample.py).
        text_key: JSON key or parquet column that holds the text.
        shard_tokens: a shard closes at the end of the document that reaches it.
        num_threads: that encode; they do not change what is written.
        extensions: what is read of a folder; None for its records, or else its texts (folders.py).
        on_bad: "refuse" ends at the first record or file that cannot be used, and at a folder of which the greater part
            is not read; "skip" leaves them out. What is left out is counted, and listed in skipped.jsonl.
        max_document_bytes: of a document, and of a JSON line.
        progress: show a bar on stderr.

    Raises:
        ValueError: an input, tokenizer or argument that cannot be used, a data set that is finished, or an interrupted
            one that was begun with other arguments.
    """
    inputs = [inputs] if isinstance(inputs, (str, Path)) else inputs
    counts = {"shard_tokens": shard_tokens, "num_threads": num_threads, "max_training_bytes": max_training_bytes}
    counts["max_document_bytes"] = max_document_bytes
    if on_bad not in ("refuse", "skip"):
        raise ValueError(f'on_bad is {on_bad!r}; it is "refuse" or "skip"')
    for name, value in counts.items():
        if value < 1:
            raise ValueError(f"{name} is {value}; set it to 1 or more")
    folder = Path(output)
    named_paths = parse_inputs(inputs)
    check_output(folder, paths=[path for _, path in named_paths])
    left_out, skip = LeftOut(), on_bad == "skip"
    files = list_files(named_paths, extensions=extensions, text_key=text_key, left_out=left_out, skip=skip)
    arguments = run_arguments(
        files, tokenizer=tokenizer, text_key=text_key, shard_tokens=shard_tokens, training_bytes=max_training_bytes
    )
    folder.mkdir(parents=True, exist_ok=True)
    with locked(folder):
        reading: dict[str, Any] = {"text_key": text_key, "max_bytes": max_document_bytes}
        state = resume(folder, arguments=arguments, files=files, **reading)
        if state:
            encoder = Tokenizer.from_info(state.tokenizer, folder)
        else:
            texts = sample_texts(files, num_bytes=max_training_bytes, **reading)
            encoder = make_tokenizer(tokenizer, texts=texts, max_training_bytes=max_training_bytes)
            encoder.save(folder)
            state = Progress(arguments, encoder.info())
            state.save(folder)
        started, num_tokens_before = time.perf_counter(), state.num_tokens
        documents = read_documents(files, start=state.cursor, skip=skip, **reading)
        dtype = token_dtype(encoder.vocab_size)
        sizes = [file.num_bytes for file in files]
        bar = tqdm(
            total=sum(sizes),
            initial=sum(sizes[: state.cursor.file]),
            unit="B",
            unit_scale=True,
            mininterval=0.2 if sys.stderr.isatty() else 60,  # a log file is no place for five lines a second
            disable=not progress,
        )
        with bar, closing(encode_documents(documents, tokenizer=encoder, num_threads=num_threads)) as encoded:
            _write_shards(encoded, state, folder=folder, dtype=dtype, shard_tokens=shard_tokens, bar=bar, files=files)
        if not state.num_documents:
            (folder / PROGRESS_FILE).unlink()
            told = told_nothing(state.skipped, state.num_skipped, left_out, path=folder / SKIPPED_FILE)
            raise ValueError(
                f"{', '.join(map(str, inputs))}: no document in these inputs ({told}); give ones that hold text"
            )
        counts = {"num_documents": state.num_documents, "max_token_id": state.max_token_id}
        index = write_index(folder, dtype=dtype, shards=state.shards, tokenizer=state.tokenizer, **counts)
        (folder / PROGRESS_FILE).unlink()
    source_tokens = dict.fromkeys((file.source for file in files), 0)
    for shard in index.shards:
        source_tokens[shard.source] += shard.num_tokens
    return Summary(
        path=folder,
        num_documents=state.num_documents,
        num_tokens=index.num_tokens,
        num_shards=len(state.shards),
        num_skipped=state.num_skipped,
        source_tokens=source_tokens,
        tokens_per_second=(index.num_tokens - num_tokens_before) / (time.perf_counter() - started),
        fingerprint=index.fingerprint,
        skipped=state.skipped,
        noted=state.noted,
        left_out=left_out,
    )


def _write_shards(
    encoded: Iterator[Encoded],
    state: Progress,
    *,
    folder: Path,
    dtype: np.dtype,
    shard_tokens: int,
    bar: tqdm,
    files: Sequence[InputFile],
) -> None:
    """Write all of ``encoded``; ``state`` is saved at the end of every shard, when it describes finished ones."""
    log = SkippedLog(folder, num_bytes=state.skipped_bytes)
    for source, stretch in groupby(encoded, key=lambda item: item[0].source):
        while True:
            path = folder / f"shard-{len(state.shards):05d}.bin"
            with ShardWriter(path, dtype=dtype, source=source) as shard:
                for document, tokens in stretch:
                    _count(document, state, log=log, files=files)
                    if tokens is not None:
                        shard.append(tokens)
                    bar.update(document.num_bytes)
                    if shard.num_tokens >= shard_tokens:
                        break
                if not shard.num_tokens:
                    break  # the stretch is at its end
                state.shards.append(shard.finish())
            log.flush()
            state.skipped_bytes = log.num_bytes
            state.max_token_id = max(state.max_token_id, shard.max_token_id)
            state.save(folder)
    log.flush()


def _count(document: Document, state: Progress, *, log: SkippedLog, files: Sequence[InputFile]) -> None:
    content, sound = in_utf8(document.text or "")
    if state.consumed is not None:
        state.consumed.add(document, content, files=files)
    state.cursor = document.cursor
    if document.bad is not None:
        # Of files alone: records have their reasons.
        state.num_skipped += document.cursor.row == 0 and document.bad.reason in (BINARY, ENCODING)
        state.skipped[document.bad.reason] = state.skipped.get(document.bad.reason, 0) + 1
        log.add(document.bad)
        return
    state.num_documents += 1
    notes = {"are empty": not content, "had lone surrogates, now U+FFFD": not sound}
    notes["are JSON lines in one text; name such a file .jsonl"] = _JSON_LINES in content[:_HEAD]
    for note, holds in notes.items():
        if holds:
            state.noted[note] = state.noted.get(note, 0) + 1
