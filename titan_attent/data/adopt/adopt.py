"""Makes a data set of token files where they are: index.json, and files of documents, masks and segments beside it.

The files are only read. A killed command resumes with the same command (record.py). Where a data set was adopted
already, the same command hashes the files that changed since, and updates the index.

Cost: the headers and indices of the files on one thread; then each shard is scanned once, on ``num_threads`` threads.
"""

import os
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from itertools import count
from pathlib import Path
from threading import Lock
from typing import Any, NamedTuple

from tqdm import tqdm

from titan_attent.data.adopt.boundaries import Rule, rule_of
from titan_attent.data.adopt.find import Found, find_files
from titan_attent.data.adopt.options import RECORD_FILE, STEM, Options, Places, places
from titan_attent.data.adopt.pieces import Piece, cut
from titan_attent.data.adopt.record import Known, Record
from titan_attent.data.adopt.scan import pack_mask, scan
from titan_attent.data.formats.token_file import NONE
from titan_attent.data.io.folder import INDEX_FILE, locked
from titan_attent.data.io.inputs import parse_inputs
from titan_attent.data.io.walk import LeftOut
from titan_attent.data.text.any_tokenizer import Tokenizer
from titan_attent.data.text.document_files import LENGTHS_FILE
from titan_attent.data.text.file_view import FileView
from titan_attent.data.text.format import FORMAT, Index, ShardEntry, read_index, write_index
from titan_attent.data.text.json_tokenizer import JsonTokenizer
from titan_attent.data.text.tokenizer import RANKS_FILE, json_file, load_tokenizer
from titan_attent.foundations.versioned_json import read_json_object

_WAITING = 4
"""Shards per thread that wait to be scanned."""


@dataclass
class AdoptSummary:
    """What was adopted.

    Attributes:
        folder: of the index.
        formats: files per format.
        boundaries: shards per way in which their documents were found.
        num_scanned: shards that this command scanned; the others were known.
        num_cut: shards that begin or end inside a document.
        notes: remarks of the formats.
        left_out: what was not read.
    """

    folder: Path
    index: Index
    formats: Counter[str]
    boundaries: Counter[str]
    num_scanned: int
    num_cut: int
    notes: list[str]
    left_out: LeftOut


class _Job(NamedTuple):
    found: Found
    rule: Rule
    piece: Piece
    entry: ShardEntry


@dataclass
class _Done:
    entries: list[ShardEntry] = field(default_factory=list)
    max_token_id: int = -1
    num_scanned: int = 0
    num_cut: int = 0


def adopt(
    inputs: Sequence[str | Path],
    *,
    tokenizer: str,
    options: Options | None = None,
    output: str = "",
    root: str = "",
    progress: bool = False,
) -> AdoptSummary:
    """Adopt the token files of ``inputs`` as a data set, or resume an interrupted command.

    Args:
        inputs: folders, files or patterns; a string may begin with the name of the data source, ``NAME=PATH``.
        tokenizer: that of the files, a tiktoken encoding, or the path of a rank file, of a tokenizer.json or of a
            folder with one. The eos of a tokenizer.json is ``options.eos``, or else named beside it.
        options: by default those of :class:`Options`.
        output: folder of the index; empty to write it into the input folder.
        root: with ``output``, the folder to which the index names its files.
        progress: show a progress bar on stderr.

    Raises:
        ValueError: an option or a file cannot be used; the message says what, where, and what to do.
        OSError: a file cannot be read, or the folder written.
    """
    options = options or Options()
    sources = parse_inputs(inputs)
    where = places([path for _, path in sources], output=output, root=root)
    # What --eos says of a tokenizer of tiktoken is about documents' ends alone: it has an eos of its own.
    own_tokenizer = load_tokenizer(tokenizer, eos=options.eos if json_file(tokenizer) else "")
    _check_folder(where, own_tokenizer)
    info = own_tokenizer.info()
    left_out = LeftOut()
    found = find_files(sources, options, where=where, left_out=left_out)
    rules = [rule_of(one.file, options, tokenizer=info) for one in found]
    if NONE in (kinds := {rule.kind for rule in rules}) and len(kinds) > 1:
        raise ValueError("only some files have documents; use the same --boundaries for all")
    if len({one.file.mask is None for one in found}) > 1:
        without = next(one.file.path for one in found if one.file.mask is None)
        raise ValueError(
            f"{without}: has no mask of labels, unlike other files; adopt these as a data set of their own"
        )
    if rules[0].kind == NONE and found[0].file.mask is not None:
        raise ValueError(
            f"{found[0].file.path}: has a mask of labels, which needs documents; leave out --boundaries none"
        )
    eos_ids = {rule.eos_id for rule in rules if rule.eos_id >= 0}
    if len(eos_ids) == 1:  # what the data say about their documents' ends
        info["eos_id"] = eos_ids.pop()
    settings = {"tokenizer": info, "options": options.identity(), "root": where.stored_root}
    with _opened(where.folder), Record(where.folder, settings=settings) as record:
        _know_index(where, record, settings)
        total = sum(one.file.num_tokens * one.file.dtype.itemsize for one in found)
        with tqdm(total=total, unit="B", unit_scale=True, disable=not progress) as bar:
            done = _scan_all(_jobs(found, rules, where, options), record, where, info["vocab_size"], options, bar)
        own_tokenizer.save(where.folder)
        index = write_index(
            where.folder,
            dtype=found[0].file.dtype,
            shards=done.entries,
            num_documents=sum(entry.num_documents for entry in done.entries),
            max_token_id=done.max_token_id,
            tokenizer=info,
            root=where.stored_root,
            options=options.identity(),
        )
        record.delete()
    return AdoptSummary(
        where.folder,
        index,
        Counter(one.format for one in found),
        Counter(rule.kind for rule in rules),
        done.num_scanned,
        done.num_cut,
        sorted({one.file.note for one in found if one.file.note}),
        left_out,
    )


def _check_folder(where: Places, tokenizer: Tokenizer) -> None:
    """ValueError if the folder cannot be written, or has files of these names that are no adopted data set's."""
    existing = next(path for path in (where.folder, *where.folder.parents) if path.exists())
    if not existing.is_dir() or not os.access(existing, os.W_OK):
        raise ValueError(f"{existing}: is no folder that can be written; give --output DIR for the index, and --root")
    path = where.folder / INDEX_FILE
    if not path.is_file():
        names = [one.name for one in where.folder.iterdir()] if where.folder.is_dir() else []
        taken = sorted(name for name in names if name in (LENGTHS_FILE, RANKS_FILE))
        own = where.folder / tokenizer.FILE
        if isinstance(tokenizer, JsonTokenizer) and own.is_file() and own.read_bytes() != tokenizer.content:
            taken.append(own.name)  # the tokenizer of the files may stand beside them
        if taken and not any(name.startswith((STEM, RECORD_FILE)) for name in names):
            raise ValueError(
                f"{where.folder / taken[0]}: has a name that adopting writes, and stays as it is; give another --output"
            )
        return
    try:
        fields = read_json_object(path)
    except ValueError:
        fields = {}
    if fields.get("format") != FORMAT:
        raise ValueError(
            f"{path}: is not an index of this package, and stays as it is; give --output DIR for the index of the data "
            "set, and --root"
        )
    if "root" not in fields:
        raise ValueError(f"{where.folder}: is a data set that can be used as it is; choose another --output")


def _know_index(where: Places, record: Record, settings: dict[str, Any]) -> None:
    """Take the shards of an index that an earlier command finished as known; those that changed are scanned again."""
    if not (where.folder / INDEX_FILE).is_file():
        return
    index = read_index(where.folder)
    if {"tokenizer": index.tokenizer, "options": index.options, "root": index.root} != settings:
        raise ValueError(
            f"{where.folder}: was adopted with other options ({index.options or 'none'}; root {index.root}) or another "
            f"tokenizer; repeat these, or delete its {INDEX_FILE} to adopt anew (the token files are not touched)"
        )
    record.know(index.shards, max_token_id=index.max_token_id)


@contextmanager
def _opened(folder: Path) -> Iterator[None]:
    """Create and lock ``folder``. After a ValueError, delete what was made, unless a shard is finished."""
    missing = [path for path in (folder, *folder.parents) if not path.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    with locked(folder):
        kept = set(folder.glob(f"{STEM}*"))
        try:
            yield
        except ValueError:
            if not Record.has_shards(folder):
                for path in [*(set(folder.glob(f"{STEM}*")) - kept), folder / RECORD_FILE]:
                    path.unlink(missing_ok=True)
                for path in missing:
                    if not any(path.iterdir()):
                        path.rmdir()
            raise


def _jobs(found: Sequence[Found], rules: Sequence[Rule], where: Places, options: Options) -> Iterator[_Job]:
    """The shards to scan, in order."""
    numbers = count()
    for one, rule in zip(found, rules, strict=True):
        file = one.file
        stat = os.stat(file.path)
        path = os.path.relpath(os.path.abspath(file.path), os.path.abspath(where.root))
        for piece in cut(
            file,
            rule,
            folder=where.folder,
            shard_tokens=options.shard_tokens,
            name=lambda: f"{STEM}{next(numbers):05d}.bin",
        ):
            view = FileView(
                path,
                piece.offset,
                piece.num_bytes,
                piece.start,
                stat.st_size,
                stat.st_mtime_ns,
                piece.num_segments,
                piece.segments_sha256,
            )
            yield _Job(one, rule, piece, ShardEntry(piece.name, piece.stop - piece.start, "", one.source, view=view))


def _scan_all(
    jobs: Iterator[_Job], record: Record, where: Places, vocab_size: int, options: Options, bar: tqdm
) -> _Done:
    """Scan every shard that is not known, some at a time. The first error ends it; finished shards stay recorded."""
    done, entries, lock = _Done(), dict[int, ShardEntry](), Lock()

    def read(size: int) -> None:
        with lock:
            bar.update(size)

    def finish(number: int, known: Known) -> None:
        entries[number] = known.entry
        done.max_token_id = max(done.max_token_id, known.max_token_id)
        done.num_cut += known.is_cut

    pending: dict[Future[Known], int] = {}
    pool = ThreadPoolExecutor(options.num_threads)
    try:
        for number, job in enumerate(jobs):
            if (known := record.find(job.entry, documents_sha256=job.piece.documents_sha256)) is not None:
                read(job.piece.num_bytes)
                finish(number, _with_mask(known, job, where))
                continue
            pending[pool.submit(_scan_one, job, where, vocab_size, read)] = number
            while len(pending) >= options.num_threads * (1 + _WAITING):
                _collect(pending, record, finish, done)
        while pending:
            _collect(pending, record, finish, done)
    finally:
        pool.shutdown(cancel_futures=True)
        for future in pending:  # of those that ended after an error
            if future.done() and not future.cancelled() and future.exception() is None:
                record.add(future.result())
    done.entries = [entries[number] for number in range(len(entries))]
    return done


def _collect(
    pending: dict[Future[Known], int], record: Record, finish: Callable[[int, Known], None], done: _Done
) -> None:
    """Wait for at least one scan, and record it."""
    for future in wait(pending, return_when=FIRST_COMPLETED).done:
        number = pending[future]
        known = future.result()
        del pending[future]
        record.add(known)
        finish(number, known)
        done.num_scanned += 1


def _scan_one(job: _Job, where: Places, vocab_size: int, read: Callable[[int], object]) -> Known:
    file, entry = job.found.file, job.entry
    found = scan(file, job.piece, job.rule, folder=where.folder, vocab_size=vocab_size, read=read)
    assert entry.view is not None
    entry.view.check_unchanged(where.root)  # while it was scanned
    entry = replace(
        entry,
        sha256=found.sha256,
        num_documents=found.num_documents,
        documents_sha256=found.documents_sha256,
        mask_sha256=found.mask_sha256,
    )
    return Known(entry, found.max_token_id, found.is_cut)


def _with_mask(known: Known, job: _Job, where: Places) -> Known:
    """A known shard with the mask of now, which may have changed alone."""
    if job.found.file.mask is None:
        return known
    return known._replace(entry=replace(known.entry, mask_sha256=pack_mask(job.found.file, job.piece, where.folder)))
