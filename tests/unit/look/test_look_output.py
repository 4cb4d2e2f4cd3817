"""A look at data: its decision against numpy, its text within a terminal, its page complete in one file."""

import json
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from titan_attent.data.images.writer import write_images
from titan_attent.data.text.decoded import DecodedExamples, escaped
from titan_attent.data.text.document_examples import DocumentDataset
from titan_attent.data.text.shards import TokenDataset
from titan_attent.data.text.writer import write_dataset
from titan_attent.look.command import main
from titan_attent.look.decision import RunSize, decide
from titan_attent.look.groups import groups_of
from titan_attent.look.subject import Subject
from titan_attent.look.tables import histogram, source_rows
from titan_attent.look.terminal import WIDTH, columns, wrapped
from titan_attent.scores.stored import Scoring
from titan_attent.scores.writer import ScoresWriter

NASTY = "</pre><script>alert(1)</script>\x1b[31m\x07\u202e\x00\u2028 好 e\u0301 \t|"
"""Markup, an escape sequence of terminals, a mark of the writing direction, and wide and combining characters."""
NUM, NUM_TRUSTED = 400, 50


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Documents of two sources, the first of which has a name that is long."""
    folder = tmp_path_factory.mktemp("look")
    for name, first, num in (("a" * 60, 0, 300), ("b", 300, 100)):
        documents = [{"text": f"{i} {NASTY} " + "word " * (i % 40)} for i in range(first, first + num)]
        (folder / f"{name[0]}.jsonl").write_text("".join(json.dumps(each) + "\n" for each in documents))
    inputs = [f"{'a' * 60}={folder / 'a.jsonl'}", f"b={folder / 'b.jsonl'}"]
    write_dataset(inputs, output=folder / "data", tokenizer="train:300")
    return folder / "data"


def write_scores(folder: Path, losses: np.ndarray, **scoring: Any) -> None:
    common = {"data_fingerprint": "f00d", "seq_len": 0, "model": "bigram", "precision": "float32"}
    common |= {"checkpoint": "counts", "checkpoint_sha256": scoring["role"], "loss": "cross-entropy"}
    complete = Scoring(**{**common, "num_examples": len(losses), **scoring})
    with ScoresWriter(folder, scoring=complete) as writer:
        writer.append(torch.from_numpy(losses))
        writer.finish()


RNG = np.random.default_rng(0)
AMATEUR = RNG.normal(5, 0.3, NUM).astype(np.float32)
EXPERT = np.concatenate((AMATEUR[:300] - 0.2, AMATEUR[300:] + 1)).astype(np.float32)
EXPERT += RNG.normal(0, 0.1, NUM).astype(np.float32)
TRUSTED = {"amateur": np.full(NUM_TRUSTED, 5, np.float32), "expert": np.linspace(4.6, 5.0, NUM_TRUSTED).astype("f4")}


@pytest.fixture(scope="module")
def pair(data: Path) -> Path:
    """The scores of a pair: the second source looks unlike trusted text."""
    folder, dataset = data.parent / "pair", DocumentDataset(data, seq_len=64)
    fingerprint = dataset.scored.data_fingerprint
    for role, losses in (("amateur", AMATEUR), ("expert", EXPERT)):
        write_scores(folder / role, losses, data_fingerprint=fingerprint, role=role)
        write_scores(folder / role / "trusted", TRUSTED[role], role=role)
    return folder


def shown(*argv: str, capsys: pytest.CaptureFixture[str]) -> str:
    """What the command prints; every line fits a terminal and is harmless to it."""
    assert main(list(argv)) == 0
    text = capsys.readouterr().out
    for line in text.splitlines():
        assert line.isprintable() and columns(line) <= WIDTH, line
    return text


# -- the decision ------------------------------------------------------------------------------------------------------


SIZES = [RunSize(), RunSize(batch=4, steps=2), RunSize(batch=1, steps=60, max_repeats=2)]


@pytest.mark.parametrize("size", SIZES, ids=str)
def test_the_cut_is_that_of_the_rule(data: Path, pair: Path, size: RunSize) -> None:
    """The rule as docs/guide/choosing.md states it. No document is longer than seq_len, so each is one example."""
    dataset = DocumentDataset(data, seq_len=512)
    assert len(dataset) == NUM
    decision = decide(dataset, str(pair), size)
    difference, trusted = AMATEUR - EXPERT, np.sort(TRUSTED["amateur"] - TRUSTED["expert"])
    assert np.array_equal(decision.scores, difference) and np.array_equal(decision.trusted, trusted)
    gains = [(difference < cut).mean() - 2 * (trusted < cut).mean() for cut in trusted]
    lengths = dataset.lengths(np.arange(NUM))
    total, cut = int(lengths.sum()), trusted[int(np.argmax(gains))]
    requested = 1 - lengths[difference < cut].sum() / total
    assert 0.2 < requested < 0.8
    batch = total * size.batch // dataset.num_rows  # all in tokens
    bound = -(-size.steps // (size.max_repeats or 1)) * batch / total
    budget = max(batch, round(max(requested, bound) * total) // batch * batch)
    kept, before = np.zeros(NUM, dtype=bool), 0
    for i in np.argsort(-difference, kind="stable").tolist():
        kept[i] = before < budget
        before += int(lengths[i])
    assert decision.kept is not None and np.array_equal(decision.kept, kept)
    k = lengths[kept].sum() / batch  # batches in a pass over the selection
    if size.steps:
        assert decision.visits == pytest.approx(size.steps / k)
        assert f"each trained {size.steps / k:.1f} times in this run" in decision.forecast
    else:
        assert decision.visits is None and "times" not in decision.forecast
    assert bool(decision.warnings) == (bound > 1.01 * requested) == (size.steps == 60)


def test_an_amateur_alone_and_an_expert_alone(data: Path, pair: Path) -> None:
    dataset = DocumentDataset(data, seq_len=512)
    amateur = decide(dataset, str(pair / "amateur"), RunSize())
    assert amateur.kept is not None and 'scoring = "amateur"' in amateur.rule
    expert = decide(dataset, str(pair / "expert"), RunSize())
    assert expert.kept is None and np.array_equal(expert.scores, EXPERT) and "select nothing" in expert.forecast


def test_spans_have_the_score_of_their_document(data: Path, pair: Path) -> None:
    dataset = DocumentDataset(data, seq_len=16)
    decision = decide(dataset, str(pair), RunSize())
    documents = dataset.documents_of(np.arange(len(dataset)))
    assert len(dataset) > NUM and np.array_equal(decision.scores, (AMATEUR - EXPERT)[documents])


# -- numbers and rows --------------------------------------------------------------------------------------------------


def test_a_row_per_source_and_a_histogram() -> None:
    source_of, lengths = np.array([0, 0, 1, 1, 1]), np.array([5, 1, 2, 2, 6])
    kept = np.array([True, False, True, False, False])
    rows = source_rows(["a", "b"], source_of, lengths, kept)
    assert [tuple(row) for row in rows] == [
        ("a", 2, 6, 0.5, 5 / 6),
        ("b", 3, 10, pytest.approx(1 / 3), 0.2),
        ("all", 5, 16, 0.4, 7 / 16),
    ]
    assert len(source_rows(["a"], source_of * 0, lengths, None)) == 1
    values = RNG.normal(size=1000)
    bins = histogram(values, kept=values > 0.5, trusted=RNG.normal(size=30))
    assert sum(each.kept for each in bins) == pytest.approx((values > 0.5).mean())
    assert sum(each.dropped for each in bins) == pytest.approx((values <= 0.5).mean())
    assert sum(each.trusted or 0 for each in bins) == pytest.approx(1)
    inner = bins[5]
    assert inner.dropped == pytest.approx(((values >= inner.low) & (values < inner.high)).mean())
    whole = histogram(np.array([3, 3, 4, 9]), kept=None, trusted=np.zeros(0))
    assert [(each.low, each.kept) for each in whole if each.kept] == [(3, 0.5), (4, 0.25), (9, 0.25)]
    assert len(histogram(np.full(4, 2.5), kept=None, trusted=np.zeros(0))) > 0


def test_the_best_the_worst_and_those_at_the_cut(data: Path, pair: Path) -> None:
    dataset = DocumentDataset(data, seq_len=512)
    decision = decide(dataset, str(pair), RunSize())
    assert decision.kept is not None
    source_of = np.repeat([0, 1], [300, 100])
    groups = groups_of(["a", "b"], source_of, decision, rows=2, max_sources=2)
    for name, first, last in (("a", 0, 300), ("b", 300, 400)):
        found = {group.heading: group.ids.tolist() for group in groups if group.source == name}
        order = first + np.argsort(-decision.scores[first:last])
        kept, dropped = order[decision.kept[order]].tolist(), order[~decision.kept[order]].tolist()
        expected = {"kept, highest scores": kept[:2], "kept, next to the cut": kept[2:][-2:]}
        expected |= {"dropped, next to the cut": dropped[:2], "dropped, lowest scores": dropped[2:][-2:]}
        assert found == {heading: ids for heading, ids in expected.items() if ids}
    assert {group.source for group in groups_of(["a", "b"], source_of, decision, rows=2, max_sources=1)} == {"a"}
    (chosen,) = groups_of(["a"], source_of * 0, None, rows=5, max_sources=1)
    assert len(set(chosen.ids.tolist())) == 5 and chosen.ids.max() < 400


def test_text_is_decoded_from_where_the_example_is(data: Path) -> None:
    for dataset in (DocumentDataset(data, seq_len=16), TokenDataset(data, seq_len=16)):
        decoded = DecodedExamples(dataset)
        for i in (0, 7, len(dataset) - 1):
            inputs, labels = dataset.read(torch.tensor([i]))
            tokens = inputs["input"][0]
            if isinstance(dataset, DocumentDataset):
                tokens = tokens[labels[0] != -100]
            tokenizer: Any = decoded._tokenizer
            assert decoded.text(i, max_tokens=16) == tokenizer.decode(tokens.tolist())
        with pytest.raises(IndexError):
            decoded.text(len(dataset), max_tokens=1)


@given(st.text(), st.integers(4, 30))
def test_nothing_reaches_the_terminal_unescaped(text: str, width: int) -> None:
    safe = escaped(text)
    assert safe.isprintable() or not safe
    lines = list(wrapped(safe, width=width, indent="  "))
    assert all(columns(line) <= width for line in lines)
    assert "".join(line[2:] for line in lines).replace(" ", "") == safe.replace(" ", "")
    assert escaped(text, keep="\n").count("\n") == text.count("\n")


# -- the command -------------------------------------------------------------------------------------------------------


def test_without_scores(data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = shown(str(data), capsys=capsys)
    assert "400 documents" in text and "b: random" in text and r"\x1b[31m\x07\u202e\x00\u2028 好" in text
    assert "Score" not in text
    text = shown(str(data), "--unit", "window", "--seq-len", "32", "--rows", "1", capsys=capsys)
    assert f"{len(TokenDataset(data, seq_len=32)):,} windows" in text


def test_a_data_set_whose_tokenizer_is_gone(data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for file in data.iterdir():
        if file.name != "tokenizer.tiktoken":
            (tmp_path / file.name).symlink_to(file)
    text = shown(str(tmp_path), capsys=capsys)
    assert "this tokenizer file of the data set is missing" in " ".join(text.split()) and "token ids " in text


class Page(HTMLParser):
    """The tags of a page, and the texts of its rows."""

    def __init__(self, text: str):
        super().__init__()
        self.tags, self.rows, self._in_row = list[str](), list[str](), False
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: Any) -> None:
        self.tags.append(tag)
        assert not any(name in ("src", "href") and not value.startswith("data:") for name, value in attrs)
        if tag == "pre":
            self.rows.append("")
            self._in_row = True

    def handle_endtag(self, tag: str) -> None:
        self._in_row = self._in_row and tag != "pre"

    def handle_data(self, data: str) -> None:
        if self._in_row:
            self.rows[-1] += data


def test_with_scores_and_a_page(data: Path, pair: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--scores", str(pair), "--steps", "20", "--batch", "2", "--seq-len", "512"]
    text = shown(str(data), *arguments, "--html", str(tmp_path / "look.html"), capsys=capsys)
    for words in ("<- the cut", "dropped, next to the cut", "Forecast: from step 1 on, ", "Selected share by source"):
        assert words in text
    content = (tmp_path / "look.html").read_text()
    assert content.isascii() and "\x1b" not in content and "http" not in content.replace("http-equiv", "")
    page = Page(content)
    assert "script" not in page.tags and {"svg", "table", "pre"} <= set(page.tags)
    assert all("</pre><script>" in row and r"\x1b[31m" in row and "\t|" in row for row in page.rows)
    assert [path.name for path in tmp_path.iterdir()] == ["look.html"]


def test_images(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pixels = RNG.integers(0, 256, (60, 8, 8, 3), dtype=np.uint8)
    np.savez(tmp_path / "all.npz", images=pixels, labels=RNG.integers(0, 2, 60), classes=np.array(["cat", "dog"]))
    write_images([tmp_path / "all.npz"], output=tmp_path / "data")
    text = shown(str(tmp_path / "data"), capsys=capsys)
    assert "60 images" in text and ("cat" in text or "dog" in text)
    losses = RNG.normal(1, 0.1, 60).astype(np.float32)
    fingerprint = Subject(str(tmp_path / "data")).dataset.scored.data_fingerprint
    scoring = {"data_fingerprint": fingerprint, "seq_len": 32, "model": "vit_attent tiny", "role": "amateur"}
    write_scores(tmp_path / "scores", losses, **scoring)
    arguments = ["--scores", str(tmp_path / "scores"), "--html", str(tmp_path / "look.html")]
    text = shown(str(tmp_path / "data"), *arguments, capsys=capsys)
    assert "Forecast: " in text and f"score {losses.max():.4g}"[:9] in text
    page = Page((tmp_path / "look.html").read_text())
    assert "img" in page.tags and not page.rows


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["/nowhere"], "/nowhere: not a data set, no such folder"),
        (["DATA", "--scores", "/nowhere"], "/nowhere: no such folder"),
        (["DATA", "--scores", "PAIR", "--unit", "window"], "holds the scores of other examples"),
        (["DATA", "--scores", "PAIR/untrusted"], "there are no losses of trusted text"),
        (["DATA", "--scores", "PAIR", "--batch", "1000"], "fewer than one global batch of 1000"),
        (["DATA", "--html", "/nowhere/page.html"], "--html /nowhere/page.html: cannot be written"),
    ],
)
def test_a_mistake_is_one_message(
    data: Path, pair: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    for role in ("amateur", "expert"):
        (pair / "untrusted" / role).mkdir(parents=True, exist_ok=True)
        for name in ("losses.bin", "reference.json"):
            (pair / "untrusted" / role / name).write_bytes((pair / role / name).read_bytes())
    assert main([each.replace("DATA", str(data)).replace("PAIR", str(pair)) for each in arguments]) == 2
    printed = capsys.readouterr()
    assert not printed.out and printed.err.count("\n") == 1
    assert printed.err.startswith("titan_attent.look: error: ") and message in printed.err


def test_it_starts_without_the_slow_packages(data: Path, pair: Path) -> None:
    code = (
        "import sys; from titan_attent.look.command import main; "
        f"main([{str(data)!r}, '--scores', {str(pair)!r}]); "
        "slow = {'torchtitan', 'matplotlib', 'tensorboard', 'pyarrow', 'tokenizers'} & set(sys.modules); "
        "assert not slow, slow"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
