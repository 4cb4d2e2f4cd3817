"""The written data sets of tasks: their rows and masks read back, what a loss counts of them, folders and refusals."""

import json
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from titan_attent.data.text.document_examples import DocumentDataset
from titan_attent.data.text.shards import TokenShards
from titan_attent.data.text.tokenizer import open_tokenizer
from titan_attent.losses.buffer import LossBuffer
from titan_attent.losses.build import build_example_loss
from titan_attent.losses.cross_entropy import IGNORE_INDEX
from titan_attent.tasks.__main__ import main
from titan_attent.tasks.checkers import CHECKERS, Row
from titan_attent.tasks.graph_colouring import GraphColouring
from titan_attent.tasks.parity import Parity
from titan_attent.tasks.pcfg import Pcfg
from titan_attent.tasks.sraven import Sraven
from titan_attent.tasks.task import Task
from titan_attent.tasks.task_list import TASKS
from titan_attent.tasks.writer import ROWS_AT_ONCE, folders_of, write_task


def files(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def read_rows(folder: Path) -> list[Row]:
    """The rows of a data set, decoded by its own tokenizer; the split is the name of the source."""
    shards = TokenShards(folder)
    shards.verify_checksums()
    tokenizer = open_tokenizer(shards.tokenizer_info, folder)
    rows = []
    for number, entry in enumerate(shards.index.shards):
        start = 0
        tokens = np.fromfile(folder / entry.file, dtype=shards.dtype)
        mask = np.unpackbits(
            np.fromfile(folder / entry.file.replace(".bin", ".mask"), dtype=np.uint8), bitorder="little"
        )
        for end in shards.document_ends(number, 0, entry.num_documents).tolist():
            assert tokens[end - 1] == tokenizer.eos_id and not mask[end - 1]
            words = tokenizer.decode(tokens[start : end - 1]).split()
            rows.append(Row(words, mask[start : end - 1].astype(bool).tolist(), entry.source))
            assert tokenizer.encode(" " + " ".join(words)) == tokens[start : end - 1].tolist()
            start = end
    return rows


@pytest.mark.parametrize("name", TASKS)
def test_every_written_row_is_right(name: str, tmp_path: Path) -> None:
    task = Pcfg(root=16) if name == "pcfg" else TASKS[name](seed=3)
    summary = write_task(task, output=tmp_path, examples=30, validation_examples=10)
    recorded = json.loads((tmp_path / "task.json").read_text())
    assert recorded["task"] == name and recorded["options"] == asdict(task)
    assert recorded["rows"] == dict.fromkeys(task.splits, 10) | {"train": 30}
    longest = 0
    for folder, splits in folders_of(task).items():
        rows = read_rows(tmp_path / folder)
        assert [row.split for row in rows] == [split for split in splits for _ in range(recorded["rows"][split])]
        for row in rows:
            # What task.json says is enough to check a row.
            assert CHECKERS[name](row, recorded["options"], recorded["facts"]) == ""
        longest = max(longest, *(len(row.words) for row in rows))
        assert summary.tokens[folder] == sum(len(row.words) + 1 for row in rows)
    assert summary.longest == longest and summary.rows["train"] == 30


def test_chunks_and_shards_change_no_row(tmp_path: Path) -> None:
    task, num = Sraven(), ROWS_AT_ONCE + 7
    write_task(task, output=tmp_path / "one", examples=num, validation_examples=2)
    write_task(task, output=tmp_path / "many", examples=num, validation_examples=2, shard_tokens=1)
    one, many = (read_rows(tmp_path / name / "train") for name in ("one", "many"))
    assert one == many and len(one) == num
    assert len(TokenShards(tmp_path / "many" / "train").index.shards) == 2
    write_task(task, output=tmp_path / "fewer", examples=5, validation_examples=2)
    assert read_rows(tmp_path / "fewer" / "train") == one[:5]


# -- what counts -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("task", [Parity(chain_of_thought=True), GraphColouring(seeds=2)], ids=["parity", "colouring"])
def test_only_answers_count_in_losses_weights_and_the_buffer(task: Task, tmp_path: Path) -> None:
    """The way of a batch from the data set through the loss to the buffer, against sums over the words of the rows."""
    summary = write_task(task, output=tmp_path, examples=12, validation_examples=2)
    dataset = DocumentDataset(tmp_path / "train", seq_len=2 * summary.longest + 5)
    rows = read_rows(tmp_path / "train")
    ids = torch.arange(12).view(6, 2)
    batch, labels = dataset.read(ids)
    slots = torch.arange(6)[:, None] * 2 + batch["example_index"]
    vocab_size = dataset.shards.tokenizer_info["vocab_size"]
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(*labels.shape, vocab_size, generator=generator, requires_grad=True)
    weights = torch.rand(12, generator=generator)
    result = build_example_loss()(logits, labels, weights, example_index=slots)
    expected, length = [], summary.longest
    for i, row in enumerate(rows):
        tokens = F.cross_entropy(logits[i // 2].detach(), labels[i // 2].clamp(min=0), reduction="none")
        first = (i % 2) * length
        # Label t is word t + 1.
        counted = [first + t - 1 for t, counts in enumerate(row.counts) if counts]
        expected.append(tokens[counted].mean())
        assert result.counts[i] == len(counted) == sum(row.counts)
    torch.testing.assert_close(result.losses, torch.stack(expected))
    per_row = sum(rows[0].counts)
    torch.testing.assert_close(result.weighted_sum.detach(), (torch.stack(expected) * weights).sum() * per_row)
    result.weighted_sum.backward()
    assert logits.grad is not None
    moved = logits.grad.abs().sum(-1) > 0
    assert torch.equal(moved, labels != IGNORE_INDEX) and int(moved.sum()) == 12 * per_row
    buffer = LossBuffer(12, device=torch.device("cpu"))
    buffer.record(ids.flatten(), result.losses, step=1)
    buffer.sync()
    torch.testing.assert_close(buffer.state_dict()["loss"], torch.stack(expected))


# -- folders -----------------------------------------------------------------------------------------------------------


def test_the_command_overwrites_and_refuses(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "a" / "b"
    small = ["--output", str(out), "--examples", "6", "--validation-examples", "3"]
    assert main(["sraven", *small]) == 0
    assert f"{out / 'held_out'}: 3 rows, 111 tokens" in capsys.readouterr().out
    before = files(out)
    assert main(["parity", *small]) == 2
    error = capsys.readouterr().err
    assert "holds a finished data set; choose another --output, or delete it with --overwrite" in error
    refused = [
        ["parity", "--k", "3"],
        ["parity", "--examples", "0"],
        ["recall", "--seeds", "4"],
        ["pcfg", "--root", "1"],
    ]
    for arguments in refused:
        assert main([arguments[0], *small, "--overwrite", *arguments[1:]]) == 2
        assert capsys.readouterr().err.startswith("error: ") and files(out) == before
    (out / "mine.txt").write_text("kept")
    assert main(["parity", *small, "--overwrite", "--k", "2", "--chain-of-thought"]) == 0
    assert {path.name for path in out.iterdir()} == {"train", "validation", "task.json", "mine.txt"}
    assert "seq_len = 66" in capsys.readouterr().out


def test_a_refused_command_leaves_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for arguments in (["fuzzy_logic", "--terms", "9"], ["recall", "--seeds", "3", "--examples", "4"]):
        assert main([*arguments, "--output", str(tmp_path / "new")]) == 2
    assert not list(tmp_path.iterdir())
    (tmp_path / "file").write_text("x")
    assert main(["parity", "--output", str(tmp_path / "file")]) == 2
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / "index.json").write_text('{"format": "titan_attent.images"}')
    assert main(["parity", "--output", str(tmp_path / "images"), "--overwrite"]) == 2
    assert len(files(tmp_path)) == 2 and "is not that of a data set of text" in capsys.readouterr().err


def test_equal_commands_write_equal_files(tmp_path: Path) -> None:
    for name in ("one", "two"):
        write_task(Parity(), output=tmp_path / name, examples=100, validation_examples=10)
    assert files(tmp_path / "one") == files(tmp_path / "two")
