"""The command that adopts token files of other tools as a data set.

python -m titan_attent.data.adopt FOLDER --tokenizer NAME|PATH
python -m titan_attent.data.adopt web=FOLDER code=FOLDER --tokenizer ... --output DIR --root ROOT
"""

import argparse
import sys
from collections.abc import Sequence

from titan_attent.data.adopt.adopt import AdoptSummary, adopt
from titan_attent.data.adopt.options import Options
from titan_attent.data.formats.table import FORMATS
from titan_attent.data.formats.token_file import BOUNDARIES, NONE, TOKEN_DTYPES
from titan_attent.data.io.command import exit_status
from titan_attent.data.io.walk import by_count
from titan_attent.data.text.file_view import ADOPT


def make_parser() -> argparse.ArgumentParser:
    default = Options()
    parser = argparse.ArgumentParser(
        prog=ADOPT,
        description="Make a data set of token files where they are, without a copy. A killed command is resumed by the "
        "same command, which also hashes files anew that have changed.",
    )
    parser.add_argument(
        "inputs", nargs="+", metavar="FOLDER", help="folder, file or pattern; SOURCE=FOLDER names a data source"
    )
    parser.add_argument(
        "--tokenizer",
        required=True,
        metavar="NAME|PATH",
        help="of the files: tiktoken encoding, rank file, tokenizer.json or a folder with one",
    )
    parser.add_argument("--output", default="", metavar="DIR", help="folder of the index (default: FOLDER itself)")
    parser.add_argument("--root", default="", help="with --output: the folder to which the index names the files")
    formats = ", ".join(f"{name} ({one.TITLE})" for name, one in FORMATS.items())
    parser.add_argument("--format", default="", metavar="NAME", help=f"{formats}; by default each file is recognised")
    parser.add_argument(
        "--dtype", default="", metavar="DTYPE", help=f"of tokens without a header: {', '.join(TOKEN_DTYPES)}"
    )
    parser.add_argument(
        "--boundaries",
        default="",
        metavar="WAY",
        help=f"how documents are found: {', '.join(BOUNDARIES)} (default: the format's index, or the side of its id)",
    )
    parser.add_argument(
        "--eos",
        default="",
        metavar="ID|TEXT",
        help="id or special token at the end of documents (default: the tokenizer's)",
    )
    parser.add_argument("--bos", default="", metavar="ID|TEXT", help="id or special token at the start of documents")
    parser.add_argument(
        "--column", default=default.column, metavar="NAME", help="MDS: column of the tokens (default: %(default)s)"
    )
    parser.add_argument(
        "--include", default="", metavar="PATTERN", help="read the paths in FOLDER that match, such as '*train*'"
    )
    parser.add_argument(
        "--label-masks", default="", metavar="FOLDER", help="OLMo: folder or pattern of masks, one per token file"
    )
    parser.add_argument(
        "--decompress", default="", metavar="DIR", help="MDS: keep decompressed copies of compressed shards in DIR"
    )
    parser.add_argument(
        "--shard-tokens",
        type=int,
        default=default.shard_tokens,
        metavar="N",
        help="larger files are several shards (default: %(default)s)",
    )
    parser.add_argument(
        "--threads", type=int, default=default.num_threads, metavar="N", help="(default: all cores, %(default)s)"
    )
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command. Returns the exit status: 0 if done, 2 after an error, which is printed, 130 if interrupted."""
    args = vars(make_parser().parse_args(arguments))
    inputs, tokenizer, output, root = (args.pop(name) for name in ("inputs", "tokenizer", "output", "root"))

    def run() -> AdoptSummary:
        options = Options(num_threads=args.pop("threads"), **args)
        return adopt(inputs, tokenizer=tokenizer, options=options, output=output, root=root, progress=True)

    again = {"again": "the same command resumes", "interrupted": "resumes after the finished shards"}
    return exit_status(run, report, **again)


def report(summary: AdoptSummary) -> None:
    """Print what was adopted."""
    index = summary.index
    shards = len(index.shards)
    print(
        f"{summary.folder}: {index.num_tokens:,} tokens of {index.dtype} in {shards:,} shards ({summary.num_scanned:,} "
        f"scanned now); files: {by_count(summary.formats)}"
    )
    if index.has_documents:
        print(f"{index.num_documents:,} documents, found by: {by_count(summary.boundaries)}")
    else:
        print(f"without documents (--boundaries {NONE}): for windows only")
    if summary.num_cut:
        print(f"{summary.num_cut:,} shards begin or end inside a document, whose parts are documents of their own")
    for line in (*summary.notes, summary.left_out.summary()):
        if line:
            print(line)


if __name__ == "__main__":
    sys.exit(main())
