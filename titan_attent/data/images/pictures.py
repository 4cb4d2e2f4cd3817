"""Pillow's part: bytes to a picture of the wanted channels, upright, and a picture to a square view.

Of a file's metadata the orientation alone is wanted; what else is odd in it does not condemn the picture. How many
pixels a file claims is looked at before any of them is decoded.

Cost: of a JPEG of 500 x 375 about 3 ms of one core, most of it its decoder, which lets other threads run. A picture
takes 4 bytes a pixel, twice that while it is turned or converted.
"""

import io
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
from PIL import ExifTags, Image, ImageOps, TiffImagePlugin, TiffTags

FILE_FORMATS = ("JPEG", "MPO", "PNG", "WEBP")
"""What encoding "file" keeps; MPO is what phones write as .jpg."""
READ_PIXELS = 178_956_970
"""Of an image of encoding "file", which is decoded at every read: Pillow's own bound."""
_FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF", "PPM")
_MODES = {1: "L", 3: "RGB"}
_GRAY_MODES = ("1", "L", "LA")
_PNG = b"\x89PNG\r\n\x1a\n"
_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
"""What brings a picture upright, by EXIF's orientation."""


class TooLarge(ValueError):
    """An image claims more pixels than are decoded."""


@contextmanager
def pillows_limit_off() -> Iterator[None]:
    """For a process of ours: no limit but the one that is asked for, and no warning of Pillow's about metadata."""
    limit, Image.MAX_IMAGE_PIXELS = Image.MAX_IMAGE_PIXELS, None
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", module=r"PIL\.")
            yield
    finally:
        Image.MAX_IMAGE_PIXELS = limit


def opened(data: bytes, *, max_pixels: int) -> Image.Image:
    """The picture of an image file, its header read and none of its pixels.

    Raises:
        TooLarge: it claims more than ``max_pixels``, or than Pillow's limit.
        ValueError: not an image, damaged, or without a pixel; says why.
    """
    if not data:
        raise ValueError("no bytes")
    try:
        image = _open(data)
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise TooLarge(f"claims more pixels than Pillow decodes ({type(error).__name__}: {error})") from error
    except Exception as error:  # Pillow's readers raise nearly anything on damaged bytes
        raise _not_an_image(error) from error
    if 0 in image.size:
        raise ValueError(f"has {image.width} x {image.height} pixels")
    if image.width * image.height > max_pixels:
        raise TooLarge(f"claims {image.width:,} x {image.height:,} pixels, more than the {max_pixels:,} that may be")
    return image


def _open(data: bytes) -> Image.Image:
    try:
        return Image.open(io.BytesIO(data), formats=_FORMATS)
    except (SyntaxError, ValueError, OSError):
        if not data.startswith(_PNG):
            raise
        return Image.open(io.BytesIO(_bare_png(data)), formats=("PNG",))


def _bare_png(data: bytes) -> bytes:
    """A PNG without the chunks that say nothing about its pixels, over which Pillow stumbles where they are odd."""
    parts, place = [_PNG], len(_PNG)
    while place < len(data):
        size = 12 + int.from_bytes(data[place : place + 4], "big")
        if (kind := data[place + 4 : place + 8])[:1].isupper() or kind in (b"tRNS", b"eXIf"):
            parts.append(data[place : place + size])
        place += size
    return b"".join(parts)


def decoded(image: Image.Image, *, channels: int) -> tuple[Image.Image, str, bool]:
    """What :func:`opened` gave, as an upright picture of mode L or RGB; its format; whether it was stored gray.

    EXIF's orientation is applied, transparency dropped, 16 bits scaled to 8, of a moving picture the first taken.

    Raises:
        ValueError: it is damaged, or has pixels of 32 bits; says why.
    """
    kind, turn = str(image.format), _turn(image)
    try:
        image.load()
    except Exception as error:
        raise _not_an_image(error) from error
    stored = _to_8_bits(image)
    upright = stored if turn is None else stored.transpose(turn)
    return to_mode(upright, channels=channels), kind, upright.mode in _GRAY_MODES


def decode(data: bytes, *, channels: int, max_pixels: int = READ_PIXELS) -> tuple[Image.Image, str, bool]:
    """:func:`opened` and :func:`decoded`."""
    return decoded(opened(data, max_pixels=max_pixels), channels=channels)


def _not_an_image(error: Exception) -> ValueError:
    # The text of this one is the address of a buffer.
    why = "" if type(error).__name__ == "UnidentifiedImageError" else f": {error}"
    return ValueError(f"not an image that Pillow reads ({type(error).__name__}{why})")


def _turn(image: Image.Image) -> Image.Transpose | None:
    """What brings the picture upright once it is loaded; None if nothing has to, or its metadata cannot be read."""
    try:
        exif = image.getexif()
        if not isinstance(image, TiffImagePlugin.TiffImageFile):
            return _UPRIGHT.get(exif.get(ExifTags.Base.Orientation, 1))
        for tag in TiffTags.TAGS_V2_GROUPS:  # its load turns it, and would look into these
            if tag in exif:
                del exif[tag]
        return None
    except Exception:  # which Pillow raises nearly any of, and which says nothing about the pixels
        return None


def _to_8_bits(image: Image.Image) -> Image.Image:
    """A picture of 9 to 16 bits of gray in mode L, its highest 8; any other as it is."""
    # A file of the PPM family with more than 8 bits is mode I, scaled to 16; so is such a PNG for earlier Pillows.
    if not image.mode.startswith("I;16") and not (image.mode == "I" and image.format in ("PPM", "PNG")):
        return image
    values, bits, inverted = np.asarray(image), 16, False
    if isinstance(image, TiffImagePlugin.TiffImageFile):  # whose values come as they are stored
        bits = image.tag_v2.get(TiffImagePlugin.BITSPERSAMPLE, (16,))[0]
        inverted = image.tag_v2.get(TiffImagePlugin.PHOTOMETRIC_INTERPRETATION) == 0
    gray = np.clip(values >> (bits - 8), 0, 255).astype(np.uint8)
    return Image.fromarray(255 - gray if inverted else gray)


def to_mode(image: Image.Image, *, channels: int) -> Image.Image:
    """The picture in mode L (one channel) or RGB (three); ValueError for pixels of 32 bits."""
    if image.mode in ("I", "F"):
        raise ValueError(f"has pixels of 32 bits (Pillow's mode {image.mode}), whose range is unknown")
    if image.mode == "P":  # a palette may have transparency, which only RGBA keeps apart
        image = image.convert("RGBA" if "transparency" in image.info else "RGB")
    return image.convert(_MODES[channels])


def from_array(pixels: np.ndarray, *, channels: int) -> Image.Image:
    """uint8 [H, W, 1, 3 or 4] as a picture of mode L or RGB."""
    return to_mode(Image.fromarray(pixels[..., 0] if pixels.shape[2] == 1 else pixels), channels=channels)


def to_array(image: Image.Image) -> np.ndarray:
    """uint8 [H, W, C]."""
    return np.asarray(image).reshape(image.height, image.width, -1)


def square(image: Image.Image, size: int) -> Image.Image:
    """The shorter side resized to ``size``, antialiased, and the centre ``size`` x ``size`` cut."""
    return ImageOps.fit(image, (size, size), Image.Resampling.BILINEAR)
