"""One seed gives one model: the initial weights are bit-identical to a single process's under every sharding."""

from typing import Any

import titan_attent.titan.patches.compat

import pytest
import torch
from distributed.spawn import run_on_ranks
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module
from torchtitan.models.llama3 import Transformer, TransformerModelArgs

from titan_attent.titan.models.flavors import EXTRA_FLAVORS

pytestmark = pytest.mark.skipif(
    not titan_attent.titan.patches.compat.IS_CPU, reason="with an accelerator torch draws by itself"
)


def first_weights(mesh: DeviceMesh | None) -> tuple[dict[str, Tensor], Tensor]:
    """The full weights of a llama, and the generator's next numbers."""
    args: Any = EXTRA_FLAVORS["llama3"]["bench"]
    assert isinstance(args, TransformerModelArgs)
    with torch.device("meta"):
        model = Transformer(args)
    if mesh is not None:
        for layer in model.layers.values():
            fully_shard(layer, mesh=mesh)
        fully_shard(model, mesh=mesh)
    model.to_empty(device="cpu")
    torch.manual_seed(7)
    with torch.no_grad():
        model.init_weights()
    weights = {name: p.full_tensor() if isinstance(p, DTensor) else p for name, p in model.named_parameters()}
    return {name: weight.detach().clone() for name, weight in weights.items()}, torch.rand(4)


@pytest.mark.parametrize("num_ranks", [2, 3])
def test_a_llama_starts_alike_on_any_number_of_ranks(num_ranks: int) -> None:
    ((expected, next_draw),) = run_on_ranks(first_weights, 1)
    assert expected["tok_embeddings.weight"].std() > 0.5 and len(expected) > 20
    for weights, draw in run_on_ranks(first_weights, num_ranks):
        assert weights.keys() == expected.keys()
        assert all(torch.equal(weights[name], expected[name]) for name in expected)
        assert torch.equal(draw, next_draw), "the ranks' generators differ"


def draw(weight: Tensor, bias: Tensor) -> None:
    """Draw from every distribution; the truncated normal redraws a third of its values."""
    torch.manual_seed(3)
    with torch.no_grad():
        nn.init.normal_(weight, std=0.5)
        nn.init.trunc_normal_(weight, std=0.5, a=-0.5, b=0.5)
        nn.init.uniform_(bias)
        weight.mul_(bias.sum() if not isinstance(bias, DTensor) else bias.full_tensor().sum())
        nn.init.kaiming_uniform_(weight)


def cut_weights(mesh: DeviceMesh) -> list[tuple[str, list[Tensor]]]:
    """Full tensors of a [9, 5] weight and its bias, drawn under every sharding over four ranks."""
    line, plane = init_device_mesh("cpu", (4,)), init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))
    kinds = {
        "uneven": (line, [Shard(0)], [Shard(0)]),
        "columns": (line, [Shard(1)], [Replicate()]),
        "hsdp": (plane, [Replicate(), Shard(0)], [Replicate(), Shard(0)]),
        "both": (plane, [Shard(0), Shard(1)], [Shard(0), Replicate()]),
    }
    found = []
    for name, (where, weight_cut, bias_cut) in kinds.items():
        weight, bias = (
            distribute_tensor(torch.zeros(shape), where, cut) for shape, cut in (((9, 5), weight_cut), ((9,), bias_cut))
        )
        draw(weight, bias)
        found.append((name, [weight.full_tensor(), bias.full_tensor()]))
    linear = nn.Linear(5, 9)
    parallelize_module(linear, plane["tp"], ColwiseParallel())
    fully_shard(linear, mesh=plane["dp"])
    draw(linear.weight, linear.bias)
    assert "_StridedShard" in type(linear.weight.placements[0]).__name__
    found.append(("strided", [linear.weight.full_tensor().detach(), linear.bias.full_tensor().detach()]))
    return found


def test_every_cut_is_drawn_as_the_whole() -> None:
    weight, bias = torch.zeros(9, 5), torch.zeros(9)
    draw(weight, bias)
    for rank in run_on_ranks(cut_weights, 4):
        assert [name for name, _ in rank] == ["uneven", "columns", "hsdp", "both", "strided"]
        for name, (rank_weight, rank_bias) in rank:
            assert torch.equal(rank_weight, weight) and torch.equal(rank_bias, bias), name
