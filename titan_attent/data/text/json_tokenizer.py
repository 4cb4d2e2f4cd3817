"""The tokenizers of Hugging Face: a file ``tokenizer.json``, as models come with it, read by the library `tokenizers`.

The folder of a data set keeps the file as it is; its hash, the special tokens and the eos id are in index.json.

The ids are those of the library for the text alone: nothing that the file adds to a text (bos, eos, padding), nor what
it cuts off or drops at random (truncation, dropout), is done. The text of a special token is ordinary text, as with
tiktoken; that of an added token which is not special is the token. What normalizers change (case, NFC), and characters
that the vocabulary lacks, do not come back when ids are decoded.

Cost: reading the file takes about a second per 100,000 ids; encoding about 0.3 million tokens/s per thread, without the
interpreter lock (``encode`` of one text holds it, ``encode_batch_fast`` does not).
Source: https://github.com/huggingface/tokenizers.
"""

import hashlib
import json
import os
import re
from collections.abc import Callable, Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from titan_attent.data.io.atomic import write_atomically
from titan_attent.data.text.any_tokenizer import Tokenizer, described, read_kept, special_id, well_formed
from titan_attent.data.text.json_token_bytes import bytes_rule

if TYPE_CHECKING:  # importing it takes a while, which commands that read no such file need not wait
    from tokenizers import Tokenizer as Encoder

JSON_FILE = "tokenizer.json"
KIND = "tokenizer.json"
"""The value of ``kind`` in index.json."""
CONFIG_FILE = "tokenizer_config.json"


class JsonTokenizer(Tokenizer):
    """A ``tokenizer.json`` with an eos.

    Args:
        content: of the file.
        eos: text of a token, or an id.
        where: names the file in messages.

    Raises:
        ValueError: the file cannot be read, or has no such token.
    """

    FILE = JSON_FILE

    def __init__(self, content: bytes, *, eos: str | int, where: str):
        # Threads encode documents side by side; threads of the library within them only compete, and a process that
        # has used them warns at every fork.
        os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
        self.content, self._eos, self._where = content, eos, where
        self._sha256 = hashlib.sha256(content).hexdigest()
        plain = _read(content, where)
        self.special_tokens = {
            token.content: number for number, token in plain.get_added_tokens_decoder().items() if token.special
        }
        vocabulary = plain.get_vocab(with_added_tokens=True)
        self._texts = {number: text for text, number in vocabulary.items()}
        self._added = {number: token.content for number, token in plain.get_added_tokens_decoder().items()}
        self.vocab_size = max(self._texts, default=-1) + 1
        known = {"name": where, "vocab_size": self.vocab_size, "special_tokens": self.special_tokens}
        if isinstance(eos, int):
            self.eos_id = eos
        elif eos in vocabulary and not eos.isdecimal():  # some files do not mark their eos as special
            self.eos_id = vocabulary[eos]
        else:
            self.eos_id = special_id(eos, option="--eos", tokenizer=known)
        if self.eos_id not in self._texts:
            raise ValueError(
                f"{where}: has no token of the id {eos} for --eos; name one of {described(self.special_tokens)}"
            )
        self._is_known = np.zeros(self.vocab_size, dtype=bool)
        self._is_known[list(self._texts)] = True
        # The model itself, not only the search for special tokens, may give the id of a special token.
        model = _Model(json.loads(content)["model"])
        eos_text = self._texts[self.eos_id]
        self._guarded = {text for text in {*self.special_tokens, eos_text} if model.can_give(text)}
        self._is_guarded = np.zeros(self.vocab_size, dtype=bool)
        self._is_guarded[[number for number, text in self._texts.items() if text in self._guarded]] = True
        self._encoder = self._configured(plain, special={*self.special_tokens, eos_text})

    def __reduce__(self) -> Any:
        return _reopen, (self.content, self._eos, self._where)

    def encode_to_array(self, text: str) -> np.ndarray:
        text = well_formed(text)
        ids = self._ids(self._encoder, text)
        if not self._is_guarded[ids].any():
            return ids
        return self._without_eos(self._ids(self._guarded_encoder, text))

    def encode_markup(self, text: str) -> np.ndarray:
        return self._without_eos(self._ids(self._markup_encoder, well_formed(text)))

    def decode(self, ids: Sequence[int] | np.ndarray) -> str:
        ids = np.asarray(ids, dtype=np.int64)
        is_bad = (ids < 0) | (ids >= self.vocab_size)
        is_bad[~is_bad] = ~self._is_known[ids[~is_bad]]
        if is_bad.any():
            raise ValueError(
                f"{self._where} has no token for an id ({ids[is_bad][0]}); its ids are below {self.vocab_size}; decode "
                "with the tokenizer that encoded the text"
            )
        return self._encoder.decode(ids.tolist(), skip_special_tokens=False)

    def bytes_of(self, token_id: int) -> bytes | None:
        rule = self._rule  # a tokenizer without one is refused for any id
        if token_id in self._added:
            return self._added[token_id].encode("utf-8")
        return rule(self._texts[token_id]) if token_id in self._texts else None

    def info(self) -> dict[str, Any]:
        """The definition of the tokenizer for index.json; the file is given by its name and hash."""
        return {
            "name": KIND,
            "kind": KIND,
            "vocab_size": self.vocab_size,
            "eos_id": self.eos_id,
            "file": JSON_FILE,
            "sha256": self._sha256,
            "special_tokens": dict(self.special_tokens),
        }

    def save(self, folder: str | os.PathLike[str]) -> None:
        write_atomically(Path(folder) / JSON_FILE, self.content)

    @classmethod
    def from_info(cls, info: dict[str, Any], folder: str | os.PathLike[str]) -> "JsonTokenizer":
        """The tokenizer that wrote the data set in ``folder``; ``info`` is from its index.

        Raises:
            ValueError: the index names no file, or the file is missing or changed.
        """
        path, content = read_kept(info, folder)
        return cls(content, eos=info["eos_id"], where=str(path))

    @cached_property
    def _rule(self) -> Callable[[str], bytes]:
        return bytes_rule(json.loads(self.content))

    @cached_property
    def _guarded_encoder(self) -> "Encoder":
        """As ``_encoder``, but the model never sees the text of a special token as a whole: slower."""
        special = {*self.special_tokens, self._texts[self.eos_id]}
        encoder = self._configured(_read(self.content, self._where), special=special)
        return _guard(encoder, self._guarded)

    @cached_property
    def _markup_encoder(self) -> "Encoder":
        """Reads special tokens out of text, except eos: to the library all but eos are ordinary added tokens."""
        fields, eos = json.loads(self.content), self._texts[self.eos_id]
        for token in fields["added_tokens"]:
            token["special"] = token["content"] == eos
        encoder = self._configured(_read(json.dumps(fields).encode("utf-8"), self._where), special={eos})
        return _guard(encoder, {eos} & self._guarded)

    def _configured(self, encoder: "Encoder", *, special: set[str]) -> "Encoder":
        """``encoder``, with ``special`` as its special tokens, which are not searched for in texts."""
        from tokenizers import AddedToken

        added = {token.content for token in encoder.get_added_tokens_decoder().values() if token.special}
        encoder.add_special_tokens([AddedToken(text, normalized=False) for text in sorted(special - added)])
        encoder.encode_special_tokens = True
        encoder.no_truncation()
        encoder.no_padding()
        if getattr(encoder.model, "dropout", None):
            encoder.model.dropout = None
        return encoder

    def _without_eos(self, ids: np.ndarray) -> np.ndarray:
        """``ids``; ValueError if eos is among them: a character of ordinary text, which cannot be cut."""
        if self.eos_id in ids:
            raise ValueError(
                f"{self._where}: its eos {self._texts[self.eos_id]!r} is a token of ordinary text, which would end "
                f"documents; name another with --eos, such as one of {described(self.special_tokens)}"
            )
        return ids

    def _ids(self, encoder: "Encoder", text: str) -> np.ndarray:
        try:
            [encoding] = encoder.encode_batch_fast([text], add_special_tokens=False)
        except Exception as error:  # the library has no class of its own
            raise ValueError(f"{self._where}: cannot encode a text ({error}); use another tokenizer") from error
        return np.array(encoding.ids, dtype=np.uint32)


def load_json(path: Path, *, eos: str = "", default_eos: int | None = None) -> JsonTokenizer:
    """The tokenizer of a ``tokenizer.json``.

    Args:
        eos: text of a special token, or an id; empty for that of the ``tokenizer_config.json`` beside it.
        default_eos: what counts if there is none.

    Raises:
        ValueError: the file cannot be read, or no eos is known.
    """
    content = path.read_bytes()
    named: str | int | None = eos or _configured_eos(path.with_name(CONFIG_FILE)) or default_eos
    if named is None:
        added = _read(content, str(path)).get_added_tokens_decoder()
        special = {token.content: number for number, token in added.items() if token.special}
        raise ValueError(
            f"{path}: does not say which token ends a document, and no {CONFIG_FILE} beside it names an eos_token; "
            f"name it with --eos, one of {described(special)}"
        )
    return JsonTokenizer(content, eos=named, where=str(path))


def _configured_eos(path: Path) -> str:
    """The ``eos_token`` of a ``tokenizer_config.json``; empty if there is none."""
    if not path.is_file():
        return ""
    try:
        token = json.loads(path.read_bytes()).get("eos_token")
    except (ValueError, AttributeError, RecursionError) as error:
        raise ValueError(f"{path}: malformed ({error}); download it again, or name the eos with --eos") from None
    return str((token.get("content") if isinstance(token, dict) else token) or "")


def _read(content: bytes, where: str) -> "Encoder":
    import tokenizers

    try:
        return tokenizers.Tokenizer.from_buffer(content)
    except Exception as error:  # ValueError in some versions, Exception in others
        raise ValueError(
            f"{where}: not a {JSON_FILE} that tokenizers {tokenizers.__version__} reads ({error}); download it again, "
            "or install the version of tokenizers that wrote it"
        ) from None


class _Model:
    """Which texts a model can give as one token, from its fields in the file; not its token for unknown text."""

    def __init__(self, fields: dict[str, Any]):
        vocabulary = fields["vocab"]
        # Unigram has a list of [token, score]; the others a dictionary.
        tokens = {token for token, _ in vocabulary} if isinstance(vocabulary, list) else set(vocabulary)
        is_merged = fields.get("merges") is not None and not fields.get("ignore_merges")
        if is_merged and not fields.get("continuing_subword_prefix"):
            merges = (merge.split(" ") if isinstance(merge, str) else merge for merge in fields["merges"])
            tokens = {"".join(merge) for merge in merges} | {token for token in tokens if len(token) == 1}
        number = fields.get("unk_id")  # of Unigram
        unknown = fields.get("unk_token") if number is None else vocabulary[number][0]
        self._tokens = tokens - {unknown}

    def can_give(self, text: str) -> bool:
        return text in self._tokens


def _guard(encoder: "Encoder", texts: set[str]) -> "Encoder":
    """Cut every one of ``texts`` behind its first character before the model sees it."""
    from tokenizers import Regex, pre_tokenizers

    long = sorted(text for text in texts if len(text) > 1)
    if long:
        # Oniguruma's syntax; re.escape escapes no letter or digit.
        pattern = "|".join(f"{re.escape(text[0])}(?={re.escape(text[1:])})" for text in long)
        cut = pre_tokenizers.Split(Regex(pattern), "merged_with_previous")
        before = [encoder.pre_tokenizer] if encoder.pre_tokenizer is not None else []
        encoder.pre_tokenizer = pre_tokenizers.Sequence([*before, cut])
    return encoder


def _reopen(content: bytes, eos: str | int, where: str) -> JsonTokenizer:
    return JsonTokenizer(content, eos=eos, where=where)
