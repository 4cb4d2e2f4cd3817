"""The README's commands for own data, with train_configs/own_data.toml: write, score, train, validate, save, resume.

Then the guide's commands for the same data: look, the scores of a checkpoint, the report.
"""

import json
import re
import shutil
import sysconfig
from pathlib import Path

import pytest
from documented import GUIDE, ROOT, arguments_of, commands_of, module_of
from launch import read_scalars, read_tags, run

from titan_attent.data.text.__main__ import main as write_text
from titan_attent.look.command import main as look
from titan_attent.report import main as report

STDLIB = Path(sysconfig.get_paths()["stdlib"])
CHECKPOINT = "outputs/own_data/checkpoint/step-5"
INPUTS = {"web": "asyncio", "code": "json", "trusted": "email", "validation": "wsgiref"}
"""Folder in my/ -> the package whose paragraphs are its texts."""
SMALL = [
    *("--model.flavor", "bench", "--training.seq_len", "64", "--validation.seq_len", "64"),
    *("--training.global_batch_size", "4", "--training.local_batch_size", "2", "--validation.local_batch_size", "4"),
    *("--validation.freq", "2", "--validation.steps", "2", "--checkpoint.interval", "2", "--metrics.log_freq", "1"),
    *("--lr_scheduler.warmup_steps", "1"),
]

HERE = {
    **{"my.toml": "train_configs/own_data.toml", "outputs/expert/checkpoint/step-1000": CHECKPOINT},
    **{"data/quickstart/train": "data/corpus", "outputs/quickstart/scorers": "data/scorers", "512": "64"},
}
"""Path or number of the guide -> its counterpart in this test."""


def readme_commands() -> list[list[str]]:
    section = (ROOT / "README.md").read_text(encoding="utf-8").partition("\n## Three steps\n")[2]
    return commands_of(section.partition("\n## ")[0])


def guide_command(module: str, *, page: str) -> list[str]:
    """The arguments of the first command of a page of the guide that runs ``module``, for this test's folders."""
    commands = commands_of((GUIDE / page).read_text(encoding="utf-8"))
    arguments = next(arguments_of(command) for command in commands if module_of(command) == module)
    return [HERE.get(word, word) for word in arguments]


def test_the_readmes_way_for_own_data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    shutil.copytree(ROOT / "train_configs", tmp_path / "train_configs")
    for folder, package in INPUTS.items():
        (tmp_path / "my" / folder).mkdir(parents=True)
        for path in sorted((STDLIB / package).glob("*.py"))[:8]:
            for number, text in enumerate(path.read_text(encoding="utf-8").split("\n\n")):
                (tmp_path / "my" / folder / f"{path.stem}-{number}.txt").write_text(text, encoding="utf-8")
    writing, launched = [], []
    for command in readme_commands():
        if command[0] == "torchrun":
            assert command[1] == "--nproc_per_node=8"
            launched.append([module_of(command), *arguments_of(command)])
        else:
            assert command[0] == "python" and module_of(command) == "titan_attent.data.text"
            writing.append(arguments_of(command))
    assert len(writing) == 3 and [words[0] for words in launched] == ["titan_attent.score", "titan_attent.train"]
    assert all(write_text(arguments) == 0 for arguments in writing)
    (score, *scoring), (train, *training) = launched
    run(*scoring, *SMALL, module=score)
    log = run(*training, *SMALL, "--training.steps", "3", module=train)

    num_ids = json.loads((tmp_path / "data" / "corpus" / "index.json").read_text())["tokenizer"]["vocab_size"]
    assert re.search(
        rf"bench has [\d,]+ token ids, and not the 1,024 of the flavor: the data ./data/corpus has {num_ids:,}", log
    )
    folder = tmp_path / "outputs" / "own_data"
    assert list(read_scalars(folder, "validation_metrics/loss")) == [1, 2]
    (written,) = (path.parent for path in (folder / "tb").rglob("events.*"))
    assert {"custom_scalars__config__", "configuration/text_summary"} <= set(read_tags(written)["tensors"])
    assert "loss_metrics/by_source/web" in read_tags(written)["scalars"]
    assert {path.name for path in (folder / "checkpoint").glob("step-*")} == {"step-2", "step-3"}

    resumed = run(*training, *SMALL, "--training.steps", "5", module=train)
    assert "Loading the checkpoint from ./outputs/own_data/checkpoint/step-3" in resumed
    assert list(read_scalars(folder, "loss_metrics/global_avg_loss")) == [1, 2, 3, 4, 5]

    run(*guide_command("titan_attent.score", page="teacher.md"), *SMALL, module="titan_attent.score", num_processes=1)
    assert (tmp_path / "data" / "expert" / "reference.json").is_file()
    assert guide_command("titan_attent.score", page="choosing.md") == scoring
    assert guide_command("titan_attent.train", page="runs.md") == training
    assert look(guide_command("titan_attent.look", page="choosing.md")) == 0
    assert (tmp_path / "look.html").is_file()
    assert report(["outputs/own_data"]) == 0
