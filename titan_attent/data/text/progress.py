"""The state that resumes an interrupted writer, progress.json, and the checks before a resume.

A run and the run that resumes it must have the same sources, tokenizer and other arguments that determine the bytes of
the data set; all of them are saved and compared. Input files count as equal if their paths, sizes and modification
times are equal. If some differ, the records of the finished shards are read again and compared (consumed_records.py).
Inputs may change after these records.

The finished shards of an earlier version have no documents; these are found by their eos ids (eos_documents.py).

Cost: one write of a small file per shard; on resume, one stat per input file and file of a finished shard.
"""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from itertools import groupby
from pathlib import Path
from typing import Any

from titan_attent.data.io.atomic import write_atomically
from titan_attent.data.io.bad import SKIPPED_FILE
from titan_attent.data.io.folder import DEFAULT_SOURCE, PROGRESS_FILE
from titan_attent.data.text.consumed_records import ConsumedRecords, find_resume_point
from titan_attent.data.text.documents import START, ReadPosition
from titan_attent.data.text.eos_documents import find_documents
from titan_attent.data.text.format import ShardEntry, check_tokenizer_info, token_dtype
from titan_attent.data.text.held_out import TRAIN, VALIDATION
from titan_attent.data.text.inputs import InputFile
from titan_attent.data.text.records import Records
from titan_attent.data.text.tokenizer import json_file
from titan_attent.foundations.typed import typed
from titan_attent.foundations.versioned_json import read_json_object


@dataclass
class SetProgress:
    """The finished shards of the validation data."""

    num_documents: int = 0
    max_token_id: int = -1
    shards: list[ShardEntry] = field(default_factory=list)

    @property
    def num_tokens(self) -> int:
        return sum(shard.num_tokens for shard in self.shards)


@dataclass
class Progress:
    """The content of progress.json: the finished shards, and the position after their records.

    ``num_documents``, ``max_token_id`` and ``shards`` are those of the data set, or else of its training data.
    """

    arguments: dict[str, Any]
    """The result of :func:`run_arguments`."""
    tokenizer: dict[str, Any]
    cursor: ReadPosition = START
    num_documents: int = 0
    num_skipped: int = 0
    max_token_id: int = -1
    shards: list[ShardEntry] = field(default_factory=list)
    skipped: dict[str, int] = field(default_factory=dict)
    """Number of unusable records and files, by reason."""
    skipped_bytes: int = 0
    """Bytes of skipped.jsonl, their list."""
    noted: dict[str, int] = field(default_factory=dict)
    """Number of written documents per note: empty ones, ones with characters that UTF-8 cannot hold, and others."""
    consumed: ConsumedRecords | None = field(default_factory=ConsumedRecords)
    """None for a run of an earlier version, which did not record it."""
    validation: SetProgress = field(default_factory=SetProgress)
    """Without shards, unless documents are held out."""

    @property
    def num_tokens(self) -> int:
        return sum(shard.num_tokens for shard in (*self.shards, *self.validation.shards))

    def save(self, folder: Path) -> None:
        write_atomically(folder / PROGRESS_FILE, json.dumps(asdict(self), indent=1).encode("ascii"))

    @classmethod
    def load(cls, folder: Path) -> "Progress":
        """Read the file in ``folder``; ValueError if it is malformed."""
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
                state.validation.num_documents,
                state.validation.max_token_id + 1,
                *state.skipped.values(),
                *state.noted.values(),
            ]
            for shard in (*state.shards, *state.validation.shards):
                counts += [shard.num_tokens, shard.num_documents]
            if min(counts) < 0:
                raise ValueError(f"a count is {min(counts)}")
            return state
        except ValueError as error:
            raise ValueError(f"{path}: malformed ({error}); delete {folder} to start anew") from error


def resume(
    folder: Path, *, arguments: dict[str, Any], files: Sequence[InputFile], records: Records, max_bytes: int
) -> Progress | None:
    """The progress in ``folder``; None if there is none, or if other arguments were given and no shard is finished.

    If the inputs changed but begin with the records of the finished shards, the cursor is the position after these
    records in the new inputs.

    Args:
        files: the files of the inputs.
        records, max_bytes: as in ``read_documents``.

    Raises:
        ValueError: shards were finished with other arguments or inputs, or a finished shard is missing or truncated.
    """
    if not (folder / PROGRESS_FILE).exists():
        return None
    state = Progress.load(folder)
    differing = {name for name in {*state.arguments, *arguments} if state.arguments.get(name) != arguments.get(name)}
    if differing and not state.num_tokens:
        return None  # A wrong command that wrote no shard must not block the corrected one.
    if "inputs" in differing and differing <= {"inputs", "sources"} and state.consumed is not None:
        resume_point = find_resume_point(state.consumed, files=files, records=records, max_bytes=max_bytes)
        if resume_point is not None:
            (state.cursor, state.consumed), state.arguments, differing = resume_point, arguments, set()
    if differing:
        described = [f"{name} was {state.arguments.get(name)!r} and is {arguments.get(name)!r}" for name in differing]
        hint = ""
        if "inputs" in differing and state.consumed is not None:
            hint = f" (inputs may change only after their first {state.consumed.num_records:,} records)"
        raise ValueError(
            f"{folder}: holds an interrupted run with other arguments: {'; '.join(sorted(described))}. Use the same "
            f"command to resume it{hint}, or delete the folder to start anew"
        )
    if state.consumed is None and any(file.extension == "json" and file.kind != "text" for file in files):
        raise ValueError(
            f"{folder}: was started by an earlier version, which read .json files as texts; delete it to start anew"
        )
    if state.cursor.file > len(files):
        raise ValueError(f"{folder / PROGRESS_FILE}: malformed (cursor {state.cursor}); delete {folder} to start anew")
    dtype = token_dtype(state.tokenizer["vocab_size"])
    for part, shards in zip(part_folders(folder, arguments), (state.shards, state.validation.shards), strict=False):
        for number, shard in enumerate(shards):
            for name, num_bytes, _ in shard.files(dtype.itemsize):
                path = part / name
                if not path.is_file() or path.stat().st_size != num_bytes:
                    raise ValueError(
                        f"{path}: this file of a finished shard of an interrupted run is missing or truncated; delete "
                        f"{folder} to start anew"
                    )
            if not shard.documents_sha256:  # a run of an earlier version
                shards[number] = find_documents(part, shard, dtype=dtype, eos_id=state.tokenizer["eos_id"])
            if bool(shard.mask_sha256) != records.has_mask:
                raise ValueError(
                    f"{folder / PROGRESS_FILE}: malformed (mask of {shard.file}); delete {folder} to start anew"
                )
    skipped = folder / SKIPPED_FILE
    if state.skipped_bytes > (skipped.stat().st_size if skipped.is_file() else 0):
        raise ValueError(f"{skipped}: is missing or truncated; delete {folder} to start anew")
    return state


def part_folders(folder: Path, arguments: dict[str, Any]) -> list[Path]:
    """The folders of the data sets that a run writes: the training data first."""
    return [folder / TRAIN, folder / VALIDATION] if "validation_fraction" in arguments else [folder]


def run_arguments(files: Sequence[InputFile], *, tokenizer: str, **other_arguments: Any) -> dict[str, Any]:
    """The arguments that determine the bytes of the data set, in a form that an error message can show."""
    # In the form of earlier versions, so that their interrupted runs can be resumed.
    described = [[str(file.path), file.extension, file.num_bytes, file.modified_ns, file.optional] for file in files]
    digest = hashlib.sha256(json.dumps(described).encode("ascii")).hexdigest()[:16]
    num_bytes = sum(file.num_bytes for file in files)
    arguments = {
        "inputs": f"{len(files)} files, {num_bytes} bytes, paths and modification times {digest}",
        "tokenizer": tokenizer,
        **other_arguments,
    }
    if any(file.source != DEFAULT_SOURCE for file in files):
        spans = [(name, len(list(span))) for name, span in groupby(files, key=lambda file: file.source)]
        arguments["sources"] = ", ".join(f"{name}: {num_files} files" for name, num_files in spans)
    if num_tables := sum(file.kind == "table" for file in files):  # earlier versions read them as texts
        arguments["csv files read by record"] = num_tables
    if (path := json_file(tokenizer) or Path(tokenizer)).is_file():
        arguments["tokenizer file"] = "sha256 " + hashlib.sha256(path.read_bytes()).hexdigest()
    return arguments
