"""The role in which a run reads losses against the role in their files; and files of earlier versions."""

import json
import logging
import os
import shutil
import tempfile
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from titan_attent.data.examples import ScoredData
from titan_attent.scores.provenance import check_scores
from titan_attent.scores.stored import CROSS_ENTROPY, Scoring, StoredScores, with_inferred_fields
from titan_attent.scores.writer import ScoresWriter
from titan_attent.systems.teaching.checks import check_data
from titan_attent.systems.teaching.config import TeacherConfig
from titan_attent.systems.teaching.config_checks import check_config, check_scores_named

NUM, NUM_TRUSTED = 40, 35
SCORING = Scoring(
    data_fingerprint="data",
    seq_len=16,
    num_examples=NUM,
    model="bigram",
    precision="float64",
    checkpoint="counts of 30 examples of data",
    checkpoint_sha256="of the amateur",
    loss=CROSS_ENTROPY,
    role="amateur",
)
EXPERT = replace(
    SCORING, role="expert", checkpoint="counts of 30 examples of s/trusted/train", checkpoint_sha256="of the expert"
)


def write(folder: Path, scoring: Scoring, *, seed: int) -> None:
    with ScoresWriter(folder, scoring=scoring) as writer:
        writer.append(torch.rand(scoring.num_examples, generator=torch.Generator().manual_seed(seed)))
        writer.finish()


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The output of titan_attent.score pair: two folders of losses, each with a folder for trusted text."""
    folder = tmp_path_factory.mktemp("scorers")
    for seed, scoring in enumerate((SCORING, EXPERT)):
        trusted = replace(scoring, data_fingerprint="held out", num_examples=NUM_TRUSTED)
        write(folder / scoring.role, scoring, seed=seed)
        write(folder / scoring.role / "trusted", trusted, seed=seed + 2)
    return folder


@pytest.fixture
def scorers(made: Path, tmp_path: Path) -> Path:
    shutil.copytree(made, tmp_path / "scorers")
    return tmp_path / "scorers"


def change(folder: Path, *gone: str, **fields: Any) -> None:
    file = folder / "reference.json"
    kept = {name: value for name, value in json.loads(file.read_text()).items() if name not in gone}
    file.write_text(json.dumps(kept | fields))


class Data:
    stored, seq_len, scored = SimpleNamespace(fingerprint="data"), 16, ScoredData("data", 16, NUM)

    def __len__(self) -> int:
        return NUM


def check(
    amateur: Path | None, reference: Path, *, importance: str = "cross_entropy_difference", loss: str = CROSS_ENTROPY
) -> None:
    """The checks of preflight for a run that reads these two."""
    scores = reference
    if amateur is not None:
        scores = Path(tempfile.mkdtemp(dir=reference.parent))
        (scores / "amateur").symlink_to(amateur)
        (scores / "expert").symlink_to(reference)
    config = TeacherConfig(
        strategy="hard",
        importance=importance,
        ratio_schedule="calibrated" if importance == "cross_entropy_difference" else "constant",
        scores=str(scores),
    )
    check_config(config)
    check_scores_named(config)
    facts: Any = SimpleNamespace(dataset=Data(), batch_size=4, open_scores=StoredScores, loss=loss)
    check_data(config, facts)


def test_a_pair_of_scorers_causes_no_warning(scorers: Path, caplog: pytest.LogCaptureFixture) -> None:
    check(scorers / "amateur", scorers / "expert")
    check(scorers / "amateur", scorers / "expert", importance="excess_loss")
    check(None, scorers / "expert", importance="excess_loss")
    assert not caplog.records


def test_exchanged_folders_are_refused_by_name(scorers: Path) -> None:
    message = r"scores: .*amateur holds the losses of the expert \(bigram, .*Are the two folders exchanged"
    with pytest.raises(ValueError, match=message):
        check(scorers / "expert", scorers / "amateur")
    shutil.copytree(scorers / "expert", scorers / "moved")
    with pytest.raises(ValueError, match="scores: .*amateur holds the losses of the expert"):
        check(scorers / "moved", scorers / "amateur")
    message = "scores = .*amateur: holds only the losses of the amateur, and importance = .* needs those of the expert"
    with pytest.raises(ValueError, match=message):
        check(None, scorers / "amateur", importance="excess_loss")


@pytest.mark.parametrize("name", ["amateur", "expert"])
@pytest.mark.parametrize("importance", ["cross_entropy_difference", "excess_loss"])
def test_one_model_twice_is_refused(scorers: Path, name: str, importance: str) -> None:
    folder = scorers / name
    for path in (folder, folder / "trusted"):  # without a role
        change(path, "role", "loss", model="llama3_attent tiny", checkpoint="/run/checkpoint/step-3")
    with pytest.raises(ValueError, match="are one folder: a model.s difference to itself says nothing"):
        check(folder, folder, importance=importance)
    link = scorers / "link"
    link.symlink_to(folder)
    with pytest.raises(ValueError, match="are one folder"):
        check(link, folder, importance=importance)
    shutil.copytree(folder, scorers / "copy")
    with pytest.raises(ValueError, match="hold the same losses"):
        check(scorers / "copy", folder, importance=importance)
    shutil.rmtree(scorers / "copy")  # again, in another precision
    sha = json.loads((folder / "reference.json").read_text())["checkpoint_sha256"]
    write(scorers / "copy", replace(SCORING, role="", precision="bfloat16", checkpoint_sha256=sha), seed=9)
    with pytest.raises(ValueError, match=r"were written by one model \(bigram, counts of"):
        change(scorers / "copy", role="amateur")
        check(scorers / "copy", folder, importance=importance)


def test_trusted_folders(scorers: Path) -> None:
    amateur, expert = scorers / "amateur", scorers / "expert"
    with pytest.raises(ValueError, match="holds the scores of other examples: .*'held out' in the folder"):
        check(amateur, expert / "trusted")
    shutil.move(amateur / "trusted", scorers / "away")
    shutil.copytree(expert / "trusted", amateur / "trusted")
    with pytest.raises(ValueError, match="trusted: its checkpoint_sha256 is .*by the model that scored the data"):
        check(amateur, expert)
    shutil.rmtree(amateur / "trusted")
    shutil.copytree(amateur, scorers / "copy")
    shutil.move(scorers / "copy", amateur / "trusted")
    with pytest.raises(ValueError, match="trusted: holds losses of the data itself"):
        check(amateur, expert)
    shutil.rmtree(amateur / "trusted")
    shutil.move(scorers / "away", amateur / "trusted")
    check(amateur, expert)
    change(amateur / "trusted", seq_len=8)
    with pytest.raises(ValueError, match="hold losses of different examples"):
        check(amateur, expert)


def test_other_data_and_another_length(scorers: Path) -> None:
    for field, value in (("data_fingerprint", "cafe"), ("seq_len", 8)):
        shutil.copytree(scorers, other := scorers.parent / field)
        change(other / "expert", **{field: value})
        with pytest.raises(
            ValueError, match=f"of other examples: {field} is .* in this run and '?{value}'? in the folder"
        ):
            check(other / "amateur", other / "expert")


@pytest.mark.parametrize(
    ("stored", "own"),
    [
        ("cross-entropy, label_smoothing 0.2", CROSS_ENTROPY),
        (
            "squared error of normalised patches of 4 pixels, mask_ratio 0.75",
            "squared error of patches of 4 pixels, mask_ratio 0.75",
        ),
    ],
)
def test_two_losses_are_not_subtracted(scorers: Path, stored: str, own: str) -> None:
    change(scorers / "expert", loss=stored)
    with pytest.raises(ValueError, match="scores: the losses in .*expert are .*, and the learner's is .*Score"):
        check(None, scorers / "expert", importance="excess_loss", loss=own)
    with pytest.raises(ValueError, match="scores: the losses in .*amateur are .*, and the expert's is .*means nothing"):
        check(scorers / "amateur", scorers / "expert")
    check(None, scorers / "expert", importance="excess_loss", loss=stored)


@pytest.mark.parametrize(
    ("model", "checkpoint", "expected"),
    [
        ("bigram", "counts of 30 examples of data", (CROSS_ENTROPY, "amateur")),
        ("bigram", "counts of 30 examples of out/s c/trusted/train", (CROSS_ENTROPY, "expert")),
        ("llama3_attent scorer_xs", "/s/models/amateur/checkpoint/step-300", (CROSS_ENTROPY, "amateur")),
        ("llama3_attent scorer_xs", "/s/models/expert/checkpoint/step-300", (CROSS_ENTROPY, "expert")),
        ("llama3_attent 8B", "/expert/checkpoint/step-9", (CROSS_ENTROPY, "")),
        ("vit_attent tiny", "/runs/a/checkpoint/step-9", ("", "")),
    ],
)
def test_loss_and_role_of_a_file_of_an_earlier_version(
    scorers: Path, model: str, checkpoint: str, expected: tuple[str, str]
) -> None:
    change(scorers / "expert", "loss", "role", model=model, checkpoint=checkpoint)
    found = StoredScores(scorers / "expert")
    assert (found.loss, found.role) == expected and (found.scoring.loss, found.scoring.role) == ("", "")
    stated = {"loss": "x", "role": "y", "model": model}
    assert with_inferred_fields(stated) == stated


def test_files_of_earlier_versions_are_read_and_an_unknown_role_is_logged_once(
    scorers: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    for folder in ("amateur", "amateur/trusted", "expert", "expert/trusted"):
        change(scorers / folder, "loss", "role")
    check(scorers / "amateur", scorers / "expert")  # the role follows from their checkpoints
    assert not caplog.records
    with pytest.raises(ValueError, match="holds the losses of the expert"):
        check(scorers / "expert", scorers / "amateur")
    for folder in ("expert", "expert/trusted"):
        change(scorers / folder, model="llama3_attent 8B", checkpoint="/run/checkpoint/step-3")
    caplog.set_level(logging.WARNING)
    check(scorers / "amateur", scorers / "expert")
    (record,) = caplog.records
    assert "expert does not say whether an amateur or an expert wrote the losses" in record.getMessage()
    assert "--role expert" in record.getMessage() and "llama3_attent 8B, /run/checkpoint/step-3" in record.getMessage()
    caplog.clear()
    monkeypatch.setitem(os.environ, "RANK", "1")
    check(scorers / "amateur", scorers / "expert")
    assert not caplog.records


def test_an_unrecorded_loss_of_images_is_logged(scorers: Path, caplog: pytest.LogCaptureFixture) -> None:
    change(scorers / "expert", "loss", "role", model="vit_attent tiny", checkpoint="/run/checkpoint/step-3")
    check(None, scorers / "expert", importance="excess_loss")
    (record,) = caplog.records
    assert "does not say which loss it holds" in record.getMessage()


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_a_loss_that_is_not_finite_is_counted_and_refused(scorers: Path, value: float) -> None:
    file = scorers / "expert" / "losses.bin"
    losses = np.fromfile(file, dtype="<f4")
    losses[[7, 11, 39]] = value
    losses.tofile(file)
    found = StoredScores(scorers / "expert")
    assert found.read(8, 11).shape == (3,)
    message = (
        "losses.bin: 3 of the 40 losses are not finite, first those of examples 7, 11, 39: examples cannot be selected"
    )
    for start, stop in ((0, 40), (7, 8), (30, 40)):
        with pytest.raises(ValueError, match=message):
            found.read(start, stop)
        with pytest.raises(ValueError, match=message):
            found.check_finite(start, stop)
    found.check_finite(0, 7)
    trusted = scorers / "amateur" / "trusted" / "losses.bin"
    np.full(NUM_TRUSTED, value, "<f4").tofile(trusted)
    with pytest.raises(ValueError, match="trusted/losses.bin: 35 of the 35 losses are not finite"):
        check(scorers / "amateur", scorers / "expert")


@pytest.mark.parametrize("seconds", ["NaN", "Infinity", "-1", "-1e-9", "true", '"12"', "null", "[1]", "1e999"])
def test_a_cost_that_cannot_be(scorers: Path, seconds: str) -> None:
    (scorers / "expert" / "cost.json").write_text(f'{{"device_seconds": {seconds}}}')
    with pytest.raises(ValueError, match=r"cost.json: malformed \(device_seconds is.*\); remove it"):
        StoredScores(scorers / "expert")


@pytest.mark.parametrize(
    "fields",
    [
        {"num_examples": 40.0},
        {"num_examples": True},
        {"num_examples": -1},
        {"seq_len": 16.5},
        {"role": "teacher"},
        {"role": 1},
        {"loss": None},
        {"sha256": 5},
    ],
)
def test_counts_and_names_that_cannot_be(scorers: Path, fields: dict[str, Any]) -> None:
    change(scorers / "expert", **fields)
    ((name, _),) = fields.items()
    with pytest.raises(ValueError, match=rf"reference.json: malformed \({name} is.*\); copy the folder again"):
        StoredScores(scorers / "expert")


def test_a_scoring_resumed_with_another_loss_or_role_is_refused(tmp_path: Path) -> None:
    smoothed = replace(SCORING, model="vit_attent tiny", loss=f"{CROSS_ENTROPY}, label_smoothing 0.2", role="")

    def begin(folder: Path, scoring: Scoring) -> Path:
        with ScoresWriter(folder, scoring=scoring) as writer:
            writer.append(torch.ones(3))
        return folder

    folder = begin(tmp_path / "a", smoothed)
    with pytest.raises(
        ValueError, match="another interrupted scoring: loss was 'cross-entropy, label_smoothing 0.2' and is"
    ):
        ScoresWriter(folder, scoring=replace(smoothed, loss=CROSS_ENTROPY))
    assert ScoresWriter(folder, scoring=smoothed).num_scored == 3
    assert (
        ScoresWriter(folder, scoring=replace(smoothed, role="expert")).num_scored == 3
    )  # the role was not stated before
    folder = begin(tmp_path / "b", EXPERT)
    with pytest.raises(ValueError, match="another interrupted scoring: role was 'expert' and is 'amateur'"):
        ScoresWriter(folder, scoring=replace(EXPERT, role="amateur"))
    # Begun by an earlier version: a model of text has one loss, that of images is unknown.
    for model, is_text in (("bigram", True), ("vit_attent tiny", False)):
        folder = begin(tmp_path / model, replace(SCORING, model=model, loss="", role=""))
        now = replace(SCORING, model=model)
        if is_text:
            assert ScoresWriter(folder, scoring=now).num_scored == 3
        else:
            with pytest.raises(ValueError, match="loss was '' and is 'cross-entropy'"):
                ScoresWriter(folder, scoring=now)


def test_no_losses_no_checks() -> None:
    check_scores({}, learners_loss="", compared=False)


def test_an_experts_losses_in_the_amateurs_folder(scorers: Path) -> None:
    shutil.copytree(scorers / "expert", scorers / "other")
    change(scorers / "other", "role", model="x", checkpoint="y", checkpoint_sha256="z", sha256="s")
    with pytest.raises(ValueError, match="scores: .*amateur holds the losses of the expert"):
        check(scorers / "expert", scorers / "other", importance="excess_loss")
