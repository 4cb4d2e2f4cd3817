r"""The command that writes documents as a data set of tokens.

python -m titan_attent.data.text INPUT ... --output DIR --tokenizer NAME|PATH|train:VOCAB_SIZE
python -m titan_attent.data.text web=INPUT code=INPUT ... --output DIR --tokenizer ...
python -m titan_attent.data.text web=INPUT code=INPUT ... --template web='{title}\n{text}' --output DIR --tokenizer ...
python -m titan_attent.data.text INPUT ... --prompt-key KEY --completion-key KEY --output DIR --tokenizer ...
python -m titan_attent.data.text INPUT ... --messages-key KEY --output DIR --tokenizer ...
"""

import argparse
import os
import sys
from collections.abc import Sequence

from titan_attent.data.io.bad import SKIPPED_FILE
from titan_attent.data.io.command import exit_status
from titan_attent.data.io.folder import DEFAULT_SOURCE, is_source_name
from titan_attent.data.text.documents import MAX_DOCUMENT_BYTES
from titan_attent.data.text.held_out import TRAIN, VALIDATION
from titan_attent.data.text.inputs import TEXT_EXTENSIONS
from titan_attent.data.text.records import CHAT_TEMPLATES, DEFAULT_TEMPLATE
from titan_attent.data.text.summary import TextSummary
from titan_attent.data.text.text_template import unescaped
from titan_attent.data.text.writer import write_dataset
from titan_attent.foundations.words import counted


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m titan_attent.data.text",
        description="Write documents as token shards. A killed run is resumed by the same command.",
    )
    parser.add_argument(
        "inputs",
        nargs="+",
        metavar="INPUT",
        help=".jsonl, .ndjson, .json, .csv, .tsv (each also .gz, .zst), .parquet, .arrow or text file, folder (also of "
        "save_to_disk) or pattern, on disk or by URL (https, s3, gs, hf, ...); "
        f"SOURCE=INPUT names its data source (default: {DEFAULT_SOURCE})",
    )
    parser.add_argument("--output", required=True, metavar="DIR", help="folder to write")
    parser.add_argument(
        "--tokenizer",
        required=True,
        metavar="NAME|PATH|train:VOCAB_SIZE",
        help="tiktoken encoding (o200k_base, gpt2, ...), local tiktoken rank file, tokenizer.json or a folder with "
        "one, or vocabulary size of one to train",
    )
    parser.add_argument(
        "--eos",
        default="",
        metavar="TEXT",
        help="special token that ends documents (default: <|endoftext|>; of a tokenizer.json the eos_token of the "
        "tokenizer_config.json beside it)",
    )
    parser.add_argument(
        "--text-key",
        action="append",
        metavar="KEY",
        help="JSON key or column of the text (default: text); several are joined, a line end between them",
    )
    parser.add_argument(
        "--template",
        action="append",
        default=[],
        metavar="[SOURCE=]TEMPLATE",
        help="the text as a template of keys, such as '{title}\\n{text}', for one source or for all; with "
        "--completion-key only that key and what follows it have a loss",
    )
    parser.add_argument(
        "--records-key", metavar="KEY", help='key of the list of records in .json files: {"data": [...]}'
    )
    parser.add_argument("--prompt-key", metavar="KEY", help="key or column of a prompt; needs --completion-key")
    parser.add_argument("--completion-key", metavar="KEY", help="key or column of its completion: only it has a loss")
    parser.add_argument(
        "--messages-key",
        metavar="KEY",
        help='key or column of a conversation, a list of {"role", "content"}: only the assistant\'s turns have a loss',
    )
    parser.add_argument(
        "--chat-template",
        metavar="NAME",
        help=f"template of the conversation: {', '.join(CHAT_TEMPLATES)} (default: {DEFAULT_TEMPLATE})",
    )
    parser.add_argument(
        "--validation-fraction",
        type=float,
        metavar="F",
        help="write DIR/train and DIR/validation, the latter of this fraction of the documents by a hash of their text",
    )
    parser.add_argument("--overwrite", action="store_true", help="delete the data set in DIR, and start anew")
    parser.add_argument("--shard-tokens", type=int, default=2**27, help="tokens per shard (default: %(default)s)")
    parser.add_argument("--num-threads", type=int, default=os.cpu_count() or 1, help="default: all CPUs (%(default)s)")
    parser.add_argument(
        "--max-training-bytes",
        type=int,
        default=2**28,
        help="bytes of text to train a tokenizer on, sampled from all inputs (default: %(default)s)",
    )
    parser.add_argument(
        "--extensions",
        default="",
        help="comma-separated extensions of the files to read of a folder, records and texts (default: its records, or "
        f"else its texts: {','.join(TEXT_EXTENSIONS)})",
    )
    parser.add_argument(
        "--on-bad",
        choices=("refuse", "skip"),
        default="refuse",
        help=f"end at the first unusable record or file, or skip all of them and list them in {SKIPPED_FILE}",
    )
    parser.add_argument(
        "--max-document-bytes",
        type=int,
        default=MAX_DOCUMENT_BYTES,
        help="maximum size of a document, of a JSON line and of a csv record (default: %(default)s)",
    )
    return parser


def parse_extensions(text: str) -> list[str] | None:
    """The extensions in a comma-separated list; None if it is empty."""
    return [extension.strip().lstrip(".").lower() for extension in text.split(",")] if text.strip() else None


def parse_templates(given: Sequence[str]) -> dict[str, str]:
    """Source -> template, from the values of --template; the source "" stands for all others.

    ValueError if a source has two.
    """
    templates: dict[str, str] = {}
    for text in given:
        source, equals, template = text.partition("=")
        if not equals or not is_source_name(source):
            source, template = "", text
        if source in templates:
            raise ValueError(f"--template {text!r}: {source or 'all sources'} has two templates; give one")
        templates[source] = unescaped(template)
    return templates


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command. Returns the exit status: 0 if done, 2 after an error, which is printed, 130 if interrupted."""
    options = vars(make_parser().parse_args(arguments))
    extensions = parse_extensions(options.pop("extensions"))

    def write() -> TextSummary:
        templates = parse_templates(options.pop("template"))
        return write_dataset(
            options.pop("inputs"), **options, templates=templates, extensions=extensions, progress=True
        )

    return exit_status(write, _report, again="the same command resumes", interrupted="resumes")


def _report(summary: TextSummary) -> None:
    if warning := summary.warning():
        print(f"warning: {warning}", file=sys.stderr)
    if files := summary.files():
        print(files)
    path = summary.path if summary.validation is None else summary.path / TRAIN
    print(
        f"{path}: {counted(summary.num_documents, 'document')}, {counted(summary.num_tokens, 'token')} in "
        f"{counted(summary.num_shards, 'shard')}, {summary.tokens_per_second:,.0f} tokens/s"
    )
    if summary.validation is not None:
        num_documents, num_tokens = summary.validation
        print(f"{summary.path / VALIDATION}: {counted(num_documents, 'document')}, {counted(num_tokens, 'token')}")
    if len(summary.source_tokens) > 1:
        for source, num_tokens in summary.source_tokens.items():
            print(f"  {source}: {num_tokens:,} tokens ({num_tokens / summary.num_tokens:.1%})")


if __name__ == "__main__":
    sys.exit(main())
