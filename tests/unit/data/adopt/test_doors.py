"""The commands of docs/reference/adopting.md, run on files of each format."""

import json
import re
import shlex
from pathlib import Path

import numpy as np
import pyarrow
import pytest
import token_files
from token_files import check, make_documents, write_ranks

from titan_attent.data.adopt.__main__ import main

PAGE = Path(__file__).parents[4] / "docs" / "reference" / "adopting.md"
EOS = 1000


def doors() -> list[str]:
    """The arguments in the table of doors, then those of the code blocks that name files of this test."""
    page = PAGE.read_text(encoding="utf-8")
    rows = re.findall(r"^\|[^|]*\| `(data/[^`]*)` \|", page, flags=re.MULTILINE)
    blocks = re.findall(r"^python -m titan_attent.data.adopt (.*ranks.*)$", page, flags=re.MULTILINE)
    return rows + blocks


@pytest.fixture
def files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    write_ranks(tmp_path / "ranks.tiktoken", num_ranks=1000)
    data = tmp_path / "data"
    for name in ("megatron", "code", "llmc", "olmo/masks", "nanogpt", "numpy", "datatrove"):
        (data / name).mkdir(parents=True)
    return data


def test_every_door_of_the_page(files: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plain, ended, begun = make_documents(), make_documents(last=EOS), make_documents(first=900, vocab_size=900)
    mask = np.arange(sum(map(len, plain))) % 3 == 0
    token_files.megatron(files / "megatron" / "a", plain)
    token_files.megatron(files / "code" / "a", plain)
    token_files.llmc(files / "llmc" / "a_000001.bin", begun)
    token_files.raw(files / "olmo" / "part-0.npy", plain, dtype="<u4", lines=True)
    token_files.raw(files / "nanogpt" / "train.bin", ended)
    token_files.raw(files / "nanogpt" / "val.bin", plain)
    np.save(files / "numpy" / "a.npy", np.concatenate(ended).astype("<u2"))
    token_files.datatrove(files / "datatrove" / "a.ds", plain, mask=mask)
    token_files.mds(files / "mds", [plain])
    token_files.mds(files / "mds_zstd", [plain])
    compress(files / "mds_zstd")
    token_files.litdata(files / "litdata", [plain])
    expected = {"llmc": begun, "nanogpt": ended, "numpy": ended}
    lines = doors()
    assert len(lines) == 11
    for line in lines:
        arguments = shlex.split(line)
        name = arguments[0].removeprefix("data/")
        if "--label-masks" in arguments:
            (files / "olmo" / "index.json").unlink()  # adopted without masks by the line before
            mask.tofile(files / "olmo" / "masks" / "part-0.bool")
        assert main(arguments) == 0, line
        folder = Path(arguments[arguments.index("--output") + 1] if "--output" in arguments else arguments[0])
        documents = [*plain, *plain] if name.startswith("web=") else expected.get(name, plain)
        is_masked = "--label-masks" in arguments or name == "datatrove"
        shards = check(folder, documents, mask=mask if is_masked else None)
        assert shards.has_mask == is_masked


def compress(folder: Path) -> None:
    index = json.loads((folder / "index.json").read_text())
    (shard,) = index["shards"]
    path = folder / shard["raw_data"]["basename"]
    name = path.name + ".zstd"
    with pyarrow.CompressedOutputStream(str(folder / name), "zstd") as file:
        file.write(path.read_bytes())
    path.unlink()
    shard |= {"compression": "zstd:7", "zip_data": {"basename": name, "bytes": 1, "hashes": {}}}
    (folder / "index.json").write_text(json.dumps(index))
