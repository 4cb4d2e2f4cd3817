"""The training text of a tokenizer: from all inputs, equal for every order, no more than requested."""

import gzip
import itertools
import json
import random
from collections import Counter
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest

from titan_attent.data.io.inputs import parse_inputs
from titan_attent.data.text import sample
from titan_attent.data.text.inputs import list_files
from titan_attent.data.text.records import TEXT_RECORDS
from titan_attent.data.text.sample import sample_texts
from titan_attent.data.text.writer import write_dataset


def sampled(paths: list[Path], num_bytes: int) -> list[str]:
    files = list_files(parse_inputs(paths))
    return list(sample_texts(files, num_bytes=num_bytes, records=TEXT_RECORDS, max_bytes=2**20))


def put(path: Path, texts: list[str]) -> Path:
    content = "".join(json.dumps({"text": text}) + "\n" for text in texts)
    if path.suffix == ".parquet":
        pyarrow.parquet.write_table(pyarrow.table({"text": texts}), path, row_group_size=50, compression="none")
    elif path.suffix == ".gz":
        path.write_bytes(gzip.compress(content.encode()))
    elif path.suffix == ".json":
        path.write_text(json.dumps([{"text": text} for text in texts]))
    elif path.suffix == ".txt":
        path.write_text("".join(texts))
    else:
        path.write_text(content)
    return path


@pytest.fixture
def inputs(tmp_path: Path) -> list[Path]:
    """A file of each shape, each with a letter and numbers of its own."""
    generator = random.Random(1)
    names = ["a.jsonl", "b.parquet", "c.jsonl.gz", "d.json", "e.txt", "f.jsonl"]
    return [
        put(tmp_path / name, [f"{name[0]}{generator.random()} " * generator.randint(1, 9) for _ in range(400)])
        for name in names
    ]


@pytest.mark.parametrize("num_bytes", [1, 3000, 40_000, 10**7])
def test_the_order_of_inputs_changes_nothing(inputs, monkeypatch, num_bytes):
    monkeypatch.setattr(sample, "SPAN_BYTES", 500)
    first = sampled(inputs, num_bytes)
    for order in itertools.islice(itertools.permutations(inputs), 1, 720, 97):
        assert sampled(list(order), num_bytes) == first
    size = len("".join(first).encode())
    assert size <= num_bytes
    assert size >= 0.9 * num_bytes or num_bytes == 10**7


def test_every_input_has_its_share(inputs, monkeypatch):
    monkeypatch.setattr(sample, "SPAN_BYTES", 500)
    letters = Counter(text[0] for text in sampled([path for path in inputs if path.suffix == ".jsonl"], 20_000))
    assert 0.6 < letters["a"] / letters["f"] < 1.6
    # A format with little text for its size gives less; but each input is present.
    assert {character for text in sampled(inputs, 20_000) for character in text if character in "abcdef"} >= set(
        "abcdf"
    )


def test_a_large_file_is_read_in_many_places(tmp_path, monkeypatch):
    monkeypatch.setattr(sample, "SPAN_BYTES", 500)
    for name in ("a.jsonl", "a.parquet", "a.txt"):
        path = put(tmp_path / name, [f"<{i:05d}> some text of a line\n" for i in range(5000)])
        text = "".join(sampled([path], 10_000))
        numbers = [int(part[:5]) for part in text.split("<")[1:] if len(part) > 6]
        tenths = {number // 500 for number in numbers}
        assert tenths == set(range(10)), name
        assert len(numbers) == len(set(numbers))


def test_all_is_taken_where_it_fits(inputs):
    texts = sampled(inputs, 10**7)
    assert sorted("".join(texts)) == sorted("".join("".join(sampled([path], 10**7)) for path in inputs))
    assert len(texts) == 5 * 400 + 1
    assert len(set(texts)) == len(texts)


def test_unusable_records_are_left_out(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": "a"}\n{\n{"text": null}\n{"text": "b\\ud800"}\n')
    assert sampled([tmp_path / "a.jsonl"], 100) == ["a", "b\ufffd"]
    (tmp_path / "empty.jsonl").write_text("")
    assert sampled([tmp_path / "empty.jsonl"], 100) == []
    (tmp_path / "b.parquet").write_bytes(b"PAR1 not really")
    assert sampled([tmp_path / "b.parquet", tmp_path / "a.jsonl"], 100) == ["a", "b\ufffd"]


def test_the_order_of_inputs_does_not_change_the_tokenizer(tmp_path):
    """Two languages: training on only the first inputs would give a tokenizer of one of them."""
    generator = random.Random(0)
    words = {
        name: ["".join(generator.choices(part, k=6)) for _ in range(30)]
        for name, part in (("a", "abcdefgh"), ("z", "stuvwxyz"))
    }
    paths = [
        put(tmp_path / f"{name}.jsonl", [" ".join(generator.choices(w, k=40)) for _ in range(100)])
        for name, w in words.items()
    ]
    summaries = [
        write_dataset(order, output=tmp_path / f"{i}", tokenizer="train:400", max_training_bytes=8000)
        for i, order in enumerate((paths, paths[::-1]))
    ]
    assert summaries[0].num_tokens == summaries[1].num_tokens
    tokenizers = [(tmp_path / f"{i}" / "tokenizer.tiktoken").read_bytes() for i in range(2)]
    assert tokenizers[0] == tokenizers[1]
