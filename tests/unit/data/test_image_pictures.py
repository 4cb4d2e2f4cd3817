"""Single pictures: malformed metadata, 16 bits, false claims of headers, and the memory of waiting pictures."""

import io
import struct
import threading
import warnings
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from titan_attent.data.images import prepare, write_images
from titan_attent.data.images.__main__ import main
from titan_attent.data.images.classes import Classes
from titan_attent.data.images.examples import Bad, Example
from titan_attent.data.images.pictures import TooLarge, decode_bytes, open_picture
from titan_attent.data.images.prepare import Preparation

RNG = np.random.default_rng(0)
PIXELS = RNG.integers(0, 256, (6, 8, 3), dtype=np.uint8)
GRAY16 = (np.arange(48).reshape(6, 8) * 1300).astype(np.uint16)


def encoded(pixels: np.ndarray, file_format: str, **options: Any) -> bytes:
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, file_format, **options)
    return file.getvalue()


def array(data: bytes, channels: int = 3) -> np.ndarray:
    return np.asarray(decode_bytes(data, channels=channels)[0])


# -- metadata ----------------------------------------------------------------------------------------------------------


def exif(*entries: bytes, tail: bytes = b"") -> bytes:
    return b"Exif\0\0II*\0" + struct.pack("<IH", 8, len(entries)) + b"".join(entries) + struct.pack("<I", 0) + tail


def turned(size: int = 3) -> bytes:
    """The EXIF entry for a clockwise rotation by 90 degrees."""
    return struct.pack("<HHII", 0x112, size, 1, 6)


EXIFS = {
    "a rational of -1/0": exif(
        turned(), struct.pack("<HHII", 0x11A, 10, 1, 8 + 2 + 24 + 4), tail=struct.pack("<ii", -1, 0)
    ),
    "a rational beyond the end": exif(turned(), struct.pack("<HHII", 0x11A, 10, 1, 60_000)),
    "an unknown type": exif(turned(), struct.pack("<HHII", 0x11A, 99, 1, 7)),
    "a text of numbers": exif(turned(), struct.pack("<HHII", 0x132, 5, 3, 8)),
    "a group beyond the end": exif(turned(), struct.pack("<HHII", 0x8769, 4, 1, 60_000)),
    "a group that contains itself": exif(turned(), struct.pack("<HHII", 0x8769, 4, 1, 8)),
    "two orientations": exif(struct.pack("<HHIHH", 0x112, 3, 2, 6, 8)),
    "an orientation of 32 bits": exif(turned(4)),
}
UNREADABLE_EXIFS = {
    "an orientation of 9": exif(struct.pack("<HHII", 0x112, 3, 1, 9)),
    "an orientation that is a text": exif(struct.pack("<HHI4s", 0x112, 2, 2, b"6\0\0\0")),
    "no EXIF": b"Exif\0\0what is this",
    "a torn one": exif(turned())[:15],
    "an empty one": b"Exif\0\0",
}


def with_exif(file_format: str, data: bytes, note: bytes) -> bytes:
    """A file with the given EXIF bytes, which Pillow would refuse to write."""
    if file_format == "JPEG":
        return data[:2] + b"\xff\xe1" + struct.pack(">H", len(note) + 2) + note + data[2:]
    if file_format == "PNG":
        return data[:33] + png_chunk(b"eXIf", note[6:]) + data[33:]
    return encoded(PIXELS, file_format, lossless=True, exif=note)  # WebP takes any


def png_chunk(chunk_type: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + chunk_type + data + struct.pack(">I", zlib.crc32(chunk_type + data))


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("file_format", ["JPEG", "PNG", "WEBP"])
@pytest.mark.parametrize("name", [*EXIFS, *UNREADABLE_EXIFS])
def test_a_picture_with_malformed_exif_is_decoded(file_format: str, name: str) -> None:
    plain = encoded(PIXELS, file_format, **({"lossless": True} if file_format == "WEBP" else {}))
    pixels = np.asarray(Image.open(io.BytesIO(plain)))
    expected = np.rot90(pixels, 3) if name in EXIFS else pixels
    np.testing.assert_array_equal(array(with_exif(file_format, plain, (EXIFS | UNREADABLE_EXIFS)[name])), expected)


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("file_format", ["JPEG", "PNG", "WEBP", "TIFF"])
def test_every_orientation_makes_a_picture_upright(orientation: int, file_format: str) -> None:
    """EXIF defines an orientation by the sides that row 0 and column 0 of the stored picture belong to."""
    note = Image.Exif()
    note[0x0112] = orientation
    note[0x011A] = 72.0
    data = encoded(PIXELS, file_format, exif=note, **({"lossless": True} if file_format == "WEBP" else {}))
    stored = PIXELS if file_format != "JPEG" else np.asarray(Image.open(io.BytesIO(data)))
    expected = stored.transpose(1, 0, 2) if orientation > 4 else stored
    expected = expected[::-1] if orientation in (3, 4, 7, 8) else expected
    expected = expected[:, ::-1] if orientation in (2, 3, 6, 7) else expected
    np.testing.assert_array_equal(array(data), expected)


def test_a_png_with_other_malformed_metadata_is_decoded() -> None:
    data = encoded(PIXELS, "PNG")
    for chunk in (b"zTXta\0\7nothing", b"iCCPa\0\7nothing", b"pHYs\0\0", b"iCCPa\0\0" + zlib.compress(b"x" * 2**21)):
        whole = data[:33] + png_chunk(chunk[:4], chunk[4:]) + data[33:]
        np.testing.assert_array_equal(array(whole), PIXELS)
        with pytest.raises(ValueError, match="not an image that Pillow reads"):
            decode_bytes(whole[:-30], channels=3)


def test_the_message_about_a_file_that_is_not_an_image_is_constant() -> None:
    with pytest.raises(ValueError, match=r"^not an image that Pillow reads \(UnidentifiedImageError\)$"):
        decode_bytes(b"text", channels=3)


# -- 16 bits -----------------------------------------------------------------------------------------------------------


def tiff(values: bytes, *, bits: int, inverted: bool = False, signed: bool = False, order: str = "<") -> bytes:
    """An uncompressed TIFF of 8 x 6 gray pixels."""
    fields = [(256, 8), (257, 6), (258, bits), (259, 1), (262, 0 if inverted else 1), (273, 8), (277, 1), (278, 6)]
    fields += [(279, len(values)), (339, 2 if signed else 1)]
    entries = b"".join(struct.pack(f"{order}HHIHH", tag, 3, 1, value, 0) for tag, value in fields)
    start = (b"II*\0" if order == "<" else b"MM\0*") + struct.pack(f"{order}I", 8 + len(values))
    return start + values + struct.pack(f"{order}H", len(fields)) + entries + bytes(4)


def packed_12_bits(values: np.ndarray) -> bytes:
    pairs = values.astype(int).reshape(-1, 2).tolist()
    return b"".join(bytes([a >> 4, (a & 15) << 4 | b >> 8, b & 255]) for a, b in pairs)


def netpbm(magic: str, maxval: int, values: np.ndarray) -> bytes:
    return f"{magic} 8 6 {maxval}\n".encode() + values.tobytes()


DEEP = {
    "PNG": encoded(GRAY16, "PNG"),
    "PGM": netpbm("P5", 65535, GRAY16.astype(">u2")),
    "PGM of 12 bits": netpbm("P5", 4095, (GRAY16 >> 4).astype(">u2")),
    "PGM as text": b"P2 8 6 65535\n" + " ".join(map(str, GRAY16.reshape(-1).tolist())).encode(),
    "TIFF": encoded(GRAY16, "TIFF"),
    "TIFF, packed": encoded(GRAY16, "TIFF", compression="tiff_lzw"),
    "TIFF of another order": tiff(GRAY16.astype(">u2").tobytes(), bits=16, order=">"),
    "TIFF, white is zero": tiff((65535 - GRAY16).astype("<u2").tobytes(), bits=16, inverted=True),
    "TIFF of 12 bits": tiff(packed_12_bits(GRAY16 >> 4), bits=12),
    "PPM": netpbm("P6", 65535, np.repeat(GRAY16[..., None], 3, axis=2).astype(">u2")),
}


@pytest.mark.parametrize("name", DEEP)
@pytest.mark.parametrize("channels", [1, 3])
def test_16_bits_become_the_highest_8(name: str, channels: int) -> None:
    picture, _, gray = decode_bytes(DEEP[name], channels=channels)
    pixels = np.asarray(picture).reshape(6, 8, channels).astype(int)
    assert np.abs(pixels - (GRAY16 >> 8)[..., None]).max() <= (name == "PPM" or "12" in name)
    assert gray == (name != "PPM")


def test_pixels_whose_range_is_unknown_are_bad() -> None:
    signed = tiff(GRAY16.tobytes(), bits=16, signed=True)
    for data in (signed, encoded(GRAY16.astype(np.float32), "TIFF"), encoded(GRAY16.astype(np.int32), "TIFF")):
        with pytest.raises(ValueError, match="has pixels of 32 bits"):
            decode_bytes(data, channels=3)


# -- truncated files ---------------------------------------------------------------------------------------------------

FILE_FORMATS = ["JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF", "PPM"]


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("file_format", FILE_FORMATS)
@pytest.mark.parametrize("share", [0.02, 0.5, 0.9])
def test_a_truncated_picture_is_bad(file_format: str, share: float) -> None:
    data = encoded(RNG.integers(0, 256, (40, 40, 3), dtype=np.uint8), file_format)
    with pytest.raises(ValueError, match="not an image that Pillow reads"):
        decode_bytes(data[: int(share * len(data))], channels=3)


# -- what a header claims ----------------------------------------------------------------------------------------------


def claiming(file_format: str, width: int, height: int) -> bytes:
    """A small file whose header claims width x height pixels."""
    data = bytearray(encoded(PIXELS, file_format))
    if file_format == "PNG":
        data[16:24] = struct.pack(">II", width, height)
        data[29:33] = struct.pack(">I", zlib.crc32(data[12:29]))
    elif file_format == "BMP":
        data[18:26] = struct.pack("<ii", width, height)
    elif file_format == "GIF":
        data[6:10] = struct.pack("<HH", width, height)
    elif file_format == "JPEG":
        at = data.index(b"\xff\xc0") + 5
        data[at : at + 4] = struct.pack(">HH", height, width)
    elif file_format == "PPM":
        data[: data.index(b"255")] = f"P6 {width} {height} ".encode()
    return bytes(data)


@pytest.mark.parametrize("file_format", ["PNG", "BMP", "GIF", "JPEG", "PPM"])
def test_a_header_is_checked_before_a_pixel_is_decoded(file_format: str, monkeypatch: pytest.MonkeyPatch) -> None:
    data = claiming(file_format, 300, 200)
    monkeypatch.setattr(Image.core, "new", None)  # allocates the memory of pixels
    monkeypatch.setattr(Image.core, "fill", None)
    with pytest.raises(TooLarge, match="^claims 300 x 200 pixels, more than 59,999, the limit$"):
        open_picture(data, max_pixels=59_999)
    assert open_picture(data, max_pixels=60_000).size == (300, 200)


def test_pillows_own_limit_is_one_message(monkeypatch: pytest.MonkeyPatch) -> None:
    data = encoded(PIXELS, "PNG")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for limit, name in ((23, "Error"), (40, "Warning")):  # Pillow warns above its limit and raises above twice that
            monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", limit)
            with pytest.raises(TooLarge, match=rf"claims more pixels than Pillow decodes \(DecompressionBomb{name}: "):
                open_picture(data, max_pixels=1000)


def make_folder(path: Path, **files: bytes) -> Path:
    for name, data in files.items():
        (path / "ape").mkdir(parents=True, exist_ok=True)
        (path / "ape" / name.replace("_", ".")).write_bytes(data)
    return path


def test_an_image_above_a_limit_is_one_bad_record(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = make_folder(
        tmp_path / "in", a_png=encoded(PIXELS, "PNG"), b_png=claiming("PNG", 30_000, 30_000), c_bmp=bytes(5000)
    )
    limits = ["--max-pixels", "48", "--max-file-bytes", "4999"]
    command = [str(source), "--output", str(tmp_path / "out"), *limits]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert main(command) == 2
        message = capsys.readouterr().err
        assert "b.png: claims 30,000 x 30,000 pixels, more than 48, the limit; replace or remove it, or" in message
        assert "or raise --max-pixels, or leave out what cannot be used with --on-bad skip" in message
        assert main([*command, "--on-bad", "skip"]) == 0
        limit = Image.MAX_IMAGE_PIXELS
    lines = (tmp_path / "out" / "skipped.jsonl").read_text().splitlines()
    assert len(lines) == 2 and "c.bmp" in lines[1] and "has 5,000 bytes, more than 4,999, the limit" in lines[1]
    assert main([*command[:-4], "--max-pixels", "47", "--output", str(tmp_path / "out2")]) == 2
    assert "a.png: claims 8 x 6 pixels" in capsys.readouterr().err
    assert limit == Image.MAX_IMAGE_PIXELS is not None


def test_limits_out_of_range(tmp_path: Path) -> None:
    source = make_folder(tmp_path / "in", a_png=encoded(PIXELS, "PNG"))
    for options in ({"max_pixels": 0}, {"max_file_bytes": -1}):
        with pytest.raises(ValueError, match=f"{next(iter(options))} is .*; set it to 1 or more"):
            write_images([source], output=tmp_path / "out", **options)
    with pytest.raises(ValueError, match="max_pixels is 200000000: set it to at most 178956970, or write with encod"):
        write_images([source], output=tmp_path / "out", encoding="file", max_pixels=200_000_000)


# -- memory of waiting images ------------------------------------------------------------------------------------------


class Watched(Preparation):
    """Asserts that nothing is decoded in the thread that reads the examples."""

    def __call__(self, example: Any) -> Any:
        assert threading.current_thread() is not threading.main_thread()
        return super().__call__(example)


@pytest.mark.parametrize("stored", ["file", "array"])
def test_waiting_images_are_limited_by_their_bytes(stored: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A small file with many pixels counts by its decoded bytes."""
    large = np.zeros((64, 64, 3), np.uint8)
    large[0] = RNG.integers(0, 256, (64, 3))
    given: Any = large if stored == "array" else encoded(large, "PNG")
    preparation = Watched(Classes(["a"]), "raw", 3, 0)
    opened_one = preparation.open(Example("", given, 0))
    assert not isinstance(opened_one, Bad) and opened_one.num_bytes > 4 * 64 * 64
    for name in ("_THREAD_BYTES", "_CHUNK_BYTES"):
        monkeypatch.setattr(prepare, name, 4 * opened_one.num_bytes)
    taken = 0

    def examples() -> Iterator[Example | Bad]:
        nonlocal taken
        for number in range(100):
            taken += 1
            yield Example(str(number), given, 0)
            yield Bad(str(number), "label", "", "")

    max_waiting, names = 0, []
    for done, item in enumerate(prepare.prepare(preparation, examples(), num_threads=2)):
        max_waiting = max(max_waiting, taken - done // 2)
        names.append(item.where)
        if not isinstance(item, Bad):
            assert item.data == large.tobytes()
    assert names == [str(number) for number in range(100) for _ in (0, 1)]
    assert max_waiting <= 17  # 8 wait, 4 were given, 5 are next; limited by chunks only, it would be 28 or more


def test_an_image_above_all_limits_is_processed_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prepare, "_THREAD_BYTES", 1)
    monkeypatch.setattr(prepare, "_CHUNK_BYTES", 1)
    examples = [Example(str(number), encoded(PIXELS, "PNG"), 0) for number in range(9)]
    prepared = list(prepare.prepare(Watched(Classes(["a"]), "raw", 3, 0), examples, num_threads=3))
    assert [item.where for item in prepared] == [str(number) for number in range(9)]
