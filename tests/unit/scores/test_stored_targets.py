"""scores/targets.py: written in place by several ranks, resumed, read by id, refused for other data."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from titan_attent.data.text.document_examples import PairPlaces
from titan_attent.scores.targets import DATA_FILE, FACTS_FILE, StoredTargets, TargetFacts, TargetsWriter, window_places

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
                places = window_places(torch.tensor([i]), seq_len=L)
                writer.write(places, ids(facts)[i : i + 1], probabilities[i : i + 1] if facts.kind == "top_k" else None)
            writer.durable(min(first + 2, until), num_records=min(first + 2, until) * L)


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
    stored.check(DATA)
    (name,) = other
    with pytest.raises(ValueError, match=f"of other examples: {name} is"):
        stored.check(DATA | other)


# -- documents ------------------------------------------------------------------------------------------------------

LENGTHS = [3, 5, 1, 4]
"""Pairs of each example of documents."""
DOCUMENTS = replace(FACTS, unit="document", num_examples=len(LENGTHS), num_pairs=sum(LENGTHS))


def places_of(rows: list[list[int]], *, skipped: int = 0, width: int = L) -> PairPlaces:
    """Examples one after the other in rows; of the first, ``skipped`` pairs are left out, and rows end at ``width``."""
    spans = []
    for number, row in enumerate(rows):
        column = 0
        for i in row:
            left_out = skipped if number == 0 and column == 0 else 0
            length = min(LENGTHS[i] - left_out, width - column)
            spans.append((number, column, sum(LENGTHS[:i]) + left_out, length))
            column += length
    return PairPlaces(*np.array(spans, dtype=np.int64).reshape(-1, 4).T)


def write_documents(folder: Path, facts: TargetFacts = DOCUMENTS, *, until: int = len(LENGTHS)) -> torch.Tensor:
    """Padded rows of one example each, in the order in which packing leaves them. Returns the records by pair."""
    num = facts.num_pairs
    records = torch.arange(num * facts.num, dtype=torch.int32).view(num, facts.num)
    writer = TargetsWriter(folder, facts=facts)
    with writer.prepared() as start:
        for first in range(start, until, 2):
            places = places_of([[first + 1], [first]])
            ids = torch.full((2, L + 2, facts.num), 99, dtype=torch.int32)
            ids.flatten(0, 1)[places.slots(L + 2)] = records[places.numbers()]
            writer.write(places, ids, (ids / 100).half() if facts.kind == "top_k" else None)
            writer.durable(first + 2, num_records=sum(LENGTHS[: first + 2]))
    return records


def test_documents_have_a_record_per_pair_and_find_it_wherever_they_are_packed(tmp_path: Path) -> None:
    records = write_documents(tmp_path)
    stored = StoredTargets(tmp_path)
    assert stored.facts == DOCUMENTS
    assert (tmp_path / DATA_FILE).stat().st_size == 4 * 3 * sum(LENGTHS)
    found, weights = stored.read_places(places_of([[3, 2], [0], []]), shape=(3, L))
    expected = torch.zeros(3, L, 3, dtype=torch.int32)
    expected[0, :4], expected[0, 4], expected[1, :3] = records[9:], records[8], records[:3]
    assert weights is None and torch.equal(found, expected)
    cut, _ = stored.read_places(places_of([[1, 0]], skipped=2, width=L), shape=(1, L))
    assert torch.equal(cut[0], torch.cat((records[5:8], records[:2]))), "both ends of a row cut an example"


def test_rows_with_others_between_them_are_written_apart(tmp_path: Path) -> None:
    records = write_documents(tmp_path / "whole")
    writer = TargetsWriter(tmp_path / "apart", facts=DOCUMENTS)
    with writer.prepared():
        for rows in ([[0], [2]], [[3], []], [[1]]):
            places = places_of(rows)
            ids = torch.zeros(len(rows), L, 3, dtype=torch.int32)
            ids.flatten(0, 1)[places.slots(L)] = records[places.numbers()]
            writer.write(places, ids, None)
        writer.durable(len(LENGTHS), num_records=sum(LENGTHS))
    assert (tmp_path / "apart" / DATA_FILE).read_bytes() == (tmp_path / "whole" / DATA_FILE).read_bytes()


def test_padding_of_rows_has_no_weight(tmp_path: Path) -> None:
    """0, not 0 / 0: a loss that does not count must not turn the gradient into NaN."""
    write_documents(tmp_path, replace(DOCUMENTS, kind="top_k"))
    _, weights = StoredTargets(tmp_path).read_places(places_of([[0]]), shape=(1, L))
    assert weights is not None
    torch.testing.assert_close(weights.sum(dim=-1), torch.tensor([[1.0, 1, 1, 0, 0]]))


def test_a_killed_writing_of_documents_is_resumed(tmp_path: Path) -> None:
    write_documents(tmp_path / "whole")
    write_documents(tmp_path / "killed", until=2)
    writer = TargetsWriter(tmp_path / "killed", facts=DOCUMENTS)
    assert (writer.num_written, writer.num_records_written) == (2, 8)
    with open(tmp_path / "killed" / DATA_FILE, "ab") as file:
        file.write(b"rows of a chunk that was not finished" * 9)
    write_documents(tmp_path / "killed")
    for name in (DATA_FILE, FACTS_FILE):
        assert (tmp_path / "killed" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    write_documents(tmp_path / "damaged", until=2)
    with open(tmp_path / "damaged" / DATA_FILE, "rb+") as file:
        file.truncate(8 * 3 * 4 - 1)
    with pytest.raises(ValueError, match="shorter than 2 examples"):
        TargetsWriter(tmp_path / "damaged", facts=DOCUMENTS)


def test_older_versions_are_read_and_units_are_not_mixed(tmp_path: Path) -> None:
    write(tmp_path / "windows", replace(FACTS, num_ids=512))
    write_documents(tmp_path / "documents")
    for name, version, missing in (("windows", 1, ("unit", "num_pairs", "num_ids")), ("documents", 2, ("num_ids",))):
        path = tmp_path / name / FACTS_FILE
        content = json.loads(path.read_text())
        now = StoredTargets(tmp_path / name).facts
        assert content["version"] == 3
        path.write_text(json.dumps({key: content[key] for key in content if key not in missing} | {"version": version}))
        assert StoredTargets(tmp_path / name).facts == replace(now, num_ids=0)
    with pytest.raises(ValueError, match="unit is 'document' in this run and 'window' in the folder"):
        StoredTargets(tmp_path / "windows").check(DATA | {"unit": "document"})


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
