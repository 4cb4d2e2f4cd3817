"""The options of the writer's command."""

import argparse
import os

from titan_attent.data.bad import SKIPPED_FILE
from titan_attent.data.documents import MAX_DOCUMENT_BYTES
from titan_attent.data.format import DEFAULT_SOURCE
from titan_attent.data.inputs import TEXT_EXTENSIONS


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m titan_attent.data.writer",
        description="Write documents as token shards. A killed run is resumed by the same command.",
    )
    parser.add_argument(
        "inputs",
        nargs="+",
        metavar="INPUT",
        help=".jsonl, .ndjson, .json (each also .gz), .parquet or text file, folder or pattern; SOURCE=INPUT names the "
        "data source it belongs to "
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
        help="text to train a tokenizer on, from all inputs alike (default: %(default)s)",
    )
    parser.add_argument(
        "--extensions",
        default="",
        help="files to read of a folder, records and texts alike (default: its records, or else its texts: "
        f"{','.join(TEXT_EXTENSIONS)})",
    )
    parser.add_argument(
        "--on-bad",
        choices=("refuse", "skip"),
        default="refuse",
        help=f"end at the first record that cannot be used, or leave such out and list them in {SKIPPED_FILE}",
    )
    parser.add_argument(
        "--max-document-bytes",
        type=int,
        default=MAX_DOCUMENT_BYTES,
        help="largest document, and largest JSON line, that is read (default: %(default)s)",
    )
    return parser


def parse_extensions(text: str) -> list[str] | None:
    """None where none are named."""
    return [extension.strip().lstrip(".").lower() for extension in text.split(",")] if text.strip() else None
