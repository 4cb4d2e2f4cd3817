"""Checkpoints are read in parts: boxes, shards, archives; only weights, only plain data, and damage is named."""

import io
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.distributed.checkpoint import FileSystemReader
from torch.distributed.checkpoint.metadata import MetadataIndex
from unit.edit.made import load, save, weights

from titan_attent.edit import boxes as boxes_module
from titan_attent.edit.boxes import Box, boxes, offsets, overlap, sizes
from titan_attent.edit.checkpoint import DcpCheckpoint
from titan_attent.edit.pieces import OpenFiles, Piece, covers, read_box
from titan_attent.edit.storage import Slice
from titan_attent.edit.stored_tensor import find

SHAPES = st.lists(st.integers(0, 5), max_size=4)
EARLIER = Path(__file__).parents[2] / "integration" / "earlier" / "run" / "checkpoint" / "step-35"


@given(shape=SHAPES, limit=st.integers(1, 30))
def test_boxes_are_the_tensor_in_row_major_order(shape: list[int], limit: int) -> None:
    tensor = torch.arange(int(torch.tensor(shape).prod())).view(shape)
    cut = list(boxes(shape, limit))
    parts = [tensor[tuple(slice(*one) for one in box)] for box in cut]
    assert torch.equal(torch.cat([part.flatten() for part in parts]), tensor.flatten())
    assert all(part.numel() <= limit or part.numel() == 0 for part in parts)


def grid(shape: list[int], cuts: list[int]) -> list[Box]:
    """The boxes of a sharding: every dimension cut in up to so many parts."""
    found: list[Box] = [()]
    for size, num in zip(shape, cuts, strict=True):
        step = -(-size // num)
        found = [(*box, (at, min(at + step, size))) for box in found for at in range(0, size, step)]
    return found


@given(data=st.data(), shape=st.lists(st.integers(1, 6), min_size=1, max_size=3), limit=st.integers(1, 30))
def test_any_sharding_gives_the_tensor(data: st.DataObject, shape: list[int], limit: int) -> None:
    cuts = data.draw(st.lists(st.integers(1, 3), min_size=len(shape), max_size=len(shape)))
    transposed = data.draw(st.booleans())
    tensor, content, pieces = torch.randn(shape), b"", []
    for box in grid(shape, cuts):
        part = tensor[tuple(slice(*one) for one in box)]
        flip = part.permute(*reversed(range(part.ndim))).contiguous().permute(*reversed(range(part.ndim)))
        stored = flip if transposed else part.contiguous()
        pieces.append(Piece(box, "f", len(content), stored.stride() if transposed else None))
        content += (flip.permute(*reversed(range(part.ndim))) if transposed else stored).numpy().tobytes()
    assert covers(pieces, shape)
    assert not covers(pieces[1:], shape) and not covers([pieces[0], *pieces], shape)
    files = OpenFiles("c", lambda name: io.BytesIO(content))
    for box in boxes(shape, limit):
        assert torch.equal(read_box(pieces, box, torch.float32, files), tensor[tuple(slice(*one) for one in box)])


def test_pieces_that_overlap_and_leave_a_gap_do_not_cover() -> None:
    pieces = [Piece(((0, 2), (0, 4)), "f", 0), Piece(((1, 3), (0, 4)), "f", 0), Piece(((3, 4), (0, 4)), "f", 0)]
    assert not covers([*pieces[:2]], (4, 4)) and not covers(pieces, (5, 4))
    assert overlap(((0, 2),), ((2, 3),)) is None and offsets(((1, 3),)) == (1,) and sizes(((1, 3),)) == (2,)


@pytest.mark.parametrize(
    "tensor",
    [
        torch.randn(3, 4),
        torch.randn(3, 4).t(),
        torch.randn(10, 10)[2:4],
        torch.ones(5, dtype=torch.bfloat16),
        torch.ones(3, dtype=torch.uint16),
        torch.ones(4, dtype=torch.float8_e4m3fn),
        torch.tensor(3),
        torch.zeros(0, 3),
    ],
    ids=lambda tensor: f"{tensor.dtype}{list(tensor.shape)}",
)
def test_the_bytes_of_a_tensor_are_found_in_an_archive(tensor: torch.Tensor) -> None:
    file = io.BytesIO()
    file.write(b"before")
    torch.save(tensor, file)
    file.write(b"after")
    stored = find(Slice(file, 6, file.tell() - 11))
    assert (stored.dtype, stored.shape, stored.strides) == (tensor.dtype, tuple(tensor.shape), tensor.stride())
    if stored.is_row_major and tensor.numel():
        expected = tensor.contiguous().flatten().view(torch.uint8).numpy().tobytes()
        assert file.getvalue()[6 + stored.start :][: len(expected)] == expected


class Touch:
    """An object whose unpickling creates a file."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self) -> Any:
        return Path.touch, (self.path,)


def test_an_archive_runs_no_code(tmp_path: Path) -> None:
    file = io.BytesIO()
    torch.save(Touch(tmp_path / "ran"), file)
    with pytest.raises(ValueError, match="it contains .*, which no tensor needs"):
        find(file)
    assert not (tmp_path / "ran").exists()


def test_the_metadata_of_an_operand_runs_no_code(tmp_path: Path) -> None:
    """.metadata is a pickle: a harmless class outside of DCP's own is refused before it is made."""
    path = save(tmp_path / "step-1", weights(1))
    metadata = FileSystemReader(path).read_metadata()
    metadata.planner_data = Touch(tmp_path / "ran")
    (path / ".metadata").write_bytes(pickle.dumps(metadata))
    with pytest.raises(ValueError, match="which does not belong in a checkpoint's metadata"):
        DcpCheckpoint(str(path))
    assert not (tmp_path / "ran").exists()


def test_a_full_checkpoint_of_two_ranks_gives_its_weights_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """A run of torchtitan on two ranks: each weight is what torch loads, and no optimizer state is one."""
    monkeypatch.setattr(boxes_module, "ELEMENTS", 1000)
    checkpoint, expected = DcpCheckpoint(str(EARLIER)), load(EARLIER)
    assert {name for name in expected if not name.startswith(("optimizer.", "teacher."))} == set(checkpoint.weights)
    assert any(name.startswith("optimizer.") for name in expected)
    for name, weight in checkpoint.weights.items():
        parts = [checkpoint.read(name, box).flatten() for box in boxes(weight.shape)]
        assert torch.equal(torch.cat(parts), expected[name].flatten()), name


def spoil_length(path: Path, metadata: Any) -> None:
    next(iter(metadata.storage_data.values())).length += 10**6


def spoil_shape(path: Path, metadata: Any) -> None:
    """Two weights in each other's place."""
    one, two = (MetadataIndex(name, [0, 0]) for name in list(weights(0))[:2])
    data = metadata.storage_data
    data[one], data[two] = data[two], data[one]


DAMAGE: dict[str, tuple[Any, str]] = {
    "a file is missing": (lambda path, metadata: (path / "__0_0.distcp").unlink(), "__0_0.distcp is missing"),
    "a file is short": (spoil_length, "__0_0.distcp has .* bytes, and .metadata needs"),
    "a shard is missing": (lambda path, metadata: metadata.storage_data.popitem(), ".metadata does not say where"),
    "a shard is no part": (
        lambda path, metadata: metadata.state_dict_metadata["norm.weight"].chunks.clear(),
        "its shards do not make up norm.weight",
    ),
    "a path leads out": (
        lambda path, metadata: [vars(one).update(relative_path="../x") for one in metadata.storage_data.values()],
        "is invalid .* of ../x",
    ),
    "an extension wrote it": (
        lambda path, metadata: [
            vars(one).update(transform_descriptors=["z"]) for one in metadata.storage_data.values()
        ],
        "was written with the DCP extension z",
    ),
    "weights are below a name": (
        lambda path, metadata: metadata.planner_data.update({name: ("model", name) for name in metadata.planner_data}),
        "has no weights at its top level, .*: its tensors are below model",
    ),
}


@pytest.mark.parametrize("how", DAMAGE)
def test_damage_is_one_error_before_any_work(how: str, tmp_path: Path) -> None:
    path = save(tmp_path / "step-1", weights(1))
    metadata = FileSystemReader(path).read_metadata()
    spoil, message = DAMAGE[how]
    spoil(path, metadata)
    (path / ".metadata").write_bytes(pickle.dumps(metadata))
    with pytest.raises(ValueError, match=message):
        DcpCheckpoint(str(path))


def test_damage_inside_a_file_is_one_error(tmp_path: Path) -> None:
    path = save(tmp_path / "step-1", weights(1))
    metadata = FileSystemReader(path).read_metadata()
    spoil_shape(path, metadata)
    (path / ".metadata").write_bytes(pickle.dumps(metadata))
    name = next(iter(weights(0)))
    with pytest.raises(ValueError, match=f"{name} is torch.float32 .* in __0_0.distcp, and torch.float32 .*12, 8"):
        DcpCheckpoint(str(path)).read(name, next(boxes((12, 8))))
    file = path / "__0_0.distcp"
    file.write_bytes(bytes(file.stat().st_size))
    checkpoint = DcpCheckpoint(str(path))
    for _ in range(2):  # a second read is no better
        with pytest.raises(ValueError, match=f"{name} cannot be read from __0_0.distcp .*Restore it"):
            checkpoint.read(name, next(boxes((12, 8))))


def test_a_folder_that_is_no_checkpoint_is_refused(tmp_path: Path) -> None:
    save(tmp_path / "run" / "checkpoint" / "step-9", weights(1))
    save(tmp_path / "run" / "checkpoint" / "step-10", weights(1))
    with pytest.raises(ValueError, match="contains checkpoints but is not one itself: .* such as .*step-10$"):
        DcpCheckpoint(str(tmp_path / "run"))
    (tmp_path / "empty").mkdir()
    for other in ("empty", "run/checkpoint/step-9/.metadata"):
        with pytest.raises(ValueError, match="neither a finished DCP checkpoint .* nor a folder of"):
            DcpCheckpoint(str(tmp_path / other))


@pytest.mark.parametrize(
    ("path", "fix"),
    [
        ("none", "check the path"),
        ("run/step-11", "beside it are step-9, step-10"),
        ("0.4run/step-9", "write the coefficient as an argument of its own, 0.4 run/step-9"),
        (".4*run/step-9", "write the coefficient as an argument of its own, .4 run/step-9"),
        ("2 run/step-9", "write the coefficient as an argument of its own, 2 run/step-9"),
        ("4run/step-8", "check the path"),
    ],
)
def test_a_missing_path_is_told_what_may_be_meant(
    path: str, fix: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for step in (9, 10):
        save(Path(f"run/step-{step}"), weights(1))
    with pytest.raises(ValueError) as refused:
        DcpCheckpoint(path)
    assert str(refused.value) == f"{path} does not exist: {fix}"
