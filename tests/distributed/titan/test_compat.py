"""Patches of titan/patches/compat.py that only some versions of torch need; their effect is tested on every version."""

from typing import Any

from titan_attent.titan.patches.compat import sum_gradients

import pytest
import torch
from distributed.spawn import run_on_ranks
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard


def clipped(mesh: DeviceMesh) -> list[tuple[str, list[float]]]:
    """Gradients of every kind, summed and clipped: (placement, all values)."""
    rank = mesh.get_local_rank()

    def parameter(grad: Tensor | None, placement: Any = None) -> nn.Parameter:
        if grad is None or placement is None:
            one = nn.Parameter(torch.zeros(2))
            one.grad = grad
            return one
        dtensor = DTensor.from_local(grad, mesh, [placement], run_check=False)
        weights = [Shard(0)] if placement == Shard(0) else [Replicate()]
        one = nn.Parameter(DTensor.from_local(torch.zeros_like(grad), mesh, weights, run_check=False))
        one.grad = dtensor
        return one

    parameters = [
        parameter(torch.tensor([1.0, 2.0]) * (rank + 1), Partial()),
        parameter(torch.tensor([3.0 + rank]), Shard(0)),
        parameter(torch.tensor([5.0, 6.0]), Replicate()),
    ]
    sum_gradients([*parameters, parameter(None), parameter(torch.ones(2))])
    torch.nn.utils.clip_grads_with_norm_(parameters, 1.0, torch.tensor(10.0), foreach=True)
    return [(str(one.grad.placements[0]), one.grad.full_tensor().tolist()) for one in parameters]


def test_partial_gradients_are_summed_and_then_clipped() -> None:
    for rank in run_on_ranks(clipped, 2):
        placements, values = zip(*rank, strict=True)
        assert placements == (str(Replicate()), str(Shard(0)), str(Replicate()))
        assert values == (pytest.approx([0.3, 0.6]), pytest.approx([0.3, 0.4]), pytest.approx([0.5, 0.6]))
