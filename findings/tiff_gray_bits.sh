#!/usr/bin/env bash
# Pillow 13.0.0: what white is in a gray TIFF depends on how many bits it has, and 16 and 12 bits do not follow the file.
#
# Expected: a reader that says mode L is 0 (black) to 255 (white) and I;16 is 0 to 65535 gives one and the same picture,
# white on the left and black on the right, whatever the bits a sample and whether the file says BlackIsZero or WhiteIsZero
# (TIFF 6.0, tag 262). Pillow does for 4 and 8 bits: it scales 4 bits to 0..255 and inverts WhiteIsZero.
# Seen: of 16 bits and WhiteIsZero the values come as stored, a negative, with the same mode I;16 as BlackIsZero has. Of 12
# bits white is 4095 in mode I;16, nearly black; a PGM of the same 12 bits is scaled to 65535.
# So a folder of scans loses its contrast, or is inverted, in part of its files, without an error or a warning.
# A reader has to look at tags 258 and 262 itself where the mode starts with "I;16".
#
# Exit 0 while this is so, 1 once it changes. Needs Python 3.10 or newer and a package index.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check pillow==13.0.0
"$folder/venv/bin/python" - <<'EOF'
import io
import struct
import sys

import PIL
from PIL import Image

print("pillow", PIL.__version__)


def tiff(bits, white_is_zero):
    """White, white, black, black in one row, uncompressed, as TIFF 6.0 has it."""
    most = 2**bits - 1
    values = [0, 0, most, most] if white_is_zero else [most, most, 0, 0]
    if bits == 16:
        data = struct.pack("<4H", *values)  # samples of 16 bits are in the order of the file
    else:
        row = "".join(f"{value:0{bits}b}" for value in values)
        data = int(row, 2).to_bytes(len(row) // 8, "big")  # others are a row of bits
    fields = [(256, 4), (257, 1), (258, bits), (259, 1), (262, 0 if white_is_zero else 1), (273, 8), (277, 1), (278, 1)]
    fields.append((279, len(data)))
    entries = b"".join(struct.pack("<HHIHH", tag, 3, 1, value, 0) for tag, value in fields)
    return b"II*\0" + struct.pack("<I", 8 + len(data)) + data + struct.pack("<H", len(fields)) + entries + bytes(4)


def read(data):
    with Image.open(io.BytesIO(data)) as image:
        return image.mode, image.getpixel((0, 0)), image.getpixel((3, 0))


files = {f"TIFF, {bits:2} bits, {'White' if white else 'Black'}IsZero": tiff(bits, white) for bits in (4, 8, 16) for white in (0, 1)}
files["TIFF, 12 bits, BlackIsZero"] = tiff(12, 0)
files["PGM,  12 bits"] = b"P5 4 1 4095\n" + struct.pack(">4H", 4095, 4095, 0, 0)
seen = {name: read(data) for name, data in files.items()}
for name, (mode, white, black) in seen.items():
    print(f"{name:28} mode {mode:5} white is {white:5} black is {black:5}")
expected = {
    "TIFF,  4 bits, BlackIsZero": ("L", 255, 0),
    "TIFF,  4 bits, WhiteIsZero": ("L", 255, 0),
    "TIFF,  8 bits, BlackIsZero": ("L", 255, 0),
    "TIFF,  8 bits, WhiteIsZero": ("L", 255, 0),
    "TIFF, 16 bits, BlackIsZero": ("I;16", 65535, 0),
    "TIFF, 16 bits, WhiteIsZero": ("I;16", 0, 65535),
    "TIFF, 12 bits, BlackIsZero": ("I;16", 4095, 0),
    "PGM,  12 bits": ("I", 65535, 0),
}
if seen != expected:
    sys.exit("this has changed")
EOF
