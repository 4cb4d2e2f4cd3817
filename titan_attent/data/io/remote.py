"""Files on any file system of fsspec, by URL: which files a URL or a pattern names, and reading them as streams.

The packages of the file systems (s3fs, gcsfs, ...) are the user's to install. A file is read forward, or from any
position if its server gives parts of files. A read that fails is tried again from its position, a few times. If the
file has another size or stamp by then, or if all tries fail, a RemoteError says so.

Cost: one listing per pattern, one request of the size per file if the listing has none, and one block of a file in
memory (5 MiB, or what its file system takes); http(s) is read as one stream.
"""

import hashlib
import io
import os
import re
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any, NamedTuple, cast
from urllib.parse import unquote, urlsplit

BLOCK = 2**17
ATTEMPTS = 4
"""How often a read is tried."""
FIRST_DELAY = 0.5
"""Seconds before the second try; doubled before each further one."""
_URL = re.compile("[A-Za-z][A-Za-z0-9+.-]*(::|://)")
_STAMPS = ("ETag", "etag", "md5Hash", "content_md5", "Content-MD5", "blob_id", "generation", "sha")
_TIMES = ("LastModified", "last_modified", "Last-Modified", "mtime", "updated", "modified", "created")
_NO_PARTS = "the server gives no parts of files (Range), which this format needs; download the file first"


class RemoteError(ValueError):
    """A remote file that cannot be found or read; never a property of what it holds."""


class RemoteStat(NamedTuple):
    """As ``os.stat_result``; ``st_mtime_ns`` is a hash of the stamp that the file system has: an ETag, or a time."""

    st_size: int
    st_mtime_ns: int


@dataclass(frozen=True, repr=False)
class RemotePath:
    """A file or folder on a file system of fsspec; its methods do what those of ``pathlib.Path`` do.

    Attributes:
        url: with its protocol; the paths of a folder's files are below it.
    """

    url: str
    _fs: Any = field(compare=False)
    _path: str = field(compare=False)
    _info: dict[str, Any] = field(default_factory=dict, compare=False)

    def __str__(self) -> str:
        return self.url

    def __repr__(self) -> str:
        return f"RemotePath({self.url!r})"

    def __truediv__(self, name: str) -> "RemotePath":
        return RemotePath(f"{self.url.rstrip('/')}/{name}", self._fs, f"{self._path.rstrip('/')}/{name}")

    @property
    def name(self) -> str:
        """The last part, without the query of a URL of http."""
        path = unquote(urlsplit(self.url).path) if self.is_http else self.url
        return path.rstrip("/").rpartition("/")[2]

    @property
    def is_http(self) -> bool:
        return self.url.startswith(("http://", "https://"))

    def as_posix(self) -> str:
        return self.url

    def is_file(self) -> bool:
        """False if there is nothing; RemoteError if the server cannot be asked."""
        return self._kind() == "file"

    def is_dir(self) -> bool:
        """Whether it is a folder. A URL of http is one if it ends with a slash."""
        return self.url.endswith("/") if self.is_http else self._kind() == "directory"

    def _kind(self) -> str:
        try:
            return str(self._ask().get("type", "file"))
        except FileNotFoundError as error:
            # http: what the server or the network said
            if error.__cause__ is not None and getattr(error.__cause__, "status", None) != 404:
                raise _unreachable(self.url, error.__cause__) from error
            return ""

    def _ask(self) -> dict[str, Any]:
        if self._info.get("size") is None:
            try:
                self._info.update(self._fs.info(self._path))
            except FileNotFoundError:
                raise
            except Exception as error:
                raise _unreachable(self.url, error) from error
        return self._info

    def stat(self) -> RemoteStat:
        """Its size in bytes and a number that is another one if the file is changed; RemoteError if it has no size."""
        try:
            info = self._ask()
        except FileNotFoundError as error:
            raise RemoteError(f"{self.url}: no such file; correct the URL of this input") from error
        if info.get("size") is None:
            raise RemoteError(f"{self.url}: the server does not say how many bytes it has; download it first")
        stamp = next((f"{key} {info[key]}" for key in (*_STAMPS, *_TIMES) if info.get(key)), "")
        return RemoteStat(int(info["size"]), int.from_bytes(hashlib.sha256(stamp.encode()).digest()[:7], "big"))

    def open(self, mode: str = "rb", *, parts: bool = False) -> IO[bytes]:
        """Open it for reading bytes.

        Args:
            parts: it will be read at many positions; RemoteError on reading if the server of http cannot give them.
        """
        assert mode == "rb"
        return cast(IO[bytes], io.BufferedReader(_Reader(self, parts), BLOCK))

    def files(self) -> Iterator["RemotePath"]:
        """All files below this folder, by URL."""
        try:
            found = self._fs.find(self._path, detail=True)
        except Exception as error:
            raise _unreachable(self.url, error) from error
        yield from _sorted(found, self)


InputPath = Path | RemotePath
"""What an input may be."""


def is_url(text: str) -> bool:
    return _URL.match(text) is not None


def paths_of_url(url: str) -> list[InputPath]:
    """The files that match a pattern, by URL; or the one file or folder. A URL of local files gives a ``Path``.

    Raises:
        RemoteError: the file system is unknown, its package is not installed, it cannot be reached, or nothing matches.
    """
    if "::" in url:
        raise RemoteError(f"{url}: URLs within URLs are not read; unpack or download this input first")
    fs, path = _file_system(url)
    protocols = (fs.protocol,) if isinstance(fs.protocol, str) else fs.protocol
    if "file" in protocols:
        return [Path(path)]
    # A "?" begins the query of a URL of http, for fsspec too.
    is_pattern = re.search(r"[*\[]" if url.startswith("http") else r"[*?\[]", url) is not None
    if not is_pattern:
        return [RemotePath(url, fs, path)]
    try:
        found = fs.glob(path, detail=True)
    except Exception as error:
        raise _unreachable(url, error) from error
    matches: list[InputPath] = [
        match for match in _sorted(found, RemotePath(url, fs, path)) if not match.name.startswith(".")
    ]
    if not matches:
        raise RemoteError(f"{url}: no file matches this pattern; correct it")
    return matches


def _sorted(found: dict[str, dict[str, Any]], parent: RemotePath) -> list[RemotePath]:
    files = [(path, info) for path, info in found.items() if info.get("type") != "directory"]
    named = [(str(parent._fs.unstrip_protocol(path)), path, info) for path, info in files]
    return [
        RemotePath(name, parent._fs, path, dict(info)) for name, path, info in sorted(named, key=lambda one: one[0])
    ]


def _file_system(url: str) -> tuple[Any, str]:
    import fsspec

    options: dict[str, Any] = {}
    if url.startswith(("http://", "https://")):
        try:
            import aiohttp
        except ImportError as error:
            raise RemoteError(f"{url}: this needs the package aiohttp: pip install aiohttp") from error
        # By default a file may take five minutes in all; one of text is read while it is encoded.
        options["client_kwargs"] = {"timeout": aiohttp.ClientTimeout(total=None, sock_connect=60, sock_read=300)}
    try:
        return fsspec.core.url_to_fs(url, **options)
    except ImportError as error:
        raise RemoteError(f"{url}: the package of this file system is not installed ({error})") from error
    except Exception as error:
        if isinstance(error, ValueError) and "rotocol" in str(error):
            raise RemoteError(f"{url}: fsspec knows no such file system ({error}); correct the URL") from error
        raise _unreachable(url, error) from error


def _unreachable(url: str, error: BaseException) -> RemoteError:
    described = f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
    return RemoteError(
        f"{url}: cannot be read ({described}); check the URL, the credentials and the network, and start the same "
        "command again"
    )


class _Reader(io.RawIOBase):
    """A remote file from a position on; any position if the server gives parts of files."""

    def __init__(self, path: RemotePath, parts: bool):
        self._of, self._parts, self._stat, self._position = path, parts, path.stat(), 0
        self._file: Any = None
        self._at = 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._position

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        start = {os.SEEK_SET: 0, os.SEEK_CUR: self._position, os.SEEK_END: self._stat.st_size}[whence]
        self._position = max(0, start + offset)
        return self._position

    def readinto(self, buffer: Any) -> int:
        delay = FIRST_DELAY
        for attempt in range(1, ATTEMPTS + 1):
            try:
                block = self._read(min(len(buffer), self._stat.st_size - self._position))
                break
            except RemoteError:
                raise
            except Exception as error:
                self._drop()
                if attempt == ATTEMPTS:
                    raise _unreachable(self._of.url, error) from error
                time.sleep(delay)
                delay *= 2
                self._check_unchanged()
        buffer[: len(block)] = block
        self._position += len(block)
        self._at = self._position
        return len(block)

    def close(self) -> None:
        self._drop()
        super().close()

    def _read(self, size: int) -> bytes:
        if size <= 0:
            return b""
        if self._file is None or self._at != self._position:
            self._open_at(self._position)
        block = bytes(self._file.read(size))
        if not block:
            raise EOFError(f"it ends after {self._position:,} of {self._stat.st_size:,} bytes")
        return block

    def _open_at(self, position: int) -> None:
        """Open the file at ``position``. A file of http is one stream until another position is asked for."""
        fs, path = self._of._fs, self._of._path
        if not self._of.is_http or (self._parts and self._file is not None):
            self._file = self._file or fs.open(path, "rb")
            self._file.seek(position)
            return
        self._drop()
        if position or self._parts:
            self._file = fs.open(path, "rb")
            try:
                self._file.seek(max(1, position))  # from 0 on, any server gives a file
                self._file.read(1)
                self._file.seek(position)
                return
            except ValueError:
                if self._parts:
                    raise RemoteError(f"{self._of.url}: {_NO_PARTS}") from None
                self._drop()
        self._file = fs.open(path, "rb", block_size=0)
        while position > 0 and (block := self._file.read(min(BLOCK, position))):
            position -= len(block)

    def _drop(self) -> None:
        if self._file is not None:
            self._file.close()
            self._file = None

    def _check_unchanged(self) -> None:
        # Of another RemotePath, as this one knows its size.
        now = RemotePath(self._of.url, self._of._fs, self._of._path).stat()
        if now != self._stat:
            raise RemoteError(f"{self._of.url}: has changed while it was read; start the same command again")
