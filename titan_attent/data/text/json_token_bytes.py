"""Which bytes of text each token of a ``tokenizer.json`` stands for, from its decoder.

    ByteLevel                                  each character of a token is a byte, in GPT-2's alphabet
    Metaspace, or Replace of "▁" by a space    the characters of a token, in UTF-8
    ByteFallback                               ``<0x0A>`` is the byte 10
    Fuse, Strip behind it                      concern the text as a whole: nothing of a token

Other decoders look at a token's neighbours (WordPiece puts a space between two words, but none before "##ing"), so
their tokens have no bytes of their own. Added tokens stand for their text.

Cost: a microsecond per token.
"""

import re
from collections.abc import Callable
from typing import Any

from titan_attent.data.text.any_tokenizer import NoBytesError
from titan_attent.data.text.bpe import byte_of_character

_BYTE = re.compile("<0x([0-9A-Fa-f]{2})>")


def bytes_rule(fields: dict[str, Any]) -> Callable[[str], bytes]:
    """Token of the model -> its bytes, for the ``tokenizer.json`` with these fields.

    Raises:
        NoBytesError: the text of a token depends on its neighbours.
    """
    steps = _steps(fields.get("decoder"))
    kinds = [step.get("type") for step in steps]
    model = fields.get("model", {})
    affixes = [model.get(key) for key in ("continuing_subword_prefix", "end_of_word_suffix")]
    if any(affixes) or model.get("type") == "WordPiece":
        raise _no_bytes("its tokens are marked as beginnings or ends of words")
    if kinds == ["ByteLevel"]:
        return _of_byte_level
    replaced, is_fused, has_bytes = [], False, False
    for step, kind in zip(steps, kinds, strict=True):
        text = step.get("pattern", {}).get("String") if kind == "Replace" else step.get("replacement")
        if kind in ("Metaspace", "Replace") and text and not is_fused:
            replaced.append((text, " " if kind == "Metaspace" else step["content"]))
        elif kind == "ByteFallback" and not is_fused:
            has_bytes = True
        elif kind == "Fuse":
            is_fused = True
        elif not (kind == "Strip" and is_fused):
            raise _no_bytes(f"its decoder is {' and '.join(map(str, kinds))}")
    if not steps:
        raise _no_bytes("it has no decoder, which puts a space between any two tokens")

    def of_characters(token: str) -> bytes:
        if has_bytes and (match := _BYTE.fullmatch(token)):
            return bytes([int(match[1], 16)])
        for text, content in replaced:
            token = token.replace(text, content)
        return token.encode("utf-8")

    return of_characters


def _of_byte_level(token: str) -> bytes:
    found = [_BYTE_OF.get(character) for character in token]
    known = [byte for byte in found if byte is not None]
    # The library decodes a token with another character as its text.
    return bytes(known) if len(known) == len(found) else token.encode("utf-8")


def _steps(decoder: dict[str, Any] | None) -> list[dict[str, Any]]:
    if decoder is None:
        return []
    if decoder.get("type") == "Sequence":
        return [step for one in decoder["decoders"] for step in _steps(one)]
    return [decoder]


def _no_bytes(reason: str) -> NoBytesError:
    return NoBytesError(
        f"{reason}: the text of a token depends on its neighbours, so bits per byte cannot be computed. Compare losses "
        "of this tokenizer with each other only"
    )


_BYTE_OF = byte_of_character()
