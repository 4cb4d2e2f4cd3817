"""holdout.py on rows that contain their own number, so that a test knows where each row goes."""

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from titan_attent.data.io.folder import INDEX_FILE
from titan_attent.data.text.holdout import BLOCK_EXAMPLES, NUM_SPANS, held_out_mask, hold_out, write_tokens
from titan_attent.data.text.shards import TokenDataset
from titan_attent.data.text.tokenizer import Tokenizer

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
    return Tokenizer.from_info(shards.tokenizer_info, shards.path)


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
