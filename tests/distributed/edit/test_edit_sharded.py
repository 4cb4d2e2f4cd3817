"""Checkpoints of two ranks, cut along rows, along columns and unevenly, are edited like those of one."""

from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp
from distributed.spawn import run_on_ranks
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import Replicate, Shard, distribute_tensor
from unit.edit.made import files_of, load, save, weights

from titan_attent.edit import boxes as boxes_module
from titan_attent.edit.command import main

PLACEMENTS = {
    "layers.0.attention.wq.weight": Shard(1),
    "layers.1.moe.experts.w1": Shard(0),  # three experts on two ranks
    "norm.weight": Shard(0),
    "layers.0.feed_forward.w1.weight": Replicate(),
}


def save_sharded(mesh: DeviceMesh, folder: str) -> None:
    for name, seed in (("a2", 1), ("b2", 2)):
        tensors = {
            key: distribute_tensor(tensor, mesh, [PLACEMENTS[key]]) if key in PLACEMENTS else tensor
            for key, tensor in weights(seed).items()
        }
        dcp.save(tensors | {"optimizer": {"state": tensors["norm.weight"]}}, checkpoint_id=f"{folder}/{name}")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sharded")
    run_on_ranks(save_sharded, 2, str(folder))
    save(folder / "a1", weights(1))
    save(folder / "b1", weights(2))
    return folder


@pytest.mark.parametrize("options", [[], ["--rank", "2"], ["--keep", "0.4"]], ids=str)
def test_the_result_does_not_depend_on_the_ranks_that_wrote(
    folder: Path, tmp_path: Path, options: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Bit for bit, for the base, for the vector, and for both."""
    monkeypatch.setattr(boxes_module, "ELEMENTS", 30)
    written = []
    for base, tuned in (("a1", "b1"), ("a2", "b1"), ("a1", "b2"), ("a2", "b2")):
        out = tmp_path / f"{base}{tuned}"
        assert main([str(folder / base), "+", "0.4", str(folder / tuned), "--output", str(out), *options]) == 0
        written.append({name: content for name, content in files_of(out).items() if name != "edit.json"})
    assert all(one == written[0] for one in written)
    expected = weights(1)["norm.weight"] + 0.4 * (weights(2)["norm.weight"] - weights(1)["norm.weight"])
    if not options:
        torch.testing.assert_close(load(tmp_path / "a2b2")["norm.weight"], expected)
