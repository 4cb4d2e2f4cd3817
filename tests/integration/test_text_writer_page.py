"""The commands of docs/reference/text_writer.md as they stand, on small inputs of the kinds that they name."""

import base64
import csv
import functools
import http.server
import json
import sysconfig
import threading
from pathlib import Path

import datasets
import numpy as np
import pyarrow
import pyarrow.feather
import pyarrow.parquet
import pytest
from documented import ROOT, arguments_of, commands_of, module_of

from titan_attent.data.text.__main__ import main as write_text

PAGE = (ROOT / "docs" / "reference" / "text_writer.md").read_text(encoding="utf-8")
TEXTS = (Path(sysconfig.get_paths()["stdlib"]) / "asyncio" / "tasks.py").read_text(encoding="utf-8").split("\n\n")[:40]
ROWS = [
    {"text": text, "title": f"Part {i}", "question": f"What is {i}?", "answer": text} for i, text in enumerate(TEXTS)
]
FILLED = "".join(f"# Part {i}\n\n{text}" for i, text in enumerate(TEXTS))
EXPECTED = {
    **dict.fromkeys(("web", "snapshot", "saved", "articles", "remote", "folder"), "".join(TEXTS)),
    "parts": "".join(TEXTS) * 2,
    "arrow": "".join(TEXTS) * 2,
    "titled": "".join(f"Part {i}\n{text}" for i, text in enumerate(TEXTS)),
    "mixed": FILLED + "".join(TEXTS),
    "qa": "".join(f"Question: What is {i}?\nAnswer: {text}" for i, text in enumerate(TEXTS)),
}
"""Folder in data/ -> all of its text."""


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The working folder, with the inputs that the page names."""
    folder = tmp_path_factory.mktemp("page")
    for name in ("corpus/parts", "rows", "snapshot/data"):
        (folder / name).mkdir(parents=True)
    lines = [json.dumps(row) + "\n" for row in ROWS]
    with pyarrow.CompressedOutputStream(str(folder / "corpus" / "web.jsonl.zst"), "zstd") as file:
        file.write("".join(lines).encode())
    (folder / "corpus" / "code.jsonl").write_text("".join(lines))
    for i in range(2):
        (folder / "corpus" / "parts" / f"{i}.jsonl").write_text("".join(lines[20 * i : 20 * (i + 1)]))
    (folder / "corpus" / "articles.json").write_text(json.dumps({"version": 1, "data": ROWS}, indent=1))
    for name in ("table.csv", "qa.csv"):
        with open(folder / "corpus" / name, "w", newline="", encoding="utf-8") as table:
            writer = csv.DictWriter(table, ROWS[0])
            writer.writeheader()
            writer.writerows(ROWS)
    rows = pyarrow.Table.from_pylist(ROWS)
    with pyarrow.ipc.new_file(str(folder / "rows" / "file.arrow"), rows.schema) as arrow:
        arrow.write_table(rows, max_chunksize=7)
    pyarrow.feather.write_feather(rows, str(folder / "rows" / "rows.feather"))
    pyarrow.parquet.write_table(rows, folder / "snapshot" / "data" / "train-0.parquet")
    (folder / "snapshot" / "README.md").write_text("about")
    data = datasets.Dataset.from_list(ROWS)
    datasets.DatasetDict({"train": data, "test": data}).save_to_disk(str(folder / "saved"))
    return folder


class Quiet(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *arguments: object) -> None:
        pass


def text_of(folder: Path) -> str:
    """All text of a data set, read without the package: the ids are bytes and merges of the tokenizer beside them."""
    index = json.loads((folder / "index.json").read_text())
    pairs = [line.split() for line in (folder / index["tokenizer"]["file"]).read_bytes().splitlines()]
    pieces = {int(rank): base64.b64decode(piece) for piece, rank in pairs} | {index["tokenizer"]["eos_id"]: b""}
    ids = np.concatenate([np.fromfile(folder / shard["file"], "<u2") for shard in index["shards"]]).tolist()
    return b"".join(pieces[number] for number in ids).decode()


def test_the_commands_of_the_page(inputs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(inputs)
    handler = functools.partial(Quiet, directory=str(inputs))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        page = PAGE.replace("https://example.com", f"http://127.0.0.1:{server.server_port}")
        written = []
        for command in commands_of(page):
            assert module_of(command) == "titan_attent.data.text"
            arguments = arguments_of(command)
            assert write_text([*arguments, "--num-threads", "1"]) == 0, command
            written.append(arguments[arguments.index("--output") + 1])
        server.shutdown()
    assert {name.removeprefix("data/") for name in written} == EXPECTED.keys()
    for name in written:
        assert text_of(inputs / name) == EXPECTED[name.removeprefix("data/")], name
    assert [path.parent.name for path in inputs.rglob("*.mask")] == ["qa"]
