"""The guide's commands run as they stand, in the order of its pages, on small inputs of the kinds that they name.

The commands that write data run here, those that a run needs in test_own_data.py.
"""

import io
import json
import shutil
import sysconfig
import tarfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from documented import GUIDE, ROOT, arguments_of, commands_of, module_of
from PIL import Image

from titan_attent.data.images.__main__ import main as write_images
from titan_attent.data.text.__main__ import main as write_text
from titan_attent.data.text.boundaries import main as find_boundaries

STDLIB = Path(sysconfig.get_paths()["stdlib"])
WRITERS: dict[str, Callable[[list[str]], int]] = {
    "titan_attent.data.text": write_text,
    "titan_attent.data.text.boundaries": find_boundaries,
    "titan_attent.data.images": write_images,
}
IN_A_RUN = {"titan_attent.look", "titan_attent.score", "titan_attent.train"}
"""Modules whose commands test_own_data.py runs."""
PLACEHOLDERS = {
    "python -m titan_attent.data.text INPUT ...": "python -m titan_attent.data.text corpus/code",
    "python -m titan_attent.data.images INPUT ...": "python -m titan_attent.data.images photos/train",
    "NAME|PATH|train:VOCAB_SIZE": "train:512",
    "--tokenizer ...": "--tokenizer data/1/tokenizer.tiktoken",
    "--tokenizer o200k_base": "--tokenizer data/1/tokenizer.tiktoken",  # no test downloads
    ".boundaries DIR": ".boundaries data/1",
}
"""What the pages leave open -> what stands there here."""


def guide_commands(*pages: str) -> list[list[str]]:
    """The commands of ``pages``, by default of all of the guide, in their order."""
    names = pages or sorted(path.name for path in GUIDE.glob("*.md"))
    text = "\n".join((GUIDE / name).read_text(encoding="utf-8") for name in names)
    for placeholder, here in PLACEHOLDERS.items():
        assert pages or placeholder in text
        text = text.replace(placeholder, here)
    return commands_of(text)


@pytest.fixture
def inputs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working folder, with the inputs that the pages name."""
    monkeypatch.chdir(tmp_path)
    shutil.copytree(STDLIB / "json", tmp_path / "corpus" / "code", ignore=shutil.ignore_patterns("__pycache__"))
    (tmp_path / "corpus" / "web").mkdir()
    paragraphs = (STDLIB / "asyncio" / "tasks.py").read_text(encoding="utf-8").split("\n\n")
    texts = [{"text": paragraph} for paragraph in paragraphs]
    pairs = [{"prompt": "Say it", "response": paragraph} for paragraph in paragraphs]
    chats = [
        {"messages": [{"role": "user", "content": "Say it"}, {"role": "assistant", "content": paragraph}]}
        for paragraph in paragraphs
    ]
    for path, rows in (("corpus/web/0.jsonl", texts), ("pairs.jsonl", pairs), ("chats.jsonl", chats)):
        (tmp_path / path).write_text("".join(json.dumps(row) + "\n" for row in rows))
    pixels = np.random.default_rng(0).integers(256, size=(4, 32, 32, 3), dtype=np.uint8)
    files = []
    for i, picture in enumerate(pixels):
        Image.fromarray(picture).save(file := io.BytesIO(), format="png")
        files.append(file.getvalue())
        for split in ("train", "val"):
            path = tmp_path / "photos" / split / ("cat", "dog")[i % 2] / f"{i}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(file.getvalue())
    for folder in ("imagenet/data", "fashion", "shards"):
        (tmp_path / folder).mkdir(parents=True)
    table = {"image": [{"bytes": data, "path": None} for data in files], "label": [0, 1, 0, 1]}
    pq.write_table(pa.table(table), tmp_path / "imagenet" / "data" / "train-0.parquet")
    np.savez(tmp_path / "fashion" / "train.npz", images=pixels[..., 0], labels=np.array([0, 1, 0, 1]))
    with tarfile.open(tmp_path / "shards" / "0.tar", "w") as archive:
        for i, data in enumerate(files):
            for name, content in ((f"{i}.png", data), (f"{i}.cls", str(i % 2).encode())):
                member = tarfile.TarInfo(name)
                member.size = len(content)
                archive.addfile(member, io.BytesIO(content))
    return tmp_path


def test_the_commands_that_write_data(inputs: Path) -> None:
    written = 0
    for command in guide_commands("text.md", "images.md", "vision.md"):
        if module_of(command) not in WRITERS:
            continue
        arguments = arguments_of(command)
        if "--output" in arguments:  # the pages name one folder for data of several kinds
            written += 1
            arguments[arguments.index("--output") + 1] = f"data/{written}"
        assert WRITERS[module_of(command)](arguments) == 0, command
    assert written == 11


def test_every_command_of_the_guide_is_run() -> None:
    for command in guide_commands():
        if module_of(command):
            assert module_of(command) in WRITERS.keys() | IN_A_RUN, command
        else:  # of Slurm, and of minutes: what they start is there
            (script,) = (word for word in command if word.startswith("scripts/"))
            assert command[0] in ("bash", "sbatch") and (ROOT / script).is_file()
            assert all((ROOT / word).is_file() for word in command if word.endswith(".toml"))
