"""The editing experiment: its languages and packages, its trainings, the evaluation, and its page."""

import math
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn.functional import cross_entropy

from benchmarks.common.evaluate import evaluate, load_weights
from benchmarks.editing import languages, packages, page, runs
from titan_attent.data.text.document_examples import DocumentDataset
from titan_attent.foundations.toml import to_toml
from titan_attent.losses.cross_entropy import IGNORE_INDEX

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib


@pytest.mark.parametrize("seed", range(3))
def test_languages_are_aligned_irrelevant_and_contradictory(seed: int) -> None:
    of = languages.meanings(seed)
    base, first = of["base"], of["first"]
    assert len(base) == 64 and all(len(own) == 32 for name, own in of.items() if name != "base")
    for name, own in of.items():
        assert name == "base" or all(base[word] != meaning for word, meaning in own.items())
    assert sum(first.get(word) == meaning for word, meaning in of["aligned"].items()) == 24
    assert not first.keys() & of["irrelevant"].keys()
    assert first.keys() == of["contradictory"].keys()
    assert all(first[word] != meaning for word, meaning in of["contradictory"].items())


def test_only_meanings_are_labels_and_they_are_those_of_the_language(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(languages, "SENTENCES", dict.fromkeys(languages.SENTENCES, 200))
    languages.write_languages(tmp_path, 1)
    dataset = DocumentDataset(str(tmp_path / "aligned" / "train"), seq_len=languages.LONGEST)
    assert len(dataset) == 200
    columns, labels = dataset.read(torch.arange(200))
    rows, places = (labels != IGNORE_INDEX).nonzero(as_tuple=True)
    assert rows.tolist() == list(range(200))  # one label per sentence
    first_word = 256
    for row, place in zip(rows.tolist(), places.tolist(), strict=True):
        word = languages.NAMES[columns["input"][row, place - 1] - first_word]
        meaning = languages.NAMES[labels[row, place] - first_word]
        assert meaning == f"m{languages.meanings(1)['aligned'][int(word[1:])]}"


def test_pieces_of_a_package_are_in_one_part() -> None:
    divided = packages.pieces_of(0)
    for parts in divided.values():
        pieces = [piece for part in packages.PARTS for piece in parts[part]]
        assert len(parts["validation"]) == len(parts["control"]) > 10 and len(parts["train"]) > 40
        assert np.mean([len(piece) for piece in pieces]) > 0.8 * packages.PIECE
    assert any("import tkinter" in piece or "from tkinter" in piece for piece in divided["aligned"]["train"])


def test_a_part_has_every_training_before_its_measurement() -> None:
    for part in runs.PARTS:
        *trainings, measured = runs.tasks_of(part, 1)
        before: set[str] = set()
        for task in trainings:
            assert before >= set(task.needs) and tomllib.loads(to_toml(task.config)) == task.config
            before.add(task.folder)
        assert set(measured.needs) == before and measured.module == runs.MEASURE
    ascent = runs.unlearning_runs(0)["ascent"].config
    assert ascent["ascent"]["enable"] and ascent["lr_scheduler"]["min_lr_factor"] == 1.0


def test_evaluation_against_one_row_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from dataclasses import replace

    from torch.distributed.checkpoint import save
    from torchtitan.models.llama3.model.model import Transformer

    from titan_attent.titan.models.flavors import EXTRA_FLAVORS

    monkeypatch.setattr(languages, "SENTENCES", dict.fromkeys(languages.SENTENCES, 60))
    languages.write_languages(tmp_path, 0)
    data = str(tmp_path / "first" / "train")
    args: Any = EXTRA_FLAVORS["llama3"]["bench"]
    torch.manual_seed(0)
    model = Transformer(replace(args, max_seq_len=8, vocab_size=384)).eval()
    with torch.no_grad():
        model.init_weights()
    save(dict(model.named_parameters()), checkpoint_id=tmp_path / "step-1", no_dist=True)
    dataset = DocumentDataset(data, seq_len=8)
    losses, right = [], []
    with torch.no_grad():
        for number in range(len(dataset)):
            columns, labels = dataset.read(torch.tensor([number]))
            place = int((labels[0] != IGNORE_INDEX).nonzero())
            logits = model(columns["input"][:, : place + 1])[0, -1]
            losses.append(float(cross_entropy(logits, labels[0, place])))
            right.append(int(logits.argmax() == labels[0, place]))
    measured = evaluate(load_weights(tmp_path / "step-1"), data, flavor="bench", seq_len=8)
    assert measured.loss == pytest.approx(np.mean(losses), rel=1e-5) and measured.accuracy == np.mean(right)
    with pytest.raises(ValueError, match=r"the weights lack \['norm.weight'\]"):
        lacking = {name: value for name, value in load_weights(tmp_path / "step-1").items() if name != "norm.weight"}
        evaluate(lacking, data, flavor="bench", seq_len=8)


# -- the page ---------------------------------------------------------------------------------------------------------


def edits(*, both: float, keeps: float) -> dict[str, list[float]]:
    """Edit -> losses, with the smaller accuracy of addition and what negation keeps."""
    found = {"base": [0.0, 9.0, 0.0, 9.0], "first": [1.0, 0.1, 0.1, 5.0], "other": [0.1, 5.0, 1.0, 0.1]}
    for c in ("0.25", "0.5", "0.75", "1"):
        found[f"first + {c} other"] = [0.9, 0.5, both if c == "0.75" else 0.0, 0.5]
        found[f"first - {c} other"] = [keeps if c == "0.5" else 0.0, 0.5, 0.0, 7.5]
        found |= {f"first {sign} {c} random": [1.0, 0.1, 0.2, 5.0] for sign in "+-"}
    return found


def test_languages_are_judged_by_their_order_in_each_seed() -> None:
    good = {"aligned": edits(both=0.8, keeps=0.5), "irrelevant": edits(both=0.7, keeps=0.9)}
    good["contradictory"] = edits(both=0.3, keeps=0.8)
    bad = good | {"contradictory": edits(both=0.75, keeps=0.8)}
    text = "\n".join(page.languages_page([{"edits": good, "seed": 0}, {"edits": bad, "seed": 1}]))
    assert "  1 of 2 seeds: depends on the seed." in text and "  2 of 2 seeds: reproduced." in text
    assert "| irrelevant | 70.0% | 20.0% | 90.0% | 2.50 |" in text


def test_the_amount_is_chosen_on_the_control_set_within_its_budget() -> None:
    def losses(target: float, rest: float) -> dict[str, float]:
        names = ("target", "aligned", "irrelevant", "rest")
        values = {"target": target, "rest": rest, "aligned": 2.0, "irrelevant": 2.0}
        return {f"{name}/{part}": values[name] for name in names for part in ("control", "validation")}

    arms = {"vector": {"0.5": losses(2.5, 2.01), "1": losses(3.0, 2.03), "2": losses(4.0, 2.05)}}
    arms |= {"random": {"1": losses(2.1, 2.2)}, "ascent": {"4": losses(2.2, 2.04), "8": losses(1.9, 2.0)}}
    result = {"base": losses(2.0, 2.0), "arms": arms}
    assert [page.chosen(result, arm)[0] for arm in arms] == ["1", "0", "4"]
    text = "\n".join(page.unlearning_page([result]))
    assert "| vector | 1 (coefficient) | +50.0% | +0.0% | +0.0% | +1.5% |" in text
    assert "| random | 0 (coefficient) | +0.0% |" in text


def test_means_are_compared_with_decays_of_the_same_steps() -> None:
    losses = {"constant": 3.0} | {f"mean_{last}": 2.9 for last in runs.LAST}
    losses |= {f"decayed_{last}": 2.8 for last in runs.LAST}
    text = "\n".join(page.means_page([{"losses": losses}]))
    assert "| 8 | 200 | +0.100 | -0.100 | -0.200 |" in text and not math.isnan(losses["constant"])
