"""What an interrupted writer needs to go on: progress.json, and a folder that is its own.

A run and the run that resumes it must be given the same sources, tokenizer and whatever else decides the bytes of the
data set: all of it is kept and compared. Files count as the same if their paths, sizes and modification times are.
Where some are not, what the finished shards hold is read again (consumed_records.py): behind it, inputs may change.

Cost: one small file a shard; on resume one stat an input file and a finished shard.
"""

import hashlib
import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from itertools import groupby
from pathlib import Path
from typing import Any

from titan_attent.data.io.atomic import write_atomically
from titan_attent.data.io.bad import SKIPPED_FILE
from titan_attent.data.io.folder import DEFAULT_SOURCE, INDEX_FILE, PROGRESS_FILE
from titan_attent.data.text.consumed_records import Consumed, find_again
from titan_attent.data.text.documents import START, ReadPosition
from titan_attent.data.text.format import ShardEntry, check_tokenizer_info, token_dtype
from titan_attent.data.text.inputs import InputFile
from titan_attent.foundations.typed import typed
from titan_attent.foundations.versioned_json import read_json_object


@dataclass
class Progress:
    """progress.json: what the finished shards hold, and the cursor behind them."""

    arguments: dict[str, Any]
    """Of :func:`run_arguments`."""
    tokenizer: dict[str, Any]
    cursor: ReadPosition = START
    num_documents: int = 0
    num_skipped: int = 0
    max_token_id: int = -1
    shards: list[ShardEntry] = field(default_factory=list)
    skipped: dict[str, int] = field(default_factory=dict)
    """What could not be used, by reason; the bytes of skipped.jsonl that list it."""
    skipped_bytes: int = 0
    noted: dict[str, int] = field(default_factory=dict)
    """Documents that were written but are told of: empty ones, and those with characters that UTF-8 cannot hold."""
    consumed: Consumed | None = field(default_factory=Consumed)
    """None of a run of a version that did not know it."""

    @property
    def num_tokens(self) -> int:
        return sum(shard.num_tokens for shard in self.shards)

    def save(self, folder: Path) -> None:
        write_atomically(folder / PROGRESS_FILE, json.dumps(asdict(self), indent=1).encode("ascii"))

    @classmethod
    def load(cls, folder: Path) -> "Progress":
        """ValueError if the file is malformed."""
        path = folder / PROGRESS_FILE
        try:
            fields = read_json_object(path)
            state = typed(cls, {"consumed": None, **fields})
            if "file" not in state.tokenizer:
                raise ValueError("tokenizer without file")
            check_tokenizer_info(state.tokenizer)
            counts = [
                *state.cursor,
                state.num_documents,
                state.num_skipped,
                state.skipped_bytes,
                state.max_token_id + 1,
            ]
            counts += [*state.skipped.values(), *state.noted.values(), *(shard.num_tokens for shard in state.shards)]
            if min(counts) < 0:
                raise ValueError(f"a count is {min(counts)}")
            return state
        except ValueError as error:
            raise ValueError(f"{path}: malformed ({error}); delete {folder} to start anew") from error


def check_output(folder: Path, *, paths: Iterable[Path]) -> None:
    """ValueError if ``folder`` is not free for a new or an interrupted data set."""
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"{folder}: is a file; choose a folder for --output")
    if (folder / INDEX_FILE).exists():
        raise ValueError(f"{folder}: holds a finished data set; choose another --output, or delete it first")
    for path in paths:
        if path.is_dir() and folder.resolve().is_relative_to(path.resolve()):
            raise ValueError(f"{folder}: lies inside the input {path}; choose an --output outside of it")
    if not (folder / PROGRESS_FILE).exists() and (stray := sorted(folder.glob("shard-*.bin"))):
        raise ValueError(
            f"{folder}: holds {stray[0].name} but no {INDEX_FILE}; choose another --output, or delete it first"
        )


def resume(
    folder: Path, *, arguments: dict[str, Any], files: Sequence[InputFile], text_key: str, max_bytes: int
) -> Progress | None:
    """The progress in ``folder``; None if there is none, or one that finished no shard with other arguments.

    Where the inputs are others, but all that the finished shards hold is what they begin with, its cursor is that of
    the new inputs.

    Args:
        files: the inputs; ``text_key`` and ``max_bytes`` read them.

    Raises:
        ValueError: it finished shards with other arguments or other inputs, or one of them is missing or truncated.
    """
    if not (folder / PROGRESS_FILE).exists():
        return None
    state = Progress.load(folder)
    differing = {name for name in {*state.arguments, *arguments} if state.arguments.get(name) != arguments.get(name)}
    if differing and not state.shards:
        return None  # A mistaken command that wrote nothing must not stand in the way of the right one.
    if "inputs" in differing and differing <= {"inputs", "sources"} and state.consumed is not None:
        found = find_again(state.consumed, files=files, text_key=text_key, max_bytes=max_bytes)
        if found is not None:
            (state.cursor, state.consumed), state.arguments, differing = found, arguments, set()
    if differing:
        described = [f"{name} was {state.arguments.get(name)!r} and is {arguments.get(name)!r}" for name in differing]
        behind = ""
        if "inputs" in differing and state.consumed is not None:
            behind = f" (inputs may change behind their first {state.consumed.num_records:,} records alone)"
        raise ValueError(
            f"{folder}: holds an interrupted run with other arguments: {'; '.join(sorted(described))}. Use the same "
            f"command to resume it{behind}, or delete the folder to start anew"
        )
    if state.consumed is None and any(file.extension == "json" and file.kind != "text" for file in files):
        raise ValueError(
            f"{folder}: was begun by an earlier version, which read .json files as texts; delete it to start anew"
        )
    if state.cursor.file > len(files):
        raise ValueError(f"{folder / PROGRESS_FILE}: malformed (cursor {state.cursor}); delete {folder} to start anew")
    itemsize = token_dtype(state.tokenizer["vocab_size"]).itemsize
    for shard in state.shards:
        path = folder / shard.file
        if not path.is_file() or path.stat().st_size != shard.num_tokens * itemsize:
            raise ValueError(
                f"{path}: this finished shard of an interrupted run is missing or truncated; delete {folder} to start "
                "anew"
            )
    skipped = folder / SKIPPED_FILE
    if state.skipped_bytes > (skipped.stat().st_size if skipped.is_file() else 0):
        raise ValueError(f"{skipped}: is missing or truncated; delete {folder} to start anew")
    return state


def run_arguments(files: Sequence[InputFile], *, tokenizer: str, **others: Any) -> dict[str, Any]:
    """What decides the bytes of the data set, readable enough to tell a user what differs."""
    # As earlier versions did, so that what they began is resumed.
    described = [[str(file.path), file.extension, file.num_bytes, file.modified_ns, file.optional] for file in files]
    digest = hashlib.sha256(json.dumps(described).encode("ascii")).hexdigest()[:16]
    num_bytes = sum(file.num_bytes for file in files)
    arguments = {
        "inputs": f"{len(files)} files, {num_bytes} bytes, paths and modification times {digest}",
        "tokenizer": tokenizer,
        **others,
    }
    if any(file.source != DEFAULT_SOURCE for file in files):
        stretches = [(name, len(list(stretch))) for name, stretch in groupby(files, key=lambda file: file.source)]
        arguments["sources"] = ", ".join(f"{name}: {num_files} files" for name, num_files in stretches)
    if (path := Path(tokenizer)).is_file():
        arguments["tokenizer file"] = "sha256 " + hashlib.sha256(path.read_bytes()).hexdigest()
    return arguments
