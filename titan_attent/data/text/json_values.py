"""JSON other than one object per line: a list of records, or multi-line objects; and the layout of a .json file.

The list is the file's one value, or the value of a key of the one object in it.

Cost: memory for one value and one block of the file. A value that extends beyond the block is parsed again with twice
as much of the file, so that a large value takes twice its parsing time.
"""

import codecs
import json
import sys
from collections.abc import Iterator, Sequence
from functools import cache
from typing import IO, Any, NamedTuple

from titan_attent.data.io.remote import InputPath
from titan_attent.data.text.compressed import DAMAGE_ERRORS, compression_of, decompressed

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


class NoListError(ValueError):
    """An object has no list of records under the key that was given."""


class TooLargeError(ValueError):
    """A value is larger than the limit."""


def detect_layout(path: InputPath, *, text_key: str, list_key: str = "") -> JsonLayout | None:
    """The layout of a .json file, compressed or not, by its head; None if it holds no records.

    Args:
        list_key: the key of a list of records, in files that are one object; "" for none.
    """
    try:
        with (
            path.open("rb") as raw,
            decompressed(raw, compression=compression_of(path.name.lower())) as file,
        ):
            head = file.read(HEAD)
    except DAMAGE_ERRORS:
        return JsonLayout(one_per_line=True, has_key=True)  # reading it reports the damage
    if head.startswith(WIDE_BOMS):
        return JsonLayout(one_per_line=True, has_key=True)  # reading it reports the encoding
    text = head.decode("utf-8-sig", "ignore").lstrip()
    quoted = _count_quoted(text, text_key) > 0
    if text[:1] == "[":
        inner = text[1:].lstrip()
        if not inner.startswith(("{", "]")):
            return None
        first, _ = _first_object(inner)
        return JsonLayout(one_per_line=False, has_key=quoted if first is None else text_key in first)
    if text[:1] != "{":
        return None
    first, end = _first_object(text)
    has_list = list_key in first if first is not None else _count_quoted(text, list_key) > 0
    if list_key and has_list and not (first is not None and text[end:].lstrip().startswith("{")):
        return JsonLayout(one_per_line=False, has_key=True)
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


def _count_quoted(text: str, key: str, start: int = 0, end: int = sys.maxsize) -> int:
    """How often ``key`` stands in double quotes in ``text``, as it is or with its other letters as ``\\u00e4``."""
    return sum(text.count(quoted, start, end) for quoted in _quoted(key))


@cache
def _quoted(key: str) -> set[str]:
    return {json.dumps(key), json.dumps(key, ensure_ascii=False)}


def decode_record(text: str, *, keys: Sequence[str]) -> Any:
    """Parse the JSON value in ``text``.

    Raises:
        RepeatedKeyError: the value is an object with one of ``keys`` twice.
        ValueError: ``text`` is malformed.
    """
    if all(_count_quoted(text, key) < 2 for key in keys):
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


def read_values(
    stream: IO[bytes], *, keys: Sequence[str] = ("text",), list_key: str = "", max_bytes: int
) -> Iterator[Any]:
    """Yield the elements of the array, or else all values, in a UTF-8 file.

    For an object with one of ``keys`` twice, a RepeatedKeyError is yielded, not raised, as the other values are valid.

    Args:
        list_key: in a file that is one object, yield the elements of the array of this key; "" for the object itself.

    Raises:
        TooLargeError: a value has more than ``max_bytes``.
        NoListError: the object has no list under ``list_key``.
        ValueError: the file is malformed, not UTF-8, or nested too deeply.
    """
    source = _Source(stream, max_bytes, keys)
    first = source.next_character()
    if first == "{" and list_key:
        yield from _values_of_key(source, list_key)
    elif first == "[":
        yield from _values_of_array(source)
    else:
        while source.next_character():
            yield source.value()
        return
    if source.next_character():
        raise ValueError(f"unexpected content after the {'object' if first == '{' else 'array'}")


def _values_of_array(source: "_Source") -> Iterator[Any]:
    source.position += 1
    closed = source.next_character() == "]"
    while not closed:
        yield source.value()
        closed = source.after_item("]", of="array")
    source.position += 1


def _values_of_key(source: "_Source", list_key: str) -> Iterator[Any]:
    """The elements of the array that is the value of ``list_key``; other values of the object are read and dropped."""
    source.position += 1
    found, names = False, list[str]()
    closed = source.next_character() == "}"
    while not closed:
        name = source.value() if source.next_character() == '"' else None
        if not isinstance(name, str) or source.next_character() != ":":
            raise ValueError("a key and ':' are expected in the object")
        source.position += 1
        if name != list_key:
            names.append(name)
            source.value()
        elif found:
            raise ValueError(f"the key {list_key!r} appears twice")
        elif source.next_character() != "[":
            raise NoListError(f"the value of {list_key!r} is not a list of records")
        else:
            found = True
            yield from _values_of_array(source)
        closed = source.after_item("}", of="object")
    source.position += 1
    if not found:
        shown = ", ".join(repr(name)[:80] for name in names[:40])
        raise NoListError(f"no key {list_key!r} of a list of records; its keys are {shown}")


class _Source:
    """The text of a stream; only the text that is not yet parsed is kept."""

    def __init__(self, stream: IO[bytes], max_bytes: int, keys: Sequence[str]):
        self.stream, self.max_bytes, self.keys = stream, max_bytes, keys
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

    def after_item(self, end: str, *, of: str) -> bool:
        """Whether ``end`` follows, where that or a comma must; a comma is passed."""
        character = self.next_character()
        if character not in (end, ","):
            raise ValueError(f"{character!r} where ',' or {end!r} is expected" if character else f"the {of} has no end")
        self.position += character == ","
        return character == end

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
                # Of a number the rest may still be missing: 1 of 1.5.
                is_whole = self.text[end : end + 16].strip("0123456789.eE+-") or not isinstance(value, (int, float))
                if (end < len(self.text) and is_whole) or self.ended:
                    if end - self.position > self.max_bytes:
                        raise TooLargeError
                    start, self.position = self.position, end
                    if any(_count_quoted(self.text, key, start, end) > 1 for key in self.keys):
                        try:
                            decode_record(self.text[start:end], keys=self.keys)
                        except RepeatedKeyError as error:
                            return error
                    return value
            if len(self.text) - self.position > self.max_bytes:
                raise TooLargeError
            self._fill()
