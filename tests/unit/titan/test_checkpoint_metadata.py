"""A checkpoint's metadata is read without running its code, and errors in it end in clear messages."""

import collections
import pathlib
import pickle
import struct
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint import FileSystemReader
from torch.distributed.checkpoint.metadata import MetadataIndex, TensorProperties

from titan_attent.titan.checkpoint_metadata import read_metadata, read_value, safetensors_shapes, shapes_of

EARLIER = Path(__file__).parents[2] / "integration" / "earlier" / "run" / "checkpoint" / "step-35"


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    state = {"w": torch.ones(2, 3), "half": torch.ones(4, dtype=torch.bfloat16), "at": {"step": 7, "text": "a" * 100}}
    dcp.save(state, checkpoint_id=tmp_path / "step-7", no_dist=True)
    return tmp_path / "step-7"


def test_reads_what_torch_reads(saved: Path) -> None:
    for path in (saved, EARLIER):
        ours, torchs = read_metadata(path), FileSystemReader(path).read_metadata()
        assert ours.state_dict_metadata == torchs.state_dict_metadata
        assert ours.storage_data == torchs.storage_data and ours.planner_data == torchs.planner_data
    metadata = read_metadata(saved)
    assert shapes_of(metadata, modules=["w", "half", "at"]) == {"w": [2, 3], "half": [4]}
    assert read_value(saved, metadata, "at.step", int) == 7
    assert read_value(saved, metadata, "at.text", str) == "a" * 100
    assert read_value(EARLIER, read_metadata(EARLIER), "train_state.step", int) == 35


class Touch:
    """An object whose unpickling creates a file."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self) -> Any:
        return pathlib.Path.touch, (self.path,)


@pytest.mark.parametrize(
    "other",
    [Touch, lambda path: collections.Counter(), lambda path: len, lambda path: torch.nn.Linear],
    ids=["touch", "counter", "len", "linear"],  # the same in every process: the suite runs in two
)
def test_a_class_outside_the_list_is_refused(saved: Path, tmp_path: Path, other: Any) -> None:
    ran = tmp_path / "ran"
    metadata = FileSystemReader(saved).read_metadata()
    metadata.planner_data = other(ran)
    (saved / ".metadata").write_bytes(pickle.dumps(metadata))
    with pytest.raises(
        ValueError, match=r"\.metadata contains .*, which does not belong .* only those of people that you trust"
    ):
        read_metadata(saved)
    assert not ran.exists()
    if other is Touch:  # checks the test itself: torch's own reader runs the code
        FileSystemReader(saved).read_metadata()
        assert ran.exists()


def test_a_value_is_not_run_either(saved: Path, tmp_path: Path) -> None:
    metadata, ran = read_metadata(saved), tmp_path / "ran"
    torch.save(Touch(ran), saved / "x.distcp")
    for entry in metadata.storage_data.values():
        entry.relative_path, entry.offset, entry.length = "x.distcp", 0, (saved / "x.distcp").stat().st_size
    with pytest.raises(ValueError, match=r"step-7 is damaged: its at.step cannot be read .*restore it"):
        read_value(saved, metadata, "at.step", int)
    assert not ran.exists()


@pytest.mark.parametrize(
    "location",
    [{"relative_path": "../x"}, {"length": 2**40}, {"length": -1}, {"offset": -5}, {"relative_path": "none"}],
    ids=str,
)
def test_invalid_locations(saved: Path, location: dict[str, Any]) -> None:
    metadata = read_metadata(saved)
    for entry in metadata.storage_data.values():
        vars(entry).update(location)
    with pytest.raises(ValueError, match="damaged: its at.step cannot be read"):
        read_value(saved, metadata, "at.step", int)
    with pytest.raises(ValueError, match="its nothing cannot be read .it is missing"):
        read_value(saved, metadata, "nothing", int)


def test_a_checkpoint_of_a_later_torch(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The metadata is as torch 2.15 writes it: the strides of a tensor follow its other properties."""
    stock = TensorProperties.__getstate__
    metadata = FileSystemReader(saved).read_metadata()
    monkeypatch.setattr(TensorProperties, "__getstate__", lambda self: (*stock(self), (3, 1)))
    (saved / ".metadata").write_bytes(pickle.dumps(metadata))
    with pytest.raises(ValueError, match="too many values to unpack"):  # torch's own
        pickle.loads((saved / ".metadata").read_bytes())
    with pytest.raises(ValueError, match=r"step-7 was written by a later torch than this one, .*under the torch that"):
        read_metadata(saved)


@pytest.mark.parametrize("content", [b"", b"\x80", b"no pickle", pickle.dumps([1, 2]), pickle.dumps({"a": 1})], ids=str)
def test_damaged(saved: Path, content: bytes) -> None:
    (saved / ".metadata").write_bytes(content)
    with pytest.raises(ValueError, match="damaged.*estore it, or give another checkpoint"):
        read_metadata(saved)


SPOILED: dict[str, Any] = {
    "no names": lambda metadata: setattr(metadata, "state_dict_metadata", [1]),
    "a name of another type": lambda metadata: metadata.state_dict_metadata.update({7: None}),
    "places in a list": lambda metadata: setattr(metadata, "storage_data", [1]),
    "a place of another type": lambda metadata: setattr(metadata, "storage_data", {MetadataIndex("at.step"): 7}),
    "a place by a number": lambda metadata: metadata.storage_data.update({7: None}),
    "an offset of text": lambda metadata: vars(next(iter(metadata.storage_data.values()))).update(offset="x"),
    "a size of text": lambda metadata: setattr(metadata.state_dict_metadata["w"], "size", "x"),
    "no fields": lambda metadata: vars(metadata).clear(),
}


@pytest.mark.parametrize("how", SPOILED)
def test_fields_of_other_types(saved: Path, how: str) -> None:
    metadata = FileSystemReader(saved).read_metadata()
    SPOILED[how](metadata)
    (saved / ".metadata").write_bytes(pickle.dumps(metadata))
    with pytest.raises(ValueError, match="is not the metadata of a checkpoint: it is damaged"):
        read_metadata(saved)


def test_a_value_of_another_type(saved: Path) -> None:
    metadata = read_metadata(saved)
    with pytest.raises(ValueError, match="its at.text cannot be read .TypeError: a str where int is expected"):
        read_value(saved, metadata, "at.text", int)


def test_truncated_or_missing(saved: Path) -> None:
    content = (saved / ".metadata").read_bytes()
    (saved / ".metadata").write_bytes(content[:-20])
    with pytest.raises(ValueError, match="damaged"):
        read_metadata(saved)
    (saved / ".metadata").unlink()
    with pytest.raises(ValueError, match="cannot be read"):
        read_metadata(saved)


@pytest.mark.parametrize(
    "content", [b"", b"12", b"\xff" * 8 + b"{}", struct.pack("<Q", 9) + b'{"a": 1}', struct.pack("<Q", 8) + b'{"a": 1}']
)
def test_damaged_safetensors_are_one_error(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").write_bytes(content)
    with pytest.raises(ValueError, match="model.safetensors is damaged: its header cannot be read"):
        safetensors_shapes(tmp_path)
