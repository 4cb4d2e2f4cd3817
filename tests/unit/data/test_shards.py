"""Token shards against numpy: the files are read whole and sliced by hand."""

import hashlib
import json
import pickle
import re
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from titan_attent.data.text.format import ShardWriter, token_dtype
from titan_attent.data.text.shards import ShardEntry, TokenDataset, TokenShards, write_index

INFO = {"name": "none", "vocab_size": 60000, "eos_id": 0}


def write(folder: Path, parts: list[np.ndarray], *, info: dict = INFO) -> Path:
    """A data set with ``parts`` as its shards."""
    folder.mkdir(parents=True, exist_ok=True)
    dtype = token_dtype(info["vocab_size"])
    entries = []
    for i, part in enumerate(parts):
        with ShardWriter(folder / f"shard-{i:05d}.bin", dtype=dtype) as shard:
            shard.append(part)
            entries.append(shard.finish())
    max_token_id = int(max(part.max() for part in parts))
    write_index(folder, dtype=dtype, shards=entries, num_documents=1, max_token_id=max_token_id, tokenizer=info)
    return folder


@pytest.fixture(scope="module")
def stream() -> np.ndarray:
    return np.random.default_rng(0).integers(0, 60000, 1009)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, stream: np.ndarray) -> Path:
    # A shard of one token, and borders that no window length divides.
    return write(tmp_path_factory.mktemp("data") / "set", np.split(stream, [1, 2, 300, 301, 733]))


@pytest.fixture
def copy(folder: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(folder, tmp_path / "copy"))


def edit_index(folder: Path, **changes: object) -> None:
    path = folder / "index.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def test_shards_hold_the_stream(folder: Path, stream: np.ndarray) -> None:
    files = sorted(folder.glob("shard-*.bin"))
    on_disk = np.concatenate([np.fromfile(file, dtype="<u2") for file in files])
    np.testing.assert_array_equal(on_disk, stream)
    shards = TokenShards(folder)
    assert (shards.num_tokens, shards.max_token_id) == (len(stream), stream.max())
    assert (shards.path, shards.dtype, shards.tokenizer_info) == (folder, np.dtype("uint16"), INFO)
    assert [entry.sha256 for entry in shards.index.shards] == [
        hashlib.sha256(file.read_bytes()).hexdigest() for file in files
    ]


def test_dtype_widens_with_the_vocabulary(tmp_path: Path) -> None:
    assert [token_dtype(size).str for size in (257, 65536, 65537, 2**31)] == ["<u2", "<u2", "<u4", "<u4"]
    tokens = np.array([0, 65535, 65536, 199999])
    folder = write(tmp_path / "wide", [tokens], info={**INFO, "vocab_size": 200000})
    np.testing.assert_array_equal(np.fromfile(folder / "shard-00000.bin", dtype="<u4"), tokens)
    np.testing.assert_array_equal(TokenShards(folder).read(0, 4), tokens)


@settings(deadline=None)
@given(data=st.data())
def test_read_is_a_slice_of_the_stream(folder: Path, stream: np.ndarray, data: st.DataObject) -> None:
    shards = TokenShards(folder)
    start = data.draw(st.integers(0, len(stream)))
    stop = data.draw(st.integers(start, len(stream)))
    tokens = shards.read(start, stop)
    assert tokens.dtype == np.int64
    np.testing.assert_array_equal(tokens, stream[start:stop])


@settings(deadline=None)
@given(token=st.integers(0, 1008))
def test_shard_of_finds_the_token_in_its_file(folder: Path, stream: np.ndarray, token: int) -> None:
    file, offset = TokenShards(folder).shard_of(token)
    assert np.fromfile(folder / file, dtype="<u2")[offset] == stream[token]


@settings(deadline=None)
@given(data=st.data(), seq_len=st.integers(1, 1008))
def test_examples_are_windows_of_the_stream(
    folder: Path, stream: np.ndarray, seq_len: int, data: st.DataObject
) -> None:
    dataset = TokenDataset(folder, seq_len=seq_len)
    windows = [stream[i : i + seq_len + 1] for i in range(0, len(stream), seq_len)]
    windows = [window for window in windows if len(window) == seq_len + 1]
    assert len(dataset) == len(windows)
    ids = data.draw(st.lists(st.integers(0, len(windows) - 1), max_size=8))
    inputs, labels = dataset.batch(torch.tensor(ids, dtype=torch.int64))
    assert inputs.dtype == labels.dtype == torch.int64
    assert inputs.shape == labels.shape == (len(ids), seq_len)
    for row, i in enumerate(ids):
        np.testing.assert_array_equal(inputs[row], windows[i][:-1])
        np.testing.assert_array_equal(labels[row], windows[i][1:])
        example, label = dataset[i]
        assert example["example_id"].dtype == torch.int64 and example["example_id"].shape == ()
        assert int(example["example_id"]) == i
        assert torch.equal(example["input"], inputs[row]) and torch.equal(label, labels[row])


@settings(deadline=None, max_examples=50)
@given(data=st.data())
def test_sources_of_examples(tmp_path_factory: pytest.TempPathFactory, data: st.DataObject) -> None:
    """Against the source of every single token."""
    shards = st.tuples(st.sampled_from(["web", "code", "books"]), st.integers(1, 30))
    parts = data.draw(st.lists(shards, min_size=1, max_size=20).filter(lambda parts: sum(n for _, n in parts) > 1))
    sources = [source for source, num_tokens in parts for _ in range(num_tokens)]
    seq_len = data.draw(st.integers(1, len(sources) - 1))
    dataset = TokenDataset(sparse(tmp_path_factory.mktemp("sources"), parts), seq_len=seq_len)
    expected = [sources[i] for i in range(0, len(sources), seq_len)][: len(dataset)]
    names, firsts = zip(*dataset.sources, strict=True)
    spans = torch.searchsorted(torch.tensor(firsts), torch.arange(len(dataset)), right=True) - 1
    assert [names[span] for span in spans.tolist()] == expected
    # No span is empty, and no two adjacent spans have the same source.
    assert set(spans.tolist()) == set(range(len(names)))
    assert all(a != b for a, b in zip(names, names[1:], strict=False))


def sparse(folder: Path, parts: list[tuple[str, int]]) -> Path:
    """A data set of zeros, written without fsync: source and number of tokens of every shard."""
    entries = []
    for i, (source, num_tokens) in enumerate(parts):
        with open(folder / f"{i}.bin", "wb") as file:
            file.truncate(2 * num_tokens)
        entries.append(ShardEntry(f"{i}.bin", num_tokens, "0" * 64, source))
    write_index(folder, dtype=np.dtype("<u2"), shards=entries, num_documents=1, max_token_id=0, tokenizer=INFO)
    return folder


def test_an_example_that_crosses_belongs_to_its_first_token(tmp_path: Path) -> None:
    # Examples 0 to 5 begin at the tokens 0, 10, 20 (web), 30, 40 (code) and 50 (books).
    parts = [("web", 11), ("tiny", 3), ("web", 7), ("code", 20), ("books", 10), ("late", 10)]
    assert TokenDataset(sparse(tmp_path, parts), seq_len=10).sources == [("web", 0), ("code", 3), ("books", 5)]
    # One token less, and example 5 has no last label.
    parts[-1] = ("late", 9)
    assert TokenDataset(sparse(tmp_path, parts), seq_len=10).sources == [("web", 0), ("code", 3)]
    assert TokenDataset(tmp_path, seq_len=59).sources == [("web", 0)]


def test_version_1_has_one_source(copy: Path) -> None:
    before = TokenShards(copy).index
    shards = [
        {key: entry[key] for key in ("file", "num_tokens", "sha256")}
        for entry in json.loads((copy / "index.json").read_text())["shards"]
    ]
    edit_index(copy, version=1, shards=shards)
    assert TokenShards(copy).index == before
    assert TokenDataset(copy, seq_len=5).sources == [("default", 0)]


def test_a_source_may_be_renamed_in_the_index(copy: Path) -> None:
    before = TokenShards(copy)
    shards = json.loads((copy / "index.json").read_text())["shards"]
    edit_index(copy, shards=[{**shards[0], "source": "web"}, *shards[1:]])
    assert TokenShards(copy).fingerprint == before.fingerprint
    assert TokenDataset(copy, seq_len=1).sources == [("web", 0), ("default", 1)]


@pytest.mark.parametrize("batch_size", [1, 3])
def test_inputs_and_labels_share_no_memory(folder: Path, batch_size: int) -> None:
    dataset = TokenDataset(folder, seq_len=7)
    inputs, labels = dataset.batch(torch.arange(batch_size))
    assert inputs.is_contiguous() and labels.is_contiguous()
    before = inputs.clone()
    labels.fill_(-100)
    assert torch.equal(inputs, before)


def test_iteration_ends_and_ids_are_bounded(folder: Path) -> None:
    dataset = TokenDataset(folder, seq_len=100)
    assert [int(example["example_id"]) for example, _ in dataset] == list(range(10))
    for i in (-1, 10, 2**40):
        with pytest.raises(IndexError, match=rf"example id {i} is outside \[0, 10\)"):
            dataset[i]
        with pytest.raises(IndexError, match=rf"{re.escape(str(folder))}: example id {i}"):
            dataset.batch(torch.tensor([0, i]))
    shards = dataset.shards
    for start, stop in ((-1, 3), (5, 4), (0, 1010), (1010, 1010)):
        with pytest.raises(IndexError, match=rf"tokens \[{start}, {stop}\) are outside \[0, 1009\)"):
            shards.read(start, stop)
    for token in (-1, 1009):
        with pytest.raises(IndexError, match=rf"token {token} is outside \[0, 1009\)"):
            shards.shard_of(token)


def test_positions_beyond_32_bits(tmp_path: Path) -> None:
    # Each sparse file is a shard of 3 billion tokens; with two the stream crosses 2^32.
    folder, size = tmp_path / "huge", 3 * 2**30
    folder.mkdir()
    entries = []
    with ShardWriter(folder / "small.bin", dtype=np.dtype("<u2")) as shard:
        shard.append(np.arange(10))
        small = shard.finish()
    for name in ("a.bin", "b.bin"):
        with open(folder / name, "wb") as file:
            file.truncate(2 * size)
            file.seek(2 * size - 2)
            file.write(b"\x07\x00")
        entries.append(type(small)(name, size, "0" * 64))
    write_index(
        folder, dtype=np.dtype("<u2"), shards=[*entries, small], num_documents=1, max_token_id=9, tokenizer=INFO
    )
    shards = TokenShards(folder)
    np.testing.assert_array_equal(shards.read(2 * size - 2, 2 * size + 3), [0, 7, 0, 1, 2])
    assert shards.shard_of(2 * size + 4) == ("small.bin", 4)
    dataset = TokenDataset(shards, seq_len=1)
    inputs, labels = dataset.batch(torch.tensor([2 * size - 1, 2 * size + 8]))
    assert (inputs.tolist(), labels.tolist()) == ([[7], [8]], [[0], [9]])


def test_pickle_carries_no_data(folder: Path) -> None:
    dataset = TokenDataset(folder, seq_len=50)
    expected = dataset.batch(torch.arange(20))
    data = pickle.dumps(dataset)
    assert len(data) < 3000 and len(dataset.shards._files)
    restored = pickle.loads(data)
    assert not len(restored.shards._files)
    assert all(torch.equal(a, b) for a, b in zip(restored.batch(torch.arange(20)), expected, strict=True))


def test_many_threads_read_at_once(folder: Path, stream: np.ndarray) -> None:
    dataset = TokenDataset(folder, seq_len=9)
    ids = torch.randperm(len(dataset)).repeat(20).split(4)
    with ThreadPoolExecutor(8) as pool:
        batches = list(pool.map(dataset.batch, ids))
    for part, (inputs, _) in zip(ids, batches, strict=True):
        for i, row in zip(part.tolist(), inputs, strict=True):
            np.testing.assert_array_equal(row, stream[9 * i : 9 * i + 9])


def test_fingerprint_names_the_stream(tmp_path: Path, copy: Path, stream: np.ndarray) -> None:
    original = TokenShards(copy)
    # The same stream in another folder, with another file name.
    (copy / "shard-00000.bin").rename(copy / "first.bin")
    shards = json.loads((copy / "index.json").read_text())["shards"]
    edit_index(copy, shards=[{**shards[0], "file": "first.bin"}, *shards[1:]])
    assert TokenShards(copy).fingerprint == original.fingerprint
    others = [
        write(tmp_path / "token", np.split(np.append(stream[:-1], stream[-1] ^ 1), [500])),
        write(tmp_path / "split", np.split(stream, [500])),
        write(tmp_path / "eos", np.split(stream, [500]), info={**INFO, "eos_id": 1}),
        write(tmp_path / "wide", np.split(stream, [500]), info={**INFO, "vocab_size": 70000}),
    ]
    assert len({original.fingerprint, *(TokenShards(other).fingerprint for other in others)}) == 5


def test_checksums(copy: Path) -> None:
    shards = TokenShards(copy)
    shards.verify_checksums()
    path = copy / "shard-00003.bin"
    content = bytearray(path.read_bytes())
    content[0] ^= 1
    path.write_bytes(content)
    with pytest.raises(
        ValueError, match=rf"{path}: its sha256 is \w+ but index.json says \w+.*copy the data set again"
    ):
        shards.verify_checksums()
    shards.verify_checksums([0, 1, 2, 4, 5], progress=False)
    shards.verify_checksums([])
    with pytest.raises(ValueError, match="shard-00003.bin"):
        shards.verify_checksums(range(1, 6, 2))


def test_unfinished_shard_leaves_no_file(tmp_path: Path) -> None:
    with (
        pytest.raises(ValueError, match=r"token ids -1 to 5 do not fit uint16.*token_dtype"),
        ShardWriter(tmp_path / "shard.bin", dtype=np.dtype("<u2")) as shard,
    ):
        shard.append(np.array([], dtype=np.int64))
        shard.append(np.array([1]))
        shard.append(np.array([5, -1]))
    assert list(tmp_path.iterdir()) == []
    with (
        pytest.raises(ValueError, match=r"shard.bin: token ids 65536 to 65536 do not fit uint16"),
        ShardWriter(tmp_path / "shard.bin", dtype=np.dtype("<u2")) as shard,
    ):
        shard.append(np.array([65536]))


# Every mistake: one message that says what is wrong, where and how to fix it.


def refused(folder: Path, *words: str, seq_len: int | None = None) -> None:
    with pytest.raises(ValueError) as caught:
        TokenShards(folder) if seq_len is None else TokenDataset(folder, seq_len=seq_len)
    for word in (str(folder), *words):
        assert word in str(caught.value), f"{word!r} is not in: {caught.value}"


def test_missing_folder(tmp_path: Path) -> None:
    refused(tmp_path / "nowhere", "no such folder", "correct the path", "python -m titan_attent.data.text")


def test_missing_index(copy: Path) -> None:
    (copy / "index.json").unlink()
    refused(copy, "no index.json", "python -m titan_attent.data.text")


def test_interrupted_writer(copy: Path) -> None:
    (copy / "index.json").rename(copy / "progress.json")
    refused(copy, "interrupted", "run the same", "python -m titan_attent.data.text", "resumes")


@pytest.mark.parametrize("content", [b"{", b"", b"[1]", b"\xff\xfe\xff"])
def test_malformed_json(copy: Path, content: bytes) -> None:
    (copy / "index.json").write_bytes(content)
    refused(
        copy,
        "index.json",
        "not a file with a JSON object",
        "restore the file",
        "python -m titan_attent.data.text",
    )


def test_an_index_nested_deeply(copy: Path) -> None:
    (copy / "index.json").write_bytes(b'{"shards": ' + b"[" * 100_000)
    refused(copy, "index.json", "nested too deeply", "restore the file")


@pytest.mark.parametrize("depth", range(400, 1000, 100))
def test_a_tokenizer_nested_so_deeply_that_it_can_be_read_but_not_hashed(copy: Path, depth: int) -> None:
    content = json.loads((copy / "index.json").read_text())
    content["tokenizer"]["x"] = "HERE"
    text = json.dumps(content).replace('"HERE"', "[" * depth + "]" * depth)
    (copy / "index.json").write_text(text)
    refused(copy, "index.json", "restore the file")


@pytest.mark.parametrize("change", [{"format": "other"}, {"version": 5}, {"version": None}])
def test_unknown_format(copy: Path, change: dict) -> None:
    edit_index(copy, **change)
    refused(
        copy,
        "index.json",
        repr(*change.values()),
        "format 'titan_attent.tokens' version 1 or 2 or 3 or 4",
        "package version",
    )


@pytest.mark.parametrize(
    ("change", "what"),
    [
        ({"dtype": "float32"}, "dtype 'float32'"),
        ({"shards": []}, "num_tokens 1009"),
        ({"shards": 3}, "of type int: expected a list"),
        ({"shards": [{"file": "x"}]}, "num_tokens"),
        ({"shards": [{"file": "../x", "num_tokens": 1009, "sha256": ""}]}, "shard '../x'"),
        ({"shards": [{"file": "..", "num_tokens": 1009, "sha256": ""}]}, "shard '..' is not the name of a file"),
        ({"shards": [{"file": "x", "num_tokens": "9", "sha256": ""}]}, "of type str: expected a whole number"),
        ({"shards": [{"file": "x", "num_tokens": 0, "sha256": ""}]}, "0 tokens"),
        ({"shards": [{"file": "x", "num_tokens": 1009, "sha256": "", "source": "a b"}]}, "source 'a b' of shard 'x'"),
        ({"shards": [{"file": "x", "num_tokens": 1009, "sha256": "", "source": 3}]}, "expected string"),
        ({"num_tokens": 1010}, "num_tokens 1010 is not the sum"),
        ({"tokenizer": {"name": "x"}}, "tokenizer without eos_id, vocab_size"),
        ({"tokenizer": None}, "NoneType"),
        ({"tokenizer": {**INFO, "file": "../secret"}}, "tokenizer file '../secret' is not the name of a file"),
        ({"tokenizer": {**INFO, "file": "/etc/passwd"}}, "tokenizer file '/etc/passwd' is not the name of a file"),
        ({"tokenizer": {**INFO, "file": ".."}}, "tokenizer file '..' is not the name of a file"),
        ({"tokenizer": {**INFO, "file": 3}}, "tokenizer file 3 is not the name of a file"),
        ({"max_token_id": 60000}, "max_token_id 60000"),
        ({"surplus": 1}, "surplus"),
        # What a stranger may write: counts of another type or that no disk holds, a vocabulary that tables follow.
        ({"num_tokens": 1009.0}, "num_tokens is 1009.0, of type float: expected a whole number"),
        ({"num_tokens": 2**70}, "expected a number of 64 bits"),
        ({"num_documents": -1}, "num_documents is -1"),
        ({"num_documents": True}, "num_documents is True"),
        ({"max_token_id": 3.0}, "max_token_id is 3.0"),
        ({"max_token_id": None}, "max_token_id is of type NoneType"),
        ({"shards": [{"file": "x", "num_tokens": 1009.0, "sha256": ""}]}, "shards[0].num_tokens is 1009.0"),
        ({"shards": [{"file": "x", "num_tokens": -5, "sha256": ""}]}, "-5 tokens"),
        ({"shards": [[]]}, "shards[0] is of type list: expected an object"),
        ({"tokenizer": {**INFO, "vocab_size": 2**33}}, "vocab_size is 8589934592; it must be in [1, 2147483648]"),
        ({"tokenizer": {**INFO, "vocab_size": 300.0}}, "tokenizer vocab_size is 300.0"),
        ({"tokenizer": {**INFO, "vocab_size": "300"}}, "tokenizer vocab_size is '300'"),
        ({"tokenizer": {**INFO, "eos_id": -1}}, "eos_id -1 is outside"),
        ({"tokenizer": {**INFO, "eos_id": 2**31}}, "eos_id 2147483648 is outside"),
        ({"tokenizer": {**INFO, "eos_id": None}}, "tokenizer eos_id is of type NoneType"),
        ({"tokenizer": {**INFO, "special_tokens": {"<a>": 2**40}}}, "special token '<a>' has id 1099511627776"),
        ({"tokenizer": {**INFO, "special_tokens": [1]}}, "special_tokens is of type list"),
    ],
)
def test_malformed_index(copy: Path, change: dict, what: str) -> None:
    edit_index(copy, **change)
    refused(copy, "index.json", "malformed index", what, "restore the file")


@pytest.mark.parametrize(
    "change", [{"fingerprint": "0" * 64}, {"tokenizer": {**INFO, "eos_id": 5}}, {"dtype": "uint32"}]
)
def test_edited_index(copy: Path, change: dict) -> None:
    edit_index(copy, **change)
    refused(copy, "index.json", "fingerprint", "edited", "restore the file")


def test_missing_shard(copy: Path) -> None:
    (copy / "shard-00002.bin").unlink()
    refused(copy, "shard-00002.bin", "missing", "copy the data set again")


@pytest.mark.parametrize("size", [0, 597, 598])
def test_truncated_shard(copy: Path, size: int) -> None:
    with open(copy / "shard-00002.bin", "r+b") as file:
        file.truncate(size)
    refused(copy, "shard-00002.bin", f"has {size} bytes", "says 596", "truncated", "copy the data set again")


@pytest.mark.parametrize("seq_len", [0, -3])
def test_seq_len_below_one(folder: Path, seq_len: int) -> None:
    refused(folder, f"seq_len is {seq_len}", "1 or more", seq_len=seq_len)


def test_seq_len_beyond_the_data(folder: Path) -> None:
    assert len(TokenDataset(folder, seq_len=1008)) == 1
    refused(folder, "holds 1009 tokens", "1010", "lower seq_len", "write more data", seq_len=1009)
