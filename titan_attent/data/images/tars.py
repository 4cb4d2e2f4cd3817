"""Images of a .tar or .tar.gz file in webdataset's layout.

Members with the same key (the path up to the first dot of the name) form one example. They must be adjacent, and every
name must be unique. Members that belong to no example are counted.

Cost: one example and all keys in memory. Without a list of classes the file is read twice, first for its labels.
"""

import json
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from titan_attent.data.images.archive import Archive, Damaged, Member
from titan_attent.data.images.classes import as_integer
from titan_attent.data.images.examples import LABEL_KEYS, Bad, Example, Label, Limits
from titan_attent.data.images.file_types import IMAGE_EXTENSIONS, file_type, is_image, is_sidecar
from titan_attent.data.io.walk import HIDDEN, LeftOut

PREFERRED_EXTENSIONS = ("jpg", "jpeg", "png", "webp")
"""The image of a key has one of these; only without one, another of ``IMAGE_EXTENSIONS`` is the image."""
_LABEL_EXTENSIONS = ("cls", "json")
MAX_LABEL_BYTES = 2**24
MAX_NAME_CHARS = 1000
"""Longest name of a class, in characters; longer texts are captions."""
_FIX_LABEL = "write a .cls text or a .json with the label for each image"


class TarInput:
    """A tar file of image files, each with a ``.cls`` text (name or number of its class) or a label in a ``.json``.

    Args:
        keys: the second is the key of the label in a ``.json``; the first is not used.
        limits: limits of an image file.
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
        for item in self._items(with_images=False):  # examples() reports bad images
            if isinstance(item, Example):
                number = as_integer(item.label)
                yield item.label if number is None else number

    def examples(self) -> Iterator[Example | Bad]:
        yield from self._items(with_images=True)

    def _items(self, *, with_images: bool) -> Iterator[Example | Bad]:
        self.left_out, self.num_unread = LeftOut(), 0
        key, seen = "", set[str]()
        try:
            for group in self._groups(with_images=with_images):
                key = group.key
                if group.files or group.problem is not None:
                    if key in seen and group.problem is None:
                        fix = "write the members of a key next to each other, once"
                        group.problem = "twice", "its key appears earlier in the file, too", fix
                    seen.add(key)
                yield from self._outcome(group)
        except Damaged as error:
            where = f"{self.path}: after member {key}" if key else str(self.path)
            yield Bad(where, "damaged", f"truncated or not a tar file ({error})", "download or write it again")

    def _groups(self, *, with_images: bool) -> Iterator["_Group"]:
        """Groups of adjacent members of one key. Labels are always read; ``with_images``: images too."""
        group: _Group | None = None
        with Archive(self.path) as archive:
            for member in archive.members():
                folder, _, name = member.name.rpartition("/")
                stem, _, extension = name.partition(".")
                if member.file_type == "folder":
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
                is_label = extension in _LABEL_EXTENSIONS
                max_bytes = MAX_LABEL_BYTES if is_label else self.limits.file_bytes
                if group.accepts(member, extension, max_bytes=max_bytes):
                    group.files[extension] = archive.read() if with_images or is_label else b""
            if group is not None:
                yield group
            archive.check_end()

    def _outcome(self, group: "_Group") -> Iterator[Example | Bad]:
        where, files = f"{self.path}: {group.key}", group.files
        images = [extension for extension in PREFERRED_EXTENSIONS if extension in files]
        images = images or [extension for extension in IMAGE_EXTENSIONS if extension in files]
        num_multi_dot = sum(group.multi_dot.values())
        if group.problem is not None:
            reason, problem, fix = group.problem
            yield from [Bad(where, reason, problem, fix)] * max(1, group.num_images + num_multi_dot)
        elif len(images) > 1:
            yield Bad(where, "undecodable", f"both {images[0]} and {images[1]}", "write one image per key")
        elif not images and num_multi_dot:
            problem = f"no image but {group.first_multi_dot}: a key ends at the first dot"
            yield from [Bad(where, "name", problem, "use only one dot in the names of members")] * num_multi_dot
        elif not images and files:
            problem = f"no image ({', '.join(IMAGE_EXTENSIONS)})" + (f", but {group.unread}" if group.unread else "")
            yield Bad(where, "undecodable", problem, "write one image per key")
        else:
            for reason, count in [*group.others.items(), *group.multi_dot.items()]:
                self.left_out.add(reason, where, count)
            if not images:
                self.num_unread += bool(group.unread)
                return
            label = self._label(files)
            where = f"{where}.{images[0]}"
            yield label._replace(where=where) if isinstance(label, Bad) else Example(where, files[images[0]], label)

    def _label(self, files: dict[str, bytes]) -> Label | Bad:
        """The label from the members of a key; a Bad without ``where`` if there is no valid one."""
        try:
            if "cls" in files:
                label = files["cls"].decode("utf-8-sig").strip()
                if not label or len(label) > MAX_NAME_CHARS:
                    problem = f"a .cls of {len(label):,} characters" if label else "an empty .cls"
                    return Bad("", "label", problem, _FIX_LABEL)
                return label
            if "json" not in files:
                return Bad("", "label", "no label: neither .cls nor .json", _FIX_LABEL)
            record = json.loads(files["json"])
        except (ValueError, RecursionError) as error:
            return Bad("", "label", f"its label cannot be read ({error})", _FIX_LABEL)
        values = [record[key] for key in self.label_keys if isinstance(record, dict) and key in record]
        valid = len(values) == 1 and isinstance(values[0], (int, str)) and not isinstance(values[0], bool)
        if not valid or values[0] == "" or len(str(values[0])) > MAX_NAME_CHARS:
            problem = f"its .json has no number or name of a class under {' or '.join(self.label_keys)}"
            return Bad("", "label", problem, "write the label there, or give its key with --keys IMAGE,LABEL")
        return values[0]


class _Group:
    """Adjacent members with one key.

    Attributes:
        files: contents of images and labels, by extension.
        problem: (reason, problem, fix) of the first image or label that cannot be read.
        num_images: number of images, without those with several dots.
        multi_dot: number of images with several dots in their names, by file type.
        first_multi_dot: name of the first of these.
        others: number of all other members, by file type.
        unread: name of the first of the others that may be an image.
    """

    def __init__(self, key: str):
        self.key = key
        self.files: dict[str, bytes] = {}
        self.problem: tuple[str, str, str] | None = None
        self.num_images, self.first_multi_dot, self.unread = 0, "", ""
        self.multi_dot: Counter[str] = Counter()
        self.others: Counter[str] = Counter()

    def accepts(self, member: Member, extension: str, *, max_bytes: int) -> bool:
        """Count a member. Returns whether the caller should read its content into ``files``."""
        if extension not in (*IMAGE_EXTENSIONS, *_LABEL_EXTENSIONS):
            if is_image(extension):
                self.multi_dot[file_type(extension)] += 1
                self.first_multi_dot = self.first_multi_dot or member.name
            else:
                self.others[file_type(member.name)] += 1
                if not is_sidecar(member.name):
                    self.unread = self.unread or member.name
            return False
        self.num_images += extension in IMAGE_EXTENSIONS
        problem = None
        if member.file_type == "link":
            fix = "write it with tar --dereference --hard-dereference"
            problem = "link", f"{member.name} is a link to {member.link}, without content", fix
        elif member.file_type != "file":
            problem = "link", f"{member.name} is a sparse file, device or pipe", "write it as a plain file"
        elif extension in self.files:
            problem = "twice", f"two members are named {member.name}", "give every example its own name"
        elif member.size > max_bytes:
            problem = "large", f"{member.name} declares {member.size:,} bytes, more than {max_bytes:,}", "remove it"
            if extension in IMAGE_EXTENSIONS:
                problem = (*problem[:2], "make it smaller, or raise --max-file-bytes")
        self.problem = self.problem or problem
        return problem is None
