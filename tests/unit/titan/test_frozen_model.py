"""titan/frozen_model.py: weights that are read into a second model, from checkpoints that are damaged in some way."""

from contextlib import nullcontext
from pathlib import Path

import titan_attent.titan.patches.compat  # noqa: F401

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch import nn

from titan_attent.titan.checkpoint_metadata import check_files, read_metadata
from titan_attent.titan.frozen_model import FrozenModel


def frozen_model() -> FrozenModel:
    return FrozenModel(nn.Linear(4, 4, bias=False).requires_grad_(False), tokenizer=None, precision=nullcontext)


def saved(folder: Path, weight: torch.Tensor) -> Path:
    dcp.save({"weight": weight}, checkpoint_id=folder, no_dist=True)
    return folder


def test_weights_that_are_not_finite_are_refused(tmp_path: Path) -> None:
    frozen, good = frozen_model(), torch.randn(4, 4)
    frozen.load(str(saved(tmp_path / "good", good)))
    assert torch.equal(frozen.model.weight, good)  # type: ignore[arg-type]
    for value in ("nan", "inf"):
        bad = good.clone()
        bad[2, 1] = float(value)
        with pytest.raises(ValueError, match=f"the frozen model of {tmp_path / value} has weights that are NaN or inf"):
            frozen.load(str(saved(tmp_path / value, bad)))


def test_a_damaged_checkpoint_is_one_error(tmp_path: Path) -> None:
    """Its file has changed since the checks before the start."""
    path = saved(tmp_path / "step-1", torch.randn(4, 4))
    for file in path.glob("*.distcp"):
        file.write_bytes(b"x" * file.stat().st_size)
    with pytest.raises(ValueError, match=f"the frozen model of {path} cannot be loaded"):
        frozen_model().load(str(path))
    for file in path.glob("*.distcp"):
        file.unlink()
    with pytest.raises(ValueError, match="cannot be loaded .* missing or damaged"):
        frozen_model().load(str(path))


def test_missing_and_short_files_are_named(tmp_path: Path) -> None:
    path = saved(tmp_path / "step-1", torch.randn(4, 4))
    metadata, (file,) = read_metadata(path), path.glob("*.distcp")
    check_files(path, metadata, names=["weight"])
    file.write_bytes(file.read_bytes()[:100])
    with pytest.raises(ValueError, match=f"{file.name} is shorter, 100 bytes, than the"):
        check_files(path, metadata, names=["weight"])
    check_files(path, metadata, names=["other"])
    file.unlink()
    with pytest.raises(ValueError, match=f"{file.name} is missing"):
        check_files(path, metadata, names=["weight"])
