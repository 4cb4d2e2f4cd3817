"""The data set on disk: its files, and how a crash never leaves a partial data set.

    DIR/index.json           dtype, counts, tokenizer, the shards with their sources and hashes, the fingerprint
    DIR/tokenizer.tiktoken   the tokenizer's ranks (tokenizer.py)
    DIR/shard-00000.bin      raw little-endian token ids, uint16 or uint32, no header
    DIR/shard-00001.bin      ...

Files are written under a temporary name, fsynced, then renamed. index.json is written last: a folder without it is not
a data set. The fingerprint identifies the token stream: with equal fingerprints, equal example ids have equal tokens.
The names of sources are not part of the fingerprint, as they change no token. So checkpoints and reference losses stay
valid if a source is renamed in index.json.

A shard holds tokens of one source (web, code, ...). Format version 1 had no sources: all of its tokens belong to the
default source.

Cost: about 170 bytes of index per shard; one sha256 over the tokens while they are written.
"""

import hashlib
import json
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from titan_attent.data.io.atomic import publish, temporary_name, write_atomically
from titan_attent.data.io.folder import DEFAULT_SOURCE, INDEX_FILE, PROGRESS_FILE, check_file_name, is_source_name
from titan_attent.foundations.typed import typed
from titan_attent.foundations.versioned_json import encode_versioned, read_versioned

FORMAT = "titan_attent.tokens"
VERSION = 2
READ_VERSIONS = (1, 2)
MAX_VOCAB_SIZE = 2**31
"""Upper limit of the vocabulary size in an index; the ranks of a tokenizer are below it (bpe.py)."""
WRITER = "`python -m titan_attent.data.text`"


def token_dtype(vocab_size: int) -> np.dtype:
    """The dtype on disk for ids below ``vocab_size``: uint16, or uint32 beyond 65536."""
    return np.dtype("<u2" if vocab_size <= 2**16 else "<u4")


@dataclass(frozen=True)
class ShardEntry:
    """One shard in the index: its file name, number of tokens, sha256 (hex) of the file, and the tokens' source."""

    file: str
    num_tokens: int
    sha256: str
    source: str = DEFAULT_SOURCE

    def __post_init__(self) -> None:
        check_file_name(self.file, of="shard")


class ShardWriter:
    """Streams tokens to a shard file and hashes them; the file gets its final name in :meth:`finish`.

    A context manager; leaving it without :meth:`finish` removes the file.
    """

    def __init__(self, path: Path, *, dtype: np.dtype, source: str = DEFAULT_SOURCE):
        self.path, self.dtype, self.source = path, dtype, source
        self.num_tokens, self.max_token_id = 0, -1
        self._file = open(temporary_name(path), "wb", buffering=2**20)  # noqa: SIM115
        self._sha256 = hashlib.sha256()

    def __enter__(self) -> "ShardWriter":
        return self

    def __exit__(self, *exception: object) -> None:
        if not self._file.closed:
            self._file.close()
            temporary_name(self.path).unlink()

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
        data = np.ascontiguousarray(tokens, dtype=self.dtype).data
        self._file.write(data)
        self._sha256.update(data)
        self.num_tokens += len(tokens)
        self.max_token_id = max(self.max_token_id, largest)

    def finish(self) -> ShardEntry:
        """Fsync the file and rename it to its final name. Returns its entry for the index."""
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()
        publish(temporary_name(self.path), self.path)
        return ShardEntry(self.path.name, self.num_tokens, self._sha256.hexdigest(), self.source)


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


def _fingerprint(*, dtype: str, shards: Sequence[ShardEntry], tokenizer: dict[str, Any]) -> str:
    """sha256 (hex) of the definition of the token stream, without the names of its files and sources."""
    stream = {
        "dtype": dtype,
        "shards": [[shard.num_tokens, shard.sha256] for shard in shards],
        "tokenizer": tokenizer,
    }
    canonical = json.dumps(stream, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(canonical.encode("ascii")).hexdigest()


def write_index(
    folder: Path,
    *,
    dtype: np.dtype,
    shards: Sequence[ShardEntry],
    num_documents: int,
    max_token_id: int,
    tokenizer: dict[str, Any],
) -> Index:
    """Write ``folder/index.json``, which completes the data set; the shards must be in the folder already.

    ``tokenizer`` has at least ``name``, ``vocab_size`` and ``eos_id``.
    """
    index = Index(
        dtype=dtype.name,
        num_tokens=sum(shard.num_tokens for shard in shards),
        num_documents=num_documents,
        max_token_id=max_token_id,
        tokenizer=tokenizer,
        shards=tuple(shards),
        fingerprint=_fingerprint(dtype=dtype.name, shards=shards, tokenizer=tokenizer),
    )
    write_atomically(folder / INDEX_FILE, encode_versioned(asdict(index), format=FORMAT, version=VERSION))
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
    if index.dtype not in ("uint16", "uint32"):
        raise ValueError(f"dtype {index.dtype!r} is neither uint16 nor uint32")
    for shard in index.shards:
        if shard.num_tokens < 1:
            raise ValueError(f"shard {shard.file!r} has {shard.num_tokens} tokens")
        if not is_source_name(shard.source):
            raise ValueError(f"source {shard.source!r} of shard {shard.file!r}; use letters, digits, '_', '.' and '-'")
    if not 0 < index.num_tokens == sum(shard.num_tokens for shard in index.shards):
        raise ValueError(f"num_tokens {index.num_tokens} is not the sum over the shards")
    if index.num_documents < 0:
        raise ValueError(f"num_documents is {index.num_documents}")
    check_tokenizer_info(index.tokenizer)
    if not 0 <= index.max_token_id < index.tokenizer["vocab_size"]:
        raise ValueError(f"max_token_id {index.max_token_id} is outside the tokenizer's vocabulary")


def check_tokenizer_info(info: dict[str, Any]) -> None:
    """ValueError if ``info``, read from a data set, is not a valid ``Tokenizer.info``."""
    if missing := {"name", "vocab_size", "eos_id"} - info.keys():
        raise ValueError(f"tokenizer without {', '.join(sorted(missing))}")
    if "file" in info:
        check_file_name(info["file"], of="tokenizer file")
    for name, expected in (("name", str), ("vocab_size", int), ("eos_id", int), ("sha256", str), ("pattern", str)):
        if name in info:
            typed(expected, info[name], where=f"tokenizer {name}")
    for text, number in typed(dict[str, int], info.get("special_tokens", {}), where="special_tokens").items():
        if not 0 <= number < info["vocab_size"]:
            raise ValueError(f"special token {text[:80]!r} has id {number}, which is outside of the vocabulary")
    if not 0 < info["vocab_size"] <= MAX_VOCAB_SIZE:
        raise ValueError(f"tokenizer vocab_size is {info['vocab_size']}; it must be in [1, {MAX_VOCAB_SIZE}]")
    if not 0 <= info["eos_id"] < info["vocab_size"]:
        raise ValueError(f"tokenizer eos_id {info['eos_id']} is outside of the vocabulary")
