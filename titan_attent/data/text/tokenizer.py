"""Tokenizers of two kinds behind one interface (any_tokenizer.py), by name, path, or from the folder of a data set.

    tiktoken_tokenizer.py   an encoding of tiktoken, a rank file, or one that is trained here
    json_tokenizer.py       a tokenizer.json of Hugging Face

The folder of a data set keeps its tokenizer, so that the data can be decoded without a network.
"""

import os
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import tiktoken

from titan_attent.data.io.folder import INDEX_FILE
from titan_attent.data.text.any_tokenizer import Tokenizer, described, special_id, well_formed
from titan_attent.data.text.format import FORMAT
from titan_attent.data.text.json_tokenizer import JSON_FILE, KIND, JsonTokenizer, load_json
from titan_attent.data.text.tiktoken_tokenizer import (
    EOS,
    RANKS_FILE,
    TiktokenTokenizer,
    load_named,
    load_ranks,
    train_tokenizer,
)
from titan_attent.foundations.versioned_json import read_json_object

TRAIN = "train:"
TOKENIZER_FILES = (RANKS_FILE, JSON_FILE)
"""The names of the files of tokenizers in data sets."""


def open_tokenizer(info: dict[str, Any], folder: str | os.PathLike[str]) -> Tokenizer:
    """The tokenizer that wrote the data set in ``folder``; ``info`` is from its index.

    Raises:
        ValueError: the index names no tokenizer file, the file is missing or changed, or its kind is unknown.
    """
    kind = info.get("kind")
    if kind == KIND:
        return JsonTokenizer.from_info(info, folder)
    if kind is not None:
        raise ValueError(f"{folder}: its tokenizer is of the kind {kind!r}, which this version does not know; update")
    return TiktokenTokenizer.from_info(info, folder)


def json_file(spec: str) -> Path | None:
    """The ``tokenizer.json`` that ``spec`` names: itself, or the one in a folder; None if it is another tokenizer."""
    if spec in tiktoken.list_encoding_names():
        return None
    path = Path(spec)
    if path.is_dir():
        path = path / JSON_FILE
    if not path.is_file():
        return None
    with open(path, "rb") as file:
        return path if file.read(64).lstrip(b"\xef\xbb\xbf \r\n\t").startswith(b"{") else None  # base64 has no brace


def load_tokenizer(spec: str, *, eos: str = "") -> Tokenizer:
    """Load the tokenizer ``spec``.

    Args:
        spec: the name of a tiktoken encoding (``o200k_base``), which tiktoken downloads once; the path of a rank file
            (``./tokenizer.model`` of Llama 3), which is used with ``SPLIT_PATTERN``; or the path of a
            ``tokenizer.json``, or of the folder of a model or data set that holds it.
        eos: the special token, or its id, that ends documents. Empty for ``<|endoftext|>`` of tiktoken, and for what a
            ``tokenizer_config.json`` or the index of a data set beside a ``tokenizer.json`` says.

    Raises:
        ValueError: there is no such encoding or file, the download failed, the file is malformed, or no eos is known.
    """
    if (path := json_file(spec)) is not None:
        return load_json(path, eos=eos, default_eos=_eos_of_data_set(path))
    names = tiktoken.list_encoding_names()
    path = Path(spec)
    if spec in names:
        tokenizer = load_named(spec)
    elif path.is_file():
        tokenizer = load_ranks(path)
    else:
        raise ValueError(
            f"tokenizer {spec!r}: neither a tiktoken encoding nor a file; use one of "
            f"{', '.join(names)}, the path of a tiktoken rank file, of a {JSON_FILE} or a folder with one, or, when "
            "writing a data set, train:VOCAB_SIZE"
        )
    return _with_eos(tokenizer, eos) if eos else tokenizer


def _eos_of_data_set(path: Path) -> int | None:
    """The eos id of the data set whose folder keeps the ``tokenizer.json`` at ``path``; None if there is none."""
    try:
        fields = read_json_object(path.with_name(INDEX_FILE))
    except (ValueError, OSError):
        return None
    info = fields.get("tokenizer")
    is_kept = fields.get("format") == FORMAT and isinstance(info, dict) and info.get("file") == path.name
    eos_id = info.get("eos_id") if isinstance(info, dict) else None
    return eos_id if is_kept and isinstance(eos_id, int) else None


def _with_eos(tokenizer: TiktokenTokenizer, eos: str) -> TiktokenTokenizer:
    info = tokenizer.info()
    eos_id, special = special_id(eos, option="--eos", tokenizer=info), info["special_tokens"]
    if eos_id not in special.values():
        raise ValueError(
            f"--eos {eos}: is an ordinary token of {info['name']!r}, which texts hold; name one of {described(special)}"
        )
    tokenizer.eos_id = eos_id
    return tokenizer


def make_tokenizer(
    spec: str, *, texts: Iterable[str], max_training_bytes: int, bar: Callable[[int], Any] | None = None
) -> Tokenizer:
    """As :func:`load_tokenizer`; for ``train:VOCAB_SIZE``, train one on the first bytes of ``texts`` (sample.py).

    Args:
        bar: called with the number of bytes of each text that is trained on. The merges are then shown by the trainer's
            own bars, on a terminal.
    """
    vocab_size = trained_size(spec)
    if vocab_size is None:
        return load_tokenizer(spec)
    first = _first_bytes(texts, num_bytes=max_training_bytes)
    return train_tokenizer(_counted(first, bar) if bar else first, vocab_size=vocab_size, progress=bar is not None)


def trained_size(spec: str, *, eos: str = "") -> int | None:
    """The vocabulary size of ``train:VOCAB_SIZE``; None for another specification.

    Raises:
        ValueError: it is none, or ``eos`` is not the only special token of a trained tokenizer.
    """
    if not spec.startswith(TRAIN):
        return None
    vocab_size = spec.removeprefix(TRAIN)
    if not vocab_size.isdecimal():
        raise ValueError(f"tokenizer {spec!r}: {vocab_size!r} is not a vocabulary size; use for example train:32768")
    if eos not in ("", EOS):
        raise ValueError(f"--eos {eos}: a tokenizer that is trained has only {EOS}; leave out --eos")
    return int(vocab_size)


def _counted(texts: Iterable[str], count: Callable[[int], Any]) -> Iterator[str]:
    for text in texts:
        yield text
        count(len(text.encode("utf-8")))


def _first_bytes(texts: Iterable[str], *, num_bytes: int) -> Iterator[str]:
    for text in texts:
        content = well_formed(text).encode("utf-8")[:num_bytes]
        yield content.decode("utf-8", "ignore")
        num_bytes -= len(content)
        if num_bytes == 0:
            return
