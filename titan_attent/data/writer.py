"""Documents to token shards: from the command line or from Python, in parallel, and resumed after a kill.

    python -m titan_attent.data.writer INPUT ... --output DIR --tokenizer NAME|FILE|train:VOCAB_SIZE
    python -m titan_attent.data.writer web=INPUT code=INPUT ... --output DIR --tokenizer ...

One thread reads ahead and writes, ``num_threads`` others encode chunks of documents. The tokens, every document closed
by the eos id, go to the shards in the order of the inputs, whatever the number of threads. A shard closes at the first
end of a document at which it holds ``shard_tokens``, and before a document of another source. Then progress.json
records what was consumed, so that a killed run loses one shard of work at most, and the same command ends in the same
bytes as an uninterrupted run.

Cost: the memory of encode.py; every token is hashed and written once.
"""

import argparse
import os
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path

import numpy as np
from tqdm import tqdm

from titan_attent.data.documents import read_documents
from titan_attent.data.encode import Encoded, encode_documents
from titan_attent.data.format import DEFAULT_SOURCE, PROGRESS_FILE, ShardWriter, token_dtype, write_index
from titan_attent.data.inputs import TEXT_EXTENSIONS, list_files, parse_inputs
from titan_attent.data.progress import Progress, check_output, locked, resume, run_arguments
from titan_attent.data.tokenizer import Tokenizer, make_tokenizer


@dataclass(frozen=True, kw_only=True)
class Summary:
    """What the data set holds; ``num_skipped`` files were not text, ``tokens_per_second`` is of this run alone.

    ``source_tokens`` has the tokens of every source of the inputs, in their order.
    """

    path: Path
    num_documents: int
    num_tokens: int
    num_shards: int
    num_skipped: int
    source_tokens: dict[str, int]
    tokens_per_second: float
    fingerprint: str


def write_dataset(
    inputs: Sequence[str | Path],
    *,
    output: str | Path,
    tokenizer: str,
    text_key: str = "text",
    shard_tokens: int = 2**27,
    num_threads: int = os.cpu_count() or 1,
    max_training_bytes: int = 2**28,
    extensions: Sequence[str] = TEXT_EXTENSIONS,
    progress: bool = False,
) -> Summary:
    """Write the documents of ``inputs`` as a data set, or finish one that was interrupted.

    Args:
        inputs: .jsonl, .jsonl.gz, .parquet or text files, or folders of files with one of ``extensions``; a string may
            be a pattern, and name the data source in front, ``NAME=PATH`` (:func:`~.inputs.parse_inputs`). Without a
            name it is ``default``. Inputs stay in their order; neighbours of one name are one stretch of that source.
        output: the folder to write, made if missing; not inside an input.
        tokenizer: a tiktoken encoding, the path of a rank file, or ``train:VOCAB_SIZE``, which learns one from the
            first ``max_training_bytes`` of the inputs' text.
        text_key: JSON key or parquet column that holds the text.
        shard_tokens: a shard closes at the end of the document that reaches it.
        num_threads: that encode; they do not change what is written.
        progress: show a bar on stderr.

    Raises:
        ValueError: an input, tokenizer or argument that cannot be used, a data set that is finished, or an interrupted
            one that was begun with other arguments.
    """
    inputs = [inputs] if isinstance(inputs, (str, Path)) else inputs
    counts = {"shard_tokens": shard_tokens, "num_threads": num_threads, "max_training_bytes": max_training_bytes}
    for name, value in counts.items():
        if value < 1:
            raise ValueError(f"{name} is {value}; set it to 1 or more")
    folder = Path(output)
    named_paths = parse_inputs(inputs)
    check_output(folder, paths=[path for _, path in named_paths])
    files = list_files(named_paths, extensions=extensions)
    arguments = run_arguments(
        files, tokenizer=tokenizer, text_key=text_key, shard_tokens=shard_tokens, training_bytes=max_training_bytes
    )
    folder.mkdir(parents=True, exist_ok=True)
    with locked(folder):
        state = resume(folder, arguments=arguments)
        if state:
            encoder = Tokenizer.from_info(state.tokenizer, folder)
        else:
            texts = (document.text for document in read_documents(files, text_key=text_key) if document.text)
            encoder = make_tokenizer(tokenizer, texts=texts, max_training_bytes=max_training_bytes)
            encoder.save(folder)
            state = Progress(arguments, encoder.info())
            state.save(folder)
        started, num_tokens_before = time.perf_counter(), state.num_tokens
        documents = read_documents(files, text_key=text_key, start=state.cursor)
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
            _write_shards(encoded, state, folder=folder, dtype=dtype, shard_tokens=shard_tokens, bar=bar)
        if not state.num_documents:
            (folder / PROGRESS_FILE).unlink()
            raise ValueError(
                f"{', '.join(map(str, inputs))}: no document in these inputs ({state.num_skipped} files are binary or "
                "not UTF-8); give inputs that hold text"
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
    )


def _write_shards(
    encoded: Iterator[Encoded], state: Progress, *, folder: Path, dtype: np.dtype, shard_tokens: int, bar: tqdm
) -> None:
    """Write all of ``encoded``; ``state`` is saved at the end of every shard, when it describes finished ones."""
    for source, stretch in groupby(encoded, key=lambda item: item[0].source):
        while True:
            path = folder / f"shard-{len(state.shards):05d}.bin"
            with ShardWriter(path, dtype=dtype, source=source) as shard:
                for document, tokens in stretch:
                    if tokens is None:
                        state.num_skipped += 1
                    else:
                        state.num_documents += 1
                        shard.append(tokens)
                    state.cursor = document.cursor
                    bar.update(document.num_bytes)
                    if shard.num_tokens >= shard_tokens:
                        break
                if not shard.num_tokens:
                    break  # the stretch is at its end
                state.shards.append(shard.finish())
            state.max_token_id = max(state.max_token_id, shard.max_token_id)
            state.save(folder)


def main(arguments: Sequence[str] | None = None) -> int:
    """The command; returns the exit status: 0 done, 2 a mistake told in one message, 130 interrupted."""
    parser = argparse.ArgumentParser(
        prog="python -m titan_attent.data.writer",
        description="Write documents as token shards. A killed run is resumed by the same command.",
    )
    parser.add_argument(
        "inputs",
        nargs="+",
        metavar="INPUT",
        help=".jsonl(.gz), .parquet or text file, folder or pattern; SOURCE=INPUT names the data source it belongs to "
        f"(default: {DEFAULT_SOURCE})",
    )
    parser.add_argument("--output", required=True, metavar="DIR", help="folder to write")
    parser.add_argument(
        "--tokenizer",
        required=True,
        metavar="NAME|FILE|train:VOCAB_SIZE",
        help="tiktoken encoding (o200k_base, gpt2, ...), local tiktoken rank file, or the size of one to train",
    )
    parser.add_argument("--text-key", default="text", help="JSON key or parquet column (default: %(default)s)")
    parser.add_argument("--shard-tokens", type=int, default=2**27, help="tokens of a shard (default: %(default)s)")
    parser.add_argument("--num-threads", type=int, default=os.cpu_count() or 1, help="default: all (%(default)s)")
    parser.add_argument(
        "--max-training-bytes",
        type=int,
        default=2**28,
        help="text to train a tokenizer on, from the first inputs (default: %(default)s)",
    )
    parser.add_argument(
        "--extensions",
        default=",".join(TEXT_EXTENSIONS),
        help="files to read of a folder, one document each but for jsonl and parquet (default: %(default)s)",
    )
    options = vars(parser.parse_args(arguments))
    extensions = [extension.strip().lstrip(".").lower() for extension in options.pop("extensions").split(",")]
    try:
        summary = write_dataset(options.pop("inputs"), **options, extensions=extensions, progress=True)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except OSError as error:
        print(f"error: {error}; once that is mended, the same command resumes", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted; the same command resumes", file=sys.stderr)
        return 130
    if summary.num_skipped:
        print(f"warning: skipped {summary.num_skipped} files that are binary or not UTF-8", file=sys.stderr)
    print(
        f"{summary.path}: {summary.num_documents:,} documents, {summary.num_tokens:,} tokens in {summary.num_shards:,} "
        f"shards, {summary.tokens_per_second:,.0f} tokens/s"
    )
    if len(summary.source_tokens) > 1:
        for source, num_tokens in summary.source_tokens.items():
            print(f"  {source}: {num_tokens:,} tokens ({num_tokens / summary.num_tokens:.1%})")
    return 0


if __name__ == "__main__":
    sys.exit(main())
