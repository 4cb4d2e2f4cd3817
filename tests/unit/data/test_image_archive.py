"""Members of tar files against Python's tarfile; and files that are damaged, cut, joined or declare wrong sizes."""

import gzip
import io
import json
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from titan_attent.data.images import ImageSummary, write_images
from titan_attent.data.images.archive import Archive, Damaged

RNG = np.random.default_rng(5)
PIXELS = RNG.integers(0, 256, (8, 6, 6, 3), dtype=np.uint8)


def png(pixels: np.ndarray, file_format: str = "PNG") -> bytes:
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, file_format)
    return file.getvalue()


FILES = [png(pixels) for pixels in PIXELS]


def archived(members: list[tuple[str, Any]], *, format: int = tarfile.PAX_FORMAT) -> bytes:
    """A tar file of (name, content) members, or (name, (type, link target))."""
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w", format=format) as tar:
        for name, content in members:
            member = tarfile.TarInfo(name)
            if isinstance(content, tuple):
                member.type, member.linkname = content
                tar.addfile(member)
            else:
                member.size = len(content)
                tar.addfile(member, io.BytesIO(content))
    return file.getvalue()


def pairs(num: int, *, label: str = "cls") -> list[tuple[str, Any]]:
    members: list[tuple[str, Any]] = []
    for i in range(num):
        text = str(i % 3) if label == "cls" else json.dumps({"label": i % 3})
        members += [(f"{i:04d}.png", FILES[i]), (f"{i:04d}.{label}", text.encode())]
    return members


def read(path: Path) -> list[tuple[str, bytes]]:
    with Archive(path) as archive:
        members = [(member.name, archive.read()) for member in archive.members() if member.file_type == "file"]
        archive.check_end()
        return members


def stored(tmp_path: Path, data: bytes, name: str = "a.tar") -> Path:
    path = tmp_path / name
    path.write_bytes(gzip.compress(data, mtime=0) if name.endswith("gz") else data)
    return path


def write(path: Path, **options: Any) -> ImageSummary:
    output = path.parent / f"out{len(list(path.parent.iterdir()))}"
    return write_images([path], output=output, **{"num_threads": 1, "classes": ["0", "1", "2"], **options})


# -- the reader -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("format", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
@pytest.mark.parametrize("name", ["a.tar", "a.tar.gz"])
def test_members_are_those_that_tarfile_finds(format: int, name: str, tmp_path: Path) -> None:
    members: list[tuple[str, Any]] = [("folder", (tarfile.DIRTYPE, ""))]
    for size in (0, 1, 511, 512, 513, 5000):
        members.append((f"folder/{size}.bin", RNG.bytes(size)))
    members.append(("/".join(["long"] * 20) + "/" + "n" * 90 + ".png", b"long"))
    members.append(("bäume.png", b"umlaut"))
    members.append(("link.png", (tarfile.SYMTYPE, "folder/1.bin")))
    if format != tarfile.USTAR_FORMAT:
        members.append(("n" * 300 + ".png", b"longer"))
        members.append(("link2.png", (tarfile.LNKTYPE, "l" * 200)))
    path = stored(tmp_path, archived(members, format=format), name)
    with tarfile.open(path) as tar:
        expected = [(m.name, m.linkname, tar.extractfile(m).read() if m.isreg() else None) for m in tar]  # type: ignore[union-attr]
    with Archive(path) as archive:
        actual = [(m.name, m.link, archive.read() if m.file_type == "file" else None) for m in archive.members()]
    assert actual == expected and len(actual) == len(members)
    with Archive(path) as archive:  # without reading any content
        assert [member.name for member in archive.members()] == [name for name, _, _ in expected]


def test_every_truncation_is_detected(tmp_path: Path) -> None:
    data = archived(pairs(2), format=tarfile.USTAR_FORMAT)
    end = len(data.rstrip(b"\0"))
    end += -end % 512 + 1024  # the two blocks of the end
    for size in [*range(0, end, 100), *range(512, end, 512), end - 1]:
        with pytest.raises(Damaged):
            read(stored(tmp_path, data[:size]))
    assert len(read(stored(tmp_path, data[:end]))) == 4
    assert len(read(stored(tmp_path, data + bytes(3000)))) == 4


def test_every_damaged_header_is_detected(tmp_path: Path) -> None:
    """A flipped bit in each header, in the end mark, and in the zeros after it."""
    data = archived(pairs(2), format=tarfile.GNU_FORMAT)
    with tarfile.open(fileobj=io.BytesIO(data)) as tar:
        headers = [member.offset for member in tar.getmembers()]
        end = headers[-1] + 1024
    for at in [*(offset + i for offset in headers for i in (0, 50, 130, 150, 156, 300)), end, end + 600, len(data) - 1]:
        damaged = bytearray(data)
        damaged[at] ^= 4
        with pytest.raises(Damaged):
            read(stored(tmp_path, bytes(damaged)))


def lying(size: int, *, entry_type: bytes = tarfile.REGTYPE, fields: dict[str, str] | None = None) -> bytes:
    """A header that declares a size, followed by 10 KiB."""
    member = tarfile.TarInfo("0000.png")
    member.size, member.type, member.pax_headers = size, entry_type, fields or {}
    return member.tobuf(tarfile.PAX_FORMAT if fields else tarfile.GNU_FORMAT) + bytes(10_240)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (lying(2**36), "0000.png declares 68,719,476,736 bytes, but the file has only 10,240 left"),
        (lying(2**70), "declares .* bytes, but the file has only"),
        (
            lying(2**36, entry_type=tarfile.GNUTYPE_LONGNAME),
            "an extended header at byte 512 declares 68,719,476,736 by",
        ),
        (lying(2**36, entry_type=tarfile.XHDTYPE), "an extended header at byte 512 declares 68,719,476,736 by"),
        (lying(2**36, entry_type=b"Q"), "declares .* bytes, but"),
        (lying(-5), "declares -5 bytes"),
        (lying(5, fields={"size": "9" * 5000}), "a member declares a size of '9+' bytes"),
        (lying(5, fields={"size": "-1"}), "a member declares a size of '-1' bytes"),
        (lying(5, fields={"size": str(2**40)}), "declares .* bytes, but"),
    ],
)
def test_declared_sizes_are_not_trusted(data: bytes, message: str, tmp_path: Path) -> None:
    with pytest.raises(Damaged, match=message):
        read(stored(tmp_path, data))
    with pytest.raises(ValueError, match=f"a.tar: truncated or not a tar file .*{message}"):
        write(tmp_path / "a.tar")
    with pytest.raises(Damaged):
        read(stored(tmp_path, data, "b.tar.gz"))


def test_pax_fields_that_cannot_be_read(tmp_path: Path) -> None:
    for content in (b"garbage", b"99 path=x\n", b"3 path=x\n", b"0 path=x\n", b"11 path=abc"):
        member = tarfile.TarInfo("x")
        member.type, member.size = tarfile.XHDTYPE, len(content)
        data = member.tobuf(tarfile.USTAR_FORMAT) + content.ljust(512, b"\0") + archived(pairs(1))
        with pytest.raises(Damaged, match="its pax fields cannot be read"):
            read(stored(tmp_path, data))


# -- what the writer makes of them ------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["a.tar", "a.tgz"])
def test_data_after_an_archive_is_not_dropped_silently(name: str, tmp_path: Path) -> None:
    """Two concatenated archives; a damaged header in the middle."""
    both = archived(pairs(4)) + archived(pairs(4))
    with pytest.raises(
        ValueError, match="after member 0003: truncated or not a tar file .*data follows the end of the arc"
    ):
        write(stored(tmp_path, both, name))
    summary = write(tmp_path / name, on_bad="skip")
    assert (summary.num_images, summary.skipped) == (4, {"damaged": 1})
    data = bytearray(archived(pairs(4)))
    data[data.index(b"0002.png")] = 7
    with pytest.raises(ValueError, match=r"after member 0000: truncated or not a tar file \(no header at byte"):
        write(stored(tmp_path, bytes(data), name))


def test_a_wrong_extension_is_named(tmp_path: Path) -> None:
    packed, plain = tmp_path / "packed.tar", tmp_path / "plain.tar.gz"
    packed.write_bytes(gzip.compress(archived(pairs(2))))
    plain.write_bytes(archived(pairs(2)))
    for classes in (None, ["0", "1", "2"]):  # without classes, the labels are read first
        with pytest.raises(
            ValueError, match=r"packed.tar: .*tar file \(it is compressed with gzip; rename it to .tar.gz"
        ):
            write(packed, classes=classes)
        with pytest.raises(ValueError, match=r"plain.tar.gz: .*not a tar file \(Not a gzipped file"):
            write(plain, classes=classes)


@pytest.mark.parametrize("entry_type", [tarfile.LNKTYPE, tarfile.SYMTYPE, tarfile.FIFOTYPE, tarfile.GNUTYPE_SPARSE])
@pytest.mark.parametrize("linked", [("png", "cls"), ("cls",)])
def test_a_member_without_content_is_bad(entry_type: bytes, linked: tuple[str, ...], tmp_path: Path) -> None:
    members = pairs(4)
    for i in (4, 5):
        for extension, content in (("png", FILES[i]), ("cls", b"1")):
            link = entry_type, f"{i - 4:04d}.{extension}"
            members.append((f"{i:04d}.{extension}", link if extension in linked else content))
    path = stored(tmp_path, archived(members))
    with pytest.raises(
        ValueError, match=rf"a.tar: 0004: 0004.{linked[0]} is a (link to 0000|sparse file, device or pip)"
    ):
        write(path)
    summary = write(path, on_bad="skip")
    assert (summary.num_images, summary.skipped) == (4, {"link": 2})


def test_names_with_several_dots(tmp_path: Path) -> None:
    """With a second image they are counted; without one, each image is bad."""
    others = [("0000.mask.png", FILES[7]), ("0000.left.jpg", FILES[7])]
    summary = write(stored(tmp_path, archived(pairs(1) + others)))
    assert (summary.num_images, summary.left_out, summary.skipped) == (1, {".png": 1, ".jpg": 1}, {})
    for names in (["0005.v2"], ["set.a.5", "set.a.6", "set.a.7"]):
        multi_dot = [(f"{name}.{end}", data) for name in names for end, data in (("png", FILES[5]), ("cls", b"1"))]
        path = stored(tmp_path, archived(pairs(2) + multi_dot))
        with pytest.raises(
            ValueError, match=rf"no image but {names[0]}.png: a key ends at the first dot; use only one dot"
        ):
            write(path)
        assert write(path, on_bad="skip").skipped == {"name": len(names)}


def test_a_key_or_name_that_comes_twice(tmp_path: Path) -> None:
    """Adjacent; not adjacent; in another case; the image or the label only."""
    once = pairs(3)
    for members, problem, bad in (
        ([*once, *pairs(1), *pairs(1)], "two members are named 0000.png", 2),
        ([*pairs(1), *pairs(1), *pairs(1), *once[2:]], "two members are named 0000.png", 3),
        ([*once, *pairs(1)], "its key appears earlier in the file, too", 1),
        ([*once[:2], ("0000.PNG", FILES[4]), *once[2:]], "two members are named 0000.PNG", 2),
        ([*once[:2], ("0000.cls", b"2"), *once[2:]], "two members are named 0000.cls", 1),
    ):
        path = stored(tmp_path, archived(members))
        with pytest.raises(ValueError, match=f"a.tar: 0000: {problem}"):
            write(path)
        summary = write(path, on_bad="skip")
        images = sum(name.lower().endswith(".png") for name, _ in members)
        assert summary.skipped["twice"] == bad and summary.num_images + bad == images


def test_a_member_above_the_limit(tmp_path: Path) -> None:
    path = stored(tmp_path, archived([*pairs(2), ("9.png", bytes(600)), ("9.cls", b"1")]), "a.tar.gz")
    limit = max(len(data) for data in FILES)
    with pytest.raises(
        ValueError, match=rf"a.tar.gz: 9: 9.png declares 600 bytes, more than {limit}; make it smaller, or"
    ):
        write(path, max_file_bytes=limit)
    assert write(path, max_file_bytes=limit, on_bad="skip").skipped == {"large": 1}
    with pytest.raises(ValueError, match="9.png: not an image"):
        write(path)


def test_other_formats_are_read_if_no_preferred_one_is_present(tmp_path: Path) -> None:
    members = [("0.bmp", png(PIXELS[0], "BMP")), ("0.cls", b"1"), ("1.jfif", png(PIXELS[1], "JPEG")), ("1.cls", b"2")]
    members += [("2.png", FILES[2]), ("2.gif", png(PIXELS[3], "GIF")), ("2.cls", b"0")]
    assert write(stored(tmp_path, archived(members))).class_counts == (1, 1, 1)


def test_other_members_of_an_archive_are_counted(tmp_path: Path) -> None:
    """Sidecar files are counted; unread files that may be images are refused if they outnumber the images."""
    members = [*pairs(2), ("0000.txt", b"a cat"), ("README.md", b""), ("._0.png", b""), ("x/y.npy", b"")]
    summary = write(stored(tmp_path, archived(members)))
    assert summary.left_out == {".txt": 0, ".md": 1, ".npy": 1, "hidden": 1} | {".txt": 1}
    more = [(f"{i}.avif", b"") for i in range(10, 13)]
    path = stored(tmp_path, archived([*pairs(2), *more]))
    with pytest.raises(ValueError, match=r"a.tar: most of it is not read, left out 3 .avif \(first: .*only 2 images"):
        write(path)
    assert write(path, on_bad="skip").left_out == {".avif": 3}


@pytest.mark.parametrize(
    ("label", "message"),
    [
        (("cls", b"x" * 1001), "a .cls of 1,001 characters"),
        (("cls", "cat".encode("utf-16")), "its label cannot be read"),
        (("json", json.dumps({"label": "x" * 1001}).encode()), "its .json has no number or name"),
        (("json", b"[" * 10**5), "its label cannot be read"),
        (("json", b'{"label": ' + b"9" * 5000 + b"}"), "its label cannot be read"),
        (("cls", b"9" * 900), "label '9+.* is not one of the classes"),
    ],
)
def test_invalid_labels(label: tuple[str, bytes], message: str, tmp_path: Path) -> None:
    path = stored(tmp_path, archived([*pairs(2), ("9.png", FILES[5]), (f"9.{label[0]}", label[1])]))
    with pytest.raises(ValueError, match=f"a.tar: 9.png: {message}") as raised:
        write(path)
    assert len(str(raised.value)) < 500
    assert write(path, on_bad="skip").skipped == {"label": 1}


def test_labels_with_a_byte_order_mark(tmp_path: Path) -> None:
    members = [("0.png", FILES[0]), ("0.cls", "\ufeffcat".encode()), ("1.png", FILES[1]), ("1.cls", b"cat")]
    assert write(stored(tmp_path, archived(members)), classes=None).classes == ("cat",)
