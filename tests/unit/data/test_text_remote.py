"""Inputs by URL: on a file system in memory, and on local servers of http with and without parts of files."""

import base64
import functools
import http.server
import json
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import datasets
import fsspec
import pyarrow
import pyarrow.parquet
import pytest
from fsspec.registry import known_implementations

from titan_attent.data.images.writer import write_images
from titan_attent.data.io import remote
from titan_attent.data.io.inputs import parse_any_inputs, parse_inputs
from titan_attent.data.io.remote import RemoteError, RemotePath, paths_of_url
from titan_attent.data.io.walk import LeftOut
from titan_attent.data.text.documents import Document, read_documents
from titan_attent.data.text.inputs import list_files
from titan_attent.data.text.records import TEXT_RECORDS
from titan_attent.data.text.writer import write_dataset

TEXTS = [f"text {i} " * (i % 50 + 1) for i in range(400)]


class Server(http.server.ThreadingHTTPServer):
    """Serves a folder; counts what it sends, and can break off."""

    def __init__(self, folder: Path, *, parts: bool):
        handler = functools.partial(Handler, directory=str(folder))
        super().__init__(("127.0.0.1", 0), handler)
        self.parts, self.breaks, self.sent = parts, 0, 0
        self.requested: list[str] = []
        self.url = f"http://127.0.0.1:{self.server_port}"


class Handler(http.server.SimpleHTTPRequestHandler):
    server: Server

    def log_message(self, *arguments: Any) -> None:
        pass

    def do_GET(self) -> None:
        path = Path(self.translate_path(self.path))
        if path.is_dir() or not path.exists():
            return super().do_GET()
        content, asked = path.read_bytes(), self.headers.get("Range")
        self.server.requested.append(f"{self.path} {asked or ''}".strip())
        first, last = 0, len(content)
        if asked and self.server.parts:
            first, last = (int(number) for number in asked.removeprefix("bytes=").split("-"))
            last = min(last + 1, len(content))
            self.send_response(206)
            self.send_header("Content-Range", f"bytes {first}-{last - 1}/{len(content)}")
        else:
            self.send_response(200)
        self.send_header("Content-Length", str(last - first))
        self.end_headers()
        body = content[first:last]
        if self.server.breaks:
            self.server.breaks -= 1
            body = body[: len(body) // 2]
        self.wfile.write(body)
        self.server.sent += len(body)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The documents as JSON lines, compressed, parquet, Arrow and a folder of save_to_disk."""
    folder = tmp_path_factory.mktemp("www")
    rows = [{"text": text} for text in TEXTS]
    (folder / "parts").mkdir()
    for i in range(4):
        lines = "".join(json.dumps(row) + "\n" for row in rows[100 * i : 100 * (i + 1)])
        (folder / "parts" / f"{i}.jsonl").write_text(lines)
    (folder / "parts" / ".hidden.jsonl").write_text('{"text": "hidden"}')
    (folder / "parts" / "README.md").write_text("about")
    everything = "".join((folder / "parts" / f"{i}.jsonl").read_text() for i in range(4))
    with pyarrow.CompressedOutputStream(str(folder / "all.jsonl.zst"), "zstd") as file:
        file.write(everything.encode())
    (folder / "all.jsonl").write_text(everything)
    (folder / "all.json").write_text(json.dumps(rows))
    table = pyarrow.Table.from_pylist(rows)
    pyarrow.parquet.write_table(table, folder / "all.parquet", row_group_size=90)
    for name, new in (("stream.arrow", pyarrow.ipc.new_stream), ("file.arrow", pyarrow.ipc.new_file)):
        with pyarrow.OSFile(str(folder / name), "wb") as sink, new(sink, table.schema) as writer:
            writer.write_table(table, max_chunksize=70)
    datasets.Dataset.from_list(rows).save_to_disk(str(folder / "saved"), num_shards=2)
    return folder


@pytest.fixture
def serve(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    monkeypatch.setattr(remote, "FIRST_DELAY", 0.01)
    servers: list[Server] = []

    def start(*, parts: bool) -> Server:
        servers.append(Server(folder, parts=parts))
        threading.Thread(target=servers[-1].serve_forever, args=(0.01,), daemon=True).start()
        return servers[-1]

    yield start
    for server in servers:
        server.shutdown()
        server.server_close()


@pytest.fixture
def memory(folder: Path) -> Iterator[str]:
    """The URL of the folder on a file system in memory."""
    files = fsspec.filesystem("memory")
    for path in folder.rglob("*"):
        if path.is_file():
            files.pipe(f"/www/{path.relative_to(folder)}", path.read_bytes())
    yield "memory://www"
    for name in [name for name in files.store if name.startswith("/www/")]:
        del files.store[name]


def documents_of(*inputs: str, **options: Any) -> list[Document]:
    return list(read_documents(list_files(parse_any_inputs(list(inputs))), records=TEXT_RECORDS, **options))


def texts_of(*inputs: str) -> list[str | None]:
    return [document.text for document in documents_of(*inputs)]


FILES = ["all.jsonl", "all.jsonl.zst", "all.json", "all.parquet", "stream.arrow", "file.arrow"]
NEED_PARTS = ["all.parquet", "file.arrow"]


# What is read.


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("where", ["memory", "http", "http without parts"])
def test_a_file(where: str, memory: str, serve: Any, name: str) -> None:
    url = f"{memory if where == 'memory' else serve(parts=where == 'http').url}/{name}"
    if where == "http without parts" and name in NEED_PARTS:
        with pytest.raises(RemoteError, match=f"{name}: the server gives no parts of files .Range., .* download"):
            texts_of(url)
        return
    documents = documents_of(url)
    assert [document.text for document in documents] == TEXTS
    files = list_files(parse_any_inputs([url]))
    for i in (0, 123, len(TEXTS) - 1):
        rest = read_documents(files, records=TEXT_RECORDS, start=documents[i].cursor)
        assert [document.text for document in rest] == TEXTS[i + 1 :]


@pytest.mark.parametrize("where", ["memory", "http"])
def test_patterns_and_folders(where: str, memory: str, serve: Any) -> None:
    url = memory if where == "memory" else serve(parts=True).url
    assert texts_of(f"{url}/parts/*.jsonl") == texts_of(f"{url}/parts/") == texts_of(f"{url}/saved/") == TEXTS
    assert texts_of(f"{url}/parts/[12].jsonl") == TEXTS[100:300]
    assert texts_of(f"{url}/*/[3].jsonl", f"{url}/parts/0.jsonl") == TEXTS[300:] + TEXTS[:100]
    left_out = LeftOut()
    files = list_files(parse_any_inputs([f"web={url}/parts/"]), left_out=left_out)
    assert [(file.source, file.path.name) for file in files] == [("web", f"{i}.jsonl") for i in range(4)]
    assert "1 beside records" in left_out.summary() and "1 hidden" in left_out.summary()
    with pytest.raises(RemoteError, match=r"\*.nothing: no file matches this pattern"):
        parse_any_inputs([f"{url}/*.nothing"])
    with pytest.raises(ValueError, match="parts/9.jsonl: no such file or folder"):
        texts_of(f"{url}/parts/9.jsonl")


def test_a_file_of_http_is_asked_for_once(serve: Any, folder: Path) -> None:
    server = serve(parts=True)
    assert texts_of(f"{server.url}/all.jsonl") == TEXTS
    assert server.requested == ["/all.jsonl"] and server.sent == (folder / "all.jsonl").stat().st_size


def test_the_query_of_a_url_is_no_part_of_the_name(serve: Any) -> None:
    assert texts_of(f"{serve(parts=True).url}/all.jsonl?download=true&x=a/b.txt") == TEXTS


def test_local_urls_are_paths(folder: Path) -> None:
    assert paths_of_url(f"file://{folder}/all.jsonl") == [folder / "all.jsonl"]


# The writer.


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("tokenizer") / "bytes.model"
    path.write_bytes(b"".join(b"%s %d\n" % (base64.b64encode(bytes([i])), i) for i in range(256)))
    return str(path)


def tree(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_the_writer_writes_what_it_writes_of_the_same_files_on_disk(folder: Path, serve: Any, tmp_path: Path) -> None:
    server = serve(parts=True)
    for number, place in enumerate((str(folder), server.url)):
        inputs = [f"web={place}/parts/*.jsonl", f"{place}/all.parquet"]
        output = tmp_path / f"{number}"
        write_dataset(inputs, output=output, tokenizer="train:300", shard_tokens=30_000, num_threads=1)
    first, second = (tree(tmp_path / f"{number}") for number in (0, 1))
    assert first == second and len(first) > 4


@pytest.mark.parametrize("parts", [True, False])
def test_a_run_resumes_in_the_middle_of_a_file(
    folder: Path, ranks: str, serve: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, parts: bool
) -> None:
    monkeypatch.setattr("titan_attent.data.text.encode.CHUNK_CHARACTERS", 1)
    monkeypatch.setattr(remote, "BLOCK", 4096)
    server = serve(parts=parts)
    lines = (folder / "all.jsonl").read_text().splitlines(keepends=True)
    path = folder / "stopped.jsonl"
    path.write_text("".join([*lines[:300], "bad\n", *lines[300:]]))
    options: dict[str, Any] = {"tokenizer": ranks, "shard_tokens": 9000, "num_threads": 1}
    with pytest.raises(ValueError, match="stopped.jsonl:301: malformed"):
        write_dataset([f"{server.url}/stopped.jsonl"], output=tmp_path / "out", **options)
    assert (tmp_path / "out" / "shard-00000.bin").is_file()
    server.requested.clear()
    write_dataset([f"{server.url}/stopped.jsonl"], output=tmp_path / "out", on_bad="skip", **options)
    assert ("bytes=" in server.requested[-1]) == parts
    write_dataset([path], output=tmp_path / "local", on_bad="skip", **options)
    first, second = (tree(tmp_path / name) for name in ("out", "local"))
    assert first.keys() == second.keys() and len(first) > 9
    assert all(first[name] == second[name] for name in first if name != "skipped.jsonl")
    path.unlink()


# What goes wrong.


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("parts", [True, False])
def test_a_read_that_breaks_off_goes_on_where_it_was(serve: Any, name: str, parts: bool) -> None:
    if not parts and name in NEED_PARTS:
        pytest.skip("not read from such a server")
    server = serve(parts=parts)
    documents = read_documents(list_files(parse_any_inputs([f"{server.url}/{name}"])), records=TEXT_RECORDS)
    server.breaks = 2
    assert [document.text for document in documents] == TEXTS


def test_a_server_that_stays_away_ends_the_run_also_with_skip(serve: Any) -> None:
    server = serve(parts=True)
    for name in FILES:
        files = list_files(parse_any_inputs([f"{server.url}/{name}"]))
        server.breaks = 99
        with pytest.raises(RemoteError, match=f"{name}: cannot be read .*check the URL"):
            list(read_documents(files, records=TEXT_RECORDS, skip=True))
        server.breaks = 0


def test_a_file_that_changes_meanwhile_is_not_mixed(serve: Any, folder: Path, tmp_path: Path) -> None:
    server = serve(parts=True)
    path = folder / "changing.jsonl"
    path.write_bytes((folder / "all.jsonl").read_bytes())
    files = list_files(parse_any_inputs([f"{server.url}/changing.jsonl"]))
    server.breaks = 1
    path.write_bytes((folder / "all.jsonl").read_bytes() + b"\n")
    with pytest.raises(RemoteError, match="changing.jsonl: has changed while it was read"):
        list(read_documents(files, records=TEXT_RECORDS))
    path.unlink()


def test_a_damaged_record_has_its_place(memory: str) -> None:
    fsspec.filesystem("memory").pipe("/www/bad.jsonl", b'{"text": "x"}\n{"text": \n')
    with pytest.raises(ValueError, match=r"memory://www/bad.jsonl:2: malformed JSON line .*--on-bad skip"):
        texts_of(f"{memory}/bad.jsonl")


def test_urls_that_cannot_be_used(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    implementation = {"class": "absent_package.Files", "err": "Install absent_package to access it"}
    monkeypatch.setitem(known_implementations, "absent", implementation)
    for url, words in {
        "absent://x/a.jsonl": "package of this file system is not installed .Install absent_package to access it",
        "nowhere://x/a.jsonl": "fsspec knows no such file system .*nowhere.*; correct the URL",
        "zip://a.jsonl::http://x/a.zip": "URLs within URLs are not read",
        "http://127.0.0.1:1/a.jsonl": r"cannot be read \(ClientConnectorError: .*check the URL, the credentials",
        "http://127.0.0.1:1/*.jsonl": r"cannot be read \(.*check the URL, the credentials",
    }.items():
        with pytest.raises(ValueError, match=words):
            write_dataset([url], output=tmp_path / "out", tokenizer="train:300")
        assert not (tmp_path / "out").exists()
    with pytest.raises(ValueError, match="http://x/a.npz: this command reads no URLs; download it first"):
        write_images(["http://x/a.npz"], output=tmp_path / "out")


def test_a_file_without_a_size(monkeypatch: pytest.MonkeyPatch, memory: str) -> None:
    (path,) = paths_of_url(f"{memory}/all.jsonl")
    assert isinstance(path, RemotePath)
    monkeypatch.setattr(type(path._fs), "info", lambda self, path: {"name": path, "size": None, "type": "file"})
    with pytest.raises(RemoteError, match="does not say how many bytes it has; download it first"):
        path.stat()


def test_names_of_sources_before_urls(folder: Path) -> None:
    assert [(source, str(path)) for source, path in parse_any_inputs(["web=http://h/a=1.jsonl", "s3=x", "c=./d"])] == [
        ("web", "http://h/a=1.jsonl"),
        ("s3", "x"),
        ("c", "d"),
    ]
    with pytest.raises(ValueError, match="this command reads no URLs"):
        parse_inputs(["web=http://h/a"])
