"""holdout.py on rows that contain their own number, so that a test knows where each row goes."""

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from titan_attent.data.io.folder import INDEX_FILE
from titan_attent.data.text import holdout
from titan_attent.data.text.any_tokenizer import Tokenizer
from titan_attent.data.text.format import ShardWriter, write_index
from titan_attent.data.text.holdout import (
    BLOCK_EXAMPLES,
    NUM_SPANS,
    held_out_mask,
    hold_out,
    hold_out_documents,
    write_tokens,
)
from titan_attent.data.text.shards import TokenDataset, TokenShards
from titan_attent.data.text.tokenizer import open_tokenizer

SEQ_LEN, BASE = 4, 100


def numbered(folder: Path, num: int, *, tokenizer: Tokenizer) -> TokenDataset:
    """``num`` rows (high digit, low digit, 0, 0), and one token for the last label."""
    tokens = np.zeros((num, SEQ_LEN), dtype=np.int64)
    tokens[:, 0], tokens[:, 1] = np.divmod(np.arange(num), BASE)
    write_tokens(folder, [tokens.ravel(), np.zeros(1, dtype=np.int64)], tokenizer=tokenizer)
    return TokenDataset(folder, seq_len=SEQ_LEN)


def rows(folder: Path) -> list[int]:
    dataset = TokenDataset(folder, seq_len=SEQ_LEN)
    return [int(BASE * row[0] + row[1]) for row in (dataset[i][0]["input"] for i in range(len(dataset)))]


def runs(numbers: list[int]) -> list[tuple[int, int]]:
    """The spans [first, stop) of consecutive numbers."""
    found: list[tuple[int, int]] = []
    for number in numbers:
        if found and found[-1][1] == number:
            found[-1] = found[-1][0], number + 1
        else:
            found.append((number, number + 1))
    return found


@pytest.fixture(scope="module")
def tokenizer(token_data: dict[str, Path]) -> Tokenizer:
    shards = TokenDataset(token_data["train"], seq_len=SEQ_LEN).shards
    return open_tokenizer(shards.tokenizer_info, shards.path)


def cut(tmp_path: Path, dataset: TokenDataset, *, num_train: int, num_held_out: int) -> tuple[list[int], list[int]]:
    train, held_out = tmp_path / "train", tmp_path / "held_out"
    hold_out(dataset, train=train, held_out=held_out, num_train=num_train, num_held_out=num_held_out)
    return rows(train), rows(held_out)


@pytest.mark.parametrize("num", [128, 143, 315, 768, 2000])
@pytest.mark.parametrize("num_held_out", [1, 100, 10**6])
def test_all_rows_are_on_one_side_and_a_quarter_at_most_held_out(
    tmp_path: Path, tokenizer: Tokenizer, num: int, num_held_out: int
) -> None:
    dataset = numbered(tmp_path / "data", num, tokenizer=tokenizer)
    train, held_out = cut(tmp_path, dataset, num_train=10**6, num_held_out=num_held_out)
    whole = num // BLOCK_EXAMPLES * BLOCK_EXAMPLES
    assert sorted(train + held_out) == list(range(whole))
    assert (train, held_out) == (sorted(train), sorted(held_out))
    limit = max(BLOCK_EXAMPLES, min(num_held_out, whole // 4))
    assert limit - BLOCK_EXAMPLES < len(held_out) <= limit
    for path, found in ((tmp_path / "train", train), (tmp_path / "held_out", held_out)):
        assert all((stop - first) % BLOCK_EXAMPLES == 0 for first, stop in runs(found))
        index = TokenDataset(path, seq_len=SEQ_LEN).shards.index
        assert index.num_tokens == len(found) * SEQ_LEN + 1 and index.tokenizer == dataset.shards.index.tokenizer


def test_a_row_has_the_labels_that_it_had_but_for_the_last_of_a_span(tmp_path: Path, tokenizer: Tokenizer) -> None:
    dataset = numbered(tmp_path / "data", 315, tokenizer=tokenizer)
    _, held_out = cut(tmp_path, dataset, num_train=10**6, num_held_out=64)
    copy = TokenDataset(tmp_path / "held_out", seq_len=SEQ_LEN)
    last = {stop - 1 for _, stop in runs(held_out)}
    for index, row in enumerate(held_out):
        ours, theirs = copy[index][1], dataset[row][1]
        assert (ours[:-1] == theirs[:-1]).all() and (row in last - {held_out[-1]} or ours[-1] == theirs[-1])


def test_spans_are_few_and_spread_evenly(tmp_path: Path, tokenizer: Tokenizer) -> None:
    num, each = 4000, 48
    dataset = numbered(tmp_path / "data", num, tokenizer=tokenizer)
    train, held_out = cut(tmp_path, dataset, num_train=500, num_held_out=NUM_SPANS * each)
    found = runs(held_out)
    assert [stop - first for first, stop in found] == [each] * NUM_SPANS
    for number, (first, stop) in enumerate(found):
        assert abs((first + stop) / 2 - (number + 0.5) * num / NUM_SPANS) <= 2 * BLOCK_EXAMPLES
    # The training rows are spread evenly, too, and their number is as requested, in whole blocks.
    assert len(train) == 512 and not {*train} & {*held_out}
    firsts = np.array(train[::BLOCK_EXAMPLES])
    assert firsts[0] == 0 and firsts[-1] == num - BLOCK_EXAMPLES
    assert np.abs(firsts - np.linspace(0, num - BLOCK_EXAMPLES, 32)).max() <= each + BLOCK_EXAMPLES


@settings(deadline=None)
@given(st.integers(8, 5000).flatmap(lambda num: st.tuples(st.just(num), st.integers(0, num // 4))))
def test_spans_of_any_size(sizes: tuple[int, int]) -> None:
    num, num_held_out = sizes
    mask = held_out_mask(num, num_held_out)
    assert mask.dtype == bool and len(mask) == num
    assert 1 <= mask.sum() == max(1, num_held_out) < num
    found = runs(np.flatnonzero(mask).tolist())
    assert len(found) == min(NUM_SPANS, max(1, num_held_out))
    lengths = [stop - first for first, stop in found]
    assert max(lengths) - min(lengths) <= 1
    # Each is centred in its own range.
    middles = [(first + stop) / 2 for first, stop in found]
    assert np.allclose(middles, (np.arange(len(found)) + 0.5) * num / len(found), rtol=0, atol=1.5)


def test_folders_that_are_there_stay(tmp_path: Path, tokenizer: Tokenizer) -> None:
    dataset = numbered(tmp_path / "data", 400, tokenizer=tokenizer)
    first = cut(tmp_path, dataset, num_train=10**6, num_held_out=64)
    before = [(tmp_path / name / INDEX_FILE).stat().st_mtime_ns for name in ("train", "held_out")]
    assert cut(tmp_path, dataset, num_train=16, num_held_out=16) == first
    assert [(tmp_path / name / INDEX_FILE).stat().st_mtime_ns for name in ("train", "held_out")] == before


def test_what_a_kill_left_out_is_made_as_it_would_have_been(tmp_path: Path, tokenizer: Tokenizer) -> None:
    dataset = numbered(tmp_path / "data", 400, tokenizer=tokenizer)
    first = cut(tmp_path, dataset, num_train=10**6, num_held_out=64)
    (tmp_path / "held_out" / INDEX_FILE).unlink()  # it comes last
    assert cut(tmp_path, dataset, num_train=10**6, num_held_out=64) == first


def test_too_few_examples_are_refused(tmp_path: Path, tokenizer: Tokenizer) -> None:
    dataset = numbered(tmp_path / "data", 127, tokenizer=tokenizer)
    with pytest.raises(ValueError, match="holds 127 examples of 4 tokens, fewer than the 128"):
        cut(tmp_path, dataset, num_train=16, num_held_out=16)
    assert not (tmp_path / "train").exists() and not (tmp_path / "held_out").exists()


# Whole documents. Each begins with its own number.

Written = tuple[int, str, list[int], list[bool]]
"""Number, source, tokens and mask of a document."""


def write_documents(
    folder: Path, lengths: list[list[int]], *, tokenizer: Tokenizer, masked: bool = False, vary_sources: bool = True
) -> tuple[TokenShards, list[Written]]:
    """A shard per list of lengths (at least 3 tokens each), every second one of another source."""
    folder.mkdir()
    tokenizer.save(folder)
    entries, written = [], list[Written]()
    for shard, sizes in enumerate(lengths):
        source = ("web", "code")[shard % 2] if vary_sources else "web"
        dtype = np.dtype("<u2")
        with ShardWriter(folder / f"shard-{shard:05d}.bin", dtype=dtype, source=source, mask=masked) as writer:
            for size in sizes:
                number = len(written)
                tokens = [*divmod(number, BASE), *([number % 7] * (size - 3)), tokenizer.eos_id]
                counts = [bool((number + i) % 3) or not masked for i in range(size)]
                writer.append_document(np.array(tokens), np.array(counts))
                written.append((number, source, tokens, counts))
            entries.append(writer.finish())
    counts_of = {"num_documents": len(written), "max_token_id": tokenizer.eos_id}
    write_index(folder, dtype=dtype, shards=entries, tokenizer=tokenizer.info(), **counts_of)
    return TokenShards(folder), written


def read_documents(folder: Path) -> list[Written]:
    shards, found = TokenShards(folder), list[Written]()
    shards.verify_checksums()
    for number, entry in enumerate(shards.index.shards):
        start = 0
        for stop in shards.document_ends(number, 0, shards.num_documents_of(number)).tolist():
            tokens = shards.read_span(number, start, stop).tolist()
            mask = shards.read_mask(number, start, stop).tolist()
            found.append((BASE * tokens[0] + tokens[1], entry.source, tokens, mask))
            start = stop
    return found


def split(
    tmp_path: Path, shards: TokenShards, *, num_held_out: int, max_train_tokens: int, min_held_out: int = 1
) -> list[list[Written]]:
    folders = {"train": tmp_path / "train", "held_out": tmp_path / "held_out"}
    sizes = {"num_held_out": num_held_out, "min_held_out": min_held_out, "max_train_tokens": max_train_tokens}
    hold_out_documents(shards, **folders, **sizes)
    return [read_documents(folder) for folder in folders.values()]


@settings(deadline=None, max_examples=30)
@given(data=st.data())
def test_every_document_is_whole_and_on_one_side(
    tmp_path_factory: pytest.TempPathFactory, tokenizer: Tokenizer, data: st.DataObject
) -> None:
    sizes = st.lists(st.integers(3, 12), min_size=1, max_size=12)
    lengths = data.draw(st.lists(sizes, min_size=1, max_size=4).filter(lambda parts: sum(map(len, parts)) >= 16))
    masked, num_held_out = data.draw(st.booleans()), data.draw(st.integers(1, 20))
    max_train_tokens = data.draw(st.integers(1, 600))
    tmp_path = tmp_path_factory.mktemp("split")
    shards, written = write_documents(tmp_path / "data", lengths, tokenizer=tokenizer, masked=masked)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(holdout, "SHARD_TOKENS", data.draw(st.integers(1, 60)))
        patch.setattr(holdout, "READ_DOCUMENTS", data.draw(st.integers(1, 9)))
        train, held_out = split(tmp_path, shards, num_held_out=num_held_out, max_train_tokens=max_train_tokens)
    for side in (train, held_out):
        assert side == [written[number] for number in sorted(number for number, *_ in side)]  # with source and mask
    assert not {number for number, *_ in train} & {number for number, *_ in held_out}
    total = sum(len(tokens) for _, _, tokens, _ in written)
    sizes_of = [sum(len(tokens) for _, _, tokens, _ in side) for side in (train, held_out)]
    assert 1 <= len(held_out) <= min(num_held_out, len(written) // 4) and sizes_of[1] <= total / 4
    assert len(train) == 1 or (len(train) > 1 and sizes_of[0] <= max_train_tokens)
    assert all(TokenShards(tmp_path / name).has_mask == masked for name in ("train", "held_out"))
    if max_train_tokens >= total:
        assert len(train) + len(held_out) == len(written)


def test_as_many_documents_as_requested(tmp_path: Path, tokenizer: Tokenizer) -> None:
    shards, _ = write_documents(tmp_path / "data", [[5] * 200, [5] * 200], tokenizer=tokenizer)
    train, held_out = split(tmp_path, shards, num_held_out=40, max_train_tokens=500)
    assert (len(held_out), len(train)) == (40, 100)
    # A random sample of blocks of 16 neighbours, the last of which may be cut.
    for side in (train, held_out):
        numbers = np.array([number for number, *_ in side])
        blocks = np.unique(numbers // 16)
        assert len(blocks) == -(-len(numbers) // 16) and (np.diff(blocks) > 1).any()
    assert len({number // 16 for number, *_ in train} & {number // 16 for number, *_ in held_out}) <= 1


def test_the_split_depends_on_the_documents_number_alone(tmp_path: Path, tokenizer: Tokenizer) -> None:
    """Not on the shards, and the held-out documents not on the size of the training data."""
    sides = []
    for name, lengths, max_tokens in (("one", [[5] * 80], 300), ("many", [[5] * 30, [5] * 50], 10**6)):
        (tmp_path / name).mkdir()
        shards, _ = write_documents(tmp_path / name / "data", lengths, tokenizer=tokenizer)
        sides.append(split(tmp_path / name, shards, num_held_out=10, max_train_tokens=max_tokens))
    numbers = [[[number for number, *_ in side] for side in pair] for pair in sides]
    assert numbers[0][1] == numbers[1][1] == list(range(48, 58))
    assert set(numbers[0][0]) <= set(numbers[1][0]) and len(numbers[0][0]) == 60


def test_a_long_document_is_not_held_out(tmp_path: Path, tokenizer: Tokenizer) -> None:
    shards, _ = write_documents(tmp_path / "data", [[5] * 80], tokenizer=tokenizer)
    first = split(tmp_path, shards, num_held_out=1, max_train_tokens=10**6)[1][0][0]
    lengths = [5] * 80
    lengths[first] = 200
    (tmp_path / "b").mkdir()
    shards, _ = write_documents(tmp_path / "b" / "data", [lengths], tokenizer=tokenizer)
    train, held_out = split(tmp_path / "b", shards, num_held_out=10, max_train_tokens=10**6)
    assert first in {number for number, *_ in train} and len(held_out) == 9


def test_data_sets_of_documents_that_are_there_stay(tmp_path: Path, tokenizer: Tokenizer) -> None:
    shards, _ = write_documents(tmp_path / "data", [[5] * 80], tokenizer=tokenizer)
    first = split(tmp_path, shards, num_held_out=10, max_train_tokens=200)
    before = [(tmp_path / name / INDEX_FILE).stat().st_mtime_ns for name in ("train", "held_out")]
    assert split(tmp_path, shards, num_held_out=3, max_train_tokens=50) == first
    assert [(tmp_path / name / INDEX_FILE).stat().st_mtime_ns for name in ("train", "held_out")] == before
    (tmp_path / "held_out" / INDEX_FILE).unlink()  # a killed command
    assert split(tmp_path, shards, num_held_out=10, max_train_tokens=200) == first


def test_too_few_documents_are_refused_before_anything_is_written(tmp_path: Path, tokenizer: Tokenizer) -> None:
    shards, _ = write_documents(tmp_path / "data", [[5] * 127], tokenizer=tokenizer)
    limits = {"num_held_out": 2048, "min_held_out": 32, "max_train_tokens": 10**6}
    with pytest.raises(ValueError, match="127 documents, of which 31 can be held out, fewer than the 32 .* least 128"):
        split(tmp_path, shards, **limits)
    assert not (tmp_path / "train").exists()
    shards, _ = write_documents(tmp_path / "more", [[5] * 128], tokenizer=tokenizer)
    assert len(split(tmp_path, shards, **limits)[1]) == 32


def test_documents_that_cannot_be_held_out_are_refused(tmp_path: Path, tokenizer: Tokenizer) -> None:
    for name, lengths in (("few", [5, 5, 5]), ("long", [50, 50, 50])):
        shards, _ = write_documents(tmp_path / name, [lengths], tokenizer=tokenizer)
        with pytest.raises(ValueError, match=f"{tmp_path / name}: has 3 documents, of which 0 can be held out"):
            split(tmp_path, shards, num_held_out=1, max_train_tokens=100)
    plain = numbered(tmp_path / "plain", 400, tokenizer=tokenizer).shards
    with pytest.raises(ValueError, match="without its documents.*boundaries"):
        split(tmp_path, plain, num_held_out=1, max_train_tokens=100)
    assert not (tmp_path / "train").exists()
