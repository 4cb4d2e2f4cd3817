"""The README's commands for own data, with train_configs/own_data.toml: write, score, train, validate, save, resume."""

import json
import re
import shlex
import shutil
import sysconfig
from pathlib import Path

import pytest
from launch import read_scalars, run

from titan_attent.data.text.__main__ import main as write_text

ROOT = Path(__file__).parents[2]
STDLIB = Path(sysconfig.get_paths()["stdlib"])
INPUTS = {"web": "asyncio", "code": "json", "trusted": "email", "validation": "wsgiref"}
"""Folder in my/ -> the package whose paragraphs are its texts."""
SMALL = [
    *("--model.flavor", "10M", "--training.seq_len", "64", "--validation.seq_len", "64"),
    *("--training.global_batch_size", "4", "--training.local_batch_size", "2", "--validation.local_batch_size", "4"),
    *("--validation.freq", "2", "--validation.steps", "2", "--checkpoint.interval", "2", "--metrics.log_freq", "1"),
    *("--lr_scheduler.warmup_steps", "1"),
]


def commands() -> list[list[str]]:
    """The commands of the README's section, with the loop of its shell unrolled."""
    section = (ROOT / "README.md").read_text(encoding="utf-8").partition("\n## Three steps\n")[2]
    (block,) = re.findall(r"```bash\n(.*?)```", section.partition("\n## ")[0], flags=re.S)
    names, body = re.search(r"for name in (.*?); do\n(.*?)done\n", block, flags=re.S).groups()  # type: ignore[union-attr]
    unrolled = "".join(body.replace("$name", name) for name in names.split())
    text = re.sub(r"for name in .*?done\n", lambda _: unrolled, block, flags=re.S).replace("\\\n", " ")
    return [words for line in text.splitlines() if (words := shlex.split(line, comments=True))]


def test_the_readmes_way_for_own_data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    shutil.copytree(ROOT / "train_configs", tmp_path / "train_configs")
    for folder, package in INPUTS.items():
        (tmp_path / "my" / folder).mkdir(parents=True)
        for path in sorted((STDLIB / package).glob("*.py")):
            for number, text in enumerate(path.read_text(encoding="utf-8").split("\n\n")):
                (tmp_path / "my" / folder / f"{path.stem}-{number}.txt").write_text(text, encoding="utf-8")
    writing, launched = [], []
    for command in commands():
        if command[0] == "torchrun":
            assert command[1] == "--nproc_per_node=8" and command[2] == "-m"
            launched.append(command[3:])
        else:
            assert command[:3] == ["python", "-m", "titan_attent.data.text"]
            writing.append(command[3:])
    assert len(writing) == 3 and [words[0] for words in launched] == ["titan_attent.score", "titan_attent.train"]
    assert all(write_text(arguments) == 0 for arguments in writing)
    (score, *scoring), (train, *training) = launched
    run(*scoring, *SMALL, module=score)
    log = run(*training, *SMALL, "--training.steps", "3", module=train)

    num_ids = json.loads((tmp_path / "data" / "corpus" / "index.json").read_text())["tokenizer"]["vocab_size"]
    assert re.search(rf"10M has [\d,]+ token ids: the data ./data/corpus has {num_ids:,}", log)
    folder = tmp_path / "outputs" / "own_data"
    assert list(read_scalars(folder, "validation_metrics/loss")) == [1, 2]
    assert {path.name for path in (folder / "checkpoint").glob("step-*")} == {"step-2", "step-3"}

    resumed = run(*training, *SMALL, "--training.steps", "5", module=train)
    assert "Loading the checkpoint from ./outputs/own_data/checkpoint/step-3" in resumed
    assert list(read_scalars(folder, "loss_metrics/global_avg_loss")) == [1, 2, 3, 4, 5]
