"""Images of a .tar or .tar.gz file in webdataset's layout: members of one key, up to the first dot, are one example.

The members of a key stand together, and each name stands there once. What belongs to no example is counted.

Cost: one example, and the keys, in memory. Without names of classes the file is read twice, the first time for its
labels.
"""

import json
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from titan_attent.data.images.archive import Archive, Damaged, Member
from titan_attent.data.images.classes import as_integer
from titan_attent.data.images.examples import LABEL_KEYS, Bad, Example, Label, Limits
from titan_attent.data.images.file_types import IMAGE_EXTENSIONS, describe, is_beside, is_image
from titan_attent.data.io.walk import HIDDEN, LeftOut

EXTENSIONS = ("jpg", "jpeg", "png", "webp")
"""Taken before the others, which are images only where none of these is there."""
_LABEL_EXTENSIONS = ("cls", "json")
MOST_LABEL_BYTES = 2**24
MOST_NAME = 1000
"""Characters of the name of a class: a longer one is a caption."""
_MEND_LABEL = "write a .cls text or a .json with the label beside each image"


class TarInput:
    """A tar file of image files, each with a ``.cls`` text (name or number of its class) or a label in a ``.json``.

    Args:
        keys: the second is the key of the label in a ``.json``.
        limits: of an image file.
    """

    holds_files = True
    ordered = False
    names = None
    num_images = None

    def __init__(self, path: Path, *, keys: tuple[str, str] | None, limits: Limits):
        self.path, self.limits = path, limits
        self.label_keys = (keys[1],) if keys else LABEL_KEYS
        self.left_out, self.num_unread = LeftOut(), 0

    def labels(self) -> Iterator[Label]:
        for item in self._items(images=False):  # what is bad examples() reports
            if isinstance(item, Example):
                number = as_integer(item.label)
                yield item.label if number is None else number

    def examples(self) -> Iterator[Example | Bad]:
        yield from self._items(images=True)

    def _items(self, *, images: bool) -> Iterator[Example | Bad]:
        self.left_out, self.num_unread = LeftOut(), 0
        key, seen = "", set[str]()
        try:
            for group in self._groups(images=images):
                key = group.key
                if group.files or group.problem is not None:
                    if key in seen and group.problem is None:
                        mend = "write the members of a key together, once"
                        group.problem = "twice", "its key stands in front, too", mend
                    seen.add(key)
                yield from self._outcome(group)
        except Damaged as error:
            after = f"{self.path}: after member {key}" if key else str(self.path)
            yield Bad(after, "damaged", f"truncated or not a tar file ({error})", "download or write it again")

    def _groups(self, *, images: bool) -> Iterator["_Group"]:
        """Members of one key that stand together; ``images``: with their content, else that of labels alone."""
        group: _Group | None = None
        with Archive(self.path) as archive:
            for member in archive.members():
                folder, _, name = member.name.rpartition("/")
                stem, _, extension = name.partition(".")
                if member.kind == "folder":
                    continue
                if name.startswith("."):
                    self.left_out.add(HIDDEN, f"{self.path}: {member.name}")
                    continue
                key = f"{folder}/{stem}" if folder else stem
                if group is None or group.key != key:
                    if group is not None:
                        yield group
                    group = _Group(key)
                extension = extension.lower()
                most = MOST_LABEL_BYTES if extension in _LABEL_EXTENSIONS else self.limits.file_bytes
                if group.takes(member, extension, most=most):
                    wanted = images or extension in _LABEL_EXTENSIONS
                    group.files[extension] = archive.read() if wanted else b""
            if group is not None:
                yield group
            archive.check_end()

    def _outcome(self, group: "_Group") -> Iterator[Example | Bad]:
        where, files = f"{self.path}: {group.key}", group.files
        found = [extension for extension in EXTENSIONS if extension in files]
        found = found or [extension for extension in IMAGE_EXTENSIONS if extension in files]
        several = sum(group.several.values())
        if group.problem is not None:
            reason, problem, mend = group.problem
            yield from [Bad(where, reason, problem, mend)] * max(1, group.num_images + several)
        elif len(found) > 1:
            yield Bad(where, "undecodable", f"both {found[0]} and {found[1]}", "write one image a key")
        elif not found and several:
            problem = f"no image but {group.first}: a key ends at the first dot"
            yield from [Bad(where, "name", problem, "leave one dot alone in the names of members")] * several
        elif not found and files:
            problem = f"no image ({', '.join(IMAGE_EXTENSIONS)})" + (f", but {group.unread}" if group.unread else "")
            yield Bad(where, "undecodable", problem, "write one image a key")
        else:
            for kind, count in [*group.others.items(), *group.several.items()]:
                self.left_out.add(kind, where, count)
            if not found:
                self.num_unread += bool(group.unread)
                return
            label = self._label(files)
            where = f"{where}.{found[0]}"
            yield label._replace(where=where) if isinstance(label, Bad) else Example(where, files[found[0]], label)

    def _label(self, files: dict[str, bytes]) -> Label | Bad:
        """Of the members of a key; a Bad without its place."""
        try:
            if "cls" in files:
                label = files["cls"].decode("utf-8-sig").strip()
                if not label or len(label) > MOST_NAME:
                    what = f"a .cls of {len(label):,} characters" if label else "an empty .cls"
                    return Bad("", "label", what, _MEND_LABEL)
                return label
            if "json" not in files:
                return Bad("", "label", "no label: neither .cls nor .json", _MEND_LABEL)
            record = json.loads(files["json"])
        except (ValueError, RecursionError) as error:
            return Bad("", "label", f"its label cannot be read ({error})", _MEND_LABEL)
        found = [record[key] for key in self.label_keys if isinstance(record, dict) and key in record]
        good = len(found) == 1 and isinstance(found[0], (int, str)) and not isinstance(found[0], bool)
        if not good or found[0] == "" or len(str(found[0])) > MOST_NAME:
            problem = f"its .json holds no number or name of a class under {' or '.join(self.label_keys)}"
            return Bad("", "label", problem, "write the label there, or name its key with --keys IMAGE,LABEL")
        return found[0]


class _Group:
    """The members of a key.

    Attributes:
        files: contents by extension, of images and labels.
        problem: reason, problem and mend of the first of these that cannot be read.
        num_images: how many of these are images.
        several: kinds of images with several dots in their names, and how many; ``first``: the first of them.
        others: kinds of the rest, and how many; ``unread``: the first of them that may be an image.
    """

    def __init__(self, key: str):
        self.key = key
        self.files: dict[str, bytes] = {}
        self.problem: tuple[str, str, str] | None = None
        self.num_images, self.first, self.unread = 0, "", ""
        self.several: Counter[str] = Counter()
        self.others: Counter[str] = Counter()

    def takes(self, member: Member, extension: str, *, most: int) -> bool:
        """Whether the content of a member is to be read, into ``files``; counts it."""
        if extension not in (*IMAGE_EXTENSIONS, *_LABEL_EXTENSIONS):
            if is_image(extension):
                self.several[describe(extension)] += 1
                self.first = self.first or member.name
            else:
                self.others[describe(member.name)] += 1
                if not is_beside(member.name):
                    self.unread = self.unread or member.name
            return False
        self.num_images += extension in IMAGE_EXTENSIONS
        problem = None
        if member.kind == "link":
            mend = "write it with tar --dereference --hard-dereference"
            problem = "link", f"{member.name} is a link to {member.link}, without a content", mend
        elif member.kind != "file":
            problem = "link", f"{member.name} is a sparse file, device or pipe", "write it as a plain file"
        elif extension in self.files:
            problem = "twice", f"two members are named {member.name}", "give every example a name of its own"
        elif member.size > most:
            problem = "large", f"{member.name} declares {member.size:,} bytes, more than {most:,}", "remove it"
            if extension in IMAGE_EXTENSIONS:
                problem = (*problem[:2], "make it smaller, or raise --max-file-bytes")
        self.problem = self.problem or problem
        return problem is None
