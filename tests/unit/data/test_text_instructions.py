"""Prompts, completions and conversations: the tokens and the mask against lists built by hand, and bad records."""

import base64
import json
import os
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import tiktoken
from hypothesis import given, settings
from hypothesis import strategies as st

from titan_attent.data.text.__main__ import main
from titan_attent.data.text.any_tokenizer import Tokenizer
from titan_attent.data.text.documents import Document, ReadPosition
from titan_attent.data.text.encode import encode_documents
from titan_attent.data.text.records import CHAT_TEMPLATES, TEXT_RECORDS, Records, make_records
from titan_attent.data.text.shards import TokenShards
from titan_attent.data.text.tiktoken_tokenizer import TiktokenTokenizer, train_tokenizer
from titan_attent.data.text.writer import write_dataset

EOS = 256
Part = tuple[str, bool]
PAIRS = [(f"question {i}? ", "漢字 answer " * (1 + i % 3)) for i in range(40)] + [("", "no prompt")]
PAIR_RECORDS: list[dict[str, Any]] = [{"id": i, "a": answer, "q": prompt} for i, (prompt, answer) in enumerate(PAIRS)]
CHATS: list[list[tuple[str, str]]] = [
    [("system", "be kind"), ("user", "hi"), ("assistant", "hello"), ("user", "漢"), ("assistant", "字")],
    [("user", "2+2"), ("assistant", "4")],
    [("assistant", "first"), ("user", "last")],
    [("user", "<|im_end|> in a text"), ("tool", ""), ("assistant", "<|eot_id|><|endoftext|>")],
]
CHAT_RECORDS: list[dict[str, Any]] = [{"m": [{"role": r, "content": c} for r, c in chat]} for chat in CHATS]
KEYS: dict[str, Any] = {"prompt_key": "q", "completion_key": "a"}


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A rank file of the 256 bytes: id = byte, eos = 256."""
    path = tmp_path_factory.mktemp("tokenizer") / "bytes.model"
    path.write_bytes(b"".join(b"%s %d\n" % (base64.b64encode(bytes([i])), i) for i in range(256)))
    return str(path)


def by_hand(documents: list[list[Part]]) -> tuple[list[list[int]], list[list[bool]]]:
    """The ids and the mask of documents, given by their parts; the eos counts like the last one."""
    tokens = [[*"".join(text for text, _ in parts).encode(), EOS] for parts in documents]
    masks = [[counts for text, counts in parts for _ in text.encode()] + [parts[-1][1]] for parts in documents]
    return tokens, masks


def written(folder: Path) -> tuple[list[list[int]], list[list[bool]]]:
    """The ids and the mask of every document, by the interface of TokenShards."""
    shards, tokens, masks = TokenShards(folder), [], []
    shards.verify_checksums()
    for number in range(shards.num_shards):
        start = 0
        for stop in shards.document_ends(number, 0, shards.num_documents_of(number)).tolist():
            tokens.append(shards.read_span(number, start, stop).tolist())
            masks.append(shards.read_mask(number, start, stop).tolist())
            start = stop
    return tokens, masks


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def lines(path: Path, records: list[Any]) -> Path:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def parquet(path: Path, records: list[Any]) -> Path:
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(records), path, row_group_size=7)
    return path


def array(path: Path, records: list[Any]) -> Path:
    path.write_text(json.dumps(records, indent=1))
    return path


FORMATS = {"a.jsonl": lines, "a.parquet": parquet, "a.json": array}


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("shard_tokens", [100, 10**6])
def test_a_completion_counts_and_its_prompt_does_not(ranks: str, tmp_path: Path, name: str, shard_tokens: int) -> None:
    source, output = FORMATS[name](tmp_path / name, PAIR_RECORDS), tmp_path / "out"
    write_dataset(source, output=output, tokenizer=ranks, shard_tokens=shard_tokens, **KEYS)
    assert written(output) == by_hand([[(prompt, False), (answer, True)] for prompt, answer in PAIRS])
    assert TokenShards(output).has_mask


def chat_by_hand(chat: list[tuple[str, str]], template: str) -> list[Part]:
    """The parts of a conversation, with the templates written out."""
    parts: list[Part] = []
    for number, (role, content) in enumerate(chat):
        counts = role == "assistant"
        header, footer = {
            "plain": (f"{role}:\n", "\n\n"),
            "chatml": ("\n" * (number > 0) + f"<|im_start|>{role}\n", "<|im_end|>"),
            "llama3": (f"<|start_header_id|>{role}<|end_header_id|>\n\n", "<|eot_id|>"),
        }[template]
        parts += [(header, False), (content, counts), (footer, counts)]
    return parts


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("template", [None, *CHAT_TEMPLATES])
def test_the_turns_of_the_assistant_count(ranks: str, tmp_path: Path, name: str, template: str | None) -> None:
    source, output = FORMATS[name](tmp_path / name, CHAT_RECORDS), tmp_path / "out"
    write_dataset(source, output=output, tokenizer=ranks, messages_key="m", chat_template=template)
    expected = by_hand([chat_by_hand(chat, template or "plain") for chat in CHATS])
    assert written(output) == expected
    # The eos of the conversation that ends with the user does not count.
    assert [mask[-1] for mask in expected[1]] == [True, True, False, True]


def test_commands(ranks: str, tmp_path: Path) -> None:
    """The options of the command, for a folder whose .json file is known as records by its key."""
    for name, records, keys in (
        ("pairs", PAIR_RECORDS, ["--prompt-key", "q", "--completion-key", "a"]),
        ("chats", CHAT_RECORDS, ["--messages-key", "m", "--chat-template", "chatml"]),
    ):
        (tmp_path / name).mkdir()
        array(tmp_path / name / "a.json", records)
        (tmp_path / name / "notes.txt").write_text("about")
        output = tmp_path / f"{name}-out"
        assert main([str(tmp_path / name), "--output", str(output), "--tokenizer", ranks, *keys]) == 0
        assert TokenShards(output).index.num_documents == len(records) and TokenShards(output).has_mask


def test_a_text_has_no_mask(ranks: str, tmp_path: Path) -> None:
    source = lines(tmp_path / "a.jsonl", [{"text": "x"}, {"text": ""}])
    write_dataset(source, output=tmp_path / "out", tokenizer=ranks)
    assert written(tmp_path / "out") == ([[ord("x"), EOS], [EOS]], [[True, True], [True]])
    assert not TokenShards(tmp_path / "out").has_mask and not list((tmp_path / "out").glob("*.mask"))


# The border of the mask.


def encoded(tokenizer: Tokenizer, records: Records, *values: Any) -> tuple[list[int], list[bool]]:
    content = records.content(values, where="here")
    assert isinstance(content, tuple)
    text = "".join(segment.text for segment in content)
    documents = [Document("default", text, ReadPosition(), 0, None, content)]
    [(_, tokens, counts)] = encode_documents(documents, tokenizer=tokenizer, num_threads=1)
    assert tokens is not None and counts is not None and tokens.dtype == np.uint32 and counts.dtype == np.bool_
    return tokens.tolist(), counts.tolist()


def merging(special: dict[str, int]) -> TiktokenTokenizer:
    """A tokenizer of the 256 bytes and "ab", with special tokens."""
    merges = {bytes([i]): i for i in range(256)} | {b"ab": 256}
    return TiktokenTokenizer(
        tiktoken.Encoding("merging", pat_str=r"[\s\S]+", mergeable_ranks=merges, special_tokens=special)
    )


@settings(deadline=None)
@given(prompt=st.text("ab ", max_size=6), completion=st.text("ab ", min_size=1, max_size=6).filter(str.strip))
def test_no_token_covers_the_border(prompt: str, completion: str) -> None:
    """The ids of the prompt and of the completion are those of each alone, also where "a" + "b" would be one token."""
    tokenizer = merging({})
    tokens, counts = encoded(tokenizer, make_records(prompt_key="q", completion_key="a"), prompt, completion)
    first, second = tokenizer.encode(prompt), tokenizer.encode(completion)
    assert tokens == [*first, *second, tokenizer.eos_id]
    assert counts == [False] * len(first) + [True] * (len(second) + 1)


def test_a_template_uses_the_special_tokens_of_the_tokenizer_and_a_message_does_not() -> None:
    messages = [{"role": "user", "content": "<|im_end|>"}, {"role": "assistant", "content": "ok<|endoftext|>"}]
    records = make_records(messages_key="m", chat_template="chatml")
    tokenizer = merging({"<|im_start|>": 300, "<|im_end|>": 301, "<|endoftext|>": 302})
    tokens, counts = encoded(tokenizer, records, messages)
    expected: list[tuple[list[int], bool]] = [
        ([300, *b"user\n"], False),
        ([*b"<|im_end|>"], False),
        ([301], False),
        ([10, 300, *b"assistant\n"], False),
        ([*b"ok<|endoftext|>"], True),
        ([301, 302], True),
    ]
    assert tokens == [token for part, _ in expected for token in part]
    assert counts == [counted for part, counted in expected for _ in part]
    # Without them, all of it is ordinary text.
    tokens, _ = encoded(merging({}), records, messages)
    assert bytes(tokens[:11]) == b"<|im_start|"


# Records that cannot be used.


BAD_PAIRS: list[tuple[Any, str, str]] = [
    ({"q": "x"}, "without text", "no key 'a'; select the completion with --completion-key, one of 'q'"),
    ({"a": "x"}, "without text", "no key 'q'; select the prompt with --prompt-key, one of 'a'"),
    ({"q": "x", "a": None}, "without text", "'a' is NoneType, not a string"),
    ({"q": ["x"], "a": "y"}, "not a string", "'q' is list, not a string; fix or remove the record"),
    (
        {"q": "x", "a": 3},
        "not a string",
        "'a' is int, not a string; fix or remove the record, or choose another --comp",
    ),
    ({"q": "x", "a": ""}, "empty completion", "'a' is empty or only white space"),
    ({"q": "x", "a": " \n"}, "empty completion", "'a' is empty or only white space"),
    (["x", "y"], "malformed", "a JSON list where an object with the key 'q' and the key 'a' is expected"),
]
BAD_CHATS: list[tuple[Any, str, str]] = [
    ({"x": []}, "without text", "no key 'm'; select the messages with --messages-key, one of 'x'"),
    ({"m": None}, "without text", "'m' is NoneType, not a list of messages"),
    ({"m": "user: hi"}, "not messages", "'m' is str, not a list of messages; fix or remove the record, or choose"),
    ({"m": []}, "without an assistant's turn", "'m' has 0 messages, none of the role 'assistant'"),
    ({"m": [{"role": "user", "content": "x"}]}, "without an assistant's turn", "'m' has 1 messages, none"),
    ({"m": ["x"]}, "not messages", "message 1 of 'm' is str where an object with the strings 'role' and 'content'"),
    (
        {"m": [{"from": "gpt", "value": "x"}]},
        "not messages",
        "message 1 of 'm' is an object with NoneType and NoneType",
    ),
    ({"m": [{"role": "assistant", "content": ["x"]}]}, "not messages", "an object with str and list where"),
    ({"m": [{"role": "<|im_end|>", "content": "x"}]}, "not messages", "has the role '<|im_end|>'; a role has letters"),
    ({"m": [{"role": "assistant", "content": " "}]}, "empty completion", "message 1 of 'm', an assistant's turn, is"),
]


@pytest.mark.parametrize(
    ("kind", "record", "reason", "message"),
    [*(("pair", *case) for case in BAD_PAIRS), *(("chat", *case) for case in BAD_CHATS)],
)
def test_a_bad_record_is_refused_or_skipped(
    ranks: str, tmp_path: Path, kind: str, record: Any, reason: str, message: str
) -> None:
    good = PAIR_RECORDS if kind == "pair" else CHAT_RECORDS
    keys: dict[str, Any] = KEYS if kind == "pair" else {"messages_key": "m"}
    source = lines(tmp_path / "a.jsonl", [good[0], record, good[1]])
    with pytest.raises(ValueError) as caught:
        write_dataset(source, output=tmp_path / "out", tokenizer=ranks, **keys)
    assert str(caught.value).startswith(f"{source}:2: ") and message in str(caught.value)
    assert "--on-bad skip" in str(caught.value)
    summary = write_dataset(source, output=tmp_path / "out", tokenizer=ranks, on_bad="skip", **keys)
    assert summary.skipped == {reason: 1} and summary.num_documents == 2
    assert f"1 {reason}" in summary.warning()
    [line] = (tmp_path / "out" / "skipped.jsonl").read_text().splitlines()
    skipped = json.loads(line)
    assert (skipped["where"], skipped["reason"]) == (f"{source}:2", reason)
    write_dataset(lines(tmp_path / "b.jsonl", good[:2]), output=tmp_path / "good", tokenizer=ranks, **keys)
    assert written(tmp_path / "out") == written(tmp_path / "good")


def test_a_key_twice_is_malformed(ranks: str, tmp_path: Path) -> None:
    source = tmp_path / "a.jsonl"
    source.write_text('{"q": "x", "a": "y", "a": "z"}\n')
    with pytest.raises(ValueError, match="a.jsonl:1: the key 'a' appears twice"):
        write_dataset(source, output=tmp_path / "out", tokenizer=ranks, **KEYS)
    source.rename(tmp_path / "a.json")
    with pytest.raises(ValueError, match=r"a.json.*1: the key 'a' appears twice"):
        write_dataset(tmp_path / "a.json", output=tmp_path / "out", tokenizer=ranks, **KEYS)


def test_bad_rows_of_parquet(ranks: str, tmp_path: Path) -> None:
    rows = [{"q": "x", "a": b"y"}, {"q": "x", "a": b"\xff"}, {"q": "x", "a": b""}]
    source = parquet(tmp_path / "a.parquet", rows)
    summary = write_dataset(source, output=tmp_path / "out", tokenizer=ranks, on_bad="skip", **KEYS)
    assert (summary.num_documents, summary.skipped) == (1, {"not UTF-8": 1, "empty completion": 1})
    with pytest.raises(
        ValueError, match=r"a.parquet: no column 'b'; select the prompt with --prompt-key, one of 'q', 'a'"
    ):
        write_dataset(source, output=tmp_path / "b", tokenizer=ranks, prompt_key="b", completion_key="a")
    options: dict[str, Any] = {**KEYS, "on_bad": "skip", "max_document_bytes": 50}
    long = parquet(tmp_path / "b.parquet", [{"q": "x" * 30, "a": "y" * 30}, {"q": "x" * 30, "a": "y" * 20}])
    summary = write_dataset(long, output=tmp_path / "long", tokenizer=ranks, **options)
    assert (summary.num_documents, summary.skipped) == (1, {"too large": 1})


def test_messages_that_are_not_utf8_in_parquet(ranks: str, tmp_path: Path) -> None:
    """A string column with bytes that are no UTF-8, inside of a list of structs."""
    content = pyarrow.array([b"good", b"\xff"]).cast(pyarrow.binary())
    texts = pyarrow.Array.from_buffers(pyarrow.string(), 2, content.buffers())
    structs = pyarrow.StructArray.from_arrays([pyarrow.array(["assistant"] * 2), texts], names=["role", "content"])
    messages = pyarrow.ListArray.from_arrays(pyarrow.array([0, 1, 2], pyarrow.int32()), structs)
    pyarrow.parquet.write_table(pyarrow.table({"m": messages}), tmp_path / "a.parquet")
    options: dict[str, Any] = {"messages_key": "m", "on_bad": "skip", "tokenizer": ranks}
    summary = write_dataset(tmp_path / "a.parquet", output=tmp_path / "out", **options)
    assert (summary.num_documents, summary.skipped) == (1, {"not UTF-8": 1})


def test_texts_are_no_records(ranks: str, tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("text")
    with pytest.raises(ValueError, match=r"a.txt: is a text, not records with 'q' and 'a'; give .jsonl"):
        write_dataset(tmp_path / "a.txt", output=tmp_path / "out", tokenizer=ranks, **KEYS)


# Options that contradict each other.


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("--text-key t --prompt-key q --completion-key a", "--text-key and --prompt-key exclude each other"),
        ("--text-key text --messages-key m", "--text-key and --messages-key exclude each other"),
        ("--prompt-key q --messages-key m", "--prompt-key and --messages-key exclude each other"),
        ("--prompt-key q", "--prompt-key is given without --completion-key; give both"),
        ("--completion-key a", "--completion-key is given without --prompt-key; give both"),
        ("--prompt-key q --completion-key q", "--prompt-key and --completion-key are both 'q'; give two keys"),
        ("--chat-template chatml", "--chat-template is given without --messages-key"),
        (
            "--messages-key m --chat-template gpt",
            "--chat-template 'gpt' is unknown; choose one of plain, chatml, llama3",
        ),
    ],
)
def test_options_that_contradict_each_other(
    ranks: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], options: str, message: str
) -> None:
    source = lines(tmp_path / "a.jsonl", PAIR_RECORDS)
    command = [str(source), "--output", str(tmp_path / "out"), "--tokenizer", ranks, *options.split()]
    assert main(command) == 2
    [line] = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ") and message in line
    assert not (tmp_path / "out").exists()


def test_the_default_is_the_key_text() -> None:
    assert make_records() == make_records(text_key="text") == TEXT_RECORDS
    # As in progress.json of earlier versions, so that their runs can be resumed.
    assert make_records(text_key="body").arguments() == {"text_key": "body"}


# Kill and resume.


class Crash(BaseException):
    """Not an Exception, so that nothing can handle it."""


def test_a_crash_at_any_file_is_resumed_to_the_same_bytes(
    ranks: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = lines(tmp_path / "a.jsonl", PAIR_RECORDS)
    options: dict[str, Any] = {"tokenizer": ranks, "shard_tokens": 200, **KEYS}
    write_dataset(source, output=tmp_path / "whole", **options)
    expected = contents(tmp_path / "whole")
    num_shards = sum(name.endswith(".mask") for name in expected)
    assert num_shards > 3
    replace, calls = os.replace, count()

    def crashing(source: Path, target: Path) -> None:
        if next(calls) == crash_at:
            raise Crash
        replace(source, target)

    # Tokenizer, progress, then tokens, documents, mask and progress of each shard, then the lengths and the index.
    for crash_at in range(2 + 4 * num_shards + 2):
        output, calls = tmp_path / f"crash-{crash_at}", count()
        with monkeypatch.context() as patch, pytest.raises(Crash):
            patch.setattr(os, "replace", crashing)
            write_dataset(source, output=output, **options)
        write_dataset(source, output=output, **options)
        assert contents(output) == expected


def interrupted(source: Path, output: Path, ranks: str, **keys: Any) -> None:
    """A run that has finished shards and ended at a bad last record."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("titan_attent.data.text.encode.CHUNK_CHARACTERS", 1)
        with pytest.raises(ValueError, match="on-bad skip"):
            write_dataset(source, output=output, tokenizer=ranks, shard_tokens=200, num_threads=1, **keys)
    assert len(list(output.glob("*.mask"))) >= 2


def test_a_resumed_run_shares_the_keys(ranks: str, tmp_path: Path) -> None:
    source, output = lines(tmp_path / "a.jsonl", [*PAIR_RECORDS, {}]), tmp_path / "out"
    interrupted(source, output, ranks, **KEYS)
    others: list[tuple[dict[str, Any], str]] = [
        ({"text_key": "a"}, "completion_key was 'a' and is None; prompt_key was 'q' and is None; text_key was None"),
        (
            {"prompt_key": "a", "completion_key": "q"},
            "completion_key was 'a' and is 'q'; prompt_key was 'q' and is 'a'",
        ),
        ({"messages_key": "q"}, "chat_template was None and is 'plain'"),
    ]
    before = contents(output)
    for keys, message in others:
        with pytest.raises(ValueError, match="holds an interrupted run with other arguments") as caught:
            write_dataset(source, output=output, tokenizer=ranks, shard_tokens=200, **keys)
        assert message in str(caught.value)
    assert contents(output) == before


@pytest.mark.parametrize("change", ["the last record", "a border"])
def test_a_resumed_run_compares_the_borders(ranks: str, tmp_path: Path, change: str) -> None:
    """The same text with a character moved from the prompt to the completion has another mask."""
    source, output = lines(tmp_path / "a.jsonl", [*PAIR_RECORDS, {}]), tmp_path / "out"
    interrupted(source, output, ranks, **KEYS)
    records = [dict(record) for record in PAIR_RECORDS]
    if change == "a border":
        prompt, answer = records[0]["q"], records[0]["a"]
        records[0] |= {"q": prompt[:-1], "a": prompt[-1] + answer}
    lines(source, records)

    def resumed() -> None:
        write_dataset(source, output=output, tokenizer=ranks, shard_tokens=200, **KEYS)

    if change == "a border":
        with pytest.raises(ValueError, match="inputs was '1 files"):
            resumed()
    else:
        resumed()
        assert written(output) == by_hand([[(prompt, False), (answer, True)] for prompt, answer in PAIRS])


def test_a_progress_without_its_mask_is_malformed(ranks: str, tmp_path: Path) -> None:
    source, output = lines(tmp_path / "a.jsonl", [*PAIR_RECORDS, {}]), tmp_path / "out"
    interrupted(source, output, ranks, **KEYS)
    progress = json.loads((output / "progress.json").read_text())
    progress["shards"][1]["mask_sha256"] = ""
    (output / "progress.json").write_text(json.dumps(progress))
    options: dict[str, Any] = {**KEYS, "on_bad": "skip", "shard_tokens": 200}
    with pytest.raises(ValueError, match=r"progress.json: malformed \(mask of shard-00001.bin\); delete"):
        write_dataset(source, output=output, tokenizer=ranks, **options)


def test_a_tokenizer_is_trained_on_prompts_completions_and_templates(tmp_path: Path) -> None:
    source = lines(tmp_path / "a.jsonl", CHAT_RECORDS * 3)
    write_dataset(source, output=tmp_path / "out", tokenizer="train:280", messages_key="m", chat_template="chatml")
    texts = ["".join(text for text, _ in chat_by_hand(chat, "chatml")) for chat in CHATS * 3]
    expected = train_tokenizer(texts, vocab_size=280)
    assert TokenShards(tmp_path / "out").tokenizer_info == expected.info()
    assert len(expected.encode("<|im_start|>")) < len("<|im_start|>")
