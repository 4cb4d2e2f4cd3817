"""Pillow's part: bytes to a picture of the wanted channels, upright, and a picture to a square view.

Cost: of a JPEG of 500 x 375 about 3 ms of one core, most of it its decoder, which lets other threads run.
"""

import io

import numpy as np
from PIL import Image, ImageOps

FILE_FORMATS = ("JPEG", "MPO", "PNG", "WEBP")
"""What encoding "file" keeps; MPO is what phones write as .jpg."""
_FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF", "PPM")
_MODES = {1: "L", 3: "RGB"}
_GRAY_MODES = ("1", "L", "LA", "I;16", "I;16B", "I;16L", "I;16N")


def decode(data: bytes, *, channels: int) -> tuple[Image.Image, str, bool]:
    """An image file as an upright picture of mode L or RGB; its format; whether it was stored gray.

    EXIF's orientation is applied, transparency dropped, 16 bits scaled to 8, of a moving picture the first taken.

    Raises:
        ValueError: not an image, damaged, without a pixel, or larger than Pillow's limit; says why.
    """
    if not data:
        raise ValueError("no bytes")
    try:
        with Image.open(io.BytesIO(data), formats=_FORMATS) as image:
            image.load()
            kind = str(image.format)
            upright = ImageOps.exif_transpose(image)
    except Exception as error:  # Pillow's readers raise nearly anything on damaged bytes
        raise ValueError(f"not an image that Pillow reads ({type(error).__name__}: {error})") from error
    if 0 in upright.size:
        raise ValueError(f"has {upright.width} x {upright.height} pixels")
    return to_mode(upright, channels=channels), kind, upright.mode in _GRAY_MODES


def to_mode(image: Image.Image, *, channels: int) -> Image.Image:
    """The picture in mode L (one channel) or RGB (three); ValueError for pixels of 32 bits."""
    if image.mode.startswith("I;16"):  # convert would clip, not scale
        image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
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
