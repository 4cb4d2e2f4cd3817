r"""Texts of several keys: joined, or in a template per source, with and without a completion that alone counts."""

import base64
import csv
import json
import random
import re
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest

from titan_attent.data.text.__main__ import main, parse_templates
from titan_attent.data.text.held_out import is_held_out
from titan_attent.data.text.records import make_records
from titan_attent.data.text.text_template import parse_template, unescaped
from titan_attent.data.text.writer import write_dataset

ROWS = [{"title": f"Title {i}", "text": "text {title} " * (i % 5), "score": i} for i in range(40)]
TEMPLATE = "# {title}\n\n{text}|{{{title}}}"


def filled(row: dict[str, Any]) -> str:
    return f"# {row['title']}\n\n{row['text']}|{{{row['title']}}}"


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A rank file of the 256 bytes: id = byte, eos = 256."""
    path = tmp_path_factory.mktemp("tokenizer") / "bytes.model"
    path.write_bytes(b"".join(b"%s %d\n" % (base64.b64encode(bytes([i])), i) for i in range(256)))
    return str(path)


def put(path: Path, rows: list[dict[str, Any]]) -> Path:
    if path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    elif path.suffix == ".csv":
        with open(path, "w", newline="") as file:
            writer = csv.DictWriter(file, rows[0])
            writer.writeheader()
            writer.writerows(rows)
    elif path.suffix == ".json":
        path.write_text(json.dumps(rows, indent=1))
    else:
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    return path


def tree(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def write(inputs: list[Any], output: Path, ranks: str, **options: Any) -> dict[str, bytes]:
    write_dataset(inputs, output=output, tokenizer=ranks, shard_tokens=300, num_threads=1, **options)
    return tree(output)


# Templates.


def test_a_template_is_filled_as_format_fills_it() -> None:
    generator = random.Random(0)
    pieces = ["{a}", "{b c}", "{{", "}}", "\n", "x", "{a}", "é "]
    values = {"a": "{b c}", "b c": "}{"}
    for _ in range(200):
        text = "".join(generator.choices(pieces, k=generator.randrange(1, 8))) + "{a}"
        assert parse_template(text).filled(values) == text.format(**values)
        before, after = parse_template("{b c}a" + text.replace("{a}", "") + "{a}}}").filled_halves(values, at="a")
        assert before + after == ("{b c}a" + text.replace("{a}", "") + "{a}}}").format(**values)
        assert after == "{b c}}"


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "names no key"),
        ("plain {{x}}", "names no key"),
        ("{", "the '{' at character 0 has no other brace around a key; write '{{' for a brace"),
        ("{a} }", "the '}' at character 4"),
        ("{a{b}", "the '{' at character 0"),
        ("{}", "the '{' at character 0"),
    ],
)
def test_a_template_that_cannot_be_read(text: str, words: str) -> None:
    with pytest.raises(ValueError, match=re.escape(words)):
        parse_template(text)


def test_templates_of_the_command_line() -> None:
    given = [r"web={a}\n{b}\t\\n", r"= {a}", "code-2.0={c}={d}"]
    assert parse_templates(given) == {"web": "{a}\n{b}\t\\n", "": "= {a}", "code-2.0": "{c}={d}"}
    assert parse_templates(["{a}=b"]) == {"": "{a}=b"} and unescaped(r"\d\\") == "\\d\\"
    for twice in (["{a}", "{b}"], ["x={a}", "x={b}"]):
        with pytest.raises(ValueError, match="has two templates; give one"):
            parse_templates(twice)


# What is written.


@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "a.csv", "a.parquet"])
def test_a_template_writes_what_its_texts_would(tmp_path: Path, ranks: str, name: str) -> None:
    expected = write([put(tmp_path / "b.jsonl", [{"text": filled(row)} for row in ROWS])], tmp_path / "expected", ranks)
    path = put(tmp_path / name, ROWS)
    assert write([path], tmp_path / "out", ranks, templates={"": TEMPLATE}) == expected


def test_several_keys_are_joined_by_a_line_end(tmp_path: Path, ranks: str) -> None:
    texts = [{"text": f"{row['title']}\n{row['text']}"} for row in ROWS]
    expected = write([put(tmp_path / "b.jsonl", texts)], tmp_path / "expected", ranks)
    path = put(tmp_path / "a.jsonl", ROWS)
    command = [str(path), "--tokenizer", ranks, "--shard-tokens", "300", "--output", str(tmp_path / "out")]
    assert main([*command, "--text-key", "title", "--text-key", "text"]) == 0
    assert tree(tmp_path / "out") == expected
    assert write([path], tmp_path / "one", ranks, text_key=["text"]) == write([path], tmp_path / "no", ranks)


def test_a_template_per_source_beside_sources_without_one(tmp_path: Path, ranks: str) -> None:
    """In parts of training and validation data, too: their texts decide."""
    put(tmp_path / "web.jsonl", ROWS)
    put(tmp_path / "code.jsonl", ROWS)
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "a.txt").write_text("a note")
    inputs = [f"web={tmp_path}/web.jsonl", f"code={tmp_path}/code.jsonl", f"notes={tmp_path}/notes"]
    write(inputs, tmp_path / "out", ranks, templates={"web": TEMPLATE}, validation_fraction=0.2)
    texts = [*map(filled, ROWS), *(row["text"] for row in ROWS), "a note"]
    for part, held_out in (("train", False), ("validation", True)):
        index = json.loads((tmp_path / "out" / part / "index.json").read_text())
        files = [tmp_path / "out" / part / shard["file"] for shard in index["shards"]]
        stream = np.concatenate([np.fromfile(file, "<u2") for file in files]).tolist()
        expected = [text for text in texts if is_held_out(text, 0.2) == held_out]
        assert stream == [token for text in expected for token in (*text.encode(), 256)]


def test_with_a_completion_what_stands_before_it_has_no_loss(tmp_path: Path, ranks: str) -> None:
    template = "Q: {title}\nA: {text}."
    pairs = [{"p": f"Q: {row['title']}\nA: ", "c": f"{row['text']}."} for row in ROWS if row["text"]]
    rows = [row for row in ROWS if row["text"]]
    expected = write(
        [put(tmp_path / "b.jsonl", pairs)], tmp_path / "expected", ranks, prompt_key="p", completion_key="c"
    )
    assert any(name.endswith(".mask") for name in expected)
    path = put(tmp_path / "a.jsonl", rows)
    for number, options in enumerate(({}, {"prompt_key": "title"})):
        given = {"templates": {"": template}, "completion_key": "text", **options}
        assert write([path], tmp_path / f"out{number}", ranks, **given) == expected
    with pytest.raises(ValueError, match="a.jsonl:1: 'text' is empty or only white space"):
        write([put(path, ROWS)], tmp_path / "none", ranks, templates={"": template}, completion_key="text")
    assert not (tmp_path / "none").exists()


# What is refused.


@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "a.csv", "a.parquet"])
def test_a_missing_key_is_named_with_its_place(tmp_path: Path, ranks: str, name: str) -> None:
    path = put(tmp_path / name, ROWS)
    where = {"a.jsonl": "a.jsonl:1", "a.json": "a.json: record 1"}.get(name, name)
    kind = "key" if "json" in name else "column"
    with pytest.raises(ValueError, match=f"{where}: no {kind} 'titel'; correct the --template, which may name 'title'"):
        write([path], tmp_path / "out", ranks, templates={"": "{titel}: {text}"})
    with pytest.raises(ValueError, match=f"{where}: no {kind} 'titel'; select the text with --text-key, one of"):
        write([path], tmp_path / "out", ranks, text_key=["text", "titel"])
    if name != "a.csv":
        with pytest.raises(ValueError, match="'score' is int, not a string; .* or choose another --template"):
            write([path], tmp_path / "out", ranks, templates={"": "{score}: {text}"})
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"templates": {"x": "{a}"}}, "--template x=...: no input has this source; the sources are web, default"),
        ({"templates": {"": "{a}"}, "text_key": "b"}, "--text-key and --template exclude each other"),
        ({"templates": {"web": "{a}"}, "messages_key": "b"}, "--template and --messages-key exclude each other"),
        ({"templates": {"": "{a}"}, "prompt_key": "a"}, "--prompt-key is given without --completion-key"),
        ({"templates": {"": "{a}"}, "completion_key": "b"}, "--completion-key is 'b'; name {b} once in the template"),
        ({"templates": {"": "{b}{b}"}, "completion_key": "b"}, "name {b} once in the template"),
        ({"templates": {"": "{b}"}, "prompt_key": "a", "completion_key": "b"}, "--prompt-key is 'a'; name {a} once"),
        (
            {"templates": {"web": "{a}{b}"}, "completion_key": "b"},
            "the source 'default' has no --template, and",
        ),
        ({"text_key": ["a", "a"]}, "--text-key 'a' is given twice"),
    ],
)
def test_options_that_contradict_each_other(tmp_path: Path, ranks: str, options: Any, words: str) -> None:
    path = put(tmp_path / "a.jsonl", ROWS)
    with pytest.raises(ValueError, match=re.escape(words)):
        write([f"web={path}", path], tmp_path / "out", ranks, **options)
    assert not (tmp_path / "out").exists()


def test_a_text_file_has_no_keys_for_a_template(tmp_path: Path, ranks: str) -> None:
    (tmp_path / "a.txt").write_text("text")
    words = "a.txt: is a text, not records with 'title' and 'text'; give the template to the source of the records only"
    with pytest.raises(ValueError, match=words):
        write([tmp_path / "a.txt"], tmp_path / "out", ranks, templates={"": "{title}{text}"})


def test_another_template_does_not_resume(tmp_path: Path, ranks: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("titan_attent.data.text.encode.CHUNK_CHARACTERS", 1)
    path = put(tmp_path / "a.jsonl", [*ROWS, {"title": "x"}])
    options: dict[str, Any] = {"templates": {"default": TEMPLATE}}
    with pytest.raises(ValueError, match="no key 'text'"):
        write([path], tmp_path / "out", ranks, **options)
    put(path, ROWS)
    for other in ({"templates": {"": TEMPLATE}}, {"templates": {"default": "{text}"}}, {"text_key": ["title", "text"]}):
        with pytest.raises(ValueError, match="holds an interrupted run with other arguments: .*template"):
            write([path], tmp_path / "out", ranks, **other)
    assert write([path], tmp_path / "out", ranks, **options) == write([path], tmp_path / "whole", ranks, **options)


def test_the_records_of_one_key_are_as_before() -> None:
    assert make_records(text_key="a") == make_records(text_key=["a"])
    assert make_records(text_key=["a", "b"]).arguments() == {"text_template": ["", "a", "\n", "b", ""]}
