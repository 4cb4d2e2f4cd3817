"""The command that gives a data set of an earlier version its documents.

python -m titan_attent.data.text.boundaries DIR

It adds the files of the documents to the folder (document_files.py) and replaces index.json at the end, so that runs
may read the data set meanwhile. The tokens and their fingerprint stay equal, and the files are the same as if the
writer had written them. The finished shards are recorded in boundaries.json; a killed command resumes after them.

Cost: one read of all tokens, one small file per shard; on resume, one stat per finished shard.
"""

import argparse
import json
import os
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

from tqdm import tqdm

from titan_attent.data.io.atomic import write_atomically
from titan_attent.data.io.command import exit_status
from titan_attent.data.io.folder import locked
from titan_attent.data.text.eos_documents import check_last_token, find_documents
from titan_attent.data.text.file_view import ADOPT
from titan_attent.data.text.format import UPGRADE, Index, ShardEntry, write_index
from titan_attent.data.text.shards import TokenShards
from titan_attent.foundations.typed import typed
from titan_attent.foundations.versioned_json import read_json_object
from titan_attent.foundations.words import counted

STATE_FILE = "boundaries.json"


@dataclass
class _State:
    """The content of boundaries.json: the finished shards of the data set with this fingerprint."""

    fingerprint: str
    shards: list[ShardEntry] = field(default_factory=list)

    def save(self, folder: Path) -> None:
        write_atomically(folder / STATE_FILE, json.dumps(asdict(self)).encode("ascii"))


def add_documents(path: str | os.PathLike[str], *, progress: bool = False) -> Index:
    """Add the documents to the data set in ``path``; nothing is done if it has them. Returns its index.

    Args:
        progress: show a progress bar on stderr.

    Raises:
        ValueError: the folder has no data set or cannot be written, a shard does not end with an eos, or a file is
            damaged.
        OSError: the disk is full or fails.
    """
    folder = Path(path)
    shards = TokenShards(folder)
    if shards.has_documents:
        (folder / STATE_FILE).unlink(missing_ok=True)
        return shards.index
    if shards.index.root is not None:
        raise ValueError(
            f"{folder}: was adopted without documents; adopt it anew with `{ADOPT}` and another --boundaries"
        )
    if not os.access(folder, os.W_OK):
        raise ValueError(
            f"{folder}: this folder is read-only, but the documents are written into it; make it writable, or copy the "
            "data set to another folder and add them there"
        )
    tokens = {"dtype": shards.dtype, "eos_id": shards.tokenizer_info["eos_id"]}
    for shard in shards.index.shards:
        check_last_token(folder, shard, **tokens)
    with locked(folder):
        state = _finished(shards)
        sizes = [shard.num_tokens * shards.dtype.itemsize for shard in shards.index.shards]
        initial = sum(sizes[: len(state.shards)])
        with tqdm(total=sum(sizes), initial=initial, unit="B", unit_scale=True, disable=not progress) as bar:
            for shard in shards.index.shards[len(state.shards) :]:
                state.shards.append(find_documents(folder, shard, **tokens, read=bar.update))
                state.save(folder)
        index = write_index(
            folder,
            dtype=shards.dtype,
            shards=state.shards,
            num_documents=sum(shard.num_documents for shard in state.shards),
            max_token_id=shards.max_token_id,
            tokenizer=shards.tokenizer_info,
        )
        (folder / STATE_FILE).unlink()
    return index


def _finished(shards: TokenShards) -> _State:
    """The shards that an interrupted command has finished; none if its record is of other data or damaged."""
    new = _State(shards.fingerprint)
    try:
        state = typed(_State, read_json_object(shards.path / STATE_FILE))
    except (OSError, ValueError):
        return new
    if state.fingerprint != new.fingerprint or len(state.shards) > shards.num_shards:
        return new
    for shard, original in zip(state.shards, shards.index.shards, strict=False):
        if (shard.file, shard.num_tokens, shard.sha256, shard.source) != (
            original.file,
            original.num_tokens,
            original.sha256,
            original.source,
        ):
            return new
        for name, num_bytes, _ in shard.files(shards.dtype.itemsize):
            path = shards.path / name
            if not shard.documents_sha256 or not path.is_file() or path.stat().st_size != num_bytes:
                return new
    return state


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command. Returns the exit status: 0 if done, 2 after an error, which is printed, 130 if interrupted."""
    parser = argparse.ArgumentParser(
        prog=UPGRADE,
        description="Add the documents to a data set of format version 1 or 2. A killed command is resumed by the same "
        "command.",
    )
    parser.add_argument("folder", metavar="DIR", help="folder of the data set")
    folder = Path(parser.parse_args(arguments).folder)

    def report(index: Index) -> None:
        print(f"{folder}: {counted(index.num_documents, 'document')} in {counted(len(index.shards), 'shard')}")

    again = {"again": "the same command resumes", "interrupted": "resumes"}
    return exit_status(lambda: add_documents(folder, progress=True), report, **again)


if __name__ == "__main__":
    sys.exit(main())
