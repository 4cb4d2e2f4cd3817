"""JSON that is not one object a line: an array of records, or objects over several lines; and which of them a file is.

Cost: one value and one block of the file in memory. A value that goes on behind the block is parsed again with twice as
much of the file, so that a large one costs twice its time.
"""

import codecs
import gzip
import json
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any, NamedTuple

HEAD = 2**16
"""Bytes that are looked at to tell what a .json file is."""
GZIP_ERRORS = (EOFError, gzip.BadGzipFile, zlib.error)
WIDE_BOMS = (codecs.BOM_UTF32_LE, codecs.BOM_UTF32_BE, codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)


class Kind(NamedTuple):
    """What a file of records is."""

    lines: bool
    """An object a line; else an array of them, or objects over several lines."""
    has_key: bool
    """The first has the key of the text."""
    several: bool = False
    """There is a line for each of at least two."""


class RepeatedKeyError(ValueError):
    """An object has the key of its text twice."""


class TooLargeError(ValueError):
    """A value that is larger than what may be read."""


def sniff(path: Path, *, text_key: str) -> Kind | None:
    """What a .json or .json.gz file holds, by its head; None for what are no records: malformed, or other values."""
    try:
        with gzip.open(path) if path.name.lower().endswith(".gz") else open(path, "rb") as file:
            head = file.read(HEAD)
    except GZIP_ERRORS:
        return Kind(lines=True, has_key=True)  # who reads it says what is damaged
    if head.startswith(WIDE_BOMS):
        return Kind(lines=True, has_key=True)  # who reads it says what to convert
    text = head.decode("utf-8-sig", "ignore").lstrip()
    quoted = json.dumps(text_key) in text
    if text[:1] == "[":
        inner = text[1:].lstrip()
        if not inner.startswith(("{", "]")):
            return None
        first, _ = _first_object(inner)
        return Kind(lines=False, has_key=quoted if first is None else text_key in first)
    if text[:1] != "{":
        return None
    first, end = _first_object(text)
    if first is not None:
        alone = "\n" not in text[:end] and text[end:].lstrip(" \t\r")[:1] in ("", "\n")
        return Kind(lines=alone, has_key=text_key in first, several=alone and text[end:].lstrip().startswith("{"))
    # The first is malformed, or larger than the head.
    _, newline, behind = text.partition("\n")
    several = behind.lstrip().startswith("{")
    return Kind(lines=several or not newline, has_key=quoted, several=several)


def _first_object(text: str) -> tuple[dict[str, Any] | None, int]:
    try:
        value, end = json.JSONDecoder().raw_decode(text)
    except (ValueError, RecursionError):
        return None, 0
    return (value, end) if isinstance(value, dict) else (None, 0)


def decode_record(text: str, *, text_key: str) -> Any:
    """The value that ``text`` is.

    Raises:
        RepeatedKeyError: it is an object in which ``text_key`` stands twice.
        ValueError: malformed.
    """
    if text.count(json.dumps(text_key)) < 2:
        return json.loads(text)
    pairs: list[tuple[str, Any]] = []

    def keep(found: list[tuple[str, Any]]) -> dict[str, Any]:
        pairs[:] = found  # those of the outermost object come last
        return dict(found)

    record = json.loads(text, object_pairs_hook=keep)
    if isinstance(record, dict) and sum(key == text_key for key, _ in pairs) > 1:
        raise RepeatedKeyError(f"the key {text_key!r} stands twice")
    return record


def read_values(stream: IO[bytes], *, text_key: str = "text", max_bytes: int) -> Iterator[Any]:
    """The elements of an array, or the values one after the other, of a file in UTF-8.

    One in which ``text_key`` stands twice is a RepeatedKeyError, given and not raised: the others are sound.

    Raises:
        TooLargeError: one takes more than ``max_bytes``.
        ValueError: malformed, not UTF-8, or nested too deeply.
    """
    source = _Source(stream, max_bytes, text_key)
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
        raise ValueError("something stands behind the array")


class _Source:
    """The text of a stream, of which only what is not yet parsed is kept."""

    def __init__(self, stream: IO[bytes], max_bytes: int, text_key: str):
        self.stream, self.max_bytes, self.text_key = stream, max_bytes, text_key
        self._quoted = json.dumps(text_key)
        self.text, self.position, self.ended = "", 0, False
        self._decode = codecs.getincrementaldecoder("utf-8-sig")().decode
        self._json = json.JSONDecoder()

    def _fill(self) -> None:
        rest = self.text[self.position :]
        data = self.stream.read(max(HEAD, len(rest)))
        self.ended = not data
        self.text, self.position = rest + self._decode(data, final=self.ended), 0

    def next_character(self) -> str:
        """The next that is no white space, "" at the end."""
        while True:
            while self.position < len(self.text) and self.text[self.position] in " \t\r\n":
                self.position += 1
            if self.position < len(self.text) or self.ended:
                return self.text[self.position : self.position + 1]
            self._fill()

    def value(self) -> Any:
        self.next_character()
        while True:
            try:
                value, end = self._json.raw_decode(self.text, self.position)
            except RecursionError:
                raise ValueError("nested too deeply") from None
            except json.JSONDecodeError as error:
                # Cut off at the end of what was read, or malformed before it.
                cut = error.msg.startswith("Unterminated string") or error.pos >= len(self.text) - 16
                if self.ended or not cut:
                    raise ValueError(error.msg) from None
            else:
                if end < len(self.text) or self.ended:
                    if end - self.position > self.max_bytes:
                        raise TooLargeError
                    start, self.position = self.position, end
                    if self.text.count(self._quoted, start, end) > 1:
                        try:
                            decode_record(self.text[start:end], text_key=self.text_key)
                        except RepeatedKeyError as error:
                            return error
                    return value
            if len(self.text) - self.position > self.max_bytes:
                raise TooLargeError
            self._fill()
