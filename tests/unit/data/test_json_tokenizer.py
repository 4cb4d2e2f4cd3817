"""Tokenizers of ``tokenizer.json`` against the library's own encoding of the same files, and against the text."""

import json
import pickle
from pathlib import Path
from typing import Any

import json_tokenizers
import numpy as np
import pytest
import tokenizers
from json_tokenizers import EOS
from tokenizers import AddedToken, decoders, models, pre_tokenizers

from titan_attent.data.adopt.adopt import adopt
from titan_attent.data.adopt.options import Options
from titan_attent.data.text.any_tokenizer import NoBytesError
from titan_attent.data.text.decoded import DecodedExamples
from titan_attent.data.text.json_tokenizer import JsonTokenizer
from titan_attent.data.text.shards import TokenDataset, TokenShards
from titan_attent.data.text.tokenizer import load_tokenizer, open_tokenizer
from titan_attent.data.text.tokenizer_check import check_same_tokenizer
from titan_attent.data.text.writer import write_dataset

TEXT = Path(json.__file__).read_text("utf-8") + "Überall grüßen Vögel.\n" * 9 + "≤ 10 € 漢字\n" * 9
PARTS = [
    *TEXT.split("\n\n"),
    *("", " ", "\n\n\n", "  two  spaces ", "a\0b", "👍🏽 e\u0301 \ufb01", "\u3000x\u2028y", "unseen: ỗ ☃", "end  "),
]
KINDS = list(EOS)
LOSSLESS = ("byte_level", "unigram")


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A folder like that of a model, of each kind."""
    root = tmp_path_factory.mktemp("tokenizers")
    trained = {kind: json_tokenizers.train(kind, TEXT.split("\n"), vocab_size=700) for kind in KINDS}
    return {kind: json_tokenizers.write(root / kind, one, eos=EOS[kind]) for kind, one in trained.items()}


@pytest.fixture(scope="module")
def ours(folders: dict[str, Path]) -> dict[str, Any]:
    return {kind: load_tokenizer(str(folder)) for kind, folder in folders.items()}


def reference(folder: Path) -> tokenizers.Tokenizer:
    """The library's own, without what it adds to a text."""
    tokenizer = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer


@pytest.mark.parametrize("kind", KINDS)
def test_ids_and_text_are_the_librarys(kind: str, folders: dict[str, Path], ours: dict[str, Any]) -> None:
    expected, tokenizer = reference(folders[kind]), ours[kind]
    assert (tokenizer.eos_id, tokenizer.vocab_size) == (expected.token_to_id(EOS[kind]), expected.get_vocab_size())
    for text in [TEXT, *PARTS]:
        ids = tokenizer.encode_to_array(text)
        assert ids.dtype == np.uint32 and ids.tolist() == expected.encode(text, add_special_tokens=False).ids
        assert tokenizer.decode(ids) == expected.decode(ids.tolist(), skip_special_tokens=False)
        if kind in LOSSLESS:
            # A Metaspace takes a space at the start for its own.
            assert tokenizer.decode(ids) == (text if kind == "byte_level" else text.removeprefix(" "))
    batch = tokenizer.encode_batch(PARTS, num_threads=3)
    assert [ids.tolist() for ids in batch] == [tokenizer.encode(text) for text in PARTS]


@pytest.mark.parametrize("kind", LOSSLESS)
def test_the_bytes_of_tokens_are_those_of_the_text(kind: str, ours: dict[str, Any]) -> None:
    tokenizer = ours[kind]
    for text in [TEXT, *PARTS]:
        found = b"".join(tokenizer.bytes_of(i) for i in tokenizer.encode(text))
        # A Metaspace puts a space before a text, unless it begins with one.
        assert found.decode() == (text if kind == "byte_level" or text[:1] in ("", " ") else f" {text}")
    assert tokenizer.bytes_of(tokenizer.eos_id) == EOS[kind].encode()
    assert tokenizer.bytes_of(tokenizer.vocab_size) is None


@pytest.mark.parametrize(
    ("decoder", "token", "expected"),
    [
        (decoders.Metaspace(), "▁a▁b", b" a b"),
        (decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]), "<0x0A>", b"\n"),
        (
            decoders.Sequence([decoders.Replace("▁", " "), decoders.Fuse(), decoders.Strip(" ", 1, 0)]),
            "▁<0x0A>",
            b" <0x0A>",
        ),
        (decoders.ByteLevel(), "Ġé", b" \xe9"),
        (decoders.WordPiece(), "a", None),
        (decoders.BPEDecoder(), "a", None),
        (decoders.CTC(), "a", None),
        (decoders.Sequence([decoders.Strip(" ", 1, 0), decoders.Fuse()]), "a", None),
        (None, "a", None),
    ],
)
def test_bytes_by_decoder(decoder: Any, token: str, expected: bytes | None) -> None:
    library = tokenizers.Tokenizer(models.WordLevel({token: 0, "a": 1, "<s>": 2}, unk_token="<s>"))
    if decoder is not None:
        library.decoder = decoder
    tokenizer = JsonTokenizer(library.to_str().encode(), eos="<s>", where="here")
    if expected is not None:
        assert tokenizer.bytes_of(library.token_to_id(token)) == expected
        return
    with pytest.raises(NoBytesError, match="bits per byte cannot be computed"):
        tokenizer.bytes_of(1)


@pytest.mark.parametrize("kind", KINDS)
def test_special_tokens_in_text_are_text(kind: str, folders: dict[str, Path], ours: dict[str, Any]) -> None:
    """Of a Unigram, the library gives their ids even with ``encode_special_tokens``."""
    tokenizer, special = ours[kind], set(reference(folders[kind]).get_added_tokens_decoder())
    unknown = reference(folders[kind]).token_to_id("[UNK]")
    for text in (EOS[kind], f"a{EOS[kind]}b", f"x {EOS[kind]}{EOS[kind]} <|im_start|>y", f"<{EOS[kind]}"):
        ids = tokenizer.encode(text)
        assert not special - {unknown} & set(ids), text
        if kind in LOSSLESS:
            assert tokenizer.decode(ids) == text


def test_markup_becomes_its_special_token_but_eos_does_not(folders: dict[str, Path], ours: dict[str, Any]) -> None:
    for kind in KINDS:
        number = reference(folders[kind]).token_to_id("<|im_start|>")
        ids = ours[kind].encode_markup(f"<|im_start|>user{EOS[kind]}").tolist()
        assert ids.count(number) == 1 and ours[kind].eos_id not in ids
        assert number not in ours[kind].encode("<|im_start|>user")


@pytest.mark.parametrize(
    "model", [models.WordLevel({"<s>": 0, "?": 1, "a": 2}, unk_token="?"), models.BPE({"<s>": 0, "a": 1}, [])]
)
@pytest.mark.parametrize("special", [True, False])
def test_an_eos_of_the_models_own_vocabulary(model: Any, special: bool) -> None:
    """Words that are looked up as a whole would be the eos, too; an eos need not be marked as special."""
    library = tokenizers.Tokenizer(model)
    library.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    if special:
        library.add_special_tokens(["<s>"])
    else:
        library.add_tokens([AddedToken("<s>", special=False)])
    for eos in ("<s>", 0):
        tokenizer = JsonTokenizer(library.to_str().encode(), eos=eos, where="here")
        assert tokenizer.eos_id == 0 and tokenizer.encode("a <s> a<s> <s>").count(0) == 0
        assert pickle.loads(pickle.dumps(tokenizer)).encode("a <s>") == tokenizer.encode("a <s>")


def test_an_added_token_that_is_not_special_is_itself(folders: dict[str, Path]) -> None:
    library = reference(folders["byte_level"])
    library.add_tokens([AddedToken("<tool>", special=False)])
    tokenizer = JsonTokenizer(library.to_str().encode(), eos="<|endoftext|>", where="here")
    number = library.token_to_id("<tool>")
    assert tokenizer.encode("a<tool>")[1:] == [number] and tokenizer.bytes_of(number) == b"<tool>"


def test_dropout_is_off(folders: dict[str, Path], ours: dict[str, Any]) -> None:
    fields = json.loads((folders["byte_level"] / "tokenizer.json").read_text())
    fields["model"]["dropout"] = 0.9
    tokenizer = JsonTokenizer(json.dumps(fields).encode(), eos="<|endoftext|>", where="here")
    assert tokenizer.encode(TEXT) == ours["byte_level"].encode(TEXT)


def test_text_that_is_hard_to_keep(ours: dict[str, Any]) -> None:
    for text, expected in (("a\ud800b", "a\ufffdb"), ("\ud83d\ude00", "\U0001f600")):
        for kind in LOSSLESS:
            assert ours[kind].decode(ours[kind].encode(text)) == expected
    text = "x" + " " * 150_000 + "\n" * 150_000 + "y"
    assert ours["byte_level"].decode(ours["byte_level"].encode(text)) == text
    # A normalizer loses what it loses.
    assert ours["word_piece"].decode(ours["word_piece"].encode("É  JSON")) == "e json"


def test_ids_without_a_token(ours: dict[str, Any]) -> None:
    for tokenizer in ours.values():
        assert tokenizer.decode(np.array([], dtype=np.int64)) == ""
        for number in (tokenizer.vocab_size, -1, 2**40):
            with pytest.raises(ValueError, match=r"tokenizer\.json has no token for an id"):
                tokenizer.decode([0, number])


# Files and names.


def test_eos_by_name(folders: dict[str, Path], tmp_path: Path) -> None:
    file = folders["byte_level"] / "tokenizer.json"
    alone = tmp_path / "tokenizer.json"
    alone.write_bytes(file.read_bytes())
    with pytest.raises(ValueError, match=r"does not say which.*name it with --eos, one of <\|endoftext\|>, <\|im_st"):
        load_tokenizer(str(alone))
    number = reference(tmp_path).token_to_id("<|im_start|>")
    for spec, eos in ((alone, "<|im_start|>"), (tmp_path, str(number)), (file, "<|im_start|>")):
        assert load_tokenizer(str(spec), eos=eos).eos_id == number
    for eos in ("</s>", "9999"):
        with pytest.raises(ValueError, match=rf"--eos {eos}: "):
            load_tokenizer(str(alone), eos=eos)
    (tmp_path / "tokenizer_config.json").write_text('{"eos_token": {"content": "<|im_start|>"}}')
    assert load_tokenizer(str(tmp_path)).eos_id == number
    (tmp_path / "tokenizer_config.json").write_text('{"eos_token": ')
    with pytest.raises(ValueError, match=r"tokenizer_config\.json: malformed"):
        load_tokenizer(str(tmp_path))


def test_malformed_files(tmp_path: Path) -> None:
    path = tmp_path / "tokenizer.json"
    for content in ("{}", '{"model": {"type": "BPE"', '{"version": "1.0", "model": {"type": "New"}}'):
        path.write_text(content)
        with pytest.raises(ValueError, match=r"tokenizer\.json: not a tokenizer\.json that tokenizers .* reads"):
            load_tokenizer(str(path), eos="x")


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("texts") / "texts.jsonl"
    path.write_text("".join(json.dumps({"text": part}) + "\n" for part in [*PARTS, "a</s>b<|endoftext|>[SEP]"]))
    return path


@pytest.mark.parametrize("kind", KINDS)
def test_a_data_set_keeps_the_file_and_shows_its_text(
    kind: str, folders: dict[str, Path], ours: dict[str, Any], texts: Path, tmp_path: Path
) -> None:
    output = tmp_path / "data"
    write_dataset([texts], output=output, tokenizer=str(folders[kind]))
    assert (output / "tokenizer.json").read_bytes() == (folders[kind] / "tokenizer.json").read_bytes()
    shards = TokenShards(output)
    tokenizer = open_tokenizer(shards.tokenizer_info, output)
    tokens = shards.read(0, shards.num_tokens)
    documents = np.split(tokens, np.flatnonzero(tokens == tokenizer.eos_id) + 1)[:-1]
    expected = [json.loads(line)["text"] for line in texts.read_text().splitlines()]
    assert [ids[:-1].tolist() for ids in documents] == [ours[kind].encode(text) for text in expected]
    dataset = TokenDataset(output, seq_len=16)
    assert DecodedExamples(dataset).text(3, max_tokens=16) == tokenizer.decode(tokens[48:64])
    # Other data of the same tokenizer, by the copy, whose eos is the data set's.
    write_dataset([texts], output=tmp_path / "again", tokenizer=str(output / "tokenizer.json"))
    again = TokenShards(tmp_path / "again")
    assert again.index.fingerprint == shards.index.fingerprint
    check_same_tokenizer(again, shards, what="")
    (output / "tokenizer.json").write_text("{}")
    with pytest.raises(ValueError, match=r"tokenizer\.json: its sha256 is"):
        open_tokenizer(shards.tokenizer_info, output)


def test_other_tokenizers_are_told_apart(folders: dict[str, Path], texts: Path, tmp_path: Path) -> None:
    specs = {"tiktoken": "train:300", "byte_level": str(folders["byte_level"]), "unigram": str(folders["unigram"])}
    for name, spec in specs.items():
        write_dataset([texts], output=tmp_path / name, tokenizer=spec)
    write_dataset([texts], output=tmp_path / "eos", tokenizer=specs["byte_level"], eos="<|im_start|>")
    opened = {name: TokenShards(tmp_path / name) for name in (*specs, "eos")}
    assert "kind" not in opened["tiktoken"].tokenizer_info
    for other, words in (
        ("tiktoken", "kind tiktoken instead of tokenizer.json"),
        ("unigram", "sha256 of the file"),
        ("eos", "eos id 1 instead of 0"),
    ):
        with pytest.raises(ValueError, match=words) as caught:
            check_same_tokenizer(opened[other], opened["byte_level"], what="")
        assert str(caught.value).endswith(f"--tokenizer {tmp_path / 'byte_level' / 'tokenizer.json'}")


def test_eos_of_a_rank_file_and_of_a_trained_tokenizer(texts: Path, tmp_path: Path) -> None:
    write_dataset([texts], output=tmp_path / "one", tokenizer="train:300", eos="<|endoftext|>")
    ranks = str(tmp_path / "one" / "tokenizer.tiktoken")
    assert load_tokenizer(ranks, eos="<|endoftext|>").eos_id == load_tokenizer(ranks).eos_id
    for spec, eos, words in (
        ("train:300", "</s>", r"has only <\|endoftext\|>"),
        (ranks, "</s>", "no such special token"),
        (ranks, "5", "is an ordinary token"),
    ):
        with pytest.raises(ValueError, match=rf"--eos {eos}: .*{words}"):
            write_dataset([texts], output=tmp_path / "two", tokenizer=spec, eos=eos)
    assert not (tmp_path / "two").exists()


def test_the_folder_of_a_model_is_left_alone(folders: dict[str, Path], texts: Path, tmp_path: Path) -> None:
    model = tmp_path / "model"
    model.mkdir()
    (model / "tokenizer.json").write_text("{}")
    for overwrite in (False, True):
        with pytest.raises(ValueError, match=r"tokenizer\.json: is no file of a data set.*choose another --output"):
            write_dataset([texts], output=model, tokenizer=str(folders["unigram"]), overwrite=overwrite)
    write_dataset([texts], output=model, tokenizer="train:300", overwrite=True)
    assert (model / "tokenizer.json").read_text() == "{}"
    output = tmp_path / "data"
    write_dataset([texts], output=output, tokenizer=str(folders["unigram"]))
    write_dataset([texts], output=output, tokenizer=str(folders["byte_level"]), overwrite=True)
    assert (output / "tokenizer.json").read_bytes() == (folders["byte_level"] / "tokenizer.json").read_bytes()


def test_a_conversation(folders: dict[str, Path], ours: dict[str, Any], tmp_path: Path) -> None:
    """The marker that the tokenizer has is its token; one that is the eos is refused."""
    rows = [{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b<|im_start|>"}]}] * 2
    (tmp_path / "chat.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    command: Any = {"tokenizer": str(folders["byte_level"]), "messages_key": "messages", "chat_template": "chatml"}
    write_dataset([tmp_path / "chat.jsonl"], output=tmp_path / "out", **command)
    shards, tokenizer = TokenShards(tmp_path / "out"), ours["byte_level"]
    tokens = shards.read(0, shards.num_tokens)
    text = "<|im_start|>user\na<|im_end|>\n<|im_start|>assistant\nb<|im_start|><|im_end|><|endoftext|>"
    assert tokenizer.decode(tokens) == text * 2
    assert (tokens == reference(folders["byte_level"]).token_to_id("<|im_start|>")).sum() == 4
    with pytest.raises(ValueError, match=r"chatml writes <\|im_start\|> within.*with --eos: <\|endoftext\|>"):
        write_dataset([tmp_path / "chat.jsonl"], output=tmp_path / "two", **command, eos="<|im_start|>")
    assert not (tmp_path / "two").exists()


def test_a_killed_writer_resumes_with_the_same_eos(
    folders: dict[str, Path], texts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    command: Any = {"tokenizer": str(folders["byte_level"]), "shard_tokens": 500, "num_threads": 1}
    write_dataset([texts], output=tmp_path / "whole", **command, eos="<|im_start|>")

    def killed(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("titan_attent.data.text.writer.write_index", killed)
        with pytest.raises(KeyboardInterrupt):
            write_dataset([texts], output=tmp_path / "out", **command, eos="<|im_start|>")
    with pytest.raises(ValueError, match=r"eos was '<\|im_start\|>' and is None"):
        write_dataset([texts], output=tmp_path / "out", **command)
    write_dataset([texts], output=tmp_path / "out", **command, eos="<|im_start|>")
    for file in (tmp_path / "whole").iterdir():
        assert (tmp_path / "out" / file.name).read_bytes() == file.read_bytes(), file.name


def test_adopting_with_a_tokenizer_beside_the_files(
    folders: dict[str, Path], ours: dict[str, Any], tmp_path: Path
) -> None:
    tokenizer = ours["unigram"]
    tokens = np.concatenate([[*tokenizer.encode(part), tokenizer.eos_id] for part in PARTS if part])
    for name in ("config", "named", "other"):
        (tmp_path / name).mkdir()
        tokens.astype(np.uint16).tofile(tmp_path / name / "train.bin")
        (tmp_path / name / "tokenizer.json").write_bytes(tokenizer.content)
    (tmp_path / "config" / "tokenizer_config.json").write_text('{"eos_token": "</s>"}')
    options = {"config": Options(dtype="uint16"), "named": Options(dtype="uint16", eos="</s>")}
    for name, one in options.items():
        summary = adopt([tmp_path / name], tokenizer=str(tmp_path / name), options=one)
        assert summary.index.num_documents == sum(map(bool, PARTS))
        assert summary.index.tokenizer["eos_id"] == tokenizer.eos_id
        shards = TokenShards(tmp_path / name)
        assert open_tokenizer(shards.tokenizer_info, shards.path).encode(TEXT) == tokenizer.encode(TEXT)
    with pytest.raises(ValueError, match="does not say which token ends a document"):
        adopt([tmp_path / "other"], tokenizer=str(tmp_path / "other"), options=Options(dtype="uint16"))
    with pytest.raises(ValueError, match=r"other.tokenizer\.json: has a name that adopting writes, and stays"):
        adopt([tmp_path / "other"], tokenizer=str(folders["byte_level"]), options=Options(dtype="uint16"))
