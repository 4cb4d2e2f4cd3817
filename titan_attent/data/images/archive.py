"""Reads the members of a tar file in order and checks the whole file, up to its last byte.

Python's tarfile takes a damaged header for the end of an archive, ignores everything after the first end mark, and
allocates as much memory as a header declares. This reader accepts only headers and contents without a gap, followed by
two blocks of zeros and then only zeros (POSIX.1-2008, pax; long names of ustar, GNU and pax).

Cost: one header in memory, plus the content of a member if it is read, block by block: never more than the file holds.
"""

import gzip
import re
import tarfile
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import IO, NamedTuple

_BLOCK = tarfile.BLOCKSIZE
_CHUNK = 2**20
MAX_HEADER_BYTES = 2**20
"""Largest long name or set of pax fields, in bytes."""
_ENCODING = ("utf-8", "surrogateescape")
_FILE_TYPES = {tarfile.DIRTYPE: "folder", tarfile.LNKTYPE: "link", tarfile.SYMTYPE: "link"}
_FILE_TYPES |= dict.fromkeys((tarfile.REGTYPE, tarfile.AREGTYPE, tarfile.CONTTYPE), "file")
_LONG_NAME, _LONG_LINK = tarfile.GNUTYPE_LONGNAME, tarfile.GNUTYPE_LONGLINK
_PAX = (tarfile.XHDTYPE, tarfile.SOLARIS_XHDTYPE)
_GZIP_MAGIC = b"\x1f\x8b"
_RECORD = re.compile(rb"(\d{1,7}) ([^=\n]+)=")


class Damaged(Exception):
    """From this point on the file is not a valid archive; the message says why."""


class Member(NamedTuple):
    """A member of the archive.

    Attributes:
        file_type: "file", "link", "folder", or "other" for a sparse file, device or pipe.
        size: bytes that the header declares.
        link: name that a link points to.
    """

    name: str
    file_type: str
    size: int
    link: str


class Archive:
    """A .tar or .tar.gz file; a context manager, whose methods raise :class:`Damaged`."""

    def __init__(self, path: Path):
        is_gzip = path.name.lower().endswith("gz")
        try:
            self._file: IO[bytes] = gzip.open(path) if is_gzip else open(path, "rb")  # type: ignore[assignment]  # noqa: SIM115
        except OSError as error:
            raise Damaged(str(error)) from error
        self._size = None if is_gzip else path.stat().st_size
        self._block, self._left = b"", 0
        self._global: dict[str, str] = {}

    def __enter__(self) -> "Archive":
        return self

    def __exit__(self, *exception: object) -> None:
        self._file.close()

    def members(self) -> Iterator[Member]:
        """Every member, in order."""
        fields: dict[str, str] = {}
        while (header := self._header()) is not None:
            if header.type in (_LONG_NAME, _LONG_LINK, *_PAX, tarfile.XGLTYPE):
                content = self._extension(header.size)
                if header.type == tarfile.XGLTYPE:
                    self._global |= _pax(content)
                elif header.type in _PAX:
                    fields |= _pax(content)
                else:
                    key = "path" if header.type == _LONG_NAME else "linkpath"
                    fields[key] = content.split(b"\0")[0].decode(*_ENCODING)
                continue
            fields = self._global | fields
            size = _declared(fields["size"]) if "size" in fields else header.size
            file_type = _FILE_TYPES.get(header.type, "other")
            if any(name.startswith("GNU.sparse") for name in fields):
                file_type = "other"
            if header.type == tarfile.GNUTYPE_SPARSE:
                self._skip_sparse_headers()
            # A link, folder or device may declare a size, but has no content in the file.
            stored = header.isreg() or header.type not in tarfile.SUPPORTED_TYPES
            self._left = size if stored else 0
            name, at = fields.get("GNU.sparse.name", fields.get("path", header.name)), self._tell()
            if self._size is not None and at + self._left > self._size:
                raise Damaged(f"{name} declares {size:,} bytes, but the file has only {self._size - at:,} left")
            end = at + -(-self._left // _BLOCK) * _BLOCK
            yield Member(name, file_type, size, fields.get("linkpath", header.linkname))
            self._seek(end)
            fields = {}

    def read(self) -> bytes:
        """The content of the member that :meth:`members` gave last."""
        content = bytearray()
        while left := self._left - len(content):
            data = self._read(min(left, _CHUNK))
            if not data:
                raise Damaged(f"it ends {left:,} bytes before the end of this member")
            content += data
        self._left = 0
        return bytes(content)

    def _header(self) -> tarfile.TarInfo | None:
        """The next header; None at a block of zeros."""
        at, block = self._tell(), self._read(_BLOCK)
        if not at and block.startswith(_GZIP_MAGIC) and self._size is not None:
            raise Damaged("it is compressed with gzip; rename it to .tar.gz")
        if len(block) < _BLOCK:
            raise Damaged("no end-of-archive mark")
        if not any(block):
            return None
        try:
            header = tarfile.TarInfo.frombuf(block, *_ENCODING)
        except (tarfile.HeaderError, ValueError) as error:
            raise Damaged(f"no header at byte {at:,}: {error}") from error
        self._block = block
        if header.size < 0:
            raise Damaged(f"the header at byte {at:,} declares {header.size} bytes")
        return header

    def _extension(self, size: int) -> bytes:
        """The content of a header that carries a long name or pax fields."""
        if size > MAX_HEADER_BYTES:
            raise Damaged(f"an extended header at byte {self._tell():,} declares {size:,} bytes, more than are read")
        padded = -(-size // _BLOCK) * _BLOCK
        content = self._read(padded)
        if len(content) < padded:
            raise Damaged("no end-of-archive mark")
        return content[:size]

    def _skip_sparse_headers(self) -> None:
        """Skip GNU's sparse headers; a flag in each says whether another one follows."""
        has_next = self._block[482]
        while has_next:
            block = self._read(_BLOCK)
            if len(block) < _BLOCK:
                raise Damaged("no end-of-archive mark")
            has_next = block[504]

    def check_end(self) -> None:
        """Raise Damaged unless the archive ends here. Call it once, after the last member."""
        block = self._read(_BLOCK)
        if len(block) < _BLOCK:
            raise Damaged("no end-of-archive mark: one block of zeros, not two")
        while block:
            if any(block):
                at = self._tell() - len(block)
                raise Damaged(f"data follows the end of the archive, after byte {at:,}: another archive, or damage")
            block = self._read(_CHUNK)

    def _read(self, size: int) -> bytes:
        try:
            return self._file.read(size)
        except (OSError, EOFError, zlib.error) as error:
            raise Damaged(str(error)) from error

    def _tell(self) -> int:
        return self._file.tell()

    def _seek(self, offset: int) -> None:
        try:
            self._file.seek(offset)
        except (OSError, EOFError, OverflowError, zlib.error) as error:
            raise Damaged(str(error)) from error


def _declared(text: str) -> int:
    if not text.isdecimal() or len(text) > 18:
        raise Damaged(f"a member declares a size of {text[:30]!r} bytes")
    return int(text)


def _pax(content: bytes) -> dict[str, str]:
    """The fields of pax records, each ``LENGTH KEY=VALUE`` and a newline."""
    fields, at = {}, 0
    while at < len(content.rstrip(b"\0")):
        match = _RECORD.match(content, at)
        end = at + int(match[1]) if match else 0
        if not match or not match.end() < end <= len(content) or content[end - 1 : end] != b"\n":
            raise Damaged("its pax fields cannot be read")
        fields[match[2].decode(*_ENCODING)] = content[match.end() : end - 1].decode(*_ENCODING)
        at = end
    return fields
