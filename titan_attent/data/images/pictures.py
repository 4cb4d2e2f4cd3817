"""Decoding and resizing with Pillow: bytes to an upright picture of 1 or 3 channels, and a picture to a square view.

Only the orientation is used of a file's metadata; a picture with otherwise malformed metadata is still decoded. The
number of pixels that a header claims is checked before any pixel is decoded.

Cost: a JPEG of 500 x 375 takes about 3 ms of one core, mostly in the decoder, which lets other threads run. A picture
takes 4 bytes per pixel, twice that while it is rotated or converted.
"""

import io
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
from PIL import ExifTags, Image, ImageOps, TiffImagePlugin, TiffTags

FILE_FORMATS = ("JPEG", "MPO", "PNG", "WEBP")
"""File formats that encoding "file" stores. Phones write MPO files as .jpg."""
MAX_READ_PIXELS = 178_956_970
"""Largest number of pixels of an image of encoding "file", which is decoded at every read: Pillow's own limit."""
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
"""The transposition that makes a picture upright, by its EXIF orientation."""


class TooLarge(ValueError):
    """An image claims more pixels than the limit."""


@contextmanager
def without_pillow_limit() -> Iterator[None]:
    """Disable Pillow's global limit of pixels and its warnings about metadata; limits per call still apply."""
    limit, Image.MAX_IMAGE_PIXELS = Image.MAX_IMAGE_PIXELS, None
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", module=r"PIL\.")
            yield
    finally:
        Image.MAX_IMAGE_PIXELS = limit


def open_picture(data: bytes, *, max_pixels: int) -> Image.Image:
    """Open an image file: its header is read, its pixels are not decoded.

    Raises:
        TooLarge: it claims more than ``max_pixels``, or more than Pillow's limit.
        ValueError: it is not an image, is damaged, or has no pixels; the message says which.
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
        raise TooLarge(f"claims {image.width:,} x {image.height:,} pixels, more than {max_pixels:,}, the limit")
    return image


def _open(data: bytes) -> Image.Image:
    try:
        return Image.open(io.BytesIO(data), formats=_FORMATS)
    except (SyntaxError, ValueError, OSError):
        if not data.startswith(_PNG):
            raise
        return Image.open(io.BytesIO(_bare_png(data)), formats=("PNG",))


def _bare_png(data: bytes) -> bytes:
    """A PNG without the chunks that do not affect its pixels. Pillow fails on such chunks if they are malformed."""
    chunks, offset = [_PNG], len(_PNG)
    while offset < len(data):
        size = 12 + int.from_bytes(data[offset : offset + 4], "big")
        if (chunk_type := data[offset + 4 : offset + 8])[:1].isupper() or chunk_type in (b"tRNS", b"eXIf"):
            chunks.append(data[offset : offset + size])
        offset += size
    return b"".join(chunks)


def decode_picture(image: Image.Image, *, channels: int) -> tuple[Image.Image, str, bool]:
    """Decode the result of :func:`open_picture`.

    EXIF's orientation is applied, transparency dropped, and 16 bits scaled to 8. An animation gives its first frame.

    Returns:
        (picture, file format, gray): an upright picture of mode L or RGB, and whether it was stored as gray.

    Raises:
        ValueError: it is damaged, or has pixels of 32 bits; the message says which.
    """
    file_format, transposition = str(image.format), _transposition(image)
    try:
        image.load()
    except Exception as error:
        raise _not_an_image(error) from error
    stored = _to_8_bits(image)
    upright = stored if transposition is None else stored.transpose(transposition)
    return to_mode(upright, channels=channels), file_format, upright.mode in _GRAY_MODES


def decode_bytes(data: bytes, *, channels: int, max_pixels: int = MAX_READ_PIXELS) -> tuple[Image.Image, str, bool]:
    """Open and decode an image file: :func:`open_picture`, then :func:`decode_picture`."""
    return decode_picture(open_picture(data, max_pixels=max_pixels), channels=channels)


def _not_an_image(error: Exception) -> ValueError:
    # The message of this exception contains only the address of a buffer.
    why = "" if type(error).__name__ == "UnidentifiedImageError" else f": {error}"
    return ValueError(f"not an image that Pillow reads ({type(error).__name__}{why})")


def _transposition(image: Image.Image) -> Image.Transpose | None:
    """The transposition that makes the loaded picture upright; None if it is, or if its metadata cannot be read."""
    try:
        exif = image.getexif()
        if not isinstance(image, TiffImagePlugin.TiffImageFile):
            return _UPRIGHT.get(exif.get(ExifTags.Base.Orientation, 1))
        for tag in TiffTags.TAGS_V2_GROUPS:  # Pillow's load() rotates a TIFF itself, and would fail on malformed groups
            if tag in exif:
                del exif[tag]
        return None
    except Exception:  # Pillow raises nearly anything on malformed metadata, while the pixels may be fine
        return None


def _to_8_bits(image: Image.Image) -> Image.Image:
    """The highest 8 bits of a gray picture of 9 to 16 bits, in mode L; any other picture unchanged."""
    # Pillow opens PPM files of more than 8 bits in mode I, scaled to 16 bits; earlier versions also such PNG files.
    if not image.mode.startswith("I;16") and not (image.mode == "I" and image.format in ("PPM", "PNG")):
        return image
    values, bits, inverted = np.asarray(image), 16, False
    if isinstance(image, TiffImagePlugin.TiffImageFile):  # Pillow does not scale the values of a TIFF
        bits = image.tag_v2.get(TiffImagePlugin.BITSPERSAMPLE, (16,))[0]
        inverted = image.tag_v2.get(TiffImagePlugin.PHOTOMETRIC_INTERPRETATION) == 0
    gray = np.clip(values >> (bits - 8), 0, 255).astype(np.uint8)
    return Image.fromarray(255 - gray if inverted else gray)


def to_mode(image: Image.Image, *, channels: int) -> Image.Image:
    """The picture in mode L (one channel) or RGB (three); ValueError for pixels of 32 bits."""
    if image.mode in ("I", "F"):
        raise ValueError(f"has pixels of 32 bits (Pillow's mode {image.mode}), whose range is unknown")
    if image.mode == "P":  # RGBA keeps the transparency of a palette in a separate channel
        image = image.convert("RGBA" if "transparency" in image.info else "RGB")
    return image.convert(_MODES[channels])


def from_array(pixels: np.ndarray, *, channels: int) -> Image.Image:
    """Pixels uint8 [H, W, 1, 3 or 4] as a picture of mode L or RGB."""
    return to_mode(Image.fromarray(pixels[..., 0] if pixels.shape[2] == 1 else pixels), channels=channels)


def to_array(image: Image.Image) -> np.ndarray:
    """The pixels of a picture, uint8 [H, W, C]."""
    return np.asarray(image).reshape(image.height, image.width, -1)


def square(image: Image.Image, size: int) -> Image.Image:
    """Resize the shorter side to ``size``, antialiased, and crop the centre ``size`` x ``size``."""
    return ImageOps.fit(image, (size, size), Image.Resampling.BILINEAR)
