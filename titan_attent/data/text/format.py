"""The data set on disk: its files, and how a crash never leaves a partial data set.

    DIR/index.json           dtype, counts, tokenizer, the shards with their sources and hashes, the fingerprint
    DIR/tokenizer.tiktoken   the tokenizer's ranks, or tokenizer.json (tokenizer.py)
    DIR/shard-00000.bin      raw little-endian token ids, uint16 or uint32, no header
    DIR/shard-00000.documents, DIR/shard-00000.mask, DIR/lengths.bin: its documents (document_files.py)
    DIR/shard-00001.bin      ...

Files are written under a temporary name, fsynced, then renamed. index.json is written last: a folder without it is not
a data set. The fingerprint identifies the token stream: with equal fingerprints, equal example ids have equal tokens.
The names of sources are not part of the fingerprint, as they change no token. So checkpoints and reference losses stay
valid if a source is renamed in index.json.

A shard holds tokens of one source (web, code, ...). Format version 1 had no sources: all of its tokens belong to the
default source. Version 3 has the files of the documents, for all shards. Versions 1 and 2 do not have them;
boundaries.py adds them. They are not part of the fingerprint, which stays equal when a data set gets its documents.
Version 4 is that of adopted data sets: their shards are views of files of other tools, below a root, and may have other
dtypes (file_view.py).

Cost: about 170 bytes of index per shard, 290 with documents, 370 with a mask, 250 more for a view; one sha256 over
everything written.
"""

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from titan_attent.data.formats.token_file import TOKEN_DTYPES
from titan_attent.data.io.atomic import write_atomically
from titan_attent.data.io.folder import DEFAULT_SOURCE, INDEX_FILE, PROGRESS_FILE, check_file_name, is_source_name
from titan_attent.data.text.document_files import (
    END_DTYPE,
    LENGTHS_FILE,
    MAX_SHARD_TOKENS,
    HashedFile,
    MaskFile,
    check_sha256,
    count_lengths,
    documents_file,
    encode_lengths,
    mask_bytes,
    mask_file,
)
from titan_attent.data.text.file_view import SEGMENT_DTYPE, FileView, segments_file
from titan_attent.foundations.typed import typed
from titan_attent.foundations.versioned_json import encode_versioned, read_versioned

FORMAT = "titan_attent.tokens"
VERSION = 3
VERSION_WITHOUT_DOCUMENTS = 2
"""The version of an index without documents, which earlier versions of the package can read."""
VERSION_ADOPTED = 4
"""The version of an index whose shards are views of files of other tools."""
READ_VERSIONS = (1, 2, 3, 4)
DTYPES = TOKEN_DTYPES | {f"{name}, big-endian": dtype.newbyteorder(">") for name, dtype in TOKEN_DTYPES.items()}
"""The names of dtypes in an index. Shards that this package wrote are uint16 or uint32."""
MAX_VOCAB_SIZE = 2**31
"""Upper limit of the vocabulary size in an index; the ranks of a tokenizer are below it (bpe.py)."""
WRITER = "`python -m titan_attent.data.text`"
UPGRADE = "python -m titan_attent.data.text.boundaries"
"""The command that gives a data set its documents."""


def token_dtype(vocab_size: int) -> np.dtype:
    """The dtype on disk for ids below ``vocab_size``: uint16, or uint32 beyond 65536."""
    return np.dtype("<u2" if vocab_size <= 2**16 else "<u4")


@dataclass(frozen=True)
class ShardEntry:
    """One shard in the index: its file name, number of tokens, sha256 (hex) of the file, and the tokens' source.

    Without documents, ``num_documents`` is 0 and ``documents_sha256`` empty. Without a mask, ``mask_sha256`` is empty.
    If ``view`` is set, the tokens are in a file of another tool: ``file`` only names the files of documents, mask and
    segments, and ``sha256`` is that of the bytes of the view.
    """

    file: str
    num_tokens: int
    sha256: str
    source: str = DEFAULT_SOURCE
    num_documents: int = 0
    documents_sha256: str = ""
    mask_sha256: str = ""
    view: FileView | None = None

    def __post_init__(self) -> None:
        check_file_name(self.file, of="shard")

    @property
    def location(self) -> str:
        """The file of the tokens, relative to the data set's folder or root."""
        return self.file if self.view is None else self.view.path

    def files(self, itemsize: int) -> Iterator[tuple[str, int, str]]:
        """Yield name, size in bytes and sha256 of every file of the shard in the data set's folder.

        Args:
            itemsize: bytes per token.
        """
        if self.view is None:
            yield self.file, self.num_tokens * itemsize, self.sha256
        elif self.view.num_segments:
            size = 2 * SEGMENT_DTYPE.itemsize * self.view.num_segments
            yield segments_file(self.file), size, self.view.segments_sha256
        if self.documents_sha256:
            yield documents_file(self.file), self.num_documents * END_DTYPE.itemsize, self.documents_sha256
        if self.mask_sha256:
            yield mask_file(self.file), mask_bytes(self.num_tokens), self.mask_sha256


@dataclass(frozen=True)
class LengthsEntry:
    """The entry of the histogram of document lengths in the index: its file name, and sha256 (hex) of the file."""

    file: str
    sha256: str

    def __post_init__(self) -> None:
        check_file_name(self.file, of="lengths file")


class ShardWriter:
    """Streams tokens to a shard file and hashes them; the files get their final names in :meth:`finish`.

    A context manager; leaving it without :meth:`finish` removes the files. Either all tokens are appended as whole
    documents (:meth:`append_document`), or none are.

    Args:
        path: the file of the tokens.
        mask: write a mask of the labels, too.
    """

    def __init__(self, path: Path, *, dtype: np.dtype, source: str = DEFAULT_SOURCE, mask: bool = False):
        self.path, self.dtype, self.source = path, dtype, source
        self.num_tokens, self.max_token_id, self.num_documents = 0, -1, 0
        self._file = HashedFile(path)
        self._documents: HashedFile | None = None
        self._mask = MaskFile(path.with_name(mask_file(path.name))) if mask else None

    def __enter__(self) -> "ShardWriter":
        return self

    def __exit__(self, *exception: object) -> None:
        for file in (self._documents, self._mask, self._file):
            if file is not None:
                file.discard()

    def append(self, tokens: np.ndarray) -> None:
        """Append ids [T] of any integer dtype; ValueError if one does not fit the dtype on disk."""
        if not len(tokens):
            return
        smallest, largest = int(tokens.min()), int(tokens.max())
        if smallest < 0 or largest > np.iinfo(self.dtype).max:
            raise ValueError(
                f"{self.path}: token ids {smallest} to {largest} do not fit {self.dtype.name}; "
                "choose the dtype with token_dtype(vocab_size)"
            )
        self._file.write(np.ascontiguousarray(tokens, dtype=self.dtype).data)
        self.num_tokens += len(tokens)
        self.max_token_id = max(self.max_token_id, largest)

    def append_document(self, tokens: np.ndarray, counts: np.ndarray | None = None) -> None:
        """Append the ids [T] of one document; see :meth:`append_documents`."""
        self.append_documents(tokens, np.array([len(tokens)]), counts)

    def append_documents(self, tokens: np.ndarray, ends: np.ndarray, counts: np.ndarray | None = None) -> None:
        """Append the ids [T] of documents, one after the other, each of which ends with the eos id.

        Args:
            ends: integers [n], where each document ends in ``tokens``, exclusive, rising to T.
            counts: bool [T], for a shard with a mask: whether each token counts as a label; None for all.

        Raises:
            ValueError: the shard would have more than ``MAX_SHARD_TOKENS`` tokens, or a reason of :meth:`append`.
        """
        if self.num_tokens + len(tokens) > MAX_SHARD_TOKENS:
            raise ValueError(
                f"{self.path}: a document of {len(tokens)} tokens after {self.num_tokens} others; a shard holds at "
                f"most {MAX_SHARD_TOKENS}; lower --shard-tokens or --max-document-bytes"
            )
        if self._documents is None:
            self._documents = HashedFile(self.path.with_name(documents_file(self.path.name)))
        start = self.num_tokens
        self.append(tokens)
        self.num_documents += len(ends)
        self._documents.write((ends + start).astype(END_DTYPE).data)
        if self._mask is not None:
            self._mask.append(np.ones(len(tokens), dtype=bool) if counts is None else counts)

    def finish(self) -> ShardEntry:
        """Fsync the files and rename them to their final names. Returns the entry of the shard for the index."""
        return ShardEntry(
            self.path.name,
            self.num_tokens,
            self._file.finish(),
            self.source,
            self.num_documents,
            self._documents.finish() if self._documents is not None else "",
            self._mask.finish() if self._mask is not None else "",
        )


@dataclass(frozen=True, kw_only=True)
class Index:
    """``index.json``; ``tokenizer`` is the dict of ``Tokenizer.info``."""

    dtype: str
    num_tokens: int
    num_documents: int
    max_token_id: int
    tokenizer: dict[str, Any]
    shards: tuple[ShardEntry, ...]
    fingerprint: str
    lengths: LengthsEntry | None = None
    """None if the data set does not know its documents."""
    root: str | None = None
    """Of an adopted data set: the folder of its files, absolute or relative to the data set's. It may be edited."""
    options: str | None = None
    """Of an adopted data set: the options of the command that decide about its shards."""

    @property
    def token_dtype(self) -> np.dtype:
        """The dtype of the tokens on disk."""
        return DTYPES[self.dtype]

    @property
    def has_documents(self) -> bool:
        return self.lengths is not None

    @property
    def has_mask(self) -> bool:
        return any(shard.mask_sha256 for shard in self.shards)


def _fingerprint(*, dtype: str, shards: Sequence[ShardEntry], tokenizer: dict[str, Any]) -> str:
    """sha256 (hex) of the definition of the token stream, without the names of its files and sources."""
    stream = {
        "dtype": dtype,
        "shards": [_identity(shard) for shard in shards],
        "tokenizer": tokenizer,
    }
    canonical = json.dumps(stream, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(canonical.encode("ascii")).hexdigest()


def _identity(shard: ShardEntry) -> list[Any]:
    """What decides about the tokens of a shard."""
    segments = [shard.view.segments_sha256] if shard.view is not None and shard.view.num_segments else []
    return [shard.num_tokens, shard.sha256, *segments]


def documents_fingerprint(index: Index) -> str:
    """sha256 (hex) of the token stream and of its documents, with their masks if there are any."""
    stream = {"fingerprint": index.fingerprint, "documents": [shard.documents_sha256 for shard in index.shards]}
    if index.has_mask:
        stream["masks"] = [shard.mask_sha256 for shard in index.shards]
    return hashlib.sha256(json.dumps(stream, sort_keys=True, separators=(",", ":")).encode("ascii")).hexdigest()


def write_index(
    folder: Path,
    *,
    dtype: np.dtype,
    shards: Sequence[ShardEntry],
    num_documents: int,
    max_token_id: int,
    tokenizer: dict[str, Any],
    root: str | None = None,
    options: str | None = None,
) -> Index:
    """Write ``folder/index.json``, which completes the data set; the shards must be in the folder already.

    If the shards have documents, ``lengths.bin``, the histogram of their lengths, is written, too.

    Args:
        num_documents: number of documents of the data set.
        tokenizer: has at least ``name``, ``vocab_size`` and ``eos_id``.
        root, options: of an adopted data set, all of whose shards are views.
    """
    dtype_name = next(name for name, known in DTYPES.items() if known == dtype)
    lengths = None
    if shards and all(shard.documents_sha256 for shard in shards):
        sizes = ((shard.file, shard.num_tokens, shard.num_documents) for shard in shards)
        content = encode_lengths(*count_lengths(folder, sizes))
        write_atomically(folder / LENGTHS_FILE, content)
        lengths = LengthsEntry(LENGTHS_FILE, hashlib.sha256(content).hexdigest())
    index = Index(
        dtype=dtype_name,
        num_tokens=sum(shard.num_tokens for shard in shards),
        num_documents=num_documents,
        max_token_id=max_token_id,
        tokenizer=tokenizer,
        shards=tuple(shards),
        fingerprint=_fingerprint(dtype=dtype_name, shards=shards, tokenizer=tokenizer),
        lengths=lengths,
        root=root,
        options=options,
    )
    fields = asdict(index)
    version = VERSION if index.has_documents else VERSION_WITHOUT_DOCUMENTS
    version = version if root is None else VERSION_ADOPTED
    for shard in fields["shards"]:
        for name in ("num_documents", "documents_sha256", "mask_sha256", "view"):
            if not shard[name]:
                del shard[name]
    for name in ("lengths", "root", "options"):
        if fields[name] is None:
            del fields[name]
    write_atomically(folder / INDEX_FILE, encode_versioned(fields, format=FORMAT, version=version))
    return index


def read_index(folder: Path) -> Index:
    """Read ``folder/index.json``. ValueError if it is missing, malformed, of another format or edited."""
    path = folder / INDEX_FILE
    if not path.is_file():
        raise ValueError(f"{folder}: {_why_no_index(folder)}")
    fix = f"restore the file, or write the data set anew with {WRITER}"
    fields = read_versioned(path, format=FORMAT, versions=READ_VERSIONS, fix=fix)
    try:
        index = typed(Index, fields)
        _check_consistency(index)
        fingerprint = _fingerprint(dtype=index.dtype, shards=index.shards, tokenizer=index.tokenizer)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: malformed index ({error}); {fix}") from error
    if fingerprint != index.fingerprint:
        raise ValueError(
            f"{path}: its fingerprint is {index.fingerprint} but its content gives {fingerprint}: the "
            f"index was edited after it was written; {fix}"
        )
    return index


def _why_no_index(folder: Path) -> str:
    if (folder / PROGRESS_FILE).exists():
        return f"its writer was interrupted; run the same {WRITER} command again, which resumes it"
    reason = f"no {INDEX_FILE} in it" if folder.is_dir() else "no such folder"
    return (
        f"not a data set, {reason}; correct the path, or make one with "
        f"{WRITER[:-1]} INPUT --tokenizer NAME --output {folder}`"
    )


def _check_consistency(index: Index) -> None:
    if index.root is None and index.dtype not in ("uint16", "uint32"):
        raise ValueError(f"dtype {index.dtype!r} is neither uint16 nor uint32")
    if index.dtype not in DTYPES or (index.root is not None and (not index.root or "\0" in index.root)):
        raise ValueError(f"dtype {index.dtype!r} or root {str(index.root)[:80]!r} is not known")
    for shard in index.shards:
        if (shard.view is None) != (index.root is None):
            raise ValueError(f"shard {shard.file!r} has {'no ' * (shard.view is None)}view, unlike the index's root")
        if shard.num_tokens < 1:
            raise ValueError(f"shard {shard.file!r} has {shard.num_tokens} tokens")
        if not is_source_name(shard.source):
            raise ValueError(f"source {shard.source!r} of shard {shard.file!r}; use letters, digits, '_', '.' and '-'")
        if shard.view is not None:
            shard.view.check(shard.num_tokens, index.token_dtype.itemsize)
    if not 0 < index.num_tokens == sum(shard.num_tokens for shard in index.shards):
        raise ValueError(f"num_tokens {index.num_tokens} is not the sum over the shards")
    if index.num_documents < 0:
        raise ValueError(f"num_documents is {index.num_documents}")
    _check_documents(index)
    check_tokenizer_info(index.tokenizer)
    if not 0 <= index.max_token_id < index.tokenizer["vocab_size"]:
        raise ValueError(f"max_token_id {index.max_token_id} is outside the tokenizer's vocabulary")


def _check_documents(index: Index) -> None:
    """ValueError if only some of the shards have documents or a mask, or if their counts are impossible."""
    has_documents, has_mask = index.has_documents, index.has_mask
    for shard in index.shards:
        if bool(shard.documents_sha256) != has_documents or bool(shard.mask_sha256) != has_mask:
            raise ValueError(
                f"shard {shard.file!r} {'has' if shard.documents_sha256 else 'has no'} documents and "
                f"{'a' if shard.mask_sha256 else 'no'} mask, unlike the others or the entry 'lengths'"
            )
        if shard.documents_sha256 and not 1 <= shard.num_documents <= shard.num_tokens <= MAX_SHARD_TOKENS:
            raise ValueError(
                f"shard {shard.file!r} has {shard.num_documents} documents and {shard.num_tokens} tokens; a document "
                f"has at least 1 token, and a shard at most {MAX_SHARD_TOKENS}"
            )
        check_sha256([value for value in (shard.documents_sha256, shard.mask_sha256) if value])
    if index.lengths is None:
        if has_mask:
            raise ValueError("the shards have a mask but no documents")
        return
    check_sha256([index.lengths.sha256])
    if index.num_documents != sum(shard.num_documents for shard in index.shards):
        raise ValueError(f"num_documents {index.num_documents} is not the sum over the shards")


def check_tokenizer_info(info: dict[str, Any]) -> None:
    """ValueError if ``info``, read from a data set, is not a valid ``Tokenizer.info``."""
    if missing := {"name", "vocab_size", "eos_id"} - info.keys():
        raise ValueError(f"tokenizer without {', '.join(sorted(missing))}")
    if "file" in info:
        check_file_name(info["file"], of="tokenizer file")
    types = {"name": str, "vocab_size": int, "eos_id": int, "sha256": str, "pattern": str, "kind": str}
    for name, expected in types.items():
        if name in info:
            typed(expected, info[name], where=f"tokenizer {name}")
    for text, number in typed(dict[str, int], info.get("special_tokens", {}), where="special_tokens").items():
        if not 0 <= number < info["vocab_size"]:
            raise ValueError(f"special token {text[:80]!r} has id {number}, which is outside of the vocabulary")
    if not 0 < info["vocab_size"] <= MAX_VOCAB_SIZE:
        raise ValueError(f"tokenizer vocab_size is {info['vocab_size']}; it must be in [1, {MAX_VOCAB_SIZE}]")
    if not 0 <= info["eos_id"] < info["vocab_size"]:
        raise ValueError(f"tokenizer eos_id {info['eos_id']} is outside of the vocabulary")
