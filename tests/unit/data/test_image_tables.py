"""Tables and arrays of images: all types of bytes and labels, duplicate names, and false claims of a file."""

import io
import json
import struct
import tracemalloc
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
from PIL import Image

from titan_attent.data.images import arrays, tables, write_images
from titan_attent.data.images.examples import Bad, Example, Limits
from titan_attent.data.images.tables import TableInput

RNG = np.random.default_rng(0)
N = 7
PIXELS = RNG.integers(0, 256, (N, 6, 5, 3), dtype=np.uint8)
LABELS = [0, 1, 2, 1, 0, 2, 2]
NAMES = ["ape", "bee", "cat"]


def bmp(pixels: np.ndarray) -> bytes:
    """A BMP file; all have the same length, as fixed_size_binary needs."""
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "BMP")
    return file.getvalue()


FILES = [bmp(pixels) for pixels in PIXELS]
FIXED = pyarrow.binary(len(FILES[0]))


def dictionary(values: list[Any], value_type: Any, index: Any) -> Any:
    distinct = [value for value in dict.fromkeys(values) if value is not None]
    indices = pyarrow.array([None if value is None else distinct.index(value) for value in values], index)
    return pyarrow.DictionaryArray.from_arrays(indices, pyarrow.array(distinct, value_type))


def images_of(column_type: str, files: list[bytes | None]) -> Any:
    """A column of images."""
    if column_type.startswith("struct of "):
        inner = images_of(column_type.removeprefix("struct of "), files)
        nulls = pyarrow.array([file is None for file in files])
        return pyarrow.StructArray.from_arrays(
            [inner, pyarrow.array(["x.bmp"] * len(files))], ["bytes", "path"], mask=nulls
        )
    if column_type.startswith("dictionary of "):
        return dictionary(files, BYTES_TYPES[column_type.removeprefix("dictionary of ")], pyarrow.int32())
    return pyarrow.array(files, BYTES_TYPES[column_type])


BYTES_TYPES = {
    "binary": pyarrow.binary(),
    "large_binary": pyarrow.large_binary(),
    "fixed_size_binary": FIXED,
    "binary_view": pyarrow.binary_view(),
}
INDICES = [pyarrow.int8(), pyarrow.uint8(), pyarrow.int16(), pyarrow.uint16(), pyarrow.int32(), pyarrow.uint32()]
TEXTS = {
    "string": pyarrow.array([NAMES[label] for label in LABELS]),
    "large_string": pyarrow.array([NAMES[label] for label in LABELS], pyarrow.large_string()),
    "string_view": pyarrow.array([NAMES[label] for label in LABELS], pyarrow.string_view()),
    **{
        f"dictionary by {index}": dictionary([NAMES[label] for label in LABELS], pyarrow.string(), index)
        for index in [*INDICES, pyarrow.int64(), pyarrow.uint64()]
    },
    "large dictionary": dictionary([NAMES[label] for label in LABELS], pyarrow.large_string(), pyarrow.uint32()),
}
NUMBERS = {
    **{f"{sign}int{bits}": pyarrow.array(LABELS, f"{sign}int{bits}") for bits in (8, 16, 32, 64) for sign in ("", "u")},
    "dictionary of numbers": dictionary(LABELS, pyarrow.int64(), pyarrow.int8()),
}


def table(path: Path, image: Any, label: Any, **options: Any) -> Path:
    pyarrow.parquet.write_table(pyarrow.table({"image": image, "label": label}), path, **options)
    return path


def rows_of(path: Path, *, limits: Limits | None = None) -> list[Example | Bad]:
    return list(TableInput(path, keys=None, limits=limits or Limits()).examples())


# -- types -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", ["{}", "dictionary of {}", "struct of {}", "struct of dictionary of {}"])
@pytest.mark.parametrize("bytes_type", BYTES_TYPES)
def test_images_of_every_type_of_bytes(bytes_type: str, shape: str, tmp_path: Path) -> None:
    if "dictionary" in shape and bytes_type == "binary_view":
        pytest.skip("pyarrow writes no dictionary of views")
    files: list[bytes | None] = [*FILES[:3], None, *FILES[4:]]
    found = rows_of(table(tmp_path / "a.parquet", images_of(shape.format(bytes_type), files), LABELS))
    bad = found.pop(3)
    assert isinstance(bad, Bad) and bad.reason == "undecodable" and "row 4" in bad.where
    assert [item[1:] for item in found] == [(FILES[i], LABELS[i]) for i in range(N) if i != 3]
    assert all(type(item[1]) is bytes for item in found)


@pytest.mark.parametrize("label_type", [*TEXTS, *NUMBERS])
def test_labels_of_every_type(label_type: str, tmp_path: Path) -> None:
    labels = (TEXTS | NUMBERS)[label_type]
    summary = write_images([table(tmp_path / "a.parquet", FILES, labels)], output=tmp_path / "out", num_threads=1)
    assert list(summary.classes) == (NAMES if label_type in TEXTS else ["0", "1", "2"])
    assert np.fromfile(tmp_path / "out" / "shard-00000.labels.bin", "<i4").tolist() == LABELS


@pytest.mark.parametrize(
    "label_type", ["string", "large_string", "string_view", "dictionary", "int64", "dictionary of int64"]
)
def test_a_missing_label_is_one_bad_record(label_type: str, tmp_path: Path) -> None:
    values: list[Any] = [None if i == 2 else LABELS[i] if "int" in label_type else NAMES[LABELS[i]] for i in range(N)]
    if label_type.startswith("dictionary"):
        column = dictionary(values, pyarrow.int64() if "int" in label_type else pyarrow.string(), pyarrow.int8())
    else:
        column = pyarrow.array(values, getattr(pyarrow, label_type)())
    found = rows_of(table(tmp_path / "a.parquet", FILES, column))
    bad = found.pop(2)
    assert isinstance(bad, Bad) and (bad.reason, bad.problem) == ("label", "no label") and "row 3" in bad.where
    assert all(isinstance(item, Example) for item in found) and len(found) == N - 1


def test_a_label_that_is_not_utf_8_is_one_bad_record(tmp_path: Path) -> None:
    offsets, data = pyarrow.py_buffer(np.array([0, 3, 5, 8], np.int32).tobytes()), pyarrow.py_buffer(b"ape\xff\xfecat")
    broken = pyarrow.StringArray.from_buffers(3, offsets, data)
    path = table(tmp_path / "a.parquet", FILES[:3], broken)
    found = rows_of(path)
    assert [item.label for item in found if isinstance(item, Example)] == ["ape", "cat"]
    assert isinstance(found[1], Bad) and found[1].reason == "label" and "row 2" in found[1].where
    assert list(TableInput(path, keys=None, limits=Limits()).labels()) == ["ape", "cat"]


def test_what_pandas_writes(tmp_path: Path) -> None:
    pandas = pytest.importorskip("pandas")
    names = [NAMES[label] for label in LABELS]
    for number, labels in enumerate((names, pandas.Categorical(names), pandas.Series(LABELS, dtype="Int16"))):
        pandas.DataFrame({"image": FILES, "label": labels}).to_parquet(tmp_path / "a.parquet")
        summary = write_images([tmp_path / "a.parquet"], output=tmp_path / str(number), num_threads=1)
        assert list(summary.classes) == (["0", "1", "2"] if number == 2 else NAMES)
        assert summary.class_counts == tuple(np.bincount(LABELS))


@pytest.mark.parametrize("column", [[0.5] * N, [True] * N, [[1]] * N, [b"ape"] * N])
def test_labels_of_other_types_are_refused(column: Any, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="column 'label' is .*; labels must be integers or strings; choose the column"):
        rows_of(table(tmp_path / "a.parquet", FILES, column))


# -- duplicate names ---------------------------------------------------------------------------------------------------


def test_a_duplicate_column(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    for names, twice in ((["image", "label", "label"], "label"), (["image", "image", "label"], "image")):
        columns = {"image": FILES, "label": LABELS}
        written = pyarrow.Table.from_arrays([pyarrow.array(columns[name]) for name in names], names=names)
        pyarrow.parquet.write_table(written, path)
        for keys in (None, ("image", "label")):
            with pytest.raises(ValueError, match=rf"a.parquet: '{twice}' appears 2 times in it"):
                TableInput(path, keys=keys, limits=Limits())
    names = ["note", "image", "note", "label", "label.note"]
    values = [["x"] * N, FILES, LABELS, LABELS, ["y"] * N]
    pyarrow.parquet.write_table(pyarrow.Table.from_arrays([pyarrow.array(v) for v in values], names=names), path)
    assert [item[1:] for item in rows_of(path)] == list(zip(FILES, LABELS, strict=True))


def test_a_duplicate_array(tmp_path: Path) -> None:
    for twice in ("labels.npy", "classes.npy"):
        path = plain(tmp_path / "a.npz", images=PIXELS, labels=np.array(LABELS), classes=np.array(NAMES))
        with zipfile.ZipFile(path, "a") as archive, pytest.warns(UserWarning, match="Duplicate name"):
            archive.writestr(twice, archive.read(twice))
        with pytest.raises(ValueError, match=rf"'{twice[:-4]}' appears 2 times in it"):
            open_arrays(path)


# -- what a table claims -----------------------------------------------------------------------------------------------


def noise(size: int) -> bytes:
    return RNG.bytes(size)


def rows_read(path: Path, monkeypatch: pytest.MonkeyPatch, *, budget: int) -> list[int | Bad]:
    """The number of rows per read of each row group."""
    monkeypatch.setattr(tables, "_READ_BYTES", budget)
    table_input, metadata = TableInput(path, keys=None, limits=Limits()), pyarrow.parquet.read_metadata(path)
    groups = [metadata.row_group(number) for number in range(metadata.num_row_groups)]
    return [table_input._rows_per_read(group, ["image", "label"]) for group in groups]


def test_rows_are_read_by_their_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, options = tmp_path / "a.parquet", {"compression": "zstd", "row_group_size": 40}
    large, small = [noise(10_000) for _ in range(40)], [noise(10) for _ in range(40)]
    table(path, small + large, [0] * 80, use_dictionary=False, **options)
    assert rows_read(path, monkeypatch, budget=50_000) == [16, 4]
    same = large[0]  # stored once, used in every row
    table(path, [same] * 40, [0] * 40, **options)
    assert rows_read(path, monkeypatch, budget=50_000) == [4]
    zeros = [bytes(40_000)] + [b"x"] * 39  # compresses to almost nothing, and is all in one row
    for use_dictionary in (True, False):
        table(path, zeros, [0] * 40, use_dictionary=use_dictionary, **options)
        assert rows_read(path, monkeypatch, budget=50_000) == [1]
    assert [item.image for item in rows_of(path) if isinstance(item, Example)] == zeros


def test_a_dictionary_is_not_expanded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Reading 300 rows with one value keeps only a few copies of it in memory at a time."""
    monkeypatch.setattr(tables, "_READ_BYTES", 2**20)
    value = noise(2**20)
    for column in ([value] * 300, dictionary([value] * 300, pyarrow.binary(), pyarrow.int8())):
        path = table(tmp_path / "a.parquet", column, [0] * 300)
        assert path.stat().st_size < 2.5 * 2**20
        before, peak = pyarrow.total_allocated_bytes(), 0
        tracemalloc.start()
        for number, item in enumerate(TableInput(path, keys=None, limits=Limits()).examples()):
            assert isinstance(item, Example) and len(item.image) == 2**20
            peak = max(peak, pyarrow.total_allocated_bytes() - before)
            del item
            if number == 60:
                break
        assert peak + tracemalloc.get_traced_memory()[1] < 20 * 2**20
        tracemalloc.stop()


def test_a_row_group_that_expands_above_the_limit_is_one_bad_record(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    files, limits = [*FILES[:3], bytes(100_000), *FILES[4:]], Limits(file_bytes=50_000)
    table(path, files, LABELS, compression="zstd", row_group_size=3, use_dictionary=False)
    found = rows_of(path, limits=limits)
    assert [(item.where.rpartition(": ")[2]) for item in found] == ["row 1", "row 2", "row 3", "rows 4 to 6", "row 7"]
    bad = found[3]
    assert isinstance(bad, Bad) and bad.reason == "large" and "bytes in the file, which expand to 100,4" in bad.problem
    table(path, [*FILES[:3], noise(50_001), *FILES[4:]], LABELS)
    bad = rows_of(path, limits=limits)[3]
    assert isinstance(bad, Bad) and bad.reason == "large" and "has 50,001 bytes, more than 50,000" in bad.problem
    assert not [item for item in rows_of(path) if isinstance(item, Bad)]


# -- what an array claims ----------------------------------------------------------------------------------------------


def plain(path: Path, **values: np.ndarray) -> Path:
    np.savez(path, **values)  # type: ignore[arg-type]
    return path


def open_arrays(path: Path, **limits: int) -> arrays.ArraysInput:
    return arrays.ArraysInput(path, keys=None, limits=Limits(**limits))


def header(text: str, *, version: int = 1) -> bytes:
    size = struct.pack("<H" if version == 1 else "<I", len(text))
    return b"\x93NUMPY" + bytes([version, 0]) + size + text.encode()


def by_hand(path: Path, **members: bytes) -> Path:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in members.items():
            archive.writestr(f"{name}.npy", data)
    return path


def member(shape: str, data: bytes = b"", descr: str = "'|u1'", order: str = "False", version: int = 1) -> bytes:
    text = f"{{'descr': {descr}, 'fortran_order': {order}, 'shape': {shape}, }}"
    return header(text.ljust(117) + "\n", version=version) + data


GOOD = member("(7, 6, 5, 3)", PIXELS.tobytes())
GOOD_LABELS = member("(7,)", np.array(LABELS, "<i8").tobytes(), "'<i8'")
CLAIMS = {
    "a shape of 2^40": (member("(1099511627776, 4, 4)", bytes(112)), "of shape .*, 17,592,186,044,416 bytes, but has"),
    "a shape beyond 64 bits": (member("(99999999999, 99999999999, 99999999999)"), "bytes, but has 0"),
    "one image of too many bytes": (member("(7, 4, 4, 3)", bytes(335)), "336 bytes, but has 335"),
    "bytes after the array": (member("(7, 4, 4, 3)", bytes(337)), "336 bytes, but has 337"),
    "a side below 0": (member("(7, -4, 4)", bytes(112)), r"its shape is \(7, -4, 4\)"),
    "a side that is a bool": (member("(True, 4, 4)", bytes(16)), r"its shape is \(True, 4, 4\)"),
    "a float": (member("(7.0, 4, 4)", bytes(112)), r"its shape is \(7.0, 4, 4\)"),
    "a list": (member("[7, 4, 4]", bytes(112)), r"its shape is \[7, 4, 4\]"),
    "objects": (member("(7,)", b"\x80\x04", "'|O'"), "holds Python objects, which are pickles and are not read"),
    "objects within": (member("(7,)", b"", "[('a', '|O')]"), "holds Python objects"),
    "an unknown dtype": (member("(7, 4, 4)", bytes(112), "'what'"), "its header is not one that numpy writes"),
    "no dictionary": (header("7"), "its header is not one that numpy writes"),
    "a word": (header("__import__"), "its header is not one that numpy writes"),
    "a long header": (header("(" * 400 + "," * 400), "its header has 800 characters"),
    "a header that ends early": (b"\x93NUMPY\2\0\xff\xff\xff\xff{}", "its header has 4294967295 characters"),
    "a version": (b"\x93NUMPY\7\0" + GOOD[8:], "not a .npy file of version 1 to 3"),
    "no array": (b"text", "not a .npy"),
    "nothing": (b"", "not a .npy"),
}


@pytest.mark.parametrize("name", CLAIMS)
@pytest.mark.parametrize("key", ["images", "labels"])
def test_an_array_that_claims_what_it_is_not(name: str, key: str, tmp_path: Path) -> None:
    claimed, message = CLAIMS[name]
    path = by_hand(tmp_path / "a.npz", **({"images": GOOD, "labels": GOOD_LABELS} | {key: claimed}))
    tracemalloc.start()
    with pytest.raises(ValueError, match=rf"a.npz: its arrays cannot be read \(array '{key}'.*{message}"):
        open_arrays(path)
    assert tracemalloc.get_traced_memory()[1] < 2**20
    tracemalloc.stop()


def test_valid_headers_of_other_writers(tmp_path: Path) -> None:
    """Headers of versions 2 and 3, of Python 2, with keys in another order, and for arrays in Fortran's order."""
    valid = [
        member("(7L, 6L, 5L, 3L)", PIXELS.tobytes()),
        member("(7, 6, 5, 3)", PIXELS.tobytes(), version=2),
        member("(7, 6, 5, 3)", PIXELS.tobytes(), version=3),
        header('{"shape":(7,6,5,3),"descr":"|u1","fortran_order":False}') + PIXELS.tobytes(),
        member("(7, 6, 5, 3)", PIXELS.tobytes(order="F"), order="True"),
    ]
    big = member("(7, 1)", np.array(LABELS, ">i4").tobytes(), "'>i4'")
    for images in valid:
        path = by_hand(tmp_path / "a.npz", images=images, labels=big)
        found = list(open_arrays(path).examples())
        assert [item.label for item in found if isinstance(item, Example)] == LABELS
        np.testing.assert_array_equal([item.image for item in found if isinstance(item, Example)], PIXELS)


def test_arrays_above_a_limit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = plain(tmp_path / "a.npz", images=PIXELS, labels=np.array(LABELS), classes=np.array(NAMES))
    assert len(list(open_arrays(path, pixels=30).examples())) == N
    with pytest.raises(ValueError, match=r"\(7, 6, 5, 3\), images of more than 29 pixels, the limit; .*--max-pix"):
        open_arrays(path, pixels=29)
    first = plain(tmp_path / "first.npz", images=PIXELS.transpose(0, 3, 1, 2), labels=np.array(LABELS))
    assert len(list(open_arrays(first, pixels=30).examples())) == N
    monkeypatch.setattr(arrays, "_MAX_CLASS_NAME_BYTES", 35)  # three names of three characters of four bytes have 36
    with pytest.raises(ValueError, match="array 'classes' has 36 bytes, more than 35"):
        open_arrays(path)
    monkeypatch.setattr(arrays, "_MAX_FORTRAN_BYTES", 629)
    with pytest.raises(ValueError, match=r"has 630 bytes in Fortran's order, .*; write it in C's order"):
        open_arrays(plain(path, images=np.asfortranarray(PIXELS), labels=np.array(LABELS)))


def test_labels_are_not_all_in_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(arrays, "_BLOCK", 1000)
    labels = np.arange(100_000) % 3
    np.savez_compressed(tmp_path / "a.npz", images=np.zeros((100_000, 1, 1), np.uint8), labels=labels)
    found = open_arrays(tmp_path / "a.npz")
    tracemalloc.start()
    assert sum(item.label for item in found.examples() if isinstance(item, Example)) == labels.sum()
    assert list(found.labels()) == [0, 1, 2]
    assert tracemalloc.get_traced_memory()[1] < 400_000  # bytes; the labels have 800,000
    tracemalloc.stop()


def test_a_file_that_is_no_npz(tmp_path: Path) -> None:
    np.save(tmp_path / "a.npy", PIXELS)
    (tmp_path / "a.npy").rename(tmp_path / "a.npz")
    with pytest.raises(ValueError, match="a.npz: damaged or not a .npz file"):
        open_arrays(tmp_path / "a.npz")
    path = by_hand(tmp_path / "b.npz", images=GOOD, labels=GOOD_LABELS)
    data = bytearray(path.read_bytes())
    for mark, distance in ((b"PK\3\4", 6), (b"PK\1\2", 8)):
        at = data.index(mark) + distance
        data[at] |= 1  # the flag of encryption with a password
    path.write_bytes(data)
    with pytest.raises(ValueError, match="b.npz: its arrays cannot be read .*password"):
        open_arrays(path)


def test_unreadable_metadata_of_a_table(tmp_path: Path) -> None:
    for note in ("{", '{"info": 3}', json.dumps({"info": {"features": {"label": {"names": 3}}}})):
        written = pyarrow.table({"image": FILES, "label": LABELS}).replace_schema_metadata({"huggingface": note})
        pyarrow.parquet.write_table(written, tmp_path / "a.parquet")
        assert TableInput(tmp_path / "a.parquet", keys=None, limits=Limits()).names is None
