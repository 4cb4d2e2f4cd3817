"""forward_rows.py: every example once in a row that holds it, few tokens, the same rows on any number of ranks."""

import json
import re
from collections.abc import Callable
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from titan_attent.data.io.reader import Reader
from titan_attent.data.plan import forward_rows as module
from titan_attent.data.plan.fixed import FixedLoader
from titan_attent.data.plan.forward_rows import ForwardRows, Rows, row_lengths
from titan_attent.data.plan.order import Pool
from titan_attent.data.text.document_examples import DocumentDataset
from titan_attent.data.text.writer import write_dataset
from titan_attent.losses.cross_entropy import IGNORE_INDEX

SEQ_LEN = 64


class Examples:
    """Examples of known lengths; counts those that are read."""

    def __init__(self, lengths: np.ndarray, *, seq_len: int = SEQ_LEN):
        self.all, self.seq_len, self.num_pairs, self.num_read = lengths, seq_len, int(lengths.sum()), 0

    def __len__(self) -> int:
        return len(self.all)

    def row_lengths_of(self, ids: np.ndarray) -> np.ndarray:
        self.num_read += len(ids)
        return self.all[ids]


def examples_of(num: int) -> Examples:
    return Examples(np.minimum(SEQ_LEN, 1 + np.random.default_rng(num).geometric(0.06, num)).astype(np.int64))


SHORT, PACKED = {"lengths": (16, 40, SEQ_LEN)}, {"lengths": (SEQ_LEN,), "max_examples": 8}
LAYOUTS: dict[str, dict[str, Any]] = {"short": SHORT, "packed": PACKED}
POOLS: dict[str, Callable[[int], Pool]] = {
    "whole": Pool.whole,
    "sample": lambda num: Pool(num, order=(0, 0, 0), size=max(1, num // 3)),
}


def layouts(
    examples: Examples, layout: dict[str, Any], pool: Pool, *, num_ranks: int, batch_size: int
) -> list[list[Rows]]:
    """The batches that each rank lays out; the sums over the ranks come from one that reads everything."""

    def add_up(lengths: torch.Tensor) -> torch.Tensor:
        read.append(lengths.clone())
        return lengths

    read: list[torch.Tensor] = []
    whole = ForwardRows(examples, **layout, add_up=add_up)
    list(whole.batches(pool, batch_size=batch_size))
    results = []
    for rank in range(num_ranks):
        sums = iter(read)

        def of_all(share: torch.Tensor, sums: Any = sums) -> torch.Tensor:
            total = next(sums)
            assert torch.equal(share[share > 0], total[share > 0])
            return total

        rows = ForwardRows(examples, **layout, rank=rank, num_ranks=num_ranks, add_up=of_all)
        results.append(list(rows.batches(pool, batch_size=batch_size)))
    return results


@pytest.mark.parametrize("pool", POOLS)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(
    ("num", "num_ranks", "batch_size"), [(3000, 1, 4), (3000, 3, 2), (500, 2, 7), (5, 2, 4), (1, 1, 1)]
)
def test_each_example_is_in_one_row_that_holds_it(
    monkeypatch: pytest.MonkeyPatch, layout: str, pool: str, num: int, num_ranks: int, batch_size: int
) -> None:
    monkeypatch.setattr(module, "MAX_BLOCK_EXAMPLES", 256)  # several blocks
    examples, candidates = examples_of(num), POOLS[pool](num)
    expected = sorted(candidates.ids(torch.arange(candidates.size)).tolist())
    ranks = layouts(examples, LAYOUTS[layout], candidates, num_ranks=num_ranks, batch_size=batch_size)
    assert all(len(batches) == len(ranks[0]) for batches in ranks)
    found = list[int]()
    for number, batch in enumerate(ranks[0]):
        assert all(batches[number].length == batch.length for batches in ranks)
        assert all(torch.equal(batches[number].ids, batch.ids) for batches in ranks)
        for rank in range(num_ranks):
            rows = batch.of_rank(rank, num_ranks)
            assert len(rows.ids) == batch_size * SEQ_LEN // batch.length, "one shape for each length"
            for row in rows.ids.view(len(rows.ids), -1).tolist():
                ids = [i for i in row if i < num]
                assert examples.all[ids].sum() <= batch.length and row[len(ids) :] == [num] * (len(row) - len(ids))
                found += ids
    assert sorted(found) == expected
    assert len(ranks[0]) <= -(-len(expected) // (batch_size * num_ranks)), "never more batches than by whole rows"


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_rows_do_not_depend_on_the_number_of_ranks(monkeypatch: pytest.MonkeyPatch, layout: str) -> None:
    """Those of the packed layout, in which examples share rows; only how they are split into batches does."""
    monkeypatch.setattr(module, "MAX_BLOCK_EXAMPLES", 256)
    examples = examples_of(2000)

    def rows(num_ranks: int, batch_size: int) -> set[tuple[int, ...]]:
        (batches, *_) = layouts(examples, LAYOUTS[layout], Pool.whole(2000), num_ranks=num_ranks, batch_size=batch_size)
        return {tuple(row) for batch in batches for row in batch.ids.view(len(batch.ids), -1).tolist()} - {(2000,) * 8}

    assert rows(1, 8) - {(2000,)} == rows(3, 4) - {(2000,)} == rows(16, 2) - {(2000,)}


def test_the_ranks_share_the_reading_of_lengths() -> None:
    examples = examples_of(1001)
    for rank in range(4):
        examples.num_read = 0
        everything = torch.from_numpy(examples.all)
        rows = ForwardRows(
            examples, **SHORT, rank=rank, num_ranks=4, add_up=lambda lengths, everything=everything: everything
        )
        list(rows.batches(Pool.whole(1001), batch_size=2))
        assert examples.num_read in (250, 251)


def test_row_lengths_have_the_fewest_tokens() -> None:
    """Against all sets of multiples of the step."""
    rng = np.random.default_rng(0)
    for _ in range(30):
        values = rng.integers(1, SEQ_LEN + 1, 12)
        counts = rng.integers(0, 20, 12) + (np.arange(12) == 0)
        largest = values[counts > 0].max()
        candidates = [end for end in range(8, SEQ_LEN + 1, 8)]
        num = int(rng.integers(1, 5))

        def tokens(lengths: tuple[int, ...], values: Any = values, counts: Any = counts) -> int:
            return int((np.array(lengths)[np.searchsorted(lengths, values[counts > 0])] * counts[counts > 0]).sum())

        best = min(
            tokens(lengths)
            for size in range(1, num + 1)
            for lengths in combinations(candidates, size)
            if lengths[-1] >= largest
        )
        found = row_lengths(values, counts, seq_len=SEQ_LEN, num=num)
        assert len(found) <= num and tokens(found) == best
        assert all(length % 16 == 0 for length in row_lengths(values, counts, seq_len=SEQ_LEN, num=num, multiple_of=16))


@pytest.mark.parametrize(("seq_len", "num"), [(8192, 3), (8192, 8), (2048, 3), (100_000, 8), (10, 3), (1, 3)])
def test_row_lengths_of_any_window(seq_len: int, num: int) -> None:
    lengths = np.clip(np.random.default_rng(0).lognormal(5, 1, 5000), 1, seq_len).astype(np.int64)
    found = row_lengths(*np.unique(lengths, return_counts=True), seq_len=seq_len, num=num)
    assert 1 <= len(found) <= num and list(found) == sorted(set(found)) and lengths.max() <= found[-1] <= seq_len
    assert all(length % 128 == 0 for length in found if seq_len >= 2048 and length != seq_len)


# -- documents on disk ------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def paragraphs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The paragraphs of the standard library's json package and of its neighbours: documents of real lengths."""
    folder = tmp_path_factory.mktemp("paragraphs")
    files = sorted(Path(json.__file__).parents[1].glob("*.py"))[:60]
    texts = [text for file in files for text in re.split(r"\n\s*\n", file.read_text(errors="replace")) if text.strip()]
    (folder / "text.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    write_dataset([folder / "text.jsonl"], output=folder / "data", tokenizer="train:512", shard_tokens=200_000)
    return folder / "data"


def layout_of(dataset: DocumentDataset, layout: str, *, num: int = 3) -> dict[str, Any]:
    if layout == "packed":
        return {"lengths": (dataset.seq_len,), "max_examples": 64}
    return {"lengths": row_lengths(*dataset.length_counts(), seq_len=dataset.seq_len, num=num)}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_loader_reads_what_whole_rows_hold(paragraphs: Path, layout: str) -> None:
    """Inputs and labels of every example, from two ranks, as from a row for itself."""
    dataset = DocumentDataset(paragraphs, seq_len=256)
    pool = Pool(len(dataset), order=(0, 0, 0), size=700)
    found = dict[int, tuple[list[int], list[int]]]()
    for rank in range(2):
        everything = torch.from_numpy(dataset.row_lengths_of(ids_of(pool)))
        rows = ForwardRows(
            dataset,
            **layout_of(dataset, layout),
            rank=rank,
            num_ranks=2,
            add_up=lambda lengths, everything=everything: everything,
        )
        loader = FixedLoader(
            dataset, pool, batch_size=3, dp_rank=rank, dp_world_size=2, reader=Reader(0), forward_rows=rows
        )
        for batch, labels in loader:
            assert loader.num_tokens(labels) == labels.numel() <= 3 * 256
            index = batch.get("example_index", torch.zeros_like(labels))
            ids = batch["example_id"].view(len(labels), -1)
            for row in range(len(labels)):
                for slot, i in enumerate(ids[row].tolist()):
                    if i == len(dataset):
                        continue
                    own = (index[row] == slot) & (labels[row] != IGNORE_INDEX)
                    assert i not in found
                    found[i] = (batch["input"][row, own].tolist(), labels[row, own].tolist())
    ids = torch.from_numpy(ids_of(pool))
    batch, labels = dataset.read(ids)
    assert set(found) == set(ids.tolist())
    for row, i in enumerate(ids.tolist()):
        own = labels[row] != IGNORE_INDEX
        assert found[i] == (batch["input"][row, own].tolist(), labels[row, own].tolist())


def ids_of(pool: Pool) -> np.ndarray:
    return np.sort(pool.ids(torch.arange(pool.size)).numpy())


def test_useful_tokens_on_real_lengths(paragraphs: Path) -> None:
    """The share of a forward pass's tokens that belong to documents, before and after, at 2,048 tokens per row."""
    dataset = DocumentDataset(paragraphs, seq_len=2048)
    assert len(dataset) > 2000
    before = dataset.num_pairs / (len(dataset) * dataset.seq_len)

    def share(layout: dict[str, Any]) -> float:
        rows = ForwardRows(dataset, **layout)
        batches = rows.batches(Pool.whole(len(dataset)), batch_size=4)
        return dataset.num_pairs / sum(batch.ids.shape[0] * batch.length for batch in batches)

    shares = [share(layout_of(dataset, "short", num=num)) for num in (3, 8)]
    packed = share(layout_of(dataset, "packed") | {"max_examples": 512})
    for mean in (300, 1000):
        lengths = np.random.default_rng(0).lognormal(np.log(mean) - 0.5, 1.0, 50_000).clip(1, 8192).astype(np.int64)
        examples, counts = Examples(lengths, seq_len=8192), np.unique(lengths, return_counts=True)
        layouts = [{"lengths": row_lengths(*counts, seq_len=8192, num=num)} for num in (1, 3, 8)]
        for layout in (*layouts, {"lengths": (8192,), "max_examples": 512}):
            batches = ForwardRows(examples, **layout).batches(Pool.whole(len(examples)), batch_size=4)  # type: ignore[arg-type]
            read = sum(batch.ids.shape[0] * batch.length for batch in batches)
            print(f"mean {mean}, {layout}: {examples.num_pairs / read:.3f}")
    print(
        f"useful tokens: {before:.3f} before, {shares[0]:.3f} in 3 lengths, {shares[1]:.3f} in 8, {packed:.3f} packed"
    )
    assert before < 0.1 and shares[0] > 0.4 and shares[1] > shares[0] and packed > 0.9


def test_the_first_example_of_a_document(paragraphs: Path) -> None:
    dataset = DocumentDataset(paragraphs, seq_len=16)
    documents = dataset.documents_of(np.arange(len(dataset)))
    num = dataset.scored.num_examples
    for document in (0, 1, 255, 256, 1000, num - 1, num):
        assert dataset.first_example_of(document) == int(np.searchsorted(documents, document))


def test_rows_too_short_for_an_example_are_refused(paragraphs: Path) -> None:
    dataset = DocumentDataset(paragraphs, seq_len=64)
    longest = int(dataset.lengths(np.arange(len(dataset))).argmax())
    with pytest.raises(IndexError, match="longer than 32 tokens"):
        dataset.read(torch.tensor([longest]), row_length=32)
