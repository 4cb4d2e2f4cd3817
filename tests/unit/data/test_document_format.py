"""The documents of a data set against plain lists: their ends, their mask and their lengths; and hostile files."""

import hashlib
import json
import os
import pickle
import shutil
from collections import Counter
from collections.abc import Callable, Sequence
from itertools import accumulate
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from titan_attent.data.text import document_files
from titan_attent.data.text.document_files import count_lengths, decode_lengths, encode_lengths, max_lengths_bytes
from titan_attent.data.text.format import ShardEntry, ShardWriter, write_index
from titan_attent.data.text.shards import TokenShards

EOS, DTYPE = 256, np.dtype("<u2")
INFO = {"name": "none", "vocab_size": 257, "eos_id": EOS}
Document = list[int]
Shards = list[list[Document]]
"""The documents of each shard, every one with its eos."""
Masks = list[list[list[bool]]]


def write(folder: Path, shards: Shards, *, masks: Masks | None = None, documents: bool = True) -> Path:
    """``shards`` as a data set."""
    folder.mkdir(parents=True, exist_ok=True)
    entries = []
    for number, texts in enumerate(shards):
        with ShardWriter(folder / f"shard-{number:05d}.bin", dtype=DTYPE, mask=masks is not None) as shard:
            for i, tokens in enumerate(texts):
                if documents:
                    shard.append_document(np.array(tokens), np.array(masks[number][i]) if masks else None)
                else:
                    shard.append(np.array(tokens))
            entries.append(shard.finish())
    num_documents = sum(map(len, shards))
    write_index(folder, dtype=DTYPE, shards=entries, num_documents=num_documents, max_token_id=EOS, tokenizer=INFO)
    return folder


def with_eos(lengths: Sequence[int]) -> list[Document]:
    """Documents of ``lengths``, eos included."""
    return [[(7 * i + j) % 256 for j in range(length - 1)] + [EOS] for i, length in enumerate(lengths)]


SHARDS: Shards = [with_eos([5, 1, 1, 9]), with_eos([1]), with_eos([300, 2, 5, 17, 1])]
MASKS: Masks = [[[bool(j % 3) for j in range(len(text))] for text in texts] for texts in SHARDS]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write(tmp_path_factory.mktemp("data") / "set", SHARDS, masks=MASKS)


@pytest.fixture
def copy(folder: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(folder, tmp_path / "copy"))


def edit(folder: Path, change: Callable[[dict], object]) -> None:
    path = folder / "index.json"
    index = json.loads(path.read_text())
    change(index)
    path.write_text(json.dumps(index))


lists_of_documents = st.lists(
    st.lists(st.lists(st.integers(0, 255), max_size=9).map(lambda text: [*text, EOS]), min_size=1, max_size=20),
    min_size=1,
    max_size=4,
)


@settings(deadline=None, max_examples=60)
@given(shards=lists_of_documents, masked=st.booleans(), data=st.data())
def test_documents_are_what_was_written(
    tmp_path_factory: pytest.TempPathFactory, shards: Shards, masked: bool, data: st.DataObject
) -> None:
    """Round trip against the lists, for every file and for spans of it."""
    random = np.random.default_rng(data.draw(st.integers(0, 9)))
    masks = [[random.integers(0, 2, len(text)).astype(bool).tolist() for text in texts] for texts in shards]
    folder = write(tmp_path_factory.mktemp("round"), shards, masks=masks if masked else None)
    read = TokenShards(folder)
    assert (read.has_documents, read.has_mask) == (True, masked)
    for number, texts in enumerate(shards):
        tokens = [token for text in texts for token in text]
        ends = list(accumulate(map(len, texts)))
        labels = [label for text in masks[number] for label in text] if masked else [True] * len(tokens)
        # On disk, read without the package.
        stem = folder / f"shard-{number:05d}"
        assert np.fromfile(f"{stem}.documents", "<u4").tolist() == ends
        assert (folder / f"{stem}.mask").exists() == masked
        if masked:
            bits = np.unpackbits(np.fromfile(f"{stem}.mask", np.uint8), bitorder="little")
            assert bits[: len(tokens)].tolist() == labels and not bits[len(tokens) :].any() and len(bits) % 8 == 0
        assert read.num_documents_of(number) == len(texts)
        first, last = sorted(data.draw(st.tuples(*[st.integers(0, len(texts))] * 2)))
        found = read.document_ends(number, first, last)
        assert found.dtype == np.int64 and found.tolist() == ends[first:last]
        first, last = sorted(data.draw(st.tuples(*[st.integers(0, len(tokens))] * 2)))
        span, mask = read.read_span(number, first, last), read.read_mask(number, first, last)
        assert (span.dtype, mask.dtype) == (np.int64, np.bool_)
        assert (span.tolist(), mask.tolist()) == (tokens[first:last], labels[first:last])
    lengths, counts = read.length_histogram()
    assert lengths.dtype == counts.dtype == np.int64
    expected = Counter(len(text) for texts in shards for text in texts)
    assert list(zip(lengths.tolist(), counts.tolist(), strict=True)) == sorted(expected.items())
    on_disk = np.fromfile(folder / "lengths.bin", "<u8").reshape(-1, 2)
    assert on_disk.tolist() == [list(item) for item in sorted(expected.items())]
    read.verify_checksums()


def test_the_index_of_version_3(folder: Path) -> None:
    index = json.loads((folder / "index.json").read_text())
    assert (index["version"], index["num_documents"]) == (3, 10)
    for number, entry in enumerate(index["shards"]):
        stem = folder / f"shard-{number:05d}"
        assert entry["num_documents"] == len(SHARDS[number])
        for name, suffix in (("sha256", "bin"), ("documents_sha256", "documents"), ("mask_sha256", "mask")):
            assert entry[name] == hashlib.sha256(Path(f"{stem}.{suffix}").read_bytes()).hexdigest()
    content = (folder / "lengths.bin").read_bytes()
    assert index["lengths"] == {"file": "lengths.bin", "sha256": hashlib.sha256(content).hexdigest()}


@pytest.mark.parametrize("version", [1, 2])
def test_earlier_versions_load_without_documents(tmp_path: Path, version: int) -> None:
    folder = write(tmp_path / "old", SHARDS, documents=False)
    index = json.loads((folder / "index.json").read_text())
    assert index["version"] == 2 and "lengths" not in index  # an earlier version of the package can read it
    assert all(entry.keys() == {"file", "num_tokens", "sha256", "source"} for entry in index["shards"])
    if version == 1:
        edit(folder, lambda index: [index.update(version=1), *(entry.pop("source") for entry in index["shards"])])
    shards = TokenShards(folder)
    shards.verify_checksums()
    assert not shards.has_documents and not shards.has_mask
    assert shards.read_span(0, 0, 5).tolist() == SHARDS[0][0]
    assert shards.read_mask(0, 2, 5).tolist() == [True] * 3
    calls: list[Callable[[], object]] = [
        lambda: shards.documents_fingerprint,
        lambda: shards.num_documents_of(0),
        lambda: shards.document_ends(0, 0, 0),
        shards.length_histogram,
    ]
    for call in calls:
        with pytest.raises(ValueError) as caught:
            call()
        command = f"`python -m titan_attent.data.text.boundaries {folder}`"
        assert all(word in str(caught.value) for word in (f"{folder}: ", "without its documents", command))


def test_fingerprints(tmp_path: Path, folder: Path) -> None:
    """The stream has one fingerprint with and without documents; that of the documents knows borders and masks."""
    plain = TokenShards(write(tmp_path / "plain", SHARDS))
    old = TokenShards(write(tmp_path / "old", SHARDS, documents=False))
    masked = TokenShards(folder)
    assert plain.fingerprint == old.fingerprint == masked.fingerprint
    joined = [[[*SHARDS[0][0], *SHARDS[0][1]], *SHARDS[0][2:]], *SHARDS[1:]]
    other_mask = [[[not MASKS[0][0][0], *MASKS[0][0][1:]], *MASKS[0][1:]], *MASKS[1:]]
    others = [
        TokenShards(write(tmp_path / "joined", joined)),
        TokenShards(write(tmp_path / "mask", SHARDS, masks=other_mask)),
        TokenShards(write(tmp_path / "shards", [SHARDS[0] + SHARDS[1], SHARDS[2]])),
    ]
    prints = {shards.documents_fingerprint for shards in (plain, masked, *others)}
    assert len(prints) == 5 and all(len(value) == 64 for value in prints)
    assert plain.fingerprint not in prints
    assert plain.documents_fingerprint == TokenShards(write(tmp_path / "again", SHARDS)).documents_fingerprint


def test_ranges_are_checked(folder: Path) -> None:
    shards = TokenShards(folder)
    for start, stop in ((-1, 2), (3, 2), (0, 17)):
        for read in (shards.read_span, shards.read_mask):
            with pytest.raises(IndexError, match=rf"shard-00000.bin: tokens \[{start}, {stop}\) are outside \[0, 16\)"):
                read(0, start, stop)
        with pytest.raises(IndexError, match=rf"shard-00000.bin: documents \[{start}, {stop}\) are outside \[0, 4\)"):
            shards.document_ends(0, start, stop)


def test_a_read_is_one_positioned_read(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shards, calls = TokenShards(folder), []
    preadv = os.preadv

    def counted(descriptor: int, buffers: Sequence[memoryview], offset: int) -> int:
        calls.append((sum(map(len, buffers)), offset))
        return preadv(descriptor, buffers, offset)

    monkeypatch.setattr(os, "preadv", counted)
    shards.document_ends(2, 1, 4)
    shards.read_span(2, 10, 20)
    shards.read_mask(2, 13, 34)
    assert calls == [(12, 4), (20, 20), (4, 1)]


def test_shards_with_documents_are_pickled_without_open_files(folder: Path) -> None:
    shards = TokenShards(folder)
    expected = shards.document_ends(0, 0, 4)
    restored = pickle.loads(pickle.dumps(shards))
    assert restored.document_ends(0, 0, 4).tolist() == expected.tolist()
    assert restored.documents_fingerprint == shards.documents_fingerprint


# Sizes and checksums.


@pytest.mark.parametrize("name", ["shard-00002.documents", "shard-00001.mask", "lengths.bin"])
def test_sizes_of_all_files_are_checked(copy: Path, name: str) -> None:
    path = copy / name
    content = path.read_bytes()
    path.unlink()
    with pytest.raises(ValueError, match=rf"{path}: this file of index.json is missing; copy the data set again"):
        TokenShards(copy)
    path.write_bytes(b"" if name == "lengths.bin" else content + b"\0")
    with pytest.raises(ValueError, match=rf"{path}: has \d+ bytes.*truncated or replaced; copy the data set again"):
        TokenShards(copy)


def test_ranks_share_the_sizes_and_checksums_by_shard(copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of all files, each is stat-ed and hashed by one rank."""
    shards, stat, names = TokenShards(copy, check_sizes=False), Path.stat, Counter[str]()

    def counted(self: Path, **options: bool) -> os.stat_result:
        names[self.name] += 1
        return stat(self, **options)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "stat", counted)
        for rank in range(2):
            shards.check_sizes(range(rank, shards.num_shards, 2))
    files = {path.name for path in copy.iterdir()} - {"index.json"}
    assert set(names) == files and set(names.values()) == {1}
    for name in files:
        content = bytearray((copy / name).read_bytes())
        content[-1] ^= 1
        (copy / name).write_bytes(content)
        number = 0 if name == "lengths.bin" else int(name[6:11])
        for rank in range(2):
            if rank == number % 2:
                with pytest.raises(ValueError, match=rf"{name}: its sha256 is \w+ but index.json says"):
                    shards.verify_checksums(range(rank, shards.num_shards, 2))
            else:
                shards.verify_checksums(range(rank, shards.num_shards, 2))
        content[-1] ^= 1
        (copy / name).write_bytes(content)


# Files of unknown origin: one error, or a valid result.


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda index: index.pop("lengths"), "'shard-00000.bin' has documents and a mask, unlike the others or the"),
        (lambda index: index.update(lengths=3), "lengths is 3"),
        (
            lambda index: index.update(lengths={"file": "../x", "sha256": "0" * 64}),
            "lengths file '../x' is not the name",
        ),
        (lambda index: index["lengths"].update(sha256="x"), "sha256 'x' is not 64 hexadecimal digits"),
        (lambda index: index["shards"][1].pop("documents_sha256"), "'shard-00001.bin' has no documents"),
        (lambda index: index["shards"][1].pop("mask_sha256"), "'shard-00001.bin' has documents and no mask"),
        (lambda index: index["shards"][2].update(mask_sha256="g" * 64), "is not 64 hexadecimal digits"),
        (lambda index: index["shards"][2].update(documents_sha256="0" * 63), "is not 64 hexadecimal digits"),
        (lambda index: index["shards"][0].update(num_documents=0), "has 0 documents and 16 tokens"),
        (lambda index: index["shards"][0].update(num_documents=17), "has 17 documents and 16 tokens"),
        (lambda index: index["shards"][0].update(num_documents=-1), "has -1 documents"),
        (lambda index: index["shards"][0].update(num_documents=2.0), r"num_documents is 2.0"),
        (lambda index: index["shards"][0].update(num_documents=5), "num_documents 10 is not the sum over the shards"),
        (
            lambda index: [
                index["shards"][0].update(num_tokens=2**32),
                index.update(num_tokens=index["num_tokens"] - 16 + 2**32),
            ],
            "and 4294967296 tokens; a document has at least 1 token, and a shard at most 4294967295",
        ),
    ],
)
def test_a_hostile_index_is_one_error(copy: Path, change: Callable[[dict], object], words: str) -> None:
    edit(copy, change)
    with pytest.raises(ValueError, match="malformed index") as caught:
        TokenShards(copy)
    assert words in str(caught.value) and str(copy / "index.json") in str(caught.value)


def test_a_mask_without_documents_is_refused(copy: Path) -> None:
    def change(index: dict) -> None:
        del index["lengths"]
        for entry in index["shards"]:
            del entry["documents_sha256"], entry["num_documents"]

    edit(copy, change)
    with pytest.raises(ValueError, match="a mask but no documents"):
        TokenShards(copy)


ENDS = list(accumulate(map(len, SHARDS[2])))


@pytest.mark.parametrize(
    "ends",
    [
        [*ENDS[:-1], ENDS[-1] - 1],  # does not reach the end of the shard
        [*ENDS[:-1], ENDS[-1] + 1],
        [0, *ENDS[1:]],
        [ENDS[0], ENDS[0], *ENDS[2:]],
        [ENDS[1], ENDS[0], *ENDS[2:]],
        [*ENDS[:3], 2**32 - 1, ENDS[-1]],
    ],
)
def test_ends_that_do_not_rise_to_the_end_are_refused(copy: Path, ends: list[int]) -> None:
    path = copy / "shard-00002.documents"
    path.write_bytes(np.array(ends, "<u4").tobytes())
    with pytest.raises(ValueError, match=rf"{path}: the ends of the documents 0 to 4 do not rise to 325, .*copy the"):
        TokenShards(copy).document_ends(2, 0, 5)
    with pytest.raises(ValueError, match=f"{path}: "):
        count_lengths(copy, [("shard-00002.bin", 325, 5)])


@settings(deadline=None, max_examples=300)
@given(data=st.data())
def test_what_is_read_of_any_ends_lies_in_the_shard(folder: Path, data: st.DataObject) -> None:
    """For arbitrary content of the right size: an error, or rising ends with room for the documents around them."""
    ends = data.draw(st.lists(st.integers(0, 400), min_size=5, max_size=5))
    start, stop = sorted(data.draw(st.tuples(*[st.integers(0, 5)] * 2)))
    shards = TokenShards(folder)
    shards._read = lambda name, first, last, dtype: np.array(ends[first:last], dtype=dtype)  # type: ignore[method-assign]
    try:
        found = shards.document_ends(2, start, stop).tolist()
    except ValueError:
        return
    assert found == sorted(set(found)) and (not found or (found[0] > start and found[-1] <= 325 - (5 - stop)))


@pytest.mark.parametrize(
    "rows",
    [
        [],
        [[0, 1], [5, 2]],
        [[5, 2], [5, 1]],
        [[9, 1], [5, 2]],
        [[1, 4], [2, 1], [5, 2], [9, 1], [17, 1], [300, 2]],
        [[1, 4], [2, 0], [5, 2], [9, 1], [17, 1], [300, 1]],
        [[1, 4], [2, 1], [5, 2], [9, 1], [17, 1], [299, 1]],
        [[2**63, 2]],
        [[1, 2**64 - 1], [5, 2]],
    ],
)
def test_lengths_that_do_not_add_up_are_refused(copy: Path, rows: list[list[int]]) -> None:
    content = np.array(rows, dtype="<u8").tobytes()
    path = copy / "lengths.bin"
    with pytest.raises(ValueError, match=f"{path}: is no histogram of the lengths of 10 documents with 342 tokens"):
        decode_lengths(content, path=path, num_tokens=342, num_documents=10)
    with pytest.raises(ValueError, match="is no histogram"):
        decode_lengths(content + b"x", path=path, num_tokens=342, num_documents=10)


def test_lengths_whose_product_exceeds_64_bits_are_refused(tmp_path: Path) -> None:
    """2^33 * (2^31 + 2) is 2^34, the number of tokens, modulo 2^64."""
    content = np.array([[2**33, 2**31 + 2]], dtype="<u8").tobytes()
    with pytest.raises(ValueError, match="is no histogram"):
        decode_lengths(content, path=tmp_path, num_tokens=2**34, num_documents=2**31 + 2)


def test_lengths_of_another_data_set_are_refused_by_their_hash(copy: Path) -> None:
    path = copy / "lengths.bin"
    content = path.read_bytes()
    path.write_bytes(content[::-1])
    with pytest.raises(ValueError, match=rf"{path}: its sha256 is \w+ but index.json says"):
        TokenShards(copy).length_histogram()
    with open(path, "wb") as file:
        file.truncate(2**40)  # is refused by its size, not read
    with pytest.raises(ValueError, match=rf"{path}: has {2**40} bytes"):
        TokenShards(copy, check_sizes=False).length_histogram()


@settings(deadline=None)
@given(lengths=st.lists(st.integers(1, 40), min_size=1, max_size=60), block=st.integers(1, 20))
def test_lengths_are_counted_in_any_blocks(
    tmp_path_factory: pytest.TempPathFactory, lengths: list[int], block: int
) -> None:
    folder = tmp_path_factory.mktemp("lengths")
    cut = len(lengths) // 2
    parts = [part for part in (lengths[:cut], lengths[cut:]) if part]
    for i, part in enumerate(parts):
        np.cumsum(part).astype("<u4").tofile(folder / f"{i}.documents")
    shards = [(f"{i}.bin", sum(part), len(part)) for i, part in enumerate(parts)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(document_files, "HASH_BLOCK", 4 * block)
        patch.setattr(document_files, "MERGE_LENGTHS", 2 * block)
        values, counts = count_lengths(folder, shards)
    assert dict(zip(values.tolist(), counts.tolist(), strict=True)) == Counter(lengths)
    assert values.tolist() == sorted(values.tolist())
    content = encode_lengths(values, counts)
    assert len(content) <= max_lengths_bytes(sum(lengths))
    again = decode_lengths(content, path=folder, num_tokens=sum(lengths), num_documents=len(lengths))
    assert [part.tolist() for part in again] == [values.tolist(), counts.tolist()]


def test_ends_beyond_32_bits_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("titan_attent.data.text.format.MAX_SHARD_TOKENS", 20)
    with (
        pytest.raises(ValueError, match=r"shard.bin: a document of 6 tokens after 15 others; .* at most 20; lower"),
        ShardWriter(tmp_path / "shard.bin", dtype=DTYPE, mask=True) as shard,
    ):
        for length in (5, 10, 6):
            shard.append_document(np.zeros(length, dtype=np.int64))
    assert list(tmp_path.iterdir()) == []


def test_the_largest_end(tmp_path: Path) -> None:
    num_tokens = 2**32 - 1
    np.array([num_tokens], "<u4").tofile(tmp_path / "a.documents")
    entry = ShardEntry("a.bin", num_tokens, "0" * 64, "web", 1, "0" * 64)
    write_index(tmp_path, dtype=DTYPE, shards=[entry], num_documents=1, max_token_id=3, tokenizer=INFO)
    shards = TokenShards(tmp_path, check_sizes=False)
    assert shards.document_ends(0, 0, 1).tolist() == [num_tokens]
    assert [part.tolist() for part in shards.length_histogram()] == [[num_tokens], [1]]
