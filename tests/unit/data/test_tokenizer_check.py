"""tokenizer_check.py: which differences give the ids of two data sets another meaning, and which do not."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from titan_attent.data.text.shards import TokenShards
from titan_attent.data.text.tokenizer_check import check_same_tokenizer, tokenizer_differences
from titan_attent.data.text.writer import write_dataset

INFO: dict[str, Any] = {
    "name": "train:300",
    "vocab_size": 300,
    "eos_id": 299,
    "file": "tokenizer.tiktoken",
    "sha256": "ab" * 32,
    "pattern": r"\w+",
    "special_tokens": {"<|endoftext|>": 299},
}


def checked(ours: dict[str, Any], theirs: dict[str, Any]) -> None:
    one, other = (SimpleNamespace(tokenizer_info=info, path=Path(path)) for info, path in ((ours, "a"), (theirs, "b")))
    check_same_tokenizer(other, one, what="--trusted ")  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "changed",
    [{}, {"name": "tokenizer"}, {"file": "ranks.tiktoken"}, {"name": "x", "file": "y"}],
)
def test_names_do_not_matter(changed: dict[str, Any]) -> None:
    assert tokenizer_differences(INFO, INFO | changed) == []
    checked(INFO, INFO | changed)


@pytest.mark.parametrize(
    "changed, word",
    [
        ({"sha256": "cd" * 32}, "ranks cdcdcdcdcdcd... instead of abababababab..."),  # other merges, the same size
        ({"eos_id": 0}, "eos id 0 instead of 299"),
        ({"vocab_size": 301}, "vocabulary 301 instead of 300"),
        ({"pattern": r"\s+"}, "pattern"),
        ({"special_tokens": {"<|endoftext|>": 299, "<|pad|>": 298}}, "special tokens"),
        ({"special_tokens": {}}, "special tokens"),
    ],
)
def test_whatever_gives_an_id_another_meaning_is_refused(changed: dict[str, Any], word: str) -> None:
    for ours, theirs in ((INFO, INFO | changed), (INFO | changed, INFO)):
        with pytest.raises(ValueError, match="another tokenizer") as caught:
            checked(ours, theirs)
        message = str(caught.value)
        assert message.startswith("--trusted b was written with another tokenizer than the run's data, a: ")
        assert word.split(" instead")[0].split()[0] in message and "--tokenizer train:300" in message
    with pytest.raises(ValueError, match=word.replace(".", r"\.")):
        checked(INFO, INFO | changed)


def test_an_index_without_ranks_is_compared_by_what_it_has() -> None:
    bare = {key: INFO[key] for key in ("name", "vocab_size", "eos_id")}
    checked(bare, dict(bare))
    checked(INFO, bare)
    for changed in ({"name": "other"}, {"vocab_size": 301}, {"eos_id": 1}):
        with pytest.raises(ValueError, match="another tokenizer"):
            checked(bare, bare | changed)
        with pytest.raises(ValueError, match="another tokenizer"):
            checked(INFO, bare | changed)


def test_two_trained_tokenizers_of_one_size_are_distinguished_and_the_fix_works(tmp_path: Path) -> None:
    texts = {"a": "green river stone lamp walk " * 200, "b": "quiet winter letter field glass " * 200}
    for name, text in texts.items():
        (tmp_path / f"{name}.txt").write_text(text)
        write_dataset([tmp_path / f"{name}.txt"], output=tmp_path / name, tokenizer="train:270")
    ours, theirs = (TokenShards(tmp_path / name) for name in texts)
    assert ours.tokenizer_info["vocab_size"] == theirs.tokenizer_info["vocab_size"]
    with pytest.raises(ValueError, match="ranks") as caught:
        check_same_tokenizer(theirs, ours, what="")
    fix = str(caught.value).split("--tokenizer ")[1]
    write_dataset([tmp_path / "b.txt"], output=tmp_path / "again", tokenizer=fix)
    check_same_tokenizer(TokenShards(tmp_path / "again"), ours, what="")
    # The same ranks under another name and file.
    copied = tmp_path / "copied.tiktoken"
    copied.write_bytes(Path(fix).read_bytes())
    write_dataset([tmp_path / "b.txt"], output=tmp_path / "renamed", tokenizer=str(copied))
    check_same_tokenizer(TokenShards(tmp_path / "renamed"), ours, what="")
