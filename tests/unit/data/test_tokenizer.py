"""Tokenizers against tiktoken itself, against the trainer's own encoder, and against text that is hard to keep."""

import base64
import json
import os
import pickle
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import tiktoken
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st

from titan_attent.data.text.bpe import parse_ranks, train_ranks
from titan_attent.data.text.tiktoken_tokenizer import (
    SPLIT_PATTERN,
    WHITESPACE_BLOCK,
    TiktokenTokenizer,
    train_tokenizer,
)
from titan_attent.data.text.tokenizer import load_tokenizer, open_tokenizer

HARD_TEXTS = [
    "",
    "plain text",
    "naïve café, e\u0301 decomposed, \u212b \ufb01 ligature",
    "漢字かな交じり文 한국어 ไทย हिन्दी عربي עברית \u202bRTL\u202c",
    "👩‍👩‍👧‍👦 👍🏽 🏳️‍🌈 \U0001f9d1\u200d\U0001f680",
    "zero\u200bwidth\u200djoiner\u2060\ufeff",
    "\ufeffbyte order mark",
    "\n",
    "\n\n\n",
    "\r\n\r \r\r\n",
    " \t \u00a0\u2003\u3000\u0085\u2028\u2029 x",
    "trailing spaces   ",
    "\0",
    "a\0b\0\0",
    "".join(map(chr, range(0x20))) + "\x7f" + "".join(map(chr, range(0x80, 0xA0))),
    "\ud7ff\ue000\uffff\U00010000\U0010ffff",
    "1234567890.1234 ½ ٣ Ⅷ",
    "I'm you'LL it'ſ",
    "<|endoftext|> <|fim_prefix|> text",
    "x" * 5000,
    "=" * 3000 + "\n" * 3000,
]


MODULES = ["argparse", "ast", "calendar", "codecs", "configparser", "csv", "datetime", "difflib", "doctest", "inspect"]


@pytest.fixture(scope="module")
def corpus() -> str:
    """Real text: sources of the standard library, half a megabyte."""
    return "\n".join(Path(os.__file__).with_name(f"{name}.py").read_text("utf-8") for name in MODULES)


@pytest.fixture(scope="module")
def trained(corpus: str) -> TiktokenTokenizer:
    return train_tokenizer(corpus.splitlines(keepends=True), vocab_size=2000)


# Training.


def test_trained_ids_are_bytes_then_merges_then_eos(trained: TiktokenTokenizer) -> None:
    assert (trained.vocab_size, trained.eos_id) == (2000, 1999)
    assert [trained._encoding.decode_single_token_bytes(i) for i in range(256)] == [bytes([i]) for i in range(256)]
    for i in range(256, 1999):
        token = trained._encoding.decode_single_token_bytes(i)
        # A merge joins two tokens that were learned before it.
        halves = [(token[:k], token[k:]) for k in range(1, len(token))]
        ranks = trained._encoding._mergeable_ranks
        assert any(max(ranks.get(left, i), ranks.get(right, i)) < i for left, right in halves), token


def test_trained_tokenizer_agrees_with_the_trainer(corpus: str) -> None:
    """The `tokenizers` library, set up by its own documentation, encodes with the merges that it learned itself."""
    from tokenizers import Regex, models, pre_tokenizers, trainers

    alphabet = pre_tokenizers.ByteLevel.alphabet()
    reference = tokenizers.Tokenizer(models.BPE())
    reference.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(SPLIT_PATTERN), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    lines = corpus.splitlines(keepends=True)
    trainer = trainers.BpeTrainer(vocab_size=1999, min_frequency=2, initial_alphabet=alphabet, show_progress=False)
    reference.train_from_iterator(lines, trainer=trainer)
    ours = train_tokenizer(lines, vocab_size=2000)
    other_text = (
        Path(tokenizers.__file__).read_text("utf-8") + HARD_TEXTS[3] + HARD_TEXTS[4] + Path(pytest.__file__).read_text()
    )
    for line in [*lines, *other_text.splitlines(keepends=True)]:
        expected = [reference.id_to_token(i) for i in reference.encode(line).ids]
        assert [byte_level(ours._encoding.decode_single_token_bytes(i)) for i in ours.encode(line)] == expected


def byte_level(token: bytes) -> str:
    """``token`` as the `tokenizers` library spells it."""
    return "".join(SPELLING[byte] for byte in token)


def _spelling() -> dict[int, str]:
    """Byte -> character, learned by letting the library spell every byte that occurs in UTF-8."""
    level = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    spelling: dict[int, str] = {}
    points = [*range(0x800), *range(0x800, 0xD800, 0x40), *range(0xE000, 0x110000, 0x1000)]
    for character in map(chr, points):
        [(spelled, _)] = level.pre_tokenize_str(character)
        spelling.update(zip(character.encode(), spelled, strict=True))
    return spelling


SPELLING = _spelling()


def test_training_is_deterministic(trained: TiktokenTokenizer, corpus: str, tmp_path: Path) -> None:
    again = train_tokenizer(iter(corpus.splitlines(keepends=True)), vocab_size=2000)
    assert again.info() == trained.info()
    # Nor does it depend on the process, its hash seed, or the number of threads.
    source = tmp_path / "text.txt"
    source.write_bytes(corpus.encode())
    code = (
        "import sys; from pathlib import Path; from titan_attent.data.text.tokenizer import train_tokenizer;"
        "text = Path(sys.argv[1]).read_bytes().decode();"
        "print(train_tokenizer(text.splitlines(keepends=True), vocab_size=2000).info()['sha256'])"
    )
    environment = {**os.environ, "PYTHONHASHSEED": "7", "RAYON_NUM_THREADS": "1"}
    process = subprocess.run([sys.executable, "-c", code, str(source)], env=environment, capture_output=True, text=True)
    assert process.stdout.strip() == trained.info()["sha256"], process.stderr


def test_little_text_gives_a_small_vocabulary() -> None:
    tokenizer = train_tokenizer(["abab abab"], vocab_size=4096)
    # Learned: ab, abab; the pair " abab" was seen once only.
    assert (tokenizer.vocab_size, tokenizer.eos_id) == (259, 258)
    assert train_tokenizer([], vocab_size=4096).vocab_size == 257
    assert train_tokenizer(["abab abab"], vocab_size=257).vocab_size == 257
    assert tokenizer.decode(tokenizer.encode("abab 漢")) == "abab 漢"


def test_training_on_one_long_pre_token_is_not_quadratic() -> None:
    ranks = train_ranks([" " * 300_000 + "a" * 300_000], num_ranks=300, pattern=SPLIT_PATTERN)
    assert b"a" * 256 in ranks and max(map(len, ranks)) == 256


@pytest.mark.parametrize("vocab_size", [256, 1, 0, -5])
def test_vocabulary_without_room(vocab_size: int) -> None:
    with pytest.raises(
        ValueError, match=rf"train:{vocab_size}: the 256 single bytes and <\|endoftext\|>.*257; give 257"
    ):
        train_tokenizer([], vocab_size=vocab_size)


# Text and back.


@pytest.mark.parametrize("text", HARD_TEXTS, ids=range(len(HARD_TEXTS)))
def test_hard_text_comes_back(trained: TiktokenTokenizer, text: str) -> None:
    ids = trained.encode(text)
    assert trained.decode(ids) == text
    assert all(0 <= i < trained.eos_id for i in ids)


@settings(deadline=None)
@given(text=st.text())
def test_any_text_comes_back(trained: TiktokenTokenizer, text: str) -> None:
    assert trained.decode(trained.encode(text)) == text


@settings(deadline=None)
@given(text=st.text(st.characters(codec=None) | st.sampled_from("\ud800\udbff\udc00\udfff")))
def test_lone_surrogates_become_replacement_characters(trained: TiktokenTokenizer, text: str) -> None:
    expected, i = "", 0
    while i < len(text):
        pair = text[i : i + 2]
        if len(pair) == 2 and "\ud800" <= pair[0] <= "\udbff" and "\udc00" <= pair[1] <= "\udfff":
            expected += chr(0x10000 + (ord(pair[0]) - 0xD800) * 0x400 + ord(pair[1]) - 0xDC00)
            i += 2
        else:
            expected += "\ufffd" if "\ud800" <= pair[0] <= "\udfff" else pair[0]
            i += 1
    assert trained.decode(trained.encode(text)) == expected
    assert train_tokenizer([text] * 2, vocab_size=300).info() == train_tokenizer([expected] * 2, vocab_size=300).info()


def test_encoding_is_that_of_tiktoken(trained: TiktokenTokenizer, corpus: str) -> None:
    encoding = trained._encoding
    for part in [corpus, *HARD_TEXTS, "\ud800", "a\udfffb", "\ud83d\ude00"]:
        assert trained.encode(part) == encoding.encode_ordinary(part)
        array = trained.encode_to_array(part)
        assert array.dtype == np.uint32 and array.tolist() == encoding.encode_ordinary(part)


def test_special_tokens_in_text_are_text(trained: TiktokenTokenizer) -> None:
    text = "a<|endoftext|>b"
    assert trained.eos_id not in trained.encode(text)
    assert trained.decode([*trained.encode("a"), trained.eos_id]) == "a<|endoftext|>"


def test_tiktoken_that_reads_special_tokens_in_text() -> None:
    class Old(tiktoken.Encoding):
        """As tiktoken up to 0.10."""

        def encode_to_numpy(self, text: str, **_: object) -> np.ndarray:
            return np.array(self.encode(text, allowed_special="all"), dtype=np.uint32)

    encoding = Old("old", pat_str=".", mergeable_ranks=BYTES, special_tokens={"<|endoftext|>": 256})
    refused(lambda: TiktokenTokenizer(encoding), tiktoken.__version__, "special tokens as tokens", "tiktoken 0.13")


def test_batch_is_each_in_order(trained: TiktokenTokenizer) -> None:
    texts = HARD_TEXTS * 5
    for num_threads in (1, 4):
        batch = trained.encode_batch(texts, num_threads=num_threads)
        assert [ids.tolist() for ids in batch] == [trained.encode(text) for text in texts]


@pytest.mark.parametrize("character", [" ", "\t", "\n", "\u3000"])
@pytest.mark.parametrize("ends", [("", ""), ("x", "y"), ("x" * (WHITESPACE_BLOCK - 1), "y" * WHITESPACE_BLOCK)])
def test_endless_whitespace_comes_back(trained: TiktokenTokenizer, character: str, ends: tuple[str, str]) -> None:
    # tiktoken itself panics on it.
    text = ends[0] + character * 1_200_000 + ends[1]
    assert trained.decode(trained.encode(text)) == text


def test_whitespace_below_a_block_is_left_to_tiktoken(trained: TiktokenTokenizer) -> None:
    text = ("x" + " " * (WHITESPACE_BLOCK - 2)) * 4 + "x"
    assert trained.encode(text) == trained._encoding.encode_ordinary(text)


def test_decode_of_a_cut_character_and_of_unknown_ids(trained: TiktokenTokenizer) -> None:
    assert trained.decode([0xE6, 0xBC, 0xA2]) == "漢" and trained.decode([0xE6, 0xBC]) == "\ufffd"
    assert trained.decode(np.array([], dtype=np.int64)) == ""
    for i in (2000, -1, 2**40):
        with pytest.raises(
            ValueError, match=r"'trained' has no token for an id.*below 2000; decode with the tokenizer"
        ):
            trained.decode([0, i])


# Rank files, and data set folders.


def rank_file(path: Path, ranks: dict[bytes, int]) -> Path:
    lines = [base64.b64encode(token) + b" " + str(rank).encode() for token, rank in ranks.items()]
    path.write_bytes(b"\n".join(lines) + b"\n")
    return path


BYTES = {bytes([i]): i for i in range(256)}


def test_rank_file_gets_eos_as_next_id(tmp_path: Path) -> None:
    # Bytes in another order than their values, a gap, and no order in the file.
    ranks = {b"ab": 300, **{bytes([255 - i]): i for i in range(256)}}
    tokenizer = load_tokenizer(str(rank_file(tmp_path / "mine.model", ranks)))
    assert (tokenizer.eos_id, tokenizer.vocab_size, tokenizer.info()["name"]) == (301, 302, "mine")
    assert tokenizer.encode("cab") == [255 - ord("c"), 300]
    assert tokenizer.decode([300, 301]) == "ab<|endoftext|>"


def test_saved_file_is_read_by_tiktoken(trained: TiktokenTokenizer, tmp_path: Path) -> None:
    trained.save(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["tokenizer.tiktoken"]
    ranks = tiktoken.load.load_tiktoken_bpe(str(tmp_path / "tokenizer.tiktoken"))
    assert ranks == trained._encoding._mergeable_ranks and list(ranks.values()) == sorted(ranks.values())


def registered(name: str, special_tokens: dict[str, int]) -> tiktoken.Encoding:
    pattern = r"\p{L}+|\P{L}"
    return tiktoken.Encoding(name, pat_str=pattern, mergeable_ranks=BYTES, special_tokens=special_tokens)


@pytest.mark.parametrize("special_tokens", [{}, {"<|endoftext|>": 256}, {"<|endoftext|>": 400, "<|pad|>": 500}])
def test_folder_gives_the_same_tokenizer(special_tokens: dict[str, int], tmp_path: Path) -> None:
    tokenizer = TiktokenTokenizer(registered("named", special_tokens))
    tokenizer.save(tmp_path)
    info = json.loads(json.dumps(tokenizer.info("tokenizer.tiktoken")))
    again = open_tokenizer(info, tmp_path)
    assert again.info() == tokenizer.info() == info
    assert (again.eos_id, again.vocab_size) == (tokenizer.eos_id, tokenizer.vocab_size)
    assert pickle.loads(pickle.dumps(again)).info() == info
    for text in HARD_TEXTS:
        assert again.encode(text) == tokenizer.encode(text)


def test_name_is_that_of_tiktoken(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tiktoken, "get_encoding", lambda name: registered(name, {"<|endoftext|>": 256, "<|pad|>": 300}))
    tokenizer = load_tokenizer("gpt2")
    assert (tokenizer.info()["name"], tokenizer.eos_id, tokenizer.vocab_size) == ("gpt2", 256, 301)


# Every mistake: one message that says what is wrong, where and how to fix it.


def refused(call: Callable[[], object], *words: str) -> None:
    with pytest.raises(ValueError) as caught:
        call()
    for word in words:
        assert word in str(caught.value), f"{word!r} is not in: {caught.value}"


@pytest.mark.parametrize("spec", ["gpt-nine", "no/such/file.model", ".", "train:4096"])
def test_unknown_name(spec: str) -> None:
    refused(lambda: load_tokenizer(spec), repr(spec), "neither", "o200k_base", "path of a tiktoken rank file", "train:")


def test_no_network(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """tiktoken's real download, through a proxy that is not there."""
    for name in ("https_proxy", "HTTPS_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    for name, value in (("NO_PROXY", ""), ("no_proxy", ""), ("TIKTOKEN_CACHE_DIR", str(tmp_path))):
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(tiktoken.registry, "ENCODINGS", {})  # nothing is loaded yet
    with pytest.raises(ValueError, match="^tokenizer 'o200k_base': tiktoken could not download") as refusal:
        load_tokenizer("o200k_base")
    for word in ("set TIKTOKEN_CACHE_DIR", "local rank file", "train:VOCAB_SIZE"):
        assert word in str(refusal.value)


@pytest.mark.parametrize(
    "line", [b"YQ==", b"YQ== 1 2", b"YQ== x", b"Y 300", b"!!!! 300", b'{"version": "1.0"}', b"\x00\x01\x02"]
)
def test_malformed_rank_line(tmp_path: Path, line: bytes) -> None:
    path = rank_file(tmp_path / "ranks", BYTES)
    path.write_bytes(path.read_bytes() + b"\n" + line + b"\n")
    refused(lambda: load_tokenizer(str(path)), f"{path}:258: malformed line", "use a tiktoken rank file")


@pytest.mark.parametrize(("token", "rank"), [(b"ab", -1), (b"ab", 2**31), (b"", 300)])
def test_rank_out_of_range(tmp_path: Path, token: bytes, rank: int) -> None:
    path = rank_file(tmp_path / "ranks", {**BYTES, token: rank})
    words = (f"token {token!r} with rank {rank}", "use a tiktoken rank file") if token else (f"{path}:257:",)
    refused(lambda: load_tokenizer(str(path)), f"{path}:257:", *words)


@pytest.mark.parametrize(("token", "rank"), [(b"a", 300), (b"ab", ord("a"))])
def test_duplicate_rank(tmp_path: Path, token: bytes, rank: int) -> None:
    path = rank_file(tmp_path / "ranks", BYTES)
    path.write_bytes(path.read_bytes() + base64.b64encode(token) + b" %d\n" % rank)
    line = ord("a") + 1
    refused(lambda: load_tokenizer(str(path)), f"{path}:257:", f"duplicate of line {line}", "use a tiktoken rank file")


def test_missing_bytes(tmp_path: Path) -> None:
    ranks = {token: rank for token, rank in BYTES.items() if rank not in (0x41, 0x42)}
    path = rank_file(tmp_path / "ranks", ranks)
    refused(lambda: load_tokenizer(str(path)), str(path), "2 of the 256", "0x41", "use a tiktoken rank file")
    with pytest.raises(ValueError, match="256 of the 256"):
        parse_ranks(b"", path=path)


def test_changed_or_missing_tokenizer_of_a_data_set(trained: TiktokenTokenizer, tmp_path: Path) -> None:
    trained.save(tmp_path)
    path, info = tmp_path / "tokenizer.tiktoken", trained.info()
    path.write_bytes(path.read_bytes().replace(b" 300\n", b" 3000\n"))
    refused(lambda: open_tokenizer(info, tmp_path), str(path), "sha256", "copy it again")
    path.unlink()
    refused(lambda: open_tokenizer(info, tmp_path), str(path), "missing", "copy it again")
    for elsewhere in (f"../{tmp_path.name}/tokenizer.tiktoken", "/etc/hostname", "..", "", 3):
        refused(
            lambda name=elsewhere: open_tokenizer({**info, "file": name}, tmp_path),
            f"{tmp_path}: its tokenizer file {elsewhere!r} is not the name of a file in the folder",
        )
    del info["file"]
    refused(lambda: open_tokenizer(info, tmp_path), str(tmp_path), "no tokenizer file", "titan_attent.data.text")
