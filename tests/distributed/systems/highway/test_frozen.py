"""Highway backpropagation under FSDP2 with frozen modules, measured or not.

The gradients equal those of the unsharded model, every microbatch's backward is finalized, and no group is gathered
more often than in backpropagation.
"""

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any
from unittest import mock

import titan_attent.titan.patches.compat  # noqa: F401

import numpy as np
import pytest
import torch
from distributed.parallel_world import full
from distributed.spawn import run_on_ranks
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.fsdp._fully_shard._fsdp_param_group import FSDPParamGroup

from titan_attent.systems.highway.links import Cuts, tied_embeddings
from titan_attent.systems.highway.sums import Sums, read
from titan_attent.systems.highway.sweep import sweep

NUM_BLOCKS, WIDTH, VOCABULARY, MICROBATCHES = 3, 8, 12, 2
BOTTOM = ("tok_embeddings",)
FROZEN: dict[str, tuple[str, ...]] = {
    "nothing": (),
    "a middle block": ("layers.1",),
    "the embedding and one matrix of the first block": (*BOTTOM, "layers.0.up"),
    "the embedding and the first block": (*BOTTOM, "layers.0"),
    "the embedding and another block": (*BOTTOM, "layers.1"),
    "all below the last block": (*BOTTOM, "layers.0", "layers.1"),
    "all below the head": (*BOTTOM, "layers"),
}
TIED = ("nothing", "a middle block", "the embedding and the first block")
"""Cases with tied embeddings, where a frozen embedding also freezes the head."""
WAYS: dict[str, tuple[int | None, bool]] = {
    "exact": (None, False),
    "k = 0": (0, False),
    "k = 0, cosines": (0, True),
    "k = 1": (1, False),
    "k = 1, cosines": (1, True),
    "k = L": (NUM_BLOCKS, False),
}
"""name -> (rounds, or None for backpropagation; whether the exact gradient is measured)."""


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.up, self.down = nn.RMSNorm(WIDTH), nn.Linear(WIDTH, 2 * WIDTH), nn.Linear(2 * WIDTH, WIDTH)

    def forward(self, h: Tensor) -> Tensor:
        return h + self.down(torch.tanh(self.up(self.norm(h))))


class Model(nn.Module):
    def __init__(self, *, is_tied: bool) -> None:
        super().__init__()
        self.tok_embeddings = nn.Embedding(VOCABULARY, WIDTH)
        self.layers = nn.ModuleList(Block() for _ in range(NUM_BLOCKS))
        self.norm, self.output = nn.RMSNorm(WIDTH), nn.Linear(WIDTH, VOCABULARY, bias=False)
        if is_tied:
            self.output.weight = self.tok_embeddings.weight

    def forward(self, tokens: Tensor) -> Tensor:
        h = self.tok_embeddings(tokens)
        for block in self.layers:
            h = block(h)
        return self.output(self.norm(h))


def model_of(*, is_tied: bool) -> Model:
    torch.manual_seed(0)
    return Model(is_tied=is_tied).double()


def shard(model: Model, mesh: DeviceMesh, *, is_tied: bool) -> None:
    """Shard in torchtitan's groups, with tied embeddings in one group with the head (titan/patches/compat.py)."""
    for block in model.layers:
        fully_shard(block, mesh=mesh)
    if is_tied:
        fully_shard([model.tok_embeddings, model.norm, model.output], mesh=mesh)
    else:
        fully_shard(model.tok_embeddings, mesh=mesh)
        fully_shard([model.norm, model.output], mesh=mesh)
    fully_shard(model, mesh=mesh)


@contextmanager
def counted() -> Iterator[Counter[str]]:
    seen: Counter[str] = Counter()
    finalize, unshard = FSDPParamGroup.finalize_backward, FSDPParamGroup.unshard

    def finalized(group: Any) -> None:
        seen["finalized"] += 1
        finalize(group)

    def gathered(group: Any, *args: Any, **kwargs: Any) -> Any:
        seen["gathered"] += group._all_gather_result is None and not group.is_unsharded
        return unshard(group, *args, **kwargs)

    with (
        mock.patch.object(FSDPParamGroup, "finalize_backward", finalized),
        mock.patch.object(FSDPParamGroup, "unshard", gathered),
    ):
        yield seen


def train(model: Model, way: str, frozen: tuple[str, ...]) -> dict[str, Any]:
    """The gradients of two microbatches after a step with all modules active, and FSDP2's calls for each."""
    rounds, measured = WAYS[way]
    cuts = Cuts(
        list(model.layers),
        root=model,
        tied=tied_embeddings(model),
        needs_input_gradients=lambda: None if rounds is None else rounds > 0 or measured,
    )
    found: dict[str, Any] = {"counts": [], "left": [], "cosines": []}

    def microbatch(seed: int) -> None:
        tokens = torch.randint(VOCABULARY, (2, 5), generator=torch.Generator().manual_seed(seed))
        with counted() as seen:
            loss = nn.functional.cross_entropy(model(tokens).flatten(0, 1), tokens.flatten())
            cuts.set_last(rounds is None)
            loss.backward()
            if rounds is not None and (top := cuts.gradient()) is not None:
                sums = Sums(NUM_BLOCKS, rounds, wants_exact=True, device=torch.device("cpu")) if measured else None
                cuts.send_below(sweep(cuts.links, top, iterations=rounds, sums=sums))
                assert all(link.x.grad is None for link in cuts.links)
                if sums is not None:
                    found["cosines"].append(read(sums.table).cosines)
            cuts.clear()
        found["counts"].append(seen)
        states: list[Any] = [m._get_fsdp_state() for m in model.modules() if isinstance(m, FSDPModule)]
        groups = [group for state in states for group in state._fsdp_param_groups] if states else []
        order = len(states[0]._comm_ctx.post_forward_order) if states else 0
        found["left"].append((order, sum(group.is_unsharded for group in groups[1:])))

    microbatch(0)
    found["counts"].clear(), found["left"].clear(), found["cosines"].clear()
    model.zero_grad()
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()
    for name in frozen:
        for parameter in model.get_submodule(name).parameters():
            parameter.requires_grad_(False)
    for seed in range(MICROBATCHES):
        microbatch(1 + seed)
    cuts.remove()
    named = model.named_parameters()
    found["gradients"] = {name: full(weight.grad) for name, weight in named if weight.grad is not None}
    return found


def work(mesh: DeviceMesh | None, cases: list[tuple[str, str, bool]]) -> dict[Any, dict[str, Any]]:
    results = {}
    for way, frozen, is_tied in cases:
        model = model_of(is_tied=is_tied)
        if mesh is not None:
            shard(model, mesh, is_tied=is_tied)
        results[way, frozen, is_tied] = train(model, way, FROZEN[frozen])
    return results


CASES = [(way, frozen, False) for way in WAYS for frozen in FROZEN]
CASES += [(way, frozen, True) for way in WAYS for frozen in TIED]


@cache
def sharded() -> dict[Any, dict[str, Any]]:
    return run_on_ranks(work, 2, CASES, timeout=300.0)[0]


@cache
def whole() -> dict[Any, dict[str, Any]]:
    return work(None, CASES)


@pytest.mark.parametrize("way", WAYS)
def test_gradients_are_those_of_the_whole_model(way: str) -> None:
    for case in (case for case in CASES if case[0] == way):
        found, expected = sharded()[case]["gradients"], whole()[case]["gradients"]
        frozen = FROZEN[case[1]] + (("output",) if case[2] and BOTTOM[0] in FROZEN[case[1]] else ())
        learns = {name for name, _ in model_of(is_tied=case[2]).named_parameters() if not name.startswith(frozen)}
        assert found.keys() == expected.keys() == learns, case
        for name in found:
            np.testing.assert_allclose(found[name], expected[name], rtol=1e-9, atol=1e-14, err_msg=f"{case} {name}")


def test_as_many_rounds_as_blocks_are_backpropagation_whatever_is_frozen() -> None:
    for way, frozen, is_tied in CASES:
        if way == "k = L":
            expected = whole()["exact", frozen, is_tied]["gradients"]
            for name, gradient in sharded()[way, frozen, is_tied]["gradients"].items():
                np.testing.assert_allclose(gradient, expected[name], rtol=1e-9, atol=1e-14, err_msg=f"{frozen} {name}")


def test_frozen_modules_change_no_other_gradient() -> None:
    for way, frozen, is_tied in CASES:
        expected = whole()[way, "nothing", is_tied]["gradients"]
        for name, gradient in sharded()[way, frozen, is_tied]["gradients"].items():
            np.testing.assert_allclose(gradient, expected[name], rtol=1e-9, atol=1e-14, err_msg=f"{way} {frozen}")


@pytest.mark.parametrize("way", WAYS)
def test_the_last_pass_of_each_microbatch_is_known_to_fsdp(way: str) -> None:
    for case in (case for case in CASES if case[0] == way):
        found, stock = sharded()[case], sharded()["exact", case[1], case[2]]
        for now, exact in zip(found["counts"], stock["counts"], strict=True):
            assert now["finalized"] == exact["finalized"] > 0, case
            assert now["gathered"] <= exact["gathered"], case
        assert found["left"] == [(0, 0)] * MICROBATCHES, case


def test_cosines_are_numbers_whatever_is_frozen() -> None:
    measured = [case for case in CASES if WAYS[case[0]][1]]
    for case in measured:
        found, expected = sharded()[case]["cosines"], whole()[case[0], "nothing", case[2]]["cosines"]
        assert len(found) == MICROBATCHES and np.isfinite(found).all(), case
        assert np.shape(found) == np.shape(expected)
