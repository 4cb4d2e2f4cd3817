"""The fields that a scoring records: its loss, and the role of its model."""

import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import titan_attent.titan.patches.compat  # noqa: F401

import pytest
from torch.distributed.run import get_args_parser

from titan_attent.data.examples import ScoredData
from titan_attent.data.run_record import RunRecord, write_run_record
from titan_attent.models.vision.config import VisionConfig
from titan_attent.scores.stored import Scoring
from titan_attent.titan.scoring import targets
from titan_attent.titan.scoring.checkpoint_checks import Options, parse_options, scoring_of


def scoring(folder: Path, name: str, role: str = "", **vision: Any) -> Scoring:
    (folder / ".metadata").write_bytes(b"x")
    dataset: Any = type("Data", (), {"scored": ScoredData("f", 32, 10)})()
    config: Any = SimpleNamespace(
        checkpoint=SimpleNamespace(initial_load_path=str(folder)),
        model=SimpleNamespace(name=name, flavor="tiny"),
        training=SimpleNamespace(mixed_precision_param="float32"),
        vision=VisionConfig(**vision),
    )
    return scoring_of(config, dataset, role=role)


@pytest.mark.parametrize(
    ("name", "one", "other"),
    [
        ("vit_attent", {}, {"label_smoothing": 0.2}),
        ("vit_attent", {"label_smoothing": 0.1}, {"label_smoothing": 0.2}),
        ("mae_attent", {}, {"normalize_patches": False}),
        ("mae_attent", {}, {"mask_ratio": 0.25}),
        ("mae_attent", {}, {"patch_size": 4}),
    ],
)
def test_what_changes_the_loss_changes_its_name(
    tmp_path: Path, name: str, one: dict[str, Any], other: dict[str, Any]
) -> None:
    assert scoring(tmp_path, name, **one).loss != scoring(tmp_path, name, **other).loss


def test_what_does_not_change_the_loss_does_not_change_its_name(tmp_path: Path) -> None:
    plain = scoring(tmp_path, "vit_attent").loss
    assert plain == scoring(tmp_path, "llama3_attent").loss == "cross-entropy"
    for vision in ({"mixup": 0.8}, {"flip": 0.5}, {"drop_path": 0.1}, {"patch_size": 4}, {"mask_ratio": 0.5}):
        assert scoring(tmp_path, "vit_attent", **vision).loss == plain
    patches = scoring(tmp_path, "mae_attent").loss
    assert patches == scoring(tmp_path, "mae_attent", patch_size=2).loss  # the flavor's own
    assert patches == "squared error of normalised patches of 2 pixels, mask_ratio 0.75"


def test_the_options_of_the_command_line(tmp_path: Path) -> None:
    argv = ["--a.b", "c", "--role", "expert", "--output", "o", "--d.no-e"]
    assert parse_options(argv) == (Options(output="o", role="expert"), ["--a.b", "c", "--d.no-e"])
    assert parse_options(["--role=amateur", "--output=o"]) == (Options(output="o", role="amateur"), [])
    assert parse_options(["--a.b", "c", "--output", "o"]) == (Options(output="o"), ["--a.b", "c"])
    assert scoring(tmp_path, "llama3_attent", "expert").role == "expert"
    for argv in (["--role", "expret"], ["--role"], ["--role", "teacher"]):
        with pytest.raises(ValueError, match="--role.* one of amateur, expert"):
            parse_options([*argv, "--output", "o"] if len(argv) > 1 else ["--output", "o", *argv])
    with pytest.raises(ValueError, match="--output is missing: name the folder"):
        parse_options(["--a.b", "c"])


def test_targets_of_a_checkpoint_that_no_run_would_find_are_refused(tmp_path: Path) -> None:
    """[distillation] targets looks for step-N; and a source of another tokenizer draws ids that mean other text."""
    data: Any = SimpleNamespace(
        shards=SimpleNamespace(tokenizer_info={"name": "own", "vocab_size": 512, "sha256": "1a2b3c4d99"})
    )
    source = tmp_path / "run" / "checkpoint" / "step-4"
    targets.check_source(source, data)  # of a run that recorded nothing
    with pytest.raises(ValueError, match=r"initial_load_path = .*edited: its name is not step-N.* Rename the folder"):
        targets.check_source(tmp_path / "edited", data)
    record = RunRecord(measured={"tokenizer": "other name, 512 ids, 1a2b3c4d"})
    write_run_record(tmp_path / "run" / "teacher", record, losses=())
    targets.check_source(source, data)
    record = RunRecord(measured={"tokenizer": "own, 512 ids, 01234567"})
    write_run_record(tmp_path / "run" / "teacher", record, losses=())
    with pytest.raises(ValueError, match="initial_load_path = .*step-4: its run .* was trained with another tokenizer"):
        targets.check_source(source, data)


@pytest.mark.parametrize("kind", ["draws", "top_k"])
def test_the_temperature_of_the_largest_logit_is_a_kind(kind: str) -> None:
    words = ["--output", "o", "--temperature", "0", "--kind"]
    with pytest.raises(ValueError, match=f"--temperature 0 with --kind {kind}: .* give --kind argmax"):
        targets.parse_options([*words, kind])
    with pytest.raises(ValueError, match="--temperature = 1e-310: it must be a number at least 1e-30"):
        targets.parse_options(["--output", "o", "--temperature", "1e-310"])
    options, _ = targets.parse_options([*words, "argmax"])
    assert (options.num, options.temperature) == (1, 0.0)


def test_torchrun_passes_every_option_on() -> None:
    """It refuses an option of a script that begins two of its own: --num, of --numa-binding and --numa_binding."""
    folder = Path(targets.__file__).parent
    sources = (file.read_text(encoding="utf-8") for file in folder.glob("*.py"))
    options = sorted({option for source in sources for option in re.findall(r'add_argument\(\s*"(--\w+)"', source)})
    assert {"--ids", "--output", "--role", "--lr"} <= set(options)
    for option in options:
        words = ["targets", option, "1"]
        assert get_args_parser().parse_args(["-m", "titan_attent.score", *words]).training_script_args == words
