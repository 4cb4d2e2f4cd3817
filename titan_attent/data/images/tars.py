"""Images of a .tar or .tar.gz file in webdataset's layout: members of one key, up to the first dot, are one example.

Cost: one example in memory. Without names of classes the file is read twice, the first time for its labels.
"""

import gzip
import json
import tarfile
import zlib
from collections.abc import Iterator
from itertools import groupby
from pathlib import Path
from typing import IO

from titan_attent.data.images.examples import LABEL_KEYS, Bad, Example, Label, Limits

EXTENSIONS = ("jpg", "jpeg", "png", "webp")
_LABEL_EXTENSIONS = ("cls", "json")
_DAMAGE = (tarfile.TarError, EOFError, zlib.error, gzip.BadGzipFile)
Member = tuple[str, str, bytes]
"""Key, extension, content."""


class TarInput:
    """A tar file of image files, each with a ``.cls`` text (name or number of its class) or a label in a ``.json``."""

    holds_files = True
    ordered = False
    names = None

    def __init__(self, path: Path, *, keys: tuple[str, str] | None, limits: Limits):
        self.path, self.limits = path, limits
        self.label_keys = (keys[1],) if keys else LABEL_KEYS

    def labels(self) -> Iterator[Label]:
        try:
            for _, members in groupby(self._members(_LABEL_EXTENSIONS), key=lambda member: member[0]):
                label = self._label({extension: data for _, extension, data in members})
                if isinstance(label, Bad):
                    continue
                yield int(label) if isinstance(label, str) and label.isdecimal() else label
        except _DAMAGE:
            return  # which examples() reports

    def examples(self) -> Iterator[Example | Bad]:
        key = ""
        try:
            members = self._members((*EXTENSIONS, *_LABEL_EXTENSIONS))
            for key, group in groupby(members, key=lambda member: member[0]):
                yield self._example(key, {extension: data for _, extension, data in group})
        except _DAMAGE as error:
            after = f"{self.path}: after member {key}" if key else str(self.path)
            yield Bad(after, "damaged", f"truncated or not a tar file ({error})", "download or write it again")

    def _example(self, key: str, files: dict[str, bytes]) -> Example | Bad:
        where = f"{self.path}: {key}"
        images = [extension for extension in EXTENSIONS if extension in files]
        if len(images) != 1:
            problem = f"both {images[0]} and {images[1]}" if images else f"no image ({', '.join(EXTENSIONS)})"
            return Bad(where, "undecodable", problem, "write one image a key")
        label = self._label(files)
        if isinstance(label, Bad):
            return label._replace(where=f"{where}.{images[0]}")
        return Example(f"{where}.{images[0]}", files[images[0]], label)

    def _label(self, files: dict[str, bytes]) -> Label | Bad:
        """Of the members of a key; a Bad without its place."""
        mend = "write a .cls text or a .json with the label beside each image"
        try:
            if "cls" in files:
                label = files["cls"].decode("utf-8").strip()
                return label if label else Bad("", "label", "an empty .cls", mend)
            if "json" not in files:
                return Bad("", "label", "no label: neither .cls nor .json", mend)
            record = json.loads(files["json"])
        except (ValueError, RecursionError) as error:
            return Bad("", "label", f"its label cannot be read ({error})", mend)
        found = [record[key] for key in self.label_keys if isinstance(record, dict) and key in record]
        good = len(found) == 1 and isinstance(found[0], (int, str)) and not isinstance(found[0], bool)
        if not good or found[0] == "":
            problem = f"its .json holds no number or name of a class under {' or '.join(self.label_keys)}"
            return Bad("", "label", problem, "write the label there, or name its key with --keys IMAGE,LABEL")
        return found[0]

    def _members(self, extensions: tuple[str, ...]) -> Iterator[Member]:
        """Those of ``extensions``, in order; what :data:`_DAMAGE` lists, if the file is damaged or ends early."""
        zipped = self.path.name.lower().endswith("gz")
        opened: IO[bytes] = gzip.open(self.path) if zipped else open(self.path, "rb")  # type: ignore[assignment]  # noqa: SIM115
        with opened as file, tarfile.open(fileobj=file, mode="r:") as tar:
            while (member := tar.next()) is not None:
                tar.members = []  # type: ignore[attr-defined]  # which would grow with the file
                folder, _, name = member.name.rpartition("/")
                stem, _, extension = name.partition(".")
                extension = extension.lower()
                if not member.isreg() or name.startswith(".") or extension not in extensions:
                    continue
                if member.size > self.limits.file_bytes:
                    raise tarfile.ReadError(f"{member.name} claims {member.size:,} bytes, more than --max-file-bytes")
                content = tar.extractfile(member)
                assert content is not None
                yield f"{folder}/{stem}" if folder else stem, extension, content.read()
            # A file that was cut between two members ends without the mark of the end.
            file.seek(tar.offset)
            if len(file.read(tarfile.BLOCKSIZE)) < tarfile.BLOCKSIZE:
                raise tarfile.ReadError("no end-of-archive mark")
