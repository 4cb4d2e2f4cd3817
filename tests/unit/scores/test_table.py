"""The table of a bigram scorer on disk: a round trip, and damaged or foreign tables are refused."""

import hashlib
import json
from pathlib import Path

import numpy as np
import pytest
import torch

from titan_attent.scores import bigram
from titan_attent.scores.bigram import SMOOTHING, BigramModel
from titan_attent.scores.table import StoredTable, has_table, write_table

VOCAB_SIZE = 11
SIZE = 4 * (VOCAB_SIZE**2 + 2 * VOCAB_SIZE)


def counted(seed: int = 0) -> BigramModel:
    rng, model = np.random.default_rng(seed), BigramModel(VOCAB_SIZE)
    tokens = torch.from_numpy(rng.zipf(1.5, (40, 10)) % VOCAB_SIZE)
    model.add(tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous())
    return model


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write_table(tmp_path / "amateur", counted(), checkpoint_sha256="abc")
    return tmp_path / "amateur"


def test_a_table_is_read_as_it_was_written(folder: Path) -> None:
    model, loaded = counted(), StoredTable(folder).load()
    assert has_table(folder) and (folder / "table.bin").stat().st_size == SIZE
    for name in ("pairs", "inputs", "labels"):
        assert torch.equal(getattr(model, name), getattr(loaded, name))
    tokens = torch.arange(VOCAB_SIZE).repeat(2, 1)
    assert torch.equal(model.token_losses(tokens, tokens.flip(1)), loaded.token_losses(tokens, tokens.flip(1)))
    assert StoredTable(folder).info.checkpoint_sha256 == "abc"


def test_a_hashed_table_has_a_bounded_size(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bigram, "NUM_BUCKETS", 64)
    write_table(tmp_path, counted(), checkpoint_sha256="abc")
    assert (tmp_path / "table.bin").stat().st_size == 4 * (64 + 2 * VOCAB_SIZE)
    loaded = StoredTable(tmp_path).load()
    assert not loaded.is_exact and torch.equal(loaded.pairs, counted().pairs)


def edit(folder: Path, **fields: object) -> None:
    file = folder / "table.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | fields))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"format": "titan_attent.tokens"}, "holds a data set of text"),
        ({"version": 2}, "version 2, but expected format 'titan_attent.bigram' version 1"),
        ({"vocab_size": 2**40}, r"malformed \(the data's tokenizer declares a vocabulary of 1099511627776"),
        ({"vocab_size": 0}, "malformed"),
        ({"vocab_size": 11.0}, "malformed"),
        ({"vocab_size": True}, "malformed"),
        ({"vocab_size": 12}, f"has {SIZE} bytes instead of 672: truncated or replaced"),
        ({"sha256": 3}, "malformed"),
        ({"more": 1}, "malformed"),
        ({"smoothing": 2 * SMOOTHING}, "its smoothing is 200, and this version of the package has 100"),
    ],
)
def test_a_bad_description_is_refused_before_anything_is_allocated(
    folder: Path, fields: dict[str, object], message: str
) -> None:
    edit(folder, **fields)
    with pytest.raises(ValueError, match=message):
        StoredTable(folder)


def test_missing_and_truncated_files_are_refused(folder: Path) -> None:
    data = (folder / "table.bin").read_bytes()
    (folder / "table.bin").write_bytes(data[:-4])
    with pytest.raises(ValueError, match=f"has {SIZE - 4} bytes instead of {SIZE}"):
        StoredTable(folder)
    (folder / "table.bin").unlink()
    with pytest.raises(ValueError, match="table.bin: this file is missing; copy the folder again"):
        StoredTable(folder)
    (folder / "table.json").write_text("[1")
    with pytest.raises(ValueError, match="not a file with a JSON object"):
        StoredTable(folder)
    (folder / "table.json").unlink()
    with pytest.raises(ValueError, match="no table of the scorer .* command of these scores again, which adds the"):
        StoredTable(folder)


def test_changed_bytes_are_refused(folder: Path) -> None:
    data = bytearray((folder / "table.bin").read_bytes())
    data[5] ^= 1
    (folder / "table.bin").write_bytes(data)
    with pytest.raises(ValueError, match="its sha256 is .* the file is damaged"):
        StoredTable(folder).load()


@pytest.mark.parametrize("change", [(0, -7), (0, 1), (-1, 1)])
def test_numbers_that_are_no_counts_are_refused(folder: Path, change: tuple[int, int]) -> None:
    """The hash is right: such a file was written by someone else."""
    counts, (slot, by) = np.fromfile(folder / "table.bin", "<i4"), change
    counts[slot] += by
    if by < 0:
        counts[slot], counts[1] = -7, counts[1] + counts[slot] + 7
    (folder / "table.bin").write_bytes(counts.tobytes())
    edit(folder, sha256=hashlib.sha256(counts.tobytes()).hexdigest())
    with pytest.raises(ValueError, match="holds negative counts, or sums of counts that differ"):
        StoredTable(folder).load()


def test_a_killed_writer_leaves_no_table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from titan_attent.scores import table

    write = table.write_atomically

    def killed(path: Path, data: bytes) -> None:
        if path.name == "table.json":
            raise KeyboardInterrupt
        write(path, data)

    monkeypatch.setattr(table, "write_atomically", killed)
    with pytest.raises(KeyboardInterrupt):
        write_table(tmp_path, counted(), checkpoint_sha256="abc")
    assert not has_table(tmp_path)
