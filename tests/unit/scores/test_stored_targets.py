"""scores/targets.py: written in place by several ranks, resumed, read by id, refused for other data."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from titan_attent.scores.targets import DATA_FILE, FACTS_FILE, StoredTargets, TargetFacts, TargetsWriter

L, NUM_EXAMPLES = 5, 7
FACTS = TargetFacts(
    data_fingerprint="f" * 8,
    seq_len=L,
    num_examples=NUM_EXAMPLES,
    tokenizer="512 ids, 0123456789abcdef",
    model="llama3_attent scorer_s",
    precision="float32",
    checkpoint="somewhere/step-10",
    checkpoint_sha256="c" * 64,
    kind="draws",
    num=3,
    temperature=1.0,
    seed=0,
)
DATA = {"data_fingerprint": "f" * 8, "seq_len": L, "num_examples": NUM_EXAMPLES, "tokenizer": FACTS.tokenizer}


def ids(facts: TargetFacts = FACTS) -> torch.Tensor:
    return torch.arange(NUM_EXAMPLES * L * facts.num, dtype=torch.int32).view(NUM_EXAMPLES, L, facts.num)


def write(folder: Path, facts: TargetFacts = FACTS, *, until: int = NUM_EXAMPLES) -> None:
    """As two ranks would, the later rows first."""
    writer = TargetsWriter(folder, facts=facts)
    probabilities = torch.linspace(0.1, 0.9, NUM_EXAMPLES * L * facts.num).view(ids(facts).shape).half()
    with writer.prepared() as start:
        for first in range(start, until, 2):
            for i in reversed(range(first, min(first + 2, until))):
                writer.write(i, ids(facts)[i : i + 1], probabilities[i : i + 1] if facts.kind == "top_k" else None)
            writer.durable(min(first + 2, until))


def test_what_is_written_is_read_by_id(tmp_path: Path) -> None:
    write(tmp_path)
    stored = StoredTargets(tmp_path)
    found, weights = stored.read(torch.tensor([6, 0, 3, 3]))
    assert weights is None and found.dtype == torch.int32 and torch.equal(found, ids()[[6, 0, 3, 3]])
    assert stored.facts == FACTS and (tmp_path / DATA_FILE).stat().st_size == NUM_EXAMPLES * L * 3 * 4
    with pytest.raises(IndexError, match="outside"):
        stored.read(torch.tensor([7]))


def test_argmax_takes_four_bytes_a_token(tmp_path: Path) -> None:
    facts = replace(FACTS, kind="argmax", num=1, temperature=0.0)
    write(tmp_path, facts)
    assert (tmp_path / DATA_FILE).stat().st_size == 4 * NUM_EXAMPLES * L
    assert torch.equal(StoredTargets(tmp_path).read(torch.tensor([2]))[0], ids(facts)[2:3])


def test_top_k_has_weights_that_sum_to_one(tmp_path: Path) -> None:
    facts = replace(FACTS, kind="top_k")
    write(tmp_path, facts)
    found, weights = StoredTargets(tmp_path).read(torch.tensor([1, 4]))
    assert torch.equal(found, ids()[[1, 4]]) and weights is not None
    torch.testing.assert_close(weights.sum(dim=-1), torch.ones(2, L))
    assert (weights.diff(dim=-1) > 0).all()


def test_a_killed_writing_is_resumed(tmp_path: Path) -> None:
    write(tmp_path / "whole")
    write(tmp_path / "killed", until=4)
    with pytest.raises(ValueError, match="unfinished; run the same command again"):
        StoredTargets(tmp_path / "killed")
    with open(tmp_path / "killed" / DATA_FILE, "ab") as file:
        file.write(b"rows of a chunk that was not finished")
    assert TargetsWriter(tmp_path / "killed", facts=replace(FACTS, checkpoint="moved")).num_written == 4
    write(tmp_path / "killed")
    for name in (DATA_FILE, FACTS_FILE):
        assert (tmp_path / "killed" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


def test_another_writing_into_the_folder_is_refused(tmp_path: Path) -> None:
    write(tmp_path / "killed", until=4)
    with pytest.raises(ValueError, match="other unfinished targets: checkpoint_sha256 was .* seed was 0 and is 5"):
        TargetsWriter(tmp_path / "killed", facts=replace(FACTS, checkpoint_sha256="d" * 64, seed=5))
    write(tmp_path / "done")
    with pytest.raises(ValueError, match="holds finished targets"):
        TargetsWriter(tmp_path / "done", facts=FACTS)
    first, second = (TargetsWriter(tmp_path / "killed", facts=FACTS).prepared() for _ in range(2))
    with first, pytest.raises(ValueError, match="another writer"), second:
        pass


@pytest.mark.parametrize(
    "other", [{"data_fingerprint": "e" * 8}, {"seq_len": 6}, {"num_examples": 8}, {"tokenizer": "512 ids, another"}]
)
def test_targets_of_other_data_are_refused(other: dict, tmp_path: Path) -> None:
    write(tmp_path)
    stored = StoredTargets(tmp_path)
    stored.check(**DATA)  # type: ignore[arg-type]
    (name,) = other
    with pytest.raises(ValueError, match=f"of other examples: {name} is"):
        stored.check(**(DATA | other))  # type: ignore[arg-type]


def test_damaged_folders_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="none are there"):
        StoredTargets(tmp_path)
    write(tmp_path)
    np.zeros(3, dtype=np.int32).tofile(tmp_path / DATA_FILE)
    with pytest.raises(ValueError, match="has 12 bytes instead of 420"):
        StoredTargets(tmp_path)
    (tmp_path / FACTS_FILE).write_text('{"format": "titan_attent.targets", "version": 1, "num": "x"}')
    with pytest.raises(ValueError, match="malformed"):
        StoredTargets(tmp_path)
