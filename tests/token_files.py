"""Writers of the token formats that data/adopt reads, each from the description of its bytes, by struct and numpy.

They share no code with the package. ``benchmarks/speed/adopt_writers.py`` compares the same files, written by the real
writers, with these formats' own readers.
"""

import gzip
import json
import struct
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from titan_attent.data.adopt.adopt import AdoptSummary, adopt
from titan_attent.data.adopt.options import Options
from titan_attent.data.text.bpe import format_ranks
from titan_attent.data.text.document_examples import WholeDocuments
from titan_attent.data.text.shards import TokenDataset, TokenShards

Documents = Sequence[np.ndarray]


def write_ranks(path: Path, *, num_ranks: int) -> Path:
    """A tiktoken rank file of ``num_ranks`` tokens; the tokenizer's eos is the id ``num_ranks``."""
    ranks = {bytes([i]): i for i in range(256)}
    for number in range(num_ranks - 256):
        ranks[bytes(divmod(number, 256))] = 256 + number
    path.write_bytes(format_ranks(ranks))
    return path


def make_documents(
    *,
    count: int = 40,
    vocab_size: int = 1000,
    max_length: int = 60,
    seed: int = 0,
    first: int | None = None,
    last: int | None = None,
) -> list[np.ndarray]:
    """Documents of random ids below ``vocab_size``, with ``first`` before and ``last`` behind each, if given."""
    generator = np.random.default_rng(seed)
    ends = [[one] if one is not None else [] for one in (first, last)]
    return [
        np.concatenate([ends[0], generator.integers(0, vocab_size, length), ends[1]]).astype(np.int64)
        for length in generator.integers(1, max_length, count).tolist()
    ]


def megatron(stem: Path, documents: Documents, *, dtype: str = "<u2", code: int = 8, sentences: int = 1) -> None:
    """``stem.bin`` and ``stem.idx``; every document is cut into at most ``sentences`` sequences."""
    tokens = np.concatenate(documents).astype(dtype)
    stem.with_suffix(".bin").write_bytes(tokens.tobytes())
    lengths: list[int] = []
    bounds = [0]
    for document in documents:
        lengths += [len(part) for part in np.array_split(document, sentences)]
        bounds.append(len(lengths))
    offsets, at = [], 0
    for length in lengths:
        offsets.append(at)
        at += length * np.dtype(dtype).itemsize
    write_megatron_index(stem.with_suffix(".idx"), lengths, offsets, bounds, code=code)


def write_megatron_index(
    path: Path, lengths: Sequence[int], offsets: Sequence[int], bounds: Sequence[int], *, code: int
) -> None:
    head = b"MMIDIDX\x00\x00" + struct.pack("<QBQQ", 1, code, len(lengths), len(bounds))
    arrays = struct.pack(f"<{len(lengths)}i", *lengths) + struct.pack(f"<{len(offsets)}q", *offsets)
    path.write_bytes(head + arrays + struct.pack(f"<{len(bounds)}q", *bounds))


def llmc(path: Path, documents: Documents, *, variant: str = "gpt-2") -> None:
    magic, version, dtype = {"gpt-2": (20240520, 1, "<u2"), "llama-3": (20240801, 7, "<u4")}[variant]
    tokens = np.concatenate(documents).astype(dtype)
    header = np.zeros(256, dtype="<i4")
    header[:3] = magic, version, len(tokens)
    path.write_bytes(header.tobytes() + tokens.tobytes())


def raw(path: Path, documents: Documents, *, dtype: str = "<u2", lines: bool = False) -> None:
    """Bare tokens; with ``lines`` also the .csv.gz of Dolma."""
    path.write_bytes(np.concatenate(documents).astype(dtype).tobytes())
    if lines:
        with gzip.open(path.with_suffix(".csv.gz"), "wt") as file:
            at = 0
            for number, document in enumerate(documents):
                file.write(f"{at},{at + len(document)},doc-{number},a.jsonl.gz,{number}\n")
                at += len(document)


def datatrove(path: Path, documents: Documents, *, dtype: str = "<u2", mask: np.ndarray | None = None) -> None:
    tokens = np.concatenate(documents).astype(dtype)
    path.write_bytes(tokens.tobytes())
    ends = np.cumsum([len(document) for document in documents])
    path.with_name(path.name + ".index").write_bytes(struct.pack(f"<{len(ends)}Q", *ends.tolist()))
    size = np.dtype(dtype).itemsize
    path.with_name(path.name + ".metadata").write_text(f"tokenizer|{size}\n{len(tokens)}\n{len(tokens)} T")
    if mask is not None:
        path.with_name(path.name + ".loss").write_bytes(struct.pack(f"<{len(mask)}?", *mask.tolist()))


def mds_value(tokens: np.ndarray, encoding: str) -> bytes:
    """The value of one sample in a column of ``encoding``: ndarray, ndarray:DTYPE, ndarray:DTYPE:SHAPE or bytes."""
    codes = {"uint16": 16, "uint32": 32, "int32": 33, "int64": 65}
    kind, *rest = encoding.split(":")
    if kind == "bytes":
        return tokens.astype("<i8").tobytes()
    dtype = rest[0] if rest else "int64"
    head = b"" if rest else bytes([codes[dtype]])
    if len(rest) < 2:
        width = 0 if len(tokens) < 2**8 else 1 if len(tokens) < 2**16 else 2
        head += bytes([1 << 2 | width]) + len(tokens).to_bytes(2**width, "little")
    return head + tokens.astype(np.dtype(dtype).newbyteorder("<")).tobytes()


def mds(
    folder: Path, shards: Sequence[Documents], *, encoding: str = "ndarray:int32", beside: dict[str, str] | None = None
) -> None:
    """Samples of a column "tokens", and of the columns ``beside`` (name -> "str" or "int")."""
    folder.mkdir(parents=True, exist_ok=True)
    columns = dict(sorted({"tokens": encoding, **(beside or {})}.items()))
    static = encoding.count(":") == 2
    entries = []
    for number, documents in enumerate(shards):
        fixed = len(mds_value(documents[0], encoding)) if static else None
        sizes = [{"int": 8, encoding: fixed}.get(one) for one in columns.values()]
        samples = []
        for place, document in enumerate(documents):
            values = [
                mds_value(document, one)
                if name == "tokens"
                else struct.pack("<q", place)
                if one == "int"
                else b"t" * (place % 7)
                for name, one in columns.items()
            ]
            head = b"".join(
                struct.pack("<I", len(value)) for value, size in zip(values, sizes, strict=True) if not size
            )
            samples.append(head + b"".join(values))
        name = f"shard.{number:05d}.mds"
        entry: dict[str, Any] = {
            "column_encodings": list(columns.values()),
            "column_names": list(columns),
            "column_sizes": sizes,
            "compression": None,
            "format": "mds",
            "hashes": [],
            "samples": len(samples),
            "size_limit": 2**26,
            "version": 2,
        }
        config = json.dumps(entry, sort_keys=True).encode()
        at = 4 * (len(samples) + 2) + len(config)
        offsets = [at]
        for sample in samples:
            offsets.append(offsets[-1] + len(sample))
        content = struct.pack(f"<{len(offsets) + 1}I", len(samples), *offsets) + config + b"".join(samples)
        (folder / name).write_bytes(content)
        entries.append(entry | {"raw_data": {"basename": name, "bytes": len(content), "hashes": {}}, "zip_data": None})
    (folder / "index.json").write_text(json.dumps({"version": 2, "shards": entries}))


def litdata(
    folder: Path, chunks: Sequence[Documents], *, data_format: str = "no_header_tensor:16", dtype: str = "<i4"
) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    entries = []
    for number, documents in enumerate(chunks):
        name, sizes = f"chunk-0-{number}.bin", [len(document) * np.dtype(dtype).itemsize for document in documents]
        offsets = 4 * (len(documents) + 2) + np.concatenate(([0], np.cumsum(sizes)))
        content = struct.pack(f"<{len(offsets) + 1}I", len(documents), *offsets.tolist())
        content += np.concatenate(documents).astype(dtype).tobytes()
        (folder / name).write_bytes(content)
        tokens = sum(map(len, documents))
        entries.append({"chunk_bytes": len(content), "chunk_size": len(documents), "dim": tokens, "filename": name})
    config = {
        "chunk_bytes": 2**20,
        "chunk_size": None,
        "compression": None,
        "data_format": [data_format],
        "data_spec": "[1, null]",
        "encryption": None,
        "item_loader": "TokensLoader",
    }
    (folder / "index.json").write_text(json.dumps({"chunks": entries, "config": config, "updated_at": "0"}))


def adopted(
    folder: Path, tokenizer: Path, *, output: Path | None = None, root: Path | None = None, **options: Any
) -> AdoptSummary:
    """Adopt ``folder``; with ``output`` the index is there, and ``root`` is by default ``folder``."""
    places = {"output": str(output), "root": str(root or folder)} if output is not None else {}
    return adopt([str(folder)], tokenizer=str(tokenizer), options=Options(num_threads=2, **options), **places)


def check(folder: Path, documents: Documents, *, mask: np.ndarray | None = None) -> TokenShards:
    """Compare every token, boundary and mask of an adopted data set with what was written, over each way of reading."""
    shards, stream = TokenShards(folder), np.concatenate(documents)
    np.testing.assert_array_equal(shards.read(0, shards.num_tokens), stream)
    assert shards.max_token_id == stream.max() and shards.index.num_documents == len(documents)
    read: list[np.ndarray] = []
    for number in range(shards.num_shards):
        ends = shards.document_ends(number, 0, shards.num_documents_of(number)).tolist()
        read += [shards.read_span(number, start, end) for start, end in zip([0, *ends], ends, strict=False)]
    assert [len(one) for one in read] == [len(one) for one in documents]
    for one, document in zip(read, documents, strict=True):
        np.testing.assert_array_equal(one, document)
    lengths, counts = shards.length_histogram()
    np.testing.assert_array_equal(np.repeat(lengths, counts), np.sort([len(document) for document in documents]))
    if mask is not None:
        masks = [shards.read_mask(i, 0, shard.num_tokens) for i, shard in enumerate(shards.index.shards)]
        np.testing.assert_array_equal(np.concatenate(masks), mask)
    dataset = TokenDataset(shards, seq_len=13)
    starts = np.random.default_rng(1).integers(0, len(dataset), 20)
    for i in starts.tolist():
        inputs, labels = dataset[i]
        np.testing.assert_array_equal(inputs["input"].numpy(), stream[13 * i : 13 * i + 13])
        np.testing.assert_array_equal(labels.numpy(), stream[13 * i + 1 : 13 * i + 14])
    whole = WholeDocuments(shards)
    for i in (0, len(documents) // 2, len(documents) - 1):
        inputs, _ = whole._document(i)
        np.testing.assert_array_equal(inputs, documents[i])
    shards.verify_checksums()
    return shards
