"""Writes documents as token shards, on several threads; a killed run can be resumed. __main__.py is the command.

One thread reads ahead and writes; ``num_threads`` others encode chunks of documents. The tokens go to the shards in the
order of the inputs, for any number of threads. Every document ends with the eos id, and its end is written beside the
shard, with a mask of its labels if only some count (document_files.py, records.py). A shard is finished after the
document that reaches ``shard_tokens``, or before a document of another source. Then progress.json records the consumed
documents. So a killed run loses at most one shard of work, and the same command resumes it and gives the same bytes as
an uninterrupted run.

Cost: the memory of encode.py; every token is hashed and written once; at the end, one read of the documents' ends.
"""

import os
import sys
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, closing
from itertools import groupby
from pathlib import Path
from typing import Any

from tqdm import tqdm

from titan_attent.data.io.bad import BINARY, ENCODING, SKIPPED_FILE, SkippedLog
from titan_attent.data.io.folder import PROGRESS_FILE
from titan_attent.data.io.inputs import parse_any_inputs
from titan_attent.data.io.walk import LeftOut
from titan_attent.data.text.consumed_records import encode_utf8
from titan_attent.data.text.document_files import MAX_SHARD_TOKENS
from titan_attent.data.text.documents import MAX_DOCUMENT_BYTES, Document, read_documents
from titan_attent.data.text.encode import Encoded, encode_documents
from titan_attent.data.text.format import ShardWriter, token_dtype, write_index
from titan_attent.data.text.held_out import TRAIN, VALIDATION, check_fraction, is_held_out
from titan_attent.data.text.inputs import InputFile, list_files
from titan_attent.data.text.output import check_output, delete_data_set, opened
from titan_attent.data.text.progress import Progress, SetProgress, part_folders, resume, run_arguments
from titan_attent.data.text.records import make_records
from titan_attent.data.text.sample import sample_texts
from titan_attent.data.text.summary import TextSummary, describe_no_documents
from titan_attent.data.text.tokenizer import Tokenizer, load_tokenizer, make_tokenizer, trained_size

_JSON_LINES, _HEAD = b'}\n{"', 2**16
"""The end of a JSON line and the beginning of the next; the number of bytes of a document searched for it."""


def write_dataset(
    inputs: Sequence[str | Path],
    *,
    output: str | Path,
    tokenizer: str,
    text_key: str | Sequence[str] | None = None,
    prompt_key: str | None = None,
    completion_key: str | None = None,
    messages_key: str | None = None,
    chat_template: str | None = None,
    templates: Mapping[str, str] | None = None,
    records_key: str | None = None,
    shard_tokens: int = 2**27,
    num_threads: int = os.cpu_count() or 1,
    max_training_bytes: int = 2**28,
    extensions: Sequence[str] | None = None,
    on_bad: str = "refuse",
    max_document_bytes: int = MAX_DOCUMENT_BYTES,
    validation_fraction: float | None = None,
    overwrite: bool = False,
    progress: bool = False,
) -> TextSummary:
    r"""Write the documents of ``inputs`` as a data set, or resume an interrupted run.

    A command that is refused leaves the folder as it was (output.py).

    Args:
        inputs: .jsonl, .ndjson, .json, .csv, .tsv, text (each also .gz, .zst), .parquet or Arrow files, or folders, on
            disk or by URL. A string may be a pattern, and may begin with the name of the data source, ``NAME=PATH``
            (:func:`titan_attent.data.io.inputs.parse_any_inputs`); the default name is ``default``. The order of the
            inputs is kept; adjacent inputs with the same name share shards.
        output: the folder to write, created if missing; not inside an input.
        tokenizer: a tiktoken encoding, the path of a rank file, or ``train:VOCAB_SIZE``, which trains one on
            ``max_training_bytes`` of text sampled from all inputs (sample.py).
        text_key: JSON key or column that holds the text; None for "text". The values of several are joined, a line end
            between them. Not allowed with the next four.
        prompt_key, completion_key: keys or columns of a prompt and its completion. Only the completion's tokens and its
            eos count as labels.
        messages_key: key or column of a list of {"role", "content"}. Only the turns of the assistant count.
        chat_template: name of the template of the messages (records.py): plain (if None), chatml or llama3.
        templates: source -> template of its text, such as ``{title}\n{text}`` (text_template.py); the source "" stands
            for all others. With ``completion_key``, what stands in front of that key is the prompt.
        records_key: in a .json file that is one object, the key of its list of records.
        shard_tokens: a shard is finished after the document that reaches this number of tokens.
        num_threads: number of encoding threads; the written bytes do not depend on it.
        extensions: extensions of the files to read in a folder; None for its records, or its texts if it has none
            (folders.py).
        on_bad: "refuse" ends at the first unusable record or file, and at a folder with more files left out than read.
            "skip" continues; unusable records and files are counted, and listed in skipped.jsonl.
        max_document_bytes: maximum size of a document and of a JSON line.
        validation_fraction: write two data sets, ``output/train`` and ``output/validation``, the latter of about this
            fraction of the documents, which a hash of their text selects (held_out.py). A tokenizer that is trained
            does not see them.
        overwrite: start anew: delete the data set of text in ``output``, finished or interrupted, once nothing but the
            documents can be refused any more.
        progress: show progress bars on stderr.

    Raises:
        ValueError: an input, tokenizer or argument cannot be used; ``output`` holds a finished data set, or an
            interrupted one that was started with other arguments.
    """
    inputs = [inputs] if isinstance(inputs, (str, Path)) else inputs
    counts = {"shard_tokens": shard_tokens, "num_threads": num_threads, "max_training_bytes": max_training_bytes}
    counts["max_document_bytes"] = max_document_bytes
    if on_bad not in ("refuse", "skip"):
        raise ValueError(f'on_bad is {on_bad!r}; it is "refuse" or "skip"')
    for name, value in counts.items():
        if value < 1:
            raise ValueError(f"{name} is {value}; set it to 1 or more")
    if shard_tokens + max_document_bytes > MAX_SHARD_TOKENS:
        raise ValueError(
            f"shard_tokens {shard_tokens} and max_document_bytes {max_document_bytes} have a sum above "
            f"{MAX_SHARD_TOKENS}, the maximum number of tokens of a shard; lower them"
        )
    held: dict[str, Any] = {"validation_fraction": validation_fraction}
    records = make_records(
        text_key=text_key,
        prompt_key=prompt_key,
        completion_key=completion_key,
        messages_key=messages_key,
        chat_template=chat_template,
        templates=templates,
        records_key=records_key,
    )
    folder = Path(output)
    named_paths = parse_any_inputs(inputs)
    records.check_sources([source for source, _ in named_paths])
    split = validation_fraction is not None
    if validation_fraction is not None:
        check_fraction(validation_fraction)
    local_paths = [path for _, path in named_paths if isinstance(path, Path)]
    check_output(folder, paths=local_paths, split=split, overwrite=overwrite)
    left_out, skip = LeftOut(), on_bad == "skip"
    files = list_files(named_paths, extensions=extensions, records=records, left_out=left_out, skip=skip)
    shared = {**records.arguments(), "shard_tokens": shard_tokens, "training_bytes": max_training_bytes}
    if split:
        shared["validation_fraction"] = validation_fraction
    arguments = run_arguments(files, tokenizer=tokenizer, **shared)
    folders = part_folders(folder, arguments)
    with opened(folder) as kept:
        reading: dict[str, Any] = {"records": records, "max_bytes": max_document_bytes}
        state = None if overwrite else resume(folder, arguments=arguments, files=files, **reading)
        if state:
            encoder = Tokenizer.from_info(state.tokenizer, folders[0])
        else:
            if trained_size(tokenizer) is None:
                encoder = load_tokenizer(tokenizer)
            else:
                shown = {"progress": progress, **held}
                encoder = _train(tokenizer, files, num_bytes=max_training_bytes, reading=reading, **shown)
            if overwrite:
                delete_data_set(folder)
                kept.clear()
            for part in folders:
                part.mkdir(exist_ok=True)
                encoder.save(part)
            state = Progress(arguments, encoder.info())
            state.save(folder)
        started, num_tokens_before = time.perf_counter(), state.num_tokens
        documents = read_documents(files, start=state.cursor, skip=skip, **reading)
        dtype = token_dtype(encoder.vocab_size)
        sizes = [file.num_bytes for file in files]
        bar = _bar(sum(sizes), initial=sum(sizes[: state.cursor.file]), shown=progress)
        with bar, closing(encode_documents(documents, tokenizer=encoder, num_threads=num_threads)) as encoded:
            options = {"dtype": dtype, "mask": records.has_mask}
            _write_shards(
                encoded, state, folder=folder, options=options, shard_tokens=shard_tokens, bar=bar, files=files, **held
            )
        if not state.num_tokens:
            (folder / PROGRESS_FILE).unlink()
            reasons = describe_no_documents(state.skipped, state.num_skipped, left_out, path=folder / SKIPPED_FILE)
            raise ValueError(
                f"{', '.join(map(str, inputs))}: no document in these inputs ({reasons}); give inputs that hold text"
            )
        sets: list[Progress | SetProgress] = [state, state.validation] if split else [state]
        for name, one in zip((TRAIN, VALIDATION), sets, strict=False):
            if not one.shards:
                delete_data_set(folder)
                num_documents = sum(one.num_documents for one in sets)
                raise ValueError(
                    f"{', '.join(map(str, inputs))}: none of the {num_documents:,} documents is in the {name} data; "
                    "give more documents, or another --validation-fraction"
                )
        # The index of the training data comes last: with it, all is done.
        for part, one in reversed(list(zip(folders, sets, strict=True))):
            index = write_index(
                part,
                dtype=dtype,
                shards=one.shards,
                num_documents=one.num_documents,
                max_token_id=one.max_token_id,
                tokenizer=state.tokenizer,
            )
        (folder / PROGRESS_FILE).unlink()
    source_tokens = dict.fromkeys((file.source for file in files), 0)
    for shard in index.shards:
        source_tokens[shard.source] += shard.num_tokens
    return TextSummary(
        path=folder,
        num_documents=state.num_documents,
        num_tokens=index.num_tokens,
        num_shards=len(state.shards),
        num_skipped=state.num_skipped,
        source_tokens=source_tokens,
        tokens_per_second=(state.num_tokens - num_tokens_before) / (time.perf_counter() - started),
        fingerprint=index.fingerprint,
        skipped=state.skipped,
        noted=state.noted,
        left_out=left_out,
        read=Counter(f".{file.extension}" for file in files if file.optional),
        validation=(state.validation.num_documents, state.validation.num_tokens) if split else None,
    )


def _bar(num_bytes: int, *, shown: bool, initial: int = 0, name: str | None = None) -> tqdm:
    return tqdm(
        desc=name,
        total=num_bytes,
        initial=initial,
        unit="B",
        unit_scale=True,
        mininterval=0.2 if sys.stderr.isatty() else 60,  # not five lines per second in a log file
        disable=not shown,
    )


def _train(
    spec: str,
    files: Sequence[InputFile],
    *,
    num_bytes: int,
    reading: dict[str, Any],
    progress: bool,
    validation_fraction: float | None,
) -> Tokenizer:
    """Train a tokenizer on text of all files, without the documents that are held out."""
    excluded = None if validation_fraction is None else lambda text: is_held_out(text, validation_fraction)
    texts = sample_texts(files, num_bytes=num_bytes, excluded=excluded, **reading)
    started = time.perf_counter()
    size = min(num_bytes, sum(file.num_bytes for file in files))  # compressed files have more: the bar goes on without
    with _bar(size, shown=progress, name="text for the tokenizer") as bar:
        encoder = make_tokenizer(spec, texts=texts, max_training_bytes=num_bytes, bar=bar.update if progress else None)
        sampled = bar.n
    if progress:
        seconds = time.perf_counter() - started
        print(f"tokenizer: {encoder.vocab_size:,} ids from {sampled:,} bytes, {seconds:,.0f} s", file=sys.stderr)
    return encoder


def _write_shards(
    encoded: Iterator[Encoded],
    state: Progress,
    *,
    folder: Path,
    options: dict[str, Any],
    shard_tokens: int,
    bar: tqdm,
    files: Sequence[InputFile],
    validation_fraction: float | None,
) -> None:
    """Write all of ``encoded``. ``state`` is saved after every shard, so that it describes finished shards only.

    Documents that are held out go to a shard of their own, which is finished with that of the training data.

    Args:
        options: further arguments of every ShardWriter.
    """
    log = SkippedLog(folder, num_bytes=state.skipped_bytes)
    sets: list[Progress | SetProgress] = [state]
    if validation_fraction is not None:
        sets.append(state.validation)
    folders = part_folders(folder, state.arguments)
    for source, span in groupby(encoded, key=lambda item: item[0].source):
        while True:
            paths = [part / f"shard-{len(one.shards):05d}.bin" for part, one in zip(folders, sets, strict=True)]
            with ExitStack() as stack:
                shards = [stack.enter_context(ShardWriter(path, source=source, **options)) for path in paths]
                for document, tokens, counts in span:
                    number = int(validation_fraction is not None and is_held_out(document.text, validation_fraction))
                    _count(document, state, log=log, files=files)
                    if tokens is not None:
                        sets[number].num_documents += 1
                        shards[number].append_document(tokens, counts)
                    bar.update(document.num_bytes)
                    if shards[number].num_tokens >= shard_tokens:
                        break
                if not any(shard.num_tokens for shard in shards):
                    break  # the span is at its end
                for one, shard in zip(sets, shards, strict=True):
                    if shard.num_tokens:
                        one.shards.append(shard.finish())
                        one.max_token_id = max(one.max_token_id, shard.max_token_id)
            log.flush()
            state.skipped_bytes = log.num_bytes
            state.save(folder)
    log.flush()


def _count(document: Document, state: Progress, *, log: SkippedLog, files: Sequence[InputFile]) -> None:
    content, is_valid = encode_utf8(document.text or "")
    if state.consumed is not None:
        state.consumed.add(document, content, files=files)
    state.cursor = document.cursor
    if document.bad is not None:
        # num_skipped counts files only; the cursor after an unusable file has row 0.
        state.num_skipped += document.cursor.row == 0 and document.bad.reason in (BINARY, ENCODING)
        state.skipped[document.bad.reason] = state.skipped.get(document.bad.reason, 0) + 1
        log.add(document.bad)
        return
    notes = {"are empty": not content, "had lone surrogates, now U+FFFD": not is_valid}
    notes["are JSON lines in one text; name such a file .jsonl"] = _JSON_LINES in content[:_HEAD]
    for note, holds in notes.items():
        if holds:
            state.noted[note] = state.noted.get(note, 0) + 1
