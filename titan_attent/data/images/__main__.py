"""The command that writes images as a data set.

python -m titan_attent.data.images INPUT ... --output DIR [--size N] [--grayscale] [--encoding raw|file]
"""

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from titan_attent.data.images.examples import MAX_FILE_BYTES, MAX_PIXELS
from titan_attent.data.images.format import ENCODINGS
from titan_attent.data.images.pictures import without_pillow_limit
from titan_attent.data.images.summary import ImageSummary, print_summary
from titan_attent.data.images.writer import write_images
from titan_attent.data.io.bad import SKIPPED_FILE
from titan_attent.data.io.command import exit_status
from titan_attent.data.io.folder import DEFAULT_SOURCE


def main(arguments: Sequence[str] | None = None) -> int:
    """Returns the exit status: 0 done, 2 an error printed in one message, 130 interrupted."""
    options = vars(_parser().parse_args(arguments))

    def write() -> ImageSummary:
        options["classes"] = _parse_classes(options["classes"])
        options["keys"] = _parse_keys(options["keys"])
        with without_pillow_limit():
            return write_images(options.pop("inputs"), **options, progress=True)

    return exit_status(write, print_summary, again="give the same command again", interrupted="starts over")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m titan_attent.data.images", description="Write images as a data set to train on."
    )
    parser.add_argument(
        "inputs",
        nargs="+",
        metavar="INPUT",
        help="folder with one folder of images per class; .parquet, .npz or .tar(.gz) file; folder of .parquet or tar "
        f"files; or pattern. SOURCE=INPUT names the data source of the images (default: {DEFAULT_SOURCE})",
    )
    parser.add_argument("--output", required=True, metavar="DIR", help="folder to write")
    parser.add_argument(
        "--size", type=int, default=0, metavar="N", help="resize the shorter side to N, and crop the centre N x N"
    )
    parser.add_argument("--grayscale", action="store_true", help="write one channel, not three")
    parser.add_argument(
        "--encoding", choices=ENCODINGS, default="raw", help="pixels, or JPEG, PNG and WebP files byte for byte"
    )
    parser.add_argument(
        "--classes",
        metavar="FILE|NAME,NAME,...",
        help="the classes in order; a file has one per line (default: the classes of the inputs)",
    )
    parser.add_argument(
        "--shard-images", type=int, default=2**16, metavar="N", help="images per shard (default: %(default)s)"
    )
    parser.add_argument(
        "--on-bad",
        choices=("refuse", "skip"),
        default="refuse",
        help=f"stop at the first image that cannot be used, or skip such images and list them in {SKIPPED_FILE}",
    )
    parser.add_argument(
        "--keys",
        metavar="IMAGE,LABEL",
        help="columns (.parquet) or arrays (.npz) of images and labels; in tar files, LABEL is a key of the .json",
    )
    parser.add_argument(
        "--max-pixels",
        type=int,
        default=MAX_PIXELS,
        metavar="N",
        help="pixels per image at most; an image whose header claims more is not decoded (default: %(default)s)",
    )
    parser.add_argument(
        "--max-file-bytes",
        type=int,
        default=MAX_FILE_BYTES,
        metavar="N",
        help="bytes per image file at most; a larger file is not read (default: %(default)s)",
    )
    parser.add_argument(
        "--all-splits",
        action="store_true",
        help="allow folders or files named train, test, ... side by side; such folders are read as classes",
    )
    parser.add_argument("--num-threads", type=int, default=os.cpu_count() or 1, help="default: all (%(default)s)")
    return parser


def _parse_classes(text: str | None) -> list[str] | None:
    if text is None:
        return None
    try:
        names = Path(text).read_text(encoding="utf-8-sig").splitlines() if Path(text).is_file() else text.split(",")
    except UnicodeDecodeError as error:
        raise ValueError(f"{text}: the list of classes is not UTF-8 text ({error}); save it as UTF-8") from error
    return [name.strip() for name in names if name.strip()]


def _parse_keys(text: str | None) -> tuple[str, str] | None:
    if text is None:
        return None
    names = [name.strip() for name in text.split(",")]
    if len(names) != 2 or not all(names):
        raise ValueError(f"--keys is {text!r}; give two names, IMAGE,LABEL")
    return names[0], names[1]


if __name__ == "__main__":
    sys.exit(main())
