"""JSON other than one object per line: an array of records, or multi-line objects; and the layout of a .json file.

Cost: memory for one value and one block of the file. A value that extends beyond the block is parsed again with twice
as much of the file, so that a large value takes twice its parsing time.
"""

import codecs
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import IO, Any, NamedTuple

from titan_attent.data.text.compressed import DAMAGE_ERRORS, compression_of, open_bytes

HEAD = 2**16
"""Bytes read to detect the layout of a .json file."""
WIDE_BOMS = (codecs.BOM_UTF32_LE, codecs.BOM_UTF32_BE, codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)


class JsonLayout(NamedTuple):
    """The layout of a file of JSON records."""

    one_per_line: bool
    """One object per line; else an array of objects, or multi-line objects."""
    has_key: bool
    """The first object has the key of the text."""
    several: bool = False
    """There are at least two objects, one per line."""


class RepeatedKeyError(ValueError):
    """An object has a key of the text twice."""


class TooLargeError(ValueError):
    """A value is larger than the limit."""


def detect_layout(path: Path, *, text_key: str) -> JsonLayout | None:
    """The layout of a .json file, compressed or not, by its head; None if it holds no records."""
    try:
        with open_bytes(path, compression=compression_of(path.name.lower())) as file:
            head = file.read(HEAD)
    except DAMAGE_ERRORS:
        return JsonLayout(one_per_line=True, has_key=True)  # reading it reports the damage
    if head.startswith(WIDE_BOMS):
        return JsonLayout(one_per_line=True, has_key=True)  # reading it reports the encoding
    text = head.decode("utf-8-sig", "ignore").lstrip()
    quoted = json.dumps(text_key) in text
    if text[:1] == "[":
        inner = text[1:].lstrip()
        if not inner.startswith(("{", "]")):
            return None
        first, _ = _first_object(inner)
        return JsonLayout(one_per_line=False, has_key=quoted if first is None else text_key in first)
    if text[:1] != "{":
        return None
    first, end = _first_object(text)
    if first is not None:
        one_line = "\n" not in text[:end] and text[end:].lstrip(" \t\r")[:1] in ("", "\n")
        several = one_line and text[end:].lstrip().startswith("{")
        return JsonLayout(one_per_line=one_line, has_key=text_key in first, several=several)
    # The first object is malformed, or larger than the head.
    _, newline, other_lines = text.partition("\n")
    several = other_lines.lstrip().startswith("{")
    return JsonLayout(one_per_line=several or not newline, has_key=quoted, several=several)


def _first_object(text: str) -> tuple[dict[str, Any] | None, int]:
    try:
        value, end = json.JSONDecoder().raw_decode(text)
    except (ValueError, RecursionError):
        return None, 0
    return (value, end) if isinstance(value, dict) else (None, 0)


def decode_record(text: str, *, keys: Sequence[str]) -> Any:
    """Parse the JSON value in ``text``.

    Raises:
        RepeatedKeyError: the value is an object with one of ``keys`` twice.
        ValueError: ``text`` is malformed.
    """
    if all(text.count(json.dumps(key)) < 2 for key in keys):
        return json.loads(text)
    pairs: list[tuple[str, Any]] = []

    def keep(items: list[tuple[str, Any]]) -> dict[str, Any]:
        pairs[:] = items  # the last call has the items of the outermost object
        return dict(items)

    record = json.loads(text, object_pairs_hook=keep)
    for key in keys:
        if isinstance(record, dict) and sum(name == key for name, _ in pairs) > 1:
            raise RepeatedKeyError(f"the key {key!r} appears twice")
    return record


def read_values(stream: IO[bytes], *, keys: Sequence[str] = ("text",), max_bytes: int) -> Iterator[Any]:
    """Yield the elements of the array, or else all values, in a UTF-8 file.

    For an object with one of ``keys`` twice, a RepeatedKeyError is yielded, not raised, as the other values are valid.

    Raises:
        TooLargeError: a value has more than ``max_bytes``.
        ValueError: the file is malformed, not UTF-8, or nested too deeply.
    """
    source = _Source(stream, max_bytes, keys)
    if source.next_character() != "[":
        while source.next_character():
            yield source.value()
        return
    source.position += 1
    closed = source.next_character() == "]"
    while not closed:
        yield source.value()
        character = source.next_character()
        if character not in ("]", ","):
            raise ValueError(f"{character!r} where ',' or ']' is expected" if character else "the array has no end")
        closed = character == "]"
        source.position += not closed
    source.position += 1
    if source.next_character():
        raise ValueError("unexpected content after the array")


class _Source:
    """The text of a stream; only the text that is not yet parsed is kept."""

    def __init__(self, stream: IO[bytes], max_bytes: int, keys: Sequence[str]):
        self.stream, self.max_bytes, self.keys = stream, max_bytes, keys
        self._quoted = [json.dumps(key) for key in keys]
        self.text, self.position, self.ended = "", 0, False
        self._decode = codecs.getincrementaldecoder("utf-8-sig")().decode
        self._json = json.JSONDecoder()

    def _fill(self) -> None:
        unparsed = self.text[self.position :]
        data = self.stream.read(max(HEAD, len(unparsed)))
        self.ended = not data
        self.text, self.position = unparsed + self._decode(data, final=self.ended), 0

    def next_character(self) -> str:
        """The next character that is not white space; "" at the end."""
        while True:
            while self.position < len(self.text) and self.text[self.position] in " \t\r\n":
                self.position += 1
            if self.position < len(self.text) or self.ended:
                return self.text[self.position : self.position + 1]
            self._fill()

    def value(self) -> Any:
        """Parse the next value, or return a RepeatedKeyError."""
        self.next_character()
        while True:
            try:
                value, end = self._json.raw_decode(self.text, self.position)
            except RecursionError:
                raise ValueError("nested too deeply") from None
            except json.JSONDecodeError as error:
                # Either cut off at the end of the text read so far, or malformed before it.
                cut = error.msg.startswith("Unterminated string") or error.pos >= len(self.text) - 16
                if self.ended or not cut:
                    raise ValueError(error.msg) from None
            else:
                if end < len(self.text) or self.ended:
                    if end - self.position > self.max_bytes:
                        raise TooLargeError
                    start, self.position = self.position, end
                    if any(self.text.count(quoted, start, end) > 1 for quoted in self._quoted):
                        try:
                            decode_record(self.text[start:end], keys=self.keys)
                        except RepeatedKeyError as error:
                            return error
                    return value
            if len(self.text) - self.position > self.max_bytes:
                raise TooLargeError
            self._fill()
