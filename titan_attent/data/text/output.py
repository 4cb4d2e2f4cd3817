"""The folder that the text writer writes to: whether it may, what ``--overwrite`` deletes, what a refusal leaves.

A command that is refused leaves the folder as it was, unless it had finished a shard, which the same command resumes.
Only skipped.jsonl stays, which the message names.

Cost: a few stats; the shards of an overwritten data set are deleted one by one.
"""

import re
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from titan_attent.data.io.bad import SKIPPED_FILE
from titan_attent.data.io.folder import INDEX_FILE, PROGRESS_FILE, locked
from titan_attent.data.text.any_tokenizer import Tokenizer
from titan_attent.data.text.document_files import LENGTHS_FILE
from titan_attent.data.text.format import FORMAT
from titan_attent.data.text.held_out import TRAIN, VALIDATION
from titan_attent.data.text.json_tokenizer import JSON_FILE, JsonTokenizer
from titan_attent.data.text.tokenizer import TOKENIZER_FILES
from titan_attent.foundations.versioned_json import read_json_object

TASK_FILE = "task.json"
"""What titan_attent.tasks records of the data sets that it writes."""
PARTS = (TRAIN, VALIDATION)
"""The folders of the data sets in an output with several of them."""
_NAMES = (INDEX_FILE, PROGRESS_FILE, LENGTHS_FILE, SKIPPED_FILE, TASK_FILE, *TOKENIZER_FILES)
_OWN_FILES = re.compile(
    rf"({'|'.join(map(re.escape, _NAMES))}"
    r"|shard-\d+\.(bin|documents|mask))(\.tmp)?"
)
FIX = "choose another --output, or delete it with --overwrite"


def check_output(
    folder: Path,
    *,
    paths: Iterable[Path],
    split: bool = False,
    overwrite: bool = False,
    parts: Sequence[str] = PARTS,
) -> None:
    """ValueError if ``folder`` cannot hold a new or an interrupted data set.

    Args:
        paths: the inputs.
        split: whether training and validation data are written, to two folders in it.
        overwrite: accept a data set of text in it, which is to be deleted.
        parts: the folders in it that may be data sets.
    """
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"{folder}: is a file; choose a folder for --output")
    for path in paths:
        if path.is_dir() and folder.resolve().is_relative_to(path.resolve()):
            raise ValueError(f"{folder}: is inside the input {path}; choose an --output outside of it")
    if overwrite:
        _check_overwritten(folder, paths=paths, parts=parts)
        return
    interrupted = (folder / PROGRESS_FILE).exists()
    for part in _parts(folder, parts):
        # The index of the training data is written last.
        if (part / INDEX_FILE).exists() and not (interrupted and split and part.name == VALIDATION):
            raise ValueError(f"{part}: holds a finished data set; {FIX}")
        if not interrupted and (stray := sorted(part.glob("shard-*.bin"))):
            raise ValueError(f"{part}: holds {stray[0].name} but no {INDEX_FILE}; {FIX}")


def _check_overwritten(folder: Path, *, paths: Iterable[Path], parts: Sequence[str]) -> None:
    """ValueError if a folder to overwrite holds something other than a data set of text, or an input."""
    for part in _parts(folder, parts):
        if (part / INDEX_FILE).is_file():
            try:
                fields = read_json_object(part / INDEX_FILE)
            except ValueError as error:
                raise ValueError(f"{part / INDEX_FILE}: {error}; delete the folder yourself to overwrite it") from None
            if fields.get("format") != FORMAT or "root" in fields:
                raise ValueError(
                    f"{part}: its {INDEX_FILE} is not that of a data set of text; choose another --output, or delete "
                    "the folder first"
                )
    own = {path.resolve() for path in _own_files(folder, parts)}
    for path in paths:
        if path.resolve() in own:
            raise ValueError(f"{path}: is an input, and --overwrite would delete it; choose another --output")


def check_tokenizer_file(parts: Sequence[Path], tokenizer: Tokenizer, *, written: Path) -> None:
    """ValueError if a folder of ``parts`` holds a tokenizer.json of somebody else, which would be replaced.

    Args:
        written: the folder that the writer was told to write.
    """
    for part in parts:
        path = part / JSON_FILE
        if not isinstance(tokenizer, JsonTokenizer) or not path.is_file() or _holds_data_set(written, part):
            continue
        if path.read_bytes() != tokenizer.content:
            raise ValueError(f"{path}: is no file of a data set, and stays as it is; choose another --output")


def _holds_data_set(*folders: Path) -> bool:
    return any((folder / name).is_file() for folder in folders for name in (INDEX_FILE, PROGRESS_FILE))


def delete_data_set(folder: Path, *, parts: Sequence[str] = PARTS) -> None:
    """Delete the files of the data set of text in ``folder``, finished or not, and those of its parts."""
    own = list(_own_files(folder, parts))
    # A tokenizer.json may be of a model, in a folder that was never written to.
    own = [path for path in own if path.name != JSON_FILE or _holds_data_set(folder, path.parent)]
    for path in sorted(own, key=lambda path: path.name != INDEX_FILE):
        path.unlink(missing_ok=True)
    for part in _parts(folder, parts)[1:]:
        if part.is_dir() and not any(part.iterdir()):
            part.rmdir()


def _parts(folder: Path, parts: Sequence[str]) -> list[Path]:
    return [folder, *(folder / part for part in parts)]


def _own_files(folder: Path, parts: Sequence[str]) -> Iterator[Path]:
    for part in _parts(folder, parts):
        if part.is_dir():
            yield from (path for path in list(part.iterdir()) if _OWN_FILES.fullmatch(path.name) and path.is_file())


@contextmanager
def opened(folder: Path, *, parts: Sequence[str] = PARTS) -> Iterator[set[Path]]:
    """Create and lock ``folder``. After a ValueError, delete what was made in it and the created folders.

    Nothing is deleted once a shard is finished. Yields the files of an earlier run, which are kept.

    Raises:
        ValueError: another process writes to the folder.
    """
    missing = [path for path in (folder, *folder.parents) if not path.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    with locked(folder):
        kept = set(_own_files(folder, parts))
        try:
            yield kept
        except ValueError:
            found = set(_own_files(folder, parts))
            if not any(path.suffix == ".bin" for path in found):
                for path in found - kept:
                    if path.name != SKIPPED_FILE:
                        path.unlink(missing_ok=True)
                for path in (*_parts(folder, parts)[1:], *missing):
                    if path.is_dir() and not any(path.iterdir()):
                        path.rmdir()
            raise
