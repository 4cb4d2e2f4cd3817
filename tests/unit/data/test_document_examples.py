"""Documents as examples: spans.py and document_examples.py against plain Python lists of documents."""

import json
import pickle
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from titan_attent.data.plan.packed import Packer
from titan_attent.data.text.document_examples import DocumentDataset
from titan_attent.data.text.shards import TokenShards
from titan_attent.data.text.spans import RUN, count_examples, length_sample
from titan_attent.data.text.writer import write_dataset
from titan_attent.losses.cross_entropy import IGNORE_INDEX

Documents = list[list[int]]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """700 documents of 0 to 90 letters in two sources and many shards, some of them empty."""
    folder = tmp_path_factory.mktemp("documents")
    rng = np.random.default_rng(0)
    for name, num in (("a", 400), ("b", 300)):
        texts = ["".join(rng.choice(list("xyz ab"), rng.integers(0, 90))) for _ in range(num)]
        texts[:3] = ["", "a", ""]
        lines = (f'{{"text": "{text}"}}\n' for text in texts)
        (folder / f"{name}.jsonl").write_text("".join(lines))
    inputs = [f"{name}={folder / name}.jsonl" for name in "ab"]
    write_dataset(inputs, output=folder / "data", tokenizer="train:260", shard_tokens=4000)
    return folder / "data"


def documents_in(path: Path) -> tuple[Documents, list[str]]:
    """All documents with their eos, and the source of each: the stream cut behind every eos."""
    shards = TokenShards(path)
    eos, found, sources = shards.tokenizer_info["eos_id"], [], []
    for number, entry in enumerate(shards.index.shards):
        tokens = np.fromfile(path / entry.file, "<u2").astype(np.int64).tolist()
        document: list[int] = []
        for token in tokens:
            document.append(token)
            if token == eos:
                found.append(document)
                sources.append(entry.source)
                document = []
        assert not document, number
    return found, sources


def examples_of(documents: Documents, seq_len: int) -> list[tuple[int, list[int]]]:
    """(document, tokens) of each example, the label of the last one among the tokens."""
    examples = []
    for number, document in enumerate(documents):
        for start in range(0, len(document) - 1, seq_len):
            examples.append((number, document[start : start + seq_len + 1]))
    return examples


@pytest.mark.parametrize("seq_len", [1, 2, 7, 16, 64, 1000])
def test_examples_are_those_of_a_plain_loop(data: Path, seq_len: int) -> None:
    documents, sources = documents_in(data)
    expected = examples_of(documents, seq_len)
    dataset = DocumentDataset(data, seq_len=seq_len)
    assert len(dataset) == len(expected)
    ids = np.random.default_rng(1).permutation(len(expected))[:500]
    assert dataset.lengths(ids).tolist() == [len(expected[i][1]) - 1 for i in ids]
    assert dataset.documents_of(ids).tolist() == [expected[i][0] for i in ids]
    batch, labels = dataset.read(torch.from_numpy(ids))
    assert set(batch) == {"input"} and batch["input"].shape == labels.shape == (len(ids), seq_len)
    for i, row, row_labels in zip(ids.tolist(), batch["input"].tolist(), labels.tolist(), strict=True):
        tokens = expected[i][1]
        assert row[: len(tokens) - 1] == tokens[:-1]
        assert row_labels == tokens[1:] + [IGNORE_INDEX] * (seq_len - len(tokens) + 1)
    by_source = [sources[document] for document, _ in expected]
    names, firsts = zip(*dataset.sources, strict=True)
    owner = np.searchsorted(firsts, np.arange(len(expected)), side="right") - 1
    assert [names[j] for j in owner] == by_source and dict.fromkeys(names) == dict.fromkeys(by_source)
    where = dataset.location(int(ids[0]))
    shard = np.fromfile(data / where["shard"], "<u2")
    first = where["first_token"]
    assert shard[first : first + where["num_tokens"]].tolist() == expected[ids[0]][1]


def test_concatenated_rows_have_every_pair_of_the_documents_once(data: Path) -> None:
    seq_len = 64
    documents, _ = documents_in(data)
    expected = examples_of(documents, seq_len)
    dataset = DocumentDataset(data, seq_len=seq_len)
    one = Packer(dataset, batch_size=1, packing="concatenate").full_pass((0, 0, 0))
    ids, skipped = one.ids(0, one.num_batches), one.skipped(0, one.num_batches)
    assert skipped is not None and (skipped > 0).any()
    batch, labels = dataset.read(ids, skipped=skipped)
    found: dict[int, list[tuple[int, int]]] = {}
    for row in range(len(ids)):
        for i, x, y in zip(
            ids[row][batch["example_index"][row]].tolist(),
            batch["input"][row].tolist(),
            labels[row].tolist(),
            strict=True,
        ):
            if y != IGNORE_INDEX:
                found.setdefault(i, []).append((x, y))
    pairs = {i: list(zip(tokens[:-1], tokens[1:], strict=True)) for i, (_, tokens) in enumerate(expected)}
    assert found == pairs, "a cut document's pieces come in order"
    assert (labels != IGNORE_INDEX).float().mean() > 0.95
    with pytest.raises(IndexError, match="longer than 64 tokens"):
        dataset.read(ids)
    with pytest.raises(IndexError, match="leaves out all tokens"):
        dataset.read(ids[:1], skipped=torch.tensor([64]))


@pytest.mark.parametrize("layout", ["rows", "best_fit", "concatenate"])
@pytest.mark.parametrize("seq_len", [16, 64])
def test_pairs_are_numbered_example_after_example(data: Path, seq_len: int, layout: str) -> None:
    """A file with a record per pair, here the pair itself, has each label's record at the number of its place."""
    documents, _ = documents_in(data)
    pairs = [pair for document in documents for pair in zip(document[:-1], document[1:], strict=True)]
    dataset = DocumentDataset(data, seq_len=seq_len)
    assert dataset.num_pairs == len(pairs) and dataset.shards.num_shards > 5
    ids, skipped = torch.from_numpy(np.random.default_rng(2).permutation(len(dataset) + 3)), None
    if layout != "rows":
        one = Packer(dataset, batch_size=1, packing=layout).full_pass((0, 0, 0))
        ids, skipped = one.ids(0, one.num_batches), one.skipped(0, one.num_batches)
    batch, labels = dataset.read(ids, skipped=skipped)
    places = dataset.pair_places(ids, skipped=skipped)
    slots, numbers = places.slots(seq_len), places.numbers()
    assert sorted(slots.tolist()) == torch.nonzero((labels != IGNORE_INDEX).flatten())[:, 0].tolist()
    found = zip(batch["input"].flatten()[slots].tolist(), labels.flatten()[slots].tolist(), strict=True)
    assert list(found) == [pairs[number] for number in numbers.tolist()]
    assert sorted(numbers.tolist()) == list(range(len(pairs))), "each once in a full pass"
    examples = dataset.pair_places(torch.arange(len(dataset)))
    assert (np.diff(examples.firsts) == examples.lengths[:-1]).all() and examples.firsts[0] == 0


def test_packed_rows_hold_their_examples_one_after_the_other(data: Path) -> None:
    seq_len = 128
    documents, _ = documents_in(data)
    expected = examples_of(documents, seq_len)
    dataset = DocumentDataset(data, seq_len=seq_len)
    packer = Packer(dataset, batch_size=3)
    one = packer.full_pass((0, 0, 0))
    ids = one.ids(0, one.num_batches)
    batch, labels = dataset.read(ids)
    index = batch["example_index"]
    assert index.shape == labels.shape == (len(ids), seq_len)
    for row in range(len(ids)):
        place = 0
        examples = [i for i in ids[row].tolist() if i < len(expected)]
        for number, i in enumerate(examples):
            tokens = expected[i][1]
            end = place + len(tokens) - 1
            assert batch["input"][row, place:end].tolist() == tokens[:-1]
            assert labels[row, place:end].tolist() == tokens[1:]
            assert (index[row, place:end] == number).all()
            place = end
        assert (labels[row, place:] == IGNORE_INDEX).all() and (index[row, place:] == len(examples) - 1).all()
    assert (labels != IGNORE_INDEX).float().mean() > 0.97  # few documents: the last windows are not full


def test_what_no_row_can_hold_is_refused(data: Path) -> None:
    dataset = DocumentDataset(data, seq_len=64)
    long = torch.from_numpy(np.flatnonzero(dataset.lengths(np.arange(len(dataset))) > 40)[:2])
    with pytest.raises(IndexError, match="the examples of a row are longer than 64 tokens"):
        dataset.read(long[None])
    with pytest.raises(IndexError, match="example id -1 is negative"):
        dataset.read(torch.tensor([3, -1]))
    empty, labels = dataset.read(torch.full((2, 3), len(dataset)))
    assert (labels == IGNORE_INDEX).all() and (empty["example_index"] == 0).all()


@pytest.mark.parametrize("num_ranks", [1, 2, 3, 100])
def test_ranks_share_the_reading_of_the_ends(data: Path, num_ranks: int) -> None:
    shards = TokenShards(data)
    alone = DocumentDataset(data, seq_len=16)
    parts = [
        count_examples(shards, seq_len=16, numbers=range(rank, shards.num_shards, num_ranks))
        for rank in range(num_ranks)
    ]
    assert (np.stack(parts) > 0).sum() == np.count_nonzero(np.sum(parts, axis=0)), "each run is counted by one rank"
    shared = DocumentDataset(data, seq_len=16)
    shared.share_table(lambda counts: torch.from_numpy(np.sum(parts, axis=0)), rank=0, num_ranks=num_ranks)
    ids = np.arange(len(alone))
    for mine, theirs in zip(shared.table.locate(ids), alone.table.locate(ids), strict=True):
        assert np.array_equal(mine, theirs)
    assert alone.table.num_bytes < 8 * (len(documents_in(data)[0]) / RUN + 4 * shards.num_shards + 4)


def test_a_table_that_does_not_fit_its_histogram_is_refused(data: Path) -> None:
    dataset = DocumentDataset(data, seq_len=16)
    with pytest.raises(ValueError, match="a file was replaced. Copy the data set again"):
        dataset.share_table(lambda counts: counts * 2, rank=0, num_ranks=1)


def test_a_sample_of_the_lengths(data: Path) -> None:
    for seq_len in (7, 64):
        dataset = DocumentDataset(data, seq_len=seq_len)
        every = np.sort(dataset.lengths(np.arange(len(dataset))))
        sample = length_sample(dataset.shards, seq_len=seq_len, size=len(every))
        assert np.array_equal(np.sort(sample), every)
        assert dataset.num_pairs == every.sum() and dataset.num_rows == -(-every.sum() // seq_len)


def test_a_copy_in_another_process_reads_the_same(data: Path) -> None:
    dataset = DocumentDataset(data, seq_len=16)
    copy = pickle.loads(pickle.dumps(dataset))
    ids = torch.arange(5)
    assert torch.equal(copy.read(ids)[1], dataset.read(ids)[1])
    assert copy.stored.fingerprint == dataset.stored.fingerprint != dataset.shards.fingerprint


def test_examples_are_located_alike_from_memory_and_from_the_files(data: Path) -> None:
    fresh, used = DocumentDataset(data, seq_len=16), DocumentDataset(data, seq_len=16)
    ids = np.random.default_rng(2).permutation(len(fresh))
    for kept in (ids[:5], ids[: len(ids) // 3], np.arange(0), ids[ids < 300], ids[ids > 900]):
        assert np.array_equal(used.lengths(kept), fresh.table.locate(kept).lengths)
        for some in (ids, ids[:1], ids[:0], ids[40:80]):  # in memory, in part, and not
            for column, expected in zip(used.table.locate(some), fresh.table.locate(some), strict=True):
                assert np.array_equal(column, expected)


def test_a_run_in_memory_is_not_read_again(data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    dataset = DocumentDataset(data, seq_len=16)
    dataset.lengths(np.arange(100, 200))
    monkeypatch.setattr(TokenShards, "document_ends", lambda *args: pytest.fail("read"))
    dataset.table.locate(np.arange(199, 99, -1))


def test_a_shard_that_was_cut_short_is_named(data: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(data, copy)
    dataset = DocumentDataset(copy, seq_len=16)
    ids = torch.arange(len(dataset))
    name = dataset.location(0)["shard"]
    with open(copy / name, "r+b") as file:
        file.truncate(10)
    with pytest.raises(ValueError, match=f"{name}: ends at byte 10"):
        dataset.read(ids[:100])
    (copy / name).unlink()
    with pytest.raises(FileNotFoundError, match=name):
        DocumentDataset(TokenShards(copy, check_sizes=False), seq_len=16).read(ids[:100])


def test_labels_that_do_not_count_are_ignored_in_packed_rows(tmp_path: Path) -> None:
    pairs = ({"prompt": "p" * (i % 9 + 1), "completion": "c" * (i % 5 + 1)} for i in range(80))
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(pair) + "\n" for pair in pairs))
    options = {"tokenizer": "train:260", "prompt_key": "prompt", "completion_key": "completion"}
    write_dataset([tmp_path / "pairs.jsonl"], output=tmp_path / "data", shard_tokens=100, **options)  # type: ignore[arg-type]
    dataset = DocumentDataset(tmp_path / "data", seq_len=64)
    assert dataset.shards.has_mask
    one = Packer(dataset, batch_size=2).full_pass((0, 0, 0))
    ids = one.ids(0, one.num_batches)
    _, labels = dataset.read(ids)
    for row, row_ids in zip(labels.tolist(), ids.tolist(), strict=True):
        expected: list[int] = []
        for i in (i for i in row_ids if i < len(dataset)):
            (shard,), (start,), (length,), _ = (c.tolist() for c in dataset.table.locate(np.array([i])))
            tokens = dataset.shards.read_span(shard, start + 1, start + length + 1)
            counts = dataset.shards.read_mask(shard, start + 1, start + length + 1)
            expected += np.where(counts, tokens, IGNORE_INDEX).tolist()
        assert row == expected + [IGNORE_INDEX] * (64 - len(expected))
    assert (labels == IGNORE_INDEX).float().mean() > 0.3
